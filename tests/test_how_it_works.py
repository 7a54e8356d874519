"""The worked examples of docs/how-it-works do what they say."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.worked_examples import ROOT, apply_example, run

PAGES = ROOT / "docs" / "how-it-works"
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


def passed(printed: str) -> int:
    found = re.search(r"\b(\d+) passed", printed)
    return int(found[1]) if found else 0


def test_a_rewrite(tmp_path: Path) -> None:
    """In a copy of the tree; its compiled operators are those that are built."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "results", "csrc"))
    names = apply_example(PAGES / "rewrite.md", tree)
    assert names == [
        "fastebm/compiler/rewrites/pooling_composition.py",
        *["fastebm/compiler/rewrites/__init__.py"] * 2,
        "tests/compiler/rewrites/test_pooling_composition.py",
        "docs/gradient.md",
    ]
    own = [f"tests/compiler/rewrites/test_{name}.py" for name in ("pooling_composition", "all_rewrites")]
    assert passed(run(tree, *PYTEST, *own, "-k", "pooling_composition or every_proposal")) >= 14


@pytest.mark.parametrize("page", ["sampler", "recipe"])
def test_files_of_ones_own(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, as a user of the installed package has it; the tests run in this process, which is ready."""
    module, tests = (Path(name).stem for name in apply_example(PAGES / f"{page}.md", tmp_path))
    assert f"    pytest {tests}.py\n" in (PAGES / f"{page}.md").read_text()
    monkeypatch.syspath_prepend(tmp_path)
    try:
        made = vars(importlib.import_module(tests))
        found = [value for name, value in made.items() if name.startswith("test_")]
        assert len(found) == 3
        for test in found:
            test()
    finally:
        for name in (module, tests):
            sys.modules.pop(name, None)
