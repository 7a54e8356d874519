"""How the benchmarks measure: every case of a comparison in one process, interleaved, medians and ratios.

    pytest benchmarks                      run and print tables
    pytest benchmarks --save RESULT.json   also write the raw figures with machine, versions and commit
    pytest benchmarks --rounds 30          more rounds

A shared machine drifts, so that times of two cases are only comparable within one round: a round runs every case once,
in an order that is shuffled anew, and the ratio quoted is the median of the rounds' ratios.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastebm
from fastebm.ops import backends

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save", type=Path, default=None, help="write the raw figures to this JSON file")
    parser.addoption("--rounds", type=int, default=20, help="rounds of a comparison (each runs every case once)")
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")


def machine() -> dict[str, Any]:
    """What the figures hang on: device, versions, commit."""

    def output(*command: str) -> str:
        run = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
        return run.stdout.strip()

    cpu = next(
        (line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")), platform.processor()
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": output("git", "rev-parse", "HEAD") + ("+changes" if output("git", "status", "--porcelain") else ""),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastebm": fastebm.__version__,
        "operators": {key: str(value) for key, value in backends.report().items() if "extension" not in key},
    }


def _cpu_lines() -> list[str]:
    information = Path("/proc/cpuinfo")
    return information.read_text().splitlines() if information.exists() else []


def _seconds(case: Callable[[], Any], repeats: int, device: str) -> float:
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            case()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        case()
    return (time.perf_counter() - start) / repeats


def interleaved(
    cases: dict[str, Callable[[], Any]], rounds: int, device: str, slice_seconds: float = 0.02
) -> dict[str, list[float]]:
    """Seconds of each case in each round. A case is repeated within a round until about `slice_seconds` have passed."""
    repeats = {}
    for name, case in cases.items():
        case()  # compiles, allocates
        case()
        repeats[name] = max(
            1, min(1000, int(slice_seconds / max(1e-7, min(_seconds(case, 1, device) for _ in range(3)))))
        )
    times: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(_seconds(cases[name], repeats[name], device))
    return times


class Comparison:
    """One table: cases against the first one, which is ours."""

    def __init__(self, rounds: int, device: str, records: list[dict[str, Any]]) -> None:
        self.rounds, self.device, self.records = rounds, device, records

    def __call__(self, title: str, cases: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Measure, print, record; returns each case's time over the first case's (median of the rounds' ratios)."""
        times = interleaved(cases, self.rounds, self.device)
        ours = next(iter(cases))
        ratios = {
            name: statistics.median(t / o for t, o in zip(times[name], times[ours], strict=True)) for name in cases
        }
        print(f"\n{title}  [{self.device}, {self.rounds} rounds]")
        for name, values in times.items():
            low, middle, high = (
                statistics.quantiles(values, n=10)[0],
                statistics.median(values),
                statistics.quantiles(values, n=10)[-1],
            )
            print(
                f"  {name:58s} {middle * 1e6:12.1f} us  (p10 {low * 1e6:.1f}, p90 {high * 1e6:.1f})"
                f"   {ratios[name]:7.2f} x ours"
            )
        self.records.append(
            {"title": title, "device": self.device, "ours": ours, "seconds": times, "ratio_to_ours": ratios}
        )
        return ratios


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORDS] = []


_RECORDS = pytest.StashKey[list]()


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def compare(request: pytest.FixtureRequest, device: str) -> Comparison:
    return Comparison(request.config.getoption("--rounds"), device, request.config.stash[_RECORDS])


def pytest_sessionfinish(session: pytest.Session) -> None:
    path, records = session.config.getoption("--save"), session.config.stash[_RECORDS]
    if path is None or not records:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = path.with_name(path.name + ".new")
    waiting.write_text(json.dumps({"machine": machine(), "comparisons": records}, indent=1) + "\n")
    os.replace(waiting, path)
    print(f"\nwritten: {path}")
