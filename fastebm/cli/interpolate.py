"""The command `fastebm interpolate`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fastebm.cli.image_task import ImageTask
from fastebm.distributed import together

if TYPE_CHECKING:
    from torch import Tensor

    from fastebm.tasks import PathOptions

MOST = 10_000


@dataclass(frozen=True)
class Interpolate(ImageTask):
    """Show paths between images and between samples, and the training images that are nearest to samples."""

    files: ClassVar = ("images.png", "images.npz", "noise.png", "coarse.png", "neighbours.png")

    count: int = 12
    """number of images, at most 10,000, which are the ends of half as many paths; as many pairs of chains are
    interpolated"""
    points: int = field(default=11, metadata={"group": "path"})
    """number of images along a path, with both ends"""
    iterations: int = field(default=60, metadata={"group": "path"})
    """number of iterations that relax a path between images, each a step down the energy and an even redistribution of
    the points"""
    step_size: float | None = field(default=None, metadata={"group": "path"})
    """step size of an iteration; by default a quarter of that of the training"""

    def __call__(self) -> int:
        from fastebm import tasks
        from fastebm.tasks.inputs import training_step_size

        if self.count > MOST:
            raise ValueError(
                f"--count must be at most {MOST:,}, because each pair is a path of chains, got {self.count}"
            )
        run = self.open()
        usual = tasks.PathOptions.step_size * training_step_size(run)
        options = tasks.PathOptions(self.points, self.iterations, usual if self.step_size is None else self.step_size)
        images = self.images(run)
        if len(images) < 2:
            raise ValueError("a path needs two images, got one: give more with --data or --count")
        with self.folder() as out:
            self._paths(run, images, options, out)
        return 0

    def _paths(self, run: Any, images: Tensor, options: PathOptions, out: Path) -> None:
        from fastebm import tasks
        from fastebm.tasks.outputs import save_arrays
        from fastebm.tasks.pictures import save_chain_path, save_image_path

        pairs = len(images) // 2
        ends = images[0 : 2 * pairs : 2], images[1 : 2 * pairs : 2]
        between = together(tasks.interpolate_images, run, *ends, options, progress=True)
        cascade = getattr(run.config, "variant", None) == "cascade"
        starts: Any = ("noise", "coarse")[: len(run.levels)] if cascade else ()
        chains = {
            start: together(tasks.interpolate_chains, run, start, pairs=pairs, points=self.points, seed=self.seed)
            for start in starts
        }
        save_image_path(out / "images.png", between)
        save_arrays(out / "images.npz", straight=between.straight, relaxed=between.relaxed)
        numbers: dict[str, Any] = {"images": between.to_json()}
        for name, path in chains.items():
            save_chain_path(out / f"{name}.png", path)
            numbers[name] = path.to_json()
        energies = numbers["images"]
        line = (
            f"Mean of the highest energy of a path between images: {energies['highest_energy_straight']:.2f} if "
            f"straight, {energies['highest_energy_relaxed']:.2f} if relaxed; at its ends {energies['energy_ends']:.2f}."
        )
        numbers["neighbours"], nearest = self._nearest(run, out)
        self.save_numbers(run, out, numbers, [line, nearest])

    def _nearest(self, run: Any, out: Path) -> tuple[dict[str, float] | None, str]:
        """Writes samples beside their nearest training images; distances, with those of unseen images to compare."""
        from fastebm import tasks
        from fastebm.tasks.pictures import save_nearest
        from fastebm.tasks.run_images import unseen_images
        from fastebm.training import RunError

        try:
            training = tasks.dataset_images(run, "train")
        except (RunError, ValueError) as error:
            return None, f"Without training images there are none that are nearest to samples: {error}"
        samples = together(run.sample, 50, self.seed)
        near = tasks.nearest_images(samples, training)
        save_nearest(out / "neighbours.png", samples, near.images, near.distances)
        distances = {
            "samples": float(near.distances[:, 0].mean()),
            "samples_smallest": float(near.distances.min()),
        }
        beside = "; none are known that were not learned, to compare with"
        with suppress(RunError, ValueError):  # there are none
            unseen = tasks.nearest_images(unseen_images(run, 50), training, 1)
            distances["unseen_images"] = float(unseen.distances.mean())
            beside = f", {distances['unseen_images']:.2f} from images that were not learned"
        return distances, (
            f"Mean distance to the nearest training image: {distances['samples']:.2f} from samples (the smallest "
            f"{distances['samples_smallest']:.2f}){beside}."
        )
