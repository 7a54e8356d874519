"""What writing costs: images a second of `fastebm generate` beside the bare sampler of the same run.

    python -m benchmarks.studies.generate RUN docs/results/generate [--count 512] [--processes 1 2]

All ways draw the same samples in the same chunks, in one process, interleaved; those with several processes start
these in every call, as a user's call does. The bare sampler is `cascade.sample` of a run that is loaded already, whose
samples go nowhere; a second row loads the run each time, as `generate` has to. What a call takes for that, and to start
processes, is the same for any count: with few samples it weighs more. CPU threads are shared by the processes. Numbers
are kept in the run's name and fill its table of the page.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.readme_sections import fill
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.evaluation.speed.measurement import Summary, interleaved, ratios
from fastebm.runs.files import write_json
from fastebm.tasks import generate
from fastebm.training import CoarseToFineRun

BARE = "`cascade.sample` alone"
OUTPUTS = {"to a folder": "", "to .npz": ".npz"}


def drawn(run: CoarseToFineRun, count: int, chunk: int) -> None:
    """The samples of `generate`, in its chunks, which go nowhere."""
    cascade, config = run.cascade(), run.config
    for first in range(0, count, chunk):
        chains = config.total_chains + first
        cascade.sample(min(chunk, count - first), config.seed, chains, channels=config.channels)


def cases(
    run: CoarseToFineRun, count: int, chunk: int, processes: Sequence[int], device: str, folder: Path
) -> dict[str, Callable[[], Any]]:
    """What draws `count` samples, by name; each call of `generate` writes to a place of its own below `folder`."""
    numbers = itertools.count()

    def written(ending: str, workers: int) -> Callable[[], Any]:
        def call() -> Any:
            out = folder / f"{next(numbers)}{ending}"
            return generate(run.path, count, out, processes=workers, chunk=chunk, device=device)

        return call

    found: dict[str, Callable[[], Any]] = {
        BARE: lambda: drawn(run, count, chunk),
        "the same, the run loaded anew": lambda: drawn(CoarseToFineRun.load(run.path, device), count, chunk),
    }
    for workers, (name, ending) in itertools.product(processes, OUTPUTS.items()):
        found[f"`generate` {name}, {workers} process{'es' if workers > 1 else ''}"] = written(ending, workers)
    return found


def measured(
    run: CoarseToFineRun, count: int, chunk: int, processes: Sequence[int], rounds: int, device: str
) -> list[dict[str, Any]]:
    """A row for each way."""
    with tempfile.TemporaryDirectory() as folder:
        ways = cases(run, count, chunk, processes, device, Path(folder))
        # A first call of each is made by what estimates its time; after that one a round, however short.
        times = interleaved(ways, rounds, device, slice_seconds=1e-9, warm=True)
    rows = []
    for name, values in times.items():
        speed, ratio = Summary.of([count / value for value in values]), Summary.of(ratios(values, times[BARE]))
        rows.append(
            {
                "way": name,
                "images_per_second": speed.median,
                "images_per_second_low": speed.low,
                "images_per_second_high": speed.high,
                "ratio": ratio.median,
                "ratio_low": ratio.low,
                "ratio_high": ratio.high,
                "seconds": values,
            }
        )
    return rows


def table(found: dict[str, Any]) -> str:
    machine = found["machine"]
    head = (
        f"{found['count']:,} samples a call, {found['channels']}x{found['size']}x{found['size']}, "
        f"{found['levels']} levels of {found['steps']} steps, in chunks of {found['chunk']}; {machine['name']}, "
        f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''} of {machine['cores']} cores, "
        f"{found['rounds']} rounds."
    )
    lines = [
        head,
        "",
        "| way | images a second (20 to 80 %) | time over the bare sampler (20 to 80 %) |",
        "|---|---:|---:|",
    ]
    for row in found["rows"]:
        cells = [
            f"{row[name]:.{digits}g} ({row[f'{name}_low']:.{digits}g} to {row[f'{name}_high']:.{digits}g})"
            for name, digits in {"images_per_second": 4, "ratio": 3}.items()
        ]
        lines.append(f"| {' | '.join([row['way'], *cells])} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=64, help="smaller than that of generate: all processes get some")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    given = parser.parse_args(arguments)
    run, name = CoarseToFineRun.load(given.run, given.device), given.run.resolve().name
    found = {
        "run": name,
        "iteration": run.iteration,
        "size": run.size,
        "channels": run.config.channels,
        "levels": len(run.levels),
        "num_steps": run.config.num_steps,
        "count": given.count,
        "chunk": given.chunk,
        "rounds": given.rounds,
        "machine": machine_facts(given.device),
        "rows": measured(run, given.count, given.chunk, given.processes, given.rounds, given.device),
    }
    given.page.mkdir(parents=True, exist_ok=True)
    write_json(given.page / f"{name}.json", found)
    fill(given.page / "README.md", "Generate", name, Path(__file__).name, table(found))


if __name__ == "__main__":
    main()
