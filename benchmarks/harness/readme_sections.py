"""Tables of a page between two marks, so that words around them, which a person wrote, stay as they are."""

from __future__ import annotations

import re
from pathlib import Path


def marks(name: str, script: str) -> tuple[str, str]:
    """The lines around the table of that name: where it begins, which says what made it, and where it ends."""
    return f"<!-- {name}: made by benchmarks/{script} -->", f"<!-- {name}: end -->"


def filled(text: str, name: str, script: str, table: str) -> str:
    """`text` with `table` between its marks. Raises SystemExit where one of them is missing."""
    begin, end = marks(name, script)
    if begin not in text or end not in text:
        raise SystemExit(f"the page lacks the lines {begin} and {end}: put them where the table belongs")
    block = f"{begin}\n\n{table}\n\n{end}"
    return re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: block, text, flags=re.DOTALL)


def add(readme: Path, name: str, script: str) -> None:
    """Puts the marks of a table that a page lacks at its end; a page that isn't there is left to `fill`."""
    begin, end = marks(name, script)
    if readme.exists() and begin not in (text := readme.read_text()):
        readme.write_text(f"{text}\n{begin}\n{end}\n")


def fill(readme: Path, title: str, name: str, script: str, table: str) -> None:
    """Renews the table of a page; one that isn't there is made, with `title` and that table alone."""
    begin, end = marks(name, script)
    text = readme.read_text() if readme.exists() else f"# {title}\n\n{begin}\n{end}\n"
    readme.write_text(filled(text, name, script, table))
