"""Training of a generator at one size: `GeneratorTrainer`, and `CalibratedTrainer`, which adds an energy."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastebm.data import add_noise, batches, flip
from fastebm.runs.checkpoints import Checkpoint
from fastebm.runs.fields import checked
from fastebm.runs.nets import initialized
from fastebm.training.calibration.calibrate import DualUpdate
from fastebm.training.calibration.config import CalibratedConfig, GeneratorConfig
from fastebm.training.calibration.energy import EnergyTrainer, new_energy
from fastebm.training.trainer.energy_loss import brake
from fastebm.training.trainer.guard import DivergedError
from fastebm.training.trainer.loop import Trainer
from fastebm.training.trainer.metrics import to_floats
from fastebm.training.trainer.parts import Part
from fastebm.training.trainer.weights import (
    adam,
    collect_moments,
    load_optimizer,
    optimizer_tensors,
    select_prefix,
    step,
    update_ema,
    with_prefix,
)


class GeneratorTrainer(Trainer):
    """The generator of a run, its moving average and its optimizer. A method defines the net and the update.

    Attributes:
        prefix: of the names of a checkpoint's tensors: `prefix.` and `prefix_optimizer.`, beside `average.`.
        progress_keys: the metrics in the progress bar, by the name that they have there.
    """

    prefix: ClassVar[str]
    progress_keys: ClassVar[Mapping[str, str]]
    config: GeneratorConfig

    @abstractmethod
    def new_generator(self) -> nn.Module:
        """A generator with initial weights, on the run's device."""

    @property
    def generator_betas(self) -> tuple[float, float]:
        """Decay rates of Adam's moments for the generator."""
        return self.config.adam_betas

    def reset(self) -> None:
        config = self.config
        self.iteration = 0
        self.generator = self.new_generator()
        self.ema_generator = copy.deepcopy(self.generator).requires_grad_(False) if config.ema else self.generator
        parameters = self.generator.parameters()
        self.optimizer = adam(parameters, config.learning_rate, self.generator_betas, shard=config.shard_optimizer)
        self._order = batches(self.images, config.batch_size, config.seed)

    @property
    def images_seen(self) -> int:
        return self.iteration * self.config.batch_size

    @property
    def lr_factor(self) -> float:
        """The factor on all learning rates in the next update."""
        return self.config.lr_factor_at(self.iteration) * self.guard.lr_factor

    def log_fields(self) -> dict[str, Any]:
        return {"size": self.config.size, "learning_rate": self.config.learning_rate * self.lr_factor}

    def progress_metrics(self, metrics: Mapping[str, float]) -> tuple[str, dict[str, float]]:
        size = self.config.size
        return f"{size}x{size}", {key: metrics[name] for key, name in self.progress_keys.items() if name in metrics}

    def _step_generator(self, lr_factor: float) -> None:
        """Updates the generator by the gradients that are there, and then the moving average."""
        step(self.optimizer, self.config.learning_rate * lr_factor)
        if self.config.ema:
            update_ema(self.ema_generator, self.generator, self.config.ema)

    def _check_finite(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self.recorder.finish(metrics)
        for name, value in metrics.items():
            if not abs(value) < float("inf"):
                raise DivergedError(iteration, f"{name} is {value}")

    def _parts(self) -> list[Part]:
        """The parts of the next update that this rank computes."""
        return self.parts.of(self.config.batch_size, self.images_seen)

    def _next_images(self, parts: Sequence[Part]) -> list[Tensor]:
        """The real images of each part of the next update."""
        indices = next(self._order)
        return [self._real_images(part, indices[part.rows()]) for part in parts]

    def _real_images(self, part: Part, indices: Tensor) -> Tensor:
        real = self.images.batch(self.config.size, indices, self.device)
        return flip(real, seed=self.seed, positions=part.number) if self.config.flip else real

    def _autocast(self) -> AbstractContextManager[Any]:
        bfloat16 = self.config.update_dtype == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16)

    def _ema_for_sampling(self) -> nn.Module:
        """The averaged generator as it is saved and sampled from."""
        return self.ema_generator

    def collect(self) -> None:
        collect_moments(self.optimizer)

    def tensors(self) -> dict[str, Tensor]:
        named = with_prefix(self.generator.state_dict(), f"{self.prefix}.")
        if self.config.ema:
            named |= with_prefix(self._ema_for_sampling().state_dict(), "average.")
        return named | optimizer_tensors(self.optimizer, f"{self.prefix}_optimizer.")

    def load_state(self, checkpoint: Checkpoint) -> None:
        self.generator.load_state_dict(select_prefix(checkpoint.tensors, f"{self.prefix}."))
        if self.config.ema:
            self.ema_generator.load_state_dict(select_prefix(checkpoint.tensors, "average."))
        load_optimizer(self.optimizer, checkpoint.tensors, f"{self.prefix}_optimizer.")
        self._order = batches(self.images, self.config.batch_size, self.config.seed, self.iteration)


class CalibratedTrainer(GeneratorTrainer):
    """Adds an energy and the weight of the calibration loss.

    Attributes:
        energy: the energy with its optimizer and sampler; None in a plain generator.
        weight: of the calibration loss.
    """

    config: CalibratedConfig

    def reset(self) -> None:
        super().reset()
        self.weight = self.config.lambda_start
        energy = initialized(lambda: new_energy(self.config), self.device)
        self.energy = None if energy is None else EnergyTrainer(self.config, energy, self.parts, self.recorder)

    @property
    def calibrating(self) -> bool:
        """Whether the next update calibrates: there is an energy, and the warm-up is over."""
        return self.energy is not None and self.iteration >= self.config.warmup

    def log_fields(self) -> dict[str, Any]:
        line = super().log_fields()
        if self.energy is not None:
            line |= {"energy_learning_rate": self.config.energy_learning_rate * self.lr_factor}
            line |= {"lambda": self.weight if self.calibrating else 0.0, "noise_floor": self.config.noise_floor}
        return line

    def _step_energy(
        self,
        energy: EnergyTrainer,
        parts: Sequence[Part],
        real: Sequence[Tensor],
        ends: Sequence[Tensor],
        factor: float,
    ) -> dict[str, float]:
        """Updates the energy by the real images and chain ends of each part, unless the guard refuses.

        Returns the metrics.
        """
        if std := self.config.data_noise:
            real = [add_noise(x, std, seed=self.seed, positions=p.number) for p, x in zip(parts, real, strict=True)]
        with self._autocast():
            metrics = to_floats(energy.gradient(parts, real, ends))
        self.recorder.finish(metrics)
        self.guard.check(self.iteration + 1, metrics)
        step(energy.optimizer, self.config.energy_learning_rate * factor * brake(self.config, metrics["gap"]))
        return metrics

    def _update_weight(self, loss: float) -> None:
        """Lets the weight follow the calibration loss of an update that calibrated."""
        if self.calibrating:
            config = self.config
            self.weight = DualUpdate(config.dual_rate, config.threshold, config.lambda_max)(self.weight, loss)

    def _check_energy(self, energy: EnergyTrainer, real: Sequence[Tensor], samples: Sequence[Tensor]) -> None:
        """Shows the guard energies of real images and of the ends of chains that the next update would start.

        `real` and `samples` are those of each of its parts.
        """
        parts = self._parts()
        found = [
            energy.energies(images, energy.chain_ends(starts, self.seed, part.number))
            for part, images, starts in zip(parts, real, samples, strict=True)
        ]
        self._check_energies(energy.net, parts, found)

    def collect(self) -> None:
        super().collect()
        if self.energy is not None:
            collect_moments(self.energy.optimizer)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | ({} if self.energy is None else self.energy.tensors())

    def state(self) -> dict[str, Any]:
        return super().state() | {"lambda": self.weight}

    def load_state(self, checkpoint: Checkpoint) -> None:
        super().load_state(checkpoint)
        self.weight = checked("lambda", checkpoint.state["lambda"], float)
        if self.energy is not None:
            self.energy.load_state(checkpoint.tensors)
