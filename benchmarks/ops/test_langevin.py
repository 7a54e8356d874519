"""`langevin_step` against the same update in eager PyTorch and under `torch.compile`.

The floor is 12 bytes an element over the memory's bandwidth (read x and gradient, write x); on a CPU, drawing the
noise costs about as much. Peers do what ours does: step, noise, clamp to [-1, 1], state in float32.
"""

from __future__ import annotations

import math

import torch

from benchmarks.harness.workloads import Workload, images, noise

STEP_SIZE, NOISE_STD = 0.1, 0.05
SHAPE = (3, 32, 32)
# Images in 64 MB and in 256 MB.
MANY, MOST = 16 * 2**20 // 3072, 64 * 2**20 // 3072


def workloads(device: str, full: bool) -> list[Workload]:
    batches = [64, MANY] + ([MOST] if full or device == "cuda" else [])
    return [Workload("langevin", case, SHAPE, batch, "float32") for batch in batches for case in ("noise", "no noise")]


def research(x, grad):
    x = x - STEP_SIZE * grad + NOISE_STD * torch.randn_like(x)
    return x.clamp(-1, 1)


def in_place(x, grad):
    return x.add_(grad, alpha=-STEP_SIZE).add_(torch.randn_like(x), alpha=NOISE_STD).clamp_(-1, 1)


def in_place_without_noise(x, grad):
    return x.add_(grad, alpha=-STEP_SIZE).clamp_(-1, 1)


def given_noise(x, grad, drawn):
    return x.add_(grad, alpha=-STEP_SIZE).add_(drawn, alpha=NOISE_STD).clamp_(-1, 1)


def baselines(x, grad, device):
    mode = "max-autotune" if device == "cuda" else "default"
    compiled = torch.compile(research, mode=mode)
    compiled_in_place = torch.compile(in_place)
    compiled_given = torch.compile(given_noise)
    return {
        "eager, research code": lambda: research(x, grad),
        "eager, in place": lambda: in_place(x, grad),
        "torch.compile, noise inside": lambda: compiled(x, grad),
        "torch.compile, in place, noise inside": lambda: compiled_in_place(x, grad),
        "torch.compile, in place, noise outside": lambda: compiled_given(x, grad, torch.randn_like(x)),
    }


def peers_without_noise(x, grad):
    compiled = torch.compile(in_place_without_noise)
    return {
        "eager, in place": lambda: in_place_without_noise(x, grad),
        "torch.compile, in place": lambda: compiled(x, grad),
    }


def test_langevin_step(measure, work):
    torch._dynamo.reset()
    x, grad = images(work), noise(work, seed=1)
    others = baselines(x, grad, work.device) if work.case == "noise" else peers_without_noise(x, grad)
    measure.operator(work, others, bytes_moved=12 * math.prod(SHAPE))
