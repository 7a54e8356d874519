"""Calibrate your own generator: short chains of an energy start at its samples, and it learns to move to their ends.

python examples/own_generator.py            # a minute
python examples/own_generator.py --quick    # seconds: shows that it runs
"""

import argparse

import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn

import fastebm
from fastebm.evaluation import nearest_distances
from fastebm.training import calibrate, calibration_loss, noise_floor

parser = argparse.ArgumentParser(description="Calibrate a generator of points in the plane.")
parser.add_argument("--iterations", type=int, default=1500)
parser.add_argument("--quick", action="store_true", help="a few iterations only")
arguments = parser.parse_args()


class Energy(nn.Module):
    """Energies (B,) of points (B, 2), low where data are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(1) + 0.1 * x.square().sum(dim=1)


torch.manual_seed(0)
points, _ = make_moons(4000, noise=0.05, random_state=0)
data = torch.from_numpy(points).float() - torch.tensor([0.5, 0.25])

generator = nn.Sequential(nn.Linear(2, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))
energy = Energy()
sampler = fastebm.Langevin(energy, step_size=0.02, noise_std=0.02)
batch, num_steps = 512, 15
print(f"calibration loss of noise alone: {noise_floor(sampler, num_steps, 2):.4f}")


def latent(count: int) -> Tensor:
    return torch.randn(count, 2)


# A generator with its own loss, such as a VAE, adds the calibration loss to it. This one has no other loss: it learns
# from the energy alone.
generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
energy_optimizer = torch.optim.Adam(energy.parameters(), lr=1e-3, betas=(0.0, 0.9))
untrained = generator(latent(1000)).detach()
iterations = 40 if arguments.quick else arguments.iterations
for iteration in range(iterations):
    samples = generator(latent(batch))
    targets = calibrate(samples, sampler, num_steps, seed=0, chain_ids=iteration * batch)
    loss = calibration_loss(samples, targets)
    generator_optimizer.zero_grad()
    loss.backward()
    generator_optimizer.step()

    real = data[torch.randint(len(data), (batch,))]
    energies = energy(torch.cat((real, targets)))
    gap = energies[batch:].mean() - energies[:batch].mean()
    energy_optimizer.zero_grad()
    (0.01 * energies.square().mean() - gap).backward()
    energy_optimizer.step()
    if iteration % 300 == 0:
        print(f"iteration {iteration}: gap {gap.item():+.3f}, calibration loss {loss.item():.4f}")

with torch.no_grad():
    drawn = generator(latent(1000))
before, after = (nearest_distances(x, data).median() for x in (untrained, drawn))
covered = nearest_distances(data, drawn).median()
print(
    f"median distance to the nearest data point: untrained {before:.3f}, one pass {after:.3f}; from data {covered:.3f}"
)
