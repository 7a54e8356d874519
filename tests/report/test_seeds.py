"""The page of runs of several seeds: their table, a part for each, and damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastebm.cli import main
from fastebm.cli.seeds import SHOWN
from fastebm.report.seeds import HEADINGS
from fastebm.runs.files import write_json
from tests.cli.tiny_runs import TRAIN
from tests.report.test_page import page_of


@pytest.fixture(scope="module")
def trained_seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "seeds"
    command = [*TRAIN, "--iterations", "1", "2", "--out", str(out), "--seeds", "2", "--judge-count", "0"]
    assert main(command) == 0
    return out


@pytest.fixture
def seeds(trained_seeds: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_seeds, tmp_path / "seeds"))


def test_mean_and_spread_and_a_part_for_each_seed(
    trained_seeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = page_of(trained_seeds, tmp_path / "page.html")
    content = json.loads((trained_seeds / "seeds.json").read_text())
    for entry in content["runs"]:
        assert f'<data value="{entry["gap_end"]!r}">' in page.source
    for word in ("mean", "spread"):
        assert f'<data value="{content["summary"]["gap_end"][word]!r}">' in page.source
    assert "2 of 2." in page.text
    assert page.text.count("finished: 3 of 3 updates") == 4  # in the head and in the facts of both
    assert page.text.count("A grid") == 0  # no description is shown as text
    assert {"run-1", "run-2", "run-1-samples", "run-2-curves", "files-of-all"} <= set(page.ids)
    assert page.headings.count("h2") == 4  # the table, two runs, the files
    assert f"fastebm.load({str(trained_seeds / 'seed-1')!r})" in page.text


def test_the_headings_are_those_of_the_command() -> None:
    assert HEADINGS.keys() == SHOWN.keys()


def test_a_seed_that_stopped_and_one_that_is_missing(seeds: Path) -> None:
    content = json.loads((seeds / "seeds.json").read_text())
    content["runs"][0] |= {"stopped": "an energy <b>exploded</b>", "finished": False}
    write_json(seeds / "seeds.json", content)
    shutil.rmtree(seeds / "seed-1")
    text = page_of(seeds).text
    assert "seed 0 (stopped)" in text
    assert "Seed 0 stopped: an energy <b>exploded</b>" in text
    assert "The folder seed-1 is missing." in text


@pytest.mark.parametrize(
    "content", ["", "{}", '{"runs": [3], "summary": {}}', '{"runs": [{}], "summary": {"gap_end": 3}}']
)
def test_a_damaged_summary(seeds: Path, content: str) -> None:
    (seeds / "seeds.json").write_text(content)
    page = page_of(seeds)
    assert page.text.count("finished: 3 of 3 updates") == 4
    assert "seeds.json can't be read: " in page.text or "The folder None is missing." in page.text


def test_many_seeds_stay_small(seeds: Path, monkeypatch: pytest.MonkeyPatch, run_of: Callable[[str], Path]) -> None:
    monkeypatch.setattr("fastebm.report.page.PICTURE_BYTES", 300_000)
    for number in range(2, 5):
        shutil.copytree(seeds / "seed-0", seeds / f"seed-{number}")
    page = page_of(seeds)
    assert "More curves are left out, so that the page stays small." in page.text
    assert (seeds / "report.html").stat().st_size < 300_000 + 5 * 60_000


def test_the_command(seeds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(seeds)]) == 0
    assert capsys.readouterr().out.startswith(f"{seeds / 'report.html'}: ")
    (seeds / "seeds.json").unlink()
    assert main(["report", str(seeds), "--overwrite"]) == 2
    assert "below it are runs: seed-0, seed-1" in capsys.readouterr().err
