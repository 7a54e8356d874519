"""How the suites run: options, what each case is measured against, and where its rows go.

    pytest benchmarks                                a sane subset for this device, as one table at the end
    pytest benchmarks --full                         everything
    pytest benchmarks --save benchmarks/results      also write the rows, to <machine>/<suite>.json there
    pytest benchmarks --base main                    ours against ours at another revision; fails where it is slower

A suite lists its workloads in `workloads(device, full)`. The measurement itself is `fastebm.evaluation.speed`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness.base import Base
from benchmarks.harness.workloads import Workload, ours
from fastebm.compiler.cost_model import Cost
from fastebm.evaluation.speed import Candidate, Plan, Row, Run, compare, machine_facts, printed, record, verdict


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save", type=Path, default=None, help="write rows to <machine>/<suite>.json in this folder")
    parser.addoption("--rounds", type=int, default=20, help="rounds of a comparison (each runs every case once)")
    parser.addoption("--budget", type=float, default=10.0, help="seconds for a comparison's rounds, 3 at least")
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.addoption("--engine", default="fused", help="of our gradients: fused (an error where it can't), or auto")
    parser.addoption("--full", action="store_true", help="all nets, batches and precisions")
    parser.addoption("--base", default=None, help="a git revision: compare ours with ours there, and with nothing else")


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
    """Does one workload against peers, or against the base where one is given."""

    def __init__(self, config: pytest.Config, base: Base | None) -> None:
        self.config = config
        self.base = base

    def __call__(self, work: Workload, compared: Callable[[Workload, Plan], list[Row]]) -> None:
        """`compared` measures against peers, by the plan it is given."""
        if self.base is not None:
            self._against_base(work, self.base)
            return
        try:
            rows = compared(work, self.plan(work))
        except RuntimeError as refusal:
            if work.engine != "fused" or "no fused program exists" not in str(refusal):
                raise
            # Such a case stays in the table, with what runs instead and the reason.
            work = dataclasses.replace(work, engine="auto")
            rows = compared(work, self.plan(work))
            rows[0] = dataclasses.replace(rows[0], note=str(refusal))
        self._keep(work, rows)

    def operator(self, work: Workload, baselines: Mapping[str, Callable[[], Any]], bytes_moved: int) -> None:
        """An operator against the same in other words; its floor is `bytes_moved` a sample over a copy's rate."""
        entrants = {name: [lambda run=run: Candidate("", run)] for name, run in baselines.items()}

        def compared(work: Workload, plan: Plan) -> list[Row]:
            return compare(plan, Candidate("", ours(work)), entrants, unit="call", cost=lambda: Cost(0, bytes_moved))

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
            say=lambda line: print(line, flush=True),
        )

    def _keep(self, work: Workload, rows: list[Row]) -> None:
        self.config.stash[_ROWS].extend(rows)
        folder, facts = self.config.getoption("--save"), self.config.stash[_MACHINE]
        if folder is not None:  # at once, so that a run that is cut short leaves what it had done
            record(folder / facts["name"] / f"{work.suite}.json", Run(facts, tuple(rows)))

    def _against_base(self, work: Workload, base: Base) -> None:
        option = self.config.getoption
        now, before = base.measure(work, option("--rounds"), option("--budget"))
        found = verdict(now, before)
        line = f"{work.suite}: {work.name}: {found}"
        self.config.stash[_LINES].append(line)
        if found.regressed:
            pytest.fail(line, pytrace=False)


_ROWS = pytest.StashKey[list[Row]]()
_LINES = pytest.StashKey[list[str]]()
_MACHINE = pytest.StashKey[dict[str, Any]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS], config.stash[_LINES] = [], []
    # Once, before anything is written, so that all rows of a run carry the same.
    config.stash[_MACHINE] = machine_facts(config.getoption("--device"))


def pytest_sessionstart(session: pytest.Session) -> None:
    # It captures what PyTorch's compiler traces for debugging, which then is made, at every compilation.
    plugins = session.config.pluginmanager
    plugins.unregister(plugins.get_plugin("logging-plugin"))


@pytest.fixture
def measure(request: pytest.FixtureRequest, base: Base | None) -> Measure:
    return Measure(request.config, base)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows, lines = config.stash[_ROWS], config.stash[_LINES]
    if rows:
        terminalreporter.section("speed")
        terminalreporter.write_line("x ours: time over ours, the median of the rounds' ratios; above 1 ours is faster")
        terminalreporter.write_line(printed(rows))
    if lines:
        terminalreporter.section(f"against {config.getoption('--base')}")
        for line in lines:
            terminalreporter.write_line(line)
