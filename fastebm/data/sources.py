"""Where the images of a run come from, as it is kept with the run, so that it can be taken up by its folder alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fastebm.data import Images, digits, open_images
from fastebm.runs.folder import RunError


@dataclass(frozen=True)
class ImageSource:
    """Arguments of `fastebm.data.open_images`, which see: a path, and how its images get their size."""

    path: Path
    size: int | None = None
    channels: int | None = None
    split: str | None = None
    fit: Literal["resize", "pad"] = "resize"
    crop: int | None = None
    key: str | None = None

    def open(self) -> Images:
        """The images. Raises DataError and ValueError as `open_images` does."""
        options = dataclasses.asdict(self)
        return open_images(options.pop("path"), **options)

    def to_json(self) -> dict[str, Any]:
        """With the whole path, so that a run can be taken up from another folder."""
        return dataclasses.asdict(self) | {"path": str(self.path.resolve())}


@dataclass(frozen=True)
class DigitsSource:
    """scikit-learn's handwritten digits, the train split: 8x8, gray, as floats."""

    def open(self) -> Tensor:
        return digits("train")[0]

    def to_json(self) -> dict[str, Any]:
        return {"set": "digits"}


def source_from_json(stored: Mapping[str, Any]) -> ImageSource | DigitsSource:
    """The source that was stored as JSON. Raises RunError if its fields are not ours."""
    if stored == DigitsSource().to_json():
        return DigitsSource()
    try:
        return ImageSource(**{**stored, "path": Path(stored["path"])})
    except (TypeError, KeyError) as error:
        raise RunError(f"not a source of images: {error!r}") from error
