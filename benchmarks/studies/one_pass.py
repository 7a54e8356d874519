"""One decoder pass against chains: images a second of several samplers, in one process, interleaved.

    python -m benchmarks.studies.one_pass [PAGE] [--batch 64] [--device cuda]

At 3x32x32, all on our fastest path (bfloat16 in chains, fused gradients; the last column says what gradients ran on).
Times do not depend on weights, so nets are untrained, and nothing is said about the quality of samples.

- EC-VAE: one pass of the decoder, `VAE.sample`; beside it in float32, as the module itself gives it in eval mode, and
  with a decoder of half the width in every layer.
- CF-EBM: the cascade 8 to 32, 15 steps a level, width 32.
- like VAEBM (Xiao, Kreis, Kautz, Vahdat, ICLR 2021): 16 Langevin steps on the latent vector z and the noise eps of all
  pixels together, both normal a priori, under the energy of the image G(z) + std eps plus (|z|^2 + |eps|^2) / 2.
- like NCSN (Song and Ermon, NeurIPS 2019): annealed Langevin, 10 noise levels from 1 to 0.01 in a geometric sequence
  with 100 steps each, on the CF-EBM net at 32x32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.pages import RESULTS, add_entry, each, one_pass_table
from benchmarks.harness.throughput import throughput_rows
from fastebm import Langevin
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.evaluation.speed.measurement import interleaved
from fastebm.models import VAE, CoarseToFineEnergy, MultiScaleEnergy
from fastebm.models.frozen_decoder import FrozenDecoder
from fastebm.sampling import Cascade, linear

ONE_PASS = "EC-VAE, one decoder pass"


@dataclass(frozen=True)
class Nets:
    """The size of images and the widths of all nets; by default those of the authors at 3x32x32."""

    size: int = 32
    channels: int = 3
    latent: int = 128
    width: int = 64
    max_width: int = 512
    energy_width: int = 128
    base_width: int = 32


@dataclass(frozen=True)
class Method:
    """What draws one batch, and what the gradients of its chains ran on; "" where it has no chains."""

    draw: Callable[[], Tensor]
    gradients: str = ""


@dataclass(frozen=True)
class GeometricLevels:
    """A schedule of so many values from `start` to `end` in a geometric sequence, each for as many updates."""

    start: float
    end: float
    levels: int = 10

    def __call__(self, t: Tensor) -> Tensor:
        level = (t * self.levels).floor().clamp(max=self.levels - 1)
        return self.start * (self.end / self.start) ** (level / (self.levels - 1))


def annealed(energy: nn.Module, noise: float = 1.0, last: float = 0.01, epsilon: float = 2e-5) -> Langevin:
    """Annealed Langevin dynamics: alpha = epsilon s^2 / last^2 at noise level s, steps of alpha / 2, noise sqrt(alpha).

    Both the range of levels and epsilon are those of Song and Ermon.
    """
    alpha = epsilon / last**2
    step_size = GeometricLevels(alpha * noise**2 / 2, alpha * last**2 / 2)
    noise_std = GeometricLevels(alpha**0.5 * noise, alpha**0.5 * last)
    return Langevin(energy, step_size, noise_std, dtype=torch.bfloat16)


class JointEnergy(nn.Module):
    """E(G(z) + std eps) + (|z|^2 + |eps|^2) / 2, of z and eps in one state.

    The state is an image, (B, channels + 1, size, size): eps, and z in the first pixels of the last channel. What is
    left of that channel stands idle, normal by itself. As one vector, `latent + channels * size**2` numbers, the two
    would be parts of it that lie in memory in different ways, which fused kernels don't take.
    """

    pick: Tensor

    def __init__(self, vae: VAE, energy: nn.Module) -> None:
        super().__init__()
        self.decoder = vae.decoder
        self.energy = energy
        self.channels = vae.channels
        self.std = float(vae.log_variance.exp().sqrt())
        # A product with it is a slice that fused kernels take.
        self.register_buffer("pick", torch.eye(vae.latent, vae.size**2))

    def latent(self, state: Tensor) -> Tensor:
        return F.linear(state[:, self.channels :].flatten(1), self.pick)

    def noise(self, state: Tensor) -> Tensor:
        return self.std * state[:, : self.channels]

    def forward(self, state: Tensor) -> Tensor:
        images = self.decoder(self.latent(state)) + self.noise(state)
        return self.energy(images) + 0.5 * state.flatten(1).square().sum(1)


def runs_on(sampler: Langevin, x: Tensor) -> str:
    """What gradients run on at states like x."""
    with torch.no_grad(), sampler.gradient.chain():
        sampler.gradient(x)
        if sampler.gradient.compiled_program(x) is not None:
            return "fused kernels"
    return "PyTorch's operations" if sampler.gradient.engine == "fused" else sampler.gradient.engine


def decoder_methods(nets: Nets, batch: int, device: str) -> dict[str, Method]:
    """One pass, in several forms; the first is what all else is compared with."""
    vae, half = (
        VAE(nets.size, nets.channels, latent=nets.latent, width=nets.width // part, max_width=nets.max_width // part)
        .eval()
        .requires_grad_(False)
        .to(device)
        for part in (1, 2)
    )
    return {
        ONE_PASS: Method(lambda: vae.sample(batch, seed=0, dtype=torch.bfloat16)),
        "the same with a decoder of half the width": Method(lambda: half.sample(batch, seed=0, dtype=torch.bfloat16)),
        "the same in float32": Method(lambda: vae.sample(batch, seed=0)),
        "the same by the module, float32": Method(lambda: vae.decode(vae.prior(batch, seed=0))),
    }


def chain_methods(nets: Nets, batch: int, device: str) -> dict[str, Method]:
    size, channels = nets.size, nets.channels
    net = CoarseToFineEnergy(size, channels, base_width=nets.base_width).to(device)
    levels = {s: net.frozen(s) for s in (8, 16, 32) if s <= size}
    cascade = Cascade(levels, num_steps=15, step_size=1.0, noise_std=linear(0.015, 0.0), dtype=torch.bfloat16)
    ncsn = annealed(levels[size])
    noise = torch.rand(batch, channels, size, size, device=device) * 2 - 1
    num_steps = 15 * len(levels)
    engines = {
        runs_on(level.sampler, noise.new_zeros(batch, channels, level.size, level.size)) for level in cascade.levels
    }
    return {
        f"CF-EBM, cascade of {num_steps} steps": Method(
            lambda: cascade.sample(batch, seed=0, channels=channels, check=False), ", ".join(sorted(engines))
        ),
        "like VAEBM, 16 steps on latents and noise": vaebm_baseline(nets, batch, device),
        "like NCSN, 10 levels of 100 steps": Method(
            lambda: ncsn.sample(noise, 1000, seed=0, check=False), runs_on(ncsn, noise)
        ),
    }


def vaebm_baseline(nets: Nets, batch: int, device: str) -> Method:
    vae = VAE(nets.size, nets.channels, latent=nets.latent, width=nets.width, max_width=nets.max_width)
    vae = vae.eval().requires_grad_(False).to(device)
    critic = MultiScaleEnergy(nets.size, nets.channels, width=nets.energy_width).eval().requires_grad_(False)
    energy = JointEnergy(vae, critic).to(device)
    sampler = Langevin(energy, step_size=0.01, noise_std=0.1, dtype=torch.bfloat16)
    start = torch.randn(batch, nets.channels + 1, nets.size, nets.size, device=device)

    def draw() -> Tensor:
        end = sampler.sample(start, 16, seed=0, check=False)
        return FrozenDecoder(vae.decoder, torch.bfloat16)(energy.latent(end)) + energy.noise(end)

    return Method(draw, runs_on(sampler, start))


def measure(nets: Nets, batch: int, rounds: int, device: str, slice_seconds: float = 0.2) -> list[dict[str, Any]]:
    """A row for each method, its figures by round."""
    torch.manual_seed(0)
    methods = decoder_methods(nets, batch, device) | chain_methods(nets, batch, device)
    with torch.no_grad():
        draws = {name: method.draw for name, method in methods.items()}
        rows = throughput_rows(interleaved(draws, rounds, device, slice_seconds=slice_seconds), batch)
    return [row | {"gradients": methods[row["method"]].gradients} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, nargs="?", default=RESULTS / "one-pass", help="folder of the page")
    parser.add_argument("--batch", type=int, default=64, help="images of a batch")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the measurement")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="each has a table of its own")
    options = parser.parse_args()
    rows = measure(Nets(), options.batch, options.rounds, options.device)
    entry = {"machine": machine_facts(options.device), "batch": options.batch, "rows": rows}
    add_entry(options.page, options.device, entry, each(one_pass_table))


if __name__ == "__main__":
    main()
