"""Langevin chains of every energy of the gallery, by fastebm and by the loops that people have, interleaved.

    python -m benchmarks.energies.bench_energies                                  all: some 12 minutes on two cores
    python -m benchmarks.energies.bench_energies --kinds physics --batches 1,64   a part
    python -m benchmarks.energies.bench_energies --busy                           beside a busy process on each core
    python -m benchmarks.energies.bench_energies --out benchmarks/results/cpu-avx512/energies.json    keeps the rows

Peers are the eager loop of research code, whose weights require gradients, the same tuned (weights frozen and folded,
updates in place, the faster of two layouts of images), with --compile `torch.compile` of the gradient, and torchebm
where it is installed. All run in one process and in turns. Ratios are times over that of fastebm: above 1 it is faster.
Lost comparisons and wrong gradients stay in the rows.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch._dynamo
from torch import Generator, Tensor, nn

import fastebm
from benchmarks.energies import GALLERY, Entry, true_gradient
from benchmarks.energies.entry import Energy, engine_of
from fastebm.evaluation.speed import Row, Run, Updates, machine_facts, record
from fastebm.evaluation.speed.baselines import (
    RESEARCH,
    TORCH_COMPILE,
    TORCHEBM,
    TUNED,
    Baseline,
    SkippedError,
    research_eager,
    torch_compile_gradient,
    torchebm_langevin,
    tuned_eager,
)
from fastebm.evaluation.speed.comparison import reason, relative_error
from fastebm.evaluation.speed.eager import module_of
from fastebm.evaluation.speed.measurement import Clock, interleaved
from fastebm.evaluation.speed.rows import OURS

SUITE = "energies"
# Only the first samples of a batch are verified: all are computed alike, and float64 is slow.
VERIFIED = 16
# A chain takes about this long by the eager loop, within these numbers of updates.
CHAIN_SECONDS = 0.02
FEWEST, MOST = 5, 200
# Rounds of a cell: more would not make its median much better, and there are hundreds of cells.
ROUNDS = 15


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a cell is measured: seconds for its rounds, whether torch.compile takes part, and the clock."""

    seconds: float
    compile: bool
    clock: Clock = time.perf_counter


def contiguous_eager(energy: Energy) -> Baseline:
    """The tuned loop on states and weights as they are, without a channels-last layout."""
    tuned = tuned_eager(energy, torch.float32)
    module = module_of(tuned.net)
    if module is not None and not any(parameter.ndim == 5 for parameter in module.parameters()):
        module.to(memory_format=torch.contiguous_format)

    def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            energies = tuned.net(x)
        return energies.detach(), torch.autograd.grad(energies.sum(), x)[0]

    def chain(x: Tensor, updates: Updates) -> Tensor:
        x, noise = x.clone(), torch.empty_like(x)
        for step_size, noise_std in updates.schedule:
            x.add_(gradient(x)[1], alpha=-step_size).add_(noise.normal_(), alpha=noise_std)
            if updates.clamp is not None:
                x.clamp_(*updates.clamp)
        return x

    return Baseline(TUNED, "float32, frozen", gradient, chain, tuned.net)


def fastest_tuned(energy: Energy, x: Tensor, updates: Updates, clock: Clock) -> Baseline:
    """The tuned loop in the layout that is faster here; channels-last is tried for nets of 2-D convolutions."""
    plain = contiguous_eager(energy)
    module = module_of(energy)
    if x.ndim != 4 or module is None or not any(isinstance(part, nn.Conv2d) for part in module.modules()):
        return plain
    try:
        last = tuned_eager(energy, torch.float32)
        last = dataclasses.replace(last, variant=f"{last.variant}, channels-last")
        times = interleaved(
            {"plain": lambda: plain.chain(x, updates), "last": lambda: last.chain(x, updates)}, 2, "cpu", clock=clock
        )
    except RuntimeError:  # such as a `view` that needs contiguous images
        return plain
    return last if min(times["last"]) < min(times["plain"]) else plain


def step_seconds(baseline: Baseline, x: Tensor, entry: Entry, clock: Clock) -> float:
    """The time of one update by a baseline that has run before."""
    updates = Updates(((entry.step_size, entry.noise_std),) * 2, entry.clamp)
    baseline.chain(x, updates)
    start = clock()
    baseline.chain(x, updates)
    return (clock() - start) / 2


def measure(entry: Entry, energy: Energy, sampler: fastebm.Langevin, batch: int, settings: Settings) -> list[Row]:
    """The rows of one energy at one batch, that of fastebm first. What a peer raises becomes its note."""
    x = entry.start(batch, Generator().manual_seed(batch))
    truth = true_gradient(energy, x[:VERIFIED])
    begun = settings.clock()
    found = sampler.gradient(x)[1]
    first_use = settings.clock() - begun
    research = research_eager(energy)
    num_steps = round(CHAIN_SECONDS / step_seconds(research, x, entry, settings.clock))
    num_steps = min(MOST, max(FEWEST, num_steps))
    updates = Updates(((entry.step_size, entry.noise_std),) * num_steps, entry.clamp)

    def row(baseline: str, variant: str, note: str = "", error: float | None = None) -> Row:
        return Row(
            SUITE,
            entry.name,
            baseline,
            variant,
            entry.shape,
            "float32",
            batch,
            "step",
            "seconds",
            note=note,
            gradient_error=error,
        )

    sampler.sample(x, num_steps, seed=0)
    note = sampler.gradient.reason or f"first use {first_use:.2f} s"
    ours = row(OURS, engine_of(sampler.gradient), note, finite(relative_error(found[: len(truth)], truth)))
    rows, cases = [], {OURS: lambda: sampler.sample(x, num_steps, seed=0)}
    for name, make in peers(energy, x, updates, settings).items():
        try:
            peer = research if name == RESEARCH else make()
            error = relative_error(peer.gradient(x)[1][: len(truth)], truth)
            peer.chain(x, updates)
        except SkippedError as why:
            rows.append(row(name, "", f"skipped: {why}"))
        except Exception as failure:  # a peer that can't run is a result
            rows.append(row(name, "", reason(failure)))
        else:
            cases[name] = lambda peer=peer: peer.chain(x, updates)
            rows.append(row(name, peer.variant, f"{num_steps} updates a chain", finite(error)))
    times = interleaved(
        cases,
        ROUNDS,
        "cpu",
        slice_seconds=CHAIN_SECONDS / 2,
        budget_seconds=settings.seconds,
        warm=True,
        clock=settings.clock,
    )
    times = {name: [value / num_steps for value in values] for name, values in times.items()}
    return [
        one.with_values(times[one.baseline], times[OURS]) if one.baseline in times else one for one in (ours, *rows)
    ]


def finite(error: float) -> float | None:
    return error if math.isfinite(error) else None


def peers(energy: Energy, x: Tensor, updates: Updates, settings: Settings) -> dict[str, Callable[[], Baseline]]:
    """What makes each peer, by its name."""
    made: dict[str, Callable[[], Baseline]] = {
        RESEARCH: lambda: research_eager(energy),
        TUNED: lambda: fastest_tuned(energy, x, updates, settings.clock),
        TORCHEBM: lambda: torchebm_langevin(energy, torch.float32),
    }
    if settings.compile:
        made[TORCH_COMPILE] = lambda: torch_compile_gradient(energy, torch.float32, "cpu")
    return made


@contextlib.contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """`count` processes that do nothing but compute, for as long as the block lasts."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def chosen(names: str, kinds: str) -> list[Entry]:
    """The entries with one of these names and of one of these kinds; all where they are empty."""
    for option, given, known in (
        ("--names", names, {entry.name for entry in GALLERY}),
        ("--kinds", kinds, {entry.kind for entry in GALLERY}),
    ):
        unknown = set(filter(None, given.split(";"))) - known
        if unknown:
            raise SystemExit(
                f"{option}: there is no {', '.join(sorted(unknown))}; there are {'; '.join(sorted(known))}"
            )
    wanted, of_kinds = names.split(";") if names else None, kinds.split(";") if kinds else None
    return [
        entry
        for entry in GALLERY
        if (wanted is None or entry.name in wanted) and (of_kinds is None or entry.kind in of_kinds)
    ]


def line(rows: Sequence[Row]) -> str:
    """A measured cell in a line."""
    ours, *others = rows
    time_of_ours = "failed" if ours.median is None else f"{ours.median * 1e6:10.1f} us"
    ratios = "  ".join(f"{row.baseline} {row.ratio:.2f}x" for row in others if row.ratio is not None)
    failed = "".join(
        f"  ({row.baseline}: {row.note})" for row in others if row.ratio is None and row.baseline != TORCHEBM
    )
    error = "-" if ours.gradient_error is None else f"{ours.gradient_error:.0e}"
    return f"{ours.case:28} {ours.batch:7} {ours.variant:9} {time_of_ours}  error {error}  {ratios}{failed}"


def summary(rows: Sequence[Row]) -> str:
    """Geometric means and the number of lost cells, over research code and over tuned loops."""
    lines = []
    for name in dict.fromkeys(row.baseline for row in rows if row.baseline != OURS):
        found = [row.ratio for row in rows if row.baseline == name and row.ratio is not None]
        if found:
            lost = sum(ratio < 1 for ratio in found)
            lines.append(
                f"over {name}: geometric mean {statistics.geometric_mean(found):.2f}x of {len(found)} cells, "
                f"{lost} below 1x, worst {min(found):.2f}x"
            )
        else:
            note = next(row.note for row in rows if row.baseline == name)
            lines.append(f"over {name}: not measured: {note}")
    return "\n".join(lines)


def run(
    entries: Sequence[Entry], batches: set[int] | None, settings: Settings, out: Path | None, busy: bool
) -> list[Row]:
    """Measures entries, prints a line a cell, and keeps the rows after each entry."""
    clock = "processor" if settings.clock is time.process_time else "wall"
    facts = machine_facts("cpu") | {"clock": clock, "busy": busy}
    rows: list[Row] = []
    for entry in entries:
        energy, fresh = entry.make(), []
        torch._dynamo.reset()  # what earlier energies compiled
        sampler = fastebm.Langevin(energy, entry.step_size, entry.noise_std, clamp=entry.clamp)
        for batch in (batch for batch in entry.batches if batches is None or batch in batches):
            try:
                with busy_cores(os.cpu_count() or 1) if busy else contextlib.nullcontext():
                    cell = measure(entry, energy, sampler, batch, settings)
            except Exception as failure:  # ours can't run: a row without figures
                cell = [
                    Row(SUITE, entry.name, OURS, "failed", entry.shape, "float32", batch, "step", note=reason(failure))
                ]
            print(line(cell) if len(cell) > 1 else f"{entry.name:28} {batch:7} failed: {cell[0].note}", flush=True)
            fresh += cell
        rows += fresh
        if out is not None and fresh:  # at once, so that an interrupted run keeps its finished rows
            record(out, Run(facts, tuple(fresh)))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", default="", help="energies, with semicolons between")
    parser.add_argument("--kinds", default="", help="kinds of energies, with semicolons between")
    parser.add_argument("--batches", default="", help="only these batches, with commas between")
    parser.add_argument("--threads", type=int, default=None, help="of PyTorch and of fastebm")
    parser.add_argument("--seconds", type=float, default=0.7, help="for the rounds of a cell; there are 3 at least")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too, which takes long to compile")
    parser.add_argument("--busy", action="store_true", help="run a busy process on each core meanwhile")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="processor time instead of wall time: with --threads 1, beside other work",
    )
    parser.add_argument("--out", type=Path, default=None, help="a .json file that gets the rows; others stay in it")
    given = parser.parse_args(arguments)
    try:
        batches = {int(part) for part in given.batches.split(",")} if given.batches else None
    except ValueError:
        raise SystemExit(f"--batches must be numbers with commas between, got {given.batches!r}") from None
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    clock = time.process_time if given.cpu_time else time.perf_counter
    settings = Settings(given.seconds, given.compile, clock)
    print(summary(run(chosen(given.names, given.kinds), batches, settings, given.out, given.busy)))


if __name__ == "__main__":
    main()
