"""What the guard of a run did: notes of the log, and flight records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastebm.report.pictures import Picture, PictureError, Pictures
from fastebm.runs.fields import checked
from fastebm.runs.files import read_json
from fastebm.runs.folder import RunFolder
from fastebm.training.trainer.flight import GAVE_UP, check_summary, records
from fastebm.training.trainer.guard import saved_rollbacks

MOST_RECORDS = 20
MOST_PICTURES = 3


@dataclass(frozen=True)
class Flight:
    """A flight record: what happened, why, what its numbers show, and its picture."""

    name: str
    event: str
    reason: str
    diagnosis: str
    note: str
    updates: str
    picture: Picture | None = None


@dataclass
class GuardActions:
    """What the guard of a run did.

    Attributes:
        rollbacks: how often the run went back, by the last line of its log or by what else knows of more; None where
            neither says anything.
        notes: the iteration and the text of lines of the log that say why.
        flights: the newest records; `left_out` are older ones.
        gave_up: whether the newest record is of a run that the guard gave up.
        faults: sentences about what can't be read.
    """

    rollbacks: int | None
    notes: list[tuple[int, str]]
    flights: list[Flight] = field(default_factory=list)
    left_out: int = 0
    gave_up: bool = False
    faults: list[str] = field(default_factory=list)


def guard_actions(run: Path, log: Sequence[Mapping[str, Any]], pictures: Pictures) -> GuardActions:
    """What the log and the flight records of a run say."""
    notes = [(line["iteration"], line["note"]) for line in log if "note" in line]
    found = GuardActions(None, notes)
    try:
        found.rollbacks = checked("attempt", log[-1].get("attempt", 0), int) if log else None
    except (TypeError, ValueError) as error:
        found.faults.append(f"The last line of the log is damaged: {error}.")
    try:
        saved = saved_rollbacks(RunFolder(run))
    except (ValueError, OSError) as error:
        found.faults.append(f"The checkpoints do not say how often the guard went back: {error}.")
        found.rollbacks = found.rollbacks or None
    else:
        found.rollbacks = max(found.rollbacks or 0, saved) if log or saved else None
    try:
        paths = records(run)
    except OSError as error:
        found.faults.append(f"The flight records can't be read: {error.strerror or error}.")
        return found
    found.left_out = max(0, len(paths) - MOST_RECORDS)
    for path in reversed(paths[-MOST_RECORDS:]):
        try:
            content = check_summary(read_json(path))
        except (OSError, ValueError, TypeError) as error:
            found.faults.append(f"The flight record {path.name} is damaged: {error}.")
            continue
        texts = {name: content[name] for name in ("event", "reason", "diagnosis", "note")}
        numbers = [line["iteration"] for line in content["updates"]]
        updates = f"updates {numbers[0]:,} to {numbers[-1]:,}" if numbers else "no updates"
        found.gave_up |= not found.flights and texts["event"] == GAVE_UP
        picture = None
        if len(found.flights) < MOST_PICTURES:
            alt = f"The last updates before {path.stem}: energies, gap, steepness, norms, and chains step by step"
            try:
                picture = pictures.read(path.with_suffix(".png"), alt, f"{path.stem}, {updates}")
            except FileNotFoundError:
                found.faults.append(f"The picture of the flight record {path.stem} is missing.")
            except PictureError as error:
                found.faults.append(str(error))
        found.flights.append(Flight(path.stem, updates=updates, picture=picture, **texts))
    return found
