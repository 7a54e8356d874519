"""Figures show what they are given: tiles to the pixel, histograms to the bin."""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def test_traces_show_the_chains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chains = torch.linspace(0, 1, 40)[:, None] + torch.arange(21)
    traces = {name: {"energy": chains + k, "norm_of_x": -chains} for k, name in enumerate(("4x4", "8x8"))}
    figures: list[Figure] = []
    save = plotting.save_figure

    def kept(figure: Figure, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plotting, "save_figure", kept)
    plotting.save_traces(tmp_path / "traces.png", traces, {"4x4": range(10, 410, 10), "8x8": range(40)})
    (figure,) = figures
    panels = np.array(figure.axes).reshape(2, 2)
    assert [axes.get_title() for axes in panels[0]] == ["4x4", "8x8"]
    assert [axes.get_ylabel() for axes in panels[:, 0]] == ["energy", "norm of x"]
    *single, median = panels[0, 0].lines
    assert len(single) == plotting.SINGLE_CHAINS
    np.testing.assert_allclose(median.get_ydata(), chains[:, 10])
    np.testing.assert_array_equal(median.get_xdata(), np.arange(10, 410, 10))
    np.testing.assert_allclose(single[2].get_ydata(), chains[:, 2])
    band = panels[0, 1].collections[0].get_paths()[0].get_extents()
    np.testing.assert_allclose((band.y0, band.y1), (1 + 1, 1 + 19 + 1))  # of 21 chains, one at each end is outside
    assert imread(tmp_path / "traces.png").std() > 0.05


# Wrong input ----------------------------------------------------------------------------------------------------------

IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
LINES = [{"iteration": k, "size": 8, "loss": 1.0} for k in range(3)]
PATHS = torch.zeros(2, 3, 1, 8, 8)

WRONG: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: plotting.save_grid(path, IMAGES * torch.nan), "images must be finite"),
    (lambda path: plotting.save_grid(path, IMAGES / 0), "images must be finite"),
    (lambda path: plotting.save_grid(path, IMAGES[:0]), "none of them 0"),
    (lambda path: plotting.save_grid(path, IMAGES[0]), "must be"),
    (lambda path: plotting.save_grid(path, IMAGES.to(torch.uint8)), "floats in .*uint8.*to_float"),
    (lambda path: plotting.save_grid(path, IMAGES + 1j), "floats in"),
    (lambda path: plotting.save_grid(path, [1.0]), "floats in .*got list"),  # type: ignore[arg-type]
    (lambda path: plotting.save_grid(path, IMAGES, columns=0), "columns must be at least 1"),
    (lambda path: plotting.save_grid(path, IMAGES[:1].expand(10**6, 1, 8, 8)), "pixels is too large"),
    (lambda path: plotting.save_grid(path, IMAGES[:1].expand(10**9, 1, 8, 8)[:, :, :1, :1], 10**6), "too large"),
    (lambda path: plotting.tile(IMAGES[:1, :, :1, :1].expand(1, 1, 10**5, 10**5), 1), "too large"),
    (lambda path: plotting.save_samples(path, IMAGES, IMAGES[:0]), "none of them 0"),
    (lambda path: plotting.save_panels(path, []), "panels must not be empty"),
    (lambda path: plotting.save_panels(path, [("a", IMAGES)] * 20_000), "too large"),
    (lambda path: plotting.save_strip(path, []), "snapshots must not be empty"),
    (lambda path: plotting.save_strip(path, [IMAGES, IMAGES[:2]]), "of the same chains"),
    (lambda path: plotting.save_strip(path, [IMAGES, IMAGES * torch.nan]), "finite"),
    (lambda path: plotting.save_columns(path, {}), "one length"),
    (lambda path: plotting.save_columns(path, {"a": IMAGES, "b": IMAGES[:2]}), "one length"),
    (lambda path: plotting.save_columns(path, {"a": IMAGES, "b": IMAGES[:, :, :4]}), "one size"),
    (lambda path: plotting.save_columns(path, {"a": IMAGES, "b": IMAGES * torch.nan}), "finite"),
    (lambda path: plotting.save_paths(path, {}, {}), "paths must be"),
    (lambda path: plotting.save_paths(path, {"a": PATHS}, {"a": torch.zeros(2, 4)}), "paths must be"),
    (lambda path: plotting.save_paths(path, {"a": IMAGES}, {"a": torch.zeros(2, 3)}), "paths must be"),
    (lambda path: plotting.save_ranked(path, {}), "rows must not be empty"),
    (lambda path: plotting.save_ranked(path, {"a": [("b", IMAGES)], "c": []}), "as many panels"),
    (lambda path: plotting.save_curves(path, LINES, ()), "panels must not be empty"),
    (lambda path: plotting.save_curves(path, [*LINES, {"iteration": 3}]), "a line of the log lacks size"),
    (lambda path: plotting.save_histograms(path, {}), "at least one set"),
    (lambda path: plotting.save_histograms(path, {"a": {"e": scores(0, 1)}, "b": {}}), "the same scores"),
    (lambda path: plotting.save_histograms(path, {"a": {"e": scores(0, 1) * np.float32("nan")}}), "scores of a must"),
    (lambda path: plotting.save_histograms(path, {"a": {"e": scores(0, 1)[:0]}}), "scores of a must"),
    (lambda path: plotting.save_traces(path, {}), "at least one level"),
    (lambda path: plotting.save_traces(path, {"a": {}}), "at least one level"),
    (lambda path: plotting.save_traces(path, {"a": {"e": IMAGES}}), r"traces of e must be \(n, B\)"),
    (lambda path: plotting.save_traces(path, {"a": {"e": torch.zeros(0, 2)}}), "traces of e must be"),
    (lambda path: plotting.save_traces(path, {"a": {"e": torch.full((2, 2), torch.nan)}}), "traces of e must be"),
    (
        lambda path: plotting.save_traces(path, {"a": {"e": torch.ones(2, 2)}, "b": {"f": torch.ones(2, 2)}}),
        "the same summaries",
    ),
    (lambda path: plotting.save_roc(path, {}), "at least one score"),
    (lambda path: plotting.heatmap(torch.full((1, 2, 2), torch.nan)), "values must be finite"),
    (lambda path: plotting.new_figure(1e4, 1e4), "too large"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_can_not_be_drawn_is_refused_in_one_line(tmp_path: Path, number: int) -> None:
    draw, message = WRONG[number]
    (tmp_path / "a.png").write_text("precious")
    with pytest.raises((ValueError, TypeError), match=message) as refused:
        draw(tmp_path / "a.png")
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_text() == "precious"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_are_drawn_like_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    plotting.save_grid(tmp_path / "a.png", IMAGES.to(dtype).requires_grad_())
    plotting.save_grid(tmp_path / "b.png", IMAGES.to(dtype).float())
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    energies = {"a": torch.zeros(2, 3, dtype=dtype)}
    plotting.save_paths(tmp_path / "c.png", {"a": PATHS.to(dtype)}, energies)
    assert plotting.heatmap(torch.ones(1, 2, 2, dtype=dtype)).shape == (1, 3, 2, 2)


@pytest.mark.parametrize("name", ["$x^{", "\udcff\x1b[1m", "未知的数据", "n" * 5000, "_hidden", "a\nb", ""])
@pytest.mark.filterwarnings("error")
def test_names_of_files_may_be_anything(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.png"
    plotting.save_histograms(path, {name: {"energy": scores(0, 1)}, "other": {"energy": scores(0, 2)}})
    curve = (np.array([0.0, 1.0]), np.array([0.0, 1.0]), 0.5)
    plotting.save_roc(path, {"energy": {name: curve, "b": curve}})
    plotting.save_ranked(path, {name: [("best", IMAGES), ("worst", IMAGES)]})
    plotting.save_panels(path, [(name, IMAGES)])
    assert imread(path).std() > 0.01


@pytest.mark.parametrize("path", ["missing/a.png", "n" * 300 + ".png", "folder"])
def test_paths_that_can_not_be_written_leave_nothing(tmp_path: Path, path: str) -> None:
    (tmp_path / "folder").mkdir()
    for draw in (
        lambda path: plotting.save_grid(path, IMAGES),
        lambda path: plotting.save_panels(path, [("", IMAGES)]),
    ):
        with pytest.raises(OSError, match=r"No such file|too long|directory"):
            draw(tmp_path / path)
    assert [entry.name for entry in tmp_path.rglob("*")] == ["folder"]


@pytest.mark.parametrize("draw", [plotting.save_grid, lambda path, images: plotting.save_panels(path, [("", images)])])
def test_ctrl_c_while_drawing_stops_after_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: Callable[[Path, torch.Tensor], None]
) -> None:
    """Within matplotlib an interrupt was lost in a callback of a weak reference, or became another error."""
    tile = plotting.tile

    def pressed(*arguments: Any) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        return tile(*arguments)

    monkeypatch.setattr(plotting, "tile", pressed)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "a.png", IMAGES)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert imread(tmp_path / "a.png").std() > 0.01
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_density_is_drawn_over_histograms_of_the_same_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plotting, "save_figure", lambda figure, path: drawn.append(figure))
    x = np.linspace(0, 1, 11)
    outside = np.array([0.05, 0.05, 0.55, 7.0])
    plotting.save_density(tmp_path / "density.png", x, np.ones(11), {"a": outside, "b": outside})
    (axes,) = drawn[0].axes
    first, second = (patch for patch in axes.patches if isinstance(patch, StepPatch))
    values, edges, _ = first.get_data()
    assert (values * np.diff(edges)).sum() == pytest.approx(0.75)  # one of four lies outside
    np.testing.assert_array_equal(values, second.get_data()[0])
    assert axes.lines[0].get_ydata().tolist() == [1.0] * 11
    with pytest.raises(ValueError, match="x must be"):
        plotting.save_density(tmp_path / "density.png", x[::-1], np.ones(11), {})
    with pytest.raises(ValueError, match="samples of a must be"):
        plotting.save_density(tmp_path / "density.png", x, np.ones(11), {"a": np.array([np.nan])})


def test_curves_as_a_drawing_are_the_same_text_and_stay_short() -> None:
    """Values that can't be drawn are left out; the extremes of a long log stay."""
    values = [math.nan, math.inf, -1e300, 1e300, 0.5]
    log = [{"iteration": k, "size": 4 + 4 * (k > 2), "attempt": int(k > 3), "gap": v} for k, v in enumerate(values)]
    text = plotting.svg_curves(log, {"gap": "a <gap> $x$"})
    assert text == plotting.svg_curves(log, {"gap": "a <gap> $x$"})
    assert text.startswith("<svg ")
    assert "a &lt;gap&gt; $x$" in text
    assert "to 8x8" in text
    assert "guard went back" in text
    long = [{"iteration": k, "gap": math.sin(k), "loss": 100.0 * (k == 12_345)} for k in range(30_000)]
    assert len(plotting.svg_curves(long, {"gap": "gap"})) < 60_000
    _, thinned = plotting._thinned(long, "loss")
    assert thinned.max() == 100
    assert len(thinned) <= 1200
