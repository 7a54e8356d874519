"""Measures translation: which share of the source images a classifier takes for the target, before and after chains.

    python -m benchmarks.studies.translation runs/zebra --source horses.npz --target zebras.npz

The run is of the target domain. The classifier is the small one of `fastebm evaluate`, trained on both domains' train
images at the run's size. For each setting the table also has the mean change of a pixel, and the correlation of images
averaged down to a quarter with their sources, which says whether things are still where they were. The numbers become
the entry of the run's name on the page. Only translated images are shown, because sources may be others'.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.pages import RESULTS, add_entry, translation_sections
from fastebm.data import Images, open_images, to_float
from fastebm.evaluation import train_features
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.plotting import save_grid
from fastebm.tasks import TranslateOptions, translate
from fastebm.tasks.inputs import training_step_size
from fastebm.training import CoarseToFineRun

PULLS = (0.0, 0.03)
"""Data weights, times the step size of the run's training: the share of the way back that a step goes."""
LONGER = (2, 3)
"""Lengths of further chains at full size without a data term, in chains of the training."""
SHOWN = 40


def correlation(images: Tensor, sources: Tensor) -> float:
    """The mean correlation of images with their sources, both averaged down to a quarter."""
    small = [F.avg_pool2d(x, 4).flatten(1) for x in (images, sources)]
    centred = [x - x.mean(1, keepdim=True) for x in small]
    return float(F.cosine_similarity(*centred).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--page", type=Path, default=RESULTS / "translation")
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--images-seen", type=int, default=60_000, help="by the classifier, over all epochs")
    parser.add_argument(
        "--starts", type=int, nargs="+", help="sizes at which chains start, by default all of the run's"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    run, name = CoarseToFineRun.load(options.run), options.run.resolve().name
    wanted: dict[str, Any] = {"size": run.size, "channels": run.config.channels}
    train, test = (
        [open_images(p, split=part, **wanted) for p in (options.source, options.target)] for part in ("train", "test")
    )
    classifier = train_features(*(concatenate(*domains) for domains in (train, test)), images_seen=options.images_seen)
    sources = to_float(test[0].pixels)

    def target_share(images: Tensor) -> float:
        return float((classifier(images).probabilities[:, 1] > 0.5).double().mean())

    def measure(images: Tensor) -> dict[str, float]:
        return {
            "classified_as_target": target_share(images),
            "change": float((images - sources).abs().mean()),
            "correlation": correlation(images, sources),
        }

    rows: list[dict[str, Any]] = [{"chains": "sources", **measure(sources)}]
    starts = [
        None if size == run.size else size
        for size in sorted(run.levels, reverse=True)
        if options.starts is None or size in options.starts
    ]
    step_size = training_step_size(run)
    options.page.mkdir(parents=True, exist_ok=True)
    settings = [(*pair, 1) for pair in itertools.product(starts, PULLS)]
    settings += [(None, 0.0, times) for times in LONGER if None in starts]
    for start, pull, times in settings:
        data_weight, num_steps = pull / step_size, times * run.config.num_steps
        how = TranslateOptions(num_steps, step_size, start_size=start, data_weight=data_weight)
        images = translate(run, sources, how).images
        chains = f"from {start or run.size}, data weight {data_weight:g}"
        longer = f", {num_steps} updates" if times > 1 else ""
        what = {
            "chains": chains + longer,
            "num_steps": num_steps,
            "start_size": start or run.size,
            "data_weight": data_weight,
        }
        rows.append(what | measure(images))
        print(rows[-1], flush=True)
        if not data_weight:
            steps = f"-{num_steps}-steps" if times > 1 else ""
            save_grid(options.page / f"{name}-from-{start or run.size}{steps}.png", images[:SHOWN])
    samples = run.sample(len(sources))
    save_grid(options.page / f"{name}-samples.png", samples[:SHOWN])
    entry = {
        "images": len(sources),
        "num_steps": run.config.num_steps,
        "size": run.size,
        "classifier_accuracy": classifier.accuracy,
        "samples_classified_as_target": target_share(samples),
        "rows": rows,
        "machine": machine_facts("cpu"),
    }
    add_entry(options.page, name, entry, translation_sections)


def concatenate(source: Images, target: Images) -> Images:
    """Both domains as one labelled set: 0 is the source."""
    labels = torch.arange(2).repeat_interleave(torch.tensor([len(source), len(target)]))
    return Images(torch.cat((source.pixels, target.pixels)), labels)


if __name__ == "__main__":
    main()
