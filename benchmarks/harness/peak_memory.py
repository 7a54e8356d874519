"""The peak memory of one energy gradient, in this process alone: `python -m benchmarks.harness.peak_memory '{"who": ...}'`.

The argument is a workload as JSON, and `who` runs it: "fastebm" or "autograd". Printed are bytes beyond what the
process held with net and samples in memory. The gradient that is measured is the second: the first one captures and
verifies. On a CPU it is resident memory, whose peak Linux lets a process reset; on a GPU what the allocator handed out.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastebm
from benchmarks.harness import nets
from benchmarks.harness.workloads import Workload, images
from fastebm.evaluation.speed.baselines import tuned_eager
from fastebm.evaluation.speed.eager import stock


class ResidentMemory:
    """This process's resident memory as Linux counts it."""

    def now(self) -> int:
        self._trim()
        return self._field("VmRSS")

    def reset_peak(self) -> None:
        self._trim()
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return self._field("VmHWM")

    def _trim(self) -> None:
        # What was freed is given back, so that it isn't taken for something still in use.
        ctypes.CDLL(None).malloc_trim(0)

    def _field(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class GpuMemory:
    """What the allocator of PyTorch has handed out."""

    def now(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def peak_bytes(work: Workload, who: str) -> int:
    net = nets.made(work.case, work.shape, work.device)
    x = images(work)
    memory: ResidentMemory | GpuMemory = GpuMemory() if work.device == "cuda" else ResidentMemory()
    _bring_in_libraries(work, x[:1, :, :8, :8])
    before = memory.now()
    if who == "fastebm":
        gradient: Any = fastebm.energy_gradient(net, dtype=work.precision, engine=work.engine)
    else:
        gradient = tuned_eager(stock(net), work.precision, "cast").gradient
    gradient(x)
    memory.reset_peak()
    gradient(x)
    return memory.peak() - before


def _bring_in_libraries(work: Workload, x: Tensor) -> None:
    """Takes a gradient of a tiny energy, so that thread pools and modules that a capture imports are there before."""
    tiny = nn.Sequential(nn.Conv2d(x.shape[1], 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 64, 1))
    fastebm.energy_gradient(tiny.to(work.device), dtype=work.precision, engine=work.engine)(x)


def main(question: dict[str, Any]) -> None:
    work = Workload.from_json({name: value for name, value in question.items() if name != "who"})
    print(json.dumps({"bytes": peak_bytes(work, question["who"])}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
