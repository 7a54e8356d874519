"""A run of a calibrated flow in memory: its nets, its optimizers, and what an update is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastebm.data import add_noise, batches, flip
from fastebm.models import dequantized, quantized
from fastebm.training.board import Board
from fastebm.training.calibration import DualUpdate, calibration_loss
from fastebm.training.checkpoints import Checkpoint
from fastebm.training.ec_flow_config import EcFlowConfig
from fastebm.training.ec_flow_run import EcFlowRun, new_energy, new_flow, save_pictures
from fastebm.training.energy_side import EnergySide, Health, numbers_of, step
from fastebm.training.guard import DivergedError
from fastebm.training.image_levels import ImageLevels
from fastebm.training.loop import Loop, average, gradient_norm, optimizer_tensors, part, restore_optimizer
from fastebm.training.pictures import GRID
from fastebm.training.run import RunFolder

DEQUANTISATION = 1
"""Step of the stream DATA_NOISE whose draws dequantise; `data_noise` has those of step 0."""


class EcFlowTrainer(Loop):
    """Flow, averaged flow, energy, an optimizer for each, and the weight of the calibration.

    An update: samples of the flow with a gradient, and chains from them; a step of the flow on likelihood and distance
    to the chains' ends; a step of the energy on dequantised images and these same ends. Both kinds of images have the
    noise of dequantisation, or the energy would learn to tell that alone, against the likelihood.
    """

    remedy = "a smaller learning_rate or energy_learning_rate, or a larger energy_l2"
    config: EcFlowConfig

    def __init__(self, config: EcFlowConfig, images: ImageLevels, device: torch.device) -> None:
        super().__init__(config, images, device)

    def start(self) -> None:
        config = self.config
        self.iteration = 0
        self.weight = config.lambda_start
        self.flow = new_flow(config).to(self.device)
        # By the very batch that the first update sees; a checkpoint brings the norms as they are by then.
        first = next(batches(self.images, config.batch_size, config.seed))
        self.flow.initialize(self._dequantized(self.images.batch(config.size, first, self.device), config.seed, 0))
        self.average = copy.deepcopy(self.flow).requires_grad_(False) if config.ema else self.flow
        self.optimizer = torch.optim.Adam(self.flow.parameters(), config.learning_rate, config.flow_betas)
        energy = new_energy(config)
        self.energy = None if energy is None else EnergySide(config, energy.to(self.device))
        self._order = batches(self.images, config.batch_size, config.seed)

    @property
    def images_seen(self) -> int:
        return self.iteration * self.config.batch_size

    @property
    def calibrating(self) -> bool:
        """Whether the next update calibrates: there is an energy, and the warm-up is over."""
        return self.energy is not None and self.iteration >= self.config.warmup

    @property
    def rate(self) -> float:
        """What learning rates are multiplied with."""
        return self.config.learning_rate_factor_at(self.iteration) * self.guard.learning_rate_factor

    def describe(self) -> dict[str, Any]:
        line = {"size": self.config.size, "learning_rate": self.config.learning_rate * self.rate}
        if self.energy is not None:
            line |= {"energy_learning_rate": self.config.energy_learning_rate * self.rate}
            line |= {"lambda": self.weight if self.calibrating else 0.0, "noise_floor": self.config.noise_floor}
        return line

    def watched(self, health: Mapping[str, float]) -> tuple[str, dict[str, float]]:
        names = {"bits": "bits_per_dimension", "calibration": "calibration", "gap": "gap"}
        size = self.config.size
        return f"{size}x{size}", {shown: health[name] for shown, name in names.items() if name in health}

    def update(self) -> dict[str, float]:
        config, first, rate = self.config, self.images_seen, self.rate
        real = self._real_images(first)
        found, ends = self._flow_gradient(real, first)
        health = numbers_of(found)
        self._check_flow(self.iteration + 1, health)
        if self.energy is not None and ends is not None:
            health |= self._energy_gradient(self.energy, real, ends, first)
            self.guard.check(self.iteration + 1, health)
            step(self.energy.optimizer, config.energy_learning_rate * rate)
        self._flow_step(config.learning_rate * rate)
        if self.calibrating:
            dual = DualUpdate(config.dual_rate, config.threshold, config.lambda_max)
            self.weight = dual(self.weight, health["calibration"])
        self.iteration += 1
        return health

    def _flow_gradient(self, real: Tensor, first: int) -> tuple[Health, Tensor | None]:
        """Sets the gradient of the flow's loss; returns its parts, and the ends of the chains from its samples."""
        bits = self.flow.bits_per_dimension_of_dequantized(real, self.config.brightnesses).mean()
        loss, ends = bits, None
        found: Health = {"bits_per_dimension": bits}
        if self.energy is not None:
            with torch.set_grad_enabled(self.calibrating):
                samples = self.flow.decode(self.flow.prior(len(real), self.seed, chains=first))
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

    def _flow_step(self, rate: float) -> None:
        if self.config.max_gradient_norm:
            torch.nn.utils.clip_grad_norm_(self.flow.parameters(), self.config.max_gradient_norm)
        step(self.optimizer, rate)
        if self.config.ema:
            average(self.average, self.flow, self.config.ema)

    def _energy_gradient(self, energy: EnergySide, real: Tensor, ends: Tensor, first: int) -> dict[str, float]:
        if self.config.data_noise:
            real = add_noise(real, self.config.data_noise, seed=self.seed, positions=first)
        with self._precision():
            return numbers_of(energy.gradient(real, ends))

    def _check_flow(self, iteration: int, health: Mapping[str, float]) -> None:
        for name, value in health.items():
            if not abs(value) < float("inf"):
                raise DivergedError(iteration, f"{name} is {value}")

    def _real_images(self, first: int) -> Tensor:
        real = self.images.batch(self.config.size, next(self._order), self.device)
        real = flip(real, seed=self.seed, positions=first) if self.config.flip else real
        return self._dequantized(real, self.seed, first)

    def _dequantized(self, images: Tensor, seed: int, first: int) -> Tensor:
        brightnesses = self.config.brightnesses
        discrete = quantized(images, brightnesses)
        return dequantized(discrete, seed=seed, step=DEQUANTISATION, chains=first, brightnesses=brightnesses)

    def _precision(self) -> AbstractContextManager[Any]:
        low = self.config.update_dtype == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=low)

    @torch.no_grad()
    def examine(self) -> None:
        """Lets the guard see likelihood and energies under the weights that are about to be saved.

        The chains are those that the next update would start, and leave no trace.
        """
        config, first = self.config, self.images_seen
        real = self._dequantized(self.images.first(config.size, config.batch_size, self.device), self.seed, first)
        bits = self.flow.bits_per_dimension_of_dequantized(real, config.brightnesses).mean()
        self._check_flow(self.iteration, {"bits_per_dimension": float(bits)})
        if self.energy is not None:
            ends = self.energy.chain_ends(self.flow.sample(len(real), self.seed, chains=first), self.seed, first)
            self.guard.check(self.iteration, self.energy.largest(real, ends) | {"gradient_norm": 0.0})

    def save_pictures(self, folder: RunFolder, board: Board) -> None:
        energy = None if self.energy is None else self.energy.net
        run = EcFlowRun(folder.path, self.config, self.iteration, self.average, energy)
        save_pictures(run, self.images.first(self.config.size, GRID**2), folder, board)

    def tensors(self) -> dict[str, Tensor]:
        named = {f"flow.{name}": tensor for name, tensor in self.flow.state_dict().items()}
        if self.config.ema:
            named |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        named |= optimizer_tensors(self.optimizer, "flow_optimizer.")
        if self.energy is not None:
            named |= {f"energy.{name}": tensor for name, tensor in self.energy.net.state_dict().items()}
            named |= optimizer_tensors(self.energy.optimizer, "energy_optimizer.")
        return named

    def state(self) -> dict[str, Any]:
        return super().state() | {"lambda": self.weight}

    def take_up(self, checkpoint: Checkpoint) -> None:
        self.weight = float(checkpoint.state["lambda"])
        self.flow.load_state_dict(part(checkpoint.tensors, "flow."))
        if self.config.ema:
            self.average.load_state_dict(part(checkpoint.tensors, "average."))
        restore_optimizer(self.optimizer, checkpoint.tensors, "flow_optimizer.")
        if self.energy is not None:
            self.energy.net.load_state_dict(part(checkpoint.tensors, "energy."))
            restore_optimizer(self.energy.optimizer, checkpoint.tensors, "energy_optimizer.")
        self._order = batches(self.images, self.config.batch_size, self.config.seed, self.iteration)
