"""Figures show what they are given: tiles to the pixel, histograms to the bin."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import StepPatch
from PIL import Image

from fastebm import plotting

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def test_tiles_stand_in_rows_with_lines_between_them() -> None:
    images = torch.linspace(-1, 1, 3).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    picture = plotting.tile(images, columns=2, border=0.25)
    assert picture.shape == (7, 7, 3)
    line, empty = [0.25] * 7, 0.25
    first = [0.25, 0.0, 0.0, 0.25, 0.5, 0.5, 0.25]
    second = [0.25, 1.0, 1.0, 0.25, empty, empty, 0.25]
    expected = torch.tensor([line, first, first, line, second, second, line])
    assert torch.equal(picture, expected[:, :, None].expand(7, 7, 3))


def test_colours_and_clamping() -> None:
    image = torch.tensor([-3.0, 0.0, 3.0]).reshape(1, 3, 1, 1)
    assert plotting.tile(image, 5)[1, 1].tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("shape", [(0, 1, 4, 4), (2, 0, 4, 4), (1, 4, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images must be"):
        plotting.tile(torch.zeros(shape), 4)


def test_two_colours_are_shown_by_their_mean() -> None:
    image = torch.tensor([-1.0, 0.0]).reshape(1, 2, 1, 1)
    assert plotting.tile(image, 5)[1, 1].tolist() == [0.25, 0.25, 0.25]


def test_a_grid_is_enlarged_pixel_by_pixel(tmp_path: Path) -> None:
    images = torch.rand(5, 3, 8, 8) * 2 - 1
    plotting.save_grid(tmp_path / "grid.png", images, columns=3)
    picture = torch.from_numpy(imread(tmp_path / "grid.png"))[:, :, :3]
    assert picture.shape == ((2 * 9 + 1) * 4, (3 * 9 + 1) * 4, 3)
    torch.testing.assert_close(picture[2::4, 2::4], plotting.tile(images, 3, border=0.35), atol=1 / 250, rtol=0)


def test_pictures_of_a_run(tmp_path: Path) -> None:
    images = torch.rand(7, 1, 8, 8) * 2 - 1
    moments = [torch.zeros(2, 1, 4, 4), *torch.zeros(30, 2, 1, 8, 8)]
    log = [
        {"iteration": k, "size": 4 if k < 5 else 8, **dict.fromkeys(("loss", "energy_data", "energy_samples"), 0.1 * k)}
        | {"gradient_norm": 1.0}
        for k in range(1, 10)
    ]
    plotting.save_samples(tmp_path / "samples.png", images, images[:3])
    plotting.save_strip(tmp_path / "strip.png", moments)
    plotting.save_curves(tmp_path / "curves.png", log)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "samples.png", "strip.png"]
    for path in tmp_path.iterdir():
        assert imread(path).std() > 0.01


def scores(low: float, high: float, count: int = 300) -> FloatArray:
    return np.linspace(low, high, count, dtype=np.float32)


def test_bins_have_the_shares_of_scores_counted_by_hand() -> None:
    given = {"in": scores(0, 8), "near": np.array([1.03, 1.04, 6.91, 6.91], np.float32)}
    edges, shares = plotting.histogram(given)
    assert len(edges) == plotting.BINS + 1
    for name, values in given.items():
        assert shares[name].shape == (plotting.BINS,)
        assert shares[name].sum() == pytest.approx(100)
        for place in range(plotting.BINS):
            low, high = edges[place], edges[place + 1]
            inside = (values >= low) & ((values < high) | (place == plotting.BINS - 1))
            if 0 < place < plotting.BINS - 1:
                assert shares[name][place] == pytest.approx(100 * inside.mean())
    assert np.count_nonzero(shares["in"]) == plotting.BINS  # 300 even scores leave no bin empty
    assert sorted(shares["near"][shares["near"] > 0].tolist()) in ([50, 50], [25, 25, 50])


def test_what_lies_far_away_is_counted_at_the_ends() -> None:
    given = {"in": scores(0, 1), "far": scores(1000, 2000, 9), "below": scores(-2000, -1000, 9)}
    edges, shares = plotting.histogram(given)
    assert -3.1 < edges[0] < edges[-1] < 4.1  # not over thousands, where the first set would be one bar
    assert shares["far"][-1] == shares["below"][0] == 100
    assert np.count_nonzero(shares["in"]) > 5


def test_equal_scores_are_one_bar() -> None:
    edges, shares = plotting.histogram({"in": np.full(5, 3.0, np.float32), "out": np.full(7, 3.0, np.float32)})
    assert (np.diff(edges) > 0).all()
    for heights in shares.values():
        assert sorted(heights.tolist())[-2:] == [0, 100]


def test_the_picture_shows_these_bins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "in_distribution": {"energy": scores(0, 1), "total_variation": scores(5, 7)},
        "noise": {"energy": scores(0.5, 3), "total_variation": scores(90, 95)},
    }
    figures: list[Figure] = []
    save = plotting.save_figure

    def kept(figure: Figure, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plotting, "save_figure", kept)
    plotting.save_histograms(tmp_path / "histogram.png", given)
    (figure,) = figures
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_xlabel() for axes in panels] == ["energy", "total variation"]
    for axes, name in zip(panels, ("energy", "total_variation"), strict=True):
        edges, shares = plotting.histogram({label: by_score[name] for label, by_score in given.items()})
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
