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
    "half floats": lambda i: torch.from_numpy(PIXELS[i]).double() / 255,
    "Hugging Face": lambda i: {"img": Image.fromarray(PIXELS[i]), "label": int(LABELS[i])},
    "Hugging Face, formatted": lambda i: {"image": torch.from_numpy(PIXELS[i]), "fine_label": torch.tensor(LABELS[i])},
    "captions": lambda i: (PIXELS[i], "a cat"),
    "one-hot": lambda i: (PIXELS[i], np.eye(10)[LABELS[i]]),
}


@pytest.mark.parametrize("form", FORMS)
def test_items_of_every_form(form: str) -> None:
    images = open_images(Mapped(FORMS[form]))
    assert np.array_equal(images.pixels.numpy().transpose(0, 2, 3, 1), PIXELS)
    labelled = isinstance(FORMS[form](0), tuple | list | dict) and form not in ("captions", "one-hot")
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
        (lambda i: PIXELS[i] / 127.5 - 1, "item 0: has values from -.* leave the normalization out"),
        (lambda i: np.full((4, 4), np.nan), "item 0: has values from nan to nan"),
        (lambda i: PIXELS[i, 0, 0], "item 0: an array of shape .* is no set of images"),
        (lambda i: {"picture": PIXELS[i]}, "item 0: has none of image, img, pixel_values, images; it has picture"),
        (lambda i: (PIXELS[i], 3) if i < 4 else PIXELS[i], "4 of 5 items have an integer as label"),
        (lambda i: (), r"item 0: is tuple; an image of PIL"),
        (lambda i: Image.new("I", (4, 4)), "item 0: has more than 8 bits"),
    ],
)
def test_items_that_are_no_images(item: Callable[[int], Any], saying: str) -> None:
    with pytest.raises(DataError, match=saying):
        open_images(Mapped(item))


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
