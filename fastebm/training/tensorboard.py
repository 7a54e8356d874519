"""The log and the samples of a run for TensorBoard, which is optional."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

MISSING = "fastebm: tensorboard is not installed, so nothing is written for it: pip install 'fastebm[tensorboard]'"


class TensorBoardWriter:
    """A writer of event files, or a mute one."""

    def __init__(self, writer: Any = None) -> None:
        self._writer = writer

    @classmethod
    def create(cls, folder: Path, enabled: bool, iteration: int) -> TensorBoardWriter:
        """A writer to `folder` from `iteration` on; a mute one if not `enabled`, or without tensorboard."""
        if not enabled:
            return cls()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print(MISSING, file=sys.stderr, flush=True)
            return cls()
        # Events that an earlier process wrote after its last checkpoint are hidden.
        return cls(SummaryWriter(str(folder), purge_step=iteration + 1))  # type: ignore[no-untyped-call]

    def add_scalars(self, line: Mapping[str, Any]) -> None:
        """Writes every number of a line of the log at its iteration."""
        if self._writer is not None:
            for name, value in line.items():
                if name not in ("iteration", "note"):
                    self._writer.add_scalar(name, value, line["iteration"])

    def add_image(self, name: str, picture: torch.Tensor, iteration: int) -> None:
        """Writes a picture (height, width, 3) in [0, 1]."""
        if self._writer is not None:
            self._writer.add_image(name, picture, iteration, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
