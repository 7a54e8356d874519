"""Training of the calibrated flow: an update of the flow, and of its energy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fastebm.data import batches
from fastebm.models import Flow, dequantize, quantize
from fastebm.plotting import GRID
from fastebm.runs.folder import RunFolder
from fastebm.runs.nets import initialized
from fastebm.training.calibration.calibrate import calibration_loss
from fastebm.training.calibration.generator_trainer import CalibratedTrainer
from fastebm.training.ec_flow.config import ECFlowConfig
from fastebm.training.ec_flow.run import ECFlowRun, new_flow, save_pictures
from fastebm.training.tensorboard import TensorBoardWriter
from fastebm.training.trainer.metrics import Metrics, gradient_norm, to_floats
from fastebm.training.trainer.parts import Part

DEQUANTISATION = 1
"""The step of the stream DATA_NOISE that dequantisation draws from; `data_noise` draws from step 0."""


class ECFlowTrainer(CalibratedTrainer):
    """Trains a flow and the energy that calibrates it.

    In an update chains start at samples of the flow. The flow takes a step on the likelihood and on the distance to the
    ends of chains, and the energy takes a step on dequantised images and the same ends. The flow's samples have the
    noise of dequantisation, so that the energy sees images with it too: otherwise it would learn to detect the noise.
    """

    run_type = ECFlowRun
    hint = "a smaller learning_rate or energy_learning_rate, or a larger energy_l2"
    prefix = "flow"
    progress_keys: ClassVar[Mapping[str, str]] = {
        "bits": "bits_per_dimension",
        "calibration": "calibration",
        "gap": "gap",
    }
    config: ECFlowConfig
    ema_generator: Flow

    def new_generator(self) -> Flow:
        config = self.config
        self.flow = initialized(lambda: new_flow(config), self.device)
        # By the batch that the first update sees. A resumed run loads its norms from the checkpoint.
        first = next(batches(self.images, config.batch_size, config.seed))
        self.flow.initialize(self._dequantized(self.images.batch(config.size, first, self.device), config.seed, 0))
        return self.flow

    @property
    def generator_betas(self) -> tuple[float, float]:
        return self.config.flow_betas

    def update(self) -> dict[str, float]:
        lr_factor, parts = self.lr_factor, self._parts()
        real = self._next_images(parts)
        drawn = zip(parts, real, strict=True)
        found = self.parts.gradients(self.flow, self.optimizer, lambda each: self._part_gradient(*each), drawn)
        terms, ends = zip(*found, strict=True)
        means = self.parts.means(terms, [len(part) for part in parts])
        metrics = to_floats(means | {"gradient_norm_flow": gradient_norm(self.flow)})
        self._check_finite(self.iteration + 1, metrics)
        if self.energy is not None:
            metrics |= self._step_energy(self.energy, parts, real, ends, lr_factor)
            self._update_weight(metrics["calibration"])
        if self.config.max_gradient_norm:
            torch.nn.utils.clip_grad_norm_(self.flow.parameters(), self.config.max_gradient_norm)
        self._step_generator(lr_factor)
        self.iteration += 1
        return metrics

    def _part_gradient(self, part: Part, real: Tensor) -> tuple[Metrics, Tensor]:
        """Adds the gradient of a part's share of the flow's loss to those that are there.

        Returns its terms, and the ends of chains from its samples (none without an energy).
        """
        bits = self._bits(real)
        loss, ends = bits, real[:0]
        terms: Metrics = {"bits_per_dimension": bits}
        if self.energy is not None:
            with torch.set_grad_enabled(self.calibrating):
                samples = self.flow.decode(self.flow.prior(len(real), self.seed, chain_ids=part.number))
            ends = self.energy.chain_ends(samples, self.seed, part.number)
            distance = calibration_loss(samples, ends)
            if self.calibrating:
                # Both terms are in bits per dimension, so that one learning rate suits all sizes.
                loss = loss + self.weight / self.config.dimension * distance
            terms |= {"calibration": distance, "displacement": (ends - samples).abs().mean()}
            terms["largest_sample"] = samples.abs().max()
        (loss * part.share).backward()
        return {"flow_loss": loss, **terms}, ends

    def _real_images(self, part: Part, indices: Tensor) -> Tensor:
        return self._dequantized(super()._real_images(part, indices), self.seed, part.number)

    def _dequantized(self, images: Tensor, seed: int, first: int) -> Tensor:
        brightnesses = self.config.brightnesses
        discrete = quantize(images, brightnesses)
        return dequantize(discrete, seed=seed, step=DEQUANTISATION, chain_ids=first, brightnesses=brightnesses)

    @torch.no_grad()
    def check_before_save(self) -> None:
        config, parts = self.config, self._parts()
        real = []
        for part in parts:
            images = self.images.at(config.size, part.rows(), self.device)
            real.append(self._dequantized(images, self.seed, part.number))
        bits = [{"bits_per_dimension": self._bits(images)} for images in real]
        self._check_finite(self.iteration, to_floats(self.parts.means(bits, [len(part) for part in parts])))
        if self.energy is not None:
            samples = [self.flow.sample(len(part), self.seed, chain_ids=part.number) for part in parts]
            self._check_energy(self.energy, real, samples)

    def _bits(self, dequantized: Tensor) -> Tensor:
        """The mean bits for each number of images."""
        return self.flow.bits_per_dimension_of_dequantized(dequantized, self.config.brightnesses).mean()

    def save_pictures(self, folder: RunFolder, board: TensorBoardWriter) -> None:
        energy = None if self.energy is None else self.energy.net
        run = ECFlowRun(folder.path, self.config, self.iteration, energy, self.ema_generator)
        save_pictures(run, self.images.first(self.config.size, GRID**2), folder, board)
