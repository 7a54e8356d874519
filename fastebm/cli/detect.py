"""`fastebm detect`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from fastebm.cli.arguments import check_count, parsed_device
from fastebm.data import Images
from fastebm.runs.files import replacing, write_json
from fastebm.runs.folder import RunFolder
from fastebm.tasks.detection.run import IN_DISTRIBUTION, SYNTHETIC, DetectionResult, detect_outliers
from fastebm.tasks.run_images import held_out_images, matching_images, outlier_images, training_images
from fastebm.training import CoarseToFineRun

FILES = ("detect.json", "scores.npz", "histogram.png", "roc.png", "typical.png")


@dataclass(frozen=True)
class Detect:
    """Score images by the energy of a run, and measure how well that tells outliers from images of its own kind."""

    run: tyro.conf.Positional[Path]
    """folder of the run"""
    data: Path | None = None
    """images of the kind that the run learned, unseen in training; by default the test split of its own set"""
    against: tuple[str, ...] = ()
    """sets of outliers, each as NAME=PATH or NAME:SPLIT=PATH; the split is test by default, or what there is; uniform
    noise, constant colours, means of two images, and images turned and mirrored are always measured as well"""
    train: Path | None = None
    """images that the run learned from, where it doesn't know its set or that has moved; what is typical is measured
    on them"""
    split: str | None = None
    """part of --data; by default test, or what there is"""
    fit: Literal["resize", "pad"] | None = None
    """brings images of --against to the run's size, which is otherwise asked of them; those of --data and --train get
    theirs as in training, or in this way where the run doesn't know its set"""
    recolour: bool = False
    """brings images to the run's colours, which are otherwise asked of them"""
    count: int = 10_000
    """how many images of a set at most, chosen at random"""
    batch_size: int = 256
    """images in the net at a time"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """in which the energy runs"""
    engine: Literal["auto", "fused", "autograd"] = "auto"
    """of energies and gradients"""
    seed: int = 0
    """of that choice and of the synthetic sets"""
    out: Path | None = None
    """folder for numbers, scores and pictures; by default detect in the run's folder"""
    overwrite: bool = False
    """replaces what an earlier call wrote there"""
    device: str | None = None
    """cpu or cuda; by default a GPU if there is one"""

    def __call__(self) -> int:
        check_count(self.count)
        outliers = parsed_sets(self.against)
        RunFolder.existing(self.run)
        out = self.run / "detect" if self.out is None else self.out
        _refuse_taken(out, self.overwrite)
        device = parsed_device(self.device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        run = CoarseToFineRun.load(self.run, device)
        training, images = self._own(run)
        against = {
            name: outlier_images(run, path, split, fit=self.fit, recolour=self.recolour)
            for name, (path, split) in outliers.items()
        }
        for given in (training, images, *against.values()):
            print(given, flush=True)
        detection = detect_outliers(
            run,
            training,
            images,
            against,
            count=self.count,
            seed=self.seed,
            batch_size=self.batch_size,
            dtype=getattr(torch, self.dtype),
            engine=self.engine,
            progress=True,
        )
        write_detection(out, detection)
        print(table(detection))
        print(f"{out}: {', '.join(FILES)}")
        return 0

    def _own(self, run: CoarseToFineRun) -> tuple[Images, Images]:
        """Images of training, and unseen ones of their kind."""
        training = (
            training_images(run)
            if self.train is None
            else matching_images(run, self.train, prefer="train", fit=self.fit, recolour=self.recolour)
        )
        if self.data is None:
            return training, held_out_images(run)
        return training, matching_images(run, self.data, self.split, fit=self.fit, recolour=self.recolour)


def parsed_sets(arguments: Iterable[str]) -> dict[str, tuple[Path, str | None]]:
    """Paths and splits by name, of arguments NAME=PATH or NAME:SPLIT=PATH.

    Raises ValueError for what is none, for two of one name, and for the name of a set that is always there.
    """
    sets: dict[str, tuple[Path, str | None]] = {}
    for argument in arguments:
        match = re.fullmatch(r"([\w-]+)(?::(\w+))?=(.+)", argument)
        if match is None:
            raise ValueError(
                f"--against takes NAME=PATH or NAME:SPLIT=PATH, the name of letters, digits, _ and -, got {argument!r}"
            )
        name, split, path = match.groups()
        if name in sets or name in (IN_DISTRIBUTION, *SYNTHETIC):
            raise ValueError(f"--against {argument}: there is a set called {name} already")
        sets[name] = (Path(path), split)
    return sets


def write_detection(out: Path, detection: DetectionResult) -> None:
    """The files of a detection; the numbers last, so that they are there when all is."""
    out.mkdir(parents=True, exist_ok=True)
    arrays = {f"{name}/{score}": values for name, by in detection.scores.items() for score, values in by.items()}
    with replacing(out / "scores.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    detection.save_figures(out)
    write_json(out / "detect.json", detection.to_json())


def table(detection: DetectionResult) -> str:
    """AUROC, to print: a row for each score and a column for each set."""
    scores = list(next(iter(detection.metrics.values())))
    width = max(map(len, scores))
    lines = ["  ".join([f"{'AUROC':{width}}", *(f"{name:>5}" for name in detection.metrics)])]
    for score in scores:
        cells = (f"{by_score[score].auroc:{max(5, len(name))}.3f}" for name, by_score in detection.metrics.items())
        lines.append("  ".join([f"{score:{width}}", *cells]))
    return "\n".join(lines)


def _refuse_taken(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} of --out is a file; a folder is needed")
    taken = [name for name in FILES if (out / name).exists()]
    if taken and not overwrite:
        raise ValueError(f"{out} has {', '.join(taken)} already: --overwrite replaces them, or choose another --out")
