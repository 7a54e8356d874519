"""Clusters of 13 Lennard-Jones atoms by BAOAB, with a temperature for each chain: the cluster melts as it gets warmer.

python examples/lennard_jones.py            # half a minute
python examples/lennard_jones.py --quick    # seconds: shows that it runs
"""

import argparse

import torch
from torch import Tensor

import fastebm

parser = argparse.ArgumentParser(description="Warm Lennard-Jones clusters.")
parser.add_argument("--quick", action="store_true", help="a few steps only")
arguments = parser.parse_args()

ATOMS = 13
PAIRS = torch.triu_indices(ATOMS, ATOMS, 1)


def energy(x: Tensor) -> Tensor:
    """The potential energy `(B,)` of atoms at `(B, 13, 3)`, and a weak pull to the origin that holds them together."""
    squares = (x[:, PAIRS[0]] - x[:, PAIRS[1]]).square().sum(2)
    sixth = squares.clamp(min=0.5).pow(-3)
    return 4 * (sixth.square() - sixth).sum(1) + 0.01 * x.square().sum((1, 2))


def icosahedron() -> Tensor:
    """One atom in the middle of twelve, near the lowest energy of -44.327."""
    golden = (1 + 5**0.5) / 2
    corners = [(0.0, a, b * golden) for a in (-1, 1) for b in (-1, 1)]
    turned = [tuple(torch.tensor(corner).roll(k).tolist()) for corner in corners for k in range(3)]
    shell = torch.tensor(turned)
    return torch.cat((torch.zeros(1, 3), 1.08 * shell / shell.norm(dim=1, keepdim=True)))


temperatures = torch.tensor([0.05, 0.1, 0.2, 0.25, 0.3, 0.4]).repeat_interleave(32)  # 32 clusters at each
start = icosahedron().expand(len(temperatures), -1, -1).contiguous()
sampler = fastebm.Underdamped(energy, 0.005, friction=1.0, temperature=temperatures, engine="autograd")

print(f"the icosahedron has an energy of {float(energy(start[:1])):.2f}")
steps = 200 if arguments.quick else 10_000
state = sampler.init(start, seed=0, num_steps=steps)
state = sampler.advance(state, steps // 2)
potential, kinetic, count = torch.zeros(len(start)), torch.zeros(len(start)), 20
for _ in range(count):
    state = sampler.advance(state, steps // 2 // count)
    potential += energy(state.x) / count
    kinetic += state.velocity.square().mean((1, 2)) / count
for row, temperature in enumerate(temperatures.unique()):
    part = slice(32 * row, 32 * row + 32)
    print(
        f"temperature {float(temperature):.2f}: measured {float(kinetic[part].mean()):.3f}, "
        f"potential energy {float(potential[part].mean()):.1f}"
    )
