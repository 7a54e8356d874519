"""Map-style data sets of PyTorch and Hugging Face: every kind of item, splits, class names, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

from fastebm.data import DataError, open_images
from tests.data.image_files import labels_of, noise

PIXELS = noise(0, 5, 6, 6, 3)
LABELS = labels_of(0, 5, 10)


class Mapped(Dataset):
    """In the style of PyTorch: any form of item."""

    def __init__(self, item: Callable[[int], Any], count: int = 5) -> None:
        self.item, self.count = item, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.item(index)


FORMS: dict[str, Callable[[int], Any]] = {
    "PIL": lambda i: Image.fromarray(PIXELS[i]),
    "PIL and label": lambda i: (Image.fromarray(PIXELS[i]), int(LABELS[i])),
    "array": lambda i: PIXELS[i],
    "array (C, H, W)": lambda i: [PIXELS[i].transpose(2, 0, 1), LABELS[i]],
    "tensor": lambda i: (torch.from_numpy(PIXELS[i]).permute(2, 0, 1), torch.tensor(LABELS[i])),
    "ToTensor": lambda i: (torch.from_numpy(PIXELS[i]).permute(2, 0, 1) / 255, LABELS[i], "more"),
    "double floats": lambda i: torch.from_numpy(PIXELS[i]).double() / 255,
    "half floats": lambda i: (PIXELS[i] / 255).astype(np.float16),
    "half floats of torch": lambda i: (torch.from_numpy(PIXELS[i]) / 255).half(),
    "Hugging Face": lambda i: {"img": Image.fromarray(PIXELS[i]), "label": int(LABELS[i])},
    "Hugging Face, formatted": lambda i: {"image": torch.from_numpy(PIXELS[i]), "fine_label": torch.tensor(LABELS[i])},
    "float label": lambda i: (PIXELS[i], float(LABELS[i])),
    "float tensor as label": lambda i: (PIXELS[i], torch.tensor(float(LABELS[i]), dtype=torch.bfloat16)),
    "half float as label": lambda i: (PIXELS[i], np.float16(LABELS[i])),
    "tensor of one element as label": lambda i: (PIXELS[i], torch.tensor([[LABELS[i]]])),
    "list of one element as label": lambda i: (PIXELS[i], [int(LABELS[i])]),
    "unsigned label": lambda i: (PIXELS[i], np.uint64(LABELS[i])),
    "label None": lambda i: (PIXELS[i], None),
}


@pytest.mark.parametrize("form", FORMS)
def test_items_of_every_form(form: str) -> None:
    images = open_images(Mapped(FORMS[form]))
    assert np.array_equal(images.pixels.numpy().transpose(0, 2, 3, 1), PIXELS)
    labelled = isinstance(FORMS[form](0), tuple | list | dict) and form != "label None"
    assert (images.labels is not None) == labelled
    if labelled:
        assert images.labels.tolist() == LABELS.tolist()
    assert (images.name, images.format, images.split) == ("Mapped", "data set", "")


def test_what_pytorch_offers() -> None:
    tensors = TensorDataset(torch.from_numpy(PIXELS).permute(0, 3, 1, 2), torch.from_numpy(LABELS))
    assert open_images(Subset(tensors, [3, 1])).labels.tolist() == LABELS[[3, 1]].tolist()
    assert len(open_images([Image.fromarray(image) for image in PIXELS])) == 5
    assert torch.equal(open_images(tensors.tensors[0]).pixels, tensors.tensors[0])
    grey = open_images(torch.rand(4, 8, 8))
    assert grey.pixels.shape == (4, 1, 8, 8)


def test_splits_and_classes_of_hugging_face() -> None:
    class ClassLabel:
        names = ("cat", "dog")

    class HuggingFace(Mapped):
        features = {"label": ClassLabel}  # noqa: RUF012

    sets = {
        "train": HuggingFace(lambda i: {"image": PIXELS[i], "label": i % 2}),
        "test": HuggingFace(lambda i: {"image": PIXELS[i], "label": 0}, 2),
    }
    assert len(open_images(sets)) == 5
    images = open_images(sets, split="test")
    assert (len(images), images.classes, images.split) == (2, ("cat", "dog"), "test")
    with pytest.raises(DataError, match="dict: has no split 'night'; it has train, test"):
        open_images(sets, split="night")
    with pytest.raises(DataError, match="dict: is an empty mapping"):
        open_images({})


def test_classes_of_torchvision() -> None:
    dataset = Mapped(lambda i: (PIXELS[i], 0))
    dataset.classes = ["cat", "dog"]
    assert open_images(dataset).classes == ("cat", "dog")


def test_items_of_several_sizes() -> None:
    sizes = Mapped(lambda i: Image.fromarray(noise(i, 8 + i, 9, 3)))
    with pytest.raises(DataError, match="Mapped: image 1 is 3x9x9 and the first one 3x8x9: give a size"):
        open_images(sizes)
    assert open_images(sizes, size=4, channels=1).pixels.shape == (5, 1, 4, 4)


@pytest.mark.parametrize(
    ("item", "saying"),
    [
        (lambda i: 1 / (2 - i), "Mapped, item 0: is float; an image of PIL"),
        (lambda i: PIXELS[i] if i < 2 else 1 // 0, "Mapped, item 2: cannot be read: integer division"),
        (lambda i: PIXELS[i].astype(np.int64), "item 0: is int64; images must be uint8, or floats"),
        (lambda i: PIXELS[i] / 127.5 - 1, "item 0: has values from -.* leave the normalization out, or scale or clamp"),
        (lambda i: np.full((4, 4), 1.1251), r"has values from 1\.1251 to 1\.1251; .* at most 0\.125 outside"),
        (lambda i: np.full((4, 4), -0.1251), r"has values from -0\.1251 to -0\.1251; "),
        (lambda i: {"image": PIXELS[i] if i < 3 else None, "label": 0}, "Mapped, item 3: its image is None"),
        (lambda i: (None, 3), "Mapped, item 0: its image is None"),
        (lambda i: torch.zeros(3, 4, 4).to_sparse(), "Mapped, item 0: cannot be read: "),
        (lambda i: (PIXELS[i], -2), "Mapped: the label -2 is below -1"),
        (lambda i: np.full((4, 4), np.nan), "item 0: has values from nan to nan"),
        (lambda i: PIXELS[i, 0, 0], "item 0: an array of shape .* is no set of images"),
        (lambda i: {"picture": PIXELS[i]}, "item 0: has none of image, img, pixel_values, images; it has picture"),
        (lambda i: (PIXELS[i], 3) if i < 4 else PIXELS[i], "4 of 5 items have a label; all or none"),
        (lambda i: (), r"item 0: is tuple; an image of PIL"),
        (lambda i: Image.new("I", (4, 4)), "item 0: has more than 8 bits"),
    ],
)
def test_items_that_are_no_images(item: Callable[[int], Any], saying: str) -> None:
    with pytest.raises(DataError, match=saying):
        open_images(Mapped(item))


def test_bfloat16() -> None:
    """Its 8 bits of precision hold every 255th but not every value: each becomes the nearest pixel."""
    floats = (torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255).bfloat16()
    expected = (floats.double() * 255).round().to(torch.uint8)
    assert torch.equal(open_images(floats).pixels, expected)


def test_half_precision_is_not_rounded_twice() -> None:
    values = torch.arange(0, 15361, dtype=torch.int16).view(torch.float16)  # every half in [0, 1]
    found = open_images(values.reshape(1, 1, 1, -1)).pixels
    assert torch.equal(found.flatten(), (values.double() * 255).round().to(torch.uint8))


def test_overshoot_of_rounding_and_resampling_is_clamped() -> None:
    image = torch.zeros(1, 3, 8, 8)
    image[:, :, ::2] = 1
    resized = torch.nn.functional.interpolate(image, 12, mode="bicubic", antialias=True)
    assert resized.min() < -0.06
    assert resized.max() > 1.06
    assert torch.equal(open_images(resized).pixels, (resized.clamp(0, 1) * 255).round().to(torch.uint8))
    edge = torch.cat([torch.zeros(1, 1, 8, 4), torch.ones(1, 1, 8, 4)], 3)
    for size in (9, 11, 16, 23, 64):
        resized = torch.nn.functional.interpolate(edge, (8, size), mode="bicubic")
        assert resized.max() > 1
        open_images(resized)
    assert (open_images(torch.full((2, 3, 4, 4), 1.0000001)).pixels == 255).all()


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("cat", "is 'cat'"),
        ("3", "is '3'"),
        (b"3", "is b'3'"),
        (np.eye(10)[3], r"is ndarray of shape \(10,\)"),
        (torch.eye(3)[1], r"is Tensor of shape \(3,\)"),
        ([1, 2], r"is list of shape \(2,\)"),
        ([], r"is list of shape \(0,\)"),
        ({"boxes": 1}, "is {'boxes': 1}"),
        (2.5, r"2\.5 is not whole"),
        (torch.tensor(0.5), r"0\.5 is not whole"),
        (float("nan"), "nan is not whole"),
        (float("inf"), "inf is not whole"),
        (2.0**63, "does not fit in int64"),
        (np.uint64(2**63), "9223372036854775808 is not whole or does not fit"),
        (2**63, "9223372036854775808 is not whole or does not fit"),
        (2**70, "is 1180591620717411303424"),
        (3 + 0j, r"is \(3\+0j\)"),
        ([[1], [2, 3]], "its label cannot be read"),
    ],
)
@pytest.mark.parametrize("key", [None, "label", "fine_label"])
def test_labels_that_are_no_class_numbers(label: Any, shown: str, key: str | None) -> None:
    def item(index: int, value: Any) -> Any:
        return {"image": PIXELS[index], key: value} if key else (PIXELS[index], value)

    with pytest.raises(DataError, match=f"Mapped, item 3: .*{shown}"):
        open_images(Mapped(lambda i: item(i, label if i == 3 else 1)))


def test_labels_of_what_has_none() -> None:
    images = open_images(Mapped(lambda i: (PIXELS[i], None if i else 2)))
    assert images.labels.tolist() == [2, -1, -1, -1, -1]
    images = open_images(Mapped(lambda i: (PIXELS[i], -1 if i else 2)))
    assert images.labels.tolist() == [2, -1, -1, -1, -1]


def test_a_limit_of_pixels() -> None:
    items = Mapped(lambda i: Image.fromarray(PIXELS[i]))
    with pytest.raises(DataError, match="Mapped, item 0: 6x6 are more than max_pixels = 35 pixels"):
        open_images(items, max_pixels=35)
    assert len(open_images(items, max_pixels=36)) == 5


def test_what_is_no_data_set() -> None:
    with pytest.raises(DataError, match="int: is neither a path nor has it a length"):
        open_images(3)
    with pytest.raises(DataError, match="generator: is neither a path"):
        open_images(image for image in PIXELS)
    with pytest.raises(DataError, match="Mapped: is empty"):
        open_images(Mapped(FORMS["PIL"], 0))
    with pytest.raises(DataError, match="Mapped: has no split 'train'; it is one piece"):
        open_images(Mapped(FORMS["PIL"]), split="train")
    with pytest.raises(ValueError, match="key = 'x' chooses an array"):
        open_images(Mapped(FORMS["PIL"]), key="x")
