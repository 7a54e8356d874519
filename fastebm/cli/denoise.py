"""The command `fastebm denoise`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastebm.cli.image_task import ImageTask

if TYPE_CHECKING:
    from fastebm.tasks import ClassicalDenoiser


@dataclass(frozen=True)
class Denoise(ImageTask):
    """Remove noise from images by chains that start at them, and compare with classical methods.

    Noise is added to clean images first, so that PSNR and SSIM can be measured. Step size, temperature and the size at
    which chains start are tuned on a few training images, and so are the classical methods.
    """

    noise: float = 0.2
    """standard deviation of the noise of a pixel, where pixels lie in [-1, 1]"""
    noisy: bool = False
    """the images have that noise already, and none is added"""
    tuning_images: int = 16
    """number of training images to tune on; 0 tunes nothing and leaves out the classical methods"""
    num_steps: int = 10
    """number of Langevin steps at each resolution"""
    step_size: float = 1.0
    """step size of a Langevin step; tuned"""
    noise_std: float = 0.1
    """standard deviation of the noise of a chain's first Langevin step; it falls to 0"""
    num_chains: int = 8
    """number of chains of each image, whose mean is the result; tuning runs one"""
    random_shifts: bool = True
    """shift the chains of an image by up to a pixel, so that their errors differ and average out"""
    temperature: float = 0.0
    """temperature of the energy beside the data term; 0 runs chains without a data term; tuned"""
    start_size: int | None = None
    """resolution in pixels at which chains start; tuned; by default the full one"""

    def __call__(self) -> int:
        from fastebm import tasks
        from fastebm.runs.folder import RunError
        from fastebm.tasks.outputs import save_arrays, task_folder
        from fastebm.tasks.pictures import save_denoised

        if self.tuning_images < 0:
            raise ValueError(f"--tuning-images must not be negative, got {self.tuning_images}")
        run, out = self.open()
        images = self.images(run)
        options = tasks.DenoiseOptions(
            num_steps=self.num_steps,
            step_size=self.step_size,
            temperature=self.temperature,
            noise_std=self.noise_std,
            start_size=self.start_size,
            num_chains=self.num_chains,
            shifts=self.random_shifts,
        )
        baselines: list[ClassicalDenoiser] = []
        if self.tuning_images:
            try:
                few = tasks.images_for(run, split="train", count=self.tuning_images)
            except RunError as error:  # --data may be given: tuning is what lacks training images
                raise RunError(f"{error}, and --tuning-images 0") from error
            one = dataclasses.replace(options, num_chains=1)
            options = tasks.tune_denoising(run, few, self.noise, one, seed=self.seed)
            options = dataclasses.replace(options, num_chains=self.num_chains)
            baselines = tasks.tune_denoisers(few, tasks.add_noise(few, self.noise, self.seed, 2**32), self.noise)
        noisy = images if self.noisy else tasks.add_noise(images, self.noise, self.seed)
        clean = None if self.noisy else images
        result = tasks.denoise(run, noisy, self.noise, options, clean=clean, baselines=baselines, seed=self.seed)
        task_folder(out, overwrite=self.overwrite)
        save_denoised(out / "denoised.png", result)
        save_arrays(out / "denoised.npz", noisy=result.noisy, restored=result.restored)
        settings = {denoiser.name: dict(denoiser.settings) for denoiser in baselines}
        numbers = result.to_json() | {"tuned_on": self.tuning_images, "classical": settings}
        lines = [
            f"{name:16} PSNR {values['psnr']:6.2f} dB, SSIM {values['ssim']:.3f}"
            for name, values in numbers["quality"].items()
        ]
        self.save_numbers(run, out, numbers, lines)
        return 0
