"""One decoder pass against chains: images a second of four ways to sample, in one process, interleaved.

    python benchmarks/one_pass.py docs/results/one-pass [--batch 64]

At 3x32x32, all on our fastest path (bfloat16 in chains, fused gradients). Times don't depend on weights, so nets are
untrained: nothing is said about the quality of samples.

- EC-VAE: one pass of the decoder, `Vae.sample`; beside it in float32, and as the module itself gives it in eval mode.
- CF-EBM: the cascade 8 to 32, 15 steps a level, width 32.
- like VAEBM: 16 Langevin steps on the latent vector under energy of the decoder's image plus half its squared norm.
- like NCSN: annealed Langevin, 10 noise levels of 100 steps, on the CF-EBM net at 32x32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from marks import fill
from torch import Tensor, nn

from fastebm import Langevin
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.evaluation.speed.measurement import Summary, interleaved, ratios
from fastebm.models import CoarseToFineEnergy, MultiScaleEnergy, Vae
from fastebm.sampling import Cascade, linear
from fastebm.training.files import write_json

ONE_PASS = "EC-VAE, one decoder pass"


class LatentEnergy(nn.Module):
    """E(G(z)) + |z|^2 / 2 of latent vectors (B, latent)."""

    def __init__(self, decoder: nn.Module, energy: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.energy = energy

    def forward(self, z: Tensor) -> Tensor:
        return self.energy(self.decoder(z)) + 0.5 * z.square().sum(1)


def cases(batch: int) -> dict[str, Callable[[], Any]]:
    """What draws one batch, by name."""
    torch.manual_seed(0)
    vae = Vae(32, 3, latent=128).eval().requires_grad_(False)
    critic = MultiScaleEnergy(32, 3, width=128).eval()
    net = CoarseToFineEnergy(32, 3)
    levels = {size: net.frozen(size) for size in (8, 16, 32)}
    cascade = Cascade(levels, steps=15, step_size=1.0, noise_std=linear(0.015, 0.0), dtype=torch.bfloat16)
    joint = Langevin(LatentEnergy(vae.decoder, critic), step_size=0.01, noise_std=0.1, dtype=torch.bfloat16)
    annealed = Langevin(levels[32], step_size=0.1, noise_std=linear(1.0, 0.01), dtype=torch.bfloat16)
    noise, latent = torch.rand(batch, 3, 32, 32) * 2 - 1, torch.randn(batch, 128)

    def like_vaebm() -> Tensor:
        return vae.decode(joint.sample(latent, 16, seed=0, check=False))

    return {
        ONE_PASS: lambda: vae.sample(batch, seed=0, dtype=torch.bfloat16),
        "the same in float32": lambda: vae.sample(batch, seed=0),
        "the same by the module, float32": lambda: vae.decode(vae.prior(batch, seed=0)),
        "CF-EBM, cascade of 45 steps": lambda: cascade.sample(batch, seed=0, channels=3, check=False),
        "like VAEBM, 16 steps through decoder and energy": like_vaebm,
        "like NCSN, 1,000 annealed steps": lambda: annealed.sample(noise, 1000, seed=0, check=False),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| way | images a second | time over one pass (20 to 80 %) |", "|---|---:|---:|"]
    for row in rows:
        lines.append(
            f"| {row['way']} | {row['images_per_second']:.4g} | {row['ratio']:.3g} ({row['ratio_low']:.3g} to "
            f"{row['ratio_high']:.3g}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with torch.no_grad():
        times = interleaved(cases(given.batch), given.rounds, "cpu", slice_seconds=0.2, warm=False)
    rows = []
    for name, values in times.items():
        ratio = Summary.of(ratios(values, times[ONE_PASS]))
        rows.append(
            {
                "way": name,
                "images_per_second": given.batch / Summary.of(values).median,
                "ratio": ratio.median,
                "ratio_low": ratio.low,
                "ratio_high": ratio.high,
                "seconds": values,
            }
        )
    given.page.mkdir(parents=True, exist_ok=True)
    write_json(given.page / "one-pass.json", {"machine": machine_facts("cpu"), "batch": given.batch, "rows": rows})
    fill(given.page / "README.md", "One pass", "one pass", Path(__file__).name, table(rows))


if __name__ == "__main__":
    main()
