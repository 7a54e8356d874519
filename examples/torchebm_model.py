"""A model of torchebm (pip install torchebm) sampled by fastebm, and fastebm's step behind torchebm's own sampler.

python examples/torchebm_model.py            # seconds
python examples/torchebm_model.py --quick    # the same with fewer steps
"""

import argparse
import time
from typing import Any

import torch
from torch import Tensor
from torchebm.core import DoubleWellModel
from torchebm.integrators import EulerMaruyamaIntegrator
from torchebm.samplers import LangevinDynamics

import fastebm

parser = argparse.ArgumentParser(description="Sample a torchebm model three ways.")
parser.add_argument("--quick", action="store_true", help="a few steps only")
arguments = parser.parse_args()


class FusedStep(EulerMaruyamaIntegrator):
    """torchebm's integrator with noise by chain id: a chain no longer depends on the batch that it runs in."""

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__(**options)
        self.seed, self.taken = seed, 0

    def step(self, state: dict[str, Tensor], step_size: Any = None, **given: Any) -> dict[str, Tensor]:
        x, h = state["x"], float(step_size)
        gradient = -given["drift"](x, torch.zeros(len(x)))
        noise_std = (2 * h) ** 0.5 * float(given["noise_scale"])
        self.taken += 1
        return {
            "x": fastebm.langevin_step(
                x, gradient, step_size=h, noise_std=noise_std, seed=self.seed, step=self.taken - 1
            )
        }


model, step_size = DoubleWellModel(barrier_height=2.0), 0.01
chains, num_steps = 1000, 200 if arguments.quick else 2000
start = torch.randn(chains, 2)
samplers = {
    "torchebm": lambda: LangevinDynamics(model, step_size=step_size).sample(x=start.clone(), n_steps=num_steps),
    "torchebm with fastebm's step": lambda: LangevinDynamics(
        model, step_size=step_size, integrator=FusedStep(seed=0)
    ).sample(x=start.clone(), n_steps=num_steps),
    "fastebm": lambda: fastebm.Langevin(model, step_size, (2 * step_size) ** 0.5).sample(start, num_steps, seed=0),
}
for name, run in samplers.items():
    run()  # a first call captures the model's program
    begin = time.perf_counter()
    x = run()
    taken = time.perf_counter() - begin
    print(f"{name}: mean energy {float(model(x).mean()):.3f}, {1e6 * taken / num_steps:.0f} us a step")
