"""The time of a step of our samplers, the eager loops that people write, and torchebm's, interleaved in one process.

    python -m benchmarks.samplers.bench_samplers                                   all: some 6 minutes on two cores
    python -m benchmarks.samplers.bench_samplers --cases mixture --chains 1000     a part
    python -m benchmarks.samplers.bench_samplers --out benchmarks/results/MACHINE/samplers.json      keeps the rows

Energies are a mixture of eight Gaussians in the plane, a correlated Gaussian in 100 dimensions and the network
2-64-64-1. The loops keep energies and gradients from step to step, so that they evaluate no gradient twice; weights
require gradients, as in training code. torchebm has Langevin dynamics and HMC. Before anything is timed, each
implementation samples a Gaussian whose moments have to come out; a wrong one is not timed.

Two more tables: MALA against our own Langevin on CF-EBM, and a replay buffer's draw and write back against an update
of the chains that it serves. Ratios are times over that of fastebm: above 1 it is faster. Lost comparisons stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastebm
from benchmarks.energies.densities import eight_gaussians
from benchmarks.energies.entry import Energy
from benchmarks.harness import nets
from benchmarks.harness.workloads import NOISE_STD, STEP_SIZE, Workload, buffer_cycle, images
from benchmarks.samplers.targets import autoregressive
from fastebm.evaluation.speed import Row, Run, Updates, machine_facts, record
from fastebm.evaluation.speed.baselines import (
    RESEARCH,
    TORCHEBM,
    Gradient,
    SkippedError,
    research_eager,
    torchebm_langevin,
)
from fastebm.evaluation.speed.comparison import reason
from fastebm.evaluation.speed.eager import tuned_copy
from fastebm.evaluation.speed.measurement import Clock, interleaved
from fastebm.evaluation.speed.rows import OURS

SUITE = "samplers"
LEAPFROGS = 5
FRICTION = 1.0
LANGEVIN, MALA, UNDERDAMPED, HMC = SAMPLERS = ("Langevin", "MALA", "Underdamped", "HMC")
# A timed chain takes about this long by the eager loop, within these numbers of steps.
CHAIN_SECONDS = 0.05
FEWEST, MOST = 3, 200
ROUNDS = 15
# Moments may be this many standard errors from the truth.
FAR = 5.0


@dataclasses.dataclass(frozen=True)
class Case:
    """An energy in `dim` dimensions, and a step size for each sampler; `aims` are the ratios to torchebm and to eager
    loops that fastebm is held to."""

    name: str
    dim: int
    build: Callable[[], Energy]
    step_sizes: tuple[float, float, float, float]
    aims: tuple[float, float]

    def step_size(self, sampler: str) -> float:
        return self.step_sizes[SAMPLERS.index(sampler)]


class Perceptron(nn.Module):
    """2-64-64-1 with SiLU, and a weak quadratic that keeps chains together."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze(-1) + 0.5 * x.square().sum(1)


def correlated() -> Energy:
    precision = torch.from_numpy(autoregressive(100, 0.5)).inverse().float()
    return lambda x: 0.5 * ((x @ precision) * x).sum(1)


CASES = (
    Case("mixture of 8 Gaussians, 2-D", 2, lambda: eight_gaussians, (0.005, 0.02, 0.1, 0.1), (10, 5)),
    Case("Gaussian, 100-D", 100, correlated, (0.02, 0.1, 0.3, 0.2), (5, 3)),
    Case("MLP 2-64-64-1", 2, Perceptron, (0.05, 0.3, 0.3, 0.4), (5, 3)),
)
# What every implementation has to sample first: a normal distribution, so that its moments are known for each sampler.
NORMAL = Case("normal", 2, lambda: lambda x: 0.5 * x.square().sum(1), (0.2, 0.8, 0.5, 0.4), (0, 0))


@dataclasses.dataclass(frozen=True)
class Implementation:
    """`chain(x, steps)` gives the ends of chains from x, and the share accepted in the last step; NaN if unknown."""

    variant: str
    chain: Callable[[Tensor, int], tuple[Tensor, float]]


# Eager loops ----------------------------------------------------------------------------------------------------------


def eager(energy: Energy, sampler: str, step_size: float) -> Implementation:
    """The sampler as research code writes it, with energy and gradient kept from step to step."""
    gradient = research_eager(energy).gradient
    loop = {LANGEVIN: eager_langevin, MALA: eager_mala, UNDERDAMPED: eager_baoab, HMC: eager_hmc}[sampler]
    return Implementation("float32, weights with gradients", lambda x, steps: loop(gradient, x, steps, step_size))


def eager_langevin(gradient: Gradient, x: Tensor, steps: int, step_size: float) -> tuple[Tensor, float]:
    for _ in range(steps):
        _, slope = gradient(x)
        x = x - step_size * slope + math.sqrt(2 * step_size) * torch.randn_like(x)
    return x, math.nan


def eager_mala(gradient: Gradient, x: Tensor, steps: int, step_size: float) -> tuple[Tensor, float]:
    (energy, slope), rate = gradient(x), 0.0
    for _ in range(steps):
        proposal = x - step_size * slope + math.sqrt(2 * step_size) * torch.randn_like(x)
        found, steeper = gradient(proposal)
        forth = (proposal - x + step_size * slope).square().sum(1) / (4 * step_size)
        back = (x - proposal + step_size * steeper).square().sum(1) / (4 * step_size)
        accepted = torch.rand_like(energy).log() < energy - found + forth - back
        x = torch.where(accepted[:, None], proposal, x)
        slope = torch.where(accepted[:, None], steeper, slope)
        energy = torch.where(accepted, found, energy)
        rate = accepted
    return x, float(torch.as_tensor(rate).float().mean())


def eager_baoab(gradient: Gradient, x: Tensor, steps: int, step_size: float) -> tuple[Tensor, float]:
    decay = math.exp(-FRICTION * step_size)
    v, (_, slope) = torch.randn_like(x), gradient(x)
    for _ in range(steps):
        v = v - step_size / 2 * slope
        x = x + step_size / 2 * v
        v = decay * v + math.sqrt(1 - decay**2) * torch.randn_like(v)
        x = x + step_size / 2 * v
        _, slope = gradient(x)
        v = v - step_size / 2 * slope
    return x, math.nan


def eager_hmc(gradient: Gradient, x: Tensor, steps: int, step_size: float) -> tuple[Tensor, float]:
    (energy, slope), rate = gradient(x), 0.0
    for _ in range(steps):
        v = torch.randn_like(x)
        before = energy + 0.5 * v.square().sum(1)
        moved, found, steeper = x, energy, slope
        for _ in range(LEAPFROGS):
            v = v - step_size / 2 * steeper
            moved = moved + step_size * v
            found, steeper = gradient(moved)
            v = v - step_size / 2 * steeper
        accepted = torch.rand_like(energy).log() < before - found - 0.5 * v.square().sum(1)
        x = torch.where(accepted[:, None], moved, x)
        slope = torch.where(accepted[:, None], steeper, slope)
        energy = torch.where(accepted, found, energy)
        rate = accepted
    return x, float(torch.as_tensor(rate).float().mean())


# torchebm -------------------------------------------------------------------------------------------------------------


def torchebm(energy: Energy, sampler: str, step_size: float) -> Implementation:
    """Its sampler on a tuned copy of the energy. Raises SkippedError where it has none, or is not installed."""
    if sampler == LANGEVIN:
        made = torchebm_langevin(energy, torch.float32)

        def langevin(x: Tensor, steps: int) -> tuple[Tensor, float]:
            return made.chain(x, Updates(((step_size, math.sqrt(2 * step_size)),) * steps, None)), math.nan

        return Implementation(made.variant, langevin)
    if sampler != HMC:
        raise SkippedError(f"torchebm has no {sampler}")
    try:
        from torchebm.core import BaseModel
        from torchebm.samplers import HamiltonianMonteCarlo
    except ImportError as error:
        raise SkippedError(f"torchebm can't be imported: {error}") from error

    net = tuned_copy(energy, None)

    class Model(BaseModel):
        def forward(self, x: Tensor) -> Tensor:
            return net(x).reshape(len(x))

    hmc = HamiltonianMonteCarlo(Model(device="cpu"), step_size, LEAPFROGS, device="cpu")
    return Implementation("float32, frozen", lambda x, steps: (hmc.sample(x=x.clone(), n_steps=steps), math.nan))


# fastebm --------------------------------------------------------------------------------------------------------------


def ours(energy: Energy, sampler: str, step_size: float) -> Implementation:
    made: Any
    if sampler == LANGEVIN:
        made = fastebm.Langevin(energy, step_size, math.sqrt(2 * step_size))
    elif sampler == MALA:
        made = fastebm.MALA(energy, step_size)
    elif sampler == UNDERDAMPED:
        made = fastebm.Underdamped(energy, step_size, FRICTION)
    else:
        made = fastebm.HMC(energy, step_size, LEAPFROGS)
    return Implementation("", lambda x, steps: (made.sample(x, steps, seed=0), math.nan))


def accepted_by_ours(energy: Energy, sampler: str, step_size: float, x: Tensor) -> float:
    """The share of accepted proposals after some steps from x."""
    made = fastebm.MALA(energy, step_size) if sampler == MALA else fastebm.HMC(energy, step_size, LEAPFROGS)
    _, info = made.step(made.advance(made.init(x, seed=0), 20))
    return float(info.accepted.float().mean())


# Correctness ----------------------------------------------------------------------------------------------------------


@functools.cache
def wrong(make: Callable[..., Implementation], sampler: str) -> str:
    """What is wrong with an implementation's moments of a normal distribution; "" where they are right.

    Unadjusted Langevin has the variance 1 / (1 - step_size / 2), all others 1.
    """
    step_size, chains = NORMAL.step_size(sampler), 20_000
    torch.manual_seed(0)
    made = make(NORMAL.build(), sampler, step_size)
    x, _ = made.chain(torch.randn(chains, NORMAL.dim), 40)
    variance = 1 / (1 - step_size / 2) if sampler == LANGEVIN else 1.0
    count = x.numel()
    mean, second = float(x.double().mean()), float(x.double().square().mean())
    if abs(mean) > FAR * math.sqrt(variance / count):
        return f"wrong: mean {mean:.3g} of a normal distribution"
    if abs(second - variance) > FAR * variance * math.sqrt(2 / count):
        return f"wrong: variance {second:.4g} of a normal distribution, where it is {variance:.4g}"
    return ""


def checked_acceptance(energy: Energy, sampler: str, step_size: float, x: Tensor, loop: Implementation) -> str:
    """A note of what ours and the eager loop accept. Raises ValueError where they differ, or nothing or all is."""
    mine = accepted_by_ours(energy, sampler, step_size, x)
    _, theirs = loop.chain(x, 21)
    error = FAR * math.sqrt(2 * 0.25 / len(x))
    if not 0.1 < mine < 1 or abs(mine - theirs) > error:
        raise ValueError(f"accepts {mine:.3f}, the eager loop {theirs:.3f}")
    return f"accepts {mine:.2f}"


# Measurement ----------------------------------------------------------------------------------------------------------


def measure(case: Case, sampler: str, chains: int, seconds: float, clock: Clock) -> list[Row]:
    """The rows of one cell, that of fastebm first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        energy = case.build()
        x = 0.7 * torch.randn(chains, case.dim)
    step_size = case.step_size(sampler)
    loop = eager(energy, sampler, step_size)
    note = checked_acceptance(energy, sampler, step_size, x[:10_000], loop) if sampler in (MALA, HMC) else ""
    loop.chain(x, 1)
    each = seconds_of(lambda: loop.chain(x, 2), clock) / 2
    if each < CHAIN_SECONDS:  # else it makes the fewest steps anyhow
        each = min(each, *(seconds_of(lambda: loop.chain(x, 2), clock) / 2 for _ in range(3)))
    steps = min(MOST, max(FEWEST, round(CHAIN_SECONDS / max(1e-6, each))))

    def row(baseline: str, variant: str, note: str) -> Row:
        name = f"{sampler}: {case.name}"
        return Row(SUITE, name, baseline, variant, (case.dim,), "float32", chains, "step", note=note)

    rows, cases = [], {}
    for name, make in ((OURS, ours), (RESEARCH, eager), (TORCHEBM, torchebm)):
        try:
            made = make(energy, sampler, step_size)
            fault = wrong(make, sampler)
            if not fault:
                made.chain(x, steps)
        except SkippedError as why:
            fault = f"skipped: {why}"
        except Exception as failure:  # what can't run is a result
            fault = reason(failure)
        if fault:
            rows.append(row(name, "", fault))
        else:
            cases[name] = lambda made=made: made.chain(x, steps)
            rows.append(row(name, made.variant, f"{steps} steps a chain" + (f", {note}" if note else "")))
    return timed(rows, cases, steps, seconds, clock)


def seconds_of(call: Callable[[], Any], clock: Clock) -> float:
    begun = clock()
    call()
    return clock() - begun


def timed(
    rows: Sequence[Row], cases: dict[str, Callable[[], Any]], steps: int | dict[str, int], seconds: float, clock: Clock
) -> list[Row]:
    """The rows with times of a step: of cases that are named as the rows' baselines, and make so many steps."""
    times = interleaved(
        cases, ROUNDS, "cpu", slice_seconds=CHAIN_SECONDS / 2, budget_seconds=seconds, warm=True, clock=clock
    )
    count = steps if isinstance(steps, dict) else dict.fromkeys(cases, steps)
    each = {name: [value / count[name] for value in values] for name, values in times.items()}
    if OURS not in each:
        return list(rows)
    return [one.with_values(each[one.baseline], each[OURS]) if one.baseline in each else one for one in rows]


LANGEVIN_OF_OURS = "our own Langevin"
UPDATE_OF_CHAINS = "one update of the chains"


def against_langevin(shape: tuple[int, ...], chains: int, dtype: str, seconds: float, clock: Clock) -> list[Row]:
    """A step of MALA on CF-EBM, and a step of our own Langevin on it."""
    work = Workload("chains", "CF-EBM", shape, chains, dtype)
    net, x, steps = nets.build("CF-EBM", shape, "cpu"), images(work), 4
    mala = fastebm.MALA(net, 1e-5, dtype=work.precision)
    langevin = fastebm.Langevin(net, STEP_SIZE, NOISE_STD, clamp=(-1, 1), dtype=work.precision)
    _, info = mala.step(mala.init(x, seed=0))
    row = Row(SUITE, "MALA: CF-EBM", OURS, "", shape, dtype, chains, "step")
    rows = [
        dataclasses.replace(row, note=f"accepts {float(info.accepted.float().mean()):.2f}"),
        dataclasses.replace(row, baseline=LANGEVIN_OF_OURS),
    ]
    states = {OURS: mala.init(x, seed=0), LANGEVIN_OF_OURS: langevin.init(x, seed=0)}
    makers: dict[str, Any] = {OURS: mala, LANGEVIN_OF_OURS: langevin}

    def advance(name: str) -> Callable[[], None]:
        def go() -> None:
            states[name] = makers[name].advance(states[name], steps)

        go()
        return go

    return timed(rows, {name: advance(name) for name in makers}, steps, seconds, clock)


def replay_buffer(shape: tuple[int, ...], chains: int, dtype: str, seconds: float, clock: Clock) -> list[Row]:
    """A draw and its write back, and one update of the chains, as `benchmarks/end_to_end/test_replay_buffer.py` has it
    under pytest."""
    work = Workload("replay_buffer", "CF-EBM", shape, chains, dtype, num_steps=60)
    net, steps = nets.build("CF-EBM", shape, "cpu"), 4
    sampler = fastebm.Langevin(net, STEP_SIZE, NOISE_STD, clamp=(-1, 1), dtype=work.precision)
    state, cycle = sampler.init(images(work), seed=0), buffer_cycle(work, torch.uint8)
    row = Row(SUITE, "ReplayBuffer: draw and put", OURS, "uint8", shape, dtype, chains, "draw and write back")
    rows = [row, dataclasses.replace(row, baseline=UPDATE_OF_CHAINS, variant="CF-EBM, Langevin")]

    def update() -> None:
        nonlocal state
        state = sampler.advance(state, steps)

    cycle()
    update()
    return timed(rows, {OURS: cycle, UPDATE_OF_CHAINS: update}, {OURS: 1, UPDATE_OF_CHAINS: steps}, seconds, clock)


def line(rows: Sequence[Row]) -> str:
    """A measured cell in a line."""
    mine, *others = rows
    each = f"failed: {mine.note}" if mine.median is None else f"{mine.median * 1e6:12.1f} us"
    ratios = "  ".join(
        f"{row.baseline} {row.ratio:.2f}x" if row.ratio is not None else f"({row.baseline}: {row.note})"
        for row in others
    )
    return f"{mine.case:42} {mine.batch:7} {each}  {ratios}  {mine.note}"


def summary(rows: Sequence[Row]) -> str:
    """Geometric means over each peer, and the number of lost cells."""
    lines = []
    for name in (RESEARCH, TORCHEBM):
        found = [row.ratio for row in rows if row.baseline == name and row.ratio is not None]
        if found:
            lost = sum(ratio < 1 for ratio in found)
            mean = statistics.geometric_mean(found)
            lines.append(f"over {name}: geometric mean {mean:.2f}x of {len(found)} cells, {lost} below 1x")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="only cases whose names begin so; 'images' are the two last tables")
    parser.add_argument("--samplers", default=",".join(SAMPLERS), help="with commas between")
    parser.add_argument("--chains", default="1000,100000", help="numbers of chains, with commas between")
    parser.add_argument("--threads", type=int, default=None, help="of PyTorch and of fastebm")
    parser.add_argument("--seconds", type=float, default=6.0, help="for the rounds of a cell; there are 3 at least")
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of wall time, for one thread")
    parser.add_argument("--out", type=Path, default=None, help="a .json file that gets the rows; others stay in it")
    given = parser.parse_args(arguments)
    samplers = given.samplers.split(",")
    if unknown := set(samplers) - {*SAMPLERS}:
        raise SystemExit(f"--samplers: there is no {', '.join(sorted(unknown))}; there are {', '.join(SAMPLERS)}")
    chosen = [case for case in CASES if case.name.startswith(given.cases)]
    if not chosen and given.cases != "images":
        names = "; ".join(case.name for case in CASES)
        raise SystemExit(f"--cases: there is no {given.cases}; there are {names}; images")
    try:
        counts = [int(part) for part in given.chains.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise SystemExit(f"--chains must be positive whole numbers with commas between, got {given.chains!r}")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    clock: Clock = time.process_time if given.cpu_time else time.perf_counter
    facts = machine_facts("cpu") | {"clock": "processor" if given.cpu_time else "wall"}
    cells: list[Callable[[], list[Row]]] = [
        lambda case=case, sampler=sampler, chains=chains: measure(case, sampler, chains, given.seconds, clock)
        for case in chosen
        for sampler in samplers
        for chains in counts
    ]
    if given.cases in ("", "images"):
        shape, chains = (3, 32, 32), 64
        cells += [
            *(
                lambda dtype=dtype: against_langevin(shape, chains, dtype, 3 * given.seconds, clock)
                for dtype in ("float32", "bfloat16")
            ),
            lambda: replay_buffer(shape, chains, "bfloat16", given.seconds, clock),
        ]
    rows: list[Row] = []
    for cell in cells:
        fresh = cell()
        print(line(fresh), flush=True)
        rows += fresh
        if given.out is not None:  # at once, so that an interrupted run keeps its finished rows
            record(given.out, Run(facts, tuple(fresh)))
    print(summary(rows))


if __name__ == "__main__":
    main()
