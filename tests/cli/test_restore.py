"""`fastebm restore`: by a cascade, by a decoder, with masks from pictures; and degradations by name."""

import dataclasses
import doctest
import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from torch import nn

from fastebm.cli import main
from fastebm.data import digits
from fastebm.runs.folder import RunFolder
from fastebm.tasks.restoration import Composition, Dense, Inpainting, SuperResolution, degradation
from fastebm.training import ECVAERun


def test_a_cascade_restores_digits(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "restored"
    command = ["restore", str(trained), "--task", "super-resolution-2", "--count", "5", "--out", str(out)]
    assert main([*command, "--restarts", "2", "--refine-steps", "3"]) == 0
    assert "super-resolution-2" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert set(results["measures"]) == {"pseudo-inverse", "bicubic", "restored", "mean of restarts"}
    assert results["measures"]["restored"]["residual_rms"] < 1e-6
    assert results["settings"]["search"]["restarts"] == 2
    assert results["seconds"] > 0
    images = torch.from_numpy(np.load(out / "restored.npz")["images"])
    half, originals = SuperResolution(2), digits("test")[0][:5]
    torch.testing.assert_close(half.A(images), half.A(originals), atol=1e-5, rtol=0)
    error = (half.pinv(half.A(originals)) - originals).square().mean((1, 2, 3))
    assert results["measures"]["pseudo-inverse"]["psnr"] == pytest.approx(float((10 * (4 / error).log10()).mean()))
    assert imread(out / "grid.png").shape[0] >= 4 * 32

    assert main(command) == 2
    assert "has files in it, which stay" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--noise", "0.1", "--task", "inpaint-box"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert set(results["measures"]) == {"pseudo-inverse", "restored", "mean of restarts"}
    assert 0 < results["measures"]["restored"]["residual_rms"] <= 0.1 * 1.001


def test_a_decoder_restores_digits(vae_run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(vae_run, tmp_path / "vae"))
    search = ["--method", "langevin", "--num-steps", "5", "--restarts", "2", "--step-size", "0.001"]
    assert main(["restore", str(copy), "--task", "inpaint-random-50", "--count", "3", *search]) == 0
    results = json.loads((copy / "restore-inpaint-random-50" / "results.json").read_text())
    assert results["measures"]["restored"]["residual_rms"] < 1e-6
    assert results["settings"]["search"]["method"] == "langevin"


def test_a_run_without_an_energy_is_refused(
    vae_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = dataclasses.replace(ECVAERun.load(vae_run))
    object.__setattr__(plain, "energy", None)
    monkeypatch.setattr("fastebm.cli.restore.load", lambda *_: plain)
    assert main(["restore", str(vae_run), "--out", str(tmp_path / "out")]) == 2
    assert "without an energy of images" in capsys.readouterr().err


def test_any_images_are_brought_to_the_form_of_the_run(trained: Path, tmp_path: Path) -> None:
    """A single picture in colour, and a set of which there are fewer than were asked for."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 24, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", x_train=pixels)
    Image.fromarray(pixels[0]).save(tmp_path / "picture.png")
    for data, count in (("set.npz", 3), ("picture.png", 1)):
        out = tmp_path / f"restored-{count}"
        assert main(["restore", str(trained), "--data", str(tmp_path / data), "--out", str(out)]) == 0
        assert np.load(out / "restored.npz")["images"].shape == (count, 1, 8, 8)
        assert json.loads((out / "results.json").read_text())["images"] == count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "paint"], "there is no task 'paint'; tasks are super-resolution-K"),
        (["--task", "super-resolution-x"], "task 'super-resolution-x': invalid literal"),
        (["--task", "super-resolution-3"], "sides that are multiples"),
        (["--count", "0"], "--count must be at least 1"),
        (["--split", "val", "--data", "small.npz"], "has no split 'val'"),
        (["--device", "banana"], "'banana' is not a device"),
        (["--num-steps", "5"], "--num-steps: such settings are of a search through a decoder"),
        (["--method", "adam", "--energy-weight", "1"], "--method, --energy-weight: such settings are of a search"),
        (["--refine-noise", "0.1"], "--refine-noise: there is no refinement without --refine-steps"),
        (["--refine-step-size", "0.1"], "--refine-step-size: there is no refinement without --refine-steps"),
        (["--refine-steps", "-1"], "num_steps of a refinement must be at least 0"),
        (["--split", "test", "--data", "one.png"], "split 'test' is of a set, and one.png is a single picture"),
        (["--split", "val"], "have no split 'val'"),
        (["--noise", "-1"], "--noise must not be negative, got -1"),
        (["--noise", "nan"], "--noise needs a finite number"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--seed", "1" + "0" * 20], "seed must be in"),
        (["--count", "-1"], "--count must be at least 1"),
        (["--count", "1" + "0" * 20], "count must be at most"),
        (["--restarts", "1" + "0" * 14], "100,000,000,000,000 chains for each of"),
        (["--restarts", "1" + "0" * 20], "restarts must be at most"),
        (["--data", "nowhere.npz"], "nowhere.npz: there is no such file"),
    ],
)
def test_wrong_arguments(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    out = tmp_path / "new"
    monkeypatch.chdir(tmp_path)
    Image.fromarray(MASK).save("one.png")
    np.savez("small.npz", x_train=np.zeros((4, 8, 8), np.uint8), x_test=np.zeros((4, 8, 8), np.uint8))
    assert main(["restore", str(trained), "--out", str(out), *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coarse"], "--coarse is of a coarse-to-fine run"),
        (["--no-coarse"], "--coarse is of a coarse-to-fine run"),
        (["--step-size", "0.1"], "--step-size: of --method langevin, and it is adam"),
        (["--method", "adam", "--noise-std", "0.1"], "--noise-std: of --method langevin, and it is adam"),
        (["--method", "langevin", "--learning-rate", "0.1"], "--learning-rate: of --method adam, and it is langevin"),
        (["--num-steps", "1" + "0" * 20], "num_steps must be at most 16,777,216"),
    ],
)
def test_options_without_effect_on_a_decoder_are_refused(
    vae_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["restore", str(vae_run), "--out", str(tmp_path / "new"), *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["restore", "denoise"])
def test_a_missing_package_is_reported_before_anything_runs(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    for loader in ("fastebm.cli.restore.load", "fastebm.training.load"):
        monkeypatch.setattr(loader, lambda *_: pytest.fail("the run was loaded"))
    assert main([command, str(trained), "--out", str(tmp_path / "new")]) == 2
    errors = capsys.readouterr().err
    assert "need scikit-image: pip install 'fastebm[tasks]'" in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_runs_of_other_kinds_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunFolder.open(tmp_path / "flow", "other", {})
    assert main(["restore", str(tmp_path / "flow")]) == 2
    assert "holds a run of kind 'other'; known are" in capsys.readouterr().err


def test_tasks_are_what_their_names_say() -> None:
    shape = (3, 16, 16)
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    assert degradation("super-resolution-8", shape).rank(shape) == 12
    assert degradation("colorization", shape).rank(shape) == 256
    assert degradation("inpaint-box", shape).rank(shape) == 3 * 192
    assert degradation("inpaint-random-25", shape).rank(shape) == 3 * 64
    assert degradation("compressed-sensing-25", shape).rank(shape) == 3 * 64
    assert degradation("deblur-1.5", shape).rank(shape) < 768
    both = degradation("colorization+super-resolution-4", shape)
    assert isinstance(both, Composition)
    assert torch.equal(both.A(x), nn.functional.avg_pool2d(x.mean(1, keepdim=True), 4))
    assert isinstance(degradation("deblur-1+super-resolution-2", shape), Dense)
    mask, other = (degradation("inpaint-random-50", shape, seed=seed) for seed in (1, 2))
    assert isinstance(mask, Inpainting)
    assert not torch.equal(mask.known, other.known)
    with pytest.raises(ValueError, match="share of known pixels"):
        degradation("inpaint-random-200", shape)


def test_docstring_example() -> None:
    assert doctest.testmod(importlib.import_module("fastebm.tasks.restoration.degradation_names")) == (0, 1)


MASK = np.zeros((8, 8), np.uint8)
MASK[1:4, 2:7] = 255
MASK[6, 0] = 255


def picture(path: Path, pixels: np.ndarray) -> str:
    Image.fromarray(pixels).save(path)
    return str(path)


def test_known_pixels_stay_and_hidden_ones_are_not_read(trained: Path, tmp_path: Path) -> None:
    mask = picture(tmp_path / "mask.png", MASK)
    out = tmp_path / "restored"
    command = ["restore", str(trained), "--count", "3", "--restarts", "1", "--out", str(out)]
    assert main([*command, "--task", "inpaint-mask", "--mask", mask]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["mask"] == mask
    assert results["measures"]["restored"]["residual_rms"] < 1e-6
    images, originals = torch.from_numpy(np.load(out / "restored.npz")["images"]), digits("test")[0][:3]
    hole = torch.from_numpy(MASK > 0)
    assert torch.equal(images[..., ~hole], originals[..., ~hole])
    assert not torch.isclose(images[..., hole], originals[..., hole]).all()

    # The same pictures with their hidden pixels gone are restored to the same.
    pixels = ((originals[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
    for name, shown in (("whole", pixels), ("damaged", np.where(MASK > 0, 200, pixels).astype(np.uint8))):
        np.savez(tmp_path / f"{name}.npz", x_train=shown)
        data = ["--data", str(tmp_path / f"{name}.npz"), "--out", str(tmp_path / name)]
        assert main([*command, "--task", "inpaint-mask", "--mask", mask, *data]) == 0
    whole, damaged = (np.load(tmp_path / name / "restored.npz")["images"] for name in ("whole", "damaged"))
    assert np.array_equal(whole, damaged)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "inpaint-mask"], "--task inpaint-mask needs --mask FILE"),
        (["--task", "inpaint-mask+colorization"], "--task inpaint-mask needs --mask FILE"),
        (["--mask", "mask.png"], "--mask is for --task inpaint-mask, alone, and the task is super-resolution-2"),
        (["--mask", "mask.png", "--task", "inpaint-mask+colorization"], "--mask is for --task inpaint-mask, alone"),
        (["--mask", "wide.png", "--task", "inpaint-mask"], "wide.png: the mask is 8x9, and the images are 8x8"),
        (["--mask", "white.png", "--task", "inpaint-mask"], "white.png: this mask hides all of the image"),
        (["--mask", "black.png", "--task", "inpaint-mask"], "black.png: this mask hides nothing"),
        (["--mask", "nowhere.png", "--task", "inpaint-mask"], "nowhere.png"),
        (["--mask", "text.png", "--task", "inpaint-mask"], "text.png"),
    ],
)
def test_wrong_masks(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    masks = {"mask": MASK, "wide": np.zeros((8, 9), np.uint8), "white": np.full_like(MASK, 255), "black": 0 * MASK}
    for name, pixels in masks.items():
        picture(tmp_path / f"{name}.png", pixels)
    Path("text.png").write_text("no picture")
    assert main(["restore", str(trained), "--out", str(tmp_path / "new"), *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_perfect_restoration_has_no_finite_psnr(trained: Path, tmp_path: Path) -> None:
    """Colours of a gray image are known: what JSON can't hold becomes null, after all the work is done."""
    out = tmp_path / "out"
    command = ["restore", str(trained), "--task", "colorization", "--count", "2", "--restarts", "1"]
    assert main([*command, "--out", str(out)]) == 0
    assert json.loads((out / "results.json").read_text())["measures"]["restored"]["psnr"] is None
