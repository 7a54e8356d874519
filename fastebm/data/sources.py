"""Descriptions of where a run's images come from, stored with the run so that it can be resumed from its folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fastebm.data import Images, digits, open_images
from fastebm.runs.fields import check_fields
from fastebm.runs.folder import RunError


@dataclass(frozen=True)
class ImageSource:
    """A file, folder or data set on disk and how its images are preprocessed: arguments of `fastebm.data.open_images`.

    Example:
        >>> from pathlib import Path
        >>> from fastebm.data.sources import ImageSource
        >>> ImageSource(Path("photos"), size=64, channels=3).fit
        'resize'
    """

    path: Path
    size: int | None = None
    channels: int | None = None
    split: str | None = None
    fit: Literal["resize", "pad"] = "resize"
    crop: int | None = None
    key: str | None = None

    def open(self) -> Images:
        """Reads the images. Raises DataError and ValueError as `open_images` does."""
        options = dataclasses.asdict(self)
        return open_images(options.pop("path"), **options)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON, with the path made absolute so that they hold in any working folder."""
        return dataclasses.asdict(self) | {"path": os.path.realpath(self.path)}


@dataclass(frozen=True)
class DigitsSource:
    """The train split of scikit-learn's handwritten digits (`fastebm.data.digits`)."""

    def open(self) -> Tensor:
        """float32 (N, 1, 8, 8) in [-1, 1]."""
        return digits("train")[0]

    def to_json(self) -> dict[str, Any]:
        return {"set": "digits"}


def source_from_json(stored: Mapping[str, Any]) -> ImageSource | DigitsSource:
    """The source that `to_json` stored. Raises RunError for other fields."""
    if stored == DigitsSource().to_json():
        return DigitsSource()
    try:
        source = ImageSource(**stored)
        check_fields(source)
    except (TypeError, ValueError) as error:
        raise RunError(f"the stored fields are not a source of images: {error}") from error
    return source
