"""Tests of the benchmarks share the tiny run and the single thread of the tests of tasks."""

from tests.tasks.conftest import _one_thread, digits_run, run

__all__ = ["_one_thread", "digits_run", "run"]
