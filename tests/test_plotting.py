"""Pictures are what they say, to the pixel where they are only pixels."""

from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from fastebm import plotting as pictures


def test_tiles_stand_in_rows_with_lines_between_them() -> None:
    images = torch.linspace(-1, 1, 3).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    picture = pictures.tile(images, columns=2, border=0.25)
    assert picture.shape == (7, 7, 3)
    line, empty = [0.25] * 7, 0.25
    first = [0.25, 0.0, 0.0, 0.25, 0.5, 0.5, 0.25]
    second = [0.25, 1.0, 1.0, 0.25, empty, empty, 0.25]
    expected = torch.tensor([line, first, first, line, second, second, line])
    assert torch.equal(picture, expected[:, :, None].expand(7, 7, 3))


def test_colours_and_clamping() -> None:
    image = torch.tensor([-3.0, 0.0, 3.0]).reshape(1, 3, 1, 1)
    assert pictures.tile(image, 5)[1, 1].tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("shape", [(0, 1, 4, 4), (2, 0, 4, 4), (1, 4, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images must be"):
        pictures.tile(torch.zeros(shape), 4)


def test_two_colours_are_shown_by_their_mean() -> None:
    image = torch.tensor([-1.0, 0.0]).reshape(1, 2, 1, 1)
    assert pictures.tile(image, 5)[1, 1].tolist() == [0.25, 0.25, 0.25]


def test_a_grid_is_enlarged_pixel_by_pixel(tmp_path: Path) -> None:
    images = torch.rand(5, 3, 8, 8) * 2 - 1
    pictures.save_grid(tmp_path / "grid.png", images, columns=3)
    picture = torch.from_numpy(imread(tmp_path / "grid.png"))[:, :, :3]
    assert picture.shape == ((2 * 9 + 1) * 4, (3 * 9 + 1) * 4, 3)
    torch.testing.assert_close(picture[2::4, 2::4], pictures.tile(images, 3, border=0.35), atol=1 / 250, rtol=0)


def test_pictures_of_a_run(tmp_path: Path) -> None:
    images = torch.rand(7, 1, 8, 8) * 2 - 1
    moments = [torch.zeros(2, 1, 4, 4), *torch.zeros(30, 2, 1, 8, 8)]
    log = [
        {"iteration": k, "size": 4 if k < 5 else 8, **dict.fromkeys(("loss", "energy_data", "energy_samples"), 0.1 * k)}
        | {"gradient_norm": 1.0}
        for k in range(1, 10)
    ]
    pictures.save_samples(tmp_path / "samples.png", images, images[:3])
    pictures.save_strip(tmp_path / "strip.png", moments)
    pictures.save_curves(tmp_path / "curves.png", log)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "samples.png", "strip.png"]
    for path in tmp_path.iterdir():
        assert imread(path).std() > 0.01
