"""The small classifier: it learns, is a function of its seed, keeps in a file, and knows its data again."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastebm.data import Images, digits, open_images, to_pixels
from fastebm.evaluation import FeatureClassifier, frechet_distance, train_features
from fastebm.evaluation.metrics.features import random_split, select


@pytest.fixture(scope="module")
def real() -> tuple[Images, Images]:
    train, test = (Images(to_pixels(x), y) for x, y in (digits("train"), digits("test")))
    return train, test


@pytest.fixture(scope="module")
def classifier(real: tuple[Images, Images]) -> FeatureClassifier:
    return train_features(*real, images_seen=15_000)


def test_it_learns_digits(real: tuple[Images, Images], classifier: FeatureClassifier) -> None:
    assert classifier.accuracy >= 0.97
    features, probabilities = classifier(real[1])
    assert features.shape == (len(real[1]), 64)
    assert probabilities.shape == (len(real[1]), 10)
    assert float((probabilities.argmax(1) == real[1].labels).double().mean()) == classifier.accuracy
    assert classifier.held_out == len(real[1])


def test_floats_and_bytes_of_an_image_have_the_same_features(
    real: tuple[Images, Images], classifier: FeatureClassifier
) -> None:
    floats = real[1].batch(slice(50))
    nudged = floats + 0.9 / 255  # less than half of a level of 2 / 255
    for images in (floats, nudged.clamp(max=1), real[1].pixels[:50]):
        assert torch.equal(classifier(images).features, classifier(real[1].pixels[:50]).features)
    pixels = real[1].pixels[:50]
    torch.testing.assert_close(classifier(pixels, batch_size=7).features, classifier(pixels).features)


def test_distances_are_small_between_real_ones_and_large_to_noise(
    real: tuple[Images, Images], classifier: FeatureClassifier
) -> None:
    noise = torch.rand(400, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    train = classifier(real[0]).features
    assert 10 * frechet_distance(classifier(real[1]).features, train) < frechet_distance(
        classifier(noise).features, train
    )


def test_it_is_a_function_of_its_seed_and_leaves_torch_s_generator_alone(real: tuple[Images, Images]) -> None:
    state = torch.get_rng_state()
    first = train_features(*real, images_seen=300, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    again, other = (train_features(*real, images_seen=300, seed=seed) for seed in (1, 2))
    for name, value in first.net.state_dict().items():
        assert torch.equal(value, again.net.state_dict()[name])
    assert not torch.equal(first.net.head.weight, other.net.head.weight)


def test_it_keeps_in_a_file_and_knows_its_data(
    real: tuple[Images, Images], classifier: FeatureClassifier, tmp_path: Path
) -> None:
    path = tmp_path / "features.safetensors"
    classifier.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    loaded = FeatureClassifier.load(path, real[0])
    assert loaded.metadata() == classifier.metadata()
    assert torch.equal(loaded(real[1]).features, classifier(real[1]).features)
    with pytest.raises(ValueError, match="was trained on other images"):
        FeatureClassifier.load(path, real[1])
    with pytest.raises(FileNotFoundError, match="no such file of features"):
        FeatureClassifier.load(tmp_path / "nowhere")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is no file of features"):
        FeatureClassifier.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is no file of features"):
        FeatureClassifier.load(path)


@pytest.mark.parametrize(("size", "channels"), [(4, 1), (7, 3), (16, 3), (28, 1), (64, 3)])
def test_other_sizes_have_64_features_too(size: int, channels: int) -> None:
    pixels = torch.randint(0, 256, (150, channels, size, size), dtype=torch.uint8)
    trained = train_features(Images(pixels, torch.arange(150) % 3), images_seen=200)
    assert trained(pixels[:5]).features.shape == (5, 64)
    assert trained.held_out == 15


def test_without_labels_it_learns_rotations(real: tuple[Images, Images]) -> None:
    train, test = (Images(images.pixels) for images in real)
    with pytest.raises(ValueError, match=r"has no labels.*rotations"):
        train_features(train, test)
    trained = train_features(train, test, task="rotations", images_seen=15_000)
    assert trained.accuracy > 0.6  # of 4 ways
    assert trained.classes == ("0 degrees", "90 degrees", "180 degrees", "270 degrees")


def test_wrong_images_are_refused(classifier: FeatureClassifier) -> None:
    for images in (torch.zeros(2, 1, 4, 4), torch.zeros(0, 1, 8, 8), torch.zeros(8, 8)):
        with pytest.raises(ValueError, match="these features are of images"):
            classifier(images)
    with pytest.raises(ValueError, match="finite"):
        classifier(torch.full((1, 1, 8, 8), torch.nan))
    pixels = torch.zeros(200, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="only one class"):
        train_features(Images(pixels, torch.zeros(200, dtype=torch.int64)))
    with pytest.raises(ValueError, match="too few"):
        train_features(Images(pixels[:20], torch.arange(20)))
    with pytest.raises(ValueError, match="not square"):
        train_features(Images(torch.zeros(200, 1, 8, 4, dtype=torch.uint8), torch.arange(200)))


def test_random_split_are_disjoint() -> None:
    images = Images(torch.arange(200, dtype=torch.uint8)[:, None, None, None], torch.arange(200))
    first, second = random_split(images, 0.25, seed=3)
    assert (len(first), len(second)) == (150, 50)
    assert torch.equal(first.pixels[:, 0, 0, 0].long(), first.labels)
    assert sorted([*first.labels.tolist(), *second.labels.tolist()]) == list(range(200))
    with pytest.raises(ValueError, match="too few"):
        random_split(images, 0.001)


@pytest.mark.slow
def test_mnist_is_named_rightly() -> None:
    folder = os.environ.get("FASTEBM_TEST_DATA")
    if not folder or not (Path(folder) / "mnist.npz").is_file():
        pytest.skip("FASTEBM_TEST_DATA names no folder with mnist.npz")
    train, test = (open_images(Path(folder) / "mnist.npz", 32, 1, split, fit="pad") for split in ("train", "test"))
    trained = train_features(train, test)
    assert trained.accuracy >= 0.984
    assert np.isfinite(trained(test).features.numpy()).all()


def with_labels(real: tuple[Images, Images], change: Callable[[Tensor], Tensor]) -> list[Images]:
    return [dataclasses.replace(images, labels=change(images.labels)) for images in real if images.labels is not None]


@pytest.mark.parametrize(
    "change",
    [lambda x: x * 10_000, lambda x: 2**62 + x * 2**40, lambda x: 9 - x],
    ids=["ids to 90,000", "huge ids", "turned"],
)
def test_labels_may_be_any_numbers(
    real: tuple[Images, Images], change: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    plain = train_features(*real, images_seen=256)
    images, held_out = with_labels(real, change)
    trained = train_features(images, held_out, images_seen=256)
    numbers = sorted(change(torch.arange(10)).tolist())
    assert trained.classes == tuple(map(str, numbers))
    assert trained.unlabelled == 0
    if numbers[0] == 0 and numbers[1] != 1:  # the order of classes is the same, and so is the training
        assert torch.equal(trained(real[1]).probabilities, plain(real[1]).probabilities)
        assert trained.accuracy == plain.accuracy
    trained.save(tmp_path / "a.safetensors")
    assert FeatureClassifier.load(tmp_path / "a.safetensors", images).classes == trained.classes


def test_images_without_a_label_are_left_out(real: tuple[Images, Images]) -> None:
    def hide(labels: Tensor) -> Tensor:
        return labels.where(torch.arange(len(labels)) % 3 > 0, torch.full_like(labels, -1))

    images, held_out = with_labels(real, hide)
    trained = train_features(images, held_out, images_seen=256)
    left = [
        select(part, (part.labels != -1).nonzero().flatten()) for part in (images, held_out) if part.labels is not None
    ]
    expected = train_features(*left, images_seen=256)
    assert trained.unlabelled == len(images) + len(held_out) - sum(map(len, left))
    assert trained.metadata()["unlabelled"] == trained.unlabelled
    assert trained.classes == tuple(map(str, range(10)))
    assert (trained.held_out, trained.accuracy) == (expected.held_out, expected.accuracy)
    assert torch.equal(trained(real[1]).features, expected(real[1]).features)
    assert 0 < train_features(images, images_seen=256).held_out < len(images) / 10  # a tenth of those with labels


def test_a_class_that_training_lacks_is_a_mistake(real: tuple[Images, Images]) -> None:
    others = [dataclasses.replace(real[1], labels=torch.full((len(real[1]),), 77))]
    assert train_features(real[0], others[0], images_seen=256).accuracy == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((400,), -1), "has no labels"),
        (torch.arange(400) % 3 - 2, "the label -2 is below -1"),
        (torch.arange(400), "classes are too many for 360 images"),
        (torch.arange(400) // 5, "80 classes are too many for 360 images"),
        (torch.where(torch.arange(400) < 100, torch.arange(400) % 2, -1), "90 images with labels are too few"),
        (torch.where(torch.arange(400) < 100, -1, 7), "only one class"),
    ],
)
def test_labels_that_make_no_classifier_are_refused(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        train_features(Images(torch.zeros(400, 1, 8, 8, dtype=torch.uint8), labels), images_seen=256)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        {"size": 10**9},
        {"channels": 10**12},
        {"channels": -1},
        {"size": "8"},
        {"task": "songs"},
        {"accuracy": "high"},
        {"classes": 5},
        {"classes": ["a"]},
        {"unlabelled": "none"},
        {"digest": None},
        {"more": 1},
    ],
    ids=str,
)
def test_files_with_wrong_fields_are_refused(
    classifier: FeatureClassifier, tmp_path: Path, change: dict[str, object]
) -> None:
    path = tmp_path / "a.safetensors"
    tensors = dict(classifier.net.state_dict())
    for broken, metadata in ((tensors, change), (tensors | {"head.bias": tensors["head.bias"] * torch.nan}, {})):
        save_file(broken, path, metadata={"fastebm features": json.dumps(classifier.metadata() | metadata)})
        with pytest.raises(ValueError, match="is no file of features"):
            FeatureClassifier.load(path)
    save_file(tensors, path, metadata={"fastebm features": "[" * 100_000})
    with pytest.raises(ValueError, match="is no file of features"):
        FeatureClassifier.load(path)
