"""What calibration does to a VAE: the same VAE with and without it, same budget, some seeds, judged alike.

    python benchmarks/calibration.py digits docs/results/ec-vae [--seeds 3]
    python benchmarks/calibration.py mnist docs/results/ec-vae --data mnist.npz [--size 16] [--set steps=8 ...]

The name is that of a preset, `--set` changes single fields of it, and `--size` takes the images at half their size or
less. Judged are one-pass samples, in the features of the classifier that `fastebm evaluate`
trains (not comparable to published FID), beside the same distance between real images; their high-frequency energy
beside that of real images; reconstruction error and ELBO on held-out images. Finished rows are kept in NAME.json, and
only missing ones are run. The table of the page is made of these files.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastebm.data import Images, digits, open_images, to_float, to_pixels
from fastebm.evaluation import FeatureClassifier, frechet_distance, train_features
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.training import EcVaeConfig, load_ec_vae, train_ec_vae
from fastebm.training.ec_vae_presets import EC_VAE_PRESETS
from fastebm.training.files import write_json
from fastebm.training.pictures import save_grid
from fastebm.training.presets import SHAPING
from fastebm.training.run import RunFolder

SAMPLES = 3000
WAYS: dict[str, dict[str, Any]] = {"plain": {"lambda_start": 0.0, "dual_rate": 0.0}, "calibrated": {}}


def labelled_images(name: str, data: Path | None, size: int, channels: int) -> tuple[Images, Images]:
    """Train and test images with labels."""
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


def changed(config: EcVaeConfig, settings: list[str]) -> EcVaeConfig:
    """The config with fields as `name=value` has them."""
    values = dict(setting.split("=", 1) for setting in settings)
    return dataclasses.replace(
        config, **{n: v if isinstance(getattr(config, n), str) else json.loads(v) for n, v in values.items()}
    )


def high_frequencies(images: Tensor) -> float:
    """The mean squared response to the Laplacian: small where images are blurred."""
    kernel = images.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(images.shape[1], 1, 3, 3)
    return float(F.conv2d(images, kernel, groups=images.shape[1]).square().mean())


def judged(run_dir: Path, judge: FeatureClassifier, train: Images, test: Images) -> dict[str, Any]:
    """The numbers of one run."""
    run = load_ec_vae(run_dir)
    samples = run.sample(SAMPLES)
    real, held_out = to_float(train.pixels[:SAMPLES]), to_float(test.pixels[:1000])
    described = judge(samples)
    elbo = run.vae.elbo(held_out, seed=0)
    return {
        "distance": frechet_distance(described.features, judge(train.pixels[:SAMPLES]).features),
        "confident": float((described.probabilities.max(1).values >= 0.9).double().mean()),
        "sharpness": high_frequencies(samples) / high_frequencies(real),
        "reconstruction": float((run.reconstruct(held_out) - held_out).square().flatten(1).sum(1).mean()),
        "elbo": float(elbo.elbo.mean()),
        "seconds": RunFolder.existing(run_dir).log.lines()[-1]["seconds"],
    }


def floor(judge: FeatureClassifier, train: Images, test: Images) -> dict[str, Any]:
    """What real images, uniform noise and held-out ones have."""
    real = judge(train.pixels[:SAMPLES]).features
    described = judge(test.pixels[:SAMPLES])
    noise = torch.rand(SAMPLES, *train.pixels.shape[1:], generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {
        "accuracy": judge.accuracy,
        "distance": frechet_distance(described.features, real),
        "confident": float((described.probabilities.max(1).values >= 0.9).double().mean()),
        "noise": frechet_distance(judge(noise).features, real),
    }


def table(name: str, stored: dict[str, Any]) -> str:
    """Rows by seed, then means and what calibration gained."""
    base, rows = stored["floor"], stored["rows"]
    config = stored["config"]
    size = f"{config['size']}x{config['size']}"
    lines = [
        f"{name} at {size}: {config['iterations']} updates of batch {config['batch_size']}. The judge is right on "
        f"{base['accuracy']:.1%} of unseen images and sure of {base['confident']:.0%} of them; between train and test "
        f"images the distance is {base['distance']:.3g}, of uniform noise {base['noise']:.3g} (not comparable to "
        "published FID).",
        "",
        "| seed | VAE | distance | sure of | high frequencies, real = 1 | reconstruction | ELBO | minutes |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: (row["seed"], row["way"] != "plain")):
        lines.append(
            f"| {row['seed']} | {row['way']} | {row['distance']:.3g} | {row['confident']:.0%} | "
            f"{row['sharpness']:.2f} | {row['reconstruction']:.3g} | {row['elbo']:.4g} | {row['seconds'] / 60:.1f} |"
        )
    pairs = [
        (plain["distance"], row["distance"])
        for row in rows
        for plain in rows
        if row["way"] == "calibrated" and plain["way"] == "plain" and plain["seed"] == row["seed"]
    ]
    if len(pairs) > 1:
        gains = [before - after for before, after in pairs]
        spread = max(statistics.stdev(column) for column in zip(*pairs, strict=True))
        better = sum(gain > 0 for gain in gains)
        lines += [
            "",
            f"Calibration brings samples nearer on {better} of {len(pairs)} seeds, by {statistics.fmean(gains):.3g} on "
            f"average; the larger of the two standard deviations between seeds is {spread:.3g}.",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(EC_VAE_PRESETS))
    parser.add_argument("page", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/calibration"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = EC_VAE_PRESETS[given.name]
    train, test = labelled_images(given.name, given.data, config.size, config.channels)
    if given.size:
        train, test = (at_size(images, given.size) for images in (train, test))
        config = dataclasses.replace(config, size=given.size)
    config = changed(config, given.set)
    judge = train_features(train, test, images_seen=100_000 if len(train) > 10_000 else 40_000)
    given.page.mkdir(parents=True, exist_ok=True)
    path = given.page / f"{given.name}.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    for seed in range(given.seeds):
        for way, changes in WAYS.items():
            if any(row["seed"] == seed and row["way"] == way for row in stored["rows"]):
                continue
            run = given.runs / f"{given.name}-{way}-{seed}"
            train_ec_vae(dataclasses.replace(config, seed=seed, **changes), train, run, progress=False)
            stored["rows"].append({"seed": seed, "way": way, **judged(run, judge, train, test)})
            print(stored["rows"][-1], flush=True)
            if seed == 0:
                save_grid(given.page / f"{given.name}-{way}.png", load_ec_vae(run).sample(100))
            stored |= {"floor": floor(judge, train, test), "config": dataclasses.asdict(config)}
            write_json(path, stored | {"machine": machine_facts("cpu")})
    readme = given.page / "README.md"
    begin, end = f"<!-- {given.name}: made by benchmarks/calibration.py -->", f"<!-- {given.name}: end -->"
    text = readme.read_text() if readme.exists() else "# EC-VAE\n"
    text = text if begin in text else f"{text}\n{begin}\n{end}\n"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    readme.write_text(pattern.sub(lambda _: f"{begin}\n\n{table(given.name, stored)}\n\n{end}", text))


if __name__ == "__main__":
    main()
