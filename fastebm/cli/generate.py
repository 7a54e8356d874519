"""The command `fastebm generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastebm.cli.arguments import check_count, select_device


@dataclass(frozen=True)
class Generate:
    """Write any number of samples of a run: as pictures in a folder, as one array, or as a grid.

    The same command continues after a kill. A .json file beside the samples says which run drew them, and how fast.
    """

    run: Path
    """folder of the run"""
    count: int
    """number of samples"""
    out: Path
    """folder for .png files, an .npz file (array "images", uint8, count x size x size x channels), or a .png file for a
    grid"""
    seed: int | None = None
    """seed of all noise; by default the noise of `fastebm sample`"""
    processes: int = 1
    """number of processes that draw at the same time; it changes no sample"""
    chunk: int | None = None
    """number of chains that run at a time in a process; a kill loses at most three such chunks a process; by default
    256 at up to 32x32, and fewer for larger images"""
    device: str | None = None
    """device that chains run on, cpu or cuda; by default a GPU if there is one"""
    overwrite: bool = False
    """replace files of an earlier command"""

    def __call__(self) -> int:
        from fastebm.tasks import generate

        check_count(self.count)
        made = generate(
            self.run,
            self.count,
            self.out,
            seed=self.seed,
            processes=self.processes,
            chunk=self.chunk,
            device=select_device(self.device),
            overwrite=self.overwrite,
            progress=True,
        )
        if not made.drawn:
            print(f"{self.out}: all {self.count:,} samples were there before; see {made.numbers}")
            return 0
        size, there = made.request.size, self.count - made.drawn
        before = f", {there:,} of them were there before" if there else ""
        speed = "" if made.images_per_second is None else f", {made.images_per_second:.4g} a second"
        print(
            f"{self.out}: {self.count:,} samples of {size}x{size} from iteration {made.request.iteration} of {self.run}"
            f"{before}{speed}; see {made.numbers}"
        )
        return 0
