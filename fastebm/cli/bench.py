"""The command `fastebm bench`."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastebm.cli.arguments import check_range, select_device
from fastebm.memory import check_memory

LARGEST = 10**9
LONGEST = 10**6


@dataclass(frozen=True)
class Bench:
    """Measure the time of Langevin chains of an energy, beside eager PyTorch and torch.compile."""

    energy: str | None = None
    """function without arguments that returns an energy, as package.module:function; modules are searched for in the
    current folder too; by default the CF-EBM net"""
    shape: str = "3,32,32"
    """shape of one sample, in numbers with commas between"""
    batch: int = 64
    """number of chains that run at a time"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype in which the energy runs"""
    num_steps: int = 20
    """number of Langevin steps of a chain"""
    rounds: int = 20
    """number of rounds of the measurement; each round runs everything once, in random order"""
    engine: Literal["auto", "fused", "autograd"] = "auto"
    """engine that computes fastebm's gradients; all but autograd list the ways to run them, and which is chosen"""
    device: str | None = None
    """device that is measured, cpu or cuda; by default a GPU if there is one"""
    out: Path | None = None
    """.json file for the results of each round, with the machine and versions"""
    overwrite: bool = False
    """replace the file of an earlier measurement"""

    def __call__(self) -> int:
        import torch

        from fastebm.evaluation import speed

        shape = speed.parse_shape(self.shape)
        check_range("--batch", self.batch, 1, LARGEST)
        check_range("--num-steps", self.num_steps, 1, LONGEST)
        check_range("--rounds", self.rounds, 1, LONGEST)
        check_memory(f"{self.batch:,} chains of {self.shape}", 4 * 4 * self.batch * math.prod(shape))
        run = speed.bench(
            self.energy,
            shape,
            batch=self.batch,
            dtype=getattr(torch, self.dtype),
            num_steps=self.num_steps,
            rounds=self.rounds,
            engine=self.engine,
            device=select_device(self.device).type,
            out=self.out,
            overwrite=self.overwrite,
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
        print(speed.printed(run.rows))
        candidates = speed.list_candidates(
            self.energy,
            shape,
            batch=self.batch,
            dtype=getattr(torch, self.dtype),
            engine=self.engine,
            device=select_device(self.device).type,
        )
        if candidates:
            print("\nWays to run its gradient, measured in turns:", *candidates, sep="\n  ")
        if self.out is not None:
            print(f"\n{self.out} has the times of each round, the machine and the versions.")
        return 0
