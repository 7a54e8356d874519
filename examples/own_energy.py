"""Sample from your own energy, any module that gives one number per sample. A small one learns the shape of two moons.

python examples/own_energy.py            # a minute
python examples/own_energy.py --quick    # seconds: shows that it runs
"""

import argparse

import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn

import fastebm
from fastebm.evaluation import nearest_distances

parser = argparse.ArgumentParser(description="Train your own energy on points in the plane.")
parser.add_argument("--iterations", type=int, default=800)
parser.add_argument("--quick", action="store_true", help="a few iterations only")
arguments = parser.parse_args()


class Energy(nn.Module):
    """Energies (B,) of points (B, 2), low where data are. The quadratic term makes points far away unlikely."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(1) + 0.1 * x.square().sum(dim=1)


torch.manual_seed(0)
points, _ = make_moons(4000, noise=0.05, random_state=0)
data = torch.from_numpy(points).float() - torch.tensor([0.5, 0.25])

energy = Energy()
# Unadjusted Langevin dynamics at temperature 1: step_size = epsilon^2 / 2, noise_std = epsilon.
sampler = fastebm.Langevin(energy, **fastebm.schedules.from_epsilon(0.1))
print(sampler)


def noise(count: int) -> Tensor:
    return torch.rand(count, 2) * 4 - 2


# Persistent contrastive divergence: the energies of data go down, those of chain ends go up. Chains continue from where
# they were, and 25 of them restart from noise. `chain_ids` gives every chain its own noise.
optimizer = torch.optim.Adam(energy.parameters(), lr=1e-3)
state, batch, num_steps, started = noise(512), 512, 30, 0
for iteration in range(50 if arguments.quick else arguments.iterations):
    state[:25] = noise(25)
    state = sampler.sample(state, num_steps=num_steps, seed=0, chain_ids=started)
    started += batch
    real = data[torch.randint(len(data), (batch,))]
    energies = energy(torch.cat((real, state)))
    loss = energies[:batch].mean() - energies[batch:].mean() + 0.01 * energies.square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    state = state[torch.randperm(batch)]
    if iteration % 100 == 0:
        data_energy, chain_energy = energies.detach().split(batch)
        print(f"iteration {iteration}: gap {float(chain_energy.mean() - data_energy.mean()):+.3f}")

# Explicit state: one update at a time. `info` holds the energies and gradients before the update.
chain = sampler.init(noise(1000), seed=1)
for _ in range(50 if arguments.quick else 500):
    chain, info = sampler.step(chain)
print(f"mean energy at the end {float(info.energy.mean()):.3f}, mean step {float(info.displacement.mean()):.3f}")

far = nearest_distances(noise(1000), data).median()
near = nearest_distances(chain.x, data).median()
print(f"median distance to the nearest data point: noise {far:.3f}, samples {near:.3f}")
