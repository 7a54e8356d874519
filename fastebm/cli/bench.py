"""`fastebm bench`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fastebm.cli.arguments import parsed_device


@dataclass(frozen=True)
class Bench:
    """Measure Langevin chains of an energy, yours or CF-EBM's, against eager PyTorch and torch.compile."""

    energy: str | None = None
    """package.module:factory, a function without arguments that returns an energy (the current folder is searched as
    well); by default the CF-EBM net"""
    shape: str = "3,32,32"
    """of a sample"""
    batch: int = 64
    """chains at a time"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """in which the energy runs"""
    num_steps: int = 20
    """updates of a chain"""
    rounds: int = 20
    """of the measurement; each runs everything once, in an order of its own"""
    engine: Literal["auto", "fused", "autograd"] = "auto"
    """of our gradients"""
    device: str | None = None
    """cpu or cuda; by default a GPU if there is one"""
    out: Path | None = None
    """a .json file for the rows, with machine and versions"""

    def __call__(self) -> int:
        from fastebm.evaluation import speed

        device = parsed_device(self.device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        run = speed.bench(
            self.energy,
            speed.parsed_shape(self.shape),
            batch=self.batch,
            dtype=getattr(torch, self.dtype),
            num_steps=self.num_steps,
            rounds=self.rounds,
            engine=self.engine,
            device=device.type,
            out=self.out,
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
        print(speed.printed(run.rows))
        if self.out is not None:
            print(f"\n{self.out}: the same with machine, versions and each round's figure")
        return 0
