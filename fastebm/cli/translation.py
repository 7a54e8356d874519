"""`fastebm translate` and `fastebm interpolate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastebm.cli.restoration import ImageTask
from fastebm.training import CoarseToFineRun, RunError


@dataclass(frozen=True)
class Translate(ImageTask):
    """Carry images of another domain, --data, over into the one that the run has learned."""

    num_steps: int = 50
    """updates"""
    step_size: float = 1.0
    """of each"""
    noise_std: float = 0.0
    """of the chain"""
    start_noise: float = 0.01
    """standard deviation of the noise that images get before"""
    start_size: int | None = None
    """start from images averaged down to this resolution, with as many steps at each; by default the full one"""
    data_weight: float = 0.0
    """weight of a pull to the images that are translated"""
    hide_source: bool = False
    """leave the images that are translated out of the picture (not of the .npz), as where they are others' photographs;
    chains at full size may end close to them"""

    def __call__(self) -> int:
        from fastebm import tasks
        from fastebm.tasks.outputs import save_arrays, task_folder
        from fastebm.tasks.pictures import save_translated

        if self.data is None:
            raise ValueError("--data is needed: images of the domain to come from")
        run, out = self.opened("translate")
        options = tasks.TranslateOptions(
            self.num_steps,
            self.step_size,
            self.noise_std,
            self.start_noise,
            min(6, self.num_steps),
            self.start_size,
            self.data_weight,
        )
        result = tasks.translate(run, self.images(run), options, seed=self.seed)
        task_folder(out, overwrite=self.overwrite)
        save_translated(out / "translated.png", result, source=not self.hide_source)
        save_arrays(out / "translated.npz", source=result.source, translated=result.images, change=result.change)
        numbers = result.to_json()
        energies = numbers["energy"]
        lines = [
            f"Mean energy from {energies[0]:.2f} to {energies[-1]:.2f}; mean change of a pixel {numbers['change']:.3f}."
        ]
        self.leave(run, out, numbers, lines)
        return 0


@dataclass(frozen=True)
class Interpolate(ImageTask):
    """Go from sample to sample and from image to image, and show the training images next to samples."""

    count: int = 12
    """images, the ends of half as many paths; and as many pairs of chains"""
    points: int = 11
    """of each path, with both ends"""
    iterations: int = 60
    """of the path between images, each a step down the energy and a new distribution of points"""
    step_size: float = 0.25
    """of these steps"""

    def __call__(self) -> int:
        from fastebm import tasks
        from fastebm.tasks.outputs import save_arrays, task_folder
        from fastebm.tasks.pictures import save_chain_path, save_image_path

        run, out = self.opened("interpolate")
        options = tasks.PathOptions(self.points, self.iterations, self.step_size)
        images = self.images(run)
        pairs = len(images) // 2
        if not pairs:
            raise ValueError("a path needs two images, got one: give more with --data or --count")
        between = tasks.interpolate_images(run, images[0 : 2 * pairs : 2], images[1 : 2 * pairs : 2], options)
        chains = {} if run.config.variant != "cascade" else {"noise": _chains(self, run, "noise", pairs)}
        if chains and len(run.levels) > 1:
            chains["coarse"] = _chains(self, run, "coarse", pairs)
        task_folder(out, overwrite=self.overwrite)
        save_image_path(out / "images.png", between)
        save_arrays(out / "images.npz", straight=between.straight, relaxed=between.relaxed)
        numbers: dict[str, Any] = {"images": between.to_json()}
        for name, path in chains.items():
            save_chain_path(out / f"{name}.png", path)
            numbers[name] = path.to_json()
        of_images = numbers["images"]
        lines = [
            f"Highest energy along paths between images, in the mean: {of_images['highest_energy_straight']:.2f} "
            f"straight, {of_images['highest_energy_relaxed']:.2f} relaxed (ends {of_images['energy_ends']:.2f})."
        ]
        numbers["neighbours"], line = _neighbours(self, run, out)
        self.leave(run, out, numbers, [*lines, line])
        return 0


def _chains(command: Interpolate, run: CoarseToFineRun, between: Any, pairs: int) -> Any:
    from fastebm.tasks import interpolate_chains

    return interpolate_chains(run, between, pairs=pairs, points=command.points, seed=command.seed)


def _neighbours(command: Interpolate, run: CoarseToFineRun, out: Path) -> tuple[dict[str, float] | None, str]:
    """Samples beside the training images next to them; as a measure, how far from those unseen images are."""
    from fastebm import tasks
    from fastebm.tasks.pictures import save_nearest

    try:
        training, unseen = tasks.dataset_images(run, "train"), tasks.images_for(run, count=50)
    except (RunError, ValueError) as error:
        return None, f"Without training images there are no neighbours of samples: {error}"
    samples: Tensor = run.sample(50, command.seed)
    near = tasks.nearest_images(samples, training)
    save_nearest(out / "neighbours.png", samples, near.images, near.distances)
    distances = {
        "samples": float(near.distances[:, 0].mean()),
        "samples_smallest": float(near.distances.min()),
        "unseen_images": float(tasks.nearest_images(unseen, training, 1).distances.mean()),
    }
    return distances, (
        f"Mean distance to the nearest training image: {distances['samples']:.2f} from samples (the smallest "
        f"{distances['samples_smallest']:.2f}), {distances['unseen_images']:.2f} from images that were not learned."
    )
