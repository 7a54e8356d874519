"""Scores whose values are known, metrics on sets that can and can't be told apart, and the command."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastebm
from fastebm.cli import main
from fastebm.data import DataError, Images, digits, open_images, to_float
from fastebm.runs.folder import RunError
from fastebm.tasks import (
    constant_colours,
    detect_outliers,
    detection_metrics,
    flip,
    interpolations,
    mean_energy,
    outlier_scores,
    rotate,
    run_images,
    total_variation,
    uniform_noise,
)
from fastebm.tasks.run_images import held_out_images, matching_images, outlier_images, training_images
from fastebm.training import CoarseToFineRun, ImageSource

SCORES = ["energy", "gradient_norm", "typicality", "total_variation", "untrained_energy"]
LEVEL_SCORES = ["level_energy", "level_typicality"]
RUN_SCORES = ["combined", *SCORES[:3], *LEVEL_SCORES, SCORES[3]]
RUN_SCORES += [f"untrained_{name}" for name in ("combined", "energy", *LEVEL_SCORES)]
SYNTHETIC = ["uniform_noise", "constant_colours", "interpolations", "rotated", "flipped"]


def bowl(x: Tensor) -> Tensor:
    """Energies ||x||^2 / 2, whose gradient is x."""
    return x.square().sum((1, 2, 3)) / 2


@pytest.fixture(scope="module")
def images() -> Tensor:
    return 2 * fastebm.ops.uniform((10, 3, 4, 5), seed=1) - 1


def test_scores_of_a_quadratic_energy_are_known(images: Tensor) -> None:
    scores = outlier_scores(bowl, images, training_mean=5.0, untrained=lambda x: 3 * bowl(x), engine="autograd")
    assert list(scores) == SCORES
    assert {(values.shape, values.dtype) for values in scores.values()} == {((10,), np.dtype(np.float32))}
    squares = images.double().square().sum((1, 2, 3)).numpy()
    np.testing.assert_allclose(scores["energy"], squares / 2, rtol=1e-5)
    np.testing.assert_allclose(scores["gradient_norm"], np.sqrt(squares), rtol=1e-5)
    np.testing.assert_allclose(scores["typicality"], np.abs(squares / 2 - 5), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scores["untrained_energy"], 1.5 * squares, rtol=1e-5)
    assert mean_energy(bowl, images, batch_size=3, engine="autograd") == pytest.approx(squares.mean() / 2, rel=1e-6)


def test_only_what_can_be_scored_is() -> None:
    assert list(outlier_scores(bowl, torch.zeros(1, 1, 2, 2), engine="autograd")) == [
        "energy",
        "gradient_norm",
        "total_variation",
    ]


def test_total_variation_by_hand() -> None:
    image = torch.tensor([[0.0, 1.0, 0.5], [0.0, -1.0, 0.5]])
    expected = (1 + 0.5 + 1 + 1.5) + (0 + 2 + 0)
    assert total_variation(image.expand(2, 3, 2, 3)).tolist() == [3 * expected] * 2
    assert total_variation(torch.full((1, 1, 4, 4), 0.3)).tolist() == [0]


@pytest.mark.parametrize("batch_size", [1, 3, 10, 99])
def test_scores_do_not_depend_on_batches(images: Tensor, batch_size: int) -> None:
    whole = outlier_scores(bowl, images, engine="autograd")
    stream = (images[first : first + 4] for first in range(0, 10, 4))
    for split in (images, stream):
        parts = outlier_scores(bowl, split, batch_size=batch_size, engine="autograd")
        for name, values in whole.items():
            np.testing.assert_array_equal(parts[name], values)


def test_bytes_are_scored_as_their_floats() -> None:
    noise = uniform_noise(5, 1, 4)
    scores = outlier_scores(bowl, noise, engine="autograd")
    floats = outlier_scores(bowl, noise.batch(slice(0, 5)), engine="autograd")
    np.testing.assert_array_equal(scores["energy"], floats["energy"])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 1, 2, 2), "no images"),
        (torch.zeros(3, 4), r"\(N, C, H, W\)"),
        (torch.zeros(3, 1, 0, 2), r"\(N, C, H, W\)"),
        (torch.full((3, 1, 2, 2), 255.0), r"\[-1, 1\], got values from 255 to 255, the first of them in image 0"),
        (
            torch.zeros(5, 1, 2, 2).index_fill(0, torch.tensor(3), math.nan),
            "image 3 has pixels that are infinite or not a number",
        ),
    ],
)
def test_images_that_can_not_be_scored(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        outlier_scores(bowl, images, batch_size=2, engine="autograd")


def test_other_dtypes_and_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"float32.*to_float"):
        outlier_scores(bowl, torch.zeros(3, 1, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        outlier_scores(bowl, torch.zeros(3, 1, 2, 2), batch_size=0)


def test_an_energy_that_is_not_finite_is_refused() -> None:
    images = torch.zeros(5, 1, 2, 2)
    images[3] = 1
    with pytest.raises(ValueError, match="the energy of image 3 is inf"):
        outlier_scores(lambda x: bowl(x) + 1 / (2 - bowl(x)), images, batch_size=2, engine="autograd")


def test_metrics_of_sets_that_can_be_told_apart() -> None:
    metrics = detection_metrics(np.linspace(0, 1, 50), np.linspace(2, 3, 20))
    assert (metrics.auroc, metrics.aupr, metrics.fpr95) == (1.0, pytest.approx(1.0), 0.0)
    turned = detection_metrics(np.linspace(2, 3, 50), np.linspace(0, 1, 20))
    assert (turned.auroc, turned.fpr95) == (0.0, 1.0)


def test_metrics_of_equal_sets_are_those_of_chance() -> None:
    draws = fastebm.ops.normal((2, 4000), seed=2).numpy()
    metrics = detection_metrics(*draws)
    assert metrics.auroc == pytest.approx(0.5, abs=0.02)  # three standard errors
    assert metrics.aupr == pytest.approx(0.5, abs=0.03)
    assert metrics.fpr95 == pytest.approx(0.95, abs=0.02)
    same = detection_metrics(np.ones(5), np.ones(5))
    assert (same.auroc, same.aupr, same.fpr95) == (0.5, 0.5, 1.0)


def test_metrics_by_hand() -> None:
    metrics = detection_metrics([1.0, 2.0, 4.0, 5.0], [3.0, 6.0])
    assert metrics.auroc == 6 / 8  # of eight pairs, 3 lies above two and 6 above four
    assert metrics.aupr == pytest.approx((1 / 1 + 2 / 4) / 2)
    assert metrics.fpr95 == 2 / 4  # to find both, 4 and 5 are taken for outliers


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [1.0]), r"in_scores must be finite and \(N,\) with N >= 1"),
        (([1.0], [[1.0]]), "out_scores"),
        (([1.0], [math.nan]), "out_scores.*values that are not"),
    ],
)
def test_scores_that_can_not_be_compared(pair: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detection_metrics(*pair)


def test_synthetic_sets_are_functions_of_seed_and_number() -> None:
    pool = uniform_noise(20, 3, 4, seed=9)
    makers = {
        "noise": lambda count, seed: uniform_noise(count, 3, 4, seed=seed),
        "colours": lambda count, seed: constant_colours(count, 3, 4, seed=seed),
        "means": lambda count, seed: interpolations(pool, count, seed=seed),
    }
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for make in makers.values():
        images = make(50, 1)
        assert images.pixels.shape == (50, 3, 4, 4)
        assert torch.equal(make(50, 1).pixels, images.pixels)
        assert torch.equal(make(20, 1).pixels, images.pixels[:20])
        assert not torch.equal(make(50, 2).pixels, images.pixels)
        with pytest.raises(ValueError, match="count must be at least 1, got 0"):
            make(0, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_and_colours_are_uniform() -> None:
    noise = uniform_noise(400, 3, 8).pixels
    counts = torch.bincount(noise.flatten().long(), minlength=256).double()
    expected = noise.numel() / 256
    chi_square = float(((counts - expected).square() / expected).sum())
    assert abs(chi_square - 255) < 4 * math.sqrt(2 * 255)
    colours = constant_colours(3000, 3, 4).pixels
    assert torch.equal(colours, colours[:, :, :1, :1].expand_as(colours))
    means = colours[:, :, 0, 0].double().mean(0)
    assert (means - 127.5).abs().max() < 4 * 74 / math.sqrt(3000)
    assert len(colours[:, :, 0, 0].unique(dim=0)) > 2900  # all colours, not some


def test_interpolations_are_means_of_two_different_images() -> None:
    # Powers of two: a mean tells which images it is of.
    values = 2 ** torch.arange(1, 8)
    pool = Images(values.to(torch.uint8).reshape(7, 1, 1, 1).expand(7, 1, 2, 2).contiguous())
    means = interpolations(pool, 2000).pixels[:, 0, 0, 0].tolist()
    possible = {(int(a) + int(b)) // 2 for a in values for b in values if a != b}
    assert set(means) == possible
    with pytest.raises(ValueError, match="need two at least"):
        interpolations(Images(pool.pixels[:1]), 5)


def test_images_are_turned_and_mirrored() -> None:
    images = Images(torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8), name="four")
    assert rotate(images).pixels.tolist() == [[[[2, 4], [1, 3]]]]
    assert flip(images).pixels.tolist() == [[[[2, 1], [4, 3]]]]
    assert flip(images).pixels.is_contiguous()


def test_halves_are_rounded_to_even() -> None:
    pool = Images(torch.tensor([3, 4], dtype=torch.uint8).reshape(2, 1, 1, 1))
    assert set(interpolations(pool, 20).pixels.flatten().tolist()) == {4}
    pool = Images(torch.tensor([254, 255], dtype=torch.uint8).reshape(2, 1, 1, 1))
    assert set(interpolations(pool, 20).pixels.flatten().tolist()) == {254}


def test_a_run_scores_sets(digits_run: Path) -> None:
    run = CoarseToFineRun.load(digits_run)
    training, held_out = training_images(run), held_out_images(run)
    assert (len(training), len(held_out)) == (len(digits("train")[0]), len(digits("test")[0]))
    detection = detect_outliers(run, training, held_out, {"double": held_out}, count=60, engine="autograd")
    assert list(detection.scores) == ["in_distribution", "double", *SYNTHETIC]
    assert torch.equal(detection.sets["flipped"].pixels.flip(3), detection.sets["in_distribution"].pixels)
    for name, scores in detection.scores.items():
        assert list(scores) == RUN_SCORES
        energies = outlier_scores(run.levels[8], detection.sets[name], engine="autograd")["energy"]
        np.testing.assert_array_equal(scores["energy"], energies)
    # The same images in both sets, chosen alike.
    for metrics in detection.metrics["double"].values():
        assert metrics.auroc == pytest.approx(0.5)
    # Noise varies more than digits, and one colour not at all.
    assert detection.metrics["uniform_noise"]["total_variation"].auroc > 0.95
    assert detection.metrics["constant_colours"]["total_variation"].auroc == 0.0
    again = detect_outliers(run, training, held_out, count=60, batch_size=7, engine="autograd")
    energies = [given.scores["interpolations"]["energy"] for given in (again, detection)]
    np.testing.assert_allclose(*energies, rtol=1e-5, atol=1e-6)


def test_a_folder_scores_as_its_run_does(digits_run: Path) -> None:
    run = CoarseToFineRun.load(digits_run)
    held_out = held_out_images(run)
    for model in (run, str(digits_run)):
        scores = outlier_scores(model, held_out, engine="autograd")["energy"]
        np.testing.assert_array_equal(scores, outlier_scores(run.levels[8], held_out, engine="autograd")["energy"])
        assert mean_energy(model, held_out, engine="autograd") == pytest.approx(scores.mean(), rel=1e-6)
    one, other = (
        detect_outliers(model, held_out, held_out, count=20, engine="autograd") for model in (run, digits_run)
    )
    assert one.to_json() == other.to_json()


def test_a_bare_energy_detects_without_levels_and_untrained_nets(tmp_path: Path) -> None:
    pool = uniform_noise(60, 1, 8)
    detection = detect_outliers(lambda x: bowl(x) + x.sum((1, 2, 3)), pool, pool, count=30, engine="autograd")
    assert list(detection.scores["rotated"]) == ["combined", *SCORES[:3], *LEVEL_SCORES, "total_variation"]
    assert detection.levels.sizes == (8,)
    assert detection.to_json()["run"] is None
    assert detection.metrics["constant_colours"]["total_variation"].auroc == 0
    detection.save_figures(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"histogram.png", "roc.png", "typical.png"}


def test_sets_that_do_not_fit_are_refused(digits_run: Path) -> None:
    run = CoarseToFineRun.load(digits_run)
    held_out = held_out_images(run)
    for wrong, message in (
        (uniform_noise(5, 3, 8), "odd: its images have 3 channels, and those of the run 1"),
        (uniform_noise(5, 1, 12), "odd: its images are 12x12, and the run takes 8x8"),
        (uniform_noise(5, 1, 4), "odd: its images are 4x4"),
    ):
        with pytest.raises(ValueError, match=message):
            detect_outliers(run, held_out, held_out, {"odd": wrong}, count=5)
    with pytest.raises(ValueError, match="such a set is always there"):
        detect_outliers(run, held_out, held_out, {"uniform_noise": held_out}, count=5)


def test_larger_images_are_averaged_down_as_in_training(digits_run: Path) -> None:
    run = CoarseToFineRun.load(digits_run)
    held_out = held_out_images(run)
    double = Images(held_out.pixels.repeat_interleave(2, 2).repeat_interleave(2, 3))
    detection = detect_outliers(run, held_out, held_out, {"double": double}, count=400, engine="autograd")
    np.testing.assert_allclose(
        detection.scores["double"]["energy"], detection.scores["in_distribution"]["energy"], atol=1e-5
    )


def test_nothing_is_resized_or_recoloured_unasked(digits_run: Path, tmp_path: Path) -> None:
    run = CoarseToFineRun.load(digits_run)
    np.savez(tmp_path / "small.npz", x_train=np.zeros((4, 6, 6), np.uint8), x_test=np.zeros((3, 6, 6), np.uint8))
    np.savez(tmp_path / "colour.npz", np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"small.npz: its images are 6x6, and the run takes 8x8.*--fit"):
        outlier_images(run, tmp_path / "small.npz")
    padded = outlier_images(run, tmp_path / "small.npz", fit="pad")
    assert (padded.split, padded.pixels.shape) == ("test", (3, 1, 8, 8))
    assert len(outlier_images(run, tmp_path / "small.npz", "train", fit="resize")) == 4
    with pytest.raises(ValueError, match=r"colour.npz: its images have 3 channels.*--convert-colours"):
        outlier_images(run, tmp_path / "colour.npz")
    with pytest.raises(ValueError, match="--convert-colours"):
        matching_images(run, tmp_path / "colour.npz")
    assert outlier_images(run, tmp_path / "colour.npz", recolour=True).channels == 1
    with pytest.raises(DataError, match="has no split 'val'"):
        outlier_images(run, tmp_path / "small.npz", "val", fit="pad")


def test_a_set_without_a_test_split_says_what_to_give(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "all.npz", np.zeros((9, 8, 8), np.uint8))
    monkeypatch.setattr(run_images, "source_of", lambda run: ImageSource(tmp_path / "all.npz", 8, 1))
    with pytest.raises(RunError, match=r"all\.npz, which has no test split: give images like these .*\(--data\)"):
        held_out_images(CoarseToFineRun.load(digits_run))


def test_the_command_writes_numbers_scores_and_pictures(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "dark.npz", np.zeros((9, 8, 8), np.uint8))
    out = tmp_path / "detect"
    command = ["detect", str(digits_run), "--ood-data", f"dark={tmp_path / 'dark.npz'}", "--count", "40"]
    command += ["--engine", "autograd", "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "dark.npz: npz" in printed
    assert printed.count("\n") == 3 + (1 + len(RUN_SCORES)) + 1
    assert {path.name for path in out.iterdir()} == {
        "detect.json",
        "scores.npz",
        "histogram.png",
        "roc.png",
        "typical.png",
    }
    numbers = json.loads((out / "detect.json").read_text())
    assert list(numbers["metrics"]) == ["dark", *SYNTHETIC]
    assert numbers["training"]["count"] == 1000  # for the statistics, however few are scored
    assert list(numbers["training"]["mean_energy"]) == list(numbers["training"]["std_energy"]) == ["4", "8"]
    with np.load(out / "scores.npz") as scores:
        assert len(scores.files) == (2 + len(SYNTHETIC)) * len(RUN_SCORES)
        energies = scores["in_distribution/energy"], scores["dark/energy"]
    assert numbers["metrics"]["dark"]["energy"]["auroc"] == detection_metrics(*energies).auroc
    assert numbers["sets"]["dark"]["scores"]["energy"]["mean"] == pytest.approx(float(energies[1].mean()), rel=1e-5)
    for name in ("histogram.png", "roc.png", "typical.png"):
        assert min(Image.open(out / name).size) > 300

    assert main(command) == 2
    assert "has files in it, which stay" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--seed", "1"]) == 0
    assert json.loads((out / "detect.json").read_text()) != numbers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "--count must be at least 1"),
        (["--ood-data", "nothing"], "--ood-data takes NAME=PATH"),
        (["--ood-data", "a=missing.npz"], "missing.npz: there is no such file or folder"),
        (["--ood-data", "a=x", "a=y"], "there is a set called a already"),
        (["--ood-data", "uniform_noise=x"], "there is a set called uniform_noise already"),
        (["--ood-data", "a=empty"], "no pictures in it"),
        (["--ood-data", "a=broken"], "broken/1.png: "),
        (["--ood-data", "a=letter.npz"], "is empty"),
        (["--ood-data", "a=colour.npz"], "recolour (--convert-colours) brings them to that"),
        (["--ood-data", "a=large.npz"], "fit (--fit resize or --fit pad) brings them to that"),
        (["--ood-data", "a=nan.npz"], "nan.npz"),
        (["--data", "colour.npz"], "recolour (--convert-colours) brings them to that"),
        (["--out", "letter.npz"], "letter.npz is a file: choose another folder (--out)"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--count", "1" + "0" * 20], "count must be at most"),
        (["--seed", str(2**64)], "seed must be in"),
        (["--split", "test"], "--split test is of --data, which is not given"),
        (["--fit", "pad"], "--fit pad is of --ood-data, which is not given"),
        (["--convert-colours"], "--convert-colours is of --data, --ood-data and --train-data, and none"),
    ],
)
def test_wrong_arguments_are_one_line_and_leave_nothing(
    digits_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/1.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    Path("letter.npz").write_bytes(b"")
    np.savez("colour.npz", np.zeros((4, 8, 8, 3), np.uint8))
    np.savez("large.npz", np.zeros((4, 12, 12), np.uint8))
    np.savez("nan.npz", np.full((4, 8, 8), np.nan, np.float32))
    before = sorted(tmp_path.rglob("*"))
    assert main(["detect", str(digits_run), *arguments]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert message in errors[-1]
    assert errors[-1].startswith("fastebm: ")
    assert sorted(tmp_path.rglob("*")) == before
    assert not (digits_run / "detect").exists()


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


@pytest.mark.parametrize("command", ["detect", "restore", "denoise", "generate"])
def test_results_are_there_before_a_line_is_printed(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The reader of the lines may be gone: `fastebm detect RUN | true`."""
    out = tmp_path / "out"
    last = {"detect": "detect.json", "restore": "results.json"}.get(command, "numbers.json")
    options = {"detect": ["--engine", "autograd"], "denoise": ["--tuning-images", "0", "--num-steps", "1"]}

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            assert (out / last).is_file(), f"{text!r} was printed before the results were written"
            return len(text)

    monkeypatch.setattr(sys, "stdout", Gone())
    assert main([command, str(digits_run), "--count", "4", "--out", str(out), *options.get(command, [])]) == 0
    assert (out / last).is_file()
