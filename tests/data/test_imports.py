"""Optional packages are imported when they are needed, and the examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys

import pytest


def test_importing_data_imports_no_optional_package() -> None:
    program = (
        "import sys, fastebm.data\n"
        "print(*(name for name in ('PIL', 'sklearn', 'scipy', 'torchvision') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", ["pyramid", "sources", "formats.digits"])
def test_docstring_examples(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"fastebm.data.{name}"))
    assert (results.failed, results.attempted > 0) == (0, True)
