"""How far chains carry images over: what a classifier of the two domains takes them for, before and after.

    python -m benchmarks.studies.translation runs/zebra docs/results/translation --source horses.npz --target zebras.npz

The run is of the target domain. The classifier is the small one of `fastebm evaluate`, trained on both domains' train
images at the run's size; it says which share of the source's test images it takes for the target, before and after
chains with each setting, beside how much a pixel was changed and how much of the source is left (the correlation of
images averaged down to a quarter, which says where things are). The numbers are kept in the run's name and fill its
table of the page. Only what came out is shown: sources may be others'.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.readme_sections import fill
from fastebm.data import Images, open_images, to_float
from fastebm.evaluation import train_features
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.plotting import save_grid
from fastebm.runs.files import write_json
from fastebm.tasks import TranslateOptions, translate
from fastebm.training import CoarseToFineRun

DATA_WEIGHTS = (0.0, 0.03)
SHOWN = 40


def likeness(images: Tensor, sources: Tensor) -> float:
    """The mean correlation of images with their sources, of both a quarter as large."""
    small = [F.avg_pool2d(x, 4).flatten(1) for x in (images, sources)]
    centred = [x - x.mean(1, keepdim=True) for x in small]
    return float(F.cosine_similarity(*centred).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    run, name = CoarseToFineRun.load(given.run), given.run.resolve().name
    wanted: dict[str, Any] = {"size": run.size, "channels": run.config.channels}
    train, test = (
        [open_images(p, split=part, **wanted) for p in (given.source, given.target)] for part in ("train", "test")
    )
    evaluate_samples = train_features(*(joined(*domains) for domains in (train, test)), images_seen=60_000)
    sources = to_float(test[0].pixels)

    def taken_for_target(images: Tensor) -> float:
        return float((evaluate_samples(images).probabilities[:, 1] > 0.5).double().mean())

    def measured(images: Tensor) -> dict[str, float]:
        return {
            "taken_for_target": taken_for_target(images),
            "change": float((images - sources).abs().mean()),
            "likeness": likeness(images, sources),
        }

    rows: list[dict[str, Any]] = [{"way": "sources", **measured(sources)}]
    starts = [None, *sorted(run.levels, reverse=True)[1:]]
    given.page.mkdir(parents=True, exist_ok=True)
    for start, data_weight in itertools.product(starts, DATA_WEIGHTS):
        options = TranslateOptions(num_steps=run.config.num_steps, start_size=start, data_weight=data_weight)
        images = translate(run, sources, options).images
        way = f"from {start or run.size}, data weight {data_weight:g}"
        rows.append({"way": way, "start_size": start or run.size, "data_weight": data_weight, **measured(images)})
        print(rows[-1], flush=True)
        if not data_weight:
            save_grid(given.page / f"{name}-from-{start or run.size}.png", images[:SHOWN])
    samples = run.sample(len(sources))
    found = {
        "images": len(sources),
        "num_steps": run.config.num_steps,
        "size": run.size,
        "judge_accuracy": evaluate_samples.accuracy,
        "samples_taken_for_target": taken_for_target(samples),
        "rows": rows,
        "machine": machine_facts("cpu"),
    }
    write_json(given.page / f"{name}.json", found)
    save_grid(given.page / f"{name}-samples.png", samples[:SHOWN])
    fill(given.page / "README.md", "Translation", name, Path(__file__).name, table(found))


def joined(source: Images, target: Images) -> Images:
    """Both domains as one labelled set: 0 is the source."""
    labels = torch.arange(2).repeat_interleave(torch.tensor([len(source), len(target)]))
    return Images(torch.cat((source.pixels, target.pixels)), labels)


def table(found: dict[str, Any]) -> str:
    """A row for each setting."""
    head = (
        f"{found['images']} test images at {found['size']}x{found['size']}, {found['steps']} updates a level. The "
        f"classifier is right on {found['judge_accuracy']:.0%} of unseen images of both domains, and takes "
        f"{found['samples_taken_for_target']:.0%} of the run's own samples for the target."
    )
    lines = [
        head,
        "",
        "| chains | taken for the target | change of a pixel | likeness to the source |",
        "|---|---:|---:|---:|",
    ]
    for row in found["rows"]:
        lines.append(f"| {row['way']} | {row['taken_for_target']:.0%} | {row['change']:.3f} | {row['likeness']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
