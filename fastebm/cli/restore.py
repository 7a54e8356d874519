"""`fastebm restore`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from fastebm.cli.arguments import check_count, parsed_device
from fastebm.ops import normal
from fastebm.plotting import save_grid
from fastebm.rng import Stream
from fastebm.runs.files import write_json
from fastebm.runs.folder import RunFolder
from fastebm.tasks.image_quality import import_skimage, quality
from fastebm.tasks.masks import load_hole_mask
from fastebm.tasks.outputs import save_arrays
from fastebm.tasks.restoration import (
    DataConsistency,
    Degradation,
    Inpainting,
    LatentSearch,
    Refinement,
    RestorationResult,
    bicubic,
    degradation,
    restore,
    restore_by_cascade,
)
from fastebm.tasks.run_images import images_for
from fastebm.training import CoarseToFineRun, EcVaeRun, Run, RunError, load

COARSE_TO_FINE, EC_VAE = "coarse_to_fine", "ec_vae"
MASK_TASK = "inpaint-mask"
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Restore:
    """Restore degraded test images by a run that has not seen the degradation, and measure how near they come.

    Writes grid.png (rows: originals, pseudo-inverse, bicubic for super-resolution, restored, mean of restarts),
    results.json and restored.npz. A run of an EC-VAE is searched through its decoder; one of CF-EBM by its cascade,
    held to the measurement, with --restarts chains an image. "restored" is the restart with the lowest energy.
    """

    run: tyro.conf.Positional[Path]
    """folder of the run"""
    task: str = "super-resolution-2"
    """super-resolution-K, colorization, inpaint-box, inpaint-random-P (per cent known), compressed-sensing-P,
    deblur-S (std in pixels), or several joined by +; or inpaint-mask, alone and with --mask"""
    mask: Path | None = None
    """a picture of the run's size, white where pixels are to be filled in; for --task inpaint-mask"""
    count: int = 16
    """how many images, at most"""
    noise: float = 0.0
    """std of noise that is added to the measurements, where images are in [-1, 1]"""
    seed: int = 0
    """of masks, noise and searches"""
    coarse: bool | None = None
    """whether chains of a cascade go up from its lowest resolution or start at full size; by default the latter where
    the measurement says little of a coarse image: for random pixels, compressed sensing, a blur"""
    refine_steps: int = 0
    """Langevin steps on the images in the end"""
    refine_step_size: float = 0.01
    """of these"""
    refine_noise: float = 0.0
    """std of their noise at the start; it falls to 0"""
    data: Path | None = None
    """images to degrade, brought to the run's size and colours as those of training were: a set as `train` takes it, or
    a single picture; by default the run's own"""
    split: str | None = None
    """part of the data; by default test, or what there is"""
    batch_size: int = 64
    """images at a time"""
    out: Path | None = None
    """folder to make; by default restore-TASK in the run's folder"""
    overwrite: bool = False
    """write into the folder even if it has results"""
    device: str | None = None
    """cpu or cuda; by default a GPU if there is one"""
    search: tyro.conf.OmitArgPrefixes[LatentSearch] = field(default_factory=LatentSearch)

    def __call__(self) -> int:
        check_count(self.count)
        check_mask(self.task, self.mask)
        try:
            import_skimage("metrics")  # before the work, not after it
        except ModuleNotFoundError as error:
            raise ValueError(str(error)) from error
        check_kind(self.run)
        out = self.run / f"restore-{self.task}" if self.out is None else self.out
        if (out / "results.json").exists() and not self.overwrite:
            raise ValueError(f"{out} has results already: choose another --out, or give --overwrite")
        device = parsed_device(self.device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        run = load(self.run, device)
        restorer = self._restorer(run)
        originals = images_for(run, self.data, split=self.split, count=self.count, convert=True).to(device)
        operator = self._degradation(run).to(device)
        y = operator.A(originals)
        if self.noise:
            y = y + self.noise * normal(y.shape, seed=self.seed, stream=Stream.DATA_NOISE, device=device)
        started = time.perf_counter()
        restored = restorer(y, operator)
        seconds = time.perf_counter() - started
        self._write(out, operator, y, originals, restored, seconds)
        return 0

    def _degradation(self, run: Run) -> Degradation:
        if self.mask is not None:
            return masked(self.mask, run.size)
        return degradation(self.task, (run.config.channels, run.size, run.size), seed=self.seed)

    def _restorer(self, run: Run) -> Callable[[Tensor, Degradation], RestorationResult]:
        """What restores measurements under a degradation."""
        options: dict[str, Any] = {"noise": self.noise, "seed": self.seed, "batch_size": self.batch_size}
        if self.refine_steps:
            options["refinement"] = Refinement(self.refine_steps, self.refine_step_size, self.refine_noise)
        if isinstance(run, CoarseToFineRun):
            options |= {"cascade": run.cascade(), "restarts": self.search.restarts, "coarse": self.coarse}
            return lambda y, operator: restore_by_cascade(y, operator, **options)
        decoder, energy, latent = generator_of(run)
        options |= {"decoder": decoder, "energy": energy, "latent": latent, "search": self.search}
        return lambda y, operator: restore(y, operator, **options)

    def _write(
        self,
        out: Path,
        operator: Degradation,
        y: Tensor,
        originals: Tensor,
        restored: RestorationResult,
        seconds: float,
    ) -> None:
        base = operator.pinv(y).contiguous()
        consistent = DataConsistency(operator, (base.shape[1], base.shape[2], base.shape[3]), self.noise)
        rows = {"originals": originals, "pseudo-inverse": base}
        if (enlarged := bicubic(y, operator)) is not None:
            rows["bicubic"] = enlarged
        rows |= {"restored": restored.images, "mean of restarts": restored.mean}
        measures = {
            name: {
                **quality(images.clamp(-1, 1), originals).to_json(),
                "residual_rms": float(consistent.residual_rms(images, base).square().mean().sqrt()),
            }
            for name, images in rows.items()
            if name != "originals"
        }
        out.mkdir(parents=True, exist_ok=True)
        save_arrays(out / "restored.npz", images=restored.images, mean=restored.mean)
        save_grid(out / "grid.png", torch.cat(list(rows.values())), columns=len(originals))
        settings = dataclasses.asdict(self) | {
            "run": str(self.run),
            "data": self.data and str(self.data),
            "mask": self.mask and str(self.mask),
            "out": str(out),
        }
        facts = {"torch": torch.__version__, "device": originals.device.type, "threads": torch.get_num_threads()}
        energy = float(restored.energies.mean())
        write_json(
            out / "results.json",
            {
                "settings": settings,
                "images": len(originals),
                "measures": measures,
                "seconds": seconds,
                "energy": energy,
                **facts,
            },
        )
        print(f"{out}: {len(originals)} images, {self.task}, noise {self.noise:g}, in {seconds:.1f} s")
        for name, values in measures.items():
            print(
                f"  {name:16} PSNR {values['psnr']:6.2f} dB   SSIM {values['ssim']:.3f}   "
                f"misfit {values['residual_rms']:.1e}"
            )


def check_mask(task: str, mask: Path | None) -> None:
    """Raises ValueError where the task needs a mask and has none, or has one and is another."""
    if mask is None and MASK_TASK in task.split("+"):
        raise ValueError(f"--task {MASK_TASK} needs --mask FILE, a picture that is white where pixels are missing")
    if mask is not None and task != MASK_TASK:
        raise ValueError(f"--mask is for --task {MASK_TASK}, alone, and the task is {task}")


def masked(mask: Path, size: int) -> Inpainting:
    """Images of a size without the pixels that are white in a picture.

    Raises ValueError for a mask of another size, and for one that hides all or nothing; DataError for what is no
    picture.
    """
    hole = load_hole_mask(mask, 1, size)[0]
    if hole.all() or not hole.any():
        share = "all of the image" if hole.all() else "nothing"
        raise ValueError(f"{mask}: this mask hides {share}; white is to be filled in by what is black")
    return Inpainting(~hole)


def check_kind(run: Path) -> None:
    """Raises RunError where a folder has no run, or one that does not restore images."""
    kind = RunFolder.existing(run).kind()
    if kind not in (COARSE_TO_FINE, EC_VAE):
        raise RunError(f"restoration needs a run of kind {EC_VAE!r} or {COARSE_TO_FINE!r}; {run} holds one of {kind!r}")


def generator_of(run: Run) -> tuple[Function, Function, int]:
    """The decoder, the energy and the length of a latent of a run that has them.

    Raises RunError for a run of another kind, and for one that trained a decoder without an energy.
    """
    if not isinstance(run, EcVaeRun):
        raise RunError(f"{run.path} holds a run that has no decoder")
    if run.energy is None:
        raise RunError(f"{run.path} holds a plain VAE, without the energy that restoration goes by")
    return run.vae.decode, run.energy, run.config.latent
