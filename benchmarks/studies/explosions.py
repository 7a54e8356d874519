"""Which measure keeps a run from exploding: the smallest run that does, with one setting changed at a time.

    python -m benchmarks.studies.explosions cifar10.npz [--seeds 3] [--variants "no holes"] [--dtype float32]

"as it was" explodes as the committed run of CIFAR-10 did, only sooner: its rates are four times as high, and nothing
pulls energies towards 0. The guard may not roll back, so that an explosion ends the run. Runs that reach their end are
judged in the features of the classifier that `fastebm evaluate` trains, as an energy that collapsed does not explode
either. Finished rows are kept in results.json of the page, and only missing ones are run. Rows of each dtype have an
entry of their own, because a run's bits, and so the update at which it explodes, depend on it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.pages import RESULTS, add_entry, read_entries, stability_sections
from benchmarks.studies.comparison import SampleEvaluator
from benchmarks.studies.stability import energies_of
from fastebm.data import open_images
from fastebm.evaluation import train_features
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.training import CoarseToFineConfig, DivergedError, train
from fastebm.training.coarse_to_fine.presets import PRESETS

ENTRIES = {"bfloat16": "explosions", "float32": "explosions-float32"}
BASE: CoarseToFineConfig = dataclasses.replace(
    PRESETS["cifar10"],
    base_width=8,
    iterations=(200, 200, 800),
    batch_sizes=(64, 64, 32),
    learning_rates=(3e-3, 3e-3, 4e-3),
    data_noise=0.02,
    energy_l2=0.0,
    noisy_starts=0.25,
    start_temperature=0.006,
    hole_starts=0.125,
    dtype="bfloat16",
    update_dtype="bfloat16",
    retries=0,
    checkpoint_every=10**6,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "as it was": {},
    "clipped steps": {"chain_clip": 1.5},
    "shrinking steps": {"step_shrink": 0.5},
    "brake on the gap": {"gap_brake": 0.5},
    "hinge on the gap": {"gap_hinge": 0.5},
    "energy L2 0.02": {"energy_l2": 0.02},
    "energy L2 0.1": {"energy_l2": 0.1},
    "gradient penalty": {"gradient_penalty": 0.05},
    "trimmed mean": {"trim": 0.1},
    "KL term": {"chain_kl": 1.0},
    "no data term": {"start_temperature": 0.0},
    "temperature 0.0002": {"start_temperature": 0.0002},
    "no noisy starts": {"noisy_starts": 0.0, "start_temperature": 0.0},
    "no holes": {"hole_starts": 0.0},
    "from noise only": {"noisy_starts": 0.0, "start_temperature": 0.0, "hole_starts": 0.0},
    "hinge, energy L2 0.02": {"gap_hinge": 0.5, "energy_l2": 0.02},
    "data noise 0.05": {"data_noise": 0.05},
    "half steps, twice as many": {"num_steps": 30, "step_size": 0.5},
}
SAMPLES = 1000


def measure(
    base: CoarseToFineConfig, images: Any, variant: str, seed: int, evaluator: SampleEvaluator
) -> dict[str, Any]:
    """One run: where it exploded and what the flight recorder said, or its energies and samples at the end."""
    config = dataclasses.replace(base, channels=images.channels, seed=seed, **VARIANTS[variant])
    lines: list[dict[str, Any]] = []
    row: dict[str, Any] = {"variant": variant, "seed": seed, "exploded": None, "distance": None}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        try:
            run = train(config, images, path, progress=False, save_pictures=False, on_log=lines.append)
            row["distance"] = evaluator.samples(run.sample(SAMPLES, seed=0).clamp(-1, 1))["distance"]
        except DivergedError as error:
            row["exploded"] = {"iteration": error.iteration, "reason": error.reason, "diagnosis": diagnosis(path)}
    return row | energies_of(lines) | {"seconds": round(time.monotonic() - began, 1)}


def diagnosis(run: Path) -> str:
    """The sentence of the run's newest flight record."""
    newest = max((run / "flight").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return str(json.loads(newest.read_text())["diagnosis"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="labelled colour images of 32x32, with a test split")
    parser.add_argument("--page", type=Path, default=RESULTS / "stability")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--dtype", choices=ENTRIES, default=BASE.dtype, help="of chains and updates")
    options = parser.parse_args()
    entry_name = ENTRIES[options.dtype]
    base = dataclasses.replace(BASE, dtype=options.dtype, update_dtype=options.dtype)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = read_entries(options.page).get(entry_name, {"rows": []})["rows"]
    images, test = (open_images(options.data, split=split, size=base.sizes[-1]) for split in ("train", "test"))
    evaluator = SampleEvaluator(train_features(images), images, test)
    reference = evaluator.reference()
    for seed in range(options.seeds):
        for variant in options.variants:
            if (variant, seed) not in {(row["variant"], row["seed"]) for row in rows}:
                rows.append(measure(base, images, variant, seed, evaluator))
                print(rows[-1], flush=True)
                facts = {"machine": machine_facts("cpu"), "data": options.data.name, "reference": reference}
                entry = facts | {"rows": rows, "config": dataclasses.asdict(base)}
                add_entry(options.page, entry_name, entry, stability_sections)


if __name__ == "__main__":
    main()
