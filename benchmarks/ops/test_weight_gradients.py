"""`weight_gradients_` of one convolution against PyTorch's in channels-last, at sizes that CF-EBM has.

Ours sums image by image in order, each times a factor of its own, and adds to what is there; the peer sums a batch.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.harness.workloads import Workload, noise
from fastebm.compiler.cost_model import Cost
from fastebm.evaluation.speed import Candidate, Plan, Row, compare
from fastebm.ops import WeightKind, WeightTask, encode_tasks, weight_gradients_
from fastebm.ops.instructions import (
    Buffer,
    Epilogue,
    EpilogueOp,
    Header,
    Instruction,
    Kind,
    Layout,
    PlannedProgram,
    Segment,
    encode,
)
from fastebm.ops.weight_gradients import buffer_image

# Case: kernel. Shapes are (channels, size, size), to as many channels.
CASES = {"3x3": 3, "1x1": 1}
SHAPES = ((128, 4, 4), (128, 8, 8), (128, 16, 16), (128, 32, 32))


def workloads(device: str, full: bool) -> list[Workload]:
    cases, dtypes = (tuple(CASES), ("float32", "bfloat16")) if full else (("3x3",), ("float32", "bfloat16"))
    return [
        Workload("weight_gradients", case, shape, batch, dtype)
        for case in cases
        for dtype in dtypes
        for shape in SHAPES
        for batch in ((16, 64) if full else (16,))
    ]


def planned(work: Workload) -> PlannedProgram:
    """A program that keeps two buffers of the workload's shape: the gradient and the source, in that order."""
    channels, height, width = work.shape
    size, workers = work.precision.itemsize, torch.get_num_threads() if work.device == "cpu" else 1
    chunk = -(-work.batch // workers)
    lines = -(-height * width * channels * size // 64)
    image = (lines + (lines % 2 == 0)) * 64 // size  # an odd number of cache lines, as plans have it
    whole = -(-chunk * image * size // 4096) * 4096
    strides = {"pixel_stride": channels, "row_stride": width * channels, "image_stride": image}
    buffers = tuple(Buffer(channels, height, width, size, chunk, offset=offset, **strides) for offset in (0, whole))
    grid = {"channels": channels, "height": height, "width": width}
    loads = tuple(Instruction(Kind.LOAD, first=b, count=1, **grid) for b in (0, 1))
    stores = tuple(Epilogue(EpilogueOp.STORE, b) for b in (0, 1))
    layout, panel = (Layout.PANELS, 16) if work.device == "cpu" else (Layout.PLAIN, 0)
    header = Header(layout, panel, size, chunk, 2 * whole, workers)
    return PlannedProgram(header, buffers, loads, stores, (Segment(0, 2, chunk),))


def workspace(program: PlannedProgram, images: tuple[Tensor, Tensor]) -> Tensor:
    """The workspace as a program leaves it."""
    size = program.header.slot * program.header.workers
    memory = torch.zeros(size, dtype=torch.uint8, device=images[0].device)
    for buffer, values in enumerate(images):
        for n, image in enumerate(values):
            buffer_image(program, memory, buffer, n).copy_(image.permute(1, 2, 0))
    return memory


def test_weight_gradients(measure, work):
    if measure.base is not None:
        pytest.skip("programs are no part of the public face, which is what another revision is measured by")
    kernel, (channels, height, width) = CASES[work.case], work.shape
    pad = kernel // 2
    gradient, source = (noise(work, seed).contiguous(memory_format=torch.channels_last) for seed in (0, 1))
    program, factors = planned(work), torch.ones(work.batch, device=work.device)
    window = (height, width, kernel, kernel, 1, 1, pad, pad)
    tasks = encode_tasks([WeightTask(WeightKind.CONVOLUTION, 0, 0, 0, channels, 1, 0, channels, *window)])
    results = [torch.zeros(kernel**2, channels, channels, device=work.device)]
    code, memory = encode(program), workspace(program, (gradient, source))
    shape = (channels, channels, kernel, kernel)

    def ours() -> None:
        weight_gradients_(results, factors, code, tasks, memory)

    def eager() -> Tensor:
        return torch.nn.grad.conv2d_weight(source, shape, gradient, padding=pad)

    flops = 2 * math.prod(work.shape) * channels * kernel**2
    moved = 2 * math.prod(work.shape) * work.precision.itemsize

    def compared(work: Workload, plan: Plan) -> list[Row]:
        baselines = {"eager": [lambda: Candidate("", eager)]}
        with torch.no_grad():
            return compare(plan, Candidate("", ours), baselines, unit="call", cost=lambda: Cost(flops, moved))

    measure(work, compared)
