"""The worked example of CONTRIBUTING.md makes a complete operator, which passes its tests in a copy of the tree."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from fastebm.build_extension import unavailable_reason
from tests.worked_examples import ROOT, apply_example, run

COMPILED = """
from tests.ops.compile_launch_examples import shown
from tests.ops.launch_examples.reflect import launch_examples

for example in launch_examples():
    found = shown(example, 90)
    assert (found["vector_loads"], found["vector_stores"]) == (example.vector_loads, example.vector_stores), found
    print(example.name, found["vector_loads"], found["vector_stores"], found["other_contractions"] + found["stack"])
"""


@pytest.mark.skipif(unavailable_reason() is not None, reason=f"C++ can't be compiled here: {unavailable_reason()}")
def test_adding_an_operator_as_the_page_says(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "results", "*.so"))
    names = apply_example(ROOT / "CONTRIBUTING.md", tree)
    assert {"csrc/cpu/reflect.cpp", "fastebm/ops/reflect.py", "fastebm/ops/triton/reflect.py"} <= {*names}
    listed = tree / "fastebm" / "build_extension.py"
    listed.write_text(listed.read_text().replace('"-O3"', '"-O1"'))  # compiles in half the time
    run(tree, "setup.py", "--quiet", "build_ext", "--inplace")
    options = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    printed = run(tree, *options, "tests/ops/test_reflect.py", "tests/ops/test_complete.py", "-k", "reflect")
    assert re.search(r"\b\d+ passed", printed)
    assert "cpp-cpu" in run(tree, *options, "tests/ops/test_reflect.py", "--collect-only")
    module = 'importlib.import_module("fastebm.ops.reflect")'
    assert run(tree, "-c", f"import doctest, importlib; print(*doctest.testmod({module}))").split() == ["0", "2"]
    pytest.importorskip("triton", reason="Triton is not installed: the example's Triton part was not run")
    # What tests/gpu/test_launches.py compiles of all kernels.
    for line in run(tree, "-c", COMPILED).splitlines():
        name, loads, stores, other = line.rsplit(" ", 3)
        assert (loads, stores, other) == ("2" if name.endswith("backward") else "1", "1", "0"), line
    interpreted = {"TRITON_INTERPRET": "1", "FASTEBM_BACKEND": "triton"}
    assert re.search(r"\b\d+ passed", run(tree, *options, "tests/ops/test_reflect.py", **interpreted))
