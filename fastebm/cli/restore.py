"""The command `fastebm restore`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastebm.cli.arguments import check_count, select_device
from fastebm.distributed import together
from fastebm.ops import normal
from fastebm.plotting import save_grid
from fastebm.rng import Stream
from fastebm.runs.files import finite_json, write_json
from fastebm.runs.folder import RunFolder
from fastebm.tasks.arguments import check_number, check_seed, check_whole
from fastebm.tasks.image_quality import import_skimage, quality
from fastebm.tasks.masks import load_hole_mask
from fastebm.tasks.outputs import check_folder, save_arrays, task_folder
from fastebm.tasks.restoration import (
    DataConsistency,
    Degradation,
    ImageSearch,
    Inpainting,
    LatentSearch,
    Refinement,
    RestorationResult,
    bicubic,
    degradation,
    restore,
)
from fastebm.tasks.run_images import images_for
from fastebm.training import CoarseToFineRun, Run, load

MASK_TASK = "inpaint-mask"
FILES = ("grid.png", "restored.npz", "results.json")


@dataclass(frozen=True)
class Search:
    """How the latent vectors of an EC-VAE are searched; --restarts also counts the chains of a cascade."""

    restarts: int = 4
    """number of starts for each image; the result is the one that ends at the lowest energy"""
    method: Literal["adam", "langevin"] | None = None
    """method of the search: adam descends, with a learning rate that falls to 0; langevin samples; by default adam"""
    num_steps: int | None = None
    """number of steps of the search; by default 200"""
    learning_rate: float | None = None
    """learning rate of adam; by default 0.05"""
    step_size: float | None = None
    """step size of a step of langevin; by default 0.01"""
    noise_std: float | None = None
    """standard deviation of the noise of a step of langevin; by default 0.01"""
    energy_weight: float | None = None
    """weight of the energy beside the prior of the latent vectors; by default 1"""
    decoder_weight: float | None = None
    """weight of the distance between the decoder's own image and the measurement, the inverse variance of a pixel about
    the decoder's image; 0 searches by energy and prior alone; by default 20"""


@dataclass(frozen=True)
class Restore:
    """Restore degraded images with a run that has never seen the degradation, and measure the error.

    An EC-VAE is searched through its decoder. A coarse-to-fine run goes through its cascade, which is kept consistent
    with the measurement. The result is the restart with the lowest energy. Files: grid.png (rows: originals,
    pseudo-inverse, bicubic for super-resolution, restored, mean of restarts), results.json and restored.npz.
    """

    run: Path
    """folder of the run"""
    task: str = "super-resolution-2"
    """degradation: super-resolution-K, colorization, inpaint-box, inpaint-random-P (percent known),
    compressed-sensing-P, deblur-S (standard deviation in pixels), several of them joined by +, or inpaint-mask alone
    with --mask"""
    mask: Path | None = None
    """picture of the run's size that is white where pixels are to be filled in, for --task inpaint-mask"""
    count: int = 16
    """largest number of images"""
    noise: float = 0.0
    """standard deviation of the noise that is added to the measurements, where pixels lie in [-1, 1]"""
    seed: int = 0
    """seed of masks, noise and searches"""
    coarse: bool | None = None
    """start the chains of a cascade at its lowest resolution rather than at full size; by default on where the
    measurement says enough of a coarse image, so not for random pixels, compressed sensing and blur"""
    refine_steps: int = field(default=0, metadata={"group": "refinement"})
    """number of Langevin steps on the images at the end"""
    refine_step_size: float | None = field(default=None, metadata={"group": "refinement"})
    """step size of these steps; by default 0.01"""
    refine_noise: float | None = field(default=None, metadata={"group": "refinement"})
    """standard deviation of the noise of the first of these steps; it falls to 0; by default 0"""
    data: Path | None = None
    """file or folder of images to degrade, as `fastebm train` takes it, or a single picture, brought to the format of
    the training images; by default the run's own images"""
    split: str | None = None
    """split of the data; by default test, or the only one"""
    batch_size: int = field(default=64, metadata={"group": "compute"})
    """number of images that are restored at a time"""
    out: Path | None = None
    """folder for pictures and numbers; by default restore-TASK in the run's folder"""
    overwrite: bool = False
    """replace files of an earlier command in that folder"""
    device: str | None = None
    """device that the run restores on, cpu or cuda; by default a GPU if there is one"""
    search: Search = field(default_factory=Search)

    def __call__(self) -> int:
        check_count(self.count)
        check_seed(self.seed)
        check_number("--noise", self.noise, 0)
        check_whole("--batch-size", self.batch_size)
        check_mask(self.task, self.mask)
        refinement = self._refinement()
        import_skimage("metrics")  # a missing package is reported before anything runs
        RunFolder.existing(self.run)
        out = self.run / f"restore-{self.task}" if self.out is None else self.out
        check_folder(out, FILES, overwrite=self.overwrite)
        device = select_device(self.device)
        run = load(self.run, device)
        search = search_of(run, self.search, self.coarse)
        originals = images_for(run, self.data, split=self.split, count=self.count, convert=True).to(device)
        operator = self._degradation(run).to(device)
        y = operator.A(originals)
        if self.noise:
            y = y + self.noise * normal(y.shape, seed=self.seed, stream=Stream.DATA_NOISE, device=device)
        with task_folder(out, FILES, overwrite=self.overwrite):
            started = time.perf_counter()
            restored = together(
                restore,
                y,
                operator,
                energy=run,
                noise=self.noise,
                search=search,
                refinement=refinement,
                seed=self.seed,
                batch_size=self.batch_size,
            )
            seconds = time.perf_counter() - started
            lines = self._write(out, operator, y, originals, restored, search, seconds)
        print("\n".join(lines))
        return 0

    def _refinement(self) -> Refinement | None:
        """The refinement that the options ask for. Raises ValueError for options that would have no effect."""
        given = {"--refine-step-size": self.refine_step_size, "--refine-noise": self.refine_noise}
        if self.refine_steps:
            step_size = 0.01 if self.refine_step_size is None else self.refine_step_size
            return Refinement(self.refine_steps, step_size, self.refine_noise or 0.0)
        if names := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{', '.join(names)}: there is no refinement without --refine-steps")
        return None

    def _degradation(self, run: Run) -> Degradation:
        if self.mask is not None:
            return masked(self.mask, run.size)
        return degradation(self.task, (run.config.channels, run.size, run.size), seed=self.seed)

    def _write(
        self,
        out: Path,
        operator: Degradation,
        y: Tensor,
        originals: Tensor,
        restored: RestorationResult,
        search: LatentSearch | ImageSearch,
        seconds: float,
    ) -> list[str]:
        """Writes all files, the numbers last, and returns what there is to print."""
        base = operator.pinv(y).contiguous()
        consistent = DataConsistency(operator, (base.shape[1], base.shape[2], base.shape[3]), self.noise)
        enlarged = bicubic(y, operator)
        rows = {"pseudo-inverse": base, **({} if enlarged is None else {"bicubic": enlarged})}
        rows |= {"restored": restored.images, "mean of restarts": restored.mean}
        measures = {
            name: {
                **quality(images.clamp(-1, 1), originals).to_json(),
                "residual_rms": float(consistent.residual_rms(images, base).square().mean().sqrt()),
            }
            for name, images in rows.items()
        }
        save_arrays(out / "restored.npz", images=restored.images, mean=restored.mean)
        save_grid(out / "grid.png", torch.cat([originals, *rows.values()]), columns=len(originals))
        settings = dataclasses.asdict(self) | {"out": out, "search": dataclasses.asdict(search)}
        results = {
            "settings": {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
            "images": len(originals),
            "measures": measures,
            "seconds": seconds,
            "energy": float(restored.energies.mean()),
            "torch": torch.__version__,
            "device": originals.device.type,
            "threads": torch.get_num_threads(),
        }
        write_json(out / "results.json", finite_json(results))
        lines = [f"{len(originals)} images, {self.task}, noise {self.noise:g}, in {seconds:.1f} s"]
        lines += [
            f"  {name:16} PSNR {values['psnr']:6.2f} dB   SSIM {values['ssim']:.3f}   "
            f"residual {values['residual_rms']:.1e}"
            for name, values in measures.items()
        ]
        return [*lines, f"In {out}: {', '.join(FILES)}."]


def search_of(run: Run, options: Search, coarse: bool | None) -> LatentSearch | ImageSearch:
    """The search that the options ask for with a run. Raises ValueError for those that would have no effect."""
    given = {name: value for name, value in vars(options).items() if name != "restarts" and value is not None}

    def refuse(names: Iterable[str], reason: str) -> None:
        if unused := [f"--{name.replace('_', '-')}" for name in names if name in given]:
            raise ValueError(f"{', '.join(unused)}: {reason}")

    if not hasattr(run, "vae"):
        refuse(given, f"such settings are of a search through a decoder, and {run.path} has none")
        if coarse is not None and not isinstance(run, CoarseToFineRun):
            raise ValueError(f"--coarse is of a coarse-to-fine run, and {run.path} holds another kind of run")
        return ImageSearch(options.restarts, coarse)
    if coarse is not None:
        raise ValueError(f"--coarse is of a coarse-to-fine run, and {run.path} is restored through its decoder")
    if options.method == "langevin":
        refuse(["learning_rate"], "of --method adam, and it is langevin")
    else:
        refuse(["step_size", "noise_std"], "of --method langevin, and it is adam")
    return LatentSearch(restarts=options.restarts, **given)


def check_mask(task: str, mask: Path | None) -> None:
    """Raises ValueError for a task that needs a mask and has none, and for another task with a mask."""
    if mask is None and MASK_TASK in task.split("+"):
        raise ValueError(f"--task {MASK_TASK} needs --mask FILE, a picture that is white where pixels are missing")
    if mask is not None and task != MASK_TASK:
        raise ValueError(f"--mask is for --task {MASK_TASK}, alone, and the task is {task}")


def masked(mask: Path, size: int) -> Inpainting:
    """The degradation that hides the pixels that are white in a picture.

    Raises ValueError for a mask of another size, and for one that hides all or nothing; DataError for a file that is no
    picture.
    """
    hole = load_hole_mask(mask, 1, size)[0]
    if hole.all() or not hole.any():
        share = "all of the image" if hole.all() else "nothing"
        raise ValueError(f"{mask}: this mask hides {share}; white pixels are filled in from black ones")
    return Inpainting(~hole)
