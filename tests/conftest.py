"""What all tests share: tests marked `slow` run only when asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--tries", type=int, default=None, help="hostile tries of each test in tests/fuzz")


def pytest_configure(config: pytest.Config) -> None:
    # Nothing that should work may fail and be replaced by something slower, unless a test makes it fail.
    config.addinivalue_line("filterwarnings", "error::fastebm.compiler.faults.FaultWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow") or "slow" in (config.getoption("-m") or ""):
        return
    skip = pytest.mark.skip(reason="takes minutes; run it with --slow or -m slow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Results to the last bit hold for one number of threads, and so tiny nets are no faster with more."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
