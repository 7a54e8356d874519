"""The site: every public name has an entry in the reference, every page has its place, every picture has words."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

import fastebm

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
REFERENCE = sorted((DOCS / "reference").glob("*.md"))


def value_of(path: str) -> Any:
    """What a dotted path names; where a function has the name of its module, the function."""
    above, _, name = path.rpartition(".")
    value = getattr(value_of(above), name, None) if above else None
    return importlib.import_module(path) if value is None else value


def public_names() -> dict[str, Any]:
    """All that is reached from `fastebm.__all__` through the `__all__` of modules, but for the modules themselves."""
    found: dict[str, Any] = {}
    waiting, seen = ["fastebm"], set()
    while waiting:
        module = waiting.pop(0)
        for name in getattr(value_of(module), "__all__", ()):
            value = getattr(value_of(module), name)
            if not isinstance(value, ModuleType):
                found[f"{module}.{name}"] = value
            elif value.__name__ not in seen:
                seen.add(value.__name__)
                waiting.append(value.__name__)
    return found


def missing_and_strange(public: dict[str, Any], entries: list[str]) -> tuple[list[str], list[str]]:
    """Public names without an entry, and entries of nothing public or of something that has an entry already.

    One object may be public by several names and has one entry. What is no class and no function goes by its own name.
    """

    def key(path: str, value: Any) -> Any:
        return id(value) if callable(value) and hasattr(value, "__name__") else path.rpartition(".")[2]

    wanted = {key(path, value): path for path, value in public.items()}
    given = [(key(path, value_of(path)), path) for path in entries]
    count = Counter(name for name, _ in given)
    strange = [path for name, path in given if name not in wanted or count[name] > 1]
    return [path for name, path in wanted.items() if not count[name]], strange


def entries() -> list[str]:
    return [entry for page in REFERENCE for entry in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]


def test_each_public_name_has_one_entry() -> None:
    public = public_names()
    assert {"fastebm.Langevin", "fastebm.sampling.ChainState", "fastebm.tasks.restoration.Dense"} <= public.keys()
    missing, strange = missing_and_strange(public, entries())
    assert not missing, f"add '::: NAME' to a page in docs/reference for: {', '.join(missing)}"
    assert not strange, f"docs/reference has entries of nothing public, or twice: {', '.join(strange)}"


def test_a_name_without_an_entry_is_found() -> None:
    public = {"fastebm.Langevin": fastebm.Langevin, "fastebm.MALA": fastebm.MALA}
    assert missing_and_strange(public, ["fastebm.sampling.Langevin"]) == (["fastebm.MALA"], [])
    twice = ["fastebm.Langevin", "fastebm.sampling.Langevin", "fastebm.MALA", "fastebm.rng.make_key"]
    assert missing_and_strange(public, twice) == ([], [twice[0], twice[1], twice[3]])


def places() -> list[str]:
    """The pages that the navigation names, in its order."""
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    return re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", nav, re.MULTILINE)


def test_each_page_has_one_place() -> None:
    examples = [f"examples/{path.stem}.md" for path in (ROOT / "examples").glob("*.py")]
    examples += [f"gallery/{path.stem}.md" for path in (ROOT / "examples" / "gallery").glob("*.py")]
    pages = [path.relative_to(DOCS).as_posix() for path in PAGES]
    assert Counter(places()) == Counter([*pages, *examples, "contributing.md", "changelog.md", "benchmarks.md"])


OTHERS = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md")]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pictures_have_words(page: Path) -> None:
    text = page.read_text()
    for alt, picture in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)", text):
        assert alt.strip(), f"{picture} has no alternative text, which is its caption on the site"
        assert alt != Path(picture).stem, f"the alternative text of {picture} is the name of its file"
    assert "<img" not in text, "a picture is ![its words](its file)"


@pytest.mark.parametrize("drawing", sorted(DOCS.glob("**/*.svg")), ids=lambda path: path.relative_to(DOCS).as_posix())
def test_drawings_are_legible_on_a_phone(drawing: Path) -> None:
    """As wide as the column of a narrow screen at most, so that letters keep their size, on a ground of their own."""
    root = ElementTree.parse(drawing).getroot()
    width, height = int(root.attrib["width"]), int(root.attrib["height"])
    assert root.attrib["viewBox"] == f"0 0 {width} {height}"
    assert width <= 360
    sizes = [float(each.attrib["font-size"]) for each in root.iter() if "font-size" in each.attrib]
    assert min(sizes) >= 12
    ground = root.find("{http://www.w3.org/2000/svg}rect")
    assert ground is not None
    assert (ground.attrib["width"], ground.attrib["height"]) == (str(width), str(height))
    assert "fill" in ground.attrib
    if importlib.util.find_spec("mkdocs"):
        assert of_the_site("hooks").size_of(drawing) == (width, height)


def test_environment_variables_are_documented() -> None:
    """All that Python and the kernels read which are named after the project."""
    sources = [*(ROOT / "fastebm").rglob("*.py"), *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cpp")]
    read = {
        name
        for path in sources
        for name in re.findall(r"(?:environ\b[^\n]{0,12}|getenv\()\"(FASTEBM_[A-Z_]+)\"", path.read_text())
    }
    table = (DOCS / "reference" / "environment.md").read_text()
    assert len(read) > 3
    assert read == {*re.findall(r"FASTEBM_[A-Z_]+", table)}


def test_files_of_a_run_are_documented() -> None:
    named = re.findall(r"^(\S+) {2,}", value_of("fastebm.runs.folder").__doc__, re.MULTILINE)
    table = (DOCS / "reference" / "run-folder.md").read_text()
    assert len(named) > 4
    assert [name for name in named if name not in table] == []


def of_the_site(name: str) -> ModuleType:
    """docs/NAME.py. Skips where `make docs` has not installed what it needs."""
    for needed in ("mkdocs", "griffe"):
        pytest.importorskip(needed, reason=f"{needed} is not installed here: `make docs` installs it")
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_out_of_the_docs_lead_somewhere() -> None:
    hooks = of_the_site("hooks")
    text = "[a](../../README.md) [b](../../LICENSE) [c](../../benchmarks/ops) [d](../design.md#layout) [e](#here)"
    assert hooks.moved_links(text, "docs/samplers/mala.md", "samplers/mala.md") == (
        f"[a](../index.md) [b]({hooks.REPOSITORY}/blob/main/LICENSE) [c]({hooks.REPOSITORY}/tree/main/benchmarks/ops) "
        "[d](../design.md#layout) [e](#here)"
    )
    assert hooks.moved_links("[a](docs/results/)", "CONTRIBUTING.md", "contributing.md") == "[a](results/README.md)"
    assert hooks.outside_of_code(str.upper, "a\n```\nb\n```\nc\n") == "A\n```\nb\n```\nC\n"


def test_commands_show_every_option() -> None:
    hooks = of_the_site("hooks")
    text = "\n".join(hooks.commands())
    assert re.findall(r"^## (.+)$", text, re.MULTILINE)[:3] == ["demo", "train coarse-to-fine", "train ec-vae"]
    sample = text.partition("## sample\n")[2].partition("\n## ")[0]
    for option in ("`RUN`", "`--count INT`", "`--dtype {float32,bfloat16}`", "`--overwrite, --no-overwrite`"):
        assert option in sample
    assert hooks.COMMANDS in (DOCS / "reference" / "commands.md").read_text()


def test_docstrings_become_markdown() -> None:
    shown = of_the_site("docstrings").shown
    text = "A thing.\n\n>>> 1 + 1\n2\n\nMore.\n\nArgs:\n    x: a\n\nExample:\n    >>> 2\n    2\n\n    >>> 3\n    3\n"
    assert shown(text) == (
        "A thing.\n\n```pycon\n>>> 1 + 1\n2\n```\n\nMore.\n\nArgs:\n    x: a\n\n"
        "**Example**\n\n```pycon\n>>> 2\n2\n```\n\n```pycon\n>>> 3\n3\n```"
    )
    assert shown("Attributes, later:\n    a, b: words\n        and more\n    c: d") == (
        "Attributes, later:\n\n- `a`, `b`: words\n    and more\n- `c`: d"
    )
    assert shown("Attributes:\n    a, b: words\n    c: d, e (docs/design.md)") == (
        "Attributes:\n    a,\u00a0b: words\n    c: d, e ([design.md](../design.md))"
    )
