"""What keeps coarse-to-fine training from exploding: the same short run with one thing changed at a time.

    python benchmarks/stability.py mnist.npz docs/results/stability [--rate 1e-3 4e-3] [--seeds 2]

"plain" is the recipe of the authors without any of what our presets add (an energy L2 term, noise on the data, a rate
that falls, shorter stages); each other variant adds one of them, "preset" all. The bounds of the guard are the 1000 of
the authors, and it may not go back, so that an explosion ends the run. Finished rows are kept in stability.json, only
missing ones are run. The table of the page is made of that file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fastebm.data import open_images
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.training import CoarseToFineConfig, DivergedError, train_coarse_to_fine
from fastebm.training.files import write_json

BEGIN, END = "<!-- stability: made by benchmarks/stability.py -->", "<!-- stability: end -->"
PLAIN = CoarseToFineConfig(
    sizes=(8, 16),
    iterations=(300, 1200),
    batch_sizes=(32, 32),
    learning_rates=(1e-3, 1e-3),
    base_width=8,
    dtype="bfloat16",
    update_dtype="bfloat16",
    retries=0,
    checkpoint_every=10**6,
)
ADDED: dict[str, dict[str, Any]] = {
    "plain": {},
    "energy L2 1e-3": {"energy_l2": 1e-3},
    "energy L2 1e-2": {"energy_l2": 1e-2},
    "data noise 0.03": {"data_noise": 0.03},
    "rate falls in the second half": {"lr_decay": 0.5},
    "half the length": {"iterations": (150, 600)},
    "preset": {"energy_l2": 1e-3, "data_noise": 0.03, "lr_decay": 0.5, "iterations": (150, 600)},
}
TAIL = 0.1


def measured(images: Any, variant: str, rate: float, seed: int) -> dict[str, Any]:
    """One run: where it exploded, if it did, and its largest energies, over all and in the last tenth."""
    config = dataclasses.replace(
        PLAIN, channels=images.channels, learning_rates=(rate, rate), seed=seed, **ADDED[variant]
    )
    lines: list[dict[str, Any]] = []
    exploded = None
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = Path(folder) / "run"
            train_coarse_to_fine(config, images, run, progress=False, save_pictures=False, on_log=lines.append)
        except DivergedError as error:
            exploded = {"iteration": error.iteration, "reason": error.reason}
    largest = [max(line["largest_energy_data"], line["largest_energy_samples"]) for line in lines]
    tail = lines[-max(1, round(TAIL * len(lines))) :]
    return {
        "variant": variant,
        "rate": rate,
        "seed": seed,
        "exploded": exploded,
        "largest_energy": max(largest, default=None),
        "largest_energy_end": statistics.median(largest[-len(tail) :]) if largest else None,
        "gap_end": statistics.fmean(abs(line["gap"]) for line in tail) if tail else None,
        "seconds": round(time.monotonic() - began, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each variant and rate, means over seeds."""
    lines = [
        "| rate | variant | runs | exploded | largest energy | at the end | mean gap at the end |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for rate in sorted({row["rate"] for row in rows}):
        for variant in ADDED:
            group = [row for row in rows if row["rate"] == rate and row["variant"] == variant]
            if group:
                means = [
                    statistics.fmean(row[key] for row in group)
                    for key in ("largest_energy", "largest_energy_end", "gap_end")
                ]
                exploded = sum(row["exploded"] is not None for row in group)
                lines.append(
                    f"| {rate:g} | {variant} | {len(group)} | {exploded} | {means[0]:.1f} | {means[1]:.1f} | "
                    f"{means[2]:.3f} |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--rate", type=float, nargs="+", default=[1e-3, 4e-3])
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.page.mkdir(parents=True, exist_ok=True)
    stored, readme = given.page / "stability.json", given.page / "README.md"
    rows: list[dict[str, Any]] = json.loads(stored.read_text())["rows"] if stored.exists() else []
    images = open_images(given.data, size=PLAIN.sizes[-1])
    for seed in range(given.seeds):
        for rate in given.rate:
            for variant in ADDED:
                key = (variant, rate, seed)
                if key not in {(row["variant"], row["rate"], row["seed"]) for row in rows}:
                    rows.append(measured(images, *key))
                    print(rows[-1], flush=True)
                    facts = {"machine": machine_facts("cpu"), "data": given.data.name, "rows": rows}
                    write_json(stored, facts | {"config": dataclasses.asdict(PLAIN)})
    text = readme.read_text() if readme.exists() else f"# Stability\n\n{BEGIN}\n{END}\n"
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    readme.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n{table(rows)}\n\n{END}", text))


if __name__ == "__main__":
    main()
