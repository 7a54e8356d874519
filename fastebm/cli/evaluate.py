"""The command `fastebm evaluate`."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastebm.cli.arguments import check_count, select_device
from fastebm.data import ImageFormat
from fastebm.data.run_source import run_source
from fastebm.data.value_range import SIGNED
from fastebm.distributed import together
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
from fastebm.evaluation.metrics.comparison import check_counts, noise_like
from fastebm.evaluation.metrics.features import FEATURES_FILE, NOT_COMPARABLE, UNLABELLED
from fastebm.evaluation.metrics.inception import require_torchmetrics
from fastebm.evaluation.report import LongRunFeatures, Report
from fastebm.evaluation.sources import holds_statistics, open_real, read_samples, real_image_source
from fastebm.memory import check_memory
from fastebm.runs.files import check_writable, write_json
from fastebm.runs.folder import RunFolder
from fastebm.runs.names import EVALUATION
from fastebm.sampling.cascade import device_of
from fastebm.training import CoarseToFineRun, DataTerm, DigitsSource, ImageSource, Run, RunError, load

COUNT = 10_000
METRICS_COUNT = 200


@dataclass(frozen=True)
class Evaluate:
    """Compare samples of a run, or any generated images, with real images.

    Distances in Inception's features (FID) need a file of its weights, --inception; nothing is downloaded. Without one,
    --train-features trains a small classifier on the real images. Distances in its features tell better samples from
    worse ones, and are not comparable to published FID. Each table has two rows to compare with: real images against
    other real images (reference), and uniform noise. Of a run, metrics of its energy are measured too: what its
    chains do, or, where the energy calibrates a generator, what chains still change in its samples.
    """

    samples: Path
    """folder of a run, a folder of pictures, or an .npz or .npy file of samples"""
    range: tuple[float, float] | None = field(default=None, metadata={"group": "image"})
    """the values of black and of white in a file of samples, such as 0 1, -1 1 or 0 255; by default 0 255 for bytes,
    and -1 1 for floats with values below 0"""
    reference_data: Path | None = None
    """file or folder of the real images, as `fastebm train` takes it, or an .npz file of statistics (mu, sigma); by
    default the run's own images"""
    split: str | None = None
    """split of the real images to compare with; by default train, with test for the reference"""
    fit: Literal["resize", "pad"] | None = None
    """fit of real images to the size of the samples: resize the largest square, or pad with black; by default as in
    training, or resize"""
    crop: int | None = None
    """side in pixels of a square that is cut out of the middle of real images first; by default as in training"""
    convert: bool = False
    """bring real images of another size or with other colours to the format of the samples"""
    count: int = COUNT
    """number of samples to draw or read; published FID mostly takes 50000"""
    seed: int | None = None
    """seed of the samples of a run; by default the noise of `fastebm sample`"""
    all_real: bool = False
    """compare with all real images in the classifier's features too, not with as many as there are samples; Inception's
    features always do"""
    inception: Path | None = field(default=None, metadata={"group": "feature"})
    """file of Inception weights: inception-2015-12-05.pt (TorchScript), or a state dict if torch-fidelity is
    installed"""
    features: Path | None = field(default=None, metadata={"group": "feature"})
    """file of the small classifier, which a comparison with statistics needs; by default features.safetensors beside
    the result, if it is there"""
    train_features: bool = field(default=False, metadata={"group": "feature"})
    """train the small classifier on the real images and their labels, unless its file is there"""
    rotations: bool = field(default=False, metadata={"group": "feature"})
    """train it to tell rotated images, which needs no labels"""
    save_statistics: Path | None = field(default=None, metadata={"group": "feature"})
    """.npz file to write the statistics (mu, sigma) of all real images to, in the features of Inception or the
    classifier"""
    energy_metrics: bool = True
    """measure the metrics of a run's energy too"""
    out: Path | None = None
    """.json file for the result; by default evaluation.json in the run's folder, or in the current one without a run"""
    overwrite: bool = False
    """replace files of an earlier command"""
    device: str | None = None
    """device that nets run on, cpu or cuda; by default a GPU if there is one"""

    def __call__(self) -> int:
        run: Any
        check_count(self.count)
        is_run = RunFolder.is_run(self.samples)
        if is_run and self.range is not None:
            raise ValueError(f"--range is of samples in a file, and {self.samples} is a run")
        out = self.out or (self.samples / EVALUATION if is_run else Path(EVALUATION))
        features = self.features or out.parent / FEATURES_FILE
        self._check_outputs(out, features)
        device = select_device(self.device)
        inception = None if self.inception is None else Inception.load(self.inception, device)
        statistics = self._statistics()
        if inception is not None and statistics is None:
            require_torchmetrics()  # an error before samples are drawn, not after it
        run = load(self.samples, device) if is_run else None
        samples = read_samples(self.samples, self.range)[: self.count] if run is None else None
        size, channels = (run.size, run.config.channels) if samples is None else (samples.shape[3], samples.shape[1])
        if samples is None:  # drawn, and put together
            check_memory(f"{self.count:,} samples", 2 * 4 * self.count * channels * size**2)
        count = self.count if samples is None else len(samples)
        real = None if statistics is not None else open_real(self._source(size, channels, run), size)
        if real is not None and (inception is not None or self.train_features or features.is_file()):
            check_counts(count, real, all_real=self.all_real or inception is not None)  # before features are trained
        if statistics is not None and count < 2:
            raise ValueError(f"statistics are compared with at least 2 samples, got {count}")
        classifier = self._classifier(features, real, device)
        describe = inception or classifier
        if statistics is not None and describe is not None:
            try:
                statistics.check_label(describe.label)  # before the work, not after it
            except ValueError as error:
                raise ValueError(f"{self.reference_data}: {error}") from error
        if samples is None:
            samples = self._draw(run)
        report = self._report(samples.cpu(), run, real, statistics, classifier, inception)
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

    def _check_outputs(self, out: Path, features: Path) -> None:
        """Raises ValueError for files that can't be written, before the work, and where one would replace another."""
        outputs = [path for path in (out, self.save_statistics) if path is not None]
        for path in outputs:
            check_writable(path, overwrite=self.overwrite)
        if self.train_features and not features.is_file():
            outputs.append(check_writable(features))
        taken = [path for path in (self.samples, self.reference_data, self.inception) if path is not None]
        for number, path in enumerate(outputs):
            for other in (*taken, *outputs[:number]):
                if os.path.realpath(path) == os.path.realpath(other):
                    raise ValueError(f"{path} would be written over {other}: give another name")

    def _statistics(self) -> FeatureStatistics | None:
        path = self.reference_data
        if path is None or not path.is_file() or not holds_statistics(path):
            return None
        if self.inception is None and self.features is None:
            raise ValueError(f"{path} holds statistics: give the --inception or --features that made them")
        if self.train_features or self.save_statistics:
            raise ValueError(f"{path} holds statistics and no images, as --train-features and such need them")
        return FeatureStatistics.load(path)

    def _source(self, size: int, channels: int, run: Run | None) -> ImageSource | DigitsSource:
        """The source of the real images, --reference-data or the run's own, in another format only where asked for."""
        stored = None if run is None else run_source(run.path)
        own = stored if isinstance(stored, ImageSource) else None
        if self.reference_data is not None:
            return real_image_source(
                self.reference_data,
                ImageFormat(channels, size, size),
                own=own,
                full=None if run is None else run.config.sizes[-1],
                split=self.split,
                fit=self.fit,
                crop=self.crop,
                convert=self.convert,
            )
        if stored is None:
            raise ValueError(f"{self.samples} does not say which real images it belongs to: give --reference-data")
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
        if path.is_file():
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
        labels = None if real.test is None else real.test.labels
        labelled = self.rotations or (labels is not None and bool((labels != UNLABELLED).any()))
        held_out = real.test if labelled else None
        classifier = train_features(real.train, held_out, task=task, device=device, progress=True)
        classifier.save(path)
        without = f"; {classifier.unlabelled:,} images without a label left out" if classifier.unlabelled else ""
        print(f"{path}: features trained, {classifier.accuracy:.2%} right on held-out images{without}", file=sys.stderr)
        return classifier

    def _draw(self, run: Run) -> Tensor:
        try:
            return together(run.sample, self.count, self.seed, progress=True)
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
        words = f"{len(samples):,} of {self.samples}" + ("" if run is None else f", iteration {run.iteration:,}")
        if real is None:
            assert statistics is not None
            found = self._distance(samples, statistics, classifier, inception)
            return Report(words, f"statistics in {self.reference_data}", statistics=found)
        if samples.shape[1] != real.train.channels:
            raise ValueError(f"samples have {samples.shape[1]} channels and real images {real.train.channels}")
        if classifier is None and inception is None:
            print("No features: --inception FILE or --train-features give distances and classes.", file=sys.stderr)
        verdict = None
        if classifier is not None:
            verdict = evaluate_samples(samples, real, classifier, all_real=self.all_real, value_range=SIGNED)
        of_energy, survival = None, None
        if run is not None and self.energy_metrics:
            of_energy, survival = _energy_metrics(run, samples, real, classifier)
        return Report(
            words,
            repr(real.train),
            NearestDistances.of(samples, real, value_range=SIGNED) if verdict is None else verdict.nearest,
            None if classifier is None else classifier.metadata(),
            verdict,
            None if inception is None else inception_metrics(samples, real, inception, value_range=SIGNED),
            energy_metrics=of_energy,
            long_run=survival,
        )

    def _distance(
        self,
        samples: Tensor,
        statistics: FeatureStatistics,
        classifier: FeatureClassifier | None,
        inception: Inception | None,
    ) -> dict[str, Any]:
        """The Fréchet distances of samples and of noise from stored statistics, and the features they are in."""
        describe = inception or classifier
        assert describe is not None
        return {
            "kind": "FID" if inception else f"Fréchet distance ({NOT_COMPARABLE})",
            "path": str(self.reference_data),
            "count": len(samples),
            "features": str(self.inception if inception else self.features),
            "labelled": statistics.label is not None,
            "frechet": frechet_distance(describe(samples).features, statistics),
            "noise": frechet_distance(describe(noise_like(samples)).features, statistics),
        }


def _energy_metrics(
    run: Any, samples: Tensor, real: RealImages, classifier: FeatureClassifier | None
) -> tuple[EnergyMetrics | CalibrationMetrics | None, LongRunFeatures | None]:
    """Metrics of a run's energy, and of its samples in features after more chain steps; None where there is no energy.

    A cascade has long chains of its highest energy; an energy that calibrates a generator has chains as in training.
    """
    energy = run.levels[run.size] if isinstance(run, CoarseToFineRun) else getattr(run, "energy", None)
    if energy is None:
        print(f"No energy metrics: {run.path} has no energy, only a generator.", file=sys.stderr)
        return None, None
    start = samples[:METRICS_COUNT].to(device_of(energy))
    reference = real.subset(len(start)).batch(slice(None), start.device)
    found = together(_measured_energy, run, start, reference)
    ends = found.long_run.images if isinstance(found, EnergyMetrics) else found.ends
    return found, None if classifier is None else LongRunFeatures.of(start, ends, real, classifier)


def _measured_energy(run: Any, start: Tensor, reference: Tensor) -> EnergyMetrics | CalibrationMetrics:
    config = run.config
    clip = config.chain_clip or None
    if isinstance(run, CoarseToFineRun):
        dtype, settings = getattr(torch, config.dtype), last_level_settings(run.cascade())
        settings["grad_norm_clip"] = clip
        return energy_metrics(run.levels[run.size], start, reference, dtype=dtype, seed=config.seed, **settings)
    return calibration_metrics(
        run.energy,
        start,
        reference,
        step_size=config.step_size,
        noise_std=config.noise_std,
        num_steps=config.num_steps,
        data_term=DataTerm(config.data_term_weight, config.data_term_hinge),
        grad_norm_clip=clip,
        seed=config.seed,
    )
