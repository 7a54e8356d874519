"""The log and the samples of a run for TensorBoard, which is optional."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

MISSING = "fastebm: tensorboard is not installed, so nothing is written for it: pip install 'fastebm[tensorboard]'"


class TensorBoardWriter:
    """A writer of event files, or of nothing."""

    def __init__(self, writer: Any = None) -> None:
        self._writer = writer

    @classmethod
    def open(cls, folder: Path, enabled: bool, iteration: int) -> TensorBoardWriter:
        """A writer to `folder` from `iteration` on; if not `enabled`, or with one line on stderr, of nothing."""
        if not enabled:
            return cls()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print(MISSING, file=sys.stderr, flush=True)
            return cls()
        # Whatever an earlier process wrote beyond its last checkpoint is not shown.
        return cls(SummaryWriter(str(folder), purge_step=iteration + 1))  # type: ignore[no-untyped-call]

    def line(self, line: Mapping[str, Any]) -> None:
        """Every number of a line of the log, at its iteration."""
        if self._writer is not None:
            for name, value in line.items():
                if name != "iteration":
                    self._writer.add_scalar(name, value, line["iteration"])

    def picture(self, name: str, picture: torch.Tensor, iteration: int) -> None:
        """A picture (height, width, 3) in [0, 1]."""
        if self._writer is not None:
            self._writer.add_image(name, picture, iteration, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
