"""The command `fastebm denoise`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fastebm.cli.image_task import ImageTask
from fastebm.distributed import together

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from fastebm.tasks import ClassicalDenoiser, DenoiseOptions


@dataclass(frozen=True)
class Denoise(ImageTask):
    """Remove noise from images by chains that start at them, and compare with classical methods.

    Noise is added to clean images first, so that PSNR and SSIM can be measured. Step size, temperature and the size at
    which chains start are tuned on a few training images, and so are the classical methods.
    """

    files: ClassVar = ("denoised.png", "denoised.npz")

    noise: float = 0.2
    """standard deviation of the noise of a pixel, where pixels lie in [-1, 1]"""
    noisy: bool = False
    """the images have that noise already, and none is added"""
    tuning_images: int = 16
    """number of training images to tune on; 0 tunes nothing and leaves out the classical methods"""
    num_steps: int = 10
    """number of Langevin steps at each resolution"""
    step_size: float | None = None
    """step size of a Langevin step; by default tuned, and that of the training without tuning"""
    noise_std: float = 0.1
    """standard deviation of the noise of a chain's first Langevin step; it falls to 0"""
    num_chains: int = 8
    """number of chains of each image, whose mean is the result; tuning runs one"""
    random_shifts: bool = True
    """shift the chains of an image by up to a pixel, so that their errors differ and average out"""
    temperature: float | None = None
    """temperature of the energy beside the data term; 0 runs chains without a data term; by default tuned, and 0
    without tuning"""
    start_size: int | None = None
    """resolution in pixels at which chains start; by default tuned, and the full one without tuning"""

    def __call__(self) -> int:
        from fastebm import tasks
        from fastebm.tasks.arguments import check_number
        from fastebm.tasks.image_quality import import_skimage
        from fastebm.tasks.inputs import training_step_size

        if self.tuning_images < 0:
            raise ValueError(f"--tuning-images must not be negative, got {self.tuning_images}")
        tuned = {"step_size": self.step_size, "temperature": self.temperature, "start_size": self.start_size}
        given: dict[str, Any] = {name: value for name, value in tuned.items() if value is not None}
        if self.tuning_images and given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{names}: such settings are tuned; --tuning-images 0 takes those that are given")
        check_number("--noise", self.noise, above=0)
        options = tasks.DenoiseOptions(
            num_steps=self.num_steps,
            noise_std=self.noise_std,
            num_chains=self.num_chains,
            shifts=self.random_shifts,
            **given,
        )
        if self.tuning_images or not self.noisy:
            import_skimage("metrics")  # a missing package is reported before anything runs
        run = self.open()
        if self.step_size is None:
            options = dataclasses.replace(options, step_size=training_step_size(run))
        images = self.images(run)
        with self.folder() as out:
            self._denoise(run, images, options, out)
        return 0

    def _denoise(self, run: Any, images: Tensor, options: DenoiseOptions, out: Path) -> None:
        from fastebm import tasks
        from fastebm.runs.folder import RunError
        from fastebm.tasks.outputs import save_arrays
        from fastebm.tasks.pictures import save_denoised

        baselines: list[ClassicalDenoiser] = []
        if self.tuning_images:
            try:
                few = tasks.images_for(run, split="train", count=self.tuning_images)
            except RunError as error:  # --data may be given: tuning is what lacks training images
                raise RunError(f"{error}, and --tuning-images 0") from error
            one = dataclasses.replace(options, num_chains=1)
            options = together(tasks.tune_denoising, run, few, self.noise, one, seed=self.seed)
            options = dataclasses.replace(options, num_chains=self.num_chains)
            baselines = tasks.tune_denoisers(few, tasks.add_noise(few, self.noise, self.seed, 2**32), self.noise)
        noisy = images if self.noisy else tasks.add_noise(images, self.noise, self.seed)
        clean = None if self.noisy else images
        result = together(
            tasks.denoise, run, noisy, self.noise, options, clean=clean, baselines=baselines, seed=self.seed
        )
        save_denoised(out / "denoised.png", result)
        save_arrays(out / "denoised.npz", noisy=result.noisy, restored=result.restored)
        settings = {denoiser.name: dict(denoiser.settings) for denoiser in baselines}
        numbers = result.to_json() | {"tuned_on": self.tuning_images, "classical": settings}
        lines = [
            f"{name:16} PSNR {values['psnr']:6.2f} dB, SSIM {values['ssim']:.3f}"
            for name, values in numbers["quality"].items()
        ]
        self.save_numbers(run, out, numbers, lines)
