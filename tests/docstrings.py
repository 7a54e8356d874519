"""Examples in docstrings, as tests run them."""

from __future__ import annotations

import doctest
import importlib


def run_examples(name: str) -> doctest.TestResults:
    """Runs the examples of a module's own docstrings, once each: (failed, attempted).

    Where torch.compile has traced a module's functions, it leaves its own copies of them in the module, docstrings
    included, under names such as `__resume_at_100_5`, which `doctest.testmod` would run too.
    """
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(module):
        if not test.name.removeprefix(f"{name}.").startswith("__resume_at_"):
            runner.run(test)
    return doctest.TestResults(runner.failures, runner.tries)
