"""The workloads of the suites: each has a name of its own and known nets, and can be run more than once."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.harness import nets
from benchmarks.harness.workloads import Workload, ours

ROOT = Path(__file__).resolve().parents[3]
SUITES = sorted(f"{path.parent.name}.{path.stem}" for path in (ROOT / "benchmarks").glob("*/test_*.py"))


def workloads(suite: str, device: str, full: bool) -> Sequence[Workload]:
    return import_module(f"benchmarks.{suite}").workloads(device, full)


@pytest.mark.parametrize("suite", SUITES)
def test_workloads_have_names_of_their_own_and_known_nets(suite: str) -> None:
    for device in ("cpu", "cuda"):
        for full in (False, True):
            found = workloads(suite, device, full)
            names = [work.name for work in found]
            assert len(set(names)) == len(names) > 0
            assert {work.suite for work in found} == {suite.partition(".test_")[2]}
            energies = suite.startswith("end_to_end")
            assert not energies or {work.case for work in found} <= set(nets.NETS)
            assert all(work == Workload.from_json(work.to_json()) for work in found)


TINY = {
    "energy_gradient": Workload("energy_gradient", "UvA tutorial", (1, 28, 28), 2, "float32", num_steps=2),
    "chains": Workload("chains", "CF-EBM", (1, 8, 8), 2, "bfloat16", num_steps=2),
    "cascade": Workload("cascade", "CF-EBM", (1, 16, 16), 2, "bfloat16", num_steps=1),
    "training": Workload("training", "CF-EBM", (1, 16, 16), 2, "bfloat16", num_steps=1),
    "replay_buffer": Workload("replay_buffer", "CF-EBM", (1, 2, 2), 64, "bfloat16"),
    "langevin": Workload("langevin", "noise", (1, 4, 4), 2, "float32"),
    "block_tail": Workload("block_tail", "channels-last, forward and backward", (4, 4, 4), 2, "float32"),
    "expand_blend": Workload("expand_blend", "scalar beta", (4, 4, 4), 2, "float32"),
    "normal": Workload("normal", "float32", (1, 4, 4), 2, "float32"),
    "uniform": Workload("uniform", "float32", (1, 4, 4), 2, "float32"),
    "underdamped": Workload("underdamped", "BAOAB", (1, 4, 4), 2, "float32"),
    "mala": Workload("mala", "step", (1, 4, 4), 2, "float32"),
}


@pytest.mark.parametrize("name", TINY)
def test_ours_runs_more_than_once(name: str) -> None:
    run = ours(TINY[name])
    run()
    run()
