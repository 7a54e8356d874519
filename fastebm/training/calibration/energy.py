"""The energy that calibrates a generator: made new, loaded from a checkpoint, or trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastebm.compiler import weight_gradient
from fastebm.models import MultiScaleEnergy
from fastebm.runs.checkpoints import Layout
from fastebm.runs.nets import outline, with_weights
from fastebm.sampling import Langevin
from fastebm.training.calibration.calibrate import DataTerm, calibrate
from fastebm.training.calibration.config import CalibratedConfig, GeneratorConfig
from fastebm.training.trainer.energy_loss import EnergyLoss, beyond_hinge
from fastebm.training.trainer.flight import FlightRecorder
from fastebm.training.trainer.metrics import Metrics, energy_update_metrics
from fastebm.training.trainer.parts import Part, Parts
from fastebm.training.trainer.weights import (
    adam,
    checkpoint_layout,
    fork_rng,
    load_optimizer,
    optimizer_tensors,
    select_prefix,
    with_prefix,
)


def new_energy(config: CalibratedConfig) -> MultiScaleEnergy | None:
    """An energy with weights drawn from the config's seed; None for a plain generator."""
    if not config.calibrated:
        return None
    with fork_rng(config.seed):
        return MultiScaleEnergy(
            config.size,
            config.channels,
            width=config.energy_width,
            depth=config.energy_depth,
            spectral_norm=config.spectral_norm,
        )


def stored_energy(
    config: CalibratedConfig, tensors: Mapping[str, Tensor], device: torch.device | str | None
) -> MultiScaleEnergy | None:
    """The energy of a checkpoint, in eval mode, its parameters without gradients; None for a plain generator."""
    energy = outline(lambda: new_energy(config))
    return None if energy is None else with_weights(energy, select_prefix(tensors, "energy."), device)


def generator_layout(config: GeneratorConfig, prefix: str, generator: nn.Module) -> Layout:
    """The tensors of a checkpoint of a run that trains `generator`, and the energy that calibrates it if it has one."""
    nets = {f"{prefix}.": generator} | ({"average.": generator} if config.ema else {})
    optimizers = {f"{prefix}_optimizer.": generator.parameters()}
    if isinstance(config, CalibratedConfig) and (energy := outline(lambda: new_energy(config))) is not None:
        nets["energy."] = energy
        optimizers["energy_optimizer."] = energy.parameters()
    return checkpoint_layout(nets, optimizers)


class EnergyTrainer:
    """The energy of a run with its optimizer and its sampler.

    The sampler is made once, as an energy gradient analyses its energy at the first use.
    """

    def __init__(self, config: CalibratedConfig, net: MultiScaleEnergy, parts: Parts, recorder: FlightRecorder) -> None:
        self.config = config
        self.recorder = recorder
        self.net = net
        self.parts = parts
        rate, betas = config.energy_learning_rate, config.adam_betas
        self.optimizer = adam(net.parameters(), rate, betas, shard=config.shard_optimizer)
        dtype = getattr(torch, config.dtype)
        self.sampler = Langevin(
            net,
            config.step_size,
            config.noise_std,
            dtype=dtype,
            engine=config.engine,
            grad_norm_clip=config.chain_clip or None,
        )
        self.weights = weight_gradient(net, dtype=getattr(torch, config.update_dtype), engine=config.engine)
        self.data_term = DataTerm(config.data_term_weight, config.data_term_hinge)

    def chain_ends(self, samples: Tensor, seed: int, first_chain_id: int, start_step: int = 0) -> Tensor:
        """The ends of chains that start at `samples`, float32. Energies that are not finite are left to the guard."""
        read, num_steps = self.recorder.readings("the generator"), self.config.num_steps
        return calibrate(
            samples.detach().contiguous(),
            self.sampler,
            num_steps,
            seed,
            first_chain_id,
            start_step=start_step,
            data_term=self.data_term,
            check=False,
            readings=None if read is None else lambda state: read(self.sampler, state, num_steps),
        )

    def gradient(self, parts: Sequence[Part], real: Sequence[Tensor], ends: Sequence[Tensor]) -> Metrics:
        """Sets the gradient of `mean E(data) - mean E(chain ends)`, from those of each part.

        Returns the metrics of the update.
        """
        drawn = list(zip(parts, real, ends, strict=True))

        def gradients(contrast: float) -> tuple[Tensor, Tensor, Tensor]:
            loss = EnergyLoss.of(self.config, self.config.step_size, contrast=contrast)
            found = self.parts.gradients(
                self.net, self.optimizer, lambda each: loss.backward(self.weights, *each), drawn
            )
            return self.parts.loss_and_energies(found, self.config.batch_size)

        loss, data, samples = gradients(1.0)
        if beyond_hinge(self.config, data, samples):
            loss, _, _ = gradients(0.0)
        self.recorder.finish({}, data, samples, self.net)
        return energy_update_metrics(self.net, loss, data, samples)

    @torch.no_grad()
    def energies(self, real: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Energies of images and of chain ends, (B,) each, in eval mode."""
        self.net.eval()
        data, samples = (self.net(images) for images in (real, ends))
        self.net.train()
        return data, samples

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the energy, by name."""
        return with_prefix(self.net.state_dict(), "energy.") | optimizer_tensors(self.optimizer, "energy_optimizer.")

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads what `tensors` returned."""
        self.net.load_state_dict(select_prefix(tensors, "energy."))
        load_optimizer(self.optimizer, tensors, "energy_optimizer.")
