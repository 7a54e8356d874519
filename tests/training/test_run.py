"""Run folders, their log, and the guard."""

import math
from pathlib import Path

import pytest

from fastebm.training.run import DivergedError, Guard, Progress, RunError, RunFolder, RunLog

HEALTHY = {"largest_energy_data": 3.0, "largest_energy_samples": 4.0, "gradient_norm": 1.0}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("largest_energy_data", math.nan, "an energy of data is nan"),
        ("largest_energy_samples", math.inf, "an energy of samples is inf"),
        ("largest_energy_samples", 100.5, "magnitude 100.5, more than max_energy = 100"),
        ("gradient_norm", math.nan, "the gradient of the weights has the norm nan"),
    ],
)
def test_the_guard_says_what_is_wrong_and_when(name: str, value: float, message: str) -> None:
    with pytest.raises(DivergedError, match=f"iteration 17.*{message}"):
        Guard(100.0).check(17, HEALTHY | {name: value})


def test_the_guard_lets_healthy_energies_pass() -> None:
    Guard(100.0).check(1, HEALTHY | {"largest_energy_data": 100.0, "gradient_norm": 1e9})


def test_a_folder_is_made_and_taken_up_again(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    RunFolder.open(path, "kind", {"x": 1, "sizes": (4, 8)})
    again = RunFolder.open(path, "kind", {"x": 1, "sizes": (4, 8)})
    assert again.config("kind") == {"x": 1, "sizes": [4, 8]}
    assert RunFolder.existing(path).path == path


def test_another_config_is_refused_with_the_difference(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "run", "kind", {"rate": 1, "seed": 0})
    with pytest.raises(RunError, match="rate is 1 there and 2 here"):
        RunFolder.open(tmp_path / "run", "kind", {"rate": 2, "seed": 0})


def test_another_kind_a_foreign_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "run", "kind", {})
    with pytest.raises(RunError, match="of kind 'kind', not 'other'"):
        RunFolder.open(tmp_path / "run", "other", {})
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    for name in ("foreign", "file"):
        with pytest.raises(RunError, match=f"{name} exists and is not a run"):
            RunFolder.open(tmp_path / name, "kind", {})
    with pytest.raises(RunError, match="it has no config"):
        RunFolder.existing(tmp_path / "nothing")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"kind": "kind", "config": 3}'])
def test_a_damaged_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"config\.json is damaged"):
        RunFolder.existing(tmp_path).config("kind")


def test_the_log_rewinds_and_forgives_a_cut_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    assert log.lines() == []
    for iteration in range(1, 6):
        log.append({"iteration": iteration, "gap": 0.5})
    with log.path.open("a") as file:
        file.write('{"iteration": 6, "ga')
    assert [line["iteration"] for line in log.lines()] == [1, 2, 3, 4, 5]
    log.rewind(3)
    log.append({"iteration": 4, "gap": 0.5})
    assert [line["iteration"] for line in log.lines()] == [1, 2, 3, 4]


def test_the_bar_starts_where_the_run_stands_and_shows_numbers(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress.over(10, 4, shown=True) as bar:
        bar.advance("8x8", gap=0.25)
    shown = capfd.readouterr().err
    assert "5/10" in shown
    assert "gap=+0.250" in shown
    with Progress.over(10, 4, shown=False) as bar:
        bar.advance("8x8", gap=0.25)
    assert capfd.readouterr().err == ""
