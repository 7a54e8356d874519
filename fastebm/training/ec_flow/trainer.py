"""A run of a calibrated flow in memory: its nets, its optimizers, and what an update is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fastebm.data import batches
from fastebm.models import Flow, dequantized, quantized
from fastebm.plotting import GRID
from fastebm.runs.folder import RunFolder
from fastebm.training.calibration.calibrate import calibration_loss
from fastebm.training.calibration.trainer import CalibratedLoop
from fastebm.training.ec_flow.config import ECFlowConfig
from fastebm.training.ec_flow.run import ECFlowRun, new_flow, save_pictures
from fastebm.training.images import ImageLevels
from fastebm.training.tensorboard import TensorBoardWriter
from fastebm.training.trainer.loop import Metrics, gradient_norm, to_floats

DEQUANTISATION = 1
"""Step of the stream DATA_NOISE whose draws dequantise; `data_noise` has those of step 0."""


class ECFlowTrainer(CalibratedLoop):
    """Flow, averaged flow, energy, an optimizer for each, and the weight of the calibration.

    An update: samples of the flow with a gradient, and chains from them; a step of the flow on likelihood and distance
    to the chains' ends; a step of the energy on dequantised images and these same ends. Both kinds of images have the
    noise of dequantisation, or the energy would learn to tell that alone, against the likelihood.
    """

    hint = "a smaller learning_rate or energy_learning_rate, or a larger energy_l2"
    prefix = "flow"
    shown: ClassVar[Mapping[str, str]] = {"bits": "bits_per_dimension", "calibration": "calibration", "gap": "gap"}
    config: ECFlowConfig
    average: Flow

    def __init__(self, config: ECFlowConfig, images: ImageLevels, device: torch.device) -> None:
        super().__init__(config, images, device)

    def new_generator(self) -> Flow:
        config = self.config
        self.flow = new_flow(config).to(self.device)
        # By the very batch that the first update sees; a checkpoint brings the norms as they are by then.
        first = next(batches(self.images, config.batch_size, config.seed))
        self.flow.initialize(self._dequantized(self.images.batch(config.size, first, self.device), config.seed, 0))
        return self.flow

    @property
    def betas(self) -> tuple[float, float]:
        return self.config.flow_betas

    def update(self) -> dict[str, float]:
        first, rate = self.images_seen, self.rate
        real = self._real_images(first)
        found, ends = self._flow_gradient(real, first)
        metrics = to_floats(found)
        self._check_finite(self.iteration + 1, metrics)
        if self.energy is not None and ends is not None:
            metrics |= self._energy_step(self.energy, real, ends, first, rate)
            self._update_weight(metrics["calibration"])
        if self.config.max_gradient_norm:
            torch.nn.utils.clip_grad_norm_(self.flow.parameters(), self.config.max_gradient_norm)
        self._step_generator(rate)
        self.iteration += 1
        return metrics

    def _flow_gradient(self, real: Tensor, first: int) -> tuple[Metrics, Tensor | None]:
        """Sets the gradient of the flow's loss; returns its parts, and the ends of the chains from its samples."""
        bits = self.flow.bits_per_dimension_of_dequantized(real, self.config.brightnesses).mean()
        loss, ends = bits, None
        found: Metrics = {"bits_per_dimension": bits}
        if self.energy is not None:
            with torch.set_grad_enabled(self.calibrating):
                samples = self.flow.decode(self.flow.prior(len(real), self.seed, chain_ids=first))
            ends = self.energy.chain_ends(samples, self.seed, first)
            distance = calibration_loss(samples, ends)
            if self.calibrating:
                # Both in bits, and for one dimension: so that a learning rate suits all sizes.
                loss = loss + self.weight / self.config.dimension * distance
            found |= {"calibration": distance, "displacement": (ends - samples).abs().mean()}
            found["largest_sample"] = samples.abs().max()
        self.optimizer.zero_grad()
        loss.backward()
        return {"flow_loss": loss, **found, "gradient_norm_flow": gradient_norm(self.flow)}, ends

    def _real_images(self, first: int) -> Tensor:
        return self._dequantized(super()._real_images(first), self.seed, first)

    def _dequantized(self, images: Tensor, seed: int, first: int) -> Tensor:
        brightnesses = self.config.brightnesses
        discrete = quantized(images, brightnesses)
        return dequantized(discrete, seed=seed, step=DEQUANTISATION, chain_ids=first, brightnesses=brightnesses)

    @torch.no_grad()
    def check_before_save(self) -> None:
        """Lets the guard see likelihood and energies under the weights that are about to be saved.

        The chains are those that the next update would start, and leave no trace.
        """
        config, first = self.config, self.images_seen
        real = self._dequantized(self.images.first(config.size, config.batch_size, self.device), self.seed, first)
        bits = self.flow.bits_per_dimension_of_dequantized(real, config.brightnesses).mean()
        self._check_finite(self.iteration, {"bits_per_dimension": float(bits)})
        if self.energy is not None:
            self._check_energy(self.energy, real, self.flow.sample(len(real), self.seed, chain_ids=first))

    def save_pictures(self, folder: RunFolder, board: TensorBoardWriter) -> None:
        energy = None if self.energy is None else self.energy.net
        run = ECFlowRun(folder.path, self.config, self.iteration, self.average, energy)
        save_pictures(run, self.images.first(self.config.size, GRID**2), folder, board)
