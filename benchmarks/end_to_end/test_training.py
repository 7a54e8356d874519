"""One training iteration: chains, for CF-EBM through 8 -> 16 -> 32 and further, then one update of the weights by Adam.

Nets of other kinds have chains of as many steps at their one resolution, and a replay buffer.

Baselines run the same loop, with the same optimizer and under the same autocast. The changing weights are folded again
for their chains in every iteration, as ours are. Under `torch.compile` the update is compiled as well, where that is
faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from benchmarks.harness.cascade_baselines import BaselineCascade, LevelTruths, baseline_cascades
from benchmarks.harness.workloads import Workload, adam, buffer_of, images, levels, training, update
from fastebm.evaluation.speed import Candidate, Plan, Row, compare
from fastebm.evaluation.speed.baselines import TORCH_COMPILE, TORCHEBM
from fastebm.evaluation.speed.eager import eager_twin, module_of, refold

OTHERS = {"UvA tutorial": (1, 28, 28), "IGEBM-like residual": (3, 32, 32), "wide residual 28-2": (3, 32, 32)}


def workloads(device: str, full: bool) -> list[Workload]:
    dtypes = ("bfloat16", "float32") if full else ("bfloat16",)
    batches = (16, 64) if full else (64,) if device == "cuda" else (16,)
    small = [("CF-EBM", (3, 32, 32), batch, dtype) for batch in batches for dtype in dtypes]
    large = [("CF-EBM", (3, size, size), batch, "bfloat16") for size, batch in ((64, 16), (128, 4)) if full]
    others = [(name, shape, 64, dtype) for name, shape in OTHERS.items() for dtype in dtypes if full]
    return [Workload("training", *case, num_steps=15) for case in (*small, *large, *others)]


def iteration(work: Workload, cascade: BaselineCascade, net: nn.Module, compiled: bool) -> Callable[[], None]:
    """The baseline's whole iteration: `net` is in training, and the highest level of the cascade reads a copy of it."""
    net = net.train().requires_grad_(True).to(memory_format=torch.channels_last)
    real, optimizer = images(work), adam(net)
    read = module_of(cascade.baselines[work.shape[-1]].net)
    assert read is not None
    energy = torch.compile(net, dynamic=False) if compiled else net
    exchange = buffer_of(work)

    def iterate() -> None:
        refold(read, net)
        ends = cascade()
        exchange(ends)
        update(energy, optimizer, real, ends, work)

    return iterate


def candidates(work: Workload, energies: Mapping[int, nn.Module], truths: LevelTruths) -> dict[str, list]:
    def candidate(compiled: bool, make: Callable[[], BaselineCascade]) -> Candidate:
        cascade = make()
        verified = truths.candidate(cascade)
        twin = eager_twin(energies[work.shape[-1]])
        assert isinstance(twin, nn.Module)
        variant = cascade.variant + (", update compiled" if compiled else "")
        return Candidate(variant, iteration(work, cascade, twin, compiled), verified.error)

    # A compiled update is not always the faster one.
    return {
        name: [
            partial(candidate, compiled, make)
            for make in variants
            for compiled in ((True, False) if name == TORCH_COMPILE else (False,))
        ]
        for name, variants in baseline_cascades(work, energies).items()
        if name != TORCHEBM  # it has no training of this kind to be compared with
    }


def compared(work: Workload, plan: Plan) -> list[Row]:
    energies = levels(work)
    truths = LevelTruths.of(work, energies)
    ours = Candidate(f"{work.engine}, {work.dtype}", training(work))
    return compare(plan, ours, candidates(work, energies, truths), unit="iteration")


def test_training(measure, work):
    measure(work, compared)
