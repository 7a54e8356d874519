"""One training iteration of CF-EBM at 32x32: chains 8 -> 16 -> 32, then one update of the weights by Adam.

Peers run the same loop, with the same optimizer and under the same autocast. The weights that change are folded anew
for their chains in every iteration, as ours are. Under `torch.compile` the update is compiled as well, where that is
faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from benchmarks.harness import workloads as of
from benchmarks.harness.cascade_baselines import Climb, LevelTruths, climbs
from benchmarks.harness.workloads import Workload
from fastebm.evaluation.speed import Candidate, Plan, Row, compare
from fastebm.evaluation.speed.baselines import TORCH_COMPILE, TORCHEBM
from fastebm.evaluation.speed.eager import module_of, refold, stock

SHAPE = (3, 32, 32)


def workloads(device: str, full: bool) -> list[Workload]:
    dtypes = ("bfloat16", "float32") if full else ("bfloat16",)
    batches = (16, 64) if full else (64,) if device == "cuda" else (16,)
    return [Workload("training", "CF-EBM", SHAPE, batch, dtype, num_steps=15) for batch in batches for dtype in dtypes]


def iteration(work: Workload, climb: Climb, net: nn.Module, compiled: bool) -> Callable[[], None]:
    """The peer's whole iteration: `net` is in training, and the climb's highest level reads a copy of it."""
    net = net.train().requires_grad_(True).to(memory_format=torch.channels_last)
    real, optimizer = of.images(work), of.adam(net)
    read = module_of(climb.baselines[work.shape[-1]].net)
    assert read is not None
    energy = torch.compile(net, dynamic=False) if compiled else net

    def iterate() -> None:
        refold(read, net)
        of.update(energy, optimizer, real, climb(), work)

    return iterate


def entrants(work: Workload, energies: Mapping[int, nn.Module], truths: LevelTruths) -> dict[str, list]:
    def entrant(compiled: bool, make: Callable[[], Climb]) -> Candidate:
        climb = make()
        verified = truths.entrant(climb)
        twin = stock(energies[work.shape[-1]])
        assert isinstance(twin, nn.Module)
        variant = climb.variant + (", update compiled" if compiled else "")
        return Candidate(variant, iteration(work, climb, twin, compiled), verified.error)

    # A compiled update is not always the faster one.
    return {
        name: [
            lambda compiled=compiled, make=make: entrant(compiled, make)
            for make in variants
            for compiled in ((True, False) if name == TORCH_COMPILE else (False,))
        ]
        for name, variants in climbs(work, energies).items()
        if name != TORCHEBM  # it has no training of this kind to be compared with
    }


def compared(work: Workload, plan: Plan) -> list[Row]:
    energies = of.levels(work)
    truths = LevelTruths.of(work, energies)
    ours = Candidate(f"{work.engine}, {work.dtype}", of.training(work))
    return compare(plan, ours, entrants(work, energies, truths), unit="iteration")


def test_training(measure, work):
    measure(work, compared)
