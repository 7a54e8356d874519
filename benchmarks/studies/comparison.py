"""Trains the same net in two ways, with the same budget and several seeds, and evaluates both alike.

    python -m benchmarks.studies.comparison ec-vae digits [--seeds 3]                     with and without calibration
    python -m benchmarks.studies.comparison ec-vae mnist --data mnist.npz --size 16 --set num_steps=8
    python -m benchmarks.studies.comparison ec-flow digits                                with and without calibration
    python -m benchmarks.studies.comparison ec-posterior digits                           with and without refinement

The second word is a preset of `fastebm train`; `--set` changes single fields of it, and `--size` takes the images at
half their size or less. Samples are evaluated in the features of the classifier that `fastebm evaluate` trains (not
comparable to published FID), beside the same distance between real images. Finished rows are kept in results.json of
the study's page, and only missing ones are run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastebm
from benchmarks.harness.pages import RESULTS, add_entry, comparison_table, each, read_entries
from fastebm.data import Images, digits, open_images, to_float, to_pixels
from fastebm.evaluation import FeatureClassifier, frechet_distance, train_features
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.models.vae import squared_error
from fastebm.plotting import save_panels
from fastebm.runs.folder import RunFolder
from fastebm.training import iwae_bound
from fastebm.training.coarse_to_fine.presets import SHAPING
from fastebm.training.ec_flow.presets import EC_FLOW_PRESETS
from fastebm.training.ec_posterior.presets import EC_POSTERIOR_PRESETS
from fastebm.training.ec_vae.presets import EC_VAE_PRESETS

Row = dict[str, Any]
SAMPLES = 3000
DRAWS, MANY_DRAWS, FEW_IMAGES = 64, 2048, 200
CONFIDENT = 0.9


# ---- evaluation of samples


@dataclass(frozen=True)
class SampleEvaluator:
    """Measures samples in the features of a classifier that never saw the test images."""

    features: FeatureClassifier
    train: Images
    test: Images

    def real(self) -> Tensor:
        """The train images (N, C, S, S) that samples are compared with, in [-1, 1]."""
        return to_float(self.train.pixels[:SAMPLES])

    def samples(self, samples: Tensor) -> Row:
        """Distance to real images, share classified with confidence, high frequencies relative to real images."""
        found, share = self._describe(samples)
        sharpness = high_frequencies(samples) / high_frequencies(self.real())
        return {"distance": found, "confident": share, "sharpness": sharpness}

    def reference(self) -> Row:
        """The same of held-out real images, and the distance of uniform noise."""
        distance, share = self._describe(self.test.pixels[:SAMPLES])
        noise = torch.rand(SAMPLES, *self.train.pixels.shape[1:], generator=torch.Generator().manual_seed(0)) * 2 - 1
        noise_distance = self._describe(noise)[0]
        accuracy = self.features.accuracy
        return {"accuracy": accuracy, "distance": distance, "confident": share, "noise": noise_distance}

    def _describe(self, images: Tensor) -> tuple[float, float]:
        real, found = self.features(self.train.pixels[:SAMPLES]), self.features(images)
        confident = found.probabilities.max(1).values >= CONFIDENT
        return frechet_distance(found.features, real.features), float(confident.double().mean())


def high_frequencies(images: Tensor) -> float:
    """The mean squared response to the Laplacian: small where images are blurred."""
    kernel = images.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(images.shape[1], 1, 3, 3)
    return float(F.conv2d(images, kernel, groups=images.shape[1]).square().mean())


# ---- the studies


def evaluate_vae(run: Any, config: Any, evaluator: SampleEvaluator) -> Row:
    """One-pass samples; reconstruction error and ELBO on held-out images."""
    held_out = to_float(evaluator.test.pixels[:1000])
    return {
        **evaluator.samples(run.sample(SAMPLES)),
        "reconstruction": float(squared_error(run.reconstruct(held_out), held_out).mean()),
        "elbo": mean_elbo(run, held_out),
    }


def evaluate_posterior(run: Any, config: Any, evaluator: SampleEvaluator) -> Row:
    """The same, with reconstructions from refined latents (as many steps for both methods) and IWAE bounds.

    With 2,048 draws the encoder matters little, and the bound says what the decoder is worth.
    """
    held_out, train = to_float(evaluator.test.pixels[:1000]), evaluator.real()[:1000]
    plain, refined = (run.reconstruct(held_out, num_steps) for num_steps in (0, config.num_steps))
    return {
        **evaluator.samples(run.sample(SAMPLES)),
        "reconstruction": float(squared_error(held_out, plain).mean()),
        "reconstruction_refined": float(squared_error(held_out, refined).mean()),
        "elbo": mean_elbo(run, held_out),
        "bound": float(iwae_bound(run.vae, held_out, DRAWS, seed=0).mean()),
        "bound_train": float(iwae_bound(run.vae, train, DRAWS, seed=0).mean()),
        "tight_bound": float(iwae_bound(run.vae, held_out[:FEW_IMAGES], MANY_DRAWS, seed=0).mean()),
    }


def evaluate_flow(run: Any, config: Any, evaluator: SampleEvaluator) -> Row:
    """Samples at temperature 1, bits per dimension of held-out and of train images, and how exact the inverse is."""
    held_out = to_float(evaluator.test.pixels)
    return {
        "bits": float(run.bits_per_dimension(held_out).mean()),
        "bits_train": float(run.bits_per_dimension(evaluator.real()).mean()),
        "inverse": inverse_error(run.flow, held_out),
        **evaluator.samples(run.sample(SAMPLES)),
    }


@torch.no_grad()
def mean_elbo(run: Any, images: Tensor) -> float:
    return float(run.vae.elbo(images, seed=0).elbo.mean())


@torch.no_grad()
def inverse_error(flow: Any, images: Tensor) -> float:
    """The largest |decode(encode(x)) - x| over images x, in float32."""
    return max(float((flow.decode(flow.encode(part)[0]) - part).abs().max()) for part in images.split(1000))


@dataclass(frozen=True)
class Study:
    """What is compared, and how.

    Attributes:
        presets: configs by name.
        methods: of training, each by the fields that it changes; the first is what the second is compared with.
        evaluate: a run, its config and an evaluator to the numbers of a row.
        columns: of the page's table: key of a row, heading, format, and 1 where larger is better, -1 where smaller is,
            0 for a column whose gain is not summed up.
    """

    presets: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    evaluate: Callable[[Any, Any, SampleEvaluator], Row]
    columns: Sequence[tuple[str, str, str, int]]


CALIBRATION = {"plain": {"lambda_start": 0.0, "dual_rate": 0.0}, "calibrated": {}}
STUDIES = {
    "ec-vae": Study(
        EC_VAE_PRESETS,
        CALIBRATION,
        evaluate_vae,
        (
            ("distance", "distance", ".3g", -1),
            ("confident", "confident", ".0%", 0),
            ("sharpness", "high frequencies, real = 1", ".2f", 0),
            ("reconstruction", "reconstruction", ".3g", 0),
            ("elbo", "ELBO", ".4g", 0),
        ),
    ),
    "ec-flow": Study(
        EC_FLOW_PRESETS,
        CALIBRATION,
        evaluate_flow,
        (
            ("bits", "bits/dim, unseen", ".3f", -1),
            ("bits_train", "bits/dim, train", ".3f", 0),
            ("distance", "distance", ".3g", -1),
            ("confident", "confident", ".0%", 0),
            ("sharpness", "high frequencies, real = 1", ".2f", 0),
            ("inverse", "largest error of the inverse", ".1e", 0),
        ),
    ),
    "ec-posterior": Study(
        EC_POSTERIOR_PRESETS,
        {"plain": {"num_steps": 0}, "refined": {}},
        evaluate_posterior,
        (
            ("distance", "distance", ".4g", -1),
            ("reconstruction", "reconstruction", ".4g", -1),
            ("reconstruction_refined", "reconstruction, refined latents", ".4g", -1),
            ("elbo", "ELBO", ".4g", 1),
            ("bound", f"IWAE bound, {DRAWS} draws", ".4g", 1),
            ("bound_train", "the same on train images", ".4g", 1),
            ("tight_bound", f"IWAE bound, {MANY_DRAWS} draws", ".4g", 1),
        ),
    ),
}


# ---- the loop over rows


def compare(study: Study, preset: str, page: Path, options: argparse.Namespace) -> None:
    """Trains and evaluates what results.json of the page has no row of, and fills the page after each row.

    Under `--size` the entry is `PRESET-SIZE`. Raises SystemExit where rows are there that had other settings.
    """
    config = study.presets[preset]
    shape = config.size, config.channels
    name = f"{preset}-{options.size}" if options.size else preset
    config = changed(dataclasses.replace(config, size=options.size or config.size), options.set)
    entry = read_entries(page).get(name, {"rows": []})
    done = {(row["seed"], row["method"]) for row in entry["rows"]}
    wanted = itertools.product(range(options.seeds), study.methods)
    missing = [(seed, method) for seed, method in wanted if (seed, method) not in done]
    if not missing:
        add_entry(page, name, entry, each(comparison_table))
        return
    check_same(entry.get("config", {}), config, f"{page / 'results.json'}: {name}")
    train, test = labelled_images(preset, options.data, *shape)
    if options.size:
        train, test = (at_size(images, options.size) for images in (train, test))
    features = train_features(train, test, images_seen=100_000 if len(train) > 10_000 else 40_000)
    evaluator = SampleEvaluator(features, train, test)
    facts = {"columns": study.columns, "config": dataclasses.asdict(config), "reference": evaluator.reference()}
    runs = {method: options.runs / f"{name}-{method}-0" for method in study.methods}
    for seed, method in missing:
        folder = options.runs / f"{name}-{method}-{seed}"
        fastebm.train(dataclasses.replace(config, seed=seed, **study.methods[method]), train, folder, progress=False)
        seconds = RunFolder.existing(folder).log.lines()[-1]["seconds"]
        numbers = study.evaluate(fastebm.load(folder), config, evaluator)
        rows = [*entry["rows"], {"seed": seed, "method": method, **numbers, "seconds": seconds}]
        entry = {**facts, "rows": rows, "machine": machine_facts("cpu")}
        print(rows[-1], flush=True)
        add_entry(page, name, entry, each(comparison_table))
    if all(RunFolder.is_run(folder) for folder in runs.values()):
        panels = [(f"{method}, seed 0", fastebm.load(folder).sample(100)) for method, folder in runs.items()]
        save_panels(page / f"{name}.png", panels)


def labelled_images(name: str, data: Path | None, size: int, channels: int) -> tuple[Images, Images]:
    """Train and test images with labels. Raises SystemExit where the preset needs `--data`."""
    if name == "digits":
        train, test = (Images(to_pixels(images), labels) for images, labels in (digits("train"), digits("test")))
        return train, test
    if data is None:
        raise SystemExit(f"--data is needed for {name}")
    shaping = SHAPING.get(name, {})
    train, test = (open_images(data, size=size, channels=channels, split=part, **shaping) for part in ("train", "test"))
    return train, test


def at_size(images: Images, size: int) -> Images:
    """The images by average pooling; energies need fewer halvings then."""
    factor = images.pixels.shape[-1] // size
    pooled = [F.avg_pool2d(to_float(part), factor) for part in images.pixels.split(5000)]
    return Images(to_pixels(torch.cat(pooled)), images.labels)


def changed(config: Any, settings: Sequence[str]) -> Any:
    """The config with fields as `name=value` has them."""
    values = dict(setting.split("=", 1) for setting in settings)
    return dataclasses.replace(
        config, **{n: v if isinstance(getattr(config, n), str) else json.loads(v) for n, v in values.items()}
    )


def check_same(stored: Mapping[str, Any], config: Any, where: str) -> None:
    """Rows of one table have one config. Raises SystemExit where `stored` has other values in fields of `config`."""
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    others = [f"{name} {stored[name]}, not {now[name]}" for name in now if stored.get(name, now[name]) != now[name]]
    if others:
        raise SystemExit(f"{where} has rows with {'; '.join(others)}: give the same settings, or another page")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("preset", help="name of a preset of the method")
    parser.add_argument("--page", type=Path, help="folder of the page, by default the study's own in docs/results")
    parser.add_argument("--data", type=Path, help="images with labels, for other presets than digits")
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison"), help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--size", type=int, help="side of the images, half of the preset's or less")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="changes fields of the preset")
    options = parser.parse_args(arguments)
    study = STUDIES[options.study]
    if options.preset not in study.presets:
        parser.error(f"{options.study} has the presets {', '.join(sorted(study.presets))}, not {options.preset!r}")
    torch.set_num_threads(1)
    compare(study, options.preset, options.page or RESULTS / options.study, options)


if __name__ == "__main__":
    main()
