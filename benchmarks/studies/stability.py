"""What keeps coarse-to-fine training from exploding: the same short run with one setting changed at a time.

    python -m benchmarks.studies.stability zebra128.npz [--seeds 2]

"plain" is the recipe of the authors without what our presets add (an energy L2 term, noise on the data, a rate that
falls, lower rates, shorter stages); each other variant adds one of these, and "all" adds all of them. The guard has
the authors' bound of 1000 and may not roll back, so that an explosion ends the run. Small nets on small images (8x8 to
32x32) stayed stable with every setting, hence 64x64. Finished rows are kept in results.json of the page, and only
missing ones are run.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.pages import RESULTS, add_entry, read_entries, stability_sections
from fastebm.cli.seeds import largest_energy, last_tenth
from fastebm.data import open_images
from fastebm.evaluation.speed.machine import machine_facts
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
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "energy L2 0.02": {"energy_l2": 0.02},
    "lower rates at 32 and 64": {"learning_rates": LOWER},
    "data noise 0.03": {"data_noise": 0.03},
    "rates fall in the second half": {"lr_decay": 0.5},
    "all": {"energy_l2": 0.02, "learning_rates": LOWER, "data_noise": 0.03, "lr_decay": 0.5},
}


def measure(images: Any, variant: str, seed: int) -> dict[str, Any]:
    """One run: where it exploded, if it did, and its largest energies, over all and in the last tenth."""
    config = dataclasses.replace(PLAIN, channels=images.channels, seed=seed, **VARIANTS[variant])
    lines: list[dict[str, Any]] = []
    exploded = None
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = Path(folder) / "run"
            train(config, images, run, progress=False, save_pictures=False, on_log=lines.append)
        except DivergedError as error:
            exploded = {"iteration": error.iteration, "reason": error.reason}
    return {
        "variant": variant,
        "seed": seed,
        "exploded": exploded,
        **energies_of(lines),
        "seconds": round(time.monotonic() - began, 1),
    }


def energies_of(lines: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The largest energy in a run's log, and the median of the largest and the mean gap in its last tenth."""
    end = last_tenth(lines)
    return {
        "largest_energy": largest_energy(lines),
        "largest_energy_end": statistics.median(largest_energy([line]) or 0.0 for line in end) if end else None,
        "gap_end": statistics.fmean(abs(line["gap"]) for line in end) if end else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="photographs of 64x64 or more")
    parser.add_argument("--page", type=Path, default=RESULTS / "stability")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each variant")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = read_entries(options.page).get("stability", {"rows": []})["rows"]
    images = open_images(options.data, size=PLAIN.sizes[-1])
    for seed in range(options.seeds):
        for variant in VARIANTS:
            if (variant, seed) not in {(row["variant"], row["seed"]) for row in rows}:
                rows.append(measure(images, variant, seed))
                print(rows[-1], flush=True)
                facts = {"machine": machine_facts("cpu"), "data": options.data.name, "rows": rows}
                entry = facts | {"config": dataclasses.asdict(PLAIN)}
                add_entry(options.page, "stability", entry, stability_sections)


if __name__ == "__main__":
    main()
