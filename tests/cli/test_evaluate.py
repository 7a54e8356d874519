"""`fastebm evaluate`: of a run, of arrays and pictures, what it writes and what it refuses."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from benchmarks.harness.pages import evaluation_tables
from fastebm.cli import main
from fastebm.data import digits, to_pixels
from fastebm.training import CoarseToFineRun, DigitsSource, ECVAEConfig, ImageSource, load, train
from tests.evaluation.metrics.small_inception import SmallInception, script

NOTE = "not comparable to published FID"


@pytest.fixture(autouse=True)
def _quick_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastebm.evaluation.metrics.features.IMAGES_SEEN", 1000)


def ec_vae(path: Path, **changes: float) -> Path:
    """The folder of an EC-VAE run of a few updates."""
    config = ECVAEConfig(size=8, channels=1, iterations=3, batch_size=4, latent=4, width=4, energy_width=4, **changes)  # type: ignore[arg-type]
    train(config, DigitsSource(), path, progress=False, save_pictures=False)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """scikit-learn's digits as a file, and half of the test images as samples."""
    arrays = {}
    for split in ("train", "test"):
        images, labels = digits(split)
        arrays |= {f"x_{split}": to_pixels(images)[:, 0].numpy(), f"y_{split}": labels.numpy()}
    np.savez(tmp_path / "digits.npz", **arrays)
    np.savez(tmp_path / "samples.npz", images=digits("test")[0][::2].numpy())
    return tmp_path


def result(path: Path) -> dict:
    return json.loads(path.read_text())


def test_a_run_against_its_own_images(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert main(["evaluate", str(trained), "--count", "60", "--train-features"]) == 0
    printed = capsys.readouterr().out
    for part in (NOTE, "reference: test images", "uniform noise", "classes found, of 10", "gap", "40 more steps"):
        assert part in printed
    found = result(trained / "evaluation.json")
    assert found["in_features"]["note"] == NOTE
    assert found["in_features"]["distances"]["samples"]["count"] == 60
    assert sum(found["in_features"]["classes"]["counts"]) == 60
    assert found["energy_metrics"]["count"] == 60
    assert 0 <= found["energy_metrics"]["acceptance_data"] <= 1
    assert found["long_chains_in_features"]["count"] == 60
    assert found["features"]["accuracy"] > 0.2
    # The pages of results show it.
    tables = "\n".join(evaluation_tables(found))
    for part in ("| real against real: test images | 60 |", "times that between real images", "| mean energy |"):
        assert part in tables
    after = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert {path.name for path in after.keys() - before.keys()} == {"evaluation.json", "features.safetensors"}
    assert {path: after[path] for path in before} == before

    # Nothing is overwritten unasked; the features are there and used again.
    assert main(["evaluate", str(trained), "--count", "60"]) == 2
    assert "exists: --overwrite replaces it" in capsys.readouterr().err
    assert main(["evaluate", str(trained), "--count", "60", "--train-features", "--out", str(trained / "b.json")]) == 0
    assert "features are there" in capsys.readouterr().err
    assert result(trained / "b.json") == found
    assert main(["evaluate", str(trained), "--count", "50", "--overwrite", "--no-energy-metrics"]) == 0
    again = result(trained / "evaluation.json")
    assert again["in_features"]["distances"]["samples"]["count"] == 50
    assert "energy_metrics" not in again


def test_a_run_that_calibrates_a_generator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One-pass samples are evaluated like others, and the energy by gaps and short chains."""
    run = ec_vae(tmp_path / "vae", num_steps=3, noise_std=0.01)
    assert main(["evaluate", str(run), "--count", "60", "--train-features"]) == 0
    printed = capsys.readouterr().out
    for part in (NOTE, "uniform noise", "classes found, of 10", "gap", "chains of 3 steps"):
        assert part in printed
    assert "Metropolis" not in printed
    found = result(run / "evaluation.json")
    assert "energy_metrics" not in found
    assert found["in_features"]["distances"]["samples"]["count"] == 60
    assert found["nearest"]["median"] > 0
    assert found["short_chains_in_features"]["count"] == 60
    health, loaded = found["calibration_metrics"], load(run)
    assert isinstance(loaded.energy, torch.nn.Module)  # type: ignore[union-attr]
    with torch.no_grad():
        energies = loaded.energy(loaded.sample(60))  # type: ignore[union-attr]
    assert health["energy_samples"] == pytest.approx(float(energies.mean()), rel=1e-4)
    assert health["gap"] == pytest.approx(health["energy_samples"] - health["energy_data"])
    assert health["gap_ends"] == pytest.approx(health["energy_ends"] - health["energy_data"])
    assert health["energy_ends"] < health["energy_samples"]
    assert health["noise_floor"] == pytest.approx(3 * 0.01**2 * 64)
    assert health["distance"] > health["noise_floor"] / 2


def test_a_run_without_an_energy_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ec_vae(tmp_path / "plain", lambda_start=0.0)
    assert main(["evaluate", str(run), "--count", "20"]) == 0
    assert f"No energy metrics: {run} has no energy" in capsys.readouterr().err
    assert set(result(run / "evaluation.json")) == {"samples", "real", "nearest"}
    assert main(["evaluate", str(run), "--count", "20", "--no-energy-metrics", "--overwrite"]) == 0
    assert "No energy metrics" not in capsys.readouterr().err


def test_samples_of_a_file_are_those_of_the_run(trained: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    np.savez("drawn.npz", images=CoarseToFineRun.load(trained).sample(40).numpy())
    options = ["--reference-data", "digits.npz", "--count", "40"]
    assert main(["evaluate", "drawn.npz", *options, "--train-features", "--out", "a.json"]) == 0
    features = ["--features", "features.safetensors", "--no-energy-metrics"]
    assert main(["evaluate", str(trained), *options, *features, "--out", "b.json"]) == 0
    first, second = result(Path("a.json")), result(Path("b.json"))
    assert first["in_features"] == second["in_features"]
    assert first["nearest"] == second["nearest"]


def test_pictures_against_pictures_without_labels(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    for name, images in (("made", digits("test")[0][:40]), ("real", digits("train")[0][:300])):
        Path(name).mkdir()
        for number, image in enumerate(to_pixels(images)):
            Image.fromarray(image[0].numpy()).save(f"{name}/{number:04}.png")
    assert main(["evaluate", "made", "--reference-data", "real"]) == 0
    assert set(result(Path("evaluation.json"))) == {"samples", "real", "nearest"}
    rotations = ["--train-features", "--rotations", "--out", "rotations.json"]
    assert main(["evaluate", "made", "--reference-data", "real", *rotations]) == 0
    found = result(Path("rotations.json"))
    assert found["features"]["task"] == "rotations"
    assert found["in_features"]["classes"] is None
    assert found["in_features"]["distances"]["reference_kind"] == "train images of the other half"


def test_real_images_are_brought_to_another_form_when_asked(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    pixels = to_pixels(digits("train")[0])[:, 0].numpy()
    doubled = pixels.repeat(2, axis=1).repeat(2, axis=2)
    np.savez("plain.npz", x_train=pixels)
    np.savez("large.npz", x_train=doubled)
    np.savez("colour.npz", x_train=np.stack([doubled] * 3, axis=3))
    np.savez("framed.npz", x_train=np.pad(pixels, ((0, 0), (4, 4), (4, 4))))
    np.savez("small.npz", x_train=pixels[:, 1:7, 1:7])
    found = []
    for number, (name, *options) in enumerate(
        [
            ("plain.npz",),
            ("large.npz", "--convert"),
            ("large.npz", "--fit", "resize"),
            ("colour.npz", "--convert"),
            ("framed.npz", "--crop", "8"),
        ]
    ):
        out = f"{number}.json"
        assert main(["evaluate", "samples.npz", "--reference-data", name, *options, "--out", out]) == 0
        found.append(result(Path(out)))
        assert ": 1,438 images of 1x8x8" in found[-1]["real"]
        assert found[-1]["nearest"] == found[0]["nearest"]
    assert main(["evaluate", "samples.npz", "--reference-data", "small.npz", "--fit", "pad", "--out", "pad.json"]) == 0
    assert ": 1,438 images of 1x8x8" in result(Path("pad.json"))["real"]


def test_a_run_takes_what_has_the_form_that_its_own_images_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Padded in training from 7x7 to 8x8: other images of 7x7 are padded too, and those of 6x6 are of another size."""
    monkeypatch.chdir(tmp_path)
    pixels = to_pixels(digits("train")[0])[:200, 0].numpy()
    for name, images in (("own", pixels[:100, :7, :7]), ("other", pixels[100:, :7, :7]), ("full", pixels)):
        np.savez(f"{name}.npz", x_train=images)
    np.savez("less.npz", x_train=pixels[:, :6, :6])
    np.savez("colour.npz", x_train=np.stack([pixels] * 3, axis=3))
    config = ECVAEConfig(size=8, channels=1, iterations=3, batch_size=4, latent=4, width=4, lambda_start=0.0)
    source = ImageSource(Path("own.npz"), 8, 1, fit="pad", key="x_train")
    train(config, source, tmp_path / "run", progress=False, save_pictures=False)
    evaluate = ["evaluate", "run", "--count", "20", "--no-energy-metrics", "--overwrite"]
    for against in (
        [],
        ["--reference-data", "own.npz"],
        ["--reference-data", "other.npz"],
        ["--reference-data", "full.npz"],
    ):
        assert main([*evaluate, *against]) == 0
        assert "images of 1x8x8" in result(Path("run/evaluation.json"))["real"]
    capsys.readouterr()
    for other, given in (("less.npz", "1x6x6"), ("colour.npz", "3x8x8")):
        assert main([*evaluate, "--reference-data", other]) == 2
        message = f"{other}: its images are {given}, and the samples 1x8x8: --convert brings them to that as the run's"
        assert message in capsys.readouterr().err
        assert main([*evaluate, "--reference-data", other, "--convert"]) == 0
    assert main([*evaluate, "--reference-data", "less.npz", "--fit", "pad"]) == 0
    # Where the run's own images have moved, nobody knows any more what form they had.
    Path("own.npz").rename("moved.npz")
    assert main([*evaluate, "--reference-data", "moved.npz"]) == 2
    assert "its images are 1x7x7, and the samples 1x8x8: --convert" in capsys.readouterr().err
    assert main([*evaluate, "--reference-data", "moved.npz", "--convert"]) == 0


def test_statistics_are_written_and_compared_with(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data)
    made = [
        "evaluate",
        "samples.npz",
        "--reference-data",
        "digits.npz",
        "--train-features",
        "--save-statistics",
        "real.npz",
    ]
    assert main(made) == 0
    with np.load("real.npz") as arrays:
        assert sorted(arrays) == ["features", "mu", "sigma"]
        assert arrays["sigma"].shape == (64, 64)
        label = str(arrays["features"])
    assert NOTE in label
    assert f"mu and sigma of 1,438 real images, in the features of {label}" in capsys.readouterr().out
    statistics = ["evaluate", "samples.npz", "--reference-data", "real.npz", "--out", "b.json"]
    assert main(statistics) == 2
    assert "give the --inception or --features" in capsys.readouterr().err
    assert main([*statistics, "--features", "features.safetensors"]) == 0
    printed = capsys.readouterr().out
    assert NOTE in printed
    assert "a reference of real images needs images" in printed
    assert "does not say" not in printed
    found = result(Path("b.json"))["statistics"]
    assert NOTE in found["kind"]
    ceiling = result(Path("evaluation.json"))["in_features"]["distances"]["noise"]["frechet"]
    assert found["noise"] == pytest.approx(ceiling, rel=0.2)
    assert found["noise"] > found["frechet"]
    # Of all train images here, of as many as there are samples there.
    frechet = result(Path("evaluation.json"))["in_features"]["distances"]["samples"]["frechet"]
    assert found["frechet"] == pytest.approx(frechet, rel=0.5)
    whole = ["evaluate", "samples.npz", "--reference-data", "digits.npz", "--all-real", "--out", "all.json"]
    assert main(whole) == 0
    of_all = result(Path("all.json"))["in_features"]["distances"]["samples"]
    assert (of_all["count"], of_all["num_reference"]) == (180, 1438)
    assert found["frechet"] == pytest.approx(of_all["frechet"], rel=1e-6)

    # Other features of the same length are refused where the file has a label; where it has none, a line says so.
    other = ["--train-features", "--rotations", "--features", "other.safetensors"]
    assert main(["evaluate", "samples.npz", "--reference-data", "digits.npz", *other, "--out", "other.json"]) == 0
    capsys.readouterr()
    again = ["evaluate", "samples.npz", "--out", "c.json", "--features", "other.safetensors", "--reference-data"]
    assert main([*again, "real.npz"]) == 2
    assert "real.npz: statistics of the features small classifier" in capsys.readouterr().err
    with np.load("real.npz") as arrays:
        np.savez("plain.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    assert main([*again, "plain.npz"]) == 0
    assert "the file of statistics does not say which features they are of" in capsys.readouterr().out


def test_inception_and_the_statistics_that_it_made(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a small module in the place of Inception: FID in the table is FID from the saved statistics."""
    pytest.importorskip("torchmetrics")
    monkeypatch.chdir(data)
    script(SmallInception, Path("small.pt"))
    script(SmallInception, Path("other.pt"), seed=1)
    evaluate = ["evaluate", "samples.npz", "--inception", "small.pt"]
    assert main([*evaluate, "--reference-data", "digits.npz", "--save-statistics", "real.npz", "--out", "a.json"]) == 0
    printed = capsys.readouterr().out
    assert "mu and sigma of 1,438 real images, in the features of Inception weights" in printed
    assert NOTE not in printed
    inception = result(Path("a.json"))["inception"]
    table = inception["comparison"]
    for row in ("samples", "reference", "noise"):
        assert (table[row]["count"], table[row]["num_reference"]) == (180, 1438)
    assert table["reference"]["frechet"] < table["noise"]["frechet"]
    assert inception["score"] >= 1
    assert main([*evaluate, "--reference-data", "real.npz", "--out", "b.json"]) == 0
    printed = capsys.readouterr().out
    assert "FID from the statistics in real.npz" in printed
    assert NOTE not in printed
    found = result(Path("b.json"))["statistics"]
    assert (found["kind"], found["labelled"]) == ("FID", True)
    assert found["frechet"] == pytest.approx(table["samples"]["frechet"], abs=1e-6)
    assert found["noise"] == pytest.approx(table["noise"]["frechet"], abs=1e-6)
    other = ["evaluate", "samples.npz", "--inception", "other.pt", "--reference-data", "real.npz", "--out", "c.json"]
    assert main(other) == 2
    assert "real.npz: statistics of the features Inception weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--reference-data", "digits.npz"], "there is no such file or folder"),
        (["samples.npz"], "give --reference-data"),
        (["samples.npz", "--reference-data", "nowhere.npz"], "there is no such file or folder"),
        (["samples.npz", "--reference-data", "digits.npz", "--count", "0"], "--count must be at least 1"),
        (["samples.npz", "--reference-data", "digits.npz", "--out", "missing/x.json"], "does not exist"),
        (
            ["samples.npz", "--reference-data", "digits.npz", "--inception", "nowhere.pt"],
            "no such file of Inception weights",
        ),
        (
            ["samples.npz", "--reference-data", "digits.npz", "--features", "nowhere"],
            "give --train-features to train it",
        ),
        (["samples.npz", "--reference-data", "digits.npz", "--features", "samples.npz"], "is no file of features"),
        (["samples.npz", "--reference-data", "digits.npz", "--rotations"], "give both"),
        (["samples.npz", "--reference-data", "digits.npz", "--save-statistics", "x.npz"], "needs features"),
        (["samples.npz", "--reference-data", "unlabelled.npz", "--train-features"], "has no labels"),
        (["beyond.npz", "--reference-data", "digits.npz"], "lie in [-1, 1]"),
        (["digits.npz", "--reference-data", "digits.npz", "--save-statistics", "samples.npz"], "--overwrite"),
        (
            ["samples.npz", "--reference-data", "large.npz"],
            "large.npz: its images are 1x16x16, and the samples 1x8x8: --conv",
        ),
        (["samples.npz", "--reference-data", "wide.npz"], "its images are 1x8x16, and the samples 1x8x8: --convert"),
        (["samples.npz", "--reference-data", "colour.npz"], "its images are 3x8x8, and the samples 1x8x8: --convert"),
        (
            ["samples.npz", "--reference-data", "colour.npz", "--fit", "resize"],
            "its images are 3x8x8, and the samples 1x8x8",
        ),
        (
            ["samples.npz", "--reference-data", "large.npz", "--crop", "12"],
            "its images are 1x12x12, and the samples 1x8x8",
        ),
        (["samples.npz", "--reference-data", "empty"], "empty: no data set that is known here, and no pictures in it"),
        (["empty", "--reference-data", "digits.npz"], "empty: no data set that is known here, and no pictures in it"),
        (["samples.npz", "--reference-data", "broken"], "damaged picture"),
        (["broken", "--reference-data", "digits.npz"], "damaged picture"),
        (["samples.npz", "--reference-data", "sizes"], "sizes: its images are of several sizes, with 1 channels, and"),
        (
            ["samples.npz", "--reference-data", "uneven.npz"],
            "train images are 1x8x8 and its test images 1x16x16: --convert",
        ),
        (["nan.npz", "--reference-data", "digits.npz"], "nan.npz: samples must be finite"),
        (
            ["unit.npz", "--reference-data", "digits.npz"],
            "give the values of black and white as value_range (--range 0 1",
        ),
        (["unit.npz", "--reference-data", "digits.npz", "--train-features"], "--range 0 1 or --range -1 1"),
        (["binary.npz", "--reference-data", "digits.npz"], "--range 0 1 or --range 0 255"),
        (
            ["samples.npz", "--reference-data", "digits.npz", "--range", "0", "1"],
            "lie in [0, 1], got values from -1 to 1",
        ),
        (["samples.npz", "--reference-data", "digits.npz", "--range", "1", "-1"], "black < white"),
        (["samples.npz", "--reference-data", "digits.npz", "--range", "0", "nan"], "needs a finite number"),
        (["digits.npz", "--reference-data", "digits.npz", "--range", "0", "255"], "in one array"),
        (["nowhere.npz", "--reference-data", "digits.npz", "--range", "0", "255"], "no such file"),
        (["samples.npz", "--reference-data", "digits.npz", "--train-features", "--count", "9"], "at least 10 of each"),
        (
            ["samples.npz", "--reference-data", "digits.npz", "--count", "99999999999999999999"],
            "--count must be at most",
        ),
        (["samples.npz", "--reference-data", "ids.npz", "--train-features"], "classes are too many for"),
        (["samples.npz", "--reference-data", "digits.npz", "--out", "samples.npz/a.json"], "can't be written"),
        (["samples.npz", "--reference-data", "digits.npz", "--out", "empty"], "empty is a folder"),
        (["samples.npz", "--reference-data", "digits.npz", "--out", "n" * 300], "can't be written: File name too long"),
        (
            ["samples.npz", "--reference-data", "digits.npz", "--train-features", "--features", "empty"],
            "empty is a folder",
        ),
        (
            ["samples.npz", "--reference-data", "digits.npz", "--out", "samples.npz", "--overwrite"],
            "samples.npz would be written over samples.npz",
        ),
        (
            [
                "samples.npz",
                "--reference-data",
                "digits.npz",
                "--train-features",
                "--out",
                "a",
                "--save-statistics",
                "a",
            ],
            "a would be written over a",
        ),
    ],
)
def test_wrong_arguments(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(data)
    np.savez("unlabelled.npz", x_train=np.zeros((200, 8, 8), np.uint8))
    np.savez("beyond.npz", images=np.full((20, 1, 8, 8), 1.5, np.float32))
    np.savez("unit.npz", images=(digits("test")[0].numpy() + 1) / 2)
    np.savez("binary.npz", images=(digits("test")[0].numpy() > 0).astype(np.uint8))
    np.savez("ids.npz", x_train=np.zeros((500, 8, 8), np.uint8), y_train=np.arange(500))
    np.savez("nan.npz", images=np.full((20, 1, 8, 8), np.nan, np.float32))
    np.savez("uneven.npz", x_train=np.zeros((20, 8, 8), np.uint8), x_test=np.zeros((20, 16, 16), np.uint8))
    for name, shape in (("large", (16, 16)), ("wide", (8, 16)), ("colour", (8, 8, 3))):
        np.savez(f"{name}.npz", x_train=np.zeros((20, *shape), np.uint8))
    for name in ("empty", "broken", "sizes"):
        Path(name).mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (8, 9), dtype=np.uint8)
    Image.fromarray(noise[:, :8]).save("broken/0.png")
    Path("broken/0.png").write_bytes(Path("broken/0.png").read_bytes()[:-40])
    for width in (8, 9):
        Image.fromarray(noise[:, :width]).save(f"sizes/{width}.png")
    before = sorted(data.iterdir())
    assert main(["evaluate", *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.startswith("fastebm: ")
    assert errors.count("\n") == 1
    assert sorted(data.iterdir()) == before


def test_samples_in_other_ranges_get_the_same_result(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits in [0, 1] were taken for gray ones in [-1, 1]: 52 in place of 0.7."""
    monkeypatch.chdir(data)
    samples = digits("test")[0]
    np.savez("samples.npz", images=samples.numpy())
    np.savez("unit.npz", images=((samples + 1) / 2).numpy())
    np.savez("wide.npz", images=((samples + 1) * 127.5).numpy())
    found = []
    for name, *value_range in (("samples",), ("samples", "-1", "1"), ("unit", "0", "1"), ("wide", "0", "255")):
        options = ["--range", *value_range] if value_range else []
        arguments = [f"{name}.npz", "--reference-data", "digits.npz", "--train-features", *options]
        assert main(["evaluate", *arguments, "--out", f"{len(found)}.json"]) == 0
        found.append(result(Path(f"{len(found)}.json"))["in_features"])
    for other in found[1:]:
        assert other["distances"] == found[0]["distances"]
        assert other["nearest"] == pytest.approx(found[0]["nearest"], rel=1e-5)


def test_images_without_a_label_are_counted(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data)
    with np.load("digits.npz") as arrays:
        content = dict(arrays)
    content["y_train"] = np.where(np.arange(len(content["y_train"])) % 3 == 0, -1, content["y_train"] * 10_000)
    content["y_test"] = np.full_like(content["y_test"], -1)
    np.savez("some.npz", **content)
    assert main(["evaluate", "samples.npz", "--reference-data", "some.npz", "--train-features"]) == 0
    said = capsys.readouterr()
    assert "480 images without a label left out" in said.err
    assert "classes found, of 10" in said.out
    assert result(Path("evaluation.json"))["features"]["unlabelled"] == 480


@pytest.mark.parametrize("seed", ["-1", "18446744073709551615", "-9223372036854775808"])
def test_all_seeds_that_samples_take(trained: Path, tmp_path: Path, seed: str) -> None:
    out = tmp_path / "a.json"
    assert main(["evaluate", str(trained), "--count", "10", "--seed", seed, "--out", str(out)]) == 0
    assert result(out)["energy_metrics"]["count"] == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "1000000000"], "would need"),
        (["--count", "1000000000000"], "--count must be at most"),
        (["--count", "-1"], "--count must be at least 1"),
        (["--seed", "99999999999999999999", "--count", "10"], "seed must be in"),
        (["--range", "0", "1"], "--range is of samples in a file"),
        (["--count", "5", "--train-features"], "at least 10 of each"),
        (["--out", "missing/a.json"], "does not exist"),
    ],
)
def test_what_a_run_refuses(refusal: Callable[[list[str]], str], arguments: list[str], message: str) -> None:
    assert message in refusal(["evaluate", "RUN", "--out", "a.json", *arguments])


def test_a_full_disk_leaves_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that fills up during the work: one line, and no half-written file."""
    monkeypatch.chdir(tmp_path)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def full_for_tensors(*arguments: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    evaluate = ["evaluate", str(trained), "--count", "20", "--out", "a.json", "--no-energy-metrics"]
    for name, broken, options in (
        ("fastebm.runs.files.sync", full, []),
        ("fastebm.evaluation.metrics.features.save_file", full_for_tensors, ["--train-features"]),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(name, broken)
            assert main([*evaluate, *options]) == 2
        errors = capsys.readouterr().err
        assert "No space left on device" in errors
        assert errors.splitlines()[-1].startswith("fastebm: ")
        assert not list(tmp_path.iterdir())


def test_a_loop_of_links_is_one_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for option in ("--reference-data", "--inception"):
        given = [option, str(tmp_path / "loop"), "--no-energy-metrics", "--out", str(tmp_path / "a.json")]
        assert main(["evaluate", str(trained), "--count", "20", *given]) == 2
        said = capsys.readouterr().err
        assert said.startswith("fastebm: ")
        assert said.count("\n") == 1
