"""What README and docs say can be done: their Python runs, their links lead somewhere, their make targets exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("**/*.md")])


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    # One page is one program, so that a later block may use what an earlier one made.
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + "\n".join(python_blocks(page))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", prose)
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page: Path) -> None:
    text = page.read_text()
    asked = set(re.findall(r"(?:`|^    )make ([a-z-]+)", text, flags=re.MULTILINE))
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert asked <= made


def test_results_name_no_folders_of_a_machine() -> None:
    files = [path for suffix in ("json", "jsonl") for path in (ROOT / "docs" / "results").glob(f"**/*.{suffix}")]
    assert len(files) > 10
    assert [name(path) for path in files if re.search(r"(?<![\w./])/\w[\w.-]*/", path.read_text())] == []


def test_readme_fits_a_screen() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 60
