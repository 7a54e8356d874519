"""What a run of a calibrated flow has learned so far, read from its folder for sampling, and its pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastebm import plotting as pictures
from fastebm.models import Flow, MultiScaleEnergy, quantized
from fastebm.runs.folder import RunFolder
from fastebm.training.calibration.energy_trainer import stored_energy
from fastebm.training.ec_flow.config import ECFlowConfig
from fastebm.training.tensorboard import TensorBoardWriter
from fastebm.training.trainer.initial_weights import fork_rng
from fastebm.training.trainer.loop import part, trained_checkpoint

TEMPERATURES = (0.5, 0.7, 0.85, 1.0)

CURVES: pictures.Curves = (
    ("bits per dimension", {"bits_per_dimension": "of training images"}),
    ("squared distance", {"calibration": "chain from its start", "noise_floor": "of noise alone"}),
    ("λ", {"lambda": "weight of the calibration"}),
    ("mean energy (low: real)", {"energy_data": "data", "energy_samples": "chain ends"}),
    ("gradient norm", {"gradient_norm": "energy", "gradient_norm_flow": "flow, before it is shortened"}),
)


@dataclass(frozen=True)
class ECFlowRun:
    """What a run has learned up to `iteration`.

    Attributes:
        path: the run's folder.
        flow: in eval mode, its parameters without gradients.
        energy: E(x), low meaning real, likewise; None where the run trains a plain flow.
    """

    path: Path
    config: ECFlowConfig
    iteration: int
    flow: Flow
    energy: MultiScaleEnergy | None

    @property
    def finished(self) -> bool:
        return self.iteration == self.config.total_iterations

    @property
    def size(self) -> int:
        """The resolution of samples."""
        return self.config.size

    @torch.no_grad()
    def sample(
        self,
        count: int,
        seed: int | None = None,
        *,
        temperature: float = 1.0,
        batch_size: int = 1000,
        progress: bool = False,
    ) -> Tensor:
        """Images `(count, channels, size, size)` of the config's brightnesses in [-1, 1], by one pass of the inverse.

        Args:
            seed: without one, latents continue the numbering of those of training, with its seed: always the same
                images, from latents that training has not seen.
            temperature: standard deviation of the latents; below 1 fewer kinds of images, which look more regular.
            progress: is there for the sake of other runs: a pass shows no bar.

        Raises ValueError for a temperature that is negative or not finite.
        """
        if not 0 <= temperature < math.inf:
            raise ValueError(f"a temperature must be finite and not negative, got {temperature}")
        first, seed = (self.config.total_chains, self.config.seed) if seed is None else (0, seed)
        parts = [
            self.flow.sample(min(batch_size, count - done), seed, chain_ids=first + done, temperature=temperature)
            for done in range(0, count, batch_size)
        ]
        return quantized(torch.cat(parts), self.config.brightnesses)

    @torch.no_grad()
    def bits_per_dimension(self, images: Tensor, seed: int = 0) -> Tensor:
        """(B,) bits for each number of images (B, channels, size, size) in [-1, 1], rounded to the brightnesses."""
        brightnesses = self.config.brightnesses
        return self.flow.bits_per_dimension(quantized(images, brightnesses), seed=seed, brightnesses=brightnesses)

    @classmethod
    def load(
        cls,
        run_dir: str | Path,
        device: torch.device | str | None = None,
        *,
        weights: Literal["average", "trained"] = "average",
    ) -> ECFlowRun:
        """The run in a folder, finished or not, as its newest good checkpoint has it, for sampling.

        Args:
            weights: "average" has the averaged ones (the trained ones where the run averages none), "trained" the last.

        Raises RunError where there is no such run or it has no checkpoint yet.
        """
        config, checkpoint = trained_checkpoint(run_dir, ECFlowConfig)
        flow, energy = new_flow(config).to(device), stored_energy(config, checkpoint.tensors, device)
        averaged = weights == "average" and config.ema
        flow.load_state_dict(part(checkpoint.tensors, "average." if averaged else "flow."))
        return cls(Path(run_dir), config, checkpoint.iteration, flow.eval().requires_grad_(False), energy)


def new_flow(config: ECFlowConfig) -> Flow:
    """A flow with weights drawn from the config's seed and torch's own generator left alone."""
    with fork_rng(config.seed):
        return Flow(
            (config.channels, config.size, config.size),
            levels=config.levels,
            flow_steps=config.flow_steps,
            width=config.width,
            bound=config.bound,
        )


def save_pictures(run: ECFlowRun, real: Tensor, folder: RunFolder, board: TensorBoardWriter) -> None:
    """samples.png, temperatures.png and curves.png; with `pictures_every` a grid in pictures/ too."""
    grids = {temperature: run.sample(pictures.GRID**2, temperature=temperature) for temperature in TEMPERATURES}
    samples = grids[1.0]
    with folder.writing("pictures"):
        pictures.save_samples(folder.path / "samples.png", samples, real)
        panels = [(f"temperature {temperature:g}", grid) for temperature, grid in grids.items()]
        pictures.save_panels(folder.path / "temperatures.png", panels)
        pictures.save_curves(folder.path / "curves.png", folder.log.lines(), CURVES)
        if run.config.pictures_every:
            (folder.path / "pictures").mkdir(exist_ok=True)
            pictures.save_grid(folder.path / "pictures" / f"iteration-{run.iteration:09d}.png", samples)
        board.picture(f"samples/{run.size}", pictures.tile(samples, pictures.GRID), run.iteration)
