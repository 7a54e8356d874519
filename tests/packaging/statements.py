"""What the tree states of its release: the version in each file that names it, and the day."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

HEADING = re.compile(r"^## (\d+\.\d+\.\d+) - (\d{4}-\d{2}-\d{2}|unreleased)$", re.MULTILINE)


class Release(NamedTuple):
    """A heading of the changelog; `day` is None before the release."""

    version: str
    day: str | None


def releases(root: Path) -> list[Release]:
    """The releases of the changelog, the newest first."""
    found = HEADING.findall((root / "CHANGELOG.md").read_text())
    if not found:
        raise ValueError("CHANGELOG.md has no heading such as '## 1.2.0 - 2026-01-31' or '## 1.2.0 - unreleased'")
    return [Release(version, None if day == "unreleased" else day) for version, day in found]


def package_version(root: Path) -> str:
    """`fastebm.__version__`, which all other places repeat, without an import."""
    for statement in ast.parse((root / "fastebm" / "__init__.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__version__":
            return ast.literal_eval(statement.value)
    raise ValueError(f"{root}/fastebm/__init__.py has no __version__")


def citation(root: Path, field: str) -> str | None:
    """A field of one line at the top level of CITATION.cff, or None where there is none."""
    found = re.search(rf'^{field}: *"?([^"\n]*)"?$', (root / "CITATION.cff").read_text(), re.MULTILINE)
    return found[1] if found else None


def faults(root: Path, final: bool = False) -> list[str]:
    """Where the tree contradicts itself about its release; with `final`, what it lacks for one as well."""
    version = package_version(root)
    newest = releases(root)[0]
    found = []
    if citation(root, "version") != version:
        found.append(f"CITATION.cff has version {citation(root, 'version')}, fastebm/__init__.py {version}")
    if newest.version != version:
        found.append(f"CHANGELOG.md begins with {newest.version}, fastebm/__init__.py has {version}")
    if citation(root, "date-released") != newest.day:
        given = citation(root, "date-released")
        found.append(f"CITATION.cff has date-released {given}, CHANGELOG.md {newest.day or 'unreleased'}")
    if final and newest.day is None:
        found.append(f"CHANGELOG.md says that {version} is unreleased: it needs the day")
    return found
