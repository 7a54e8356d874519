"""The time of chains by two processes of one thread, against one process of one and of two threads.

    torchrun --nproc-per-node 2 -m benchmarks.scaling.bench_chains                 some 2 minutes on two cores
    ... --out benchmarks/results/MACHINE/scaling.json                              keeps the rows

All run in the same two processes, in rounds, in a random order in each: of a case for one process, the other one waits.
The samples are compared first, and have to be equal to the last bit. Two more rows are parts of the time by two
processes: `waiting` until the other one is done too, and `exchange`, the gather of all samples on both.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastebm
from benchmarks.harness import nets
from benchmarks.harness.workloads import NOISE_STD, STEP_SIZE, Workload, images
from fastebm.distributed import Ranks, launched
from fastebm.evaluation.speed import Row, Run, machine_facts, record
from fastebm.evaluation.speed.rows import OURS

SUITE = "scaling"
ONE_THREAD, TWO_THREADS = "1 process, 1 thread", "1 process, 2 threads"
WAITING, EXCHANGE = "waiting", "exchange"
CASES = (
    Workload("chains", "CF-EBM", (3, 32, 32), 64, "bfloat16", 20),
    Workload("chains", "CF-EBM", (3, 32, 32), 64, "float32", 20),
    Workload("chains", "CF-EBM", (3, 64, 64), 16, "bfloat16", 20),
    Workload("chains", "wide residual 28-2", (3, 32, 32), 16, "float32", 10),
)


class Chains:
    """The chains of a case, as each of the processes runs them."""

    def __init__(self, work: Workload, ranks: Ranks) -> None:
        net = nets.build(work.case, work.shape, "cpu")
        self.sampler = fastebm.Langevin(net, STEP_SIZE, NOISE_STD, clamp=(-1, 1), dtype=work.precision)
        self.work, self.ranks, self.starts = work, ranks, images(work)

    def sample(self, rows: range) -> Tensor:
        return self.sampler.sample(self.starts[rows.start : rows.stop], self.work.num_steps, 0, chain_ids=rows.start)

    def alone(self, threads: int) -> tuple[Tensor | None, dict[str, float]]:
        """By rank 0, while the other one waits for the next round."""
        if not self.ranks.first:
            return None, {}
        torch.set_num_threads(threads)
        began = time.perf_counter()
        ends = self.sample(range(self.work.batch))
        seconds = time.perf_counter() - began
        torch.set_num_threads(1)
        return ends, {ONE_THREAD if threads == 1 else TWO_THREADS: seconds}

    def together(self) -> tuple[Tensor, dict[str, float]]:
        began = time.perf_counter()
        own = self.sample(self.ranks.share(self.work.batch))
        done = time.perf_counter()
        self.ranks.barrier()
        all_done = time.perf_counter()
        ends = self.ranks.gather(own, self.work.batch)
        end = time.perf_counter()
        return ends, {OURS: end - began, WAITING: all_done - done, EXCHANGE: end - all_done}


def measure(work: Workload, ranks: Ranks, rounds: int) -> list[Row]:
    """The rows of a case, on rank 0. Raises SystemExit where the samples differ."""
    chains = Chains(work, ranks)
    ways: list[Any] = [lambda: chains.alone(1), lambda: chains.alone(2), chains.together]
    ends = [way()[0] for way in ways]  # which also captures the energy, once in each process
    if ranks.first and not all(torch.equal(found, ends[0]) for found in ends if found is not None):
        raise SystemExit(f"{work.name}: two processes give other samples than one")
    order, times = list(ways), {name: [] for name in (OURS, ONE_THREAD, TWO_THREADS, WAITING, EXCHANGE)}
    shuffle = random.Random(0).shuffle  # the same order in both processes
    for _ in range(rounds):
        shuffle(order)
        for way in order:
            ranks.barrier()
            for name, seconds in way()[1].items():
                times[name].append(seconds)
    if not ranks.first:
        return []
    variants = {OURS: "2 processes, 1 thread each", WAITING: "part of the time", EXCHANGE: "part of the time"}
    sent = (
        f"{4 * ends[0][0].numel() * work.batch:,} bytes gathered, {work.num_steps} steps, load {os.getloadavg()[0]:.1f}"
    )
    return [
        Row(SUITE, work.case, name, variants.get(name, ""), work.shape, work.dtype, work.batch, "call").with_values(
            values, times[OURS]
        )
        if name != OURS
        else Row(
            SUITE, work.case, name, variants[name], work.shape, work.dtype, work.batch, "call", note=sent
        ).with_values(values, values)
        for name, values in times.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=None, help="a .json file that gets the rows; others stay in it")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with launched() as ranks:
        if ranks.size != 2:
            raise SystemExit("two processes are needed: torchrun --nproc-per-node 2 -m benchmarks.scaling.bench_chains")
        facts = machine_facts("cpu") | {"clock": "wall"}
        for work in CASES:
            rows = measure(work, ranks, given.rounds)
            for row in rows:
                print(
                    f"{work.name:50} {row.baseline:22} {row.median:.4f} s, {row.ratio:.4f} of two processes", flush=True
                )
            if rows and given.out is not None:
                record(given.out, Run(facts, tuple(rows)))
            ranks.barrier()


if __name__ == "__main__":
    main()
