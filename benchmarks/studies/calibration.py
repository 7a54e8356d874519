"""What calibration does to a VAE: the same VAE with and without it, same budget, some seeds, judged alike.

    python -m benchmarks.studies.calibration digits docs/results/ec-vae [--seeds 3]
    python -m benchmarks.studies.calibration mnist docs/results/ec-vae --data mnist.npz [--size 16] [--set num_steps=8 ...]

The name is that of a preset, `--set` changes single fields of it, and `--size` takes the images at half their size or
less. Judged are one-pass samples, in the features of the classifier that `fastebm evaluate`
trains (not comparable to published FID), beside the same distance between real images; their high-frequency energy
beside that of real images; reconstruction error and ELBO on held-out images. Finished rows are kept in NAME.json, and
only missing ones are run. The table of the page is made of these files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.studies.sample_metrics import SAMPLES, Judge, Row
from benchmarks.studies.seeds import Comparison, gain, in_order, pairs
from fastebm.data import Images, to_float
from fastebm.plotting import save_grid
from fastebm.runs.folder import RunFolder
from fastebm.training import EcVaeConfig, EcVaeRun, train
from fastebm.training.ec_vae.presets import EC_VAE_PRESETS

WAYS: dict[str, dict[str, Any]] = {"plain": {"lambda_start": 0.0, "dual_rate": 0.0}, "calibrated": {}}


def train_quietly(config: EcVaeConfig, images: Images, run_dir: Path) -> None:
    train(config, images, run_dir, progress=False)


def judged(run_dir: Path, config: EcVaeConfig, evaluate_samples: Judge) -> Row:
    """The numbers of one run."""
    run = EcVaeRun.load(run_dir)
    held_out = to_float(evaluate_samples.test.pixels[:1000])
    elbo = run.vae.elbo(held_out, seed=0)
    return {
        **evaluate_samples.samples(run.sample(SAMPLES)),
        "reconstruction": float((run.reconstruct(held_out) - held_out).square().flatten(1).sum(1).mean()),
        "elbo": float(elbo.elbo.mean()),
        "seconds": RunFolder.existing(run_dir).log.lines()[-1]["seconds"],
    }


def table(name: str, stored: dict[str, Any]) -> str:
    """Rows by seed, then means and what calibration gained."""
    base, rows = stored["reference"], stored["rows"]
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
    for row in in_order(rows):
        lines.append(
            f"| {row['seed']} | {row['way']} | {row['distance']:.3g} | {row['confident']:.0%} | "
            f"{row['sharpness']:.2f} | {row['reconstruction']:.3g} | {row['elbo']:.4g} | {row['seconds'] / 60:.1f} |"
        )
    both = pairs(rows, "calibrated")
    if len(both) > 1:
        lines += ["", f"Calibration brings samples nearer {gain(both, 'distance')}."]
    return "\n".join(lines)


def pictured(page: Path, name: str, runs: dict[str, Path]) -> None:
    for way, run in runs.items():
        save_grid(page / f"{name}-{way}.png", EcVaeRun.load(run).sample(100))


def main() -> None:
    comparison = Comparison(Path(__file__).name, "EC-VAE", EC_VAE_PRESETS, WAYS, train_quietly, judged, table, pictured)
    comparison.run(comparison.parser(__doc__, "runs/calibration").parse_args())


if __name__ == "__main__":
    main()
