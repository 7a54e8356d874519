"""What refined posteriors do to a VAE: the same VAE with and without them, same budget, some seeds, judged alike.

    python benchmarks/posterior.py digits docs/results/ec-posterior [--seeds 3] [--iterations 1500]
    python benchmarks/posterior.py mnist docs/results/ec-posterior --data mnist.npz

The name is that of a preset. Judged are, on held-out images, reconstruction from the encoder's means (one pass) and
from there moved towards the mode, the ELBO by one draw, and the importance-weighted bound of 64 draws, which is the
fairer of the two to a decoder that was trained on better draws than the encoder's, there and on train images; and
one-pass samples by their distance to real images as in `benchmarks/calibration.py`. Finished rows are kept in
NAME.json, and only missing ones are run.
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
from calibration import SAMPLES, floor, high_frequencies, labelled_images
from torch import Tensor

from fastebm.data import Images, to_float
from fastebm.evaluation import FeatureClassifier, frechet_distance, train_features
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.models.vae import squared_error
from fastebm.training import importance_bound, load_ec_posterior, train_ec_posterior
from fastebm.training.ec_posterior_presets import EC_POSTERIOR_PRESETS
from fastebm.training.files import write_json
from fastebm.training.pictures import save_grid
from fastebm.training.run import RunFolder

WAYS: dict[str, dict[str, Any]] = {"plain": {"steps": 0}, "refined": {}}
DRAWS = 64
COLUMNS = ("distance", "reconstruction", "moved", "elbo", "bound", "bound_train")
LARGER_IS_BETTER = ("elbo", "bound", "bound_train")


def judged(run_dir: Path, steps: int, judge: FeatureClassifier, train: Images, test: Images) -> dict[str, Any]:
    """The numbers of one run; both ways are moved by as many `steps`."""
    run = load_ec_posterior(run_dir)
    samples, held_out = run.sample(SAMPLES), to_float(test.pixels[:1000])
    real = to_float(train.pixels[:SAMPLES])

    def error(images: Tensor) -> float:
        return float(squared_error(held_out, images).mean())

    with torch.no_grad():
        elbo = run.vae.elbo(held_out, seed=0)
    return {
        "distance": frechet_distance(judge(samples).features, judge(train.pixels[:SAMPLES]).features),
        "sharpness": high_frequencies(samples) / high_frequencies(real),
        "reconstruction": error(run.reconstruct(held_out, 0)),
        "moved": error(run.reconstruct(held_out, steps)),
        "elbo": float(elbo.elbo.mean()),
        "bound": float(importance_bound(run.vae, held_out, DRAWS, seed=0).mean()),
        "bound_train": float(importance_bound(run.vae, real[:1000], DRAWS, seed=0).mean()),
        "seconds": RunFolder.existing(run_dir).log.lines()[-1]["seconds"],
    }


def table(name: str, stored: dict[str, Any]) -> str:
    """Rows by seed, then what refinement gained in each column."""
    rows, base = stored["rows"], stored["floor"]
    lines = [
        f"{name}: {stored['config']['iterations']} updates of batch {stored['config']['batch_size']}. Between train "
        f"and test images the distance is {base['distance']:.3g}, of uniform noise {base['noise']:.3g} (not comparable "
        "to published FID).",
        "",
        f"| seed | VAE | distance | reconstruction | moved | ELBO | bound of {DRAWS} draws | on train images "
        "| minutes |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: (row["seed"], row["way"] != "plain")):
        numbers = " | ".join(f"{row[column]:.4g}" for column in COLUMNS)
        lines.append(f"| {row['seed']} | {row['way']} | {numbers} | {row['seconds'] / 60:.1f} |")
    pairs = [
        (plain, row)
        for row in rows
        for plain in rows
        if row["way"] == "refined" and plain["way"] == "plain" and plain["seed"] == row["seed"]
    ]
    for column in COLUMNS if len(pairs) > 1 else ():
        sign = 1 if column in LARGER_IS_BETTER else -1
        gains = [sign * (row[column] - plain[column]) for plain, row in pairs]
        spread = max(statistics.stdev(row[column] for row in side) for side in zip(*pairs, strict=True))
        better = sum(gain > 0 for gain in gains)
        lines += [
            "",
            f"{column}: better on {better} of {len(pairs)} seeds, by {statistics.fmean(gains):.3g} on average; the "
            f"larger of the two standard deviations between seeds is {spread:.3g}.",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(EC_POSTERIOR_PRESETS))
    parser.add_argument("page", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/posterior"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = EC_POSTERIOR_PRESETS[given.name]
    if given.iterations:
        config = dataclasses.replace(config, iterations=given.iterations)
    train, test = labelled_images(given.name, given.data, config.size, config.channels)
    judge = train_features(train, test, images_seen=100_000 if len(train) > 10_000 else 40_000)
    given.page.mkdir(parents=True, exist_ok=True)
    path = given.page / f"{given.name}.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    for seed in range(given.seeds):
        for way, changes in WAYS.items():
            if any(row["seed"] == seed and row["way"] == way for row in stored["rows"]):
                continue
            run = given.runs / f"{given.name}-{way}-{seed}"
            train_ec_posterior(dataclasses.replace(config, seed=seed, **changes), train, run, progress=False)
            stored["rows"].append({"seed": seed, "way": way, **judged(run, config.steps, judge, train, test)})
            print(stored["rows"][-1], flush=True)
            if seed == 0:
                save_grid(given.page / f"{given.name}-{way}.png", load_ec_posterior(run).sample(100))
            stored |= {"floor": floor(judge, train, test), "config": dataclasses.asdict(config)}
            write_json(path, stored | {"machine": machine_facts("cpu")})
    readme = given.page / "README.md"
    begin, end = f"<!-- {given.name}: made by benchmarks/posterior.py -->", f"<!-- {given.name}: end -->"
    text = readme.read_text() if readme.exists() else "# The calibrated posterior\n"
    text = text if begin in text else f"{text}\n{begin}\n{end}\n"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    readme.write_text(pattern.sub(lambda _: f"{begin}\n\n{table(given.name, stored)}\n\n{end}", text))


if __name__ == "__main__":
    main()
