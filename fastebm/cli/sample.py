"""The command `fastebm sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastebm.cli.arguments import check_count, select_device, write_images
from fastebm.distributed import together
from fastebm.memory import check_memory


@dataclass(frozen=True)
class Sample:
    """Draw samples from a run, finished or not."""

    run: Path
    """folder of the run"""
    count: int = 100
    """number of samples"""
    seed: int | None = None
    """seed of all noise; by default noise that training has not used, always the same"""
    out: Path | None = None
    """.npz file (array "images", float32 in [-1, 1], count x channels x size x size) or .png file for a grid; by
    default an .npz file in the run's folder"""
    temperature: float | None = None
    """standard deviation of a flow's latents; below 1 samples are more regular and less varied; by default 1"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """dtype of a VAE's decoder; bfloat16 is several times as fast, with errors around 1%; by default float32"""
    device: str | None = None
    """device that samples are drawn on, cpu or cuda; by default a GPU if there is one"""
    overwrite: bool = False
    """replace a file of that name"""

    def __call__(self) -> int:
        import torch

        from fastebm.rng import make_key
        from fastebm.runs.files import check_writable
        from fastebm.runs.folder import RunFolder
        from fastebm.tasks.generation.generate import LARGEST_GRID
        from fastebm.training import load

        check_count(self.count)
        if self.seed is not None:
            make_key(self.seed)
        kind = RunFolder.existing(self.run).kind()
        name = f"samples-{self.count}.npz" if self.seed is None else f"samples-{self.count}-seed-{self.seed}.npz"
        out = self.run / name if self.out is None else self.out
        if out.suffix not in (".npz", ".png"):
            raise ValueError(f"--out must end in .npz or .png, got {out}")
        if out.suffix == ".png" and self.count > LARGEST_GRID:
            raise ValueError(f"a grid shows at most {LARGEST_GRID:,} samples, got {self.count:,}: name an .npz")
        check_writable(out, overwrite=self.overwrite)
        device = select_device(self.device)
        options: dict[str, Any] = {}
        if self.temperature is not None:
            if kind != "ec_flow":
                raise ValueError(f"--temperature is of a flow's latents, and {self.run} holds another kind of run")
            options["temperature"] = self.temperature
        if self.dtype is not None:
            if kind not in ("ec_vae", "ec_posterior"):
                raise ValueError(f"--dtype is of a VAE's decoder, and {self.run} holds another kind of run")
            options["dtype"] = getattr(torch, self.dtype)
        run = load(self.run, device)
        check_memory(f"{self.count:,} samples", 4 * self.count * run.config.channels * run.size**2)
        samples = together(run.sample, self.count, self.seed, progress=True, **options)
        write_images(out, samples)
        print(f"{out}: {self.count} samples of {run.size}x{run.size} from iteration {run.iteration} of {self.run}")
        return 0
