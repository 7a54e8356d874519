"""Options and fixtures of the benchmark suites.

    pytest benchmarks                                a small subset for this device, as one table at the end
    pytest benchmarks --full                         everything
    pytest benchmarks --save benchmarks/results      also write the rows, to <machine>/<suite>.json there
    pytest benchmarks --base main                    ours against ours at another revision; fails where it is slower

A suite lists its workloads in `workloads(device, full)`. The measuring code is `fastebm.evaluation.speed`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness.compare_revisions import Base, check_regression
from benchmarks.harness.workloads import Workload, ours
from fastebm.compiler.cost_model import Cost
from fastebm.evaluation.speed import Candidate, Plan, Row, Run, compare, machine_facts, printed, record


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save", type=Path, default=None, help="write rows to <machine>/<suite>.json in this folder")
    parser.addoption("--rounds", type=int, default=20, help="rounds of a comparison (each runs every case once)")
    parser.addoption("--budget", type=float, default=10.0, help="seconds for a comparison's rounds, 3 at least")
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.addoption("--engine", default="fused", help="of our gradients: fused (fails without a program) or auto")
    parser.addoption("--full", action="store_true", help="all nets, batches and precisions")
    parser.addoption("--base", default=None, help="a git revision: compare ours with ours there, without baselines")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "work" in metafunc.fixturenames:
        option = metafunc.config.getoption
        found = metafunc.module.workloads(option("--device"), option("--full"))
        found = [dataclasses.replace(work, engine=option("--engine"), device=option("--device")) for work in found]
        metafunc.parametrize("work", found, ids=lambda work: work.name)


@pytest.fixture(scope="session")
def base(request: pytest.FixtureRequest) -> Iterator[Base | None]:
    revision = request.config.getoption("--base")
    if revision is None:
        yield None
        return
    with Base.built(revision, request.config.getoption("--device")) as built:
        yield built


class Measure:
    """Measures one workload against baselines, or against another revision where `--base` gives one."""

    def __init__(self, config: pytest.Config, base: Base | None) -> None:
        self.config = config
        self.base = base

    def __call__(self, work: Workload, compared: Callable[[Workload, Plan], list[Row]]) -> None:
        """`compared` measures against the baselines by a plan."""
        if self.base is not None:
            self._against_base(work, self.base)
            return
        try:
            rows = compared(work, self.plan(work))
        except RuntimeError as refusal:
            if work.engine != "fused" or "no fused program exists" not in str(refusal):
                raise
            # The case stays in the table, by the engine that runs instead and with the reason.
            work = dataclasses.replace(work, engine="auto")
            rows = compared(work, self.plan(work))
            rows[0] = dataclasses.replace(rows[0], note=str(refusal))
        self._record(work, rows)

    def operator(self, work: Workload, baselines: Mapping[str, Callable[[], Any]], bytes_moved: int) -> None:
        """Measures an operator against the same in PyTorch; its roofline is `bytes_moved` a sample at a copy's rate."""
        candidates = {name: [lambda run=run: Candidate("", run)] for name, run in baselines.items()}

        def compared(work: Workload, plan: Plan) -> list[Row]:
            return compare(plan, Candidate("", ours(work)), candidates, unit="call", cost=lambda: Cost(0, bytes_moved))

        self(work, compared)

    def plan(self, work: Workload) -> Plan:
        option = self.config.getoption
        return Plan(
            work.suite,
            work.case,
            work.shape,
            work.batch,
            work.precision,
            work.engine,
            work.device,
            option("--rounds"),
            option("--budget"),
            log=lambda line: print(line, flush=True),
        )

    def _record(self, work: Workload, rows: list[Row]) -> None:
        self.config.stash[_ROWS].extend(rows)
        folder, facts = self.config.getoption("--save"), self.config.stash[_MACHINE]
        if folder is not None:  # at once, so that an interrupted run keeps its finished rows
            record(folder / facts["name"] / f"{work.suite}.json", Run(facts, tuple(rows)))

    def _against_base(self, work: Workload, base: Base) -> None:
        option = self.config.getoption
        now, before = base.measure(work, option("--rounds"), option("--budget"))
        found = check_regression(now, before)
        line = f"{work.suite}: {work.name}: {found}"
        self.config.stash[_LINES].append(line)
        if found.regressed:
            pytest.fail(line, pytrace=False)


_ROWS = pytest.StashKey[list[Row]]()
_LINES = pytest.StashKey[list[str]]()
_MACHINE = pytest.StashKey[dict[str, Any]]()


def pytest_configure(config: pytest.Config) -> None:
    # What `benchmarks/__init__.py` asks for: pytest forgets filters that are set while it imports suites.
    config.addinivalue_line("filterwarnings", "error::fastebm.compiler.faults.FaultWarning")
    config.stash[_ROWS], config.stash[_LINES] = [], []
    # Taken once, before anything is written, so that all rows of a run have the same facts.
    config.stash[_MACHINE] = machine_facts(config.getoption("--device"))


def pytest_sessionstart(session: pytest.Session) -> None:
    # This plugin makes PyTorch's compiler write its debugging traces at every compilation.
    plugins = session.config.pluginmanager
    plugins.unregister(plugins.get_plugin("logging-plugin"))


@pytest.fixture
def measure(request: pytest.FixtureRequest, base: Base | None) -> Measure:
    return Measure(request.config, base)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows, lines = config.stash[_ROWS], config.stash[_LINES]
    if rows:
        terminalreporter.section("speed")
        terminalreporter.write_line("slowdown, memory ratio: over that of fastebm, the median of the rounds' ratios")
        terminalreporter.write_line(printed(rows))
    if lines:
        terminalreporter.section(f"against {config.getoption('--base')}")
        for line in lines:
            terminalreporter.write_line(line)
