"""What refined posteriors do to a VAE: the same VAE with and without them, same budget, some seeds, judged alike.

    python -m benchmarks.studies.posterior digits docs/results/ec-posterior [--seeds 3] [--iterations 1500]
    python -m benchmarks.studies.posterior digits docs/results/ec-posterior [--seeds 3] [--iterations 1500]

The name is that of a preset, `--set` changes single fields of it, and `--size` takes the images at half their size or
less. Judged are, on held-out images, reconstruction from the encoder's means (one pass) and from there moved towards
the mode, the ELBO by one draw, the importance-weighted bound of 64 draws, there and on train images, and of 2048 draws
on 200 images: with so many draws the encoder matters little, and it says what the decoder is worth; and one-pass
samples by their distance to real images as in `calibration.py`. Finished rows are kept in NAME.json, and
only missing ones are run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.sample_metrics import SAMPLES, Judge, Row
from benchmarks.studies.seeds import Comparison, gain, in_order, other_size, pairs
from fastebm.data import Images, to_float
from fastebm.models.vae import squared_error
from fastebm.plotting import save_grid
from fastebm.runs.folder import RunFolder
from fastebm.training import EcPosteriorConfig, EcPosteriorRun, iwae_bound, train
from fastebm.training.ec_posterior.presets import EC_POSTERIOR_PRESETS

WAYS: dict[str, dict[str, Any]] = {"plain": {"num_steps": 0}, "refined": {}}
DRAWS, MANY_DRAWS, FEW_IMAGES = 64, 2048, 200
COLUMNS = ("distance", "reconstruction", "moved", "elbo", "bound", "bound_train", "tight_bound")
LARGER_IS_BETTER = ("elbo", "bound", "bound_train", "tight_bound")


def train_quietly(config: EcPosteriorConfig, images: Images, run_dir: Path) -> None:
    train(config, images, run_dir, progress=False)


def judged(run_dir: Path, config: EcPosteriorConfig, evaluate_samples: Judge) -> Row:
    """The numbers of one run; both ways are moved by as many steps, those of `config`."""
    run = EcPosteriorRun.load(run_dir)
    held_out = to_float(evaluate_samples.test.pixels[:1000])

    def error(images: Tensor) -> float:
        return float(squared_error(held_out, images).mean())

    with torch.no_grad():
        elbo = run.vae.elbo(held_out, seed=0)
    samples = evaluate_samples.samples(run.sample(SAMPLES))
    return {
        "distance": samples["distance"],
        "sharpness": samples["sharpness"],
        "reconstruction": error(run.reconstruct(held_out, 0)),
        "moved": error(run.reconstruct(held_out, config.num_steps)),
        "elbo": float(elbo.elbo.mean()),
        "bound": float(iwae_bound(run.vae, held_out, DRAWS, seed=0).mean()),
        "bound_train": float(iwae_bound(run.vae, evaluate_samples.real()[:1000], DRAWS, seed=0).mean()),
        "tight_bound": float(iwae_bound(run.vae, held_out[:FEW_IMAGES], MANY_DRAWS, seed=0).mean()),
        "seconds": RunFolder.existing(run_dir).log.lines()[-1]["seconds"],
    }


def table(name: str, stored: dict[str, Any]) -> str:
    """Rows by seed, then what refinement gained in each column."""
    rows, base = stored["rows"], stored["reference"]
    size = other_size(stored["config"], EC_POSTERIOR_PRESETS[name])
    lines = [
        f"{name}{size}: {stored['config']['iterations']} updates of batch {stored['config']['batch_size']}. Between "
        f"train and test images the distance is {base['distance']:.3g}, of uniform noise {base['noise']:.3g} (not "
        "comparable to published FID).",
        "",
        f"| seed | VAE | distance | reconstruction | moved | ELBO | bound of {DRAWS} draws | on train images "
        f"| of {MANY_DRAWS} draws | minutes |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in in_order(rows):
        numbers = " | ".join(f"{row[column]:.4g}" for column in COLUMNS)
        lines.append(f"| {row['seed']} | {row['way']} | {numbers} | {row['seconds'] / 60:.1f} |")
    both = pairs(rows, "refined")
    for column in COLUMNS if len(both) > 1 else ():
        better = gain(both, column, larger_is_better=column in LARGER_IS_BETTER)
        lines += ["", f"{column}: better {better}."]
    return "\n".join(lines)


def pictured(page: Path, name: str, runs: dict[str, Path]) -> None:
    for way, run in runs.items():
        save_grid(page / f"{name}-{way}.png", EcPosteriorRun.load(run).sample(100))


def main() -> None:
    title = "The calibrated posterior"
    comparison = Comparison(
        Path(__file__).name, title, EC_POSTERIOR_PRESETS, WAYS, train_quietly, judged, table, pictured
    )
    parser = comparison.parser(__doc__, "runs/posterior")
    parser.add_argument("--iterations", type=int)
    given = parser.parse_args()
    if given.iterations:
        given.set = [*given.set, f"iterations={given.iterations}"]
    comparison.run(given)


if __name__ == "__main__":
    main()
