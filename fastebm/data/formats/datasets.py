"""Anybody's data set: whatever has a length and gives an item by its number, as PyTorch's and Hugging Face's do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastebm.data.errors import DataError, explaining
from fastebm.data.formats.layout import channels_first
from fastebm.data.formats.pictures import pixels_of
from fastebm.data.images import Images, pick_split
from fastebm.data.preprocessing import Preprocessing

_IMAGES = ("image", "img", "pixel_values", "images")
_LABELS = ("label", "labels", "fine_label")


@runtime_checkable
class MapDataset(Protocol):
    """A data set in the style of PyTorch's maps: items by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def read_dataset(dataset: MapDataset | Mapping[str, MapDataset], shaping: Preprocessing, split: str | None) -> Images:
    """Every item of a data set, once and in order: its random transforms are frozen as they fall.

    An item is an image, or a tuple or list that begins with one (and goes on with its label), or a mapping that has
    one as "image", "img" or "pixel_values" (and its label as "label" or "labels"). An image is a PIL image, or an array
    or tensor (H, W), (H, W, C) or (C, H, W) of uint8 or of floats in [0, 1]. A mapping of data sets has splits.
    """
    name = type(dataset).__name__
    if isinstance(dataset, Mapping):
        split = pick_split(name, split, tuple(map(str, dataset)))
        if split not in dataset:
            raise DataError(f"{name}: is an empty mapping, not one of splits to data sets")
        dataset = dataset[split]
    else:
        split = pick_split(name, split, ())
    with explaining(name, "has no length"):
        count = len(dataset)
    if count < 1:
        raise DataError(f"{name}: is empty")
    labels: list[int] = []
    pixels = shaping.collect(name, count, _shaped(name, dataset, count, shaping, labels))
    classes = _class_names(dataset) if labels else ()
    if labels and len(labels) != count:
        raise DataError(f"{name}: {len(labels)} of {count} items have a whole number as label")
    return Images(pixels, torch.tensor(labels) if labels else None, name, "data set", split, classes)


def _shaped(
    name: str, dataset: MapDataset, count: int, shaping: Preprocessing, labels: list[int]
) -> Iterator[NDArray[np.uint8]]:
    for index in range(count):
        item_name = f"{name}, item {index}"
        with explaining(item_name, "can't be had"):
            item = dataset[index]
        image, label = _parts(item_name, item)
        if label is not None:
            labels.append(label)
        yield shaping.apply(item_name, _pixels(item_name, image, shaping.channels))


def _parts(name: str, item: Any) -> tuple[Any, int | None]:
    if isinstance(item, Mapping):
        image = next((item[key] for key in _IMAGES if key in item), None)
        if image is None:
            raise DataError(f"{name}: has none of {', '.join(_IMAGES)}; it has {', '.join(map(str, item))[:200]}")
        return image, next((_label(item[key]) for key in _LABELS if key in item), None)
    if isinstance(item, Sequence) and not isinstance(item, str | bytes) and item:
        return item[0], _label(item[1]) if len(item) > 1 else None
    return item, None


def _label(value: Any) -> int | None:
    """A whole number as int; anything else is no label."""
    if isinstance(value, Tensor | np.ndarray):
        value = value.item() if value.ndim == 0 else None
    return int(value) if isinstance(value, int | np.integer) and abs(int(value)) < 2**63 else None


def _pixels(name: str, image: Any, channels: int | None) -> NDArray[np.uint8]:
    """uint8 (1, C, H, W) of an image."""
    if isinstance(image, Image.Image):
        return pixels_of(name, image, channels)
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise DataError(f"{name}: is {type(image).__name__}; an image of PIL, an array or a tensor is needed")
    if image.ndim == 2:
        image = image[:, :, None]
    return channels_first(name, _bytes(name, image)[None])


def _bytes(name: str, image: NDArray[Any]) -> NDArray[np.uint8]:
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind != "f":
        raise DataError(f"{name}: is {image.dtype}; images must be uint8, or floats in [0, 1]")
    if image.size and not (image.min() >= 0 and image.max() <= 1):
        raise DataError(
            f"{name}: has values from {image.min():g} to {image.max():g}; floats must lie in [0, 1]: leave the "
            "normalization out"
        )
    return np.rint(image * 255).astype(np.uint8)


def _class_names(dataset: Any) -> tuple[str, ...]:
    """Names of the classes where torchvision (`classes`) or Hugging Face (`features[...].names`) keep them."""
    names = getattr(dataset, "classes", None)
    features = getattr(dataset, "features", None)
    if names is None and isinstance(features, Mapping):
        names = next((getattr(features[key], "names", None) for key in _LABELS if key in features), None)
    if isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return ()
