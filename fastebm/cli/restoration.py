"""`fastebm denoise` and `fastebm inpaint`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from torch import Tensor

from fastebm.cli.arguments import check_count, parsed_device
from fastebm.training import CoarseToFineRun


@dataclass(frozen=True)
class ImageTask:
    """What all commands ask for that work on images with a run."""

    run: tyro.conf.Positional[Path]
    """folder of the run, finished or not"""
    data: Path | None = None
    """images: a set as `train` takes it, or a single picture; by default the run's own, those it has not seen if it can
    be"""
    split: str | None = None
    """part of the data"""
    convert: bool = False
    """bring images of another size or colours to those of the run, as its training images were"""
    count: int = 100
    """how many images, at most"""
    seed: int = 0
    """of all noise: other seeds, other results"""
    out: Path | None = None
    """folder for pictures and numbers; by default one in the run's folder, named after the command"""
    overwrite: bool = False
    """replace what an earlier call left in that folder"""
    device: str | None = None
    """cpu or cuda; by default a GPU if there is one"""

    def opened(self, name: str) -> tuple[CoarseToFineRun, Path]:
        """The run, and the folder for what comes out, not yet made."""
        from fastebm.tasks.outputs import check_free

        check_count(self.count)
        run = CoarseToFineRun.load(self.run, parsed_device(self.device))
        out = self.run / name if self.out is None else self.out
        check_free(out, overwrite=self.overwrite)  # before the work, not after it
        return run, out

    def images(self, run: CoarseToFineRun) -> Tensor:
        from fastebm.tasks import images_for

        return images_for(run, self.data, split=self.split, count=self.count, convert=self.convert)

    def leave(self, run: CoarseToFineRun, out: Path, numbers: dict[str, Any], lines: list[str]) -> None:
        """The numbers as a file, and for people."""
        from fastebm.tasks.outputs import NUMBERS, save_numbers

        begun = {"run": str(self.run), "iteration": run.iteration, "seed": self.seed}
        save_numbers(out, begun | numbers)
        print("\n".join([*lines, f"In {out}: {', '.join(sorted(p.name for p in out.iterdir()))}; see {NUMBERS}."]))


@dataclass(frozen=True)
class Denoise(ImageTask):
    """Take noise out of images by chains that start from them; beside it, what classical methods make of them.

    Clean images get noise first, so that PSNR and SSIM can be said. Step size, strength of the data term and the
    resolution at which chains start are tuned on a few training images, and so are the classical methods.
    """

    noise: float = 0.2
    """standard deviation, of pixels in [-1, 1]"""
    noisy: bool = False
    """the images have that noise already"""
    tune: int = 16
    """training images to tune on; 0 takes the numbers below and leaves out classical methods"""
    num_steps: int = 10
    """updates at each resolution"""
    step_size: float = 1.0
    """of each; tuned"""
    noise_std: float = 0.1
    """of the chains' own noise, falling to 0"""
    num_chains: int = 8
    """of each image, of which the mean is taken; tuning is by one"""
    shifts: bool = True
    """chains of an image see it moved by up to a pixel, so that their errors differ and a mean takes some away"""
    temperature: float = 0.0
    """of the energy beside the data term, 0 for none; tuned"""
    start_size: int | None = None
    """resolution at which chains start, by default the full one; tuned"""

    def __call__(self) -> int:
        from fastebm import tasks
        from fastebm.tasks.outputs import save_arrays, task_folder
        from fastebm.tasks.pictures import save_denoised

        if self.tune < 0:
            raise ValueError(f"--tune must not be negative, got {self.tune}")
        run, out = self.opened("denoise")
        images = self.images(run)
        options = tasks.DenoiseOptions(
            self.num_steps,
            self.step_size,
            self.temperature,
            self.noise_std,
            self.start_size,
            self.num_chains,
            self.shifts,
        )
        baselines: list[tasks.ClassicalDenoiser] = []
        if self.tune:
            few = tasks.images_for(run, split="train", count=self.tune)
            one = dataclasses.replace(options, num_chains=1)
            options = tasks.tune_denoising(run, few, self.noise, one, seed=self.seed)
            options = dataclasses.replace(options, num_chains=self.num_chains)
            baselines = tasks.tuned_denoisers(few, tasks.add_noise(few, self.noise, self.seed, 2**32), self.noise)
        corrupted = images if self.noisy else tasks.add_noise(images, self.noise, self.seed)
        clean = None if self.noisy else images
        result = tasks.denoise(run, corrupted, self.noise, options, clean=clean, baselines=baselines, seed=self.seed)
        task_folder(out, overwrite=self.overwrite)
        save_denoised(out / "denoised.png", result)
        save_arrays(out / "denoised.npz", noisy=result.noisy, restored=result.restored)
        settings = {denoiser.name: dict(denoiser.settings) for denoiser in baselines}
        numbers = result.to_json() | {"tuned_on": self.tune, "classical": settings}
        lines = [
            f"{name:16} PSNR {of.to_json()['psnr']:6.2f} dB, SSIM {of.to_json()['ssim']:.3f}"
            for name, of in result.quality.items()
        ]
        self.leave(run, out, numbers, lines)
        return 0


@dataclass(frozen=True)
class Inpaint(ImageTask):
    """Fill in holes in images, several times each, with what is known pinned inside of the chain."""

    hole: Literal["square", "pixels", "half"] = "square"
    """a quarter of the image in the middle, half of all pixels, or the lower half"""
    mask: Path | None = None
    """instead, a picture of the images' size that is white where to fill in"""
    restarts: int = 8
    """chains of each image; all of them are kept, by ascending energy, and their mean"""
    coarse: bool | None = None
    """True starts at the lowest resolution and goes up, by default for square, half and a mask, if the run can; False
    starts at full size, from the mean of what is known around"""
    num_steps: int | None = None
    """updates at each resolution; by default as in training, and 5 at full size alone by a run that did not train with
    holes (hole_starts): the start is near already"""
    step_size: float | None = None
    """of each; by default as in training"""

    def __call__(self) -> int:
        from fastebm import tasks
        from fastebm.tasks.outputs import save_arrays, task_folder
        from fastebm.tasks.pictures import save_inpainted

        run, out = self.opened("inpaint")
        images = self.images(run)
        if self.mask is not None:
            hole = tasks.load_hole_mask(self.mask, len(images), run.size)
        else:
            hole = tasks.hole_mask(self.hole, len(images), run.size, self.seed)
        able = run.config.variant == "cascade" and (self.mask is not None or self.hole != "pixels")
        coarse = able if self.coarse is None else self.coarse
        usual = run.config.num_steps if coarse or run.config.hole_starts else 5
        options = tasks.InpaintOptions(
            num_steps=usual if self.num_steps is None else self.num_steps,
            step_size=run.config.step_size if self.step_size is None else self.step_size,
            noise_start=run.config.noise_start,
            noise_end=run.config.noise_end,
            restarts=self.restarts,
            coarse=coarse,
        )
        result = tasks.inpaint(run, images, hole, options, seed=self.seed)
        task_folder(out, overwrite=self.overwrite)
        save_inpainted(out / "inpainted.png", result)
        save_arrays(out / "inpainted.npz", filled=result.filled, energy=result.energy, mean=result.mean)
        errors = {name: float(values.mean()) for name, values in result.errors().items()}
        lines = [
            f"Root mean square error in the hole: {errors['best']:.3f} of the chain with the lowest energy, "
            f"{errors['chains']:.3f} of all chains on average, {errors['nearest']:.3f} of the nearest, "
            f"{errors['mean']:.3f} of the mean of the chains; "
            f"{errors['surroundings']:.3f} of the mean of known pixels around.",
            f"Standard deviation between the chains of an image: {float(result.diversity.mean()):.3f}.",
        ]
        self.leave(run, out, result.to_json() | {"pattern": self.hole if self.mask is None else self.mask.name}, lines)
        return 0
