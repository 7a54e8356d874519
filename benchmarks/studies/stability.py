"""What keeps coarse-to-fine training from exploding: the same short run with one thing changed at a time.

    python -m benchmarks.studies.stability zebra128.npz docs/results/stability [--seeds 2]

"plain" is the recipe of the authors without any of what our presets add (an energy L2 term, noise on the data, a rate
that falls, lower rates, shorter stages); each other variant adds one of them, "all" all. The bounds of the guard are
the 1000 of the authors, and it may not go back, so that an explosion ends the run. Small nets on small images (8x8 to
32x32) stayed in health whatever was done to them, hence 64x64. Finished rows are kept in stability.json, and only
missing ones are run. The table of the page is made of that file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.readme_sections import fill
from fastebm.data import open_images
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.runs.files import write_json
from fastebm.training import CoarseToFineConfig, DivergedError, train

PLAIN = CoarseToFineConfig(
    sizes=(8, 16, 32, 64),
    iterations=(200, 200, 200, 300),
    batch_sizes=(64, 64, 32, 16),
    learning_rates=(1e-3, 1e-3, 1e-3, 1.2e-3),
    base_width=8,
    flip=True,
    dtype="bfloat16",
    update_dtype="bfloat16",
    retries=0,
    checkpoint_every=10**6,
)
LOWER = (1e-3, 1e-3, 7e-4, 3e-4)
ADDED: dict[str, dict[str, Any]] = {
    "plain": {},
    "energy L2 0.02": {"energy_l2": 0.02},
    "lower rates at 32 and 64": {"learning_rates": LOWER},
    "data noise 0.03": {"data_noise": 0.03},
    "rates fall in the second half": {"lr_decay": 0.5},
    "all": {"energy_l2": 0.02, "learning_rates": LOWER, "data_noise": 0.03, "lr_decay": 0.5},
}
TAIL = 0.1


def measured(images: Any, variant: str, seed: int) -> dict[str, Any]:
    """One run: where it exploded, if it did, and its largest energies, over all and in the last tenth."""
    config = dataclasses.replace(PLAIN, channels=images.channels, seed=seed, **ADDED[variant])
    lines: list[dict[str, Any]] = []
    exploded = None
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = Path(folder) / "run"
            train(config, images, run, progress=False, save_pictures=False, on_log=lines.append)
        except DivergedError as error:
            exploded = {"iteration": error.iteration, "reason": error.reason}
    largest = [max(line["largest_energy_data"], line["largest_energy_samples"]) for line in lines]
    tail = lines[-max(1, round(TAIL * len(lines))) :]
    return {
        "variant": variant,
        "seed": seed,
        "exploded": exploded,
        "largest_energy": max(largest, default=None),
        "largest_energy_end": statistics.median(largest[-len(tail) :]) if largest else None,
        "gap_end": statistics.fmean(abs(line["gap"]) for line in tail) if tail else None,
        "seconds": round(time.monotonic() - began, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each variant, means over seeds."""
    lines = [
        "| variant | runs | exploded | largest energy | at the end | mean gap at the end |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for variant in ADDED:
        group = [row for row in rows if row["variant"] == variant]
        if group:
            keys = ("largest_energy", "largest_energy_end", "gap_end")
            means = [statistics.fmean(row[key] for row in group) for key in keys]
            exploded = sum(row["exploded"] is not None for row in group)
            lines.append(
                f"| {variant} | {len(group)} | {exploded} | {means[0]:.1f} | {means[1]:.1f} | {means[2]:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.page.mkdir(parents=True, exist_ok=True)
    stored = given.page / "stability.json"
    rows: list[dict[str, Any]] = json.loads(stored.read_text())["rows"] if stored.exists() else []
    images = open_images(given.data, size=PLAIN.sizes[-1])
    for seed in range(given.seeds):
        for variant in ADDED:
            if (variant, seed) not in {(row["variant"], row["seed"]) for row in rows}:
                rows.append(measured(images, variant, seed))
                print(rows[-1], flush=True)
                facts = {"machine": machine_facts("cpu"), "data": given.data.name, "rows": rows}
                write_json(stored, facts | {"config": dataclasses.asdict(PLAIN)})
    fill(given.page / "README.md", "Stability", "stability", Path(__file__).name, table(rows))


if __name__ == "__main__":
    main()
