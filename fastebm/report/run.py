"""What a page says of one run: everything that its folder has, and a sentence for whatever is missing or damaged."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastebm.report.curves import draw_curves
from fastebm.report.guard import GuardActions, guard_actions
from fastebm.report.pictures import Picture, PictureError, Pictures
from fastebm.report.tables import Table, tables
from fastebm.runs.fields import checked
from fastebm.runs.files import PART, read_json
from fastebm.runs.folder import LOCK, RunError, RunFolder
from fastebm.runs.names import DIAGNOSIS, EVALUATION, JUDGED, REPORT, VERDICT
from fastebm.runs.registry import config_of
from fastebm.training.coarse_to_fine.presets import PRESETS
from fastebm.training.ec_flow.presets import EC_FLOW_PRESETS
from fastebm.training.ec_posterior.presets import EC_POSTERIOR_PRESETS
from fastebm.training.ec_vae.presets import EC_VAE_PRESETS

PRESETS_OF: dict[str, Mapping[str, Any]] = {
    "coarse_to_fine": PRESETS,
    "ec_vae": EC_VAE_PRESETS,
    "ec_posterior": EC_POSTERIOR_PRESETS,
    "ec_flow": EC_FLOW_PRESETS,
}
WITHOUT_CHAINS = ("ec_vae", "ec_posterior", "ec_flow")
"""The methods whose samples are one pass of a generator."""
SAMPLES = {
    "samples.png": ("Samples beside real images", "A grid of samples of the run, and as many real images on its right"),
    "strip.png": (
        "From noise to an image: each row is a chain",
        "Chains of the run, one a row, from noise on the left to an image on the right",
    ),
    "reconstructions.png": (
        "Real images and their reconstructions",
        "A grid of real images, and grids of what the run makes of them",
    ),
    "temperatures.png": (
        "Samples at several temperatures of the latent vectors",
        "Grids of samples, from low temperatures, which are more regular, to temperature 1",
    ),
    "weights.png": (
        "Samples by the trained and by the averaged weights",
        "Grids of the same samples by other weights and with other statistics of batch norm",
    ),
}
"""Captions and descriptions of the pictures of samples that trainings draw."""
MOST_SNAPSHOTS, SNAPSHOT_WIDTH = 6, 640
MORE_RETRIES = 3
JUDGEMENTS = {
    EVALUATION: "Compared with real images by fastebm evaluate",
    JUDGED: "Compared with real images by fastebm train --seeds",
    VERDICT: "Judged by fastebm demo",
}
MOST_FAULTS = 5
MOST_FILES = 60
DESCRIPTIONS = {
    "config.json": "every setting, the source of the images, threads, machine, versions",
    "log.jsonl": "metrics over the updates, a line every few of them",
    "checkpoints": "weights, and everything else that a resumed run needs",
    "samples.npz": "samples as an array",
    "samples.png": "newest samples beside real images",
    "strip.png": "snapshots along chains",
    "curves.png": "metrics over the updates",
    "reconstructions.png": "real images and their reconstructions",
    "temperatures.png": "samples at several temperatures",
    "weights.png": "samples by the trained and by the averaged weights",
    "pictures": "grids of samples at intervals",
    "flight": "the last updates before the guard went back",
    "tensorboard": "events for TensorBoard",
    "features.safetensors": "the small classifier of fastebm evaluate",
    EVALUATION: "what fastebm evaluate measured",
    JUDGED: "what the training of several seeds measured",
    VERDICT: "what fastebm demo measured",
    DIAGNOSIS: "what fastebm diagnose found",
    "diagnose.png": "traces of chains, by fastebm diagnose",
}


@dataclass(frozen=True)
class Settings:
    """The config of a run: `changed` are name, value and the value of the `preset`; `all` are names and values."""

    preset: str
    changed: list[tuple[str, Any, Any]]
    all: list[tuple[str, Any]]


@dataclass(frozen=True)
class Judgement:
    """The numbers of a file that compares samples with real images."""

    title: str
    file: str
    tables: list[Table]
    classifier: list[Table]
    fault: str


@dataclass(frozen=True)
class Level:
    """What chains at one resolution tell about themselves: sentences, and a table as text."""

    size: str
    verdict: list[str]
    table: str


@dataclass
class RunPart:
    """One run as a page shows it. `faults` are sentences by the part that lacks something."""

    name: str
    folder: str
    state: str = ""
    finished: bool = False
    facts: list[tuple[str, Any]] = field(default_factory=list)
    settings: Settings | None = None
    samples: list[Picture] = field(default_factory=list)
    snapshots: list[Picture] = field(default_factory=list)
    curves: list[Picture] = field(default_factory=list)
    judgements: list[Judgement] = field(default_factory=list)
    traces: Picture | None = None
    levels: list[Level] = field(default_factory=list)
    has_chains: bool = True
    guard: GuardActions = field(default_factory=lambda: GuardActions(None, []))
    files: list[tuple[str, int, str]] = field(default_factory=list)
    resume: str = ""
    python: str = ""
    faults: dict[str, list[str]] = field(default_factory=dict)

    @property
    def argument(self) -> str:
        """The folder as a shell takes it."""
        return shell_argument(self.folder)

    def fault(self, part: str, sentence: str) -> None:
        """Adds a sentence about a part; after a few, only that there are more."""
        said = self.faults.setdefault(part, [])
        if len(said) < MOST_FAULTS:
            said.append(sentence)
        elif len(said) == MOST_FAULTS:
            said.append("There are more of these.")

    @contextmanager
    def noting(self, part: str, what: str) -> Iterator[None]:
        """Turns errors of files within the block into a sentence about `part`."""
        try:
            yield
        except (OSError, RunError, ValueError, TypeError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            self.fault(part, f"{what}: {reason}.")


def shell_argument(folder: str) -> str:
    """A folder as one word of a shell command."""
    return shlex.quote(folder if not folder.startswith("-") else f"./{folder}")


def describe_run(path: Path, pictures: Pictures, page: Path) -> RunPart:
    """Everything that the folder of a run says but its `page`. Raises RunError where there is no run."""
    folder = RunFolder.existing(path)
    part = RunPart(path.absolute().name, str(path))
    kind, config = _read_config(part, folder)
    log: list[dict[str, Any]] = []
    with part.noting("curves", "The log can't be read"):
        log, damaged = folder.log.whole_lines()
        for sentence in damaged:
            part.fault("curves", f"A line of the log is left out: {sentence}.")
    saved: list[int] = []
    with part.noting("files", "The checkpoints can't be listed"):
        saved = folder.checkpoints.iterations()
    for drawn in draw_curves(log, pictures) if log else ():
        if isinstance(drawn, Picture):
            part.curves.append(drawn)
        else:
            part.fault("curves", "More curves are left out, so that the page stays small.")
    if not log:
        part.fault("curves", "The log has no line yet.")
    part.guard = guard_actions(path, log, pictures)
    reached = (saved or [0])[-1]
    _say_state(part, reached, config, log)
    _say_facts(part, folder, kind, config, log, saved)
    _add_samples(part, path, pictures)
    _add_judgements(part, path, reached)
    _add_chains(part, path, kind, reached, pictures)
    part.files = list_files(path, page, part)
    part.python = _python(part, kind, config, saved)
    return part


def _read_config(part: RunPart, folder: RunFolder) -> tuple[str, Any]:
    kind, config = "", None
    with part.noting("settings", "The config can't be read"):
        kind = folder.kind()
        config = config_of(folder)
        stored = dataclasses.asdict(config)
        presets = {name: dataclasses.asdict(preset) for name, preset in PRESETS_OF[kind].items()}
        differing = {
            name: [(n, value, preset.get(n)) for n, value in stored.items() if value != preset.get(n)]
            for name, preset in presets.items()
        }
        nearest = min(differing, key=lambda name: len(differing[name]))
        part.settings = Settings(nearest, differing[nearest], list(stored.items()))
    return kind, config


def _say_state(part: RunPart, reached: int, config: Any, log: Sequence[Mapping[str, Any]]) -> None:
    """How far the run is, and the command that goes on with it."""
    logged, total = log[-1]["iteration"] if log else 0, getattr(config, "total_iterations", None)
    of_all = f"of {total:,} updates" if total is not None else "updates"
    part.finished = reached == total
    if part.finished:
        part.state = f"finished: {reached:,} {of_all}"
    else:
        word = "given up by the guard" if part.guard.gave_up else "unfinished"
        part.state = f"{word}: {max(reached, logged):,} {of_all}"
        if config is not None:
            retries = f" --retries {config.retries + MORE_RETRIES}" if part.guard.gave_up else ""
            part.resume = f"fastebm resume {part.argument}{retries}"


def _say_facts(
    part: RunPart, folder: RunFolder, kind: str, config: Any, log: Sequence[Mapping[str, Any]], saved: Sequence[int]
) -> None:
    facts: list[tuple[str, Any]] = []
    if config is not None:
        facts.append(("Method", config.method_name))
        facts.append(("Command", f"fastebm train {kind.replace('_', '-')}"))
    with part.noting("facts", "The source of the images can't be read"):
        facts.append(("Images", _source(folder.images())))
    if config is not None:
        channels = {1: "gray", 3: "colour"}.get(config.channels, f"{config.channels} channels")
        facts.append(("Resolutions", ", ".join(f"{size}x{size}" for size in config.sizes) + f", {channels}"))
    facts.append(("Updates", part.state))
    facts.append(("Newest checkpoint", f"after {saved[-1]:,} updates" if saved else "none yet"))
    if log:
        seconds = log[-1]["seconds"]
        facts.append(("Time of the updates", f"{seconds:,.0f} s" + (f" ({seconds / 60:,.1f} min)" * (seconds >= 60))))
    with part.noting("facts", "Machine and versions can't be read"):
        content = read_json(folder.path / "config.json")
        machine = [str(content["machine"])] if content.get("machine") else []
        if threads := folder.threads():
            machine.append(f"{threads} CPU thread" + "s" * (threads > 1))
        facts.append(("Machine at its start", ", ".join(machine) or "not recorded"))
        versions = checked("versions", content.get("versions") or {}, dict[str, str])
        facts.append(("Versions at its start", ", ".join(f"{name} {of}" for name, of in versions.items()) or "unknown"))
    part.facts = facts


def _source(images: Mapping[str, Any] | None) -> str:
    if images is None:
        return "tensors, which the folder does not describe"
    if images.get("set") == "digits":
        return "scikit-learn's handwritten digits, the train split"
    rest = {name: value for name, value in images.items() if name != "path" and value is not None}
    return ", ".join([str(images.get("path", "unknown")), *(f"{name} {value}" for name, value in rest.items())])


def _add_samples(part: RunPart, path: Path, pictures: Pictures) -> None:
    for name, (caption, alt) in SAMPLES.items():
        try:
            part.samples.append(pictures.read(path / name, alt, caption))
        except FileNotFoundError:
            if name == "samples.png":
                part.fault("samples", "No picture of samples has been drawn yet: the end of a stage draws one.")
        except PictureError as error:
            part.fault("samples", str(error))
    names: list[str] = []
    with part.noting("samples", "The folder pictures can't be read"):
        if (path / "pictures").is_dir():
            names = sorted(n for n in os.listdir(path / "pictures") if re.fullmatch(r"iteration-\d{9}\.png", n))
    count = min(MOST_SNAPSHOTS, len(names))
    for place in range(count):
        name = names[round(place * (len(names) - 1) / max(1, count - 1))]
        after = f"after {int(name[10:19]):,} updates"
        try:
            part.snapshots.append(
                pictures.read(path / "pictures" / name, f"A grid of samples {after}", after, SNAPSHOT_WIDTH)
            )
        except (FileNotFoundError, PictureError) as error:
            part.fault("samples", str(error))


def _add_judgements(part: RunPart, path: Path, reached: int) -> None:
    for name, title in JUDGEMENTS.items():
        if not os.path.lexists(path / name):
            continue
        with part.noting("judgement", f"{name} can't be read"):
            content = read_json(path / name)
            at = re.search(r", iteration ([\d,]{1,20})$", str(content.get("samples", "")))
            judged = int(at[1].replace(",", "")) if at else reached
            later = f"These samples are of iteration {judged:,}; the newest checkpoint is of iteration {reached:,}."
            features = content.pop("features", None)
            classifier = tables(features) if isinstance(features, dict) else []
            found = tables(content)
            part.judgements.append(Judgement(title, name, found, classifier, later if judged != reached else ""))


def _add_chains(part: RunPart, path: Path, kind: str, reached: int, pictures: Pictures) -> None:
    part.has_chains = kind not in WITHOUT_CHAINS
    with part.noting("chains", f"{DIAGNOSIS} can't be read"):
        if os.path.lexists(path / DIAGNOSIS):
            content = read_json(path / DIAGNOSIS)
            for size, level in checked("levels", content.get("levels"), dict[str, dict[str, Any]]).items():
                verdict = checked("the verdict", level.get("verdict"), list[str])
                part.levels.append(Level(size, verdict, checked("the table", level.get("table"), str)))
            if (of := checked("iteration", content.get("iteration"), int)) != reached:
                part.fault("chains", f"These chains are of iteration {of:,}; the newest checkpoint is of {reached:,}.")
    try:
        alt = "Traces of chains: for each resolution and each summary the median, the band of 90 % and single chains"
        part.traces = pictures.read(
            (path / DIAGNOSIS).with_suffix(".png"), alt, "Traces of chains from noise: median, band of 90 %, chains"
        )
    except FileNotFoundError:
        pass
    except PictureError as error:
        part.fault("chains", str(error))


def list_files(
    path: Path, page: Path, part: RunPart | None = None, *, folders: bool = True
) -> list[tuple[str, int, str]]:
    """Name, bytes and meaning of the files in a folder but `page`; the files of a folder in it count together."""
    found = []
    itself = page.name if os.path.realpath(page.parent) == os.path.realpath(path) else REPORT
    try:
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            if entry.name in (LOCK, REPORT, itself) or entry.name.endswith(PART):
                continue
            about = DESCRIPTIONS.get(entry.name, "")
            if entry.is_dir(follow_symlinks=False):
                sizes = [
                    os.lstat(os.path.join(above, name)).st_size
                    for above, _, names in os.walk(entry.path)
                    for name in names
                    if not name.endswith(PART)
                ]
                if folders:
                    files = "1 file" if len(sizes) == 1 else f"{len(sizes):,} files"
                    found.append((f"{entry.name}/ ({files})", sum(sizes), about))
            elif stat.S_ISREG((status := entry.stat(follow_symlinks=False)).st_mode):
                found.append((entry.name, status.st_size, about))
    except OSError as error:
        if part is not None:
            part.fault("files", f"The files can't all be listed: {error.strerror or error}.")
    if len(found) > MOST_FILES:
        rest = found[MOST_FILES:]
        found[MOST_FILES:] = [(f"{len(rest):,} more", sum(size for _, size, _ in rest), "")]
    return found


def _python(part: RunPart, kind: str, config: Any, saved: Sequence[int]) -> str:
    """A program that loads the run; empty where there is nothing to load."""
    if config is None or not saved or not saved[-1]:
        return ""
    lines = [
        "import fastebm",
        "",
        f"run = fastebm.load({part.folder!r})",
        "images = run.sample(16, seed=1)",
    ]
    if kind != "ec_posterior" and getattr(config, "calibrated", True):
        lines.append("energies = run.energy(images)")
    return "\n".join(lines)
