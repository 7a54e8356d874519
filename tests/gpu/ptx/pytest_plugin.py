"""pytest -p tests.gpu.ptx.pytest_plugin: backend "triton" on the CPU is PTX, run as a GPU would run it.

With FASTEBM_BACKEND=triton, the suites of tests/ops then run on the kernels as compiled.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict

import pytest

from .launches import Launches, ptx_machine

# With fewer rows than threads, several threads read a number that one of them writes, and don't use it: a race in name
# only, and no launch has so few.
_RACES = re.compile(r"test_(mala|underdamped)\.py::test_block_size_does_not_matter\[triton-cpu-16\]")

_stack = contextlib.ExitStack()
_launches: Launches | None = None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ptx-cases", type=int, default=None, help="of each test, so many of its cases")
    parser.addoption("--ptx-capability", type=int, default=80, help="of the GPU that kernels are compiled for")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before tests/ops/conftest.py looks which backends there are."""
    global _launches
    _launches = _stack.enter_context(ptx_machine(early_config.known_args_namespace.ptx_capability))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps what runs kernels, and of each test at most --ptx-cases, spread over all."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if "[triton-cpu" in item.nodeid and not _RACES.search(item.nodeid):
            cases[item.nodeid.split("[")[0]].append(item)
    kept = [item for several in cases.values() for item in spread(several, config.getoption("--ptx-cases"))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def spread(several: list[pytest.Item], count: int | None) -> list[pytest.Item]:
    """So many of them, the first and the last among them."""
    if count is None or len(several) <= count:
        return several
    return [several[i * (len(several) - 1) // max(count - 1, 1)] for i in range(count)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _launches is not None:
        terminalreporter.write_line(f"{len(_launches)} launches of {len(_launches.kernels)} kernels ran as PTX")


def pytest_unconfigure() -> None:
    _stack.close()
