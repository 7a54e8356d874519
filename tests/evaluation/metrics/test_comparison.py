"""Samples between floor and ceiling: which images are compared with which, and how many."""

import dataclasses

import pytest
import torch
from torch import Tensor

from fastebm.data import Images
from fastebm.evaluation import RealImages, compare, frechet_distance, precision_recall
from fastebm.evaluation.metrics.features import FeatureExtractor


def numbered(count: int, first: int = 0) -> Images:
    """Images whose pixels tell their number, from 0 to 65535."""
    numbers = torch.arange(first, first + count)
    pixels = torch.stack([numbers // 256, numbers % 256], 1).to(torch.uint8)
    return Images(pixels.view(-1, 1, 1, 2).repeat(1, 1, 2, 1))


def numbers(images: Images) -> list[int]:
    pairs = images.pixels[:, 0, 0].long()
    return (pairs[:, 0] * 256 + pairs[:, 1]).tolist()


def describe(images: Tensor | Images) -> FeatureExtractor:
    """Features that are the pixels."""
    pixels = images.batch(slice(None)) if isinstance(images, Images) else images
    features = pixels.flatten(1).double()
    return FeatureExtractor(features, features.softmax(1))


def test_without_test_images_the_floor_is_a_disjoint_part() -> None:
    real = RealImages(numbered(100), seed=3)
    for count in (10, 40, 50, 90, 1000):
        unseen, rest = real.unseen(count)
        few = min(count, 50)
        assert len(unseen) == few
        assert not {*numbers(unseen)} & {*numbers(real.reference(few))}
        assert sorted([*numbers(unseen), *numbers(rest)]) == list(range(100))
        assert len(real.reference(count)) == min(count, 100)
    assert numbers(real.reference(90))[:10] == numbers(real.reference(10))
    assert numbers(RealImages(numbered(100), seed=4).reference(10)) != numbers(real.reference(10))
    assert real.unseen_are(10) == "train images of the other half"


def test_test_images_are_the_floor_where_there_are_enough() -> None:
    real = RealImages(numbered(5000), numbered(1000, 10_000))
    unseen, rest = real.unseen(3000)
    assert sorted(numbers(unseen)) == list(range(10_000, 11_000))
    assert len(rest) == 5000
    assert real.unseen_are(3000) == "test images"
    few = RealImages(numbered(5000), numbered(300, 10_000))
    assert few.unseen_are(300) == "test images"
    assert few.unseen_are(301) == "train images of the other half"


def test_rows_are_distances_from_as_many_real_images() -> None:
    real = RealImages(numbered(60))
    samples = numbered(40).batch(slice(None))
    comparison = compare(samples, real, describe).comparison
    assert (comparison.samples.count, comparison.beside_floor.count) == (40, 30)
    assert (comparison.floor.count, comparison.noise.count) == (30, 30)
    reference = describe(real.reference(40)).features
    assert comparison.samples.frechet == frechet_distance(describe(samples).features, reference)
    unseen = describe(real.unseen(40)[0]).features
    assert comparison.floor.frechet == frechet_distance(unseen, reference[:30])
    assert comparison.floor.frechet < comparison.noise.frechet
    assert [name for name, _ in comparison.rows()] == [
        "samples",
        "samples, fewer",
        "floor: train images of the other half",
        "ceiling: uniform noise",
    ]
    even = compare(samples[:20], real, describe).comparison
    assert even.beside_floor == even.samples
    assert len(even.rows()) == 3
    assert even.to_json()["floor"] == dataclasses.asdict(even.floor)


def test_all_samples_are_compared_with_all_real_images_where_asked() -> None:
    real = RealImages(numbered(60), seed=3)
    samples = numbered(90, 20).batch(slice(None))
    comparison = compare(samples, real, describe, all_real=True).comparison
    counts = [(row.count, row.reference) for _, row in comparison.rows()]
    assert counts == [(90, 60), (30, 60), (30, 30), (30, 60)]
    everything, of_samples = describe(real.train).features, describe(samples).features
    assert comparison.samples.frechet == pytest.approx(frechet_distance(of_samples, everything), abs=1e-9)
    assert comparison.beside_floor.frechet == pytest.approx(frechet_distance(of_samples[:30], everything), abs=1e-9)
    # The floor's images are not among those that they are compared with, here the other half.
    unseen, rest = real.unseen(90)
    assert not {*numbers(unseen)} & {*numbers(rest)}
    floor = frechet_distance(describe(unseen).features, describe(rest).features)
    assert comparison.floor.frechet == pytest.approx(floor, abs=1e-9)
    # Shares depend on the counts: of as many of both.
    shares = precision_recall(of_samples[:60], describe(real.reference(60)).features)
    assert (comparison.samples.precision, comparison.samples.recall) == shares
    with_test = RealImages(numbered(60), numbered(50, 200), seed=3)
    comparison = compare(samples, with_test, describe, all_real=True).comparison
    assert [(row.count, row.reference) for _, row in comparison.rows()] == [(90, 60), (30, 60), (30, 30), (30, 60)]
    comparison = compare(samples[:40], with_test, describe, all_real=True).comparison
    assert [(row.count, row.reference) for _, row in comparison.rows()] == [(40, 60)] * 3
    assert comparison.floor_of == "test images"
    # As many is still the default.
    assert [row.reference for _, row in compare(samples[:40], with_test, describe).comparison.rows()] == [40] * 3


def test_too_few_images_are_refused() -> None:
    for samples, real in ((9, 100), (100, 19)):
        with pytest.raises(ValueError, match="at least 10 of each"):
            compare(numbered(samples).batch(slice(None)), RealImages(numbered(real)), describe)
