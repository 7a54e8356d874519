"""What runs share that train a generator and calibrate it: the energy, and the weight of the calibration."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from fastebm.data import add_noise
from fastebm.runs.checkpoints import Checkpoint
from fastebm.training.calibration.calibrate import DualUpdate
from fastebm.training.calibration.energy_trainer import EnergyConfig, EnergyTrainer, new_energy
from fastebm.training.calibration.generator_trainer import GeneratorConfig, GeneratorLoop
from fastebm.training.trainer.loop import step, to_floats


class CalibratedConfig(GeneratorConfig, EnergyConfig, Protocol):
    """The settings of a calibration."""

    @property
    def warmup(self) -> int: ...
    @property
    def data_noise(self) -> float: ...
    @property
    def lambda_start(self) -> float: ...
    @property
    def lambda_max(self) -> float: ...
    @property
    def dual_rate(self) -> float: ...
    @property
    def noise_floor(self) -> float: ...
    @property
    def threshold(self) -> float: ...


class CalibratedLoop(GeneratorLoop):
    """Adds to a generator its energy, `energy`, and the weight of the calibration, `weight`; a plain one has none."""

    config: CalibratedConfig

    def start(self) -> None:
        super().start()
        self.weight = self.config.lambda_start
        energy = new_energy(self.config)
        self.energy = None if energy is None else EnergyTrainer(self.config, energy.to(self.device))

    @property
    def calibrating(self) -> bool:
        """Whether the next update calibrates: there is an energy, and the warm-up is over."""
        return self.energy is not None and self.iteration >= self.config.warmup

    def describe(self) -> dict[str, Any]:
        line = super().describe()
        if self.energy is not None:
            line |= {"energy_learning_rate": self.config.energy_learning_rate * self.rate}
            line |= {"lambda": self.weight if self.calibrating else 0.0, "noise_floor": self.config.noise_floor}
        return line

    def _energy_step(
        self, energy: EnergyTrainer, real: Tensor, ends: Tensor, first: int, rate: float
    ) -> dict[str, float]:
        """One step of the energy, on real images and ends of chains, if the guard lets it; returns its health."""
        if self.config.data_noise:
            real = add_noise(real, self.config.data_noise, seed=self.seed, positions=first)
        with self._precision():
            metrics = to_floats(energy.gradient(real, ends))
        self.guard.check(self.iteration + 1, metrics)
        step(energy.optimizer, self.config.energy_learning_rate * rate)
        return metrics

    def _update_weight(self, distance: float) -> None:
        """Lets the weight follow the calibration loss of an update that calibrated."""
        if self.calibrating:
            config = self.config
            self.weight = DualUpdate(config.dual_rate, config.threshold, config.lambda_max)(self.weight, distance)

    def _check_energy(self, energy: EnergyTrainer, real: Tensor, samples: Tensor) -> None:
        """Lets the guard see energies of real images and of the ends of chains that the next update would start."""
        ends = energy.chain_ends(samples, self.seed, self.images_seen)
        self.guard.check(self.iteration, energy.largest(real, ends) | {"gradient_norm": 0.0})

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | ({} if self.energy is None else self.energy.tensors())

    def state(self) -> dict[str, Any]:
        return super().state() | {"lambda": self.weight}

    def load_state(self, checkpoint: Checkpoint) -> None:
        super().load_state(checkpoint)
        self.weight = float(checkpoint.state["lambda"])
        if self.energy is not None:
            self.energy.load_state(checkpoint.tensors)
