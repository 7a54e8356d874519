"""The command `fastebm resume`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fastebm.cli.arguments import select_device


@dataclass(frozen=True)
class Resume:
    """Continue a run that was stopped, on its own images and with its own settings, to the same bits."""

    on_every_rank: ClassVar[bool] = True

    run: Path
    """folder of the run"""
    data: Path | None = None
    """file or folder of the run's images, if they were moved; other images are refused; by default where they were"""
    retries: int | None = None
    """number of times in all that the guard may roll the run back; a larger one gives a run that the guard gave up
    another chance; by default the run's own"""
    device: str | None = None
    """device that the run trains on, cpu or cuda; by default a GPU if there is one"""

    def __call__(self) -> int:
        from fastebm.cli.training_report import report_training
        from fastebm.data.sources import source_from_json
        from fastebm.runs.folder import RunFolder
        from fastebm.training import ImageSource, resume

        folder, source = RunFolder.existing(self.run), None
        if self.data is not None:
            stored = source_from_json(folder.images() or {"path": str(self.data)})
            if not isinstance(stored, ImageSource):
                raise ValueError(f"{self.run} learns scikit-learn's digits, which lie in no file: leave --data out")
            source = dataclasses.replace(stored, path=self.data)
        device = select_device(self.device)
        return report_training(folder, lambda: resume(self.run, source, retries=self.retries, device=device))
