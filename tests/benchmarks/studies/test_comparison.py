"""The same net trained in two ways: rows of one table have one config, and only missing ones are run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.harness.pages import RESULTS, comparison_table, gain_cells, read_entries
from benchmarks.studies import comparison
from fastebm.models import Flow


def test_rows_of_one_table_have_one_config_and_sizes_have_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, int, int]] = []

    def train(config: Any, images: object, folder: Path, progress: bool) -> None:
        trained.append((folder.name, config.size, config.iterations))

    log = SimpleNamespace(lines=lambda: [{"seconds": 60.0}])
    monkeypatch.setattr(comparison.fastebm, "train", train)
    monkeypatch.setattr(comparison.fastebm, "load", lambda folder: None)
    monkeypatch.setattr(comparison.RunFolder, "existing", lambda folder: SimpleNamespace(log=log))
    study = comparison.Study(
        comparison.EC_VAE_PRESETS,
        {"plain": {"lambda_start": 0.0}, "calibrated": {}},
        lambda run, config, evaluator: {"distance": 1.0},
        (("distance", "distance", ".2f", -1),),
    )
    monkeypatch.setitem(comparison.STUDIES, "ec-vae", study)
    page = tmp_path / "page"

    def call(*arguments: str) -> None:
        places = ["--page", str(page), "--runs", str(tmp_path / "runs")]
        comparison.main(["ec-vae", "digits", *places, "--size", "8", *arguments])

    call("--seeds", "1", "--set", "iterations=5")
    call("--seeds", "1", "--set", "iterations=5")  # nothing is missing
    assert trained == [("digits-8-plain-0", 8, 5), ("digits-8-calibrated-0", 8, 5)]
    assert {path.name for path in page.iterdir()} == {"results.json", "README.md"}
    assert list(read_entries(page)) == ["digits-8"]
    text = (page / "README.md").read_text()
    assert "digits-8: 8x8, 5 updates of batch 64." in text
    assert text.count("| 0 | plain | 1.00 | 1.0 |") == text.count("| 0 | calibrated | 1.00 | 1.0 |") == 1
    with pytest.raises(SystemExit, match="has rows with iterations 5, not 6: give the same settings"):
        call("--seeds", "2", "--set", "iterations=6")
    assert len(trained) == 2


def test_an_unknown_preset_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        comparison.main(["ec-flow", "nothing"])
    assert "ec-flow has the presets" in capsys.readouterr().err


def test_the_inverse_error_of_a_flow_is_measured_and_shown() -> None:
    flow = Flow((1, 4, 4), levels=1, flow_steps=1, width=2)
    images = torch.rand(3, 1, 4, 4)
    assert comparison.inverse_error(flow, images) < 1e-5
    decode = flow.decode
    flow.decode = lambda latents: decode(latents) + 0.25  # type: ignore[method-assign]
    assert comparison.inverse_error(flow, images) == pytest.approx(0.25, abs=1e-5)
    stored = read_entries(RESULTS / "ec-flow")["digits"]
    stored["rows"][0]["inverse"] = 2.5e-6
    assert comparison_table("digits", stored).count("| 2.5e-06 |") == 1


@pytest.mark.parametrize("page", comparison.STUDIES)
def test_committed_columns_are_those_of_the_study(page: str) -> None:
    for entry in read_entries(RESULTS / page).values():
        keys = [column[0] for column in entry["columns"]]
        assert keys == [column[0] for column in comparison.STUDIES[page].columns]
        assert {row["method"] for row in entry["rows"]} == set(comparison.STUDIES[page].methods)


def test_a_gain_is_counted_over_the_seeds_that_have_both_rows() -> None:
    values = {0: (3.0, 1.0), 1: (4.0, 5.0), 2: (7.0,)}
    rows = [{"seed": seed, "bits": value} for seed, pair in values.items() for value in pair]
    assert gain_cells(rows, "bits", -1) == ("1 of 2 seeds", "0.5", "2.83")
    assert gain_cells(rows, "bits", 1) == ("1 of 2 seeds", "-0.5", "2.83")
    assert gain_cells(rows[:2], "bits", 1) is None
