"""The peak memory of the gradient of the weights of CF-EBM at 256x256, in train mode: ours against autograd."""

from __future__ import annotations

import dataclasses

from benchmarks.end_to_end import test_memory
from benchmarks.end_to_end.test_memory import OF_WEIGHTS
from benchmarks.harness.workloads import Workload


def workloads(device: str, full: bool) -> list[Workload]:
    return [dataclasses.replace(work, suite=OF_WEIGHTS) for work in test_memory.workloads(device, full)]


def test_update_memory(request, measure, work):
    test_memory.test_memory(request, measure, work)
