"""What runs that train a generator at one size share: the generator, its average, its optimizer, and its images."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fastebm.data import batches, flip
from fastebm.runs.checkpoints import Checkpoint
from fastebm.training.trainer.guard import DivergedError
from fastebm.training.trainer.loop import Loop, LoopConfig, average, optimizer_tensors, part, restore_optimizer, step


class GeneratorConfig(LoopConfig, Protocol):
    """The settings that train one."""

    @property
    def size(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def update_dtype(self) -> str: ...
    @property
    def flip(self) -> bool: ...
    @property
    def ema(self) -> float: ...
    def learning_rate_factor_at(self, iteration: int) -> float: ...


class GeneratorLoop(Loop):
    """Generator, averaged generator and optimizer of a run. A method says what they are, and what an update is.

    Attributes:
        prefix: of the names of a checkpoint's tensors: `prefix.` and `prefix_optimizer.`, beside `average.`.
        shown: what the progress bar shows, by what it calls it, of an update's health.
    """

    prefix: ClassVar[str]
    shown: ClassVar[Mapping[str, str]]
    config: GeneratorConfig

    @abstractmethod
    def new_generator(self) -> nn.Module:
        """The generator as it begins, on the run's device."""

    @property
    @abstractmethod
    def betas(self) -> tuple[float, float]:
        """Decay rates of Adam's moments for the generator."""

    def start(self) -> None:
        config = self.config
        self.iteration = 0
        self.generator = self.new_generator()
        self.average = copy.deepcopy(self.generator).requires_grad_(False) if config.ema else self.generator
        self.optimizer = torch.optim.Adam(self.generator.parameters(), config.learning_rate, self.betas)
        self._order = batches(self.images, config.batch_size, config.seed)

    @property
    def images_seen(self) -> int:
        return self.iteration * self.config.batch_size

    @property
    def rate(self) -> float:
        """What learning rates are multiplied with."""
        return self.config.learning_rate_factor_at(self.iteration) * self.guard.lr_factor

    def describe(self) -> dict[str, Any]:
        return {"size": self.config.size, "learning_rate": self.config.learning_rate * self.rate}

    def progress_metrics(self, metrics: Mapping[str, float]) -> tuple[str, dict[str, float]]:
        size = self.config.size
        return f"{size}x{size}", {shown: metrics[name] for shown, name in self.shown.items() if name in metrics}

    def _step_generator(self, rate: float) -> None:
        """A step by the gradients that are there, and the average's after it."""
        step(self.optimizer, self.config.learning_rate * rate)
        if self.config.ema:
            average(self.average, self.generator, self.config.ema)

    def _check_finite(self, iteration: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if not abs(value) < float("inf"):
                raise DivergedError(iteration, f"{name} is {value}")

    def _real_images(self, first: int) -> Tensor:
        real = self.images.batch(self.config.size, next(self._order), self.device)
        return flip(real, seed=self.seed, positions=first) if self.config.flip else real

    def _precision(self) -> AbstractContextManager[Any]:
        low = self.config.update_dtype == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=low)

    def _ema_for_sampling(self) -> nn.Module:
        """The averaged generator as it is saved and sampled from."""
        return self.average

    def tensors(self) -> dict[str, Tensor]:
        named = {f"{self.prefix}.{name}": tensor for name, tensor in self.generator.state_dict().items()}
        if self.config.ema:
            named |= {f"average.{name}": tensor for name, tensor in self._ema_for_sampling().state_dict().items()}
        return named | optimizer_tensors(self.optimizer, f"{self.prefix}_optimizer.")

    def load_state(self, checkpoint: Checkpoint) -> None:
        self.generator.load_state_dict(part(checkpoint.tensors, f"{self.prefix}."))
        if self.config.ema:
            self.average.load_state_dict(part(checkpoint.tensors, "average."))
        restore_optimizer(self.optimizer, checkpoint.tensors, f"{self.prefix}_optimizer.")
        self._order = batches(self.images, self.config.batch_size, self.config.seed, self.iteration)
