"""Evaluation passes real images, and shows each way in which samples can fail."""

import json
import math

import pytest
import torch
from torch import Tensor

from fastebm.data import Images, digits, to_pixels
from fastebm.evaluation import (
    EvaluationResult,
    FeatureClassifier,
    NearestDistances,
    PredictedClasses,
    RealImages,
    evaluate_digits,
    evaluate_samples,
    frechet_distance,
    nearest_distances,
    train_features,
)
from fastebm.evaluation.metrics.features import select
from fastebm.evaluation.report import LongRunFeatures, Report


@pytest.fixture(scope="module")
def real() -> RealImages:
    return RealImages(*(Images(to_pixels(x), y) for x, y in (digits("train"), digits("test"))))


@pytest.fixture(scope="module")
def classifier(real: RealImages) -> FeatureClassifier:
    return train_features(real.train, real.test, images_seen=15_000)


def test_unseen_real_digits_are_match_the_reference(real: RealImages, classifier: FeatureClassifier) -> None:
    assert real.test is not None
    result = evaluate_samples(real.test.batch(slice(None)), real, classifier)
    comparison, classes, nearest = result.comparison, result.classes, result.nearest
    assert comparison is not None
    assert comparison.samples.frechet == pytest.approx(comparison.reference.frechet, rel=1e-6)
    assert comparison.samples.precision > 0.6
    assert 20 * comparison.reference.frechet < comparison.noise.frechet
    assert classes is not None
    assert (classes.found, classes.found_real) == (10, 10)
    assert sorted(classes.counts) == sorted(classes.counts_real)
    assert classes.entropy == pytest.approx(math.log(10), abs=0.02)
    assert classes.confident_share == classes.confident_share_real > 0.8
    assert nearest.median == pytest.approx(nearest.median_real, rel=1e-6)
    stored = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert stored["note"] == "not comparable to published FID"
    assert stored["classes"]["found"] == 10
    assert stored["distances"]["reference_kind"] == "test images"


def test_noise_and_one_class_and_copies_show(real: RealImages, classifier: FeatureClassifier) -> None:
    assert real.test is not None
    assert real.test.labels is not None
    noise = evaluate_samples(
        torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1, real, classifier
    )
    assert noise.comparison is not None
    assert noise.comparison.samples.frechet == pytest.approx(noise.comparison.noise.frechet, rel=0.2)
    assert noise.comparison.samples.precision < 0.05
    assert noise.classes is not None
    assert noise.classes.confident_share < noise.classes.confident_share_real / 2

    threes = evaluate_samples(real.test.batch(torch.nonzero(real.test.labels == 3)[:, 0]), real, classifier)
    assert threes.classes is not None
    assert threes.comparison is not None
    assert threes.classes.largest_share > 0.8
    assert threes.classes.entropy < 0.7
    assert threes.comparison.samples.recall < 0.4 < threes.comparison.samples.precision

    copies = evaluate_samples(real.train.batch(slice(0, 200)), real, classifier)
    assert copies.nearest.median == 0
    assert copies.nearest.first_percentile_real > 0.5


def test_classes_by_hand() -> None:
    probabilities = torch.tensor([[0.95, 0.03, 0.02], [0.4, 0.35, 0.25], [0.0, 1.0, 0.0], [0.91, 0.09, 0.0]])
    classes = PredictedClasses.of(("a", "b", "c"), probabilities, torch.eye(3))
    assert classes.counts == (3, 1, 0)
    assert (classes.found, classes.largest_share, classes.confident_share) == (2, 0.75, 0.75)
    assert classes.entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert (classes.found_real, classes.confident_share_real) == (3, 1)
    assert classes.entropy_real == pytest.approx(math.log(3))


def test_a_class_is_found_with_a_tenth_of_an_even_share() -> None:
    for few, found in ((9, 1), (10, 2)):
        counts = (1000 - few, few, *[0] * 8)
        assert PredictedClasses(tuple("abcdefghij"), counts, counts, 1.0, 1.0).found == found


def test_nearest_distances_are_from_all_train_images(real: RealImages) -> None:
    assert real.test is not None
    nearest = NearestDistances.of(real.test.batch(slice(0, 50)), real)
    expected = nearest_distances(real.test.batch(slice(0, 50)), real.train.batch(slice(None)))
    assert (nearest.count, nearest.num_reference) == (50, len(real.train))
    assert nearest.median == pytest.approx(float(expected.median()))


def test_the_report_says_everywhere_that_it_is_not_fid(real: RealImages, classifier: FeatureClassifier) -> None:
    assert real.test is not None
    samples = real.test.batch(slice(0, 100))
    result = evaluate_samples(samples, real, classifier)
    long_run = LongRunFeatures.of(samples, samples[:90].flip(3), real, classifier)
    assert long_run is not None
    assert long_run.count == 90
    assert long_run.frechet_end > long_run.frechet_start
    reference = classifier(real.subset(100)).features
    assert long_run.reference == frechet_distance(classifier(real.held_out(100)[0]).features, reference)
    assert long_run.reference < long_run.frechet_end
    scarce = LongRunFeatures.of(samples, samples, RealImages(select(real.train, torch.arange(150))), classifier)
    assert scarce is not None
    assert scarce.reference is None
    report = Report("samples", "digits", result.nearest, classifier.metadata(), result, long_run=long_run)
    text = report.explain()
    assert f", reference {long_run.reference:.4g} (" in text
    assert "not comparable to published FID" in text
    assert "reference: test images" in text
    assert "uniform noise" in text
    assert "classes found, of 10" in text
    stored = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert stored["in_features"]["note"] == stored["long_chains_in_features"]["note"]
    assert stored["features"]["accuracy"] == classifier.accuracy
    assert "energy_metrics" not in stored


def test_features_by_rotations_have_no_classes(real: RealImages) -> None:
    trained = train_features(real.train, task="rotations", images_seen=1000)
    result = evaluate_samples(real.train.batch(slice(0, 50)), real, trained)
    assert result.classes is None
    assert "rotations" in Report("a", "b", result.nearest, trained.metadata(), result).explain()


@pytest.fixture(scope="module")
def real_digits() -> Tensor:
    return digits("test")[0]


def test_held_out_digits_pass(real_digits: Tensor) -> None:
    result = evaluate_digits(real_digits)
    assert result.classes is not None
    assert result.accuracy >= 0.97
    assert result.classes.found == 10
    assert result.classes.confident_share == result.classes.confident_share_real > 0.9
    assert result.passed
    assert sum(result.classes.counts) == result.nearest.count == len(real_digits)
    assert json.loads(json.dumps(result.to_json()))["passed"] is True
    assert "are met" in result.explain()


def test_noise_does_not_look_like_digits() -> None:
    noise = torch.rand(500, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    result = evaluate_digits(noise)
    assert result.classes is not None
    assert not result.realistic
    assert not result.passed
    assert result.classes.confident_share < 0.05
    assert "NOT met" in result.explain()


def test_copies_of_training_digits_are_not_novel() -> None:
    result = evaluate_digits(digits("train")[0][:300])
    assert not result.novel
    assert not result.passed


def test_one_class_is_not_diverse(real_digits: Tensor) -> None:
    _, labels = digits("test")
    result = evaluate_digits(real_digits[labels == 3])
    assert result.classes is not None
    assert result.classes.found <= 3
    assert result.classes.largest_share > 0.9
    assert not result.diverse


def test_a_class_is_found_with_a_hundredth_of_the_samples() -> None:
    nearest = NearestDistances(1000, 1438, 2.0, 1.0, 2.0, 1.0)
    for counts, found in (((991, 9, *[0] * 8), 1), ((990, 10, *[0] * 8), 2)):
        classes = PredictedClasses(tuple("0123456789"), counts, counts, 0.5, 0.9)
        result = EvaluationResult(0.98, classes, nearest)
        assert classes.found == found
        assert (result.diverse, result.novel, result.realistic, result.passed) == (False, True, True, False)


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (5, 8, 8), (5, 1, 4, 4), (5, 3, 8, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"samples must be \(N, 1, 8, 8\)"):
        evaluate_digits(torch.zeros(shape))


def test_samples_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="samples must be finite"):
        evaluate_digits(torch.full((2, 1, 8, 8), torch.nan))
