"""What calibration does to a flow: the same flow with and without it, as many updates, some seeds, judged alike.

    python -m benchmarks.studies.calibrated_flow digits docs/results/ec-flow [--seeds 3] [--iterations 600]

The name is that of a preset of `fastebm train ec-flow`. Judged are bits per dimension of held-out images, which may
rise by MARGIN at most, and samples at temperature 1 in the features of the classifier that `fastebm evaluate` trains
(not comparable to published FID), beside the same distance between real images; their high-frequency energy beside
that of real images; and as "inverse" the largest |decode(encode(x)) - x| over held-out images x, in float32. Finished
rows are kept in NAME.json, and only missing ones are run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.sample_metrics import SAMPLES, Judge, Row
from benchmarks.studies.seeds import Comparison, gain, in_order, other_size, pairs
from fastebm.data import Images, to_float
from fastebm.models import Flow
from fastebm.plotting import save_panels
from fastebm.runs.folder import RunFolder
from fastebm.training import EcFlowConfig, EcFlowRun, train
from fastebm.training.ec_flow.presets import EC_FLOW_PRESETS

MARGIN = 0.05
WAYS: dict[str, dict[str, Any]] = {"plain": {"lambda_start": 0.0, "dual_rate": 0.0}, "calibrated": {}}


def train_quietly(config: EcFlowConfig, images: Images, run_dir: Path) -> None:
    train(config, images, run_dir, progress=False)


@torch.no_grad()
def inverse_error(flow: Flow, images: Tensor) -> float:
    """The largest |decode(encode(x)) - x|."""
    return max(float((flow.decode(flow.encode(part)[0]) - part).abs().max()) for part in images.split(1000))


def judged(run_dir: Path, config: EcFlowConfig, evaluate_samples: Judge) -> Row:
    """The numbers of one run."""
    run = EcFlowRun.load(run_dir)
    line = RunFolder.existing(run_dir).log.lines()[-1]
    return {
        "bits": float(run.bits_per_dimension(to_float(evaluate_samples.test.pixels)).mean()),
        "bits_train": float(run.bits_per_dimension(evaluate_samples.real()).mean()),
        "inverse": inverse_error(run.flow, to_float(evaluate_samples.test.pixels)),
        **evaluate_samples.samples(run.sample(SAMPLES)),
        "seconds": line["seconds"],
        "calibration": line.get("calibration"),
        "noise_floor": line.get("noise_floor"),
    }


def table(name: str, stored: dict[str, Any]) -> str:
    """Rows by seed, then what calibration changed."""
    base, rows = stored["reference"], stored["rows"]
    size = other_size(stored["config"], EC_FLOW_PRESETS[name])
    lines = [
        f"{name}{size}: {stored['config']['iterations']} updates of batch {stored['config']['batch_size']}. The judge "
        f"is right on {base['accuracy']:.1%} of unseen images and sure of {base['confident']:.0%} of them; between "
        f"train and test images the distance is {base['distance']:.3g}, of uniform noise {base['noise']:.3g} (not "
        "comparable to published FID).",
        "",
        "| seed | flow | bits/dim, unseen | bits/dim, train | distance | sure of | high freq., real = 1 | inverse | "
        "minutes |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in in_order(rows):
        inverse = f"{row['inverse']:.1e}" if "inverse" in row else "not measured"  # of rows that are older than it
        lines.append(
            f"| {row['seed']} | {row['way']} | {row['bits']:.3f} | {row['bits_train']:.3f} | {row['distance']:.3g} | "
            f"{row['confident']:.0%} | {row['sharpness']:.2f} | {inverse} | "
            f"{row['seconds'] / 60:.1f} |"
        )
    both = pairs(rows, "calibrated")
    if len(both) > 1:
        costs = [calibrated["bits"] - plain["bits"] for plain, calibrated in both]
        lines += [
            "",
            f"Calibration brings samples nearer {gain(both, 'distance')}. Unseen bits/dim change by {min(costs):+.3f} "
            f"to {max(costs):+.3f}; the margin of {MARGIN} is {'kept' if max(costs) <= MARGIN else 'not kept'}.",
        ]
    return "\n".join(lines)


def pictured(page: Path, name: str, runs: dict[str, Path]) -> None:
    if len(runs) == len(WAYS):  # one picture for all of them
        grids = [(f"{way}, seed 0", EcFlowRun.load(run).sample(100)) for way, run in runs.items()]
        save_panels(page / f"{name}.png", grids)


def main() -> None:
    title = "Calibrated flow"
    comparison = Comparison(Path(__file__).name, title, EC_FLOW_PRESETS, WAYS, train_quietly, judged, table, pictured)
    parser = comparison.parser(__doc__, "runs/calibrated-flow")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--weight", type=float, help="another weight of the calibration than the preset's")
    given = parser.parse_args()
    if given.iterations:
        given.set = [*given.set, f"iterations={given.iterations}"]
    if given.weight is not None:
        given.set = [*given.set, f"lambda_start={given.weight}"]
    comparison.run(given)


if __name__ == "__main__":
    main()
