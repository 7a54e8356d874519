"""A generator by Energy Matching on points of the plane: one potential, trained by flow matching and by chains.

python examples/energy_matching.py            # a minute
python examples/energy_matching.py --quick    # shows that it runs
"""

import argparse

import torch
from torch import Tensor, nn

import fastebm

parser = argparse.ArgumentParser(description="Train a potential on eight clusters and generate from it.")
parser.add_argument("--quick", action="store_true", help="a few iterations only")
arguments = parser.parse_args()
torch.manual_seed(0)

ANGLES = torch.arange(8) * torch.pi / 4
CENTERS = 0.8 * torch.stack((ANGLES.cos(), ANGLES.sin()), 1)


def data(count: int) -> Tensor:
    """Points of eight clusters on a circle, `(count, 2)`."""
    return CENTERS[torch.randint(8, (count,))] + 0.04 * torch.randn(count, 2)


def distance(x: Tensor) -> float:
    """The mean distance from the nearest cluster."""
    return float(torch.cdist(x, CENTERS).amin(1).mean())


potential = nn.Sequential(nn.Linear(2, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1))
recipe = fastebm.recipes.energy_matching(potential, num_steps=110)
optimizer = torch.optim.Adam(potential.parameters(), 2e-3)
iterations = 300 if arguments.quick else 3000
for iteration in range(iterations):
    real = data(128)
    negatives = recipe.negatives(real, seed=1, chain_ids=128 * iteration)
    loss = recipe.loss(potential, real, negatives)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if iteration % (iterations // 10) == 0:
        print(f"iteration {iteration}: loss {loss.item():.3f}")

noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(2))
flowed = recipe.flow(noise, 100)
polished = fastebm.Langevin(potential, 0.01, (2 * 0.01 * recipe.epsilon) ** 0.5).sample(flowed, 100, seed=3)
print(
    f"mean distance from a cluster: noise {distance(noise):.3f}, the flow {distance(flowed):.3f}, "
    f"with a chain behind it {distance(polished):.3f}, data {distance(data(2000)):.3f}"
)
