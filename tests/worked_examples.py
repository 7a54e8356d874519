"""Pages that make something step by step: their files are written and edited as they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def apply_example(page: Path, tree: Path) -> list[str]:
    """Writes and edits the files that the page names; returns their names.

    A line that is the name of a file says what the blocks below it are: `py` and others a new file, `diff` an edit.
    """
    named = ""
    names: list[str] = []
    for name, language, block in re.findall(r"^`([\w/.]+)`:$|^```(\w+)\n(.*?)^```$", page.read_text(), re.M | re.S):
        if name:
            named = name
            continue
        if language == "python":  # a program that tests/test_docs.py runs
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
    """What Python prints in `tree`, whose modules come first."""
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
