"""Fills the tables of the pages under docs/results, each from the results.json in its folder.

    python -m benchmarks.harness.pages                              fills all pages again
    python -m benchmarks.harness.pages tasks OUT/denoise-0.2        first adds what a command wrote into a folder
    python -m benchmarks.harness.pages mnist RUN --entry run --command 'fastebm train ...'      or a finished run
    python -m benchmarks.harness.pages mnist RUNS --entry seeds --command 'fastebm train ... --seeds 3'   or several

A table stands between two marks. The words around it are written by a person and stay. results.json has an entry for
each command, run or measurement, by name; the tables of a page are made of these entries alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fastebm.cli.seeds import SHOWN, largest_energy, last_tenth
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.evaluation.speed.table import markdown_table
from fastebm.runs.files import write_json
from fastebm.runs.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
# What commands write: their numbers, and pictures that take the name of the entry alone.
NUMBERS = ("numbers.json", "results.json", "detect.json", "evaluation.json", "verdict.json")
ONLY_PICTURES = ("denoised", "inpainted", "grid")
NEARLY = 200
"""By how many updates a stage that was stopped by hand may lack its end and still be shown."""

Entry = dict[str, Any]
Sections = Callable[[dict[str, Entry]], dict[str, str]]
"""The tables of a page by the names of their marks, from the entries of its results.json."""


# ---- filling


def fill_section(text: str, name: str, content: str) -> str:
    """`text` with `content` between the marks of that name. Raises SystemExit where a mark is missing."""
    begin, end = f"<!-- {name}: ", f"<!-- {name}: end -->"
    found = re.search(rf"({re.escape(begin)}[^\n]*-->\n).*?({re.escape(end)})", text, flags=re.DOTALL)
    if found is None or found[1].strip() == end:
        raise SystemExit(f"the page lacks the lines {begin}... --> and {end}: put them where the table belongs")
    return f"{text[: found.start()]}{found[1]}\n{content}\n\n{found[2]}{text[found.end() :]}"


def read_entries(page: Path) -> dict[str, Entry]:
    """The entries of a page's results.json; none where there is no such file yet."""
    path = page / "results.json"
    return json.loads(path.read_text()) if path.exists() else {}


def add_entry(page: Path, name: str, entry: Entry, sections: Sections) -> None:
    """Writes an entry into the page's results.json and fills the page; both are made where they are missing."""
    page.mkdir(parents=True, exist_ok=True)
    write_json(page / "results.json", read_entries(page) | {name: entry})
    readme = page / "README.md"
    if not readme.exists():
        readme.write_text(f"# {page.name}\n")
    fill_page(page, sections)


def fill_page(page: Path, sections: Sections) -> None:
    """Fills every table of the page's README.md; marks that it lacks are put at its end."""
    readme = page / "README.md"
    text = readme.read_text()
    for name, content in sections(read_entries(page)).items():
        if f"<!-- {name}: " not in text:
            text += f"\n<!-- {name}: filled by benchmarks/harness/pages.py -->\n<!-- {name}: end -->\n"
        text = fill_section(text, name, content)
    readme.write_text(text)


def collect(page: Path, folder: Path, name: str, sections: Sections, command: str = "", commit: str = "") -> None:
    """Adds the output folder of a command to a page, or a run's folder where it has a log.

    Copies the numbers, without the folders of this machine's paths, and those pictures that the page shows.
    """

    def read(file: str) -> Entry:
        return json.loads(re.sub(r'(?<=")/[^"\s]*/(?=[^"]*")', "", (folder / file).read_text()))

    entry: Entry = {}
    for file in (file for file in NUMBERS if (folder / file).exists()):
        entry |= {"evaluation": read(file)} if file == "evaluation.json" else read(file)
    if (folder / "log.jsonl").exists():
        entry |= run_facts(folder, command, commit or None) | {"config": read("config.json")}
    if (folder / "seeds.json").exists():
        machine = machine_facts("cpu")
        entry |= read("seeds.json") | {"command": command, "machine": machine | ({"commit": commit} if commit else {})}
    if isinstance(entry.get("run"), str):
        entry["run"] = Path(entry["run"]).name
    title = read_entries(page).get(name, {}).get("title")
    add_entry(page, name, entry | ({} if title is None else {"title": title}), sections)
    shown = (page / "README.md").read_text()
    for picture in folder.glob("*.png"):
        target = page / (f"{name}.png" if picture.stem in ONLY_PICTURES else f"{name}-{picture.name}")
        if target.name in shown:
            Image.open(picture).convert("P", palette=Image.Palette.ADAPTIVE).save(target, optimize=True)


def run_facts(run: Path, command: str, commit: str | None) -> Entry:
    """Stages, time and rollbacks of a finished run, and the machine: this one, on which the run was trained."""
    folder = RunFolder.existing(run)
    lines = folder.log.lines()
    of_stage: dict[str, list[Entry]] = {}
    for line in lines:
        of_stage.setdefault(str(line.get("size", 0)), []).append(line)
    newest = max((run / "checkpoints").glob("iteration-*.json"))
    machine = machine_facts("cpu") | {"threads": folder.threads()}
    return {
        "command": command,
        "finished_iteration": lines[-1]["iteration"],
        "training_seconds": lines[-1]["seconds"],
        "rollbacks": json.loads(newest.read_text()).get("state", {}).get("guard", {}).get("rollbacks", []),
        "stages_cumulative": {size: stage_facts(found) for size, found in of_stage.items()},
        "machine": machine | ({} if commit is None else {"commit": commit, "dirty": None}),
    }


def stage_facts(lines: Sequence[Entry]) -> Entry:
    """What the lines of a stage's log say of it, of its first half, and of how it ended."""
    newest, end = lines[-1], last_tenth(lines)
    moved = [line.get("displacement", 0.0) for line in lines[: max(1, len(lines) // 2)]]
    return {
        "largest_energy": largest_energy(lines) or 0.0,
        "iterations": newest["iteration"],
        "seconds": newest["seconds"],
        "end_gap": newest.get("gap", 0.0),
        "first_half": {"displacement": statistics.median(moved)},
        "last_tenth": {
            "largest_energy": largest_energy(end) or 0.0,
            **{name: statistics.fmean(line.get(name, 0.0) for line in end) for name in ("gap", "displacement")},
        },
    }


# ---- tables


def each(make: Callable[[str, Entry], str]) -> Sections:
    """The sections of a page that has one table for each entry, of the entry's name."""
    return lambda entries: {name: make(name, entry) for name, entry in entries.items()}


def run_sections(entries: dict[str, Entry]) -> dict[str, str]:
    """What each run of a page did, and where it has several that were evaluated, a comparison of them."""
    found = {name: run_table(entry) for name, entry in entries.items() if "stages_cumulative" in entry}
    found |= {name: seeds_table(entry) for name, entry in entries.items() if "summary" in entry}
    evaluated = [entry for entry in entries.values() if "evaluation" in entry]
    if len(evaluated) > 1:
        found["runs"] = markdown_table(
            ("run", "updates", "minutes", "Fréchet distance", "over the reference", "kernel distance", "confident"),
            map(_run_row, evaluated),
        )
    return found


def seeds_table(entry: Entry) -> str:
    """What `fastebm train ... --seeds` wrote: each run, and mean and spread of those that came to their end."""
    names = {name: title for name, title in SHOWN.items() if any(run.get(name) is not None for run in entry["runs"])}

    def row(first: str, numbers: Mapping[str, Any]) -> list[str]:
        return [first, *("" if numbers.get(name) is None else f"{numbers[name]:.3g}" for name in names)]

    runs, summary, machine = entry["runs"], entry["summary"], entry["machine"]
    rows = [row(f"{run['seed']}" if run["finished"] else f"{run['seed']} (stopped)", run) for run in runs]
    rows += [row(word, {name: summary[name][word] for name in names if name in summary}) for word in ("mean", "spread")]
    head = (
        f"`{entry['command']}`",
        f"{machine['cpu']} ({', '.join(machine['cpu_features'])}), torch {machine['torch']}, commit "
        f"{str(machine['commit'])[:7]}; {summary['finished']} of {len(runs)} runs came to their end.",
    )
    return "\n\n".join((*head, markdown_table(("seed", *names.values()), rows)))


def zebra64_sections(entries: dict[str, Entry]) -> dict[str, str]:
    """The seeds of the page, and single runs with other settings, where a stage nearly came to its end."""
    runs = {name: entry for name, entry in entries.items() if "stages_cumulative" in entry}
    found = {
        name: seeds_table(entry) if "summary" in entry else energy_scale_table(entry)
        for name, entry in entries.items()
        if name not in runs
    }
    others = []
    for name, entry in runs.items():
        planned = itertools.accumulate(entry["config"]["config"]["iterations"])
        for (size, stage), whole in zip(entry["stages_cumulative"].items(), planned, strict=False):
            if int(size) >= 32 and stage["iterations"] > whole - NEARLY:
                others.append((entry.get("title", name), f"{size}²", *_stage_cells(stage)))
    head = ("settings", "stage", "at update", "change of a pixel, first half", "at the end", "largest energy", "gap")
    return found | {"settings": markdown_table(head, others)}


def _stage_cells(stage: Entry) -> tuple[str, ...]:
    end = stage["last_tenth"]
    return (
        str(stage["iterations"]),
        f"{stage['first_half']['displacement']:.3f}",
        f"{end['displacement']:.3f}",
        f"{end['largest_energy']:.1f}",
        f"{end['gap']:+.2f}",
    )


def energy_scale_table(entry: Entry) -> str:
    """How far chains lower the energy, beside what their way predicts."""
    rows = [
        (
            row["run"],
            f"{row['step_size']:g}",
            f"{row['size']}²",
            f"{row['squared_way']:.0f}",
            f"{row['predicted']:.2f}",
            f"{row['fall']:.2f}",
        )
        for row in entry["rows"]
    ]
    return markdown_table(("run", "η", "level", "d²", "d² / (ηK)", "fall of the energy"), rows)


def _run_row(entry: Entry) -> list[str]:
    stages = [stage["iterations"] for stage in entry.get("stages_cumulative", {}).values()]
    done = [now - before for now, before in zip(stages, [0, *stages], strict=False)]
    in_features = entry["evaluation"]["in_features"]
    seconds, distances = entry.get("training_seconds"), in_features["distances"]
    return [
        entry["title"],
        ", ".join(map(str, done or entry["config"]["config"]["iterations"])),
        "not kept" if seconds is None else f"{seconds / 60:.1f}",
        f"{distances['samples']['frechet']:.3g}",
        f"{reference_ratio(distances):.1f}",
        f"{distances['samples']['kernel']:.3f}",
        f"{in_features['classes']['confident_share']:.0%}",
    ]


def reference_ratio(distances: Entry) -> float:
    """The samples' Fréchet distance over that of as many unseen real images."""
    return distances["samples_at_reference_count"]["frechet"] / distances["reference"]["frechet"]


def run_table(entry: Entry) -> str:
    """Machine, time and stages of one run, and its evaluation where it has one."""
    machine, before, stages = entry["machine"], {"iterations": 0, "seconds": 0.0}, []
    for size, stage in entry["stages_cumulative"].items():
        seconds, count = (stage[key] - before[key] for key in ("seconds", "iterations"))
        energy, gap, before = stage["largest_energy"], stage["end_gap"], stage
        stages.append((f"{size}²", count, f"{seconds / 60:.1f}", f"{energy:.1f}", f"{gap:+.3f}"))
    parts = [
        f"`{entry['command']}`",
        f"{machine['cpu']} ({', '.join(machine['cpu_features'])}), {machine['cores']} cores, threads used: "
        f"{machine['threads']}, torch {machine['torch']}, commit {str(machine['commit'])[:7]}; "
        f"{entry['training_seconds'] / 60:.1f} minutes; rollbacks by the guard: {len(entry['rollbacks'])}.",
        markdown_table(("stage", "iterations", "minutes", "largest energy", "gap at the end"), stages),
    ]
    if "evaluation" in entry:
        parts += evaluation_tables(entry["evaluation"])
    return "\n\n".join(parts)


def evaluation_tables(evaluation: Entry) -> list[str]:
    """What `fastebm evaluate` measured in the features of its small classifier."""
    measured, energy = evaluation["in_features"], evaluation.get("energy_metrics")
    distances, classes, nearest = measured["distances"], measured["classes"], measured["nearest"]
    names = {
        "samples": "samples",
        "reference": f"real against real: {distances['reference_kind']}",
        "noise": "uniform noise",
    }
    forms = {"frechet": ".3g", "kernel": ".3g", "precision": ".2f", "recall": ".2f"}
    rows = [
        (name, found["count"], *(format(found[key], form) for key, form in forms.items()))
        for name, found in ((name, distances[key]) for key, name in names.items())
    ]
    facts = [
        (f"classes found, of {len(classes['names'])}", classes["found"], classes["found_real"]),
        ("share of the most frequent class", *_both("{:.1%}", classes, "largest_share")),
        ("entropy of classes", *_both("{:.3f}", classes, "entropy")),
        ("share classified with confidence 0.9 or more", *_both("{:.1%}", classes, "confident_share")),
        ("median distance to the nearest training image", *_both("{:.2f}", nearest, "median")),
        ("first percentile of that distance", *_both("{:.2f}", nearest, "first_percentile")),
    ]
    if energy:
        facts.append(("mean energy", f"{energy['energy_samples']:.3f}", f"{energy['energy_data']:.3f}"))
    return [
        f"In the features of a classifier that is right on {measured['accuracy']:.1%} of unseen images (distances are "
        f"{measured['note']}):",
        markdown_table(("", "count", "Fréchet distance", "kernel distance", "precision", "recall"), rows),
        f"The samples' Fréchet distance is {reference_ratio(distances):.1f} times that between real images.",
        markdown_table(("", "samples", "real"), facts),
    ]


def _both(form: str, numbers: Entry, key: str) -> tuple[str, str]:
    return form.format(numbers[key]), form.format(numbers[f"{key}_real"])


def digits_sections(entries: dict[str, Entry]) -> dict[str, str]:
    """What `fastebm demo` said of its samples."""
    found = entries["demo"]
    rows = [
        ("classes found, of 10", found["classes_found"], ""),
        ("share classified with confidence 0.9 or more", *_both("{:.1%}", found, "confident_share")),
        ("median distance to the nearest training digit", *_both("{:.2f}", found, "distance_median")),
        ("first percentile of that distance", *_both("{:.2f}", found, "distance_first_percentile")),
    ]
    head = (
        f"{found['samples']:,} samples after {found['training_seconds']:.0f} s of training; the classifier is right on "
        f"{found['accuracy']:.1%} of held-out digits."
    )
    return {"digits": f"{head}\n\n{markdown_table(('', 'samples', 'real'), rows)}"}


IMAGES = {
    "zebra64-": "zebras at 64x64, preset pictures",
    "cifar10-pictures-": "CIFAR-10, preset pictures",
    "cifar10-": "CIFAR-10",
    "": "MNIST",
}
"""What entries of the tasks' page are of, by the beginning of their names; the longest comes first."""


def images_of(name: str) -> str:
    """The images that an entry of the tasks' page is of, by its name."""
    return next(images for start, images in IMAGES.items() if name.startswith(start))


def task_sections(entries: dict[str, Entry]) -> dict[str, str]:
    """Denoising, inpainting and interpolation on MNIST and on photographs, a table for each."""
    order = list(reversed(IMAGES.values()))
    ordered = sorted(entries.items(), key=lambda item: order.index(images_of(item[0])))
    denoised = [row for name, numbers in ordered if "denoise-" in name for row in _denoise_rows(name, numbers)]
    errors = ("best", "mean_of_chains", "nearest", "mean", "neighbour_mean")
    inpainted = [
        (
            f"{images_of(name)}, {found['pattern']}, {found['images']} images, from "
            f"{'lowest resolution' if found['options']['coarse'] else 'full size'}",
            f"{found['hole']:.2f}",
            *(f"{found['error'][key]:.3f}" for key in errors),
            f"{found['diversity']:.3f}",
        )
        for name, found in ordered
        if "inpaint-" in name
    ]
    head = (
        "lowest energy",
        "all chains",
        "nearest chain",
        "mean of chains",
        "mean of surroundings",
        "spread of chains",
    )
    return {
        "denoise": markdown_table(("images, noise, method", "PSNR, dB", "SSIM", "settings"), denoised),
        "inpaint": markdown_table(("images, hole, start", "share", *head), inpainted),
        "interpolate": markdown_table(("quantity", "value"), _interpolate_rows(entries["interpolate"])),
    }


def _denoise_rows(name: str, numbers: Entry) -> Iterable[Sequence[str]]:
    o = numbers["options"]
    settings = (
        f"start {o['start_size'] or 'full size'}, {o['num_chains']} chains of {o['num_steps']} steps of "
        f"{o['step_size']:g} a level, temperature {o['temperature']:g}, noise {o['noise_std']:g}"
    )
    for method, quality in numbers["quality"].items():
        title = f"{images_of(name)}, {numbers['noise']:g}, {method}"
        yield title, f"{quality['psnr']:.2f}", f"{quality['ssim']:.3f}", settings if method == "restored" else ""


def _interpolate_rows(numbers: Entry) -> list[tuple[str, str]]:
    images, near = numbers["images"], numbers["neighbours"]
    values = {
        "energy at the ends of paths between images": images["energy_ends"],
        "highest energy of straight paths": images["highest_energy_straight"],
        "highest energy of relaxed paths": images["highest_energy_relaxed"],
    }
    for between in ("noise", "coarse"):
        values |= {
            f"between {between}: energy at the ends": numbers[between]["energy_ends"],
            f"between {between}: energy in between": numbers[between]["energy_between"],
            f"between {between}: largest step, as a share of the path": numbers[between]["largest_step"],
        }
    values |= {
        "distance of samples to the nearest training image": near["samples"],
        "the smallest of these distances": near["samples_smallest"],
    }
    if "unseen_images" in near:
        values["distance of images that were not learned"] = near["unseen_images"]
    became_lower = ("paths that became lower", f"{images['paths_that_became_lower']} of {images['pairs']}")
    return [became_lower, *((name, f"{value:.2f}") for name, value in values.items())]


def detect_table(name: str, entry: Entry) -> str:
    """AUROC, a row for each score and a column for each set of outliers, with FPR@95 in brackets."""
    sets = entry["metrics"]
    rows = []
    for score in next(iter(sets.values())):
        found = [metrics[score] for metrics in sets.values()]
        rows.append((score.replace("_", " "), *(f"{m['auroc']:.3f} ({m['fpr95']:.2f})" for m in found)))
    return markdown_table(("AUROC (FPR@95)", *(name.replace("_", " ") for name in sets)), rows)


def restoration_sections(entries: dict[str, Entry]) -> dict[str, str]:
    """A row for each method of each call of `fastebm restore`."""
    rows = [
        (
            f"{found['images']} of {name}",
            method,
            f"{quality['psnr']:.2f}",
            f"{quality['ssim']:.3f}",
            f"{quality['residual_rms']:.1e}",
            f"{found['seconds']:.1f}" if method == "restored" else "",
        )
        for name, found in sorted(entries.items())
        for method, quality in found["measures"].items()
    ]
    return {
        "restore": markdown_table(
            ("images, task", "method", "PSNR, dB", "SSIM", "residual, RMS", "seconds"), rows, words=2
        )
    }


def translation_table(name: str, entry: Entry) -> str:
    """What a classifier of both domains says of the images before and after chains with each setting."""
    head = (
        f"{entry['images']} test images at {entry['size']}x{entry['size']}, {entry['num_steps']} updates a level. The "
        f"classifier is right on {entry['classifier_accuracy']:.0%} of unseen images of both domains, and classifies "
        f"{entry['samples_classified_as_target']:.0%} of the run's own samples as the target."
    )
    rows = [
        (row["chains"], f"{row['classified_as_target']:.0%}", f"{row['change']:.3f}", f"{row['correlation']:.2f}")
        for row in entry["rows"]
    ]
    columns = ("chains", "classified as the target", "mean change of a pixel", "correlation with the source")
    return f"{head}\n\n{markdown_table(columns, rows)}"


def translation_sections(entries: dict[str, Entry]) -> dict[str, str]:
    """The tables of the measured runs; other entries are what the command itself wrote."""
    return {name: translation_table(name, entry) for name, entry in entries.items() if "rows" in entry}


def stability_sections(entries: dict[str, Entry]) -> dict[str, str]:
    """Two studies, the second in two dtypes, with a row for each variant of training."""
    tables = {
        "stability": stability_table,
        "explosions": explosion_table,
        "explosions-float32": explosion_table,
    }
    return {name: make(entries[name]) for name, make in tables.items() if name in entries}


def stability_table(entry: Entry) -> str:
    """A row for each variant of a short run, means over seeds."""
    rows = []
    for variant in dict.fromkeys(row["variant"] for row in entry["rows"]):
        group = [row for row in entry["rows"] if row["variant"] == variant]
        keys = {"largest_energy": ".1f", "largest_energy_end": ".1f", "gap_end": ".2f"}
        means = [format(statistics.fmean(row[key] for row in group), form) for key, form in keys.items()]
        rows.append((variant, len(group), sum(row["exploded"] is not None for row in group), *means))
    head = ("variant", "runs", "exploded", "largest energy", "at the end", "mean gap at the end")
    return markdown_table(head, rows)


def explosion_table(entry: Entry) -> str:
    """A row for each variant of a run that explodes: how often and when, energies and distance of what did not."""
    rows = []
    for variant in dict.fromkeys(row["variant"] for row in entry["rows"]):
        group = [row for row in entry["rows"] if row["variant"] == variant]
        when = sorted(row["exploded"]["iteration"] for row in group if row["exploded"])
        ended = [row for row in group if not row["exploded"]]
        keys = {"largest_energy_end": ".1f", "gap_end": ".2f", "distance": ".1f"}
        ranges = [_range([row[key] for row in ended], form) if ended else "" for key, form in keys.items()]
        rows.append((variant, len(group), len(when), ", ".join(map(str, when)), *ranges))
    head = ("variant", "runs", "exploded", "at update", "largest energy at the end", "gap", "Fréchet distance")
    reference = entry["reference"]
    real = f"Between real images the distance is {reference['distance']:.2f}, to noise {reference['noise']:.0f}."
    return f"{markdown_table(head, rows)}\n\n{real}"


def _range(values: list[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def one_pass_table(name: str, entry: Entry) -> str:
    """Images a second of one decoder pass and of chains."""
    rows = [
        (row["method"], f"{row['images_per_second']:.4g}", _interval(row, "ratio", 3), row["gradients"])
        for row in entry["rows"]
    ]
    return markdown_table(("method", "images a second", "time over one pass (20 to 80 %)", "gradients on"), rows)


def gpu_model_sections(entries: dict[str, Entry]) -> dict[str, str]:
    """What was counted of GPU kernels: noise in CUDA and in Triton, activations."""
    counted = {name: entry for name, entry in entries.items() if "compiler" in entry}
    of_triton = {name: entry for name, entry in counted.items() if entry["compiler"].startswith("Triton")}
    of_cuda = {name: entry for name, entry in counted.items() if name not in of_triton}
    return {
        "instructions": _instruction_table(of_cuda),
        "triton": _instruction_table(of_triton),
        "activations": _activation_table(entries["activations"]),
        "compilation": _compilation_table(entries["compilation"]),
    }


def _instruction_table(entries: dict[str, Entry]) -> str:
    """Instructions a quad of each kernel: a column for each state of the sources."""
    counted: dict[tuple[str, str], dict[str, float]] = {}
    for name, entry in entries.items():
        for row in entry["rows"]:
            counted.setdefault((row["kernel"], row["architecture"]), {})[name] = row["instructions a quad"]
    rows = [(*kernel, *(f"{states[name]:.0f}" for name in entries)) for kernel, states in sorted(counted.items())]
    return markdown_table(("kernel", "for", *(name.removeprefix("Triton: ") for name in entries)), rows, words=2)


def _activation_table(entry: Entry) -> str:
    """Instructions of an activation with its derivative, exact and approximate, and what the latter loses."""
    rows = [
        (
            row["activation"],
            *(f"{row[f'instructions, {how}']:.0f}" for how in ("float32", "bfloat16")),
            *(f"2^{math.ceil(math.log2(row[key]))}" for key in ("error", "error of the derivative")),
        )
        for row in entry["rows"]
    ]
    head = ("activation", "float32", "bfloat16", "error of bfloat16", "of its derivative")
    return f"{entry['counted with']}, for sm_90.\n\n{markdown_table(head, rows)}"


def _compilation_table(entry: Entry) -> str:
    """Kernels and waits of each level of a cascade."""
    rows = [(f"{row['level']}x{row['level']}", row["kernels"], row["waits"]) for row in entry["rows"]]
    total = ("all", *(sum(row[key] for row in entry["rows"]) for key in ("kernels", "waits")))
    return markdown_table(("level", "kernels", "waits"), [*rows, total])


def update_sections(entries: dict[str, Entry]) -> dict[str, str]:
    """The modelled update by state of the sources, what it waits for, and the launches of the last state."""
    found: dict[tuple[int, str], dict[str, str]] = {}
    for name, entry in entries.items():
        for batch in entry["batches"]:
            values = {"modelled, ms": batch["milliseconds"], "target, ms": batch["target_milliseconds"]}
            values |= {"launches": batch["launches"]}
            values |= {f"ms if {limit} cost nothing": value for limit, value in batch["without"].items()}
            for quantity, value in values.items():
                found.setdefault((batch["batch"], quantity), {})[name] = f"{value:.3g}"
    rows = [(*row, *(states.get(name, "") for name in entries)) for row, states in found.items()]
    sections = {"modelled": markdown_table(("batch", "quantity", *entries), rows, words=2)}
    columns = ("launch", "blocks", "waves", "warps", "registers", "shared bytes", "gflop", "steps")
    columns += ("copied megabytes", "l2 megabytes of operands", "l2 megabytes pointwise", "hbm megabytes")
    columns += ("instructions a step", "instructions a product", "instructions an element", "microseconds", "waits for")
    last = list(entries.values())[-1]
    for batch in last["batches"]:
        launches = [tuple(str("" if row[c] is None else row[c]) for c in columns) for row in batch["rows"]]
        sections[f"launches-{batch['batch']}"] = markdown_table(columns, launches)
    splits = [(batch["batch"], row) for batch in last["batches"] for row in batch["split"]]
    cells = [(batch, *(row.get(c, "") for c in ("launch", "blocks", "1", "2", "4", "8"))) for batch, row in splits]
    head = ("batch", "launch", "blocks", "us in one part", "in 2", "in 4", "in 8")
    sections |= {"products": _products(entries), "split": markdown_table(head, cells, words=2)}
    return sections | {"blocks": _other_blocks(last)}


def _other_blocks(entry: Entry) -> str:
    """Launches in blocks of other sizes."""
    columns = ("blocks", "registers", "spilled bytes", "blocks a multiprocessor", "l2 megabytes of operands")
    columns += ("instructions a product", "microseconds", "waits for")
    rows = [
        (
            batch["batch"],
            row["launch"],
            "{}x{}x{}, {} warps, {} stages".format(*row["block"]),
            *(row[c] for c in columns),
        )
        for batch in entry["batches"]
        for row in batch["blocks"]
    ]
    return markdown_table(("batch", "launch", "block", *columns), rows, words=3)


def _products(entries: dict[str, Entry]) -> str:
    """What the launches of the largest products show at batch 64, by state of the sources."""
    columns = ("blocks", "warps", "registers", "spilled bytes", "l2 megabytes of operands")
    columns += ("instructions a product", "microseconds")
    found = [
        (row["launch"], name, *(str(row[column]) for column in columns))
        for name, entry in entries.items()
        for row in entry["batches"][0]["rows"]
        if row["gflop"] >= 0.4
    ]
    return markdown_table(("launch", "state", *columns), sorted(dict.fromkeys(found), key=lambda row: row[0]), words=2)


def launch_sections(entries: dict[str, Entry]) -> dict[str, str]:
    """Launches of programs, and what joining them and multiplying taps side by side changed."""
    entry = list(entries.values())[-1]
    states = list(next(iter(entry["nets"].values())))
    rows = [
        (net, *(f"{found[state]['launches']} ({found[state]['small']})" for state in states))
        for net, found in entry["nets"].items()
    ]
    sections = {"launches": markdown_table(("program of", *states), rows)}
    whole, phases, taps = [], [], []
    for batch, by_state in entry["batches"].items():
        for state, (*found, total) in by_state.items():
            whole.append((batch, state, str(total["launches"]), f"{total['whole']:.3f}"))
            taps += [_counts(batch, state, [line]) for line in found if not line["phases"]]
            maps = dict.fromkeys(line["map"] for line in found if line["phases"])
            phases += [(size, *_counts(batch, state, [x for x in found if x["map"] == size])) for size in maps]
    columns = ("batch", "state", "launches", "blocks of each", "waves of each", "registers", "gflop with padding")
    columns += ("megabytes from L2", "million instructions", "modelled us", "waits for")
    sections["whole"] = markdown_table(("batch", "state", "launches", "modelled ms"), whole, words=2)
    by_map = sorted(phases, key=lambda row: (int(row[1]), int(row[0].split("x")[0])))
    by_map = [line for line in by_map if "side by side" not in line[2]]
    sections["phases"] = markdown_table(("map of a phase", *columns), by_map, words=3)
    sections["taps"] = markdown_table(columns, taps, words=2)
    return sections


def _counts(batch: str, state: str, lines: Sequence[Entry]) -> tuple[str, ...]:
    """A row for launches that do the same."""

    def total(name: str) -> float:
        return sum(line[name] for line in lines)

    first = max(lines, key=lambda line: line["registers"])
    each = (str(first[name]) for name in ("blocks", "waves", "registers"))
    sums = (f"{total('gflop with padding'):.2f}", f"{total('l2 megabytes of operands'):.0f}")
    more = (f"{total('million instructions')}", f"{total('microseconds'):.1f}", str(first["waits for"]))
    return (batch, state, str(len(lines)), *each, *sums, *more)


def generate_table(name: str, entry: Entry) -> str:
    """Images a second of `fastebm generate` and of the bare sampler."""
    machine = entry["machine"]
    head = (
        f"{entry['count']:,} samples a call, {entry['channels']}x{entry['size']}x{entry['size']}, "
        f"{entry['levels']} levels of {entry['num_steps']} steps, in chunks of {entry['chunk']}; {machine['name']}, "
        f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''} of {machine['cores']} cores, "
        f"{entry['rounds']} rounds."
    )
    rows = [
        (row["method"], _interval(row, "images_per_second", 4), _interval(row, "ratio", 3)) for row in entry["rows"]
    ]
    columns = ("method", "images a second (20 to 80 %)", "time over the bare sampler (20 to 80 %)")
    return f"{head}\n\n{markdown_table(columns, rows)}"


def _interval(row: Mapping[str, Any], key: str, digits: int) -> str:
    return "{:.{d}g} ({:.{d}g} to {:.{d}g})".format(row[key], row[f"{key}_low"], row[f"{key}_high"], d=digits)


def comparison_table(name: str, entry: Entry) -> str:
    """One net trained in several ways: its rows by seed, then what the second way changed."""
    config, reference, columns = entry["config"], entry["reference"], entry["columns"]
    head = (
        f"{name}: {config['size']}x{config['size']}, {config['iterations']} updates of batch {config['batch_size']}. "
        f"The classifier is right on {reference['accuracy']:.1%} of unseen images and confident of "
        f"{reference['confident']:.0%} of them; between train and test images the distance is "
        f"{reference['distance']:.3g}, of uniform noise {reference['noise']:.3g} (not comparable to published FID)."
    )
    first = entry["rows"][0]["method"]
    ordered = sorted(entry["rows"], key=lambda row: (row["seed"], row["method"] != first))
    rows = [
        (
            row["seed"],
            row["method"],
            *("not measured" if row.get(key) is None else format(row[key], form) for key, _, form, _ in columns),
            f"{row['seconds'] / 60:.1f}",
        )
        for row in ordered
    ]
    parts = [head, markdown_table(("seed", "method", *(title for _, title, _, _ in columns), "minutes"), rows, words=2)]
    gains = [(title, *gain) for key, title, _, sign in columns if sign and (gain := gain_cells(ordered, key, sign))]
    if gains:
        second = next(row["method"] for row in ordered if row["method"] != first)
        parts.append(
            markdown_table((f"{second} against {first}", "better on", "mean gain", "larger std between seeds"), gains),
        )
    return "\n\n".join(parts)


def gain_cells(rows: Sequence[Entry], key: str, sign: int) -> tuple[str, str, str] | None:
    """On how many seeds the second method is better by `key`, and by how much; None for fewer than two such seeds.

    `sign` is 1 where larger is better and -1 where smaller is.
    """
    seeds: dict[int, list[float]] = {}
    for row in rows:
        if row.get(key) is not None:
            seeds.setdefault(row["seed"], []).append(row[key])
    pairs = [values for values in seeds.values() if len(values) == 2]
    if len(pairs) < 2:
        return None
    gains = [sign * (after - before) for before, after in pairs]
    spread = max(statistics.stdev(side) for side in zip(*pairs, strict=True))
    return f"{sum(gain > 0 for gain in gains)} of {len(pairs)} seeds", f"{statistics.fmean(gains):.3g}", f"{spread:.3g}"


PAGES: dict[str, Sections] = {
    "cifar10": run_sections,
    "detect": each(detect_table),
    "digits": digits_sections,
    "ec-flow": each(comparison_table),
    "ec-posterior": each(comparison_table),
    "ec-vae": each(comparison_table),
    "generate": each(generate_table),
    "gpu-model": gpu_model_sections,
    "gpu-model/launches": launch_sections,
    "gpu-model/update": update_sections,
    "mnist": run_sections,
    "one-pass": each(one_pass_table),
    "pictures": run_sections,
    "restoration": restoration_sections,
    "stability": stability_sections,
    "tasks": task_sections,
    "translation": translation_sections,
    "zebra128": run_sections,
    "zebra64": zebra64_sections,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="?", choices=sorted(PAGES), help="the page that FOLDERs are added to")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="what a command or a run wrote")
    parser.add_argument("--entry", help="name of the entry in results.json, by default that of the folder")
    parser.add_argument("--command", default="", help="of a run: what it was made by, as a user would type it")
    parser.add_argument("--commit", default="", help="of a run: where it began, by default what is checked out")
    options = parser.parse_args(arguments)
    for folder in options.folders:
        entry = options.entry or folder.resolve().name
        collect(RESULTS / options.page, folder, entry, PAGES[options.page], options.command, options.commit)
    for name, sections in PAGES.items():
        fill_page(RESULTS / name, sections)


if __name__ == "__main__":
    main()
