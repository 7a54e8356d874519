"""The verdict passes what is real and tells each way of being unlike it."""

import json
import math

import pytest
import torch

from fastebm.data import Images, digits, to_pixels
from fastebm.evaluation import (
    FeatureClassifier,
    RealImages,
    evaluate_samples,
    frechet_distance,
    nearest_distances,
    train_features,
)
from fastebm.evaluation.metrics.classifier import Classes, Nearest
from fastebm.evaluation.metrics.features import chosen
from fastebm.evaluation.report import LongRunFeatures, Report


@pytest.fixture(scope="module")
def real() -> RealImages:
    return RealImages(*(Images(to_pixels(x), y) for x, y in (digits("train"), digits("test"))))


@pytest.fixture(scope="module")
def classifier(real: RealImages) -> FeatureClassifier:
    return train_features(real.train, real.test, images_seen=15_000)


def test_unseen_real_digits_are_at_the_floor(real: RealImages, classifier: FeatureClassifier) -> None:
    assert real.test is not None
    verdict = evaluate_samples(real.test.batch(slice(None)), real, classifier)
    comparison, classes, nearest = verdict.comparison, verdict.classes, verdict.nearest
    assert comparison.samples.frechet == pytest.approx(comparison.floor.frechet, rel=1e-6)
    assert comparison.samples.precision > 0.6
    assert 20 * comparison.floor.frechet < comparison.noise.frechet
    assert classes is not None
    assert (classes.found, classes.found_real) == (10, 10)
    assert sorted(classes.counts) == sorted(classes.counts_real)
    assert classes.entropy == pytest.approx(math.log(10), abs=0.02)
    assert classes.confident_share == classes.confident_share_real > 0.8
    assert nearest.median == pytest.approx(nearest.median_real, rel=1e-6)
    stored = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert stored["note"] == "not comparable to published FID"
    assert stored["classes"]["found"] == 10
    assert stored["distances"]["floor_of"] == "test images"


def test_noise_and_one_class_and_copies_show(real: RealImages, classifier: FeatureClassifier) -> None:
    assert real.test is not None
    assert real.test.labels is not None
    noise = evaluate_samples(
        torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1, real, classifier
    )
    assert noise.comparison.samples.frechet == pytest.approx(noise.comparison.noise.frechet, rel=0.2)
    assert noise.comparison.samples.precision < 0.05
    assert noise.classes is not None
    assert noise.classes.confident_share < noise.classes.confident_share_real / 2

    threes = evaluate_samples(real.test.batch(torch.nonzero(real.test.labels == 3)[:, 0]), real, classifier)
    assert threes.classes is not None
    assert threes.classes.largest_share > 0.8
    assert threes.classes.entropy < 0.7
    assert threes.comparison.samples.recall < 0.4 < threes.comparison.samples.precision

    copies = evaluate_samples(real.train.batch(slice(0, 200)), real, classifier)
    assert copies.nearest.median == 0
    assert copies.nearest.first_percentile_real > 0.5


def test_classes_by_hand() -> None:
    probabilities = torch.tensor([[0.95, 0.03, 0.02], [0.4, 0.35, 0.25], [0.0, 1.0, 0.0], [0.91, 0.09, 0.0]])
    classes = Classes.of(("a", "b", "c"), probabilities, torch.eye(3))
    assert classes.counts == (3, 1, 0)
    assert (classes.found, classes.largest_share, classes.confident_share) == (2, 0.75, 0.75)
    assert classes.entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert (classes.found_real, classes.confident_share_real) == (3, 1)
    assert classes.entropy_real == pytest.approx(math.log(3))


def test_a_class_is_found_with_a_tenth_of_an_even_share() -> None:
    for few, found in ((9, 1), (10, 2)):
        counts = (1000 - few, few, *[0] * 8)
        assert Classes(tuple("abcdefghij"), counts, counts, 1.0, 1.0).found == found


def test_nearest_distances_are_from_all_train_images(real: RealImages) -> None:
    assert real.test is not None
    nearest = Nearest.of(real.test.batch(slice(0, 50)), real)
    expected = nearest_distances(real.test.batch(slice(0, 50)), real.train.batch(slice(None)))
    assert (nearest.count, nearest.reference) == (50, len(real.train))
    assert nearest.median == pytest.approx(float(expected.median()))


def test_the_report_says_everywhere_that_it_is_not_fid(real: RealImages, classifier: FeatureClassifier) -> None:
    assert real.test is not None
    samples = real.test.batch(slice(0, 100))
    verdict = evaluate_samples(samples, real, classifier)
    survival = LongRunFeatures.of(samples, samples[:90].flip(3), real, classifier)
    assert survival is not None
    assert survival.count == 90
    assert survival.frechet_end > survival.frechet_start
    reference = classifier(real.reference(100)).features
    assert survival.floor == frechet_distance(classifier(real.unseen(100)[0]).features, reference)
    assert survival.floor < survival.frechet_end
    scarce = LongRunFeatures.of(samples, samples, RealImages(chosen(real.train, torch.arange(150))), classifier)
    assert scarce is not None
    assert scarce.floor is None
    report = Report("samples", "digits", verdict.nearest, classifier.facts(), verdict, survival=survival)
    text = report.explain()
    assert f", floor {survival.floor:.4g} (" in text
    assert "not comparable to published FID" in text
    assert "floor: test images" in text
    assert "ceiling: uniform noise" in text
    assert "classes found, of 10" in text
    stored = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert stored["in_features"]["note"] == stored["long_chains_in_features"]["note"]
    assert stored["features"]["accuracy"] == classifier.accuracy
    assert "health" not in stored


def test_features_by_rotations_have_no_classes(real: RealImages) -> None:
    trained = train_features(real.train, task="rotations", images_seen=1000)
    verdict = evaluate_samples(real.train.batch(slice(0, 50)), real, trained)
    assert verdict.classes is None
    assert "rotations" in Report("a", "b", verdict.nearest, trained.facts(), verdict).explain()
