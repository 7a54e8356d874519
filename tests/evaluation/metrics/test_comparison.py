"""Samples between real images and noise: which images are compared with which, and how many."""

import dataclasses

import pytest
import torch
from torch import Tensor

from fastebm.data import Images
from fastebm.evaluation import RealImages, compare, frechet_distance, precision_recall
from fastebm.evaluation.metrics.features import Features


def numbered(count: int, first: int = 0) -> Images:
    """Images whose pixels tell their number, from 0 to 65535."""
    numbers = torch.arange(first, first + count)
    pixels = torch.stack([numbers // 256, numbers % 256], 1).to(torch.uint8)
    return Images(pixels.view(-1, 1, 1, 2).repeat(1, 1, 2, 1))


def numbers(images: Images) -> list[int]:
    pairs = images.pixels[:, 0, 0].long()
    return (pairs[:, 0] * 256 + pairs[:, 1]).tolist()


def extract(images: Tensor | Images) -> Features:
    """Features that are the pixels."""
    pixels = images.batch(slice(None)) if isinstance(images, Images) else images
    features = pixels.flatten(1).double()
    return Features(features, features.softmax(1))


def test_without_test_images_the_reference_is_a_disjoint_part() -> None:
    real = RealImages(numbered(100), seed=3)
    for count in (10, 40, 50, 90, 1000):
        unseen, rest = real.held_out(count)
        few = min(count, 50)
        assert len(unseen) == few
        assert not {*numbers(unseen)} & {*numbers(real.subset(few))}
        assert sorted([*numbers(unseen), *numbers(rest)]) == list(range(100))
        assert len(real.subset(count)) == min(count, 100)
    assert numbers(real.subset(90))[:10] == numbers(real.subset(10))
    assert numbers(RealImages(numbered(100), seed=4).subset(10)) != numbers(real.subset(10))
    assert real.held_out_kind(10) == "train images of the other half"


def test_test_images_are_the_reference_where_there_are_enough() -> None:
    real = RealImages(numbered(5000), numbered(1000, 10_000))
    unseen, rest = real.held_out(3000)
    assert sorted(numbers(unseen)) == list(range(10_000, 11_000))
    assert len(rest) == 5000
    assert real.held_out_kind(3000) == "test images"
    few = RealImages(numbered(5000), numbered(300, 10_000))
    assert few.held_out_kind(300) == "test images"
    assert few.held_out_kind(301) == "train images of the other half"


def test_rows_are_distances_from_as_many_real_images() -> None:
    real = RealImages(numbered(60))
    samples = numbered(40).batch(slice(None))
    comparison = compare(samples, real, extract).comparison
    assert (comparison.samples.count, comparison.samples_at_reference_count.count) == (40, 30)
    assert (comparison.reference.count, comparison.noise.count) == (30, 30)
    reference = extract(real.subset(40)).features
    assert comparison.samples.frechet == frechet_distance(extract(samples).features, reference)
    unseen = extract(real.held_out(40)[0]).features
    assert comparison.reference.frechet == frechet_distance(unseen, reference[:30])
    assert comparison.reference.frechet < comparison.noise.frechet
    assert [name for name, _ in comparison.rows()] == [
        "samples",
        "samples, fewer",
        "reference: train images of the other half",
        "uniform noise",
    ]
    even = compare(samples[:20], real, extract).comparison
    assert even.samples_at_reference_count == even.samples
    assert len(even.rows()) == 3
    assert even.to_json()["reference"] == dataclasses.asdict(even.reference)


def test_all_samples_are_compared_with_all_real_images_where_asked() -> None:
    real = RealImages(numbered(60), seed=3)
    samples = numbered(90, 20).batch(slice(None))
    comparison = compare(samples, real, extract, all_real=True).comparison
    counts = [(row.count, row.num_reference) for _, row in comparison.rows()]
    assert counts == [(90, 60), (30, 60), (30, 30), (30, 60)]
    everything, of_samples = extract(real.train).features, extract(samples).features
    assert comparison.samples.frechet == pytest.approx(frechet_distance(of_samples, everything), abs=1e-9)
    assert comparison.samples_at_reference_count.frechet == pytest.approx(
        frechet_distance(of_samples[:30], everything), abs=1e-9
    )
    # Held-out images are not among those that they are compared with, here the other half.
    unseen, rest = real.held_out(90)
    assert not {*numbers(unseen)} & {*numbers(rest)}
    expected = frechet_distance(extract(unseen).features, extract(rest).features)
    assert comparison.reference.frechet == pytest.approx(expected, abs=1e-9)
    # Shares depend on the counts: of as many of both.
    shares = precision_recall(of_samples[:60], extract(real.subset(60)).features)
    assert (comparison.samples.precision, comparison.samples.recall) == shares
    with_test = RealImages(numbered(60), numbered(50, 200), seed=3)
    comparison = compare(samples, with_test, extract, all_real=True).comparison
    assert [(row.count, row.num_reference) for _, row in comparison.rows()] == [(90, 60), (30, 60), (30, 30), (30, 60)]
    comparison = compare(samples[:40], with_test, extract, all_real=True).comparison
    assert [(row.count, row.num_reference) for _, row in comparison.rows()] == [(40, 60)] * 3
    assert comparison.reference_kind == "test images"
    # As many is still the default.
    assert [row.num_reference for _, row in compare(samples[:40], with_test, extract).comparison.rows()] == [40] * 3


def test_too_few_images_are_refused() -> None:
    for samples, real in ((9, 100), (100, 19)):
        with pytest.raises(ValueError, match="at least 10 of each"):
            compare(numbered(samples).batch(slice(None)), RealImages(numbered(real)), extract)
