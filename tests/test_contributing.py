"""The worked example of CONTRIBUTING.md makes a complete operator, which passes its tests in a copy of the tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastebm.build_extension import unavailable_reason

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "CONTRIBUTING.md"


COMPILED = """
from tests.ops.compile_launch_examples import shown
from tests.ops.launch_examples.reflect import launch_examples

for example in launch_examples():
    found = shown(example, 90)
    assert (found["vector_loads"], found["vector_stores"]) == (example.vector_loads, example.vector_stores), found
    print(example.name, found["vector_loads"], found["vector_stores"], found["other_contractions"] + found["stack"])
"""


def apply_example(tree: Path) -> list[str]:
    """Writes and edits the files that the page names; returns their names."""
    named = ""
    names: list[str] = []
    for name, language, block in re.findall(r"^`([\w/.]+)`:$|^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S):
        if name:
            named = name
            continue
        path = tree / named
        if language == "diff":
            lines = block.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] != "+")
            after = "".join(line[1:] for line in lines if line[0] != "-")
            text = path.read_text()
            assert text.count(before) == 1, f"{named} has this not once:\n{before}"
            path.write_text(text.replace(before, after))
        else:
            assert not path.exists(), f"{named} exists already"
            path.write_text(block)
        names.append(named)
    return names


def run(tree: Path, *arguments: str, **environment: str) -> str:
    dropped = {"FASTEBM_BACKEND", "FASTEBM_CPU", "TRITON_INTERPRET"}
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env=inherited | {"PYTHONPATH": str(tree)} | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.skipif(unavailable_reason() is not None, reason=f"C++ can't be compiled here: {unavailable_reason()}")
def test_adding_an_operator_as_the_page_says(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "results", "*.so"))
    names = apply_example(tree)
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
