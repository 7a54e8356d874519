"""What calibration does to a flow: the same flow with and without it, as many updates, some seeds, judged alike.

    python benchmarks/calibrated_flow.py digits docs/results/ec-flow [--seeds 3] [--iterations 600]

The name is that of a preset of `fastebm train ec-flow`. Judged are bits per dimension of held-out images, which may
rise by MARGIN at most, and samples at temperature 1 in the features of the classifier that `fastebm evaluate` trains
(not comparable to published FID), beside the same distance between real images; and their high-frequency energy beside
that of real images. Finished rows are kept in NAME.json, and only missing ones are run.
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

from fastebm.data import Images, to_float
from fastebm.evaluation import FeatureClassifier, frechet_distance, train_features
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.training import load_ec_flow, train_ec_flow
from fastebm.training.ec_flow_presets import EC_FLOW_PRESETS
from fastebm.training.files import write_json
from fastebm.training.pictures import save_panels
from fastebm.training.run import RunFolder

MARGIN = 0.05
WAYS: dict[str, dict[str, Any]] = {"plain": {"lambda_start": 0.0, "dual_rate": 0.0}, "calibrated": {}}


def judged(run_dir: Path, judge: FeatureClassifier, train: Images, test: Images) -> dict[str, Any]:
    """The numbers of one run."""
    run = load_ec_flow(run_dir)
    samples = run.sample(SAMPLES)
    real = train.pixels[:SAMPLES]
    described = judge(samples)
    line = RunFolder.existing(run_dir).log.lines()[-1]
    return {
        "bits": float(run.bits_per_dimension(to_float(test.pixels)).mean()),
        "bits_train": float(run.bits_per_dimension(to_float(real)).mean()),
        "distance": frechet_distance(described.features, judge(real).features),
        "confident": float((described.probabilities.max(1).values >= 0.9).double().mean()),
        "sharpness": high_frequencies(samples) / high_frequencies(to_float(real)),
        "seconds": line["seconds"],
        "calibration": line.get("calibration"),
        "noise_floor": line.get("noise_floor"),
    }


def table(name: str, stored: dict[str, Any]) -> str:
    """Rows by seed, then what calibration changed."""
    base, rows = stored["floor"], stored["rows"]
    lines = [
        f"{name}: {stored['config']['iterations']} updates of batch {stored['config']['batch_size']}. The judge is "
        f"right on {base['accuracy']:.1%} of unseen images and sure of {base['confident']:.0%} of them; between train "
        f"and test images the distance is {base['distance']:.3g}, of uniform noise {base['noise']:.3g} (not comparable "
        "to published FID).",
        "",
        "| seed | flow | bits/dim, unseen | bits/dim, train | distance | sure of | high freq., real = 1 | minutes |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: (row["seed"], row["way"] != "plain")):
        lines.append(
            f"| {row['seed']} | {row['way']} | {row['bits']:.3f} | {row['bits_train']:.3f} | {row['distance']:.3g} | "
            f"{row['confident']:.0%} | {row['sharpness']:.2f} | {row['seconds'] / 60:.1f} |"
        )
    by_seed = {way: {row["seed"]: row for row in rows if row["way"] == way} for way in WAYS}
    pairs = [(plain, by_seed["calibrated"].get(seed)) for seed, plain in sorted(by_seed["plain"].items())]
    both = [(plain, calibrated) for plain, calibrated in pairs if calibrated is not None]
    if len(both) > 1:
        gains = [plain["distance"] - calibrated["distance"] for plain, calibrated in both]
        spread = max(statistics.stdev(row["distance"] for row in column) for column in zip(*both, strict=True))
        costs = [calibrated["bits"] - plain["bits"] for plain, calibrated in both]
        lines += [
            "",
            f"Calibration brings samples nearer on {sum(gain > 0 for gain in gains)} of {len(both)} seeds, by "
            f"{statistics.fmean(gains):.3g} on average; the larger of the two standard deviations between seeds is "
            f"{spread:.3g}. Unseen bits/dim change by {min(costs):+.3f} to {max(costs):+.3f}; the margin of "
            f"{MARGIN} is {'kept' if max(costs) <= MARGIN else 'not kept'}.",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(EC_FLOW_PRESETS))
    parser.add_argument("page", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/calibrated-flow"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--weight", type=float, help="another weight of the calibration than the preset's")
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = EC_FLOW_PRESETS[given.name]
    if given.iterations:
        config = dataclasses.replace(config, iterations=given.iterations)
    if given.weight is not None:
        config = dataclasses.replace(config, lambda_start=given.weight)
    train, test = labelled_images(given.name, given.data, config.size, config.channels)
    judge = train_features(train, test, images_seen=100_000 if len(train) > 10_000 else 40_000)
    given.page.mkdir(parents=True, exist_ok=True)
    path = given.page / f"{given.name}.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    stored |= {"floor": floor(judge, train, test), "config": dataclasses.asdict(config)}
    for seed in range(given.seeds):
        for way, changes in WAYS.items():
            if any(row["seed"] == seed and row["way"] == way for row in stored["rows"]):
                continue
            run = given.runs / f"{given.name}-{way}-{seed}"
            train_ec_flow(dataclasses.replace(config, seed=seed, **changes), train, run, progress=False)
            stored["rows"].append({"seed": seed, "way": way, **judged(run, judge, train, test)})
            print(stored["rows"][-1], flush=True)
            write_json(path, stored | {"machine": machine_facts("cpu")})
    grids = [(f"{way}, seed 0", load_ec_flow(given.runs / f"{given.name}-{way}-0").sample(100)) for way in WAYS]
    save_panels(given.page / f"{given.name}.png", grids)
    readme = given.page / "README.md"
    begin, end = f"<!-- {given.name}: made by benchmarks/calibrated_flow.py -->", f"<!-- {given.name}: end -->"
    text = readme.read_text() if readme.exists() else "# Calibrated flow\n"
    text = text if begin in text else f"{text}\n{begin}\n{end}\n"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    readme.write_text(pattern.sub(lambda _: f"{begin}\n\n{table(given.name, stored)}\n\n{end}", text))


if __name__ == "__main__":
    main()
