"""The command `fastebm flight`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

POLL = 0.2
"""Seconds between looks at the folder of a run that was asked for its record."""


@dataclass(frozen=True)
class Flight:
    """Show what the last updates of a run were like when the guard went back, and why, as far as their numbers tell."""

    run: Path
    """folder of the run"""
    now: bool = False
    """ask the process that trains in the folder to write the record of its last updates, which goes on training"""
    wait: float = 600.0
    """number of seconds to wait for that"""

    def __call__(self) -> int:
        from fastebm.runs.folder import RunFolder
        from fastebm.training.trainer.flight import read_summary, records

        RunFolder.existing(self.run)
        found = self._asked() if self.now else records(self.run)
        if not found:
            print(
                f"{self.run} has no flight record: the guard never went back. --now asks the process that trains in it "
                "for one."
            )
        for path in found:
            content = read_summary(path)
            updates = content["updates"]
            where = f"updates {updates[0]['iteration']:,} to {updates[-1]['iteration']:,}" if updates else "no updates"
            reason = f": {content['reason']}" if content["reason"] else ""
            print(f"{path.stem}, {where}\n  {content['event']}{reason}\n  {content['diagnosis']}")
            if content["note"]:
                print(f"  {content['note']}")
            print(f"  {path.with_suffix('.png')}")
        return 0

    def _asked(self) -> list[Path]:
        """The record that the training process writes now."""
        from fastebm.runs.folder import RunError, RunFolder
        from fastebm.training.trainer.flight import records
        from fastebm.training.trainer.flight.files import request

        if not self.wait > 0:
            raise ValueError(f"--wait must be above 0, got {self.wait:g}")
        if not RunFolder.is_locked(self.run):
            raise RunError(f"no process trains in {self.run}: --now asks the one that does")
        before, asked = set(records(self.run)), request(self.run)
        try:
            deadline = time.monotonic() + self.wait
            while time.monotonic() < deadline:
                if new := [path for path in records(self.run) if path not in before]:
                    return new
                time.sleep(POLL)
        finally:
            asked.unlink(missing_ok=True)
        raise RunError(f"{self.run} wrote no record within {self.wait:g} seconds: does it keep one (flight_updates)?")
