"""Counts what lies between `sample()` and the first replay of a graph, against the recorder; nothing is timed.

`python -m tests.gpu.chain_start` prints the rows of `docs/results/gpu-model/chain-start.md`.
"""

from __future__ import annotations

import torch
from torch import nn

from fastebm import Langevin, ops
from fastebm.models import CoarseToFineEnergy
from fastebm.ops import device_hash
from tests.gpu.graph_recorder import Counts, GraphRecorder

HEAD = """\
| energy | first chain | same weights | other weights | again | from then on | 9 updates | between and after |
|---|---|---|---|---|---|---|---|"""


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 4, 2, 1), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 1), nn.Flatten(0)).eval()


ENERGIES = {
    "CF-EBM 8x8": (lambda: CoarseToFineEnergy(8, base_width=8), 8),
    "CF-EBM 32x32": (lambda: CoarseToFineEnergy(32, base_width=4), 32),
    "three layers 8x8": (convolutions, 8),
}


def counted(energy: nn.Module, size: int) -> tuple[list[Counts], Counts]:
    """What lies before the first replay of five chains, and what comes after it in the last one."""
    recorder, found = GraphRecorder(), []
    device_hash._multipliers.cache_clear()
    sampler = Langevin(energy, 0.5, 0.01, clamp=(-1, 1), engine="fused")
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0), device="cpu") - 0.5
    # The reference reads weights in the layout that GPUs do.
    with ops.backend("reference"), recorder.installed():
        x = x.clone()
        for new in (False, False, True, True, True):
            if new:
                with torch.no_grad():
                    for parameter in energy.parameters():
                        parameter.mul_(1.01)
            recorder.start_counting()
            sampler.sample(x, 9, seed=3)
            assert recorder.first_replay is not None
            found.append(recorder.first_replay)
    return found, recorder.counts


def rows() -> list[str]:
    """The rows of the table."""
    lines = []
    for name, (make, size) in ENERGIES.items():
        torch.manual_seed(0)
        chains, after = counted(make(), size)
        lines.append(f"| {name} | {' | '.join(map(str, chains))} | {after.replays} | {after} |")
    return lines


if __name__ == "__main__":
    print("\n".join([HEAD, *rows()]))
