"""The command `fastebm detect`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastebm.cli.arguments import check_count, select_device
from fastebm.distributed import together

if TYPE_CHECKING:
    from fastebm.tasks import DetectionResult

FILES = ("detect.json", "scores.npz", "histogram.png", "roc.png", "typical.png")


@dataclass(frozen=True)
class Detect:
    """Score images by the energy of a run, and measure how well the scores tell outliers from images like its own.

    Uniform noise, constant colours, means of two images, rotated and mirrored images are always among the outliers.
    """

    run: Path
    """folder of the run"""
    data: Path | None = None
    """file or folder of images like the training images, unseen in training; by default the run's own test split"""
    split: str | None = None
    """split of --data; by default test, or the only one"""
    ood_data: tuple[str, ...] = field(default=(), metadata={"metavar": "NAME=PATH"})
    """sets of outliers (out-of-distribution images), each as NAME=PATH or NAME:SPLIT=PATH; by default the synthetic
    sets alone"""
    train_data: Path | None = None
    """file or folder of the training images, on which typical scores are measured; by default the run's own"""
    fit: Literal["resize", "pad"] | None = None
    """fit of --ood-data to the run's size: resize the largest square, or pad with black; --data and --train-data are
    fitted as in training, and in this way only if the run does not know its own images; by default images of another
    size are refused"""
    convert_colours: bool = False
    """bring images to the run's number of colours; without it images with other colours are refused"""
    count: int = 10_000
    """largest number of images of a set, which are chosen at random"""
    seed: int = 0
    """seed of that choice and of the synthetic sets"""
    batch_size: int = field(default=256, metadata={"group": "compute"})
    """number of images in the net at a time"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype in which the energy runs"""
    engine: Literal["auto", "fused", "autograd"] = "auto"
    """engine that computes energies and gradients"""
    device: str | None = None
    """device that the energy runs on, cpu or cuda; by default a GPU if there is one"""
    out: Path | None = None
    """folder for numbers, scores and pictures; by default detect in the run's folder"""
    overwrite: bool = False
    """replace files of an earlier command in that folder"""

    def __call__(self) -> int:
        import torch

        from fastebm.data.run_source import run_source
        from fastebm.runs.folder import RunFolder
        from fastebm.tasks import detect_outliers
        from fastebm.tasks.arguments import check_seed, check_whole
        from fastebm.tasks.outputs import check_folder, task_folder
        from fastebm.tasks.run_images import held_out_images, matching_images, outlier_images, training_images
        from fastebm.training import CoarseToFineRun, ImageSource

        check_count(self.count)
        check_seed(self.seed)
        check_whole("--batch-size", self.batch_size)
        sets = parse_sets(self.ood_data)
        if self.split is not None and self.data is None:
            raise ValueError(f"--split {self.split} is of --data, which is not given")
        given = any(path is not None for path in (self.data, self.train_data)) or bool(sets)
        if self.convert_colours and not given:
            raise ValueError("--convert-colours is of --data, --ood-data and --train-data, and none of them is given")
        RunFolder.existing(self.run)
        out = self.run / "detect" if self.out is None else self.out
        check_folder(out, FILES, overwrite=self.overwrite)
        if self.fit is not None and not sets and (not given or isinstance(run_source(self.run), ImageSource)):
            raise ValueError(f"--fit {self.fit} is of --ood-data, which is not given; other images fit as in training")
        run = CoarseToFineRun.load(self.run, select_device(self.device))
        shape: dict[str, Any] = {"fit": self.fit, "recolour": self.convert_colours}
        if self.train_data is None:
            training = training_images(run)
        else:
            training = matching_images(run, self.train_data, prefer="train", **shape)
        images = held_out_images(run) if self.data is None else matching_images(run, self.data, self.split, **shape)
        against = {name: outlier_images(run, path, split, **shape) for name, (path, split) in sets.items()}
        with task_folder(out, FILES, overwrite=self.overwrite):
            detection = together(
                detect_outliers,
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
        for found in (training, images, *against.values()):  # not before the files: the reader may have gone
            print(found)
        print(table(detection))
        print(f"In {out}: {', '.join(FILES)}.")
        return 0


def parse_sets(arguments: Iterable[str]) -> dict[str, tuple[Path, str | None]]:
    """Paths and splits by name, from arguments NAME=PATH or NAME:SPLIT=PATH.

    Raises ValueError for another form, for a name given twice, and for the name of a set that is always there.
    """
    from fastebm.tasks.detection.run import IN_DISTRIBUTION, SYNTHETIC

    sets: dict[str, tuple[Path, str | None]] = {}
    for argument in arguments:
        match = re.fullmatch(r"([\w-]+)(?::(\w+))?=(.+)", argument)
        if match is None:
            raise ValueError(
                f"--ood-data takes NAME=PATH or NAME:SPLIT=PATH, the name of letters, digits, _ and -, got {argument!r}"
            )
        name, split, path = match.groups()
        if name in sets or name in (IN_DISTRIBUTION, *SYNTHETIC):
            raise ValueError(f"--ood-data {argument}: there is a set called {name} already")
        sets[name] = (Path(path), split)
    return sets


def write_detection(out: Path, detection: DetectionResult) -> None:
    """Writes the files of a detection, and the numbers last: where they are, all files are."""
    import numpy as np

    from fastebm.runs.files import replacing, write_json

    arrays: dict[str, Any] = {
        f"{name}/{score}": values for name, scores in detection.scores.items() for score, values in scores.items()
    }
    with replacing(out / "scores.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    detection.save_figures(out)
    write_json(out / "detect.json", detection.to_json())


def table(detection: DetectionResult) -> str:
    """AUROC as text: a row for each score and a column for each set."""
    scores = list(next(iter(detection.metrics.values())))
    width = max(map(len, scores))
    lines = ["  ".join([f"{'AUROC':{width}}", *(f"{name:>5}" for name in detection.metrics)])]
    for score in scores:
        cells = (f"{by_score[score].auroc:{max(5, len(name))}.3f}" for name, by_score in detection.metrics.items())
        lines.append("  ".join([f"{score:{width}}", *cells]))
    return "\n".join(lines)
