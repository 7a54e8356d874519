"""`fastebm restore`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from fastebm.cli.arguments import check_count, parsed_device, write_images
from fastebm.data import digits
from fastebm.ops import normal
from fastebm.rng import Stream
from fastebm.tasks.restore import (
    Consistent,
    Degradation,
    LatentSearch,
    Refinement,
    Restored,
    bicubic,
    degradation,
    psnr,
    restore,
    restore_by_cascade,
    ssim,
)
from fastebm.training import DigitsSource, ImageSource, RunError, load_coarse_to_fine, load_ec_vae
from fastebm.training.files import write_json
from fastebm.training.image_source import source_from_json
from fastebm.training.pictures import save_grid
from fastebm.training.run import RunFolder

COARSE_TO_FINE, EC_VAE = "coarse_to_fine", "ec_vae"
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Restore:
    """Restore degraded test images by a run that has not seen the degradation, and measure how near they come.

    Writes grid.png (rows: originals, pseudo-inverse, bicubic for super-resolution, restored), results.json and
    restored.npz. A run of an EC-VAE is searched through its decoder; one of CF-EBM by its cascade, held to the
    measurement, with --restarts chains an image.
    """

    run: tyro.conf.Positional[Path]
    """folder of the run"""
    task: str = "super-resolution-2"
    """super-resolution-K, colorization, inpaint-box, inpaint-random-P (per cent known), compressed-sensing-P,
    deblur-S (std in pixels), or several joined by +"""
    count: int = 16
    """how many images"""
    noise: float = 0.0
    """std of noise that is added to the measurements, where images are in [-1, 1]"""
    seed: int = 0
    """of masks, noise and searches"""
    refine_steps: int = 0
    """Langevin steps on the images in the end"""
    refine_step_size: float = 0.01
    """of these"""
    refine_noise: float = 0.0
    """std of their noise at the start; it falls to 0"""
    data: Path | None = None
    """images to degrade; by default those of the run"""
    split: str = "test"
    """part of the data"""
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
        if find_spec("torchmetrics") is None:
            raise ValueError("fastebm restore measures with torchmetrics: pip install 'fastebm[evaluation]'")
        folder = RunFolder.existing(self.run)
        out = self.run / f"restore-{self.task}" if self.out is None else self.out
        if (out / "results.json").exists() and not self.overwrite:
            raise ValueError(f"{out} has results already: choose another --out, or give --overwrite")
        device = parsed_device(self.device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        restorer, size, channels = self._restorer(device)
        originals = self._originals(folder, size, channels).to(device)
        operator = degradation(self.task, (channels, size, size), seed=self.seed).to(device)
        y = operator.A(originals)
        if self.noise:
            y = y + self.noise * normal(y.shape, seed=self.seed, stream=Stream.DATA_NOISE, device=device)
        started = time.perf_counter()
        restored = restorer(y, operator)
        seconds = time.perf_counter() - started
        self._write(out, operator, y, originals, restored, seconds)
        return 0

    def _restorer(self, device: torch.device) -> tuple[Callable[[Tensor, Degradation], Restored], int, int]:
        """What restores measurements under a degradation, and the size and channels of its images."""
        options: dict[str, Any] = {"noise": self.noise, "seed": self.seed, "batch_size": self.batch_size}
        if self.refine_steps:
            options["refinement"] = Refinement(self.refine_steps, self.refine_step_size, self.refine_noise)
        if kind_of(self.run) == COARSE_TO_FINE:
            run = load_coarse_to_fine(self.run, device)
            options |= {"cascade": run.cascade(), "restarts": self.search.restarts}
            return (lambda y, operator: restore_by_cascade(y, operator, **options)), run.size, run.config.channels
        decoder, energy, latent = load_generator(self.run, device)
        with torch.no_grad():
            channels, size, _ = decoder(torch.zeros(1, latent, device=device)).shape[1:]
        options |= {"decoder": decoder, "energy": energy, "latent": latent, "search": self.search}
        return (lambda y, operator: restore(y, operator, **options)), size, channels

    def _originals(self, folder: RunFolder, size: int, channels: int) -> Tensor:
        if self.data is not None:
            source: ImageSource | DigitsSource = ImageSource(self.data, size, channels, self.split)
        else:
            source = source_from_json(folder.images() or {})
        if isinstance(source, DigitsSource):
            images = digits("train" if self.split == "train" else "test", size)[0]
        else:
            opened = dataclasses.replace(source, size=size, channels=channels, split=self.split).open()
            images = opened.batch(slice(0, self.count))
        if len(images) < self.count:
            raise ValueError(f"--count {self.count} is more than the {len(images)} images there are")
        return images[: self.count]

    def _write(
        self,
        out: Path,
        operator: Degradation,
        y: Tensor,
        originals: Tensor,
        restored: Restored,
        seconds: float,
    ) -> None:
        base = operator.pinv(y).contiguous()
        consistent = Consistent(operator, (base.shape[1], base.shape[2], base.shape[3]), self.noise)
        rows = {"originals": originals, "pseudo-inverse": base}
        if (enlarged := bicubic(y, operator)) is not None:
            rows["bicubic"] = enlarged
        rows["restored"] = restored.images
        measures = {
            name: {
                "psnr": float(psnr(images, originals).mean()),
                "ssim": float(ssim(images, originals).mean()),
                "misfit_rms": float(consistent.misfit(images, base).square().mean().sqrt()),
            }
            for name, images in rows.items()
            if name != "originals"
        }
        out.mkdir(parents=True, exist_ok=True)
        write_images(out / "restored.npz", restored.images)
        save_grid(out / "grid.png", torch.cat(list(rows.values())), columns=self.count)
        settings = dataclasses.asdict(self) | {
            "run": str(self.run),
            "data": self.data and str(self.data),
            "out": str(out),
        }
        facts = {"torch": torch.__version__, "device": originals.device.type, "threads": torch.get_num_threads()}
        energy = float(restored.energies.mean())
        write_json(
            out / "results.json",
            {"settings": settings, "measures": measures, "seconds": seconds, "energy": energy, **facts},
        )
        print(f"{out}: {self.count} images, {self.task}, noise {self.noise:g}, in {seconds:.1f} s")
        for name, values in measures.items():
            print(
                f"  {name:15} PSNR {values['psnr']:6.2f} dB   SSIM {values['ssim']:.3f}   "
                f"misfit {values['misfit_rms']:.1e}"
            )


def kind_of(run: Path) -> str:
    """What kind of run is in a folder. Raises RunError where it is none that restores images."""
    folder = RunFolder.existing(run)
    for kind in (COARSE_TO_FINE, EC_VAE):
        try:
            folder.config(kind)
        except RunError as error:
            refusal = error
        else:
            return kind
    raise RunError(f"restoration needs a run of kind {EC_VAE!r} or {COARSE_TO_FINE!r}: {refusal}")


def load_generator(run: Path, device: torch.device | None = None) -> tuple[Function, Function, int]:
    """The decoder, the energy and the length of a latent of a run that has them.

    Raises RunError for a run of another kind, and for one that trained a decoder without an energy.
    """
    if kind_of(run) != EC_VAE:
        raise RunError(f"{run} holds a run of kind {COARSE_TO_FINE!r}, which has no decoder")
    loaded = load_ec_vae(run, device)
    if loaded.energy is None:
        raise RunError(f"{run} holds a plain VAE, without the energy that restoration goes by")
    return loaded.vae.decode, loaded.energy, loaded.config.latent
