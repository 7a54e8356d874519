"""Simulation-based inference: the posteriors of 100 observations at once, each chain with an observation of its own.

A net learns the likelihood of a simulator, `log q(x | parameters)`. HMC then samples `p(parameters | x)` for all
observations in one batch: `conditions` hands each chain its observation.

python examples/simulation_based_inference.py            # half a minute
python examples/simulation_based_inference.py --quick
"""

import argparse

import torch
from torch import Tensor, nn

import fastebm

parser = argparse.ArgumentParser(description="Posteriors of many observations at once.")
parser.add_argument("--quick", action="store_true", help="fewer simulations and steps")
arguments = parser.parse_args()
torch.manual_seed(0)


def simulate(parameters: Tensor) -> Tensor:
    """Observations `(B, 2)` of parameters `(B, 2)`: a bend, and noise."""
    a, b = parameters.unbind(1)
    return torch.stack((a, b + 0.5 * a.square()), 1) + 0.3 * torch.randn(len(a), 2)


net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4))


def surprise(parameters: Tensor, observed: Tensor) -> Tensor:
    """`-log q(observed | parameters)`, `(B,)`, a normal distribution whose mean and scale the net gives."""
    mean, log_std = net(parameters).chunk(2, 1)
    return (0.5 * ((observed - mean) * (-log_std).exp()).square() + log_std).sum(1)


optimizer = torch.optim.Adam(net.parameters(), 2e-3)
for _ in range(100 if arguments.quick else 3000):
    parameters = torch.randn(256, 2)
    loss = surprise(parameters, simulate(parameters)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def energy(parameters: Tensor, observed: Tensor) -> Tensor:
    """Minus the log of the prior N(0, I) and of the likelihood."""
    return 0.5 * parameters.square().sum(1) + surprise(parameters, observed)


true = torch.randn(100, 2)
observed = simulate(true).repeat_interleave(50, 0)  # 50 chains for each of the 100 observations
sampler = fastebm.HMC(energy, step_size=0.1, num_leapfrogs=10, engine="autograd")
x = sampler.sample(torch.zeros(5000, 2), 10 if arguments.quick else 100, 0, conditions=[observed])

ranks = (x.view(100, 50, 2) < true[:, None]).float().mean(1)  # uniform in [0, 1] where the posteriors are right
print(f"mean error of the posterior means {float((x.view(100, 50, 2).mean(1) - true).abs().mean()):.3f}")
print(f"ranks of the true parameters: mean {float(ranks.mean()):.3f} (0.5), std {float(ranks.std()):.3f} (0.289)")
