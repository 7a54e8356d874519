"""Map-style data sets (`__len__` and `__getitem__`) of PyTorch, Hugging Face and others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastebm.data.errors import DataError, raise_as_data_error
from fastebm.data.formats.axes import channels_first
from fastebm.data.formats.class_numbers import NEEDED, class_numbers
from fastebm.data.formats.pictures import picture_to_array
from fastebm.data.images import Images, resolve_split
from fastebm.data.preprocessing import Preprocessing

_IMAGES = ("image", "img", "pixel_values", "images")
_LABELS = ("label", "labels", "fine_label")

OVERSHOOT = 1 / 8
"""How far floats may be outside of [0, 1] to be clamped. Bicubic resampling overshoots an edge by up to 0.111."""


@runtime_checkable
class MapDataset(Protocol):
    """A map-style data set as in PyTorch: a length, and items by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def read_dataset(
    dataset: MapDataset | Mapping[str, MapDataset], preprocessing: Preprocessing, split: str | None
) -> Images:
    """Reads every item of a data set once, in order; random transforms of the data set are applied this one time.

    An item is an image, or a tuple or list that begins with an image (and continues with its label), or a mapping with
    an image under "image", "img" or "pixel_values" (and its label under "label" or "labels"). An image is a PIL image,
    or an array or tensor (H, W), (H, W, C) or (C, H, W) of uint8 or of floats in [0, 1]. Floats up to `OVERSHOOT`
    outside of that are clamped. A mapping of data sets has its keys as splits.

    A label is a whole number of any type, floats and arrays of one element too, or None for an image without a class.
    Anything else is a DataError, as it is where some items have a label and others do not. Without any label, or if all
    are None, the set has none.
    """
    name = type(dataset).__name__
    if isinstance(dataset, Mapping):
        split = resolve_split(name, split, tuple(map(str, dataset)))
        if split not in dataset:
            raise DataError(f"{name}: is an empty mapping; a mapping of splits to data sets is needed")
        dataset = dataset[split]
    else:
        split = resolve_split(name, split, ())
    with raise_as_data_error(name, "has no length"):
        count = len(dataset)
    if count < 1:
        raise DataError(f"{name}: is empty")
    labels: list[int | None] = []
    pixels = preprocessing.collect_processed(name, count, _process_items(name, dataset, count, preprocessing, labels))
    if labels and len(labels) != count:
        raise DataError(f"{name}: {len(labels)} of {count} items have a label; all or none are needed to have one")
    if all(label is None for label in labels):
        return Images(pixels, None, name, "data set", split)
    numbers = torch.tensor([-1 if label is None else label for label in labels], device="cpu")
    return Images(pixels, numbers, name, "data set", split, _class_names(dataset))


def _process_items(
    name: str, dataset: MapDataset, count: int, preprocessing: Preprocessing, labels: list[int | None]
) -> Iterator[NDArray[np.uint8]]:
    for index in range(count):
        item_name = f"{name}, item {index}"
        with raise_as_data_error(item_name, "cannot be read"):
            item = dataset[index]
        image, its_labels = _split_item(item_name, item)
        labels += [_as_label(item_name, label) for label in its_labels]
        yield preprocessing.apply(item_name, _pixels(item_name, image, preprocessing))


def _split_item(name: str, item: Any) -> tuple[Any, Sequence[Any]]:
    """The image of an item, and its label if it has one."""
    if isinstance(item, Mapping):
        key = next((key for key in _IMAGES if key in item), None)
        if key is None:
            raise DataError(f"{name}: has none of {', '.join(_IMAGES)}; it has {', '.join(map(str, item))[:200]}")
        return item[key], [item[key] for key in _LABELS if key in item][:1]
    if isinstance(item, Sequence) and not isinstance(item, str | bytes) and item:
        return item[0], [item[1]] if len(item) > 1 else ()
    return item, ()


def _as_label(name: str, value: Any) -> int | None:
    """A class number as int; None for None. Raises DataError, with `name`, for anything else."""
    if value is None:
        return None
    with raise_as_data_error(name, "its label cannot be read"):
        array = np.asarray(value.tolist() if isinstance(value, Tensor) else value)
    if array.size != 1 or array.dtype.kind not in "buif":
        what = f"{type(value).__name__} of shape {array.shape}" if array.ndim else repr(value)[:60]
        raise DataError(f"{name}: its label is {what}; {NEEDED}, or an item that is the image alone")
    return int(class_numbers(name, array.reshape(1))[0])


def _pixels(name: str, image: Any, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """uint8 (1, C, H, W) of an image."""
    if image is None:
        raise DataError(f"{name}: its image is None")
    if isinstance(image, Tensor):
        with raise_as_data_error(name, "cannot be read"):
            image = image.detach().cpu()
            image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    if isinstance(image, np.ndarray):
        return channels_first(name, _to_bytes(name, image[:, :, None] if image.ndim == 2 else image)[None])
    from PIL import Image

    if isinstance(image, Image.Image):
        return picture_to_array(name, image, preprocessing.channels, preprocessing.max_pixels)
    raise DataError(f"{name}: is {type(image).__name__}; an image of PIL, an array or a tensor is needed")


def _to_bytes(name: str, image: NDArray[Any]) -> NDArray[np.uint8]:
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind != "f":
        raise DataError(f"{name}: is {image.dtype}; images must be uint8, or floats in [0, 1]")
    lowest, highest = (image.min(), image.max()) if image.size else (0, 0)
    if not (lowest >= -OVERSHOOT and highest <= 1 + OVERSHOOT):
        raise DataError(
            f"{name}: has values from {lowest:.9g} to {highest:.9g}; floats must be in [0, 1], or at most "
            f"{OVERSHOOT:g} outside of it by resampling: leave the normalization out, or scale or clamp them"
        )
    # Half precision would round 255 times the value once more.
    return np.rint(image.astype(np.promote_types(image.dtype, np.float32)).clip(0, 1) * 255).astype(np.uint8)


def _class_names(dataset: Any) -> tuple[str, ...]:
    """The names of the classes, from torchvision's `classes` or Hugging Face's `features[...].names`."""
    names = getattr(dataset, "classes", None)
    features = getattr(dataset, "features", None)
    if names is None and isinstance(features, Mapping):
        names = next((getattr(features[key], "names", None) for key in _LABELS if key in features), None)
    if isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return ()
