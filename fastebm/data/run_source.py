"""The images that a run was trained on, as its folder remembers them, and other images read in the same way."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from fastebm.data.sources import DigitsSource, ImageSource, source_from_json
from fastebm.runs.folder import RunFolder


def run_source(run_dir: Path) -> ImageSource | DigitsSource | None:
    """The source of the run's training images; None if it was trained on tensors."""
    stored = RunFolder.existing(run_dir).images()
    return None if stored is None else source_from_json(stored)


def source_like(own: ImageSource, path: Path) -> ImageSource:
    """Images at `path` with the size, split and preprocessing of `own`.

    The key of an array is kept only for the same file, because another file may name its arrays differently.
    """
    same = os.path.realpath(path) == os.path.realpath(own.path)
    return dataclasses.replace(own, path=path, key=own.key if same else None)
