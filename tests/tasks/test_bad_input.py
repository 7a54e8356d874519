"""What can't be worked on is refused, with what was given and what is needed; and nothing existing is overwritten."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastebm.data import DataError, digits
from fastebm.tasks import (
    DenoiseOptions,
    InpaintOptions,
    PathOptions,
    TranslateOptions,
    add_noise,
    denoise,
    hole_mask,
    images_for,
    inpaint,
    interpolate_chains,
    interpolate_images,
    load_hole_mask,
    nearest_images,
    quality,
    run_images,
    translate,
)
from fastebm.tasks.outputs import save_numbers, task_folder
from fastebm.training import CoarseToFineRun, ImageSource, RunError

GOOD = torch.zeros(2, 1, 8, 8)
TASKS: dict[str, Callable[[CoarseToFineRun, Tensor], object]] = {
    "denoise": lambda run, images: denoise(run, images, 0.2),
    "inpaint": lambda run, images: inpaint(run, images, torch.ones(1, 1, 1, 1, dtype=torch.bool)),
    "translate": lambda run, images: translate(run, images),
    "interpolate": lambda run, images: interpolate_images(run, images, images),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (GOOD[:, :, :4, :4], ValueError, "images are 1x4x4, and the run takes 1x8x8"),
        (GOOD.expand(2, 3, 8, 8), ValueError, "images are 3x8x8, and the run takes 1x8x8"),
        (GOOD[:0], ValueError, "none of them 0"),
        (GOOD[0], ValueError, r"must be \(N, C, H, W\)"),
        (GOOD.double(), TypeError, "must be a float32 tensor, got torch.float64"),
        (torch.cat((GOOD, torch.full((1, 1, 8, 8), math.nan))), ValueError, "image 2 has pixels that are"),
        (torch.full((1, 1, 8, 8), math.inf), ValueError, "image 0 has pixels that are infinite"),
    ],
)
def test_images_that_do_not_fit(
    run: CoarseToFineRun, task: str, images: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TASKS[task](run, images)


@pytest.mark.parametrize("task", ["inpaint", "translate", "interpolate"])
def test_bytes_taken_for_floats(run: CoarseToFineRun, task: str) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[-1, 1\], got values from 0 to 255"):
        TASKS[task](run, torch.cat((GOOD, torch.full((1, 1, 8, 8), 255.0))))


@pytest.mark.parametrize(
    ("hole", "error", "message"),
    [
        (torch.zeros(1, 1, 4, 4, dtype=torch.bool), ValueError, r"must be \(8, 8\), or \(2 or 1, 1 or 1, 8, 8\)"),
        (torch.ones(2, 8, 8, dtype=torch.bool), ValueError, r"must be \(8, 8\).* got \(2, 8, 8\)"),
        (torch.ones(1, 1, 1, 1, dtype=torch.bool), ValueError, r"must be \(8, 8\).* got \(1, 1, 1, 1\)"),
        (torch.ones(4, 1, 8, 8, dtype=torch.bool), ValueError, r"must be \(8, 8\).* got \(4, 1, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8), TypeError, "must be a bool tensor"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.bool), ValueError, "image 0 has no hole"),
        (torch.ones(2, 1, 8, 8, dtype=torch.bool), ValueError, "image 0 has nothing but hole"),
    ],
)
def test_holes_that_do_not_fit(run: CoarseToFineRun, hole: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        inpaint(run, GOOD, hole)


def test_masks_from_files(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8), np.uint8)
    pixels[2:4] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    hole = load_hole_mask(tmp_path / "mask.png", 3, 8)
    assert hole.shape == (3, 1, 8, 8)
    assert torch.equal(hole[1, 0], torch.from_numpy(pixels) == 255)
    with pytest.raises(ValueError, match="the mask is 8x8, and the images are 16x16"):
        load_hole_mask(tmp_path / "mask.png", 3, 16)
    (tmp_path / "broken.png").write_bytes((tmp_path / "mask.png").read_bytes()[:50])
    with pytest.raises(DataError, match="broken"):
        load_hole_mask(tmp_path / "broken.png", 3, 8)


@pytest.mark.parametrize(("pattern", "share"), [("square", 0.25), ("half", 0.5), ("pixels", 0.5)])
def test_patterns_leave_what_they_say(pattern: str, share: float) -> None:
    hole = hole_mask(pattern, 50, 16, seed=1)  # type: ignore[arg-type]
    assert float(hole.float().mean()) == pytest.approx(share, abs=0.01)
    assert torch.equal(hole_mask(pattern, 3, 16, seed=1), hole[:3])  # type: ignore[arg-type]


def test_options_out_of_range(run: CoarseToFineRun) -> None:
    for wrong in (
        lambda: DenoiseOptions(num_steps=0),
        lambda: DenoiseOptions(temperature=-1),
        lambda: InpaintOptions(restarts=0),
        lambda: TranslateOptions(num_steps=3),
        lambda: TranslateOptions(data_weight=1.5),
        lambda: DenoiseOptions(num_chains=0),
        lambda: PathOptions(points=2),
        lambda: hole_mask("round", 1, 8),  # type: ignore[arg-type]
        lambda: add_noise(GOOD, 0.0, 1),
        lambda: denoise(run, GOOD, math.nan),
        lambda: denoise(run, GOOD, 0.2, DenoiseOptions(start_size=5)),
        lambda: denoise(run, GOOD, 0.2, clean=GOOD[:1]),
        lambda: inpaint(lambda x: x.sum((1, 2, 3)), GOOD, hole_mask("half", 2, 8), InpaintOptions(coarse=True)),
        lambda: interpolate_chains(run, "noise", points=2),
        lambda: interpolate_chains(run, "pixels"),  # type: ignore[arg-type]
        lambda: nearest_images(GOOD, torch.zeros(2, 1, 8, 8), 3),
        lambda: quality(GOOD, GOOD[:1]),
        lambda: images_for(run, count=0),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_a_diverging_energy_is_told(run: CoarseToFineRun) -> None:
    with pytest.raises(FloatingPointError, match="chains are not finite"):
        translate(lambda x: -x.square().square().sum((1, 2, 3)), torch.full((2, 1, 4, 4), 0.9))


def test_data_are_taken_as_they_are_or_converted(run: CoarseToFineRun, tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    picture = tmp_path / "photo.png"
    Image.fromarray(draws.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(picture)
    for data in (picture, tmp_path):
        with pytest.raises(ValueError, match="images are 3x20x30, and the run takes 1x8x8: convert"):
            images_for(run, data)
        images = images_for(run, data, convert=True)
        assert images.shape == (1, 1, 8, 8)
        assert float(images.abs().max()) <= 1
    picture.write_bytes(picture.read_bytes()[:300])
    for data, message in ((picture, "photo.png"), (tmp_path / "none", "no such file"), (tmp_path, "photo.png")):
        with pytest.raises(DataError, match=message):
            images_for(run, data, convert=True)
    picture.unlink()
    with pytest.raises(DataError, match="no pictures in it"):
        images_for(run, tmp_path)


def test_by_default_images_are_the_runs_own_and_unseen(run: CoarseToFineRun) -> None:
    assert torch.equal(images_for(run, count=5), digits("test")[0][:5])
    assert torch.equal(images_for(run, split="train", count=5), digits("train")[0][:5])


def test_a_folder_with_files_stays(tmp_path: Path) -> None:
    with task_folder(tmp_path / "new" / "folder") as folder:
        save_numbers(folder, {"psnr": math.inf, "of": [1.0, math.nan], "num_steps": 3})
    assert (folder / "numbers.json").read_text().split() == (
        ["{", '"psnr":', "null,", '"of":', "[", "1.0,", "null", "],", '"num_steps":', "3", "}"]
    )
    with pytest.raises(ValueError, match="has files in it, which stay"), task_folder(folder):
        pass
    with task_folder(folder, overwrite=True) as again:
        assert again == folder
    with pytest.raises(ValueError, match="is a file"), task_folder(folder / "numbers.json", overwrite=True):
        pass


def _npz(names: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        draws = np.random.default_rng(0)
        np.savez(folder / "set.npz", **{n: draws.integers(0, 256, (9, 8, 8), dtype=np.uint8) for n in names.split()})
        return folder / "set.npz"

    return write


def _folder(names: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        for number, name in enumerate(names.split()):
            (folder / "set" / name).mkdir(parents=True)
            Image.fromarray(np.full((8, 8), number, np.uint8)).save(folder / "set" / name / "a.png")
        return folder / "set"

    return write


@pytest.mark.parametrize(
    ("write", "split", "key", "reason"),
    [
        (_npz("pixels"), None, None, "on all of .*, which has no test split"),
        (_npz("x_train x_test"), "test", None, "on the test split of"),
        (_npz("x_test"), None, None, "on the test split of"),
        (_npz("x_train x_val"), None, None, "on the split train of .*, which has no test split"),
        (_npz("x_train x_val"), "val", None, "on the split val of .*, which has no test split"),
        (_npz("a b"), None, "a", "on the array a of .*, which has no test split"),
        (_folder("test"), None, None, "on all of .*, which has no test split"),
        (_folder("cats test"), None, None, "on all of .*, which has no test split"),
        (_folder("test val"), None, None, "on all of .*, which has no test split"),
    ],
)
def test_images_that_were_learned_are_named_as_such(
    run: CoarseToFineRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path], Path],
    split: str | None,
    key: str | None,
    reason: str,
) -> None:
    """Runs that have no other images of their own: what would be read as the test split is what they learned."""
    path = write(tmp_path)
    monkeypatch.setattr(run_images, "source_of", lambda run: ImageSource(path, 8, 1, split, key=key))
    with pytest.warns(RuntimeWarning, match=r"has no test split beside what the run was trained on"):
        images = images_for(run, count=3)
    assert torch.equal(images, images_for(run, split="train", count=3))
    for unseen in (lambda: run_images.unseen_images(run, 3), lambda: run_images.held_out_images(run)):
        with pytest.raises(RunError, match=reason):
            unseen()


@pytest.mark.parametrize("write", [_npz("x_train x_test"), _folder("train test"), _folder("train test val")])
def test_a_test_split_was_not_learned(
    run: CoarseToFineRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Path]
) -> None:
    path = write(tmp_path)
    monkeypatch.setattr(run_images, "source_of", lambda run: ImageSource(path, 8, 1))
    images = run_images.unseen_images(run, 3)
    assert torch.equal(images, images_for(run, count=3))
    assert not torch.equal(images, images_for(run, split="train", count=3))


def test_the_training_images_given_as_data_are_named_as_such(
    run: CoarseToFineRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = _npz("x_train x_test")(tmp_path), tmp_path / "other.npz"
    other.write_bytes(path.read_bytes())
    monkeypatch.setattr(run_images, "run_source", lambda folder: ImageSource(path, 8, 1))
    with pytest.warns(RuntimeWarning, match=r"the run knows .*set\.npz, train: these are images that"):
        images_for(run, path, split="train")
    with pytest.warns(RuntimeWarning, match="the run knows"):
        run_images.matching_images(run, path, "train")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images_for(run, path)
        images_for(run, other, split="train")
        run_images.matching_images(run, path)
        run_images.matching_images(run, path, prefer="train")  # the training images of `fastebm detect`


def test_unseen_images_are_those_of_the_test_split(run: CoarseToFineRun) -> None:
    assert torch.equal(run_images.unseen_images(run, 5), images_for(run, count=5))
