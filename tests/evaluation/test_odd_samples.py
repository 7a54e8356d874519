"""Samples in every form that tools write: each is measured as what it shows, or refused in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastebm.data import Images, digits, to_float, to_pixels
from fastebm.data.value_range import ValueRange
from fastebm.evaluation import (
    FeatureClassifier,
    NearestDistances,
    RealImages,
    compare,
    energy_metrics,
    evaluate_digits,
    evaluate_samples,
    train_features,
)
from fastebm.evaluation.sources import read_samples

COUNT = 60
PIXELS = to_pixels(digits("test")[0][:COUNT])
SAMPLES = to_float(PIXELS)
UNIT = (SAMPLES + 1) / 2
COLOURS = SAMPLES.repeat(1, 3, 1, 1)


@pytest.mark.parametrize(
    ("array", "value_range"),
    [
        (SAMPLES.numpy(), None),
        (SAMPLES.numpy(), (-1, 1)),
        (SAMPLES.numpy().astype(">f8"), None),
        (SAMPLES.numpy().astype(np.float16), None),
        (SAMPLES.numpy().astype(np.longdouble), None),
        (np.asfortranarray(SAMPLES.numpy()), None),
        (SAMPLES[:, 0].numpy(), None),
        (SAMPLES.permute(0, 2, 3, 1).numpy(), None),
        (UNIT.numpy(), (0, 1)),
        (UNIT.numpy() * 255, (0, 255)),
        (PIXELS.numpy(), None),
        (PIXELS.permute(0, 2, 3, 1).numpy(), None),
        (PIXELS.numpy(), (0, 255)),
        (PIXELS.numpy().astype(np.int64), (0, 255)),
        (PIXELS.numpy().astype(">u2") * 257, (0, 65535)),
        (PIXELS.numpy().astype(np.uint64), (0, 255)),
        (COLOURS.numpy(), None),
        (COLOURS.permute(0, 2, 3, 1).numpy(), None),
    ],
)
@pytest.mark.parametrize("name", ["a.npz", "a.npy", "other.npz"])
def test_arrays_are_read_as_what_they_show(
    tmp_path: Path, name: str, array: np.ndarray, value_range: ValueRange | None
) -> None:
    path = tmp_path / name
    if path.suffix == ".npy":
        np.save(path, array)
    elif name == "a.npz":
        np.savez(path, images=array, labels=np.zeros((COUNT, 4, 4)))
    else:
        np.savez_compressed(path, array, labels=np.zeros(COUNT))
    samples = read_samples(path, value_range)
    assert samples.dtype == torch.float32
    colours = 3 if 3 in array.shape else 1
    assert torch.equal(to_pixels(samples), PIXELS.repeat(1, colours, 1, 1))


@pytest.mark.parametrize(
    ("array", "value_range", "message"),
    [
        (UNIT.numpy(), None, "may be meant in"),
        (UNIT.numpy() * 255, None, "got values from 0 to 255"),
        (PIXELS.numpy() // 255, None, "may be meant in|bytes of 0 and 1 alone"),
        (PIXELS.numpy().astype(np.int64), None, "are float64 from 0 to 255|are int64|got values from 0 to 255"),
        (PIXELS.numpy().astype(np.uint16), None, "got values from 0 to 255|are uint16"),
        (SAMPLES.numpy() * np.nan, None, "finite"),
        (np.where(SAMPLES.numpy() > 0.9, np.inf, SAMPLES.numpy()), None, "finite"),
        (SAMPLES.numpy().astype(complex), None, "complex128.*real numbers"),
        (SAMPLES.numpy() > 0, None, "bool.*real numbers"),
        (SAMPLES.numpy().astype(object), None, "Python objects|real numbers"),
        (np.zeros((5, 1, 8, 8), "U3"), None, "real numbers"),
        (np.zeros((5, 1, 8, 8), "V8"), None, "real numbers"),
        (np.zeros((5, 2, 8, 8)), None, "no axis of 1 or 3 channels"),
        (np.zeros((5, 1, 8, 9)), None, "samples must be"),
        (np.zeros((0, 1, 8, 8)), None, "samples must be"),
        (np.zeros((5, 64)), None, "is no set of images"),
        (np.float64(3), None, "is no set of images"),
    ],
)
def test_arrays_that_do_not_say_what_they_show_are_refused(
    tmp_path: Path, array: np.ndarray, value_range: ValueRange | None, message: str
) -> None:
    np.savez(tmp_path / "a.npz", images=array)
    with pytest.raises(ValueError, match=message) as refused:
        read_samples(tmp_path / "a.npz", value_range)
    assert "\n" not in str(refused.value)
    assert "a.npz" in str(refused.value)


def test_a_range_of_what_is_no_array_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=PIXELS.numpy(), x_test=PIXELS.numpy())
    with pytest.raises(ValueError, match="in one array"):
        read_samples(tmp_path / "a.npz", (0, 1))


@pytest.fixture(scope="module")
def judge() -> tuple[RealImages, FeatureClassifier]:
    train, test = (Images(to_pixels(images), labels) for images, labels in (digits("train"), digits("test")))
    return RealImages(train, test), train_features(train, test, images_seen=3000)


@pytest.mark.parametrize(
    ("samples", "value_range"),
    [
        (SAMPLES, (-1, 1)),
        (SAMPLES.double(), None),
        (SAMPLES.half(), None),
        (PIXELS, None),
        (UNIT, (0, 1)),
        (SAMPLES.to(memory_format=torch.channels_last), None),
        (SAMPLES.clone().requires_grad_(), None),
    ],
)
def test_all_forms_of_one_set_get_one_result(
    judge: tuple[RealImages, FeatureClassifier], samples: torch.Tensor, value_range: ValueRange | None
) -> None:
    expected = evaluate_samples(SAMPLES, *judge)
    found = evaluate_samples(samples, *judge, value_range=value_range)
    assert found.comparison == expected.comparison
    assert found.classes == expected.classes
    assert found.nearest.median == pytest.approx(expected.nearest.median, rel=1e-3)
    digits_found = evaluate_digits(samples, value_range=value_range)
    assert digits_found.nearest.median == pytest.approx(evaluate_digits(SAMPLES).nearest.median, rel=1e-3)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (UNIT, "may be meant in"),
        (UNIT * 255, "got values from 0 to 255"),
        (PIXELS.long(), "are int64"),
        (SAMPLES * torch.nan, "finite"),
        (SAMPLES[:0], "empty"),
        (SAMPLES[:9], "at least 10 of each"),
        (COLOURS, "shape of the real images"),
        (SAMPLES[:, 0], "shape of the real images"),
        (SAMPLES[..., :4], "shape of the real images"),
        (SAMPLES.repeat_interleave(2, 2).repeat_interleave(2, 3), "shape of the real images"),
    ],
)
def test_samples_that_can_not_be_measured_are_refused(
    judge: tuple[RealImages, FeatureClassifier], samples: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        evaluate_samples(samples, *judge)
    assert "\n" not in str(refused.value)
    with pytest.raises((ValueError, TypeError)):
        compare(samples, judge[0], judge[1])
    if message != "at least 10 of each":
        with pytest.raises((ValueError, TypeError)):
            NearestDistances.of(samples, judge[0])


def test_features_refuse_what_clamping_would_hide(judge: tuple[RealImages, FeatureClassifier]) -> None:
    with pytest.raises(ValueError, match=r"lie in \[-1, 1\]"):
        judge[1](UNIT * 255)
    with pytest.raises(TypeError, match=r"floats in .* or bytes"):
        judge[1](PIXELS.long())
    # bfloat16 has 8 bits of its own: rounding is that of the samples, not of the conversion
    assert torch.equal(judge[1](SAMPLES.bfloat16()).features, judge[1](SAMPLES.bfloat16().float()).features)


def test_constant_samples_are_far_and_of_no_diversity(judge: tuple[RealImages, FeatureClassifier]) -> None:
    result = evaluate_samples(torch.full((COUNT, 1, 8, 8), -1.0), *judge)
    assert result.comparison is not None
    distances = result.comparison.samples
    assert distances.frechet > 5 * result.comparison.reference.frechet
    assert distances.recall == 0
    assert result.classes is not None
    assert (result.classes.found, result.diverse) == (1, False)


def test_train_and_test_images_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        RealImages(Images(PIXELS), Images(PIXELS.repeat(1, 3, 1, 1)))


def test_energies_of_samples_that_are_not_finite_are_refused() -> None:
    wrong = SAMPLES.clone()
    wrong[3, 0, 0, 0] = torch.nan
    for pair in ((wrong, SAMPLES), (SAMPLES, wrong)):
        with pytest.raises(ValueError, match="must be finite"):
            energy_metrics(lambda x: x.square().sum((1, 2, 3)), *pair, step_size=0.1, noise_std=0.1, num_steps=1)
