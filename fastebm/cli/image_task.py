"""What `fastebm denoise`, `inpaint`, `translate` and `interpolate` share: options, the run, images and results."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fastebm.cli.arguments import check_count, select_device

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ImageTask:
    """A command that works on images with a run."""

    files: ClassVar[tuple[str, ...]]
    """files that it may write, beside the numbers"""

    run: Path
    """folder of the run, finished or not"""
    data: Path | None = None
    """file or folder of images, as `fastebm train` takes it, or a single picture; by default the run's own images, the
    test split if there is one"""
    split: str | None = None
    """split of the data; by default test, or the only one"""
    convert: bool = False
    """bring images of another size or with other colours to the format of the training images"""
    count: int = 100
    """largest number of images"""
    seed: int = 0
    """seed of all noise"""
    out: Path | None = None
    """folder for pictures and numbers; by default a folder named as the command, in the run's folder"""
    overwrite: bool = False
    """replace files of an earlier command in that folder"""
    device: str | None = None
    """device that chains run on, cpu or cuda; by default a GPU if there is one"""

    def open(self) -> Any:
        """The run, once the arguments and the place for results are found to be right."""
        from fastebm.runs.folder import RunFolder
        from fastebm.tasks.arguments import check_seed
        from fastebm.tasks.outputs import check_folder
        from fastebm.training import load

        check_count(self.count)
        check_seed(self.seed)
        RunFolder.existing(self.run)
        check_folder(self._out(), self._files(), overwrite=self.overwrite)
        return load(self.run, select_device(self.device))

    def folder(self) -> AbstractContextManager[Path]:
        """The folder for results, for a block that computes and writes them."""
        from fastebm.tasks.outputs import task_folder

        return task_folder(self._out(), self._files(), overwrite=self.overwrite)

    def images(self, run: Any) -> Tensor:
        """The images that the task starts from, (N, C, S, S) in [-1, 1]."""
        from fastebm.tasks import images_for

        return images_for(run, self.data, split=self.split, count=self.count, convert=self.convert)

    def save_numbers(self, run: Any, out: Path, numbers: dict[str, Any], lines: list[str]) -> None:
        """Writes numbers.json, prints the lines, and names the files."""
        from fastebm.tasks.outputs import NUMBERS, save_numbers

        save_numbers(out, {"run": str(self.run), "iteration": run.iteration, "seed": self.seed, **numbers})
        files = ", ".join(sorted(path.name for path in out.iterdir()))
        print("\n".join([*lines, f"In {out}: {files}; {NUMBERS} has all numbers."]))

    def _out(self) -> Path:
        return self.run / type(self).__name__.lower() if self.out is None else self.out

    def _files(self) -> tuple[str, ...]:
        from fastebm.tasks.outputs import NUMBERS

        return (*self.files, NUMBERS)
