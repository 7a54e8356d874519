"""The command `fastebm inpaint`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fastebm.cli.image_task import ImageTask
from fastebm.distributed import together

if TYPE_CHECKING:
    from fastebm.tasks import InpaintingResult


@dataclass(frozen=True)
class Inpaint(ImageTask):
    """Fill in missing parts of images, several times each, by chains that keep the known pixels fixed."""

    files: ClassVar = ("inpainted.png", "inpainted.npz")

    mask_pattern: Literal["square", "pixels", "half"] | None = None
    """pixels to fill in: the middle quarter of the image, half of all pixels, or the lower half; by default square"""
    mask: Path | None = None
    """picture of the images' size that is white where pixels are to be filled in; by default as the pattern says"""
    restarts: int = 8
    """number of chains of each image; all are kept, by ascending energy, and their mean"""
    coarse: bool | None = None
    """start chains at the lowest resolution, from noise, rather than at full size, from the mean of the known pixels
    nearby; by default on for square, half and a mask, if the run can"""
    num_steps: int | None = None
    """number of Langevin steps at each resolution; by default as in training, and 5 at full size alone by a run that
    did not train with holes (hole_starts), because the start is near already"""
    step_size: float | None = None
    """step size of a Langevin step; by default as in training"""

    def __call__(self) -> int:
        from fastebm import tasks
        from fastebm.tasks.outputs import save_arrays
        from fastebm.tasks.pictures import save_inpainted

        if self.mask is not None and self.mask_pattern is not None:
            raise ValueError("--mask and --mask-pattern both say where the hole is: give one of them")
        run = self.open()
        images, options = self.images(run), self._options(run)
        if self.mask is not None:
            hole = tasks.load_hole_mask(self.mask, len(images), run.size)
        else:
            hole = tasks.hole_mask(self.mask_pattern or "square", len(images), run.size, self.seed)
        with self.folder() as out:
            result = together(tasks.inpaint, run, images, hole, options, seed=self.seed)
            save_inpainted(out / "inpainted.png", result)
            save_arrays(out / "inpainted.npz", filled=result.filled, energy=result.energy, mean=result.mean)
            self._report(run, result, out)
        return 0

    def _report(self, run: Any, result: InpaintingResult, out: Path) -> None:
        errors = {name: float(values.mean()) for name, values in result.errors().items()}
        lines = [
            f"Root mean square error of the filled pixels: {errors['best']:.3f} for the chain with the lowest energy, "
            f"{errors['mean_of_chains']:.3f} for a chain on average, {errors['nearest']:.3f} for the nearest chain, "
            f"{errors['mean']:.3f} for the mean of the chains, {errors['neighbour_mean']:.3f} for the mean of the "
            "known pixels nearby.",
            f"Standard deviation between the chains of an image: {float(result.diversity.mean()):.3f}.",
        ]
        pattern = self.mask_pattern or "square" if self.mask is None else self.mask.name
        self.save_numbers(run, out, result.to_json() | {"pattern": pattern}, lines)

    def _options(self, run: Any) -> Any:
        """Options with the numbers of training where none were given. Only a cascade has a noise that changes."""
        from fastebm.tasks import InpaintOptions
        from fastebm.tasks.inputs import training_step_size

        config = run.config
        able = getattr(config, "variant", None) == "cascade" and (
            self.mask is not None or self.mask_pattern != "pixels"
        )
        coarse = able if self.coarse is None else self.coarse
        usual = config.num_steps if coarse or getattr(config, "hole_starts", 1) else 5
        if hasattr(config, "noise_start"):
            noise_start, noise_end = config.noise_start, config.noise_end
        else:  # a run without an energy has no such noise; `inpaint` refuses it
            noise_start = noise_end = getattr(config, "noise_std", 0.0)
        return InpaintOptions(
            num_steps=usual if self.num_steps is None else self.num_steps,
            step_size=training_step_size(run) if self.step_size is None else self.step_size,
            noise_start=noise_start,
            noise_end=noise_end,
            restarts=self.restarts,
            coarse=coarse,
        )
