"""What the tree states of its release agrees, and the files that machines read have their form."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest

import fastebm
from fastebm.cli import main

from .contents import ROOT
from .statements import citation, faults, package_version, releases

SECTIONS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]  # Keep a Changelog's, in its order


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fastebm.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", package_version(ROOT))


def test_all_places_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert faults(ROOT) == []
    assert fastebm.__version__ == package_version(ROOT)
    assert main(["info"]) == 0
    assert re.match(r"fastebm +(\S+)\n", capsys.readouterr().out)[1] == fastebm.__version__
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastebm {fastebm.__version__}\n"


def test_contradictions_are_found(tmp_path: Path) -> None:
    """Each place alone is changed, and told; a day is needed for a release and not before."""
    (tmp_path / "fastebm").mkdir()
    names = ("CHANGELOG.md", "CITATION.cff", "fastebm/__init__.py")
    version = package_version(ROOT)

    def fresh(**changes: tuple[str, str]) -> list[str]:
        for name in names:
            shutil.copy2(ROOT / name, tmp_path / name)
        undated = re.sub(r"^(## \S+ - ).*$", r"\1unreleased", (tmp_path / names[0]).read_text(), count=1, flags=re.M)
        (tmp_path / names[0]).write_text(undated)
        (tmp_path / names[1]).write_text(
            re.sub(r"^date-released:.*\n", "", (tmp_path / names[1]).read_text(), flags=re.M)
        )
        for suffix, (old, new) in changes.items():
            (path,) = (tmp_path / name for name in names if Path(name).stem.strip("_").lower() == suffix)
            text = path.read_text()
            assert old in text
            path.write_text(text.replace(old, new, 1))
        return faults(tmp_path)

    assert fresh() == []
    assert "unreleased" in faults(tmp_path, final=True)[0]
    assert len(fresh(init=(f'"{version}"', '"9.0.0"'))) == 2
    assert "CITATION.cff has version 9.0.0" in fresh(citation=(f"version: {version}", "version: 9.0.0"))[0]
    assert "CHANGELOG.md begins with 9.0.0" in fresh(changelog=(f"## {version}", "## 9.0.0"))[0]
    dated = (f"## {version} - unreleased", f"## {version} - 2026-01-31")
    assert "date-released None" in fresh(changelog=dated)[0]
    released = (f"version: {version}\n", f"version: {version}\ndate-released: 2026-01-31\n")
    assert fresh(changelog=dated, citation=released) == []
    assert faults(tmp_path, final=True) == []


def test_changelog_has_the_form_of_keep_a_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## .*$", text, re.MULTILINE)
    found = releases(ROOT)
    assert len(headings) == len(found), f"a heading of another form: {headings}"
    versions = [tuple(map(int, version.split("."))) for version, _ in found]
    assert versions == sorted(set(versions), reverse=True)
    assert all(day for _, day in found[1:]), "only the newest release may be without a day"
    for part in re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]:
        sections = re.findall(r"^### (.*)$", part, re.MULTILINE)
        assert sections == [section for section in SECTIONS if section in sections]


def test_citation_names_the_project_and_its_license() -> None:
    """make release-check holds it against the schema."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation(ROOT, "cff-version") == "1.2.0"
    assert citation(ROOT, "license") == project["license"]
    assert citation(ROOT, "repository-code") == project["urls"]["Source"]


def test_llms_txt_has_its_form_and_its_links_lead_to_files() -> None:
    """A title, a summary, facts, then sections of links with descriptions (llmstxt.org)."""
    text = (ROOT / "llms.txt").read_text()
    first, summary, *_ = (block for block in text.split("\n\n"))
    assert first == "# fastebm"
    assert summary.startswith("> ")
    assert "\n" not in summary
    head, *sections = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    assert "](" not in head
    assert sections[-2] == "Optional", "what may be left out stands last"
    lines = [line for body in sections[1::2] for line in body.splitlines() if line]
    links = [re.fullmatch(r"- \[[^\]]+\]\(([^)]+)\)(: \S.*)?", line) for line in lines]
    assert len(links) > 20
    assert all(links), [line for line, link in zip(lines, links, strict=True) if not link]
    targets = [link[1] for link in links]
    assert len(targets) == len(set(targets))
    assert [target for target in targets if not (ROOT / target).is_file()] == []
