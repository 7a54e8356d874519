"""One training iteration of EC-VAE with the preset for MNIST: a step of the VAE, its chains, and a step of the energy.

The images are noise, which takes as long as digits. Baselines run the same trainer, with their own chains, which have
no data term, and with autograd for the energy. Under `torch.compile` the encoder, the decoder and the energy of the
update are compiled as well, where that is faster.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.workloads import Workload
from fastebm.evaluation.speed import Candidate, Plan, Row, Updates, compare
from fastebm.evaluation.speed.baselines import TORCH_COMPILE, TORCHEBM, Baseline, chain_baselines
from fastebm.evaluation.speed.eager import eager_twin, module_of, refold
from fastebm.training.ec_vae.presets import EC_VAE_MNIST
from fastebm.training.ec_vae.trainer import ECVAETrainer
from fastebm.training.images import FloatLevels
from fastebm.training.trainer.weights import step


def workloads(device: str, full: bool) -> list[Workload]:
    config = EC_VAE_MNIST
    shape = (1, config.size, config.size)
    return [Workload("vae_training", "EC-VAE multi-scale", shape, config.batch_size, config.update_dtype)]


def trainer(work: Workload, engine: str) -> ECVAETrainer:
    """A trainer at the first iteration that calibrates."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.rand(512, *work.shape) * 2 - 1
    config = dataclasses.replace(EC_VAE_MNIST, channels=1, engine=engine, warmup=0, max_loss=1e30, max_energy=1e30)
    return ECVAETrainer(config, FloatLevels(images, work.shape[-1]), torch.device(work.device))


def ours(work: Workload) -> Callable[[], Any]:
    return trainer(work, "auto").update


def baseline(work: Workload, make: Callable[[], Baseline], compiled: bool) -> Candidate:
    """The trainer with the chains of a baseline and its energy's update by autograd."""
    trained = trainer(work, "autograd")
    energy = trained.energy
    assert energy is not None
    made = make()
    read = module_of(made.net)
    assert read is not None
    config = trained.config
    updates = Updates(((config.step_size, config.noise_std),) * config.num_steps, clamp=None)
    net = energy.net
    twin = eager_twin(net)
    assert isinstance(twin, torch.nn.Module)
    update = torch.compile(twin, dynamic=False) if compiled else twin
    optimizer = torch.optim.Adam(twin.parameters(), config.energy_learning_rate, config.adam_betas, fused=True)

    def chain_ends(samples: Tensor, *_: Any, **__: Any) -> Tensor:
        refold(read, twin)
        return made.chain(samples.detach().contiguous(), updates)

    def step_energy(of: Any, parts: Any, real: list[Tensor], ends: list[Tensor], factor: float) -> dict[str, float]:
        images = torch.cat((real[0], ends[0])).contiguous(memory_format=torch.channels_last)
        with trained._autocast():
            energies = update(images).float()
        data, samples = energies.chunk(2)
        optimizer.zero_grad()
        (data.mean() - samples.mean() + config.energy_l2 * energies.square().mean()).backward()
        step(optimizer, config.energy_learning_rate * factor)
        return {"loss": float(data.mean()), "calibration": 0.0}

    trained.energy.chain_ends = chain_ends  # type: ignore[method-assign,union-attr]
    trained._step_energy = step_energy  # type: ignore[method-assign]
    if compiled:
        trained.vae.encoder = torch.compile(trained.vae.encoder, dynamic=False)  # type: ignore[assignment]
        trained.vae.decoder = torch.compile(trained.vae.decoder, dynamic=False)  # type: ignore[assignment]
    return Candidate(made.variant + (", updates compiled" if compiled else ""), trained.update)


def compared(work: Workload, plan: Plan) -> list[Row]:
    energy = trainer(work, "autograd").energy
    assert energy is not None
    precision = getattr(torch, EC_VAE_MNIST.dtype)
    found = chain_baselines(eager_twin(energy.net), precision, work.device, clamp=None)
    candidates = {
        name: [
            partial(baseline, work, make, compiled)
            for make in variants
            for compiled in ((True, False) if name == TORCH_COMPILE else (False,))
        ]
        for name, variants in found.items()
        if name != TORCHEBM
    }
    run = Candidate(f"auto, {EC_VAE_MNIST.dtype}", ours(work))
    return compare(plan, run, candidates, unit="iteration")


def test_vae_training(measure, work):
    measure(work, compared)
