"""Keeps a finished run as a page of results.

Copies config, log, pictures and `evaluation.json`, writes machine, commit, command and times to `run.json`, and fills
the table of the README of the page between two marks. Words around it are written by a person, and stay. Of where the
images lie only the name of the file is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.harness.readme_sections import fill
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.runs.files import write_json
from fastebm.runs.folder import RunFolder

PICTURES = ("samples.png", "strip.png", "curves.png", "grid.png")


def run_facts(run: Path, command: str, commit: str | None) -> dict[str, Any]:
    """What the page's table says, from the run's own files and from this machine, which it was trained on."""
    folder = RunFolder.existing(run)
    lines = folder.log.lines()
    stages: dict[int, dict[str, float]] = {}
    for line in lines:
        size = line.get("size", 0)
        stage = stages.setdefault(size, {"iterations": 0, "seconds": 0.0, "largest_energy": 0.0, "end_gap": 0.0})
        stage["iterations"], stage["seconds"] = line["iteration"], line["seconds"]
        largest = max(line.get("largest_energy_data", 0.0), line.get("largest_energy_samples", 0.0))
        stage["largest_energy"] = max(stage["largest_energy"], largest)
        stage["end_gap"] = line.get("gap", 0.0)
    newest = max((run / "checkpoints").glob("iteration-*.json"))
    guard = json.loads(newest.read_text()).get("state", {}).get("guard", {})
    machine = machine_facts("cpu")
    machine["threads"] = folder.threads()
    if commit is not None:
        machine |= {"commit": commit, "dirty": None}
    return {
        "command": command,
        "finished_iteration": lines[-1]["iteration"],
        "training_seconds": lines[-1]["seconds"],
        "rollbacks": guard.get("rollbacks", []),
        "stages_cumulative": {str(size): stage for size, stage in stages.items()},
        "machine": machine,
    }


def table(facts: dict[str, Any]) -> str:
    """Stages as rows: iterations, minutes, and how large energies were."""
    machine = facts["machine"]
    head = [
        f"`{facts['command']}`",
        "",
        f"{machine['cpu']} ({', '.join(machine['cpu_features'])}), {machine['cores']} cores, {machine['threads']} "
        f"threads, torch {machine['torch']}, commit {str(machine['commit'])[:7]}; "
        f"{facts['training_seconds'] / 60:.1f} minutes; "
        f"the guard went back {len(facts['rollbacks'])} times.",
        "",
        "| stage | iterations | minutes | largest energy | gap at the end |",
        "|---|---:|---:|---:|---:|",
    ]
    before = {"iterations": 0, "seconds": 0.0}
    for size, stage in facts["stages_cumulative"].items():
        minutes = (stage["seconds"] - before["seconds"]) / 60
        head.append(
            f"| {size}² | {stage['iterations'] - before['iterations']} | {minutes:.1f} | "
            f"{stage['largest_energy']:.1f} | {stage['end_gap']:+.3f} |"
        )
        before = stage
    return "\n".join(head)


def verdict(evaluation: dict[str, Any]) -> str:
    """What `fastebm evaluate` found in features of the small classifier, beside real images and noise."""
    judged, health = evaluation["in_features"], evaluation.get("energy_metrics") or {}
    distances, classes, nearest = judged["distances"], judged["classes"], judged["nearest"]
    lines = [
        f"Judged by a classifier that names {judged['accuracy']:.1%} of unseen images rightly (distances are "
        f"{judged['note']}):",
        "",
        "| | count | Fréchet distance | kernel distance | precision | recall |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    reference = f"reference: {distances['reference_kind']}"
    names = {"samples": "samples", "reference": reference, "noise": "uniform noise"}
    for key, name in names.items():
        d = distances[key]
        lines.append(
            f"| {name} | {d['count']} | {d['frechet']:.3g} | {d['kernel']:.3g} | {d['precision']:.2f} | "
            f"{d['recall']:.2f} |"
        )
    ratio = distances["samples_at_reference_count"]["frechet"] / distances["reference"]["frechet"]
    lines += [
        "",
        f"The samples' Fréchet distance is {ratio:.1f} times the reference.",
        "",
        "| | samples | real |",
        "|---|---:|---:|",
        f"| classes found, of {len(classes['names'])} | {classes['found']} | {classes['found_real']} |",
        f"| share of the most frequent | {classes['largest_share']:.1%} | {classes['largest_share_real']:.1%} |",
        f"| entropy of classes | {classes['entropy']:.3f} | {classes['entropy_real']:.3f} |",
        f"| share it is sure of | {classes['confident_share']:.1%} | {classes['confident_share_real']:.1%} |",
        f"| median distance to the nearest train image | {nearest['median']:.2f} | {nearest['median_real']:.2f} |",
        f"| first percentile of it | {nearest['first_percentile']:.2f} | {nearest['first_percentile_real']:.2f} |",
    ]
    if health:
        lines.append(f"| mean energy | {health['energy_samples']:.3f} | {health['energy_data']:.3f} |")
    return "\n".join(lines)


def keep(run: Path, page: Path, command: str, commit: str | None, without: list[str]) -> None:
    """Writes or renews the page."""
    page.mkdir(parents=True, exist_ok=True)
    config = json.loads((run / "config.json").read_text())
    images = config.get("images") or {}
    folder = f"{Path(images['path']).parent}/" if "path" in images else None
    for name in ("config.json", "log.jsonl", "evaluation.json"):
        if (run / name).exists() and name not in without:
            text = (run / name).read_text()
            (page / name).write_text(text.replace(folder, "") if folder else text)
    for name in PICTURES:
        if (run / name).exists() and name not in without:
            shutil.copyfile(run / name, page / name)
    facts = run_facts(run, command, commit)
    judged = page / "evaluation.json"
    evaluation = json.loads(judged.read_text()) if judged.exists() else None
    write_json(page / "run.json", facts)
    filled = table(facts) if evaluation is None else f"{table(facts)}\n\n{verdict(evaluation)}"
    fill(page / "README.md", page.name, "run", Path(__file__).name, filled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--commit", help="that the run began at, by default the one that is checked out")
    parser.add_argument("--command", required=True, help="what the run was made by, as a user would type it")
    parser.add_argument(
        "--without", nargs="*", default=[], help="files that stay away, such as pictures of real images"
    )
    given = parser.parse_args()
    keep(given.run, given.page, given.command, given.commit, given.without)


if __name__ == "__main__":
    main()
