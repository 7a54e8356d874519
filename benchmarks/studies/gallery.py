"""The gallery: scripts in cells that are run cell by cell, and the pages of the site that are made of them.

    python -m benchmarks.studies.gallery [NAME ...]     # runs scripts of examples/gallery into docs/gallery/NAME

In a script `# %%` begins a cell of code and `# %% [markdown]` one of words, as many editors know it; above the first
stands its docstring. A cell of words directly below a cell of code shows the pictures that this wrote, by their names:
`# ![what is seen](moving.gif)`. The page, which docs/hooks.py adds to the site, has all of it in its order.

outputs.json has what each cell of code printed and wrote, with the machine, the seconds of one core, and a digest of
all code. A page whose code has another digest is not built; words may be mended without a new run.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "gallery"
FOLDER = ROOT / "docs" / "gallery"
PICTURES = (".gif", ".png")

_BEGIN = re.compile(r"^# %%([^\n]*)\n", re.MULTILINE)
_SHOWN = re.compile(r"(!\[[^\]]*\]\()([^)\s/]+\))")


class Cell(NamedTuple):
    """A cell of a script: whether it is code, its text, and the number of lines above it."""

    is_code: bool
    text: str
    lines_above: int


def cells(program: str) -> list[Cell]:
    """The cells of a script in their order; the text of words is Markdown without the marks of comments.

    Raises ValueError for a cell of words with a line that is no comment.
    """
    found, begins = [], list(_BEGIN.finditer(program))
    ends = [begin.start() for begin in begins[1:]] + [len(program)]
    for begin, end in zip(begins, ends, strict=False):
        text, lines = program[begin.end() : end].strip("\n"), program[: begin.end()].count("\n")
        if begin[1].strip() != "[markdown]":
            found.append(Cell(True, text, lines))
            continue
        if stray := [line for line in text.split("\n") if not line.startswith("#")]:
            raise ValueError(f"a cell of words holds comments only, and not {stray[0]!r}")
        found.append(Cell(False, re.sub(r"^# ?", "", text, flags=re.MULTILINE), lines))
    return found


def digest(program: str) -> str:
    """A digest of the code of a script, cell by cell, that its words don't change."""
    code = [cell.text for cell in cells(program) if cell.is_code]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


def run(script: Path, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Runs a script as `python SCRIPT --out FOLDER ARGUMENTS` would; returns what each cell of code did.

    "printed" has the lines that it printed, "pictures" the names of those that it wrote into the folder. Raises what
    the script raises.
    """
    done, space = [], {"__name__": "__main__", "__file__": str(script)}
    with mock.patch.object(sys, "argv", [str(script), "--out", str(folder), *arguments]):
        for cell in filter(lambda cell: cell.is_code, cells(script.read_text())):
            before, printed = _pictures(folder), io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * cell.lines_above + cell.text, str(script), "exec"), space)
            done.append({"printed": printed.getvalue(), "pictures": sorted(_pictures(folder) - before)})
    return done


def _pictures(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*") if path.suffix in PICTURES}


def write(script: Path) -> None:
    """Runs a script and writes docs/gallery/NAME: its pictures, and outputs.json."""
    from fastebm.evaluation.speed.machine import machine_facts
    from fastebm.runs.files import write_json

    name, facts, started = script.stem, machine_facts("cpu"), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        done = run(script, Path(folder))
        seconds = time.process_time() - started
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        (FOLDER / name).mkdir(parents=True)
        for picture in sorted(_pictures(Path(folder))):
            shutil.copyfile(Path(folder) / picture, FOLDER / name / picture)
    outputs = {"digest": digest(script.read_text()), "cells": done, "core_seconds": seconds, "machine": facts}
    write_json(FOLDER / name / "outputs.json", outputs)
    print(f"{name}: {seconds:.0f} s of one core")


def page(script: Path) -> str:
    """The Markdown of a script's page; links and pictures are relative to the script.

    Raises ValueError where docs/gallery/NAME is not of this script.
    """
    program, name = script.read_text(), script.stem
    stored = FOLDER / name / "outputs.json"
    try:
        outputs = json.loads(stored.read_text()) if stored.exists() else {"digest": ""}
    except ValueError as error:
        raise ValueError(f"{stored} is damaged ({error}): run this gallery's script again") from error
    if outputs["digest"] != digest(program):
        raise ValueError(f"{name}: its code has not run as it is: python -m benchmarks.studies.gallery {name}")
    pictures, done, parts = f"../../docs/gallery/{name}/", iter(outputs["cells"]), []
    for cell in cells(program):
        if cell.is_code:
            parts.append(f"```python\n{cell.text}\n```")
            if printed := next(done)["printed"].rstrip():
                parts.append(f'```text title="prints"\n{printed}\n```')
        else:
            parts.append(_SHOWN.sub(rf"\g<1>{pictures}\g<2>", cell.text))
    machine = outputs["machine"]
    parts.append(
        f"*All that is printed and shown here is of one run, by `python examples/gallery/{script.name}`. It took "
        f"{outputs['core_seconds']:.0f} seconds of one core ({machine['cpu']}, {machine['cpu_features'][0].upper()}; "
        f"torch {machine['torch']}).*"
    )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run scripts of the gallery for their pages.")
    names = sorted(path.stem for path in SCRIPTS.glob("*.py"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="by default all")
    asked = parser.parse_args().names or names
    if strange := sorted({*asked} - {*names}):
        parser.error(f"there are scripts {', '.join(names)}, and not {', '.join(strange)}")
    for name in asked:
        write(SCRIPTS / f"{name}.py")


if __name__ == "__main__":
    main()
