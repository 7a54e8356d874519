"""What runs that train a VAE share: the VAE, its average, its optimizer, and the images of an update."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from fastebm.data import batches, flip
from fastebm.models import Vae
from fastebm.training.checkpoints import Checkpoint
from fastebm.training.guard import DivergedError
from fastebm.training.image_levels import ImageLevels
from fastebm.training.loop import Loop, LoopConfig, average, optimizer_tensors, part, restore_optimizer
from fastebm.training.vae_run import SETTLING_BATCHES, VaeConfig, new_vae, settled


class VaeLoopConfig(VaeConfig, LoopConfig, Protocol):
    """The settings that train one."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def adam_betas(self) -> tuple[float, float]: ...
    @property
    def update_dtype(self) -> str: ...
    @property
    def flip(self) -> bool: ...
    def learning_rate_factor_at(self, iteration: int) -> float: ...


class VaeLoop(Loop):
    """VAE, averaged VAE and optimizer of a run. A method says what an update is."""

    config: VaeLoopConfig

    def __init__(self, config: VaeLoopConfig, images: ImageLevels, device: torch.device) -> None:
        super().__init__(config, images, device)

    def start(self) -> None:
        config = self.config
        self.iteration = 0
        self.vae = new_vae(config).to(self.device)
        self.average = copy.deepcopy(self.vae).requires_grad_(False) if config.ema else self.vae
        self.optimizer = torch.optim.Adam(self.vae.parameters(), config.learning_rate, config.adam_betas)
        self._order = batches(self.images, config.batch_size, config.seed)

    @property
    def images_seen(self) -> int:
        return self.iteration * self.config.batch_size

    @property
    def rate(self) -> float:
        """What learning rates are multiplied with."""
        return self.config.learning_rate_factor_at(self.iteration) * self.guard.learning_rate_factor

    def _step_vae(self, rate: float) -> None:
        """A step by the gradients that are there, and the average's after it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rate
        self.optimizer.step()
        if self.config.ema:
            average(self.average, self.vae, self.config.ema)

    def _check_finite(self, health: Mapping[str, float]) -> None:
        for name, value in health.items():
            if not abs(value) < float("inf"):
                raise DivergedError(self.iteration + 1, f"{name} is {value}")

    def _real_images(self, first: int) -> Tensor:
        real = self.images.batch(self.config.size, next(self._order), self.device)
        real = flip(real, seed=self.seed, positions=first) if self.config.flip else real
        return torch.empty_like(real, memory_format=torch.channels_last).copy_(real)

    def _precision(self) -> AbstractContextManager[Any]:
        low = self.config.update_dtype == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=low)

    def _settled(self) -> Vae:
        """The averaged VAE as it is sampled from."""
        count = SETTLING_BATCHES * self.config.batch_size
        return settled(self.average, self.config, self.images.first(self.config.size, count, self.device))

    def tensors(self) -> dict[str, Tensor]:
        named = {f"vae.{name}": tensor for name, tensor in self.vae.state_dict().items()}
        if self.config.ema:
            # Its statistics are measured for the sake of whoever samples; the next update overwrites them.
            named |= {f"average.{name}": tensor for name, tensor in self._settled().state_dict().items()}
        return named | optimizer_tensors(self.optimizer, "vae_optimizer.")

    def take_up(self, checkpoint: Checkpoint) -> None:
        self.vae.load_state_dict(part(checkpoint.tensors, "vae."))
        if self.config.ema:
            self.average.load_state_dict(part(checkpoint.tensors, "average."))
        restore_optimizer(self.optimizer, checkpoint.tensors, "vae_optimizer.")
        self._order = batches(self.images, self.config.batch_size, self.config.seed, self.iteration)
