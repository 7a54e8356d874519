"""What a page says of runs of several seeds: each run in a row, mean and spread, from seeds.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastebm.report.run import list_files
from fastebm.report.tables import Table
from fastebm.runs.fields import checked
from fastebm.runs.files import read_json
from fastebm.runs.folder import RunFolder
from fastebm.runs.names import SEEDS

HEADINGS = {
    "ratio": "distance over the reference",
    "frechet": "Fréchet distance",
    "rollbacks": "rollbacks",
    "gap_end": "gap at the end",
    "largest_energy_end": "largest energy at the end",
    "largest_energy": "largest energy",
    "minutes": "minutes",
}


@dataclass
class SeedsPart:
    """Runs of several seeds as a page shows them."""

    name: str
    folder: str
    table: Table | None = None
    runs: list[Path] = field(default_factory=list)
    files: list[tuple[str, int, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def describe_seeds(path: Path, page: Path) -> SeedsPart:
    """What seeds.json in a folder says, and the folders of its runs. Damage is said in sentences."""
    part = SeedsPart(path.absolute().name, str(path))
    part.files = list_files(path, page, folders=False)
    entries: list[dict[str, Any]] = []
    try:
        content = read_json(path / SEEDS)
        entries = checked("runs", content.get("runs"), list[dict[str, Any]])
        summary = checked("summary", content.get("summary"), dict[str, Any])
        part.table = _table(entries, summary)
    except (OSError, ValueError, TypeError) as error:
        part.faults.append(f"{SEEDS} can't be read: {error}.")
    for entry in entries:
        if entry.get("stopped"):
            part.faults.append(f"Seed {entry.get('seed')} stopped: {entry['stopped']}")
    try:
        there = sorted((p for p in path.glob("seed-*") if RunFolder.is_run(p)), key=lambda p: (len(p.name), p.name))
    except OSError as error:
        part.faults.append(f"The folders of the runs can't be listed: {error.strerror or error}.")
        there = []
    part.runs = there
    names = {folder.name for folder in there}
    part.faults += [f"The folder {entry.get('run')} is missing." for entry in entries if entry.get("run") not in names]
    return part


def _table(entries: list[dict[str, Any]], summary: dict[str, Any]) -> Table | None:
    names = [name for name in HEADINGS if any(entry.get(name) is not None for entry in entries)]
    rows: list[list[Any]] = [
        [f"seed {entry.get('seed')}" + ("" if entry.get("finished") else " (stopped)"), *map(entry.get, names)]
        for entry in entries
    ]
    found = {name: checked(name, summary.get(name) or {}, dict[str, Any]) for name in names}
    rows += [[word, *(found[name].get(word) for name in names)] for word in ("mean", "spread")]
    note = (
        "The spread is the standard deviation over the runs that came to their end, "
        f"{summary.get('finished')} of {summary.get('runs')}."
    )
    return Table("Each run, mean and spread", ("", *(HEADINGS[name] for name in names)), rows, note) if names else None
