"""`langevin_step` against the same update in eager PyTorch and under `torch.compile`.

The floor is 12 bytes an element over the memory's bandwidth (read x and gradient, write x); on a CPU, drawing the
noise costs about as much. Peers do what ours does: step, noise, clamp to [-1, 1], state in float32.
"""

from __future__ import annotations

import pytest
import torch

import fastebm
from fastebm import rng

STEP_SIZE, NOISE_STD = 0.1, 0.05
SHAPES = {"64x3x32x32": (64, 3, 32, 32), "16M elements": (16 * 2**20 // 3072, 3, 32, 32)}


def tensors(shape, device):
    x = fastebm.uniform(shape, seed=0, device=device) * 2 - 1
    grad = fastebm.normal(shape, seed=1, device=device)
    return x, grad


def ours(x, grad, noise_std):
    schedule = torch.tensor([[STEP_SIZE, noise_std]], device=x.device)
    key, chains = rng.make_key(0, device=x.device), rng.chain_ids(0, len(x), x.device)
    advance = torch.tensor([0, 1, 1], device=x.device)
    options = (-1.0, 1.0, None, None, None, None, None, None, 0.0)

    def step():
        torch.ops.fastebm.langevin_step_(x, grad, schedule, key, chains, *options)
        key.add_(advance)

    return step


def research(x, grad):
    x = x - STEP_SIZE * grad + NOISE_STD * torch.randn_like(x)
    return x.clamp(-1, 1)


def in_place(x, grad):
    return x.add_(grad, alpha=-STEP_SIZE).add_(torch.randn_like(x), alpha=NOISE_STD).clamp_(-1, 1)


def in_place_without_noise(x, grad):
    return x.add_(grad, alpha=-STEP_SIZE).clamp_(-1, 1)


def given_noise(x, grad, noise):
    return x.add_(grad, alpha=-STEP_SIZE).add_(noise, alpha=NOISE_STD).clamp_(-1, 1)


@pytest.mark.parametrize("size", SHAPES)
def test_langevin_step(compare, device, size):
    shape = SHAPES[size]
    x, grad = tensors(shape, device)
    cases = {
        "fastebm langevin_step_": ours(x.clone(), grad, NOISE_STD),
        "fastebm langevin_step_, no noise": ours(x.clone(), grad, 0.0),
    }
    y = x.clone()
    cases["eager, as research code writes it"] = lambda: research(y, grad)
    cases["eager, in place"] = lambda: in_place(y, grad)
    cases["eager, in place, no noise"] = lambda: in_place_without_noise(y, grad)
    mode = "max-autotune" if device == "cuda" else "default"
    compiled = torch.compile(research, mode=mode)
    compiled_in_place = torch.compile(in_place)
    compiled_given = torch.compile(given_noise)
    compiled_without = torch.compile(in_place_without_noise)
    cases["torch.compile, noise drawn inside"] = lambda: compiled(y, grad)
    cases["torch.compile, in place, noise drawn inside"] = lambda: compiled_in_place(y, grad)
    cases["torch.compile, in place, noise drawn outside"] = lambda: compiled_given(y, grad, torch.randn_like(y))
    cases["torch.compile, in place, no noise"] = lambda: compiled_without(y, grad)
    compare(f"langevin_step {size}", cases)
