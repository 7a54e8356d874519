"""`fastebm evaluate`."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from fastebm.cli.arguments import check_count, parsed_device
from fastebm.data import ImageFormat
from fastebm.data.run_source import run_source
from fastebm.evaluation import (
    CalibrationMetrics,
    EnergyMetrics,
    FeatureClassifier,
    FeatureStatistics,
    Inception,
    NearestDistances,
    RealImages,
    calibration_metrics,
    energy_metrics,
    evaluate_samples,
    frechet_distance,
    inception_metrics,
    train_features,
)
from fastebm.evaluation.energy_metrics import last_level_settings
from fastebm.evaluation.metrics.comparison import noise_like
from fastebm.evaluation.metrics.features import FEATURES_FILE, NOT_COMPARABLE
from fastebm.evaluation.metrics.inception import require_torchmetrics
from fastebm.evaluation.report import LongRunFeatures, Report
from fastebm.evaluation.sources import holds_statistics, open_real, read_samples, real_image_source
from fastebm.runs.files import write_json
from fastebm.runs.folder import RunFolder
from fastebm.sampling.cascade import device_of
from fastebm.training import CoarseToFineRun, DataTerm, DigitsSource, ImageSource, Run, RunError, load

RESULT = "evaluation.json"
COUNT = 10_000
HEALTH_COUNT = 200


@dataclass(frozen=True)
class Evaluate:
    """Judge samples of a run, or any generated images, against real ones.

    Distances in Inception's features need a weights file of your own (--inception); nothing is downloaded. Without it,
    --train-features trains a small classifier on the real images: distances in its features tell better samples from
    worse ones, but are not comparable to published FID. Both stand beside a floor, real images against real ones, and a
    ceiling, uniform noise. Of a run, the health of its energy is measured too: how its chains do, or, where it
    calibrates a generator, what chains still find to better in one-pass samples.
    """

    what: tyro.conf.Positional[Path]
    """folder of a run, a folder of pictures, or an .npz of samples"""
    against: Path | None = None
    """the real images, as in --data of train, or an .npz of statistics (mu, sigma); of a run by default its own"""
    split: str | None = None
    """part of the real images to compare with; by default "train", with "test" for the floor"""
    fit: Literal["resize", "pad"] | None = None
    """how real images get the size of the samples; by default as the run has it, or resize"""
    crop: int | None = None
    """side of a square that is cut out of the middle before; by default as the run has it"""
    convert: bool = False
    """bring real images of another size or colours to those of the samples; for a run as its training images were"""
    count: int = COUNT
    """samples to draw or take; published FID mostly has 50000"""
    seed: int | None = None
    """of the samples of a run; by default those that `fastebm sample` draws"""
    all_real: bool = False
    """in the classifier's features, compare with all real images too, not with as many as samples; in Inception's it is
    always so"""
    inception: Path | None = None
    """Inception weights: inception-2015-12-05.pt (TorchScript), or with torch-fidelity installed a state dict"""
    features: Path | None = None
    """file of the small classifier; by default features.safetensors beside the result, if it is there"""
    train_features: bool = False
    """train the small classifier on the real images and their labels, unless its file is there"""
    rotations: bool = False
    """train it to tell rotated images instead, which needs no labels"""
    save_statistics: Path | None = None
    """.npz to write the statistics (mu, sigma) of all real images to, in Inception's features, or the classifier's"""
    health: bool = True
    """of a run, also measure the health of its energy"""
    out: Path | None = None
    """the result as JSON; by default evaluation.json in the run's folder, otherwise in the current one"""
    overwrite: bool = False
    """replace files that are there"""
    device: str | None = None
    """cpu or cuda; by default a GPU if there is one"""

    def __call__(self) -> int:
        check_count(self.count)
        is_run = RunFolder.is_run(self.what)
        out = self.out or (self.what / RESULT if is_run else Path(RESULT))
        self._check_free(out, self.save_statistics)
        device = parsed_device(self.device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        inception = None if self.inception is None else Inception.load(self.inception, device)
        statistics = self._statistics()
        if inception is not None and statistics is None:
            require_torchmetrics()  # an error before samples are drawn, not after it
        run = load(self.what, device) if is_run else None
        given = read_samples(self.what)[: self.count] if run is None else None
        size, channels = _form(given, run)
        real = None if statistics is not None else open_real(self._source(size, channels, run), size)
        classifier = self._classifier(self.features or out.parent / FEATURES_FILE, real, device)
        describe = inception or classifier
        if statistics is not None and describe is not None:
            try:
                statistics.check_label(describe.label)  # before the work, not after it
            except ValueError as error:
                raise ValueError(f"{self.against}: {error}") from error
        if given is None:
            assert run is not None
            given = self._drawn(run)
        report = self._report(given.cpu(), run, real, statistics, classifier, inception)
        write_json(out, report.to_json())
        if self.save_statistics is not None and real is not None:
            assert describe is not None
            FeatureStatistics.of(describe(real.train).features, describe.label).save(self.save_statistics)
            print(
                f"{self.save_statistics}: mu and sigma of {len(real.train):,} real images, in the features of "
                f"{describe.label}\n"
            )
        print(f"{report.explain()}\n\n{out} has these numbers.")
        return 0

    def _check_free(self, *paths: Path | None) -> None:
        for path in paths:
            if path is None:
                continue
            if not path.parent.is_dir():
                raise ValueError(f"the folder {path.parent} does not exist")
            if path.exists() and not self.overwrite:
                raise ValueError(f"{path} is there already: give --overwrite to replace it, or another name")

    def _statistics(self) -> FeatureStatistics | None:
        if self.against is None or not self.against.is_file() or not holds_statistics(self.against):
            return None
        if self.inception is None and self.features is None:
            raise ValueError(f"{self.against} holds statistics: give the --inception or --features that made them")
        if self.train_features or self.save_statistics:
            raise ValueError(f"{self.against} holds statistics and no images, as --train-features and such need them")
        return FeatureStatistics.load(self.against)

    def _source(self, size: int, channels: int, run: Run | None) -> ImageSource | DigitsSource:
        """Where the real images come from: --against, or a run's own; neither is brought to another form unasked."""
        stored = None if run is None else run_source(run.path)
        own = stored if isinstance(stored, ImageSource) else None
        if self.against is not None:
            return real_image_source(
                self.against,
                ImageFormat(channels, size, size),
                own=own,
                full=None if run is None else run.config.sizes[-1],
                split=self.split,
                fit=self.fit,
                crop=self.crop,
                convert=self.convert,
            )
        if stored is None:
            raise ValueError(f"{self.what} does not say which real images it belongs to: give --against")
        if own is None:
            return stored
        given = {"split": self.split, "fit": self.fit, "crop": self.crop}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(own, **changes)

    def _classifier(self, path: Path, real: RealImages | None, device: torch.device) -> FeatureClassifier | None:
        if self.rotations and not self.train_features:
            raise ValueError("--rotations says what --train-features trains: give both")
        task: Literal["classes", "rotations"] = "rotations" if self.rotations else "classes"
        train = real.train if real is not None else None
        if path.is_file() and not (self.train_features and self.overwrite):
            classifier = FeatureClassifier.load(path, train, device)
            if self.train_features and classifier.task != task:
                raise ValueError(f"{path} has features by {classifier.task}: give another name with --features")
            print(f"{path}: features are there, trained on {classifier.data}", file=sys.stderr)
            return classifier
        if not self.train_features:
            if self.features is not None:
                raise ValueError(f"{path} is not there: give --train-features to train it")
            if self.save_statistics is not None and self.inception is None:
                raise ValueError("--save-statistics needs features: give --inception or --train-features")
            return None
        assert real is not None
        if not path.parent.is_dir():
            raise ValueError(f"the folder {path.parent} of --features does not exist")
        labelled = self.rotations or (real.test is not None and real.test.labels is not None)
        held_out = real.test if labelled else None
        classifier = train_features(real.train, held_out, task=task, device=device, progress=True)
        classifier.save(path)
        print(f"{path}: features trained, {classifier.accuracy:.2%} right on held-out images", file=sys.stderr)
        return classifier

    def _drawn(self, run: Run) -> Tensor:
        try:
            return run.sample(self.count, self.seed, progress=True)
        except FloatingPointError as error:
            raise RunError(f"{run.path}: its samples can't be drawn: {error}") from error

    def _report(
        self,
        samples: Tensor,
        run: Run | None,
        real: RealImages | None,
        statistics: FeatureStatistics | None,
        classifier: FeatureClassifier | None,
        inception: Inception | None,
    ) -> Report:
        words = f"{len(samples):,} of {self.what}" + ("" if run is None else f", iteration {run.iteration:,}")
        if real is None:
            assert statistics is not None
            found = self._distance(samples, statistics, classifier, inception)
            return Report(words, f"statistics in {self.against}", statistics=found)
        if samples.shape[1] != real.train.channels:
            raise ValueError(f"samples have {samples.shape[1]} channels and real images {real.train.channels}")
        if classifier is None and inception is None:
            print("No features: --inception FILE or --train-features give distances and classes.", file=sys.stderr)
        verdict = None if classifier is None else evaluate_samples(samples, real, classifier, all_real=self.all_real)
        health, survival = (None, None) if run is None or not self.health else _health(run, samples, real, classifier)
        return Report(
            words,
            repr(real.train),
            NearestDistances.of(samples, real) if verdict is None else verdict.nearest,
            None if classifier is None else classifier.metadata(),
            verdict,
            None if inception is None else inception_metrics(samples, real, inception),
            energy_metrics=health,
            long_run=survival,
        )

    def _distance(
        self,
        samples: Tensor,
        statistics: FeatureStatistics,
        classifier: FeatureClassifier | None,
        inception: Inception | None,
    ) -> dict[str, Any]:
        """The Fréchet distance from stored statistics, beside that of noise, and in which features it is."""
        describe = inception or classifier
        assert describe is not None
        return {
            "kind": "FID" if inception else f"Fréchet distance ({NOT_COMPARABLE})",
            "path": str(self.against),
            "count": len(samples),
            "features": str(self.inception if inception else self.features),
            "labelled": statistics.label is not None,
            "frechet": frechet_distance(describe(samples).features, statistics),
            "noise": frechet_distance(describe(noise_like(samples)).features, statistics),
        }


def _form(given: Tensor | None, run: Run | None) -> tuple[int, int]:
    """Size and channels of the samples, whether they are there or are going to be drawn."""
    if given is not None:
        return given.shape[-1], given.shape[1]
    assert run is not None
    return run.size, run.config.channels


def _health(
    run: Run, samples: Tensor, real: RealImages, classifier: FeatureClassifier | None
) -> tuple[EnergyMetrics | CalibrationMetrics | None, LongRunFeatures | None]:
    """The health of a run's energy, and what becomes of samples in features when chains go on; None without an energy.

    That is of the highest energy of a cascade, with chains that go on for long; and of the energy that calibrates a
    generator, with chains as in training.
    """
    energy = run.levels[run.size] if isinstance(run, CoarseToFineRun) else getattr(run, "energy", None)
    if energy is None:
        print(f"No health: {run.path} has no energy, only what it generates by.", file=sys.stderr)
        return None, None
    start = samples[:HEALTH_COUNT].to(device_of(energy))
    reference = real.subset(len(start)).batch(slice(None), start.device)
    health: EnergyMetrics | CalibrationMetrics
    if isinstance(run, CoarseToFineRun):
        dtype, seed = getattr(torch, run.config.dtype), run.config.seed
        health = energy_metrics(energy, start, reference, dtype=dtype, seed=seed, **last_level_settings(run.cascade()))
        ends = health.long_run.images
    else:
        config: Any = run.config
        health = calibration_metrics(
            energy,
            start,
            reference,
            step_size=config.step_size,
            noise_std=config.noise_std,
            num_steps=config.num_steps,
            data_term=DataTerm(config.data_term_weight, config.data_term_hinge),
            seed=config.seed,
        )
        ends = health.ends
    return health, None if classifier is None else LongRunFeatures.of(start, ends, real, classifier)
