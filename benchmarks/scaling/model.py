"""A model of training and sampling on 1 to 1,000 GPUs. Nothing here is measured: the assumptions are constants.

    python -m benchmarks.scaling.model

Operations of CF-EBM's net are counted by PyTorch's FlopCounterMode. A machine is described by a rate of operations and
by two links.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastebm.evaluation.speed.table import markdown_table
from fastebm.models import CoarseToFineEnergy
from fastebm.runs.nets import outline

FLOPS = 100e12
"""Operations a second that a GPU sustains in these nets, in bfloat16; about a tenth of an H100's peak."""
NODE, IN_NODE, BETWEEN = 8, 300e9, 50e9
"""GPUs in a machine, and bytes a second of each GPU's link: within the machine, and to other machines (400 Gb/s)."""
LATENCY = 20e-6
"""Seconds of one step of an exchange; a sum over N GPUs takes 2 log2(N) of them."""
RANKS = (1, 8, 64, 256, 1000)
BASE_WIDTH = 32


@dataclass(frozen=True)
class Case:
    """Training at one resolution: images of a GPU in an update, and the chain steps of each of them."""

    size: int
    images: int
    steps: int = 30


CASES = (Case(32, 64), Case(64, 32), Case(128, 16), Case(256, 8))


@dataclass(frozen=True)
class Counts:
    """Of one image: operations of a chain step, and of an update without its chains; and bytes of all gradients."""

    step: float
    update: float
    gradients: int


@cache
def counts(size: int) -> Counts:
    """From the operations of a forward pass F, counted on a net without memory, as its code has it.

    A chain step is F and as much for the gradient of the image. An update needs, of an image and of the end of a chain,
    F and as much for each of the gradients of maps and of weights.
    """
    net = outline(lambda: CoarseToFineEnergy(size, 3, base_width=BASE_WIDTH))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.empty(1, 3, size, size, device="meta"))
    forward = float(counter.get_total_flops())
    return Counts(2 * forward, 2 * 3 * forward, 4 * sum(weight.numel() for weight in net.parameters_at(size)))


def all_reduce(ranks: int, sent: float) -> float:
    """Seconds of a sum over all ranks: a ring, whose slowest link counts."""
    if ranks == 1:
        return 0.0
    link = IN_NODE if ranks <= NODE else BETWEEN
    return 2 * (ranks - 1) / ranks * sent / link + 2 * math.ceil(math.log2(ranks)) * LATENCY


def seconds(case: Case, ranks: int, steps: int) -> tuple[float, float]:
    """Of one update on `ranks` GPUs: computing, and exchange, which overlaps with nothing."""
    of = counts(case.size)
    return case.images * (steps * of.step + of.update) / FLOPS, all_reduce(ranks, of.gradients)


def efficiency(case: Case, ranks: int, steps: int) -> str:
    computing, exchange = seconds(case, ranks, steps)
    return f"{computing / (computing + exchange):.1%}"


def training_table() -> str:
    """A line for each resolution: what an update computes and sends, and the share of the time that is computing."""
    lines = []
    for case in CASES:
        of = counts(case.size)
        computing, _ = seconds(case, 1, case.steps)
        lines.append(
            (
                f"{case.size}x{case.size}, {case.images} images a GPU",
                f"{case.steps}",
                f"{of.gradients / 2**20:.1f} MiB",
                f"{computing * 1e3:.0f} ms",
                *(efficiency(case, ranks, case.steps) for ranks in RANKS[1:]),
                efficiency(case, RANKS[-1], 0),
            )
        )
    head = ("update", "chain steps an all-reduce", "bytes an all-reduce", "computing")
    gpus = tuple(f"{ranks:,} GPUs" for ranks in RANKS[1:])
    return markdown_table((*head, *gpus, f"{RANKS[-1]:,} GPUs without chains"), lines, words=1)


def sampling_table() -> str:
    """A line for each resolution: samples of which each GPU draws its share, and rank 0 receives them all, as bytes."""
    lines = []
    for case in CASES:
        of = counts(case.size)
        sent = 3 * case.size**2
        each = case.steps * of.step / FLOPS
        shares = []
        for ranks in RANKS[1:]:
            computing, exchange = each / ranks, sent / (IN_NODE if ranks <= NODE else BETWEEN)
            shares.append(f"{computing / (computing + exchange):.1%}")
        lines.append(
            (f"{case.size}x{case.size}", f"{case.steps}", f"{sent / 2**10:.0f} KiB", f"{each * 1e3:.2f} ms", *shares)
        )
    head = ("samples", "chain steps each", "bytes each", "computing each")
    return markdown_table((*head, *(f"{ranks:,} GPUs" for ranks in RANKS[1:])), lines, words=1)


def assumptions() -> str:
    return (
        f"Assumed: a GPU sustains {FLOPS / 1e12:g} TFLOP/s; {NODE} GPUs in a machine, linked at {IN_NODE / 1e9:g} GB/s "
        f"each, and at {BETWEEN / 1e9:g} GB/s to other machines; {LATENCY * 1e6:g} µs for a step of an exchange; "
        f"gradients in float32, summed by a ring, while nothing is computed; CF-EBM of base width {BASE_WIDTH}."
    )


def main() -> None:
    print(assumptions(), training_table(), sampling_table(), sep="\n\n")


if __name__ == "__main__":
    main()
