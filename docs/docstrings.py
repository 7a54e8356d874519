"""Docstrings as the site shows them: what Markdown would not take for what it is. mkdocs.yml names this file."""

from __future__ import annotations

import itertools
import re
import textwrap
from typing import Any

from griffe import Extension, Object

SECTIONS = ("Args:", "Attributes:", "Returns:", "Raises:", "Yields:")
"""Titles that are read as sections of a docstring; what is indented below them stays as it is."""


def shown(docstring: str) -> str:
    """A docstring with its examples as fenced blocks, and with lists of the names that are indented below a colon."""
    lines: list[str] = []
    blocks = [list(block) for _, block in itertools.groupby(docstring.splitlines(), key=_starts_a_block())]
    for title, *rest in blocks:
        body = textwrap.dedent("\n".join(rest)).strip("\n")
        if title == "Attributes:":  # the first word would be a name and the others its type
            lines += [title, *(re.sub(r"^ {4}[\w, ]+: ", _unbroken, line) for line in rest)]
        elif not rest or title in SECTIONS:
            lines += [title, *rest]
        elif title == "Example:":
            lines += ["**Example**", "", *_fenced(body), ""]
        elif title.endswith(":") and re.match(r"[\w., *`]+: ", body):
            lines += [title, "", *_listed(body), ""]
        else:
            lines += [title, *rest]
    text = "\n".join(_fenced("\n".join(lines)))
    return re.sub(r"\bdocs/([\w/-]+\.md)\b", r"[\1](../\1)", text)  # the reference is one folder below


def _starts_a_block() -> Any:
    """A key that changes at each line without indentation, so that what is indented stays with the line above it."""
    number = itertools.count()
    current = 0

    def key(line: str) -> int:
        nonlocal current
        if line and not line.startswith(" "):
            current = next(number)
        return current

    return key


def _fenced(text: str) -> list[str]:
    """`text` with fences around each session of Python, from `>>>` to the next empty line."""
    lines: list[str] = []
    inside = fenced = False
    for line in [*text.splitlines(), ""]:
        if line.startswith("```"):
            fenced = not fenced
        if line.startswith(">>>") and not inside and not fenced:
            inside = True
            lines += ["```pycon"] if not lines or not lines[-1] else ["", "```pycon"]
        elif not line and inside:
            inside = False
            lines.append("```")
        lines.append(line)
    return lines[:-1]


def _unbroken(names: re.Match[str]) -> str:
    return names[0].replace(", ", ",\u00a0")


def _listed(body: str) -> list[str]:
    """A list of the entries `names: words`, whose further lines are indented."""
    return [
        re.sub(r"^([^:]+): ", lambda name: f"- {_as_code(name[1])}: ", line) if not line.startswith(" ") else line
        for line in body.splitlines()
    ]


def _as_code(names: str) -> str:
    return ", ".join(f"`{name}`" if name.isidentifier() else name for name in names.split(", "))


class Docstrings(Extension):
    """Changes every docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = shown(obj.docstring.value)
