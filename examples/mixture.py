"""A mixture of 25 normal distributions in the plane: plain Langevin chains against parallel tempering, in a picture.

python examples/mixture.py            # half a minute; writes mixture.png
python examples/mixture.py --quick    # shows that it runs
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import fastebm
from fastebm.plotting import new_figure, save_figure

parser = argparse.ArgumentParser(description="Sample a mixture of 25 modes and draw it.")
parser.add_argument("--quick", action="store_true", help="a few steps only")
parser.add_argument("--out", type=Path, default=Path("mixture.png"))
arguments = parser.parse_args()

grid = 2.0 * torch.arange(-2, 3)
CENTERS = torch.cartesian_prod(grid, grid)
STD = 0.25


def energy(x: Tensor) -> Tensor:
    """`-log p(x)` up to a constant, `(B,)`."""
    squares = (x[:, None] - CENTERS).square().sum(2)
    return -(-squares / (2 * STD**2)).logsumexp(1)


def missing(x: Tensor) -> float:
    """The total variation between the shares of the 25 modes and equal shares, 0 to 1."""
    shares = torch.cdist(x, CENTERS).argmin(1).bincount(minlength=25) / len(x)
    return 0.5 * float((shares - 1 / 25).abs().sum())


chains, num_steps = 1000, 100 if arguments.quick else 2000
start = torch.zeros(1, 2)  # all chains start in the middle
gradient = fastebm.energy_gradient(energy, engine="autograd")
langevin = fastebm.Langevin(gradient, **fastebm.schedules.from_epsilon(0.1))
tempered = fastebm.ParallelTempering(
    gradient, [1.0, 4.0, 16.0, 64.0], lambda e, t: fastebm.MALA(e, 0.02 * t, temperature=t), swap_every=5
)
samples = {
    "Langevin": langevin.sample(start, num_steps, seed=0, num_chains=chains),
    "parallel tempering": tempered.sample(start, num_steps, seed=0, num_chains=chains),
}

figure = new_figure(8, 4)
for axes, (name, x) in zip(figure.subplots(1, 2), samples.items(), strict=True):
    axes.scatter(*x.T, s=2)
    axes.set(title=f"{name}: {100 * missing(x):.0f} % misplaced", xlim=(-6, 6), ylim=(-6, 6), aspect="equal")
    print(f"{name}: {missing(x):.3f} of the chains are in the wrong modes")
save_figure(figure, arguments.out)
