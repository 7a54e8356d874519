"""What a detection shows: every score in a bin, and all sets in the panels; and pictures from a folder as outliers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from PIL import Image

from fastebm.cli import main
from fastebm.data import open_images, to_float
from fastebm.tasks import outlier_scores
from fastebm.tasks.detection import pictures as detect_pictures
from fastebm.tasks.detection.pictures import BINS, histogram, save_histogram
from fastebm.training import CoarseToFineRun

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def scores(low: float, high: float, count: int = 300) -> FloatArray:
    return np.linspace(low, high, count, dtype=np.float32)


def test_bins_have_the_shares_of_scores_counted_by_hand() -> None:
    given = {"in": scores(0, 8), "near": np.array([1.03, 1.04, 6.91, 6.91], np.float32)}
    edges, shares = histogram(given)
    assert len(edges) == BINS + 1
    for name, values in given.items():
        assert shares[name].shape == (BINS,)
        assert shares[name].sum() == pytest.approx(100)
        for place in range(BINS):
            low, high = edges[place], edges[place + 1]
            inside = (values >= low) & ((values < high) | (place == BINS - 1))
            if 0 < place < BINS - 1:
                assert shares[name][place] == pytest.approx(100 * inside.mean())
    assert np.count_nonzero(shares["in"]) == BINS  # 300 even scores leave no bin empty
    assert sorted(shares["near"][shares["near"] > 0].tolist()) in ([50, 50], [25, 25, 50])


def test_what_lies_far_away_is_counted_at_the_ends() -> None:
    edges, shares = histogram({"in": scores(0, 1), "far": scores(1000, 2000, 9), "below": scores(-2000, -1000, 9)})
    assert -3.1 < edges[0] < edges[-1] < 4.1  # not over thousands, where the first set would be one bar
    assert shares["far"][-1] == shares["below"][0] == 100
    assert np.count_nonzero(shares["in"]) > 5


def test_equal_scores_are_one_bar() -> None:
    edges, shares = histogram({"in": np.full(5, 3.0, np.float32), "out": np.full(7, 3.0, np.float32)})
    assert (np.diff(edges) > 0).all()
    for heights in shares.values():
        assert sorted(heights.tolist())[-2:] == [0, 100]


def test_the_picture_shows_these_bins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "in_distribution": {"energy": scores(0, 1), "total_variation": scores(5, 7)},
        "noise": {"energy": scores(0.5, 3), "total_variation": scores(90, 95)},
    }
    figures: list[Figure] = []
    save = detect_pictures._save

    def kept(figure: Figure, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(detect_pictures, "_save", kept)
    save_histogram(tmp_path / "histogram.png", given)
    (figure,) = figures
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_xlabel() for axes in panels] == ["energy", "total variation"]
    for axes, name in zip(panels, ("energy", "total_variation"), strict=True):
        edges, shares = histogram({label: by_score[name] for label, by_score in given.items()})
        drawn = [patch for patch in axes.patches if isinstance(patch, StepPatch)]
        assert [patch.get_label() for patch in drawn] == ["in distribution", "noise"]
        for patch, heights in zip(drawn, shares.values(), strict=True):
            np.testing.assert_array_equal(patch.get_data()[0], heights)
            np.testing.assert_array_equal(patch.get_data()[1], edges)
        top = max(heights.max() for heights in shares.values())
        assert axes.get_ylim()[1] >= top  # bars are within the panel
    # In the file, too: gray of the first set, the first colour of the other one.
    pixels = np.asarray(Image.open(tmp_path / "histogram.png").convert("RGB")).astype(int)
    for colour in ((191, 191, 191), (31, 119, 180)):
        assert (np.abs(pixels - colour).max(2) < 12).sum() > 300


def test_pictures_in_a_folder_are_outliers(
    run: CoarseToFineRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "stripes"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for number in range(6):
        stripes = np.repeat(draws.integers(0, 256, (8, 1), dtype=np.uint8), 8, axis=1)
        Image.fromarray(stripes).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no picture")
    out = tmp_path / "out"
    words = ["--ood-data", f"stripes={folder}", "--count", "50", "--engine", "autograd", "--out", str(out)]
    assert main(["detect", str(run.path), *words]) == 0, capsys.readouterr().err
    assert f"{folder}: folder of pictures" in capsys.readouterr().out
    numbers = json.loads((out / "detect.json").read_text())
    assert next(iter(numbers["metrics"])) == "stripes"
    assert numbers["sets"]["stripes"]["scores"]["energy"]["count"] == 6
    pixels = torch.stack([torch.from_numpy(np.asarray(Image.open(folder / f"{k}.png")).copy()) for k in range(6)])
    assert torch.equal(open_images(folder).pixels, pixels[:, None])
    expected = outlier_scores(run.levels[8], to_float(pixels[:, None]), engine="autograd")["energy"]
    with np.load(out / "scores.npz") as kept:
        np.testing.assert_allclose(kept["stripes/energy"], expected, rtol=1e-6)
