"""The study of translation: one row for the sources and one for each start and data weight, and no source is shown."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness.pages import read_entries
from benchmarks.studies import translation
from fastebm.data import open_images
from fastebm.training import CoarseToFineConfig, train


def test_a_run_of_two_levels_becomes_an_entry_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources are dark and targets bright, which the classifier learns from few images."""
    random = np.random.default_rng(0)
    for name, low in (("dark", 0), ("bright", 200)):
        pixels = random.integers(low, low + 50, (80, 16, 16, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", x_train=pixels, x_test=pixels[:10])
    tiny = CoarseToFineConfig(
        sizes=(8, 16),
        channels=3,
        iterations=(1, 1),
        batch_sizes=(4, 4),
        learning_rates=(1e-3, 1e-3),
        num_steps=6,
        step_size=2.0,
    )
    run, page = tmp_path / "bright-16", tmp_path / "page"
    train(dataclasses.replace(tiny, base_width=4), open_images(tmp_path / "bright.npz", size=16), run, progress=False)
    page.mkdir()
    marker = "<!-- bright-16: filled by benchmarks/harness/pages.py -->\n<!-- bright-16: end -->"
    (page / "README.md").write_text(marker)
    given = ["--page", page, "--source", tmp_path / "dark.npz", "--target", tmp_path / "bright.npz"]
    monkeypatch.setattr(sys, "argv", ["translation", *map(str, [run, *given, "--images-seen", 2000])])
    translation.main()
    entry = read_entries(page)["bright-16"]
    sources, *rows = entry["rows"]
    assert (entry["images"], entry["size"], entry["num_steps"]) == (10, 16, 6)
    assert entry["classifier_accuracy"] == 1
    assert sources == {"chains": "sources", "classified_as_target": 0, "change": 0, "correlation": pytest.approx(1)}
    assert [(row["start_size"], row["data_weight"], row["num_steps"]) for row in rows] == [
        *((16, 0, 6), (16, 0.015, 6), (8, 0, 6), (8, 0.015, 6)),
        *((16, 0, 12), (16, 0, 18)),
    ]
    assert all(row["change"] > 0 for row in rows)
    assert {path.name for path in page.glob("*.png")} == {
        f"bright-16-{what}.png" for what in ("from-16", "from-8", "from-16-12-steps", "from-16-18-steps", "samples")
    }
    assert "| from 8, data weight 0 |" in (page / "README.md").read_text()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--starts", "8"])
    translation.main()
    assert [row.get("start_size") for row in read_entries(page)["bright-16"]["rows"]] == [None, 8, 8]
