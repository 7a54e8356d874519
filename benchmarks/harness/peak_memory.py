"""Measures the peak memory of one energy gradient, or of the gradient of the weights, in a process of its own.

    python -m benchmarks.harness.peak_memory '{"implementation": "fastebm", ...}'

The argument is a workload as JSON with the implementation that runs it, "fastebm" or "autograd", and `of`, "x" or
"weights". The process prints the bytes at the peak beyond what it held with net and samples in memory. It measures the
second gradient, because the first one captures and verifies. On a CPU this is resident memory, whose peak Linux lets a
process reset; on a GPU it is what PyTorch's allocator handed out.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastebm
from benchmarks.harness import nets
from benchmarks.harness.pages import ROOT
from benchmarks.harness.workloads import Workload, images
from fastebm.evaluation.speed.baselines import tuned_eager
from fastebm.evaluation.speed.eager import eager_twin


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
        # Returns freed memory to the system, so that it does not count as used.
        ctypes.CDLL(None).malloc_trim(0)

    def _field(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class GpuMemory:
    """The memory that PyTorch's allocator has handed out."""

    def now(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def in_fresh_process(module: str, *arguments: str) -> Any:
    """The JSON in the last line that `python -m MODULE ARGUMENTS` prints. Raises RuntimeError where that fails."""
    # malloc maps every block from 64 kB on by itself, so that freed memory leaves the process at once.
    settings = {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_bytes(work: Workload, implementation: str, of: str) -> int:
    net = nets.build(work.case, work.shape, work.device)
    x = images(work)
    memory: ResidentMemory | GpuMemory = GpuMemory() if work.device == "cuda" else ResidentMemory()
    _load_libraries(work, x[:1, :, :8, :8])
    before = memory.now()
    if of == "weights":
        gradient: Any = _of_weights(work, implementation, net)
    elif implementation == "fastebm":
        gradient = fastebm.energy_gradient(net, dtype=work.precision, engine=work.engine)
    else:
        gradient = tuned_eager(eager_twin(net), work.precision, "cast").gradient
    gradient(x)
    memory.reset_peak()
    gradient(x)
    return memory.peak() - before


def _of_weights(work: Workload, implementation: str, net: nn.Module) -> Callable[[Tensor], object]:
    """The gradient of the weights in train mode, as an update takes it; autograd under autocast, in channels-last."""
    cotangent = torch.ones(work.batch, device=work.device)
    if implementation == "fastebm":
        ours = fastebm.weight_gradient(net.train(), dtype=work.precision, engine=work.engine)
        return lambda x: ours(x, cotangent)
    twin = eager_twin(net.train())
    assert isinstance(twin, nn.Module)
    twin.requires_grad_(True).to(memory_format=torch.channels_last)
    low = work.precision is not torch.float32

    def update(x: Tensor) -> object:
        with torch.autocast(work.device, dtype=torch.bfloat16, enabled=low):
            energies = twin(x.contiguous(memory_format=torch.channels_last)).float()
        return torch.autograd.grad(energies, list(twin.parameters()), cotangent, allow_unused=True)

    return update


def _load_libraries(work: Workload, x: Tensor) -> None:
    """Takes a gradient of a tiny energy, which starts thread pools and imports the modules that a capture needs."""
    tiny = nn.Sequential(nn.Conv2d(x.shape[1], 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 64, 1))
    fastebm.energy_gradient(tiny.to(work.device), dtype=work.precision, engine=work.engine)(x)


def main(question: dict[str, Any]) -> None:
    implementation, of = question.pop("implementation"), question.pop("of", "x")
    print(json.dumps({"bytes": peak_bytes(Workload.from_json(question), implementation, of)}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
