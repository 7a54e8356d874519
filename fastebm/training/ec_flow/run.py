"""`ECFlowRun`: a run of a calibrated flow, loaded from its folder for sampling, and its pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastebm.distributed import shared_rows
from fastebm.models import Flow, MultiScaleEnergy, quantize
from fastebm.plotting import GRID, Curves
from fastebm.runs.checkpoints import Layout
from fastebm.runs.folder import RunFolder
from fastebm.runs.nets import outline, with_weights
from fastebm.runs.run import Run, trained_checkpoint
from fastebm.sampling.sampler import batch_slices
from fastebm.training.calibration.energy import generator_layout, stored_energy
from fastebm.training.ec_flow.config import ECFlowConfig
from fastebm.training.pictures import save_run_pictures
from fastebm.training.tensorboard import TensorBoardWriter
from fastebm.training.trainer.weights import fork_rng, select_prefix

TEMPERATURES = (0.5, 0.7, 0.85, 1.0)

CURVES: Curves = (
    ("bits per dimension", {"bits_per_dimension": "of training images"}),
    ("squared distance", {"calibration": "chain from its start", "noise_floor": "of noise alone"}),
    ("λ", {"lambda": "weight of the calibration"}),
    ("mean energy (low: real)", {"energy_data": "data", "energy_samples": "chain ends"}),
    ("gradient norm", {"gradient_norm": "energy", "gradient_norm_flow": "flow, before it is shortened"}),
)


@dataclass(frozen=True, repr=False)
class ECFlowRun(Run):
    """A run of the calibrated flow: its flow, and its energy or None where it trains a plain flow.

    Attributes:
        flow: in eval mode, its parameters without gradients.

    Example:
        >>> import tempfile, torch, fastebm
        >>> config = fastebm.training.ECFlowConfig(
        ...     size=8, channels=1, iterations=2, batch_size=4, levels=1, flow_steps=2, width=4, energy_width=4
        ... )
        >>> run = fastebm.train(config, torch.zeros(9, 1, 8, 8), tempfile.mkdtemp() + "/run", progress=False)
        >>> run.sample(5, temperature=0.8).shape, run.bits_per_dimension(torch.zeros(5, 1, 8, 8)).shape
        (torch.Size([5, 1, 8, 8]), torch.Size([5]))
    """

    config: ECFlowConfig
    energy: MultiScaleEnergy | None
    flow: Flow

    @torch.no_grad()
    def sample(
        self,
        count: int,
        seed: int | None = None,
        *,
        batch_size: int = 1000,
        progress: bool = False,
        temperature: float = 1.0,
    ) -> Tensor:
        """Images of the config's brightnesses, by one pass of the inverse; arguments as of `Run.sample`.

        Args:
            temperature: standard deviation of the latents. Below 1 images are of fewer kinds and look more regular.
            progress: there is no bar to show.

        Raises ValueError for a temperature that is negative or not finite.
        """
        if not 0 <= temperature < math.inf:
            raise ValueError(f"a temperature must be finite and not negative, got {temperature}")
        seed, first = self._key(seed)

        def inverted(rows: range) -> Tensor:
            parts = [
                self.flow.sample(end - start, seed, chain_ids=first + rows.start + start, temperature=temperature)
                for start, end in batch_slices(len(rows), batch_size)
            ]
            return torch.cat(parts)

        return quantize(shared_rows(count, inverted, batch_size), self.config.brightnesses)

    @torch.no_grad()
    def bits_per_dimension(self, images: Tensor, seed: int = 0) -> Tensor:
        """(B,) bits for each number of images (B, channels, size, size) in [-1, 1], rounded to the brightnesses."""
        brightnesses = self.config.brightnesses
        return self.flow.bits_per_dimension(quantize(images, brightnesses), seed=seed, brightnesses=brightnesses)

    @classmethod
    def load(
        cls,
        run_dir: str | Path,
        device: torch.device | str | None = None,
        *,
        weights: Literal["average", "trained"] = "average",
    ) -> ECFlowRun:
        """The run in a folder, from its newest good checkpoint; errors as of `Run.load`.

        Args:
            weights: "average" loads the averaged weights (the trained ones where the run averages none), "trained" the
                last ones.
        """
        config, checkpoint = trained_checkpoint(run_dir, cls, ECFlowConfig)
        averaged = weights == "average" and config.ema
        tensors = select_prefix(checkpoint.tensors, "average." if averaged else "flow.")
        flow = with_weights(outline(lambda: new_flow(config)), tensors, device)
        energy = stored_energy(config, checkpoint.tensors, device)
        return cls(Path(run_dir), config, checkpoint.iteration, energy, flow)

    @staticmethod
    def layout(config: ECFlowConfig, iteration: int) -> Layout:
        return generator_layout(config, "flow", outline(lambda: new_flow(config)))


def new_flow(config: ECFlowConfig) -> Flow:
    """A flow with weights drawn from the config's seed."""
    with fork_rng(config.seed):
        return Flow(
            (config.channels, config.size, config.size),
            levels=config.levels,
            flow_steps=config.flow_steps,
            width=config.width,
            bound=config.bound,
        )


def save_pictures(run: ECFlowRun, real: Tensor, folder: RunFolder, board: TensorBoardWriter) -> None:
    """The pictures of every method, and temperatures.png with samples at several temperatures."""
    grids = {temperature: run.sample(GRID**2, temperature=temperature) for temperature in TEMPERATURES}
    panels = {"temperatures": [(f"temperature {temperature:g}", grid) for temperature, grid in grids.items()]}
    save_run_pictures(run, grids[1.0], real, folder, board, CURVES, panels)
