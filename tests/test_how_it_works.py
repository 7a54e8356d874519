"""The worked examples of docs/how-it-works do what they say."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

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


def test_a_sampler_and_a_recipe(tmp_path: Path) -> None:
    """In a folder of one's own, as a user of the installed package has it."""
    tests = []
    for page in ("sampler", "recipe"):
        tests.append(apply_example(PAGES / f"{page}.md", tmp_path)[-1])
        assert f"    pytest {tests[-1]}\n" in (PAGES / f"{page}.md").read_text()
    printed = run(tmp_path, *PYTEST, *tests, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert passed(printed) == 6
