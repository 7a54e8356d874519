"""The command `fastebm translate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fastebm.cli.image_task import ImageTask
from fastebm.distributed import together


@dataclass(frozen=True)
class Translate(ImageTask):
    """Carry the images of --data, from another domain, over into the domain that the run has learned."""

    files: ClassVar = ("translated.png", "translated.npz")

    data: Path | None = None
    """file or folder of images of the other domain, as `fastebm train` takes it, or a single picture; required"""
    num_steps: int = 50
    """number of Langevin steps, at each resolution if there are several"""
    step_size: float | None = None
    """step size of a Langevin step; by default that of the training"""
    noise_std: float = 0.0
    """standard deviation of the noise of a Langevin step"""
    start_noise: float = 0.01
    """standard deviation of the noise that is added to the images first"""
    start_size: int | None = None
    """resolution in pixels that images are averaged down to, at which chains start; by default the full one"""
    data_weight: float = 0.0
    """weight of the data term, which pulls chains to the images that they started from; 0 for none"""
    hide_source: bool = False
    """leave the source images out of the .png file, for example for copyright; the .npz file has them; chains at full
    size may end close to them"""

    def __call__(self) -> int:
        from fastebm import tasks
        from fastebm.tasks.inputs import training_step_size
        from fastebm.tasks.outputs import save_arrays
        from fastebm.tasks.pictures import save_translated

        if self.data is None:
            raise ValueError("--data is needed: images of the domain to come from")
        run = self.open()
        options = tasks.TranslateOptions(
            num_steps=self.num_steps,
            step_size=training_step_size(run) if self.step_size is None else self.step_size,
            noise_std=self.noise_std,
            start_noise=self.start_noise,
            snapshots=max(1, min(6, self.num_steps)),
            start_size=self.start_size,
            data_weight=self.data_weight,
        )
        images = self.images(run)
        with self.folder() as out:
            result = together(tasks.translate, run, images, options, seed=self.seed)
            save_translated(out / "translated.png", result, source=not self.hide_source)
            save_arrays(out / "translated.npz", source=result.source, translated=result.images, change=result.change)
            numbers = result.to_json()
            first, *_, last = numbers["energy"]
            line = f"Mean energy from {first:.2f} to {last:.2f}; mean change of a pixel {numbers['change']:.3f}."
            self.save_numbers(run, out, numbers, [line])
        return 0
