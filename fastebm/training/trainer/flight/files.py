"""The files of a flight record in the folder of a run.

flight/iteration-000000812-1.npz    every array, NaN where an update has no such number
flight/iteration-000000812-1.png    a picture of them
flight/iteration-000000812-1.json   why it was written, the diagnosis, and a line of numbers for each update; the last
                                    one to be written: a record exists once this file does
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastebm import plotting
from fastebm.runs.fields import checked
from fastebm.runs.files import finite_json, read_json, replacing, write_json
from fastebm.training.trainer.flight.diagnosis import diagnose, sentence
from fastebm.training.trainer.flight.record import FlightRecord

FOLDER = "flight"
REQUEST = ".flight"
WENT_BACK, GAVE_UP = "the guard went back", "the guard gave the run up"
"""Events of records that the guard causes."""
_NAME = re.compile(r"iteration-(\d{9})-(\d+)\.json")


def write_record(folder: Path, record: FlightRecord, event: str, reason: str) -> tuple[Path, str]:
    """Writes a record into the folder of a run. Returns the path without its ending, and the diagnosis in words.

    Args:
        event: what happened, in words.
        reason: why it happened, as the guard says it; "" if nothing did.
    """
    findings = diagnose(record)
    diagnosis = sentence(findings, len(record))
    last = int(record.iterations[-1]) if len(record) else 0
    where = folder / FOLDER
    where.mkdir(exist_ok=True)
    number = 1 + max((n for iteration, n in _written(where) if iteration == last), default=0)
    stem = where / f"iteration-{last:09d}-{number}"
    with replacing(stem.with_suffix(".npz")) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **record.arrays())  # type: ignore[arg-type]
    chains = {kind: each.energies for kind, each in record.chains.items()}
    plotting.save_flight(stem.with_suffix(".png"), record.lines(), chains, [*filter(None, (event, reason)), diagnosis])
    content = {
        "event": event,
        "reason": reason,
        "diagnosis": diagnosis,
        "findings": [{"cause": f.cause, "sentence": f.sentence, "numbers": f.numbers} for f in findings],
        "note": record.note,
        "updates": record.lines(),
    }
    write_json(stem.with_suffix(".json"), finite_json(content))
    return stem, diagnosis


def request(run: Path) -> Path:
    """Asks the process that trains in a folder to write its record. Returns the file that does so until it is taken."""
    path = run / REQUEST
    path.touch()
    return path


def take_request(run: Path) -> bool:
    """Whether the record was asked for since the last time."""
    try:
        (run / REQUEST).unlink()
    except OSError:  # there is none, or what has its name is no file
        return False
    return True


def records(run: Path) -> list[Path]:
    """The JSON files of the records in the folder of a run, in the order of their iterations."""
    folder = run / FOLDER
    found = _written(folder) if folder.is_dir() else []
    return [folder / f"iteration-{iteration:09d}-{number}.json" for iteration, number in sorted(found)]


def read_summary(path: Path) -> dict[str, Any]:
    """What a record's JSON file says. Raises ValueError for one that is damaged, OSError."""
    try:
        return check_summary(read_json(path))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no flight record, or a damaged one: {error}") from error


def check_summary(content: Any) -> dict[str, Any]:
    """The content of a record's JSON file. Raises TypeError, ValueError for other values."""
    content = checked("it", content, dict[str, Any])
    try:
        for name in ("event", "reason", "diagnosis", "note"):
            content[name] = checked(name, content[name], str)
        content["updates"] = checked("updates", content["updates"], list[dict[str, Any]])
        for line in content["updates"]:
            checked("iteration", line["iteration"], int)
    except KeyError as error:
        raise ValueError(f"it has no {error}") from None
    return content


def read_record(path: Path) -> tuple[dict[str, Any], FlightRecord]:
    """What a record's JSON file says, and the arrays beside it. Raises ValueError for damaged ones, OSError."""
    content = read_summary(path)
    try:
        with np.load(path.with_suffix(".npz")) as arrays:
            record = FlightRecord.from_arrays(dict(arrays), content["note"])
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.with_suffix('.npz')} is damaged: {error}") from error
    return content, record


def _written(folder: Path) -> Sequence[tuple[int, int]]:
    return [(int(m[1]), int(m[2])) for path in folder.iterdir() if (m := _NAME.fullmatch(path.name))]
