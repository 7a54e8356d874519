"""The picture of a translation: its columns in the order of the way, the map of change, and sources left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastebm import plotting
from fastebm.cli import main
from fastebm.plotting import heatmap
from fastebm.tasks import TranslateOptions, translate
from fastebm.tasks.pictures import save_translated
from fastebm.tasks.translate import TranslationResult
from fastebm.training import CoarseToFineRun

Columns = dict[str, Tensor]


def darker(x: Tensor) -> Tensor:
    """An energy of black images, whose chains go down a tenth of what is left in each step."""
    return 0.05 * (x + 1).square().sum((1, 2, 3))


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> list[Columns]:
    """What `save_columns` was asked to draw, picture by picture; it is drawn all the same."""
    asked: list[Columns] = []
    save = plotting.save_columns

    def kept(path: Path, given: Mapping[str, Tensor], **options: Any) -> None:
        asked.append(dict(given))
        save(path, given, **options)

    monkeypatch.setattr(plotting, "save_columns", kept)
    return asked


@pytest.fixture(scope="module")
def translated() -> TranslationResult:
    source = torch.linspace(-0.8, 0.9, 3 * 64).reshape(3, 1, 8, 8)
    return translate(darker, source, TranslateOptions(num_steps=20, snapshots=4, start_noise=0.0))


def test_heatmap_goes_from_black_over_red_to_light_yellow() -> None:
    images = heatmap(torch.tensor([[[0.0, 0.25, 0.5, 0.75, 1.0]]]))
    assert images.shape == (1, 3, 1, 5)
    assert images.dtype == torch.float32
    red, green, blue = ((images[0, :, 0] + 1) / 2).tolist()
    assert max(red[0], green[0], blue[0]) < 0.02
    assert (red[2] > 0.7, green[2] < 0.3, blue[2] < 0.4) == (True, True, True)
    assert (red[4] > 0.95, green[4] > 0.95, 0.5 < blue[4] < 0.75) == (True, True, True)
    brightness = (images * torch.tensor([0.3, 0.6, 0.1]).reshape(3, 1, 1)).sum(1).flatten()
    assert (brightness.diff() > 0).all()


def test_heatmap_keeps_what_is_where() -> None:
    values = torch.zeros(2, 4, 6)
    values[1, 3, 2] = 1
    images = heatmap(values)
    assert images.shape == (2, 3, 4, 6)
    brightest = images.sum(1).flatten(1).argmax(1)
    assert int(brightest[1]) == 3 * 6 + 2
    assert torch.equal(images[0], images[0, :, :1, :1].expand(3, 4, 6))


def test_columns_are_the_way_in_order(translated: TranslationResult, tmp_path: Path, columns: list[Columns]) -> None:
    save_translated(tmp_path / "a.png", translated)
    (shown,) = columns
    largest = float(translated.change.max())
    assert list(shown) == ["source", "step 5", "step 10", "step 15", "step 20", f"change\n0 to {largest:.1f}"]
    assert torch.equal(shown["source"], translated.source)
    for step in (5, 10, 15, 20):  # a tenth of the way to black in each step
        torch.testing.assert_close(shown[f"step {step}"], (translated.source + 1) * 0.9**step - 1)
    assert torch.equal(shown["step 20"], translated.images)
    torch.testing.assert_close(shown[f"change\n0 to {largest:.1f}"], heatmap(translated.change / largest))


def test_the_file_has_the_columns_from_left_to_right(translated: TranslationResult, tmp_path: Path) -> None:
    """Ever darker from the source to the end, in pixels of the file."""
    save_translated(tmp_path / "a.png", translated)
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(float)
    lines = pixels[len(pixels) // 4 : -len(pixels) // 8]  # beneath the headings
    inner = np.flatnonzero(lines.std((0, 2)) > 5)  # what is neither margin nor line
    spans = np.array_split(np.arange(inner[0], inner[-1] + 1), 6)
    brightness = [lines[:, span[len(span) // 4 : -len(span) // 4]].mean() for span in spans]
    assert brightness[:5] == sorted(brightness[:5], reverse=True)
    colours = np.abs(lines[:, :, 0] - lines[:, :, 2]).max(0)
    assert colours[spans[0][0] : spans[4][len(spans[4]) // 2]].max() == 0  # gray, but for the map of change
    assert colours[spans[5][len(spans[5]) // 2]] > 50


def test_sources_are_left_out_where_asked(
    translated: TranslationResult, tmp_path: Path, columns: list[Columns]
) -> None:
    save_translated(tmp_path / "all.png", translated)
    save_translated(tmp_path / "hidden.png", translated, source=False)
    whole, hidden = columns
    assert list(hidden) == list(whole)[1:]
    for name, images in hidden.items():
        assert torch.equal(images, whole[name])
        assert not torch.equal(images, translated.source)
    wide, narrow = (Image.open(tmp_path / name).size[0] for name in ("all.png", "hidden.png"))
    assert narrow < wide * 0.9


def test_a_translation_without_change_is_black(tmp_path: Path, columns: list[Columns]) -> None:
    source = torch.zeros(2, 1, 8, 8)
    result = translate(
        lambda x: 0 * x.sum((1, 2, 3)), source, TranslateOptions(num_steps=2, snapshots=1, start_noise=0.0)
    )
    save_translated(tmp_path / "a.png", result)
    assert list(columns[0]) == ["source", "step 2", "change\n0 to 0.0"]
    assert torch.equal(columns[0]["change\n0 to 0.0"], heatmap(torch.zeros(2, 8, 8)))


@pytest.mark.parametrize("hidden", [False, True])
def test_the_command_hides_sources(
    run: CoarseToFineRun, tmp_path: Path, columns: list[Columns], capsys: pytest.CaptureFixture[str], hidden: bool
) -> None:
    np.savez(tmp_path / "data.npz", images=np.full((3, 8, 8), 200, np.uint8))
    words = ["translate", str(run.path), "--data", str(tmp_path / "data.npz"), "--num-steps", "4"]
    words += ["--out", str(tmp_path / "out"), *(["--hide-source"] if hidden else [])]
    assert main(words) == 0, capsys.readouterr().err
    (shown,) = columns
    assert ("source" in shown) is not hidden
    assert list(shown)[-2] == "step 4"
    with np.load(tmp_path / "out" / "translated.npz") as arrays:
        assert set(arrays.files) == {"source", "translated", "change"}
