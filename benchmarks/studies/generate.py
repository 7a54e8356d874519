"""The cost of writing samples: images a second of `fastebm generate` beside the bare sampler of the same run.

    python -m benchmarks.studies.generate RUN [--count 512] [--processes 1 2]

All methods draw the same samples in the same chunks, in one process, interleaved; those with several processes start
these in every call, as a user's call does. The bare sampler is `cascade.sample` of a run that is loaded already, whose
samples are thrown away; a second row loads the run each time, as `generate` has to. Loading and starting processes take
the same time for any count, so they weigh more with few samples. CPU threads are shared by the processes. The numbers
become the entry of the run's name on the page.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.pages import RESULTS, add_entry, each, generate_table
from benchmarks.harness.throughput import throughput_rows
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.evaluation.speed.measurement import interleaved
from fastebm.tasks import generate
from fastebm.training import CoarseToFineRun

BARE = "`cascade.sample` alone"
OUTPUTS = {"to a folder": "", "to .npz": ".npz"}


def draw(run: CoarseToFineRun, count: int, chunk: int) -> None:
    """Draws the samples of `generate`, in its chunks, and throws them away."""
    cascade, config = run.cascade(), run.config
    for first in range(0, count, chunk):
        chains = config.total_chains + first
        cascade.sample(min(chunk, count - first), config.seed, chains, channels=config.channels)


def cases(
    run: CoarseToFineRun, count: int, chunk: int, processes: Sequence[int], device: str, folder: Path
) -> dict[str, Callable[[], Any]]:
    """What draws `count` samples, by name; each call of `generate` writes to a place of its own below `folder`."""
    numbers = itertools.count()

    def writer(ending: str, workers: int) -> Callable[[], Any]:
        def call() -> Any:
            out = folder / f"{next(numbers)}{ending}"
            return generate(run.path, count, out, processes=workers, chunk=chunk, device=device)

        return call

    found: dict[str, Callable[[], Any]] = {
        BARE: lambda: draw(run, count, chunk),
        "the same, the run loaded anew": lambda: draw(CoarseToFineRun.load(run.path, device), count, chunk),
    }
    for workers, (name, ending) in itertools.product(processes, OUTPUTS.items()):
        found[f"`generate` {name}, {workers} process{'es' if workers > 1 else ''}"] = writer(ending, workers)
    return found


def measure(
    run: CoarseToFineRun, count: int, chunk: int, processes: Sequence[int], rounds: int, device: str
) -> list[dict[str, Any]]:
    """A row for each method."""
    with tempfile.TemporaryDirectory() as folder:
        methods = cases(run, count, chunk, processes, device, Path(folder))
        # `interleaved` makes a first call of each to estimate its time; after that one call a round, however short.
        return throughput_rows(interleaved(methods, rounds, device, slice_seconds=1e-9, warm=True), count)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a coarse-to-fine run")
    parser.add_argument("--page", type=Path, default=RESULTS / "generate")
    parser.add_argument("--count", type=int, default=512, help="samples of each call")
    parser.add_argument("--chunk", type=int, default=64, help="samples of a chunk; all processes need some")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes to measure")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the measurement")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args(arguments)
    run, name = CoarseToFineRun.load(options.run, options.device), options.run.resolve().name
    entry = {
        "run": name,
        "iteration": run.iteration,
        "size": run.size,
        "channels": run.config.channels,
        "levels": len(run.levels),
        "num_steps": run.config.num_steps,
        "count": options.count,
        "chunk": options.chunk,
        "rounds": options.rounds,
        "machine": machine_facts(options.device),
        "rows": measure(run, options.count, options.chunk, options.processes, options.rounds, options.device),
    }
    add_entry(options.page, name, entry, each(generate_table))


if __name__ == "__main__":
    main()
