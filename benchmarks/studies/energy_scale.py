"""How far chains of coarse-to-fine runs lower the energy at each resolution, beside what their way alone predicts.

    python -m benchmarks.studies.energy_scale runs/zebra64/seed-0 ...       fills docs/results/zebra64

A step of size η moves an image by η times the gradient. If all K steps of a chain went the same way, to a point at the
distance d, the energy would fall by d² / (ηK).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.pages import PAGES, RESULTS, add_entry
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.sampling.sampler import Energy
from fastebm.training.coarse_to_fine.run import CoarseToFineRun

CHAINS = 64
PAGE = "zebra64"


def falls(
    energies: Mapping[int, Energy], ends: Mapping[int, Tensor], step_sizes: Mapping[int, float], num_steps: int
) -> list[dict[str, Any]]:
    """A row for each level above the lowest: the mean fall of the energy along its chains, and their squared way.

    Args:
        energies: the energy of each level, by size.
        ends: images (B, C, s, s) at the end of each level, by size.
        step_sizes: the step size of the chains at each level, by size.
    """
    rows, sizes = [], sorted(ends)
    for lower, size in itertools.pairwise(sizes):
        start, end = F.interpolate(ends[lower].clamp(-1, 1), scale_factor=2, mode="nearest"), ends[size]
        with torch.no_grad():
            fall = (energies[size](start) - energies[size](end)).mean()
        way = (end - start).square().flatten(1).sum(1).mean()
        predicted = way / (step_sizes[size] * num_steps)
        rows.append(
            {
                "size": size,
                "step_size": step_sizes[size],
                "fall": fall.item(),
                "squared_way": way.item(),
                "predicted": predicted.item(),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of coarse-to-fine runs of the variant cascade")
    rows = []
    for path in parser.parse_args(arguments).runs:
        run = CoarseToFineRun.load(path)
        num_steps, step_sizes = run.config.num_steps, {size: run.config.step_size_at(size) for size in run.levels}
        ends = run.cascade().sample_levels(CHAINS, 0, channels=run.config.channels)
        rows += [
            {"run": path.name, "num_steps": num_steps} | row for row in falls(run.levels, ends, step_sizes, num_steps)
        ]
    entry = {"rows": rows, "chains": CHAINS, "machine": machine_facts("cpu")}
    add_entry(RESULTS / PAGE, "energy-scale", entry, PAGES[PAGE])


if __name__ == "__main__":
    main()
