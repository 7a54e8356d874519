"""`fastebm generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from fastebm.cli.arguments import check_count, parsed_device
from fastebm.tasks import generate


@dataclass(frozen=True)
class Generate:
    """Write any number of samples of a run: pictures in a folder, one array, or a grid. Goes on after a kill."""

    run: tyro.conf.Positional[Path]
    """folder of the run"""
    count: int
    """how many"""
    out: Path
    """a folder for PNGs, a .npz ("images", uint8, N x S x S x channels), or a .png for a grid"""
    seed: int | None = None
    """other seeds, other samples; by default always the same ones, those of fastebm sample"""
    processes: int = 1
    """that draw at the same time; the samples are the same for any number"""
    chunk: int | None = None
    """chains at a time, which a kill loses at most; by default 256 at up to 32x32"""
    device: str | None = None
    """cpu or cuda; by default a GPU if there is one"""
    overwrite: bool = False
    """replaces what is there, or was begun there with something else"""

    def __call__(self) -> int:
        check_count(self.count)
        made = generate(
            self.run,
            self.count,
            self.out,
            seed=self.seed,
            processes=self.processes,
            chunk=self.chunk,
            device=parsed_device(self.device),
            overwrite=self.overwrite,
            progress=True,
        )
        of = f"{made.request.size}x{made.request.size} from iteration {made.request.iteration} of {self.run}"
        there = self.count - made.drawn
        before = f", {there:,} of them were there before" if there else ""
        print(f"{self.out}: {self.count:,} samples of {of}{before}")
        return 0
