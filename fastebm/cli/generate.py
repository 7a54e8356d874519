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
    """a folder for PNGs, a .npz ("images", uint8, N x S x S x channels), or a .png for a grid; numbers.json in the
    folder, or a file with .json behind that name, says what was drawn by what and how fast"""
    seed: int | None = None
    """other seeds, other samples; by default always the same ones, those of fastebm sample"""
    processes: int = 1
    """that draw at the same time; the samples are the same for any number"""
    chunk: int | None = None
    """chains at a time; by default 256 at up to 32x32. A kill loses at most three chunks of each process: one that is
    being drawn, and two that wait to be written"""
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
        speed = "" if made.images_per_second is None else f", {made.images_per_second:.4g} a second"
        print(f"{self.out}: {self.count:,} samples of {of}{before}{speed}; see {made.numbers}")
        return 0
