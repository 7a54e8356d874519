"""`fastebm sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from fastebm.cli.arguments import check_count, parsed_device, write_images
from fastebm.runs.folder import RunFolder
from fastebm.training import ECFlowRun, load
from fastebm.training.calibration.vae_run import VAERun


@dataclass(frozen=True)
class Sample:
    """Draw samples from a run, finished or not."""

    run: tyro.conf.Positional[Path]
    """folder of the run"""
    count: int = 100
    """how many"""
    seed: int | None = None
    """other seeds, other samples; by default always the same ones"""
    out: Path | None = None
    """.npz ("images", float32 in [-1, 1], N x channels x S x S) or .png; by default an .npz in the run's folder"""
    temperature: float | None = None
    """of a flow's latents, by default 1; less gives fewer kinds of images, which look more regular"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """of a VAE's decoder, by default float32; bfloat16 is several times as fast, at a relative error around 1%"""
    device: str | None = None
    """cpu or cuda; by default a GPU if there is one"""

    def __call__(self) -> int:
        check_count(self.count)
        RunFolder.existing(self.run)
        name = f"samples-{self.count}.npz" if self.seed is None else f"samples-{self.count}-seed-{self.seed}.npz"
        out = self.run / name if self.out is None else self.out
        if out.suffix not in (".npz", ".png"):
            raise ValueError(f"--out must end in .npz or .png, got {out}")
        if not out.parent.is_dir():
            raise ValueError(f"the folder {out.parent} of --out does not exist")
        run = load(self.run, parsed_device(self.device))
        if self.temperature is not None and not isinstance(run, ECFlowRun):
            raise ValueError(f"--temperature is of a flow's latents, and {self.run} holds another kind of run")
        if self.dtype is not None and not isinstance(run, VAERun):
            raise ValueError(f"--dtype is of a VAE's decoder, and {self.run} holds another kind of run")
        options: dict[str, Any] = {} if self.temperature is None else {"temperature": self.temperature}
        if self.dtype is not None:
            options["dtype"] = getattr(torch, self.dtype)
        samples = run.sample(self.count, self.seed, progress=True, **options)
        write_images(out, samples)
        print(f"{out}: {self.count} samples of {run.size}x{run.size} from iteration {run.iteration} of {self.run}")
        return 0
