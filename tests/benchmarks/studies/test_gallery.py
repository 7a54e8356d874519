"""The gallery: its scripts run and do what their pages say, and what the pages show is of the scripts as they are."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.studies import gallery

SCRIPTS = sorted(gallery.SCRIPTS.glob("*.py"))
MOST_BYTES = 300 * 2**10  # of a picture

TOY = '''"""A toy."""

# %% [markdown]
# # Title
#
# Words.

# %%
import argparse
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path)
parser.add_argument("--quick", action="store_true")
out = parser.parse_args().out

# %%
print(f"quick: {parser.parse_args().quick}")
(out / "a.png").write_bytes(b"")
(out / "other.txt").write_text("")

# %% [markdown]
# ![a picture](a.png)
'''


def name(script: Path) -> str:
    return script.stem


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script above, in a repository of its own."""
    monkeypatch.setattr(gallery, "FOLDER", tmp_path / "docs")
    script = tmp_path / "toy.py"
    script.write_text(TOY)
    return script


def test_cells() -> None:
    found = gallery.cells(TOY)
    assert [cell.is_code for cell in found] == [False, True, True, False]
    assert found[0].text == "# Title\n\nWords."
    assert TOY.split("\n")[found[1].lines_above] == "import argparse"
    with pytest.raises(ValueError, match="holds comments only, and not 'x = 1'"):
        gallery.cells("# %% [markdown]\n# Words.\nx = 1\n")


def test_a_run_says_what_each_cell_did(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    none = {"printed": "", "pictures": []}
    assert gallery.run(toy, out, "--quick") == [none, {"printed": "quick: True\n", "pictures": ["a.png"]}]


def test_an_error_names_its_line(toy: Path, tmp_path: Path) -> None:
    toy.write_text(TOY.replace("(out / ", "(nowhere / ", 1))
    with pytest.raises(NameError) as caught:
        gallery.run(toy, tmp_path)
    assert caught.traceback[-1].lineno + 1 == TOY[: TOY.index("(out / ")].count("\n") + 1


def test_a_page_is_of_the_code_that_ran(toy: Path) -> None:
    with pytest.raises(ValueError, match="has not run"):
        gallery.page(toy)
    gallery.write(toy)
    page = gallery.page(toy)
    assert page.startswith("# Title\n\nWords.\n\n```python\nimport argparse")
    assert '```text title="prints"\nquick: False\n```\n\n![a picture](../../docs/gallery/toy/a.png)' in page
    assert sorted(path.name for path in (gallery.FOLDER / "toy").iterdir()) == ["a.png", "outputs.json"]
    toy.write_text(TOY.replace("Words.", "Other words."))
    assert "Other words." in gallery.page(toy)
    toy.write_text(TOY.replace("quick: ", "slow: "))
    with pytest.raises(ValueError, match=r"toy: its code has not run as it is: python -m .*gallery toy"):
        gallery.page(toy)


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_cells_are_a_program(script: Path) -> None:
    """Run cell by cell or as a whole, a script is the same."""
    program = script.read_text()
    whole = ast.parse(program).body[1:]  # without the docstring
    parts = [node for cell in gallery.cells(program) if cell.is_code for node in ast.parse(cell.text).body]
    assert [ast.dump(node) for node in parts] == [ast.dump(node) for node in whole]


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_pages_show_what_was_written(script: Path) -> None:
    """Each picture below the cell that wrote it, and no other; the page is refused where the code has changed."""
    folder = gallery.FOLDER / script.stem
    assert gallery.page(script).startswith("# ")
    done = iter(json.loads((folder / "outputs.json").read_text())["cells"])
    due: list[str] = []
    for cell in gallery.cells(script.read_text()):
        if cell.is_code:
            assert due == [], "a cell of words below the code shows them"
            due = next(done)["pictures"]
        else:
            assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", cell.text) == due
            due = []
    assert due == []
    assert next(done, None) is None
    shown = json.loads((folder / "outputs.json").read_text())["cells"]
    pictures = sorted(picture for cell in shown for picture in cell["pictures"])
    assert sorted(path.name for path in folder.iterdir() if path.name != "outputs.json") == pictures
    assert [picture for picture in pictures if (folder / picture).stat().st_size > MOST_BYTES] == []


# What the pages say ---------------------------------------------------------------------------------------------------


def numbers(line: str) -> list[float]:
    return [float(found) for found in re.findall(r"(?<![\w.])[-+]?\d+\.\d+", line)]


def check_densities(lines: list[str], quick: bool) -> None:
    """Exact samplers have the moments of the bent density; of the four modes only tempering has."""
    rows = {(line[:12].strip(), line[12:23].strip()): numbers(line) for line in lines[1:]}
    assert len(rows) == 8
    for (density, sampler), (*errors, _, _) in rows.items():
        ratios = rows[density, sampler][2:]
        if sampler == "tempering" or (density == "bent" and sampler != "Langevin"):
            assert max(map(abs, errors)) < 0.08
            assert max(abs(ratio - 1) for ratio in ratios) < 0.1
        elif density == "bent":
            assert ratios[1] < 0.93
        else:
            assert min(map(abs, errors)) > 0.5
            assert max(ratios) < 0.4


def check_digits(lines: list[str], quick: bool) -> None:
    """Samples are nearly as near to digits as unseen digits, and in full the demo's judge is content."""
    noise, samples, unseen = (numbers(line)[0] for line in lines if "median distance to the nearest training" in line)
    assert unseen < samples < (0.6 if quick else 0.45) * noise
    assert quick or "The requirements are met." in lines


def check_inpainting(lines: list[str], quick: bool) -> None:
    """Chains are nearer to the truth than the mean of the neighbours."""
    assert len(lines) == 4
    for line in lines[1:]:
        neighbours, normal, chain, mean = numbers(line)
        assert mean <= chain < (0.97 if quick else 0.87) * neighbours
        assert normal < neighbours


def check_one_pass(lines: list[str], quick: bool) -> None:
    """Calibrated samples are nearer than plain ones."""
    plain, longer, calibrated, real, noise = (numbers(line)[0] for line in lines)
    assert calibrated < 0.9 * plain
    assert real < calibrated
    assert max(plain, longer) < noise
    assert quick or calibrated < longer


CHECKS: dict[str, Callable[[list[str], bool], None]] = {
    "densities": check_densities,
    "digits": check_digits,
    "inpainting": check_inpainting,
    "one_pass": check_one_pass,
}


def printed(done: list[dict[str, Any]], script: Path) -> list[str]:
    """The lines that cells printed, but for what a sampler says of itself."""
    text = "".join(cell["printed"] for cell in done)
    assert text, f"{script.name} prints nothing"
    return [line for line in text.splitlines() if not line.startswith("Cascade(")]


def frames(path: Path) -> int:
    with Image.open(path) as picture:
        return getattr(picture, "n_frames", 1)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_scripts_run(script: Path, tmp_path: Path) -> None:
    """In a short form, in which each already shows what its page says; its pictures are those of the page."""
    done = gallery.run(script, tmp_path, "--quick")
    CHECKS[script.stem](printed(done, script), True)
    outputs = json.loads((gallery.FOLDER / script.stem / "outputs.json").read_text())
    assert [cell["pictures"] for cell in done] == [cell["pictures"] for cell in outputs["cells"]]


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_pages_are_true(script: Path) -> None:
    """What is printed on the pages is what their words say of it."""
    outputs = json.loads((gallery.FOLDER / script.stem / "outputs.json").read_text())
    CHECKS[script.stem](printed(outputs["cells"], script), False)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_scripts_run_in_full(script: Path, tmp_path: Path) -> None:
    CHECKS[script.stem](printed(gallery.run(script, tmp_path), script), False)


def test_chains_move() -> None:
    assert frames(gallery.FOLDER / "densities" / "moving.gif") > 20
    assert frames(gallery.FOLDER / "digits" / "chains.png") == 31
