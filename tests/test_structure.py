"""The order of the sources: every file says what it is, nothing imports in a circle, tests mirror the package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sorted(path for folder in ("fastebm", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
KERNELS = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".inc"))


def circle(edges: Mapping[str, Iterable[str]]) -> list[str]:
    """The nodes of one circle of a directed graph, or nothing."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return []
        for following in edges.get(node, ()):
            if found := visit(following, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in edges if (found := visit(node, []))), [])


def test_a_circle_is_found() -> None:
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c"]
    assert circle({"a": ["b", "c"], "b": ["c"]}) == []


@pytest.mark.parametrize("path", PYTHON + KERNELS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_first_line_says_what_a_file_is(path: Path) -> None:
    text = path.read_text()
    if path.suffix == ".py":
        first = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    else:
        first = re.match(r"(?:// ?.*\n)+", text).group().replace("//", "") if text.startswith("//") else ""
    assert len(first.split()) >= 3, f"{path.name} begins with {first!r}"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_modules_do_not_import_in_a_circle() -> None:
    """Counting imports inside of functions, but not those for type checkers alone."""
    modules = {module_of(path): path for path in PYTHON if path.is_relative_to(ROOT / "fastebm")}
    edges: dict[str, set[str]] = {}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        edges[name] = set()
        tree = ast.parse(path.read_text())
        for check in [node for node in ast.walk(tree) if isinstance(node, ast.If)]:
            if isinstance(check.test, ast.Name) and check.test.id == "TYPE_CHECKING":
                check.body = []
        for statement in ast.walk(tree):
            if isinstance(statement, ast.Import):
                edges[name] |= {alias.name for alias in statement.names} & modules.keys()
            elif isinstance(statement, ast.ImportFrom):
                base = statement.module or ""
                if statement.level:
                    parent = package.split(".")[: len(package.split(".")) - statement.level + 1]
                    base = ".".join([*parent, *filter(None, [statement.module])])
                for alias in statement.names:
                    target = f"{base}.{alias.name}"
                    edges[name] |= {target if target in modules else base} & modules.keys()
        edges[name].discard(name)
    # A package's own __init__ gathers what its modules define; only a module that asks the package back is a circle.
    assert circle(edges) == []


def test_headers_do_not_include_in_a_circle() -> None:
    edges = {
        path.relative_to(ROOT / "csrc").as_posix(): [
            name
            for include in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)
            for name in (include, (path.parent / include).resolve().relative_to(ROOT / "csrc").as_posix())
            if (ROOT / "csrc" / name).exists()
        ]
        for path in KERNELS
    }
    assert any(edges.values())
    assert circle(edges) == []


def test_tests_mirror_the_package() -> None:
    tests = (ROOT / "tests").rglob("test_*.py")
    folders = {path.parent.relative_to(ROOT / "tests") for path in tests} - {
        Path(),
        Path("fuzz"),
        Path("gpu"),
        Path("packaging"),
    }
    strays = [folder for folder in folders if not any((ROOT / top / folder).is_dir() for top in ("fastebm", "."))]
    assert strays == []


def test_results_are_small() -> None:
    files = [path for path in (ROOT / "docs" / "results").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 5 * 2**20
    assert not [path for path in files if path.suffix == ".jsonl"]


def test_all_of_the_package_is_there_after_one_import() -> None:
    """Each subpackage and module is imported when it is first touched."""
    names = [module_of(path).removeprefix("fastebm.") for path in (ROOT / "fastebm").iterdir() if path.suffix == ".py"]
    names += [path.name for path in (ROOT / "fastebm").iterdir() if (path / "__init__.py").is_file()]
    names = sorted(name for name in names if name not in ("fastebm", "__main__"))
    program = f"import fastebm; [getattr(fastebm, name) for name in {names!r}]; print(*dir(fastebm))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert {"Langevin", "load", "train", "resume"} <= {*done.stdout.split()}
    assert "importlib" not in done.stdout.split()
