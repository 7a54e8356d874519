"""pytest -p tests.gpu.ptx.pytest_plugin: backend "triton" on the CPU is PTX for sm_80, run as a GPU would run it.

With FASTEBM_BACKEND=triton, the suites of tests/ops then run on the kernels as compiled.
"""

from __future__ import annotations

import contextlib
import os

import pytest

from .launches import Launches, ptx_machine

_stack = contextlib.ExitStack()
_launches: Launches | None = None


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Before tests/ops/conftest.py looks which backends there are."""
    global _launches
    capability = int(os.environ.get("FASTEBM_PTX_CAPABILITY", "80"))
    _launches = _stack.enter_context(ptx_machine(capability))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _launches is not None:
        terminalreporter.write_line(f"{len(_launches)} launches of {len(_launches.kernels)} kernels ran as PTX")


def pytest_unconfigure() -> None:
    _stack.close()
