"""Draws what each sampler makes of a known density, for the pages of docs/samplers.

    python -m benchmarks.studies.sampler_plots [FOLDER]

Each picture has histograms of the ends of many chains over the exact density of a double well, at one step size or two.
Tempering is shown at a barrier that plain chains don't cross. Seeds are fixed: the same pictures come out again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastebm
from benchmarks.harness.pages import ROOT
from fastebm import plotting

FOLDER = ROOT / "docs" / "samplers"
CHAINS, STEPS = 20_000, 1500
# Of the double well: its barrier in units of the temperature. Plain chains cross the first and not the second.
LOW, HIGH = 1.5, 10.0

Samples = Callable[[int, int], Mapping[str, Tensor]]
"""Samples by label, from so many chains and steps."""


def double_well(barrier: float) -> Callable[[Tensor], Tensor]:
    """A lower well on the left, so that the two have different weights."""
    return lambda x: barrier * (x.square() - 1).square().sum(1) + 0.5 * x.sum(1)


def exact(barrier: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points, and the density at them."""
    x = np.linspace(-2.2, 2.2, 401)
    weights = np.exp(-double_well(barrier)(torch.from_numpy(x)[:, None]).numpy())
    return x, weights / np.trapezoid(weights, x)


def starts(chains: int) -> Tensor:
    """Half of all chains in each well."""
    return torch.where(torch.arange(chains) % 2 == 0, 1.0, -1.0)[:, None]


def langevin(chains: int, steps: int) -> Mapping[str, Tensor]:
    return {
        f"step_size={h}": fastebm.Langevin(double_well(LOW), h, math.sqrt(2 * h)).sample(starts(chains), steps, seed=0)
        for h in (0.01, 0.05)
    }


def mala(chains: int, steps: int) -> Mapping[str, Tensor]:
    return {"step_size=0.05": fastebm.MALA(double_well(LOW), 0.05).sample(starts(chains), steps, seed=0)}


def underdamped(chains: int, steps: int) -> Mapping[str, Tensor]:
    return {
        f"step_size={h}": fastebm.Underdamped(double_well(LOW), h, 1.0).sample(starts(chains), steps, seed=0)
        for h in (0.1, 0.2)
    }


def hmc(chains: int, steps: int) -> Mapping[str, Tensor]:
    made = fastebm.HMC(double_well(LOW), 0.15, 5)
    return {"step_size=0.15, num_leapfrogs=5": made.sample(starts(chains), steps, seed=0)}


def mclmc(chains: int, steps: int) -> Mapping[str, Tensor]:
    """Momenta need some dimensions to turn in: nine more, with a normal distribution. The well's is shown."""
    x0 = torch.cat((starts(chains), torch.zeros(chains, 9)), dim=1)
    well = double_well(LOW)

    def energy(x: Tensor) -> Tensor:
        return well(x[:, :1]) + 0.5 * x[:, 1:].square().sum(1)

    return {
        "AdjustedMCLMC, step_size=0.8": fastebm.AdjustedMCLMC(energy, 0.8, 3).sample(x0, steps // 6, seed=0)[:, 0],
        "MCLMC, step_size=0.8": fastebm.MCLMC(energy, 0.8).sample(x0, steps // 3, seed=0)[:, 0],
    }


def tempering(chains: int, steps: int) -> Mapping[str, Tensor]:
    """From the upper well alone."""
    x0, energy = torch.ones(chains // 10, 1), double_well(HIGH)
    made = fastebm.ParallelTempering(
        energy, (1.0, 2.0, 4.0, 8.0), lambda energy, t: fastebm.MALA(energy, 0.01 * t, temperature=t)
    )
    return {
        "tempering": made.sample(x0, steps, seed=0),
        "MALA alone": fastebm.MALA(energy, 0.01).sample(x0, steps, seed=0),
    }


PICTURES: dict[str, tuple[float, Samples]] = {
    "langevin": (LOW, langevin),
    "mala": (LOW, mala),
    "underdamped": (LOW, underdamped),
    "hmc": (LOW, hmc),
    "mclmc": (LOW, mclmc),
    "tempering": (HIGH, tempering),
}


def draw(folder: Path, chains: int = CHAINS, steps: int = STEPS) -> list[Path]:
    """Writes all pictures into a folder."""
    written = []
    for name, (barrier, samples) in PICTURES.items():
        found = {label: x.flatten().double().numpy() for label, x in samples(chains, steps).items()}
        written.append(folder / f"{name}.png")
        plotting.save_density(written[-1], *exact(barrier), found)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    for path in draw(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
