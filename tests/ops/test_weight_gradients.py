"""`fastebm::weight_gradients_`: gradients of weights from a program's buffers, against PyTorch's own in float64."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastebm import ops
from fastebm.ops.backends import _extension as _C
from fastebm.ops.instructions import Epilogue, EpilogueOp, Layout, PlannedProgram, Segment, decode, encode
from fastebm.ops.weight_gradients import (
    WeightKind,
    WeightTask,
    checked_tasks,
    decode_tasks,
    encode_tasks,
    weight_gradients_,
)
from tests.ops.precision import relative_error
from tests.ops.small_lowered_programs import ProgramBuilder
from tests.ops.weight_workspaces import Lying, program_of, rounded, split_into_calls, without, workspace_of

CONVOLUTION, SUM, PRODUCT = WeightKind
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
VARIANTS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
both_sizes = pytest.mark.parametrize("size", [4, 2], ids=["float32", "bfloat16"])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors_of(images: int) -> Tensor:
    return numbers(images, seed=99).float().double()


# What PyTorch makes of it ---------------------------------------------------------------------------------------------


def seen(stored: Tensor, channel: int, count: int, broadcast: int, factors: tuple[int, int], size: Any) -> Tensor:
    """What a task means by the images (n, channels, height, width) of a buffer."""
    part = stored[:, channel : channel + (1 if broadcast else count)].expand(-1, count, -1, -1)
    part = part.repeat_interleave(factors[0], 2).repeat_interleave(factors[1], 3)
    return part if size is None else part[:, :, : size[0], : size[1]]


def truth(t: WeightTask, images: Sequence[Tensor], factors: Tensor) -> Tensor:
    """The gradient of sum over n of factors[n] * energy[n], by autograd through PyTorch's convolution, in float64."""
    enlarged = (t.gradient_factor_y, t.gradient_factor_x)
    stored = images[t.gradient_buffer].double()
    g = seen(stored, t.gradient_channel, t.out, t.gradient_broadcast, enlarged, (t.height, t.width))
    g = g * factors.view(-1, 1, 1, 1)
    enlarged = (t.source_factor_y, t.source_factor_x)
    if t.kind == SUM:
        product = g
    elif t.kind == PRODUCT:
        stored, size = images[t.source_buffer].double(), (t.height, t.width)
        product = g * seen(stored, t.source_channel, t.out, t.source_broadcast, enlarged, size)
    else:
        stored = images[t.source_buffer].double()
        size = (t.source_height or 1 << 20, t.source_width or 1 << 20)
        source = seen(stored, t.source_channel, t.inner, t.source_broadcast, enlarged, size)
        weight = torch.zeros(t.out, t.inner, t.kernel_y, t.kernel_x, dtype=torch.float64, requires_grad=True)
        reach = [
            (n - 1) * s + (k - 1) * d + 1 - p - have
            for n, s, k, d, p, have in (
                (t.height, t.stride_y, t.kernel_y, t.dilation_y, t.pad_y, source.shape[2]),
                (t.width, t.stride_x, t.kernel_x, t.dilation_x, t.pad_x, source.shape[3]),
            )
        ]
        beside = (t.pad_x, reach[1], t.pad_y, reach[0])  # negative where windows leave out the border
        padded = F.pad(F.pad(source, [max(0, n) for n in beside]), [min(0, n) for n in beside])
        there = F.conv2d(padded, weight, None, (t.stride_y, t.stride_x), 0, (t.dilation_y, t.dilation_x))
        (gradient,) = torch.autograd.grad(there, weight, g)
        return gradient.permute(2, 3, 0, 1).reshape(t.result_shape())
    return (
        (product.sum(0) if t.per_pixel else product.sum((0, 2, 3)).view(-1, 1, 1))
        .permute(1, 2, 0)
        .reshape(t.result_shape())
    )


def fresh_results(tasks: Sequence[WeightTask], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    shapes = {task.result: task.result_shape() for task in tasks}
    return [torch.zeros(shapes[r], dtype=dtype, device=device) for r in range(len(shapes))]


def assert_right(
    tasks: Sequence[WeightTask],
    shapes: Sequence[tuple[int, int, int]],
    lying: Lying,
    device: str = "cpu",
    images: int = 3,
    seed: int = 0,
) -> None:
    """The results of tasks over buffers of such shapes are those of PyTorch."""
    program = program_of(shapes, lying)
    values = [rounded(numbers(images, *shape, seed=seed + k), lying.bytes) for k, shape in enumerate(shapes)]
    factors, dtype = factors_of(images), torch.float64 if lying.bytes == 8 else torch.float32
    results = fresh_results(tasks, dtype, device)
    workspace = workspace_of(program, values, device)
    weight_gradients_(results, factors.to(device, dtype), encode(program), encode_tasks(tasks), workspace)
    for task in tasks:
        wanted, found = truth(task, values, factors), results[task.result].cpu()
        if float(wanted.norm()) == 0:  # every window misses the image
            assert not found.any()
        else:
            assert relative_error(found, wanted) < (1e-12 if lying.bytes == 8 else 2e-6), task


def lying_on(backend_device: tuple[str, str], size: int, chunk: int = 2, workers: int = 2, **how: Any) -> Lying:
    """Images in slots as the backend has them: Triton has one slot with all of them."""
    if backend_device[0] == "triton":
        return Lying(size, chunk * workers, 1, Layout.PLAIN, margin=how.get("margin", 0), dense=how.get("dense", False))
    return Lying(size, chunk, workers, Layout.TILES if size == 2 and how.get("beside") else Layout.PANELS, **how)


# Kinds ----------------------------------------------------------------------------------------------------------------

# inner, out, (height, width) of the source, kernel, stride, padding, dilation
CONVOLUTIONS = [
    (1, 3, (5, 7), (3, 3), 1, 1, 1),
    (3, 16, (8, 8), (3, 3), 1, 1, 1),
    (4, 33, (6, 5), (4, 4), 2, 1, 1),
    (3, 130, (9, 17), (5, 3), 1, 2, 1),
    (5, 4, (7, 6), (3, 5), 1, 2, 1),
    (3, 5, (9, 9), (5, 5), 3, 2, 1),
    (17, 16, (9, 4), (3, 3), 1, 2, 2),
    (33, 64, (4, 4), (2, 2), 1, 0, 1),
    (64, 13, (3, 3), (3, 3), 1, 1, 1),
    (64, 33, (1, 1), (1, 1), 1, 0, 1),
    (33, 1, (1, 1), (3, 3), 1, 1, 1),
    (70, 9, (4, 3), (4, 3), 1, 0, 1),
    (7, 40, (6, 6), (1, 1), 2, 0, 1),
    (100, 70, (17, 16), (3, 3), 1, 1, 1),
    (20, 20, (40, 33), (3, 3), 1, 1, 1),
]


def convolution(case: tuple, result: int = 0, gradient: int = 0, source: int = 1) -> tuple[WeightTask, tuple, tuple]:
    """The task of a convolution, and the shapes of its two buffers."""
    inner, out, size, kernel, stride, pad, dilation = case
    grid = [(n + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(size, kernel, strict=True)]
    task = WeightTask(
        *(CONVOLUTION, result, gradient, 0, out, source, 0, inner),
        *(*grid, *kernel, stride, stride, pad, pad, dilation, dilation),
    )
    return task, (out, *grid), (inner, *size)


@both_sizes
@pytest.mark.parametrize("how", [{}, {"margin": 2, "dense": True}, {"beside": True}], ids=["plain", "margin", "beside"])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolution(backend_device, case, size, how):
    task, gradient, source = convolution(case)
    assert_right([task], [gradient, source], lying_on(backend_device, size, **how), backend_device[1])


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_the_reference_in_float64(case):
    task, gradient, source = convolution(case)
    assert_right([task], [gradient, source], Lying(8, 3, 1, Layout.PLAIN))


@both_sizes
def test_transposed_convolution(backend_device, size):
    """Gradient and source exchanged: the grid is that of the small images."""
    small, large = numbers(3, 5, 4, 6), numbers(3, 7, 8, 12, seed=1)
    small, large = (rounded(values, size) for values in (small, large))
    weight = torch.zeros(5, 7, 4, 4, dtype=torch.float64, requires_grad=True)
    grown = F.conv_transpose2d(small, weight, stride=2, padding=1)
    assert grown.shape == large.shape
    (wanted,) = torch.autograd.grad(grown, weight, large * factors_of(3).view(-1, 1, 1, 1))
    task = WeightTask(CONVOLUTION, 0, 0, 0, 5, 1, 0, 7, 4, 6, 4, 4, 2, 2, 1, 1)
    program, device = program_of([(5, 4, 6), (7, 8, 12)], lying_on(backend_device, size)), backend_device[1]
    results = fresh_results([task], torch.float32, device)
    workspace = workspace_of(program, [small, large], device)
    weight_gradients_(results, factors_of(3).float().to(device), encode(program), encode_tasks([task]), workspace)
    assert relative_error(results[0].cpu(), wanted.permute(2, 3, 0, 1).reshape(16, 5, 7)) < 2e-6


GRID = {"height": 6, "width": 9}
OTHERS = {
    "sum": WeightTask(SUM, 0, 0, out=37, **GRID),
    "sum of some channels": WeightTask(SUM, 0, 0, gradient_channel=5, out=21, **GRID),
    "sum per pixel": WeightTask(SUM, 0, 0, out=37, per_pixel=1, **GRID),
    "sum of a part": WeightTask(SUM, 0, 0, out=37, height=4, width=5),
    "sum of one channel": WeightTask(SUM, 0, 0, gradient_channel=36, out=1, **GRID),
    "sum of one channel for all": WeightTask(SUM, 0, 0, gradient_channel=3, out=50, gradient_broadcast=1, **GRID),
    "sum of larger pixels": WeightTask(
        SUM, 0, 0, out=37, height=11, width=27, gradient_factor_y=2, gradient_factor_x=3
    ),
    "product": WeightTask(PRODUCT, 0, 0, out=37, source_buffer=1, **GRID),
    "product per pixel": WeightTask(PRODUCT, 0, 0, out=37, source_buffer=1, per_pixel=1, **GRID),
    "product of some channels": WeightTask(PRODUCT, 0, 0, 5, 20, 1, 12, **GRID),
    "product with one channel for all": WeightTask(PRODUCT, 0, 0, 0, 37, 1, 9, source_broadcast=1, **GRID),
    "product of one channel for all": WeightTask(PRODUCT, 0, 0, 7, 33, 1, 1, gradient_broadcast=1, **GRID),
    "product with larger pixels": WeightTask(
        PRODUCT, 0, 0, out=37, source_buffer=2, source_factor_y=2, source_factor_x=3, **GRID
    ),
    "product with one pixel": WeightTask(
        PRODUCT, 0, 0, out=37, source_buffer=2, source_factor_y=6, source_factor_x=9, per_pixel=1, **GRID
    ),
    "convolution of some channels": WeightTask(
        CONVOLUTION, 0, 0, 3, 30, 1, 7, 29, kernel_y=3, kernel_x=3, pad_y=1, pad_x=1, **GRID
    ),
    "convolution of the last channels": WeightTask(
        CONVOLUTION, 0, 0, 33, 4, 1, 30, 7, kernel_y=3, kernel_x=3, pad_y=1, pad_x=1, **GRID
    ),
    "convolution of an enlarged source": WeightTask(
        CONVOLUTION, 0, 0, 0, 37, 2, 0, 37, 6, 9, 3, 3, 1, 1, 1, 1, source_factor_y=2, source_factor_x=3
    ),
    "convolution of a part of an enlarged source": WeightTask(
        *(CONVOLUTION, 0, 0, 0, 37, 2, 0, 37, 6, 9, 3, 3, 1, 1, 1, 1),
        source_factor_y=2,
        source_factor_x=3,
        source_height=5,
        source_width=8,
    ),
    "convolution behind an enlarged gradient": WeightTask(
        CONVOLUTION, 0, 2, 0, 37, 1, 0, 37, 5, 9, 3, 3, 1, 1, 1, 1, gradient_factor_y=2, gradient_factor_x=3
    ),
    "convolution with broadcast": WeightTask(
        CONVOLUTION, 0, 0, 2, 20, 1, 3, 40, 6, 9, 2, 2, gradient_broadcast=1, source_broadcast=1
    ),
    "convolution with uneven windows": WeightTask(CONVOLUTION, 0, 0, 0, 37, 1, 0, 37, 3, 4, 2, 5, 2, 3, 1, 3, 3, 2),
    "convolution of the inside": WeightTask(CONVOLUTION, 0, 0, 0, 37, 1, 0, 37, 3, 5, 2, 2, 1, 1, -2, -3),
    "convolution beyond": WeightTask(CONVOLUTION, 0, 0, 0, 37, 1, 0, 37, 6, 9, 1, 1, 1, 1, 4, -7),
    "convolution outside": WeightTask(CONVOLUTION, 0, 0, 0, 37, 1, 0, 37, 6, 9, 1, 1, 1, 1, 40, 0),
    "linear map": WeightTask(CONVOLUTION, 0, 3, 0, 11, 4, 0, 53),
    "linear map of some channels": WeightTask(CONVOLUTION, 0, 3, 2, 5, 4, 3, 45),
    "linear map from an image": WeightTask(CONVOLUTION, 0, 3, 0, 11, 1, 0, 37, 1, 1, 6, 9),
    "one number": WeightTask(CONVOLUTION, 0, 3, 1, 1, 4, 52, 1),
}
SHAPES = [(37, 6, 9), (37, 6, 9), (37, 6, 3), (11, 1, 1), (53, 1, 1)]


@both_sizes
@pytest.mark.parametrize("name", OTHERS)
def test_other_tasks(backend_device, name, size):
    assert_right([OTHERS[name]], SHAPES, lying_on(backend_device, size, margin=1), backend_device[1])


@both_sizes
def test_all_tasks_of_a_net_in_one_call(backend_device, size):
    tasks = [replace(task, result=number) for number, task in enumerate(OTHERS.values())]
    assert_right(tasks, SHAPES, lying_on(backend_device, size), backend_device[1])


def test_the_reference_of_all_tasks_in_float64():
    tasks = [replace(task, result=number) for number, task in enumerate(OTHERS.values())]
    assert_right(tasks, SHAPES, Lying(8, 3, 1, Layout.PLAIN))


axis = st.tuples(
    *(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(-2, 4), st.integers(1, 3)),
    *(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2)),
)


@st.composite
def random_tasks(draw: Any) -> tuple[WeightTask, list[tuple[int, int, int]]]:
    """A task and two buffers that hold what it reads, with channels on both sides of it."""
    fields: dict[str, int] = {}
    sizes = []
    for name, (count, kernel, stride, pad, dilation, factor, source_factor, crop) in (
        ("y", draw(axis)),
        ("x", draw(axis)),
    ):
        length = "height" if name == "y" else "width"
        fields |= {length: count, f"kernel_{name}": kernel, f"stride_{name}": stride, f"pad_{name}": pad}
        fields |= {f"dilation_{name}": dilation}
        fields |= {f"gradient_factor_{name}": factor, f"source_factor_{name}": source_factor}
        stored = draw(st.integers(-(-count // source_factor), 8))
        fields[f"source_{length}"] = max(1, stored * source_factor - crop) if crop else 0
        sizes.append((-(-count // factor) + draw(st.integers(0, 1)), stored))
    kind = draw(st.sampled_from(WeightKind))
    out, inner = draw(st.integers(1, 40)), draw(st.integers(1, 80))
    channels = [out, out if kind == PRODUCT else inner]
    for k, name in enumerate(("gradient", "source")):
        broadcast = draw(st.sampled_from((0, 0, 1)))
        fields[f"{name}_channel"] = draw(st.integers(0, 20))
        fields[f"{name}_broadcast"] = broadcast
        channels[k] = fields[f"{name}_channel"] + (1 if broadcast else channels[k]) + draw(st.integers(0, 3))
    per_pixel = int(kind != CONVOLUTION and draw(st.booleans()))
    source = -1 if kind == SUM else 1
    task = WeightTask(
        kind, result=0, gradient_buffer=0, out=out, source_buffer=source, inner=inner, per_pixel=per_pixel, **fields
    )
    heights, widths = sizes
    return task, [(channels[k], heights[k], widths[k]) for k in (0, 1)]


@settings(max_examples=60, deadline=None)
@given(given_task=random_tasks(), seed=st.integers(0, 1000))
def test_any_task_in_float64(given_task, seed):
    task, shapes = given_task
    assert_right([task], shapes, Lying(8, 2, 2, Layout.PLAIN), images=2, seed=seed)


@settings(max_examples=60, deadline=None)
@given(given_task=random_tasks(), seed=st.integers(0, 1000), size=st.sampled_from((2, 4)), margin=st.integers(0, 2))
def test_any_task(given_task, seed, size, margin):
    task, shapes = given_task
    chosen = (ops.backends.select_backend("cpu", kernel="weight_gradients"), "cpu")
    assert_right([task], shapes, lying_on(chosen, size, margin=margin, dense=True), images=3, seed=seed)


# The same bits --------------------------------------------------------------------------------------------------------


def results_of(
    tasks: Sequence[WeightTask], lying: Lying, values: Sequence[Tensor], lengths: Sequence[int], device: str = "cpu"
) -> list[Tensor]:
    shapes = [tuple(v.shape[1:]) for v in values]
    program = program_of(shapes, lying)  # type: ignore[arg-type]
    results = fresh_results(tasks, torch.float32, device)
    parts = factors_of(sum(lengths)).float().to(device).split(list(lengths))
    for part, (code, workspace) in zip(parts, split_into_calls(program, values, lengths), strict=True):
        weight_gradients_(results, part, code, encode_tasks(tasks), workspace.to(device))
    return results


ALL = [replace(task, result=number) for number, task in enumerate(OTHERS.values())]
# One of each kernel, for the interpreter, which takes a minute for all.
FEW = ("sum", "product per pixel", "convolution of some channels", "linear map")
CUTS = [(1, 6), (3, 4), (2, 2, 3), (1,) * 7, (7, 0)]


@both_sizes
def test_cuts_of_the_batch_change_no_bit(backend_device, size):
    values = [numbers(7, *shape, seed=k) for k, shape in enumerate(SHAPES)]
    lying = lying_on(backend_device, size, chunk=4)
    tasks = [replace(OTHERS[name], result=r) for r, name in enumerate(FEW)] if INTERPRETED else ALL
    expected = results_of(tasks, lying, values, (7,), backend_device[1])
    for cut in CUTS:
        for found, wanted in zip(results_of(tasks, lying, values, cut, backend_device[1]), expected, strict=True):
            assert torch.equal(found, wanted), cut
    for name in {"beside", "margin"} if backend_device[0] != "triton" else {"margin"}:
        other = lying_on(backend_device, size, chunk=4, **{name: True if name == "beside" else 2})
        for found, wanted in zip(results_of(tasks, other, values, (7,), backend_device[1]), expected, strict=True):
            assert torch.equal(found, wanted), name


@pytest.fixture(params=VARIANTS)
def variant(request):
    """One of the C++ backend's instruction sets, for the length of a test."""
    if _C is None:
        pytest.skip("fastebm's C++ operators are not built")
    before = _C.active_variant()
    try:
        _C.set_variant(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    _C.set_variant(before)


@settings(max_examples=40, deadline=None)
@given(given_task=random_tasks(), seed=st.integers(0, 1000), size=st.sampled_from((2, 4)))
def test_every_variant_has_the_same_bits(given_task, seed, size):
    if _C is None:
        pytest.skip("the compiled operators are not built")
    task, shapes = given_task
    values = [numbers(3, *shape, seed=seed + k) for k, shape in enumerate(shapes)]
    found = {}
    before = _C.active_variant()
    try:
        for name in VARIANTS[: VARIANTS.index(_C.best_variant()) + 1]:
            _C.set_variant(name)
            with ops.backend("cpp"):
                found[name] = results_of([task], Lying(size, 2, 2), values, (3,))[0]
    finally:
        _C.set_variant(before)
    assert all(torch.equal(result, found["baseline"]) for result in found.values()), found


LARGE = [
    convolution((45, 30, (17, 16), (3, 3), 1, 1, 1), 0, 0, 1)[0],
    convolution((45, 45, (17, 16), (3, 3), 1, 1, 1), 1, 1, 1)[0],
    WeightTask(CONVOLUTION, 2, 2, 0, 90, 3, 0, 300),
    WeightTask(CONVOLUTION, 3, 2, 0, 90, 0, 0, 30, kernel_y=17, kernel_x=16),
    WeightTask(SUM, 4, 0, 0, 30, height=17, width=16),
    WeightTask(PRODUCT, 5, 1, 9, 30, 0, height=17, width=16, per_pixel=1),
]
LARGE_SHAPES = [(30, 17, 16), (45, 17, 16), (90, 1, 1), (300, 1, 1)]


@both_sizes
def test_neither_threads_nor_cuts_nor_variants_matter_in_cpp(variant, size):
    """Calls large enough to be divided among threads."""
    values = [numbers(7, *shape, seed=k) for k, shape in enumerate(LARGE_SHAPES)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with ops.backend("cpp"):
            found = {(1, (7,)): results_of(LARGE, Lying(size, 2, 4), values, (7,))}
            for threads, cut in ((2, (7,)), (2, (3, 4)), (1, (1, 6)), (3, (5, 2)), (16, (7,))):
                torch.set_num_threads(threads)
                found[threads, cut] = results_of(LARGE, Lying(size, 2, 4, beside=threads == 3), values, cut)
    finally:
        torch.set_num_threads(before)
    for how, results in found.items():
        for number, (result, wanted) in enumerate(zip(results, found[1, (7,)], strict=True)):
            assert torch.equal(result, wanted), (how, number)
    _C.set_variant(min("avx2", _C.best_variant(), key=VARIANTS.index))
    with ops.backend("cpp"):
        for result, wanted in zip(results_of(LARGE, Lying(size, 2, 4), values, (7,)), found[2, (7,)], strict=True):
            assert torch.equal(result, wanted)
    with ops.backend("reference"):
        exact = results_of(LARGE, Lying(size, 2, 4), values, (7,))
    for result, near in zip(found[2, (7,)], exact, strict=True):
        assert relative_error(result, near.double()) < 2e-6


def chain_of(image: int, task: WeightTask, values: Sequence[Tensor]) -> Tensor:
    """One image's sum in float32, pixel by pixel in order, with each product added before it is rounded."""
    g, s = (values[b][image].permute(1, 2, 0) for b in (task.gradient_buffer, task.source_buffer))
    sums = torch.zeros(task.result_shape(), dtype=torch.float32)
    for tap in range(task.kernel_y * task.kernel_x):
        for y, x in itertools.product(range(task.height), range(task.width)):
            row, column = y + tap // task.kernel_x - task.pad_y, x + tap % task.kernel_x - task.pad_x
            if 0 <= row < s.shape[0] and 0 <= column < s.shape[1]:
                # Products of bfloat16 are exact in float32, and in float64 these sums are, too.
                product = g[y, x, : task.out, None] * s[row, column, None, : task.inner]
                sums[tap] = (sums[tap].double() + product).float()
    return sums


def test_bits_are_those_of_the_definition(variant):
    """For numbers of a few bits, whose products and sums float64 holds exactly."""
    task = WeightTask(CONVOLUTION, 0, 0, 0, 7, 1, 0, 20, 5, 4, 3, 3, 1, 1, 1, 1)
    shapes = [(7, 5, 4), (20, 5, 4)]
    generator = torch.Generator().manual_seed(3)
    values = [torch.randint(-99, 99, (3, *shape), generator=generator).double() for shape in shapes]
    values = [rounded(v * 2.0 ** torch.randint(-9, 9, v.shape, generator=generator), 2) for v in values]
    factors = factors_of(3)
    wanted = torch.zeros(task.result_shape())
    for n in range(3):
        partial = chain_of(n, task, values)
        exact = [
            Fraction(float(factors[n])) * Fraction(float(p)) + Fraction(float(w))
            for p, w in zip(partial.flatten(), wanted.flatten(), strict=True)
        ]
        wanted = torch.tensor([nearest_float32(e) for e in exact]).view(wanted.shape)
    with ops.backend("cpp"):
        (found,) = results_of([task], Lying(2, 2, 2), values, (3,))
    assert torch.equal(found, wanted)


def nearest_float32(exact: Fraction) -> float:
    """The float32 next to a rational number, ties to even."""
    near = np.float32(float(exact))
    candidates = [near, np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))]
    return float(min(candidates, key=lambda c: (abs(Fraction(float(c)) - exact), int(c.view(np.int32)) & 1)))


# Behind a program -----------------------------------------------------------------------------------------------------


def kept_apart(program: PlannedProgram, chunk: int, workers: int) -> PlannedProgram:
    """The program with room of its own for every image of every buffer."""
    buffers, offset = [], 0
    for b in program.buffers:
        buffers.append(replace(b, images=chunk, offset=offset))
        offset += -(-chunk * b.image_stride * b.bytes // 64) * 64
    header = replace(program.header, chunk=chunk, workers=workers, team=0, slot=-(-offset // 4096) * 4096)
    segments = (Segment(0, len(program.instructions), chunk),)
    return replace(program, buffers=tuple(buffers), header=header, segments=segments)


@pytest.mark.parametrize("batch", [1, 2, 3, 6])
def test_behind_a_program(backend_device, batch):
    """The workspace of `run_program` itself; in C++ of several chunks that one thread runs, being so small."""
    backend, device = backend_device
    making = ProgramBuilder((5, 7, 6))
    target = making.buffer((9, 7, 6))
    making.convolution(0, (9, 7, 6), (3, 3), Epilogue(EpilogueOp.STORE, target), pad_y=1, pad_x=1)
    fused = making.finish(target).fused(4, device)
    chunk, workers = (batch, 1) if backend == "triton" else (2, 3)
    planned = kept_apart(decode(fused.code(batch)), chunk, workers)
    workspace = torch.zeros(planned.header.slot * workers + 64, dtype=torch.uint8, device=device)
    workspace = workspace[-workspace.data_ptr() % 64 :]
    x = torch.tanh(numbers(batch, 5, 7, 6)).float()
    torch.ops.fastebm.run_program(x.to(device), encode(planned), fused.constants, workspace)
    task = WeightTask(CONVOLUTION, 0, target, 0, 9, 0, 0, 5, 7, 6, 3, 3, 1, 1, 1, 1)
    results = fresh_results([task], torch.float32, device)
    factors = factors_of(batch)
    weight_gradients_(results, factors.float().to(device), encode(planned), encode_tasks([task]), workspace)
    exact = x.double()
    values = [exact, F.conv2d(exact, making.values[0].float().double(), padding=1)]
    wanted = truth(replace(task, gradient_buffer=1), values, factors)
    assert relative_error(results[0].cpu(), wanted) < 1e-5


# The operator ---------------------------------------------------------------------------------------------------------


def arguments(device: str = "cpu", layout: Layout = Layout.PLAIN) -> tuple[Any, ...]:
    """Results, factors, code, tasks and workspace of a small call."""
    tasks = [replace(OTHERS["convolution of some channels"], result=1), replace(OTHERS["sum"], result=0)]
    program = program_of(SHAPES, Lying(4, 3, 1, layout))
    workspace = workspace_of(program, [numbers(3, *shape, seed=k) for k, shape in enumerate(SHAPES)], device)
    results = fresh_results(tasks, torch.float32, device)
    return results, factors_of(3).float().to(device), encode(program), encode_tasks(tasks), workspace


def test_opcheck(backend_device):
    torch.library.opcheck(torch.ops.fastebm.weight_gradients_.default, arguments(backend_device[1]))


def test_compiles(backend_device):
    results, *rest = arguments(backend_device[1])

    def doubled(*results: Tensor) -> list[Tensor]:
        torch.ops.fastebm.weight_gradients_(list(results), *rest)
        return [2 * result for result in results]

    with torch.no_grad():
        wanted = doubled(*(result.clone() for result in results))
        compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
        for found, right in zip(compiled(*(result.clone() for result in results)), wanted, strict=True):
            assert torch.equal(found, right)
    torch._dynamo.reset()


def test_results_are_added_to(backend_device):
    results, *rest = arguments(backend_device[1])
    more = [torch.full_like(result, 2.0) for result in results]
    weight_gradients_(results, *rest)
    weight_gradients_(more, *rest)
    for result, with_two in zip(results, more, strict=True):
        torch.testing.assert_close(with_two, result + 2, rtol=1e-5, atol=1e-5)


def test_no_images_and_no_tasks_change_nothing(backend_device):
    results, factors, code, tasks, workspace = arguments(backend_device[1])
    before = [result.fill_(3.0).clone() for result in results]
    weight_gradients_(results, factors[:0], code, tasks, workspace)
    weight_gradients_(results, factors, code, tasks[:0], workspace)
    weight_gradients_([], factors, code, tasks[:0], workspace)
    assert all(torch.equal(*pair) for pair in zip(results, before, strict=True))


def test_a_result_that_no_task_names_stays(backend_device):
    results, factors, code, tasks, workspace = arguments(backend_device[1])
    results.append(torch.full((2,), 5.0, device=backend_device[1]))
    weight_gradients_(results, factors, code, tasks, workspace)
    assert torch.equal(results[2].cpu(), torch.tensor([5.0, 5.0]))
    assert all(result.any() for result in results)


def test_a_lost_image_is_lost_alone_when_its_factor_is(backend_device):
    """NaN in one image makes results NaN, as a sum with it is; it is not hidden."""
    results, factors, code, tasks, workspace = arguments(backend_device[1])
    workspace.fill_(255)
    weight_gradients_(results, factors, code, tasks, workspace)
    assert all(result.isnan().all() for result in results)


def test_errors_of_every_backend(backend_device):
    results, factors, code, tasks, workspace = arguments(backend_device[1])
    run = torch.ops.fastebm.weight_gradients_
    with pytest.raises(RuntimeError, match="has no derivative"):
        run([results[0].clone().requires_grad_(), results[1]], factors, code, tasks, workspace)
    with pytest.raises(RuntimeError, match="has no derivative"):
        run(results, factors.clone().requires_grad_(), code, tasks, workspace)
    wrong: list[tuple[str, tuple[Any, ...]]] = [
        ("factors must be a vector in float32", (results, factors.half(), code, tasks, workspace)),
        ("factors must be a vector in float32", (results, factors[None], code, tasks, workspace)),
        ("result 0 must be torch.float32, as factors are", ([results[0].double(), results[1]], *arguments()[1:])),
        (
            "result 0 must be on the factors' device",
            ([results[0].to("meta"), *results[1:]], factors, code, tasks, workspace),
        ),
        ("result 1 must be contiguous", ([results[0], results[1].transpose(1, 2)], factors, code, tasks, workspace)),
        ("code must be an int64 vector", (results, factors, code.int(), tasks, workspace)),
        ("code does not begin", (results, factors, torch.zeros(20, dtype=torch.int64), tasks, workspace)),
        ("tasks must be an int64 table", (results, factors, code, tasks[0], workspace)),
        ("tasks must be an int64 table", (results, factors, code, tasks[:, :-1], workspace)),
        ("workspace must be on the factors' device", (results, factors, code, tasks, workspace.to("meta"))),
        ("the workspace must be", (results, factors, code, tasks, workspace[:4096])),
        ("the workspace must be", (results, factors, code, tasks, torch.cat([workspace, workspace])[1:])),
        ("holds 3 images, got factors of 4", (results, torch.cat([factors, factors[:1]]), code, tasks, workspace)),
        ("got 1 results", (results[:1], factors, code, tasks, workspace)),
        (r"result 1 must be \(9, 30, 29\)", ([results[0], results[1][:8].clone()], factors, code, tasks, workspace)),
        ("must not share memory", ([results[1].view(-1)[:37], results[1]], factors, code, tasks, workspace)),
        (
            "must not share memory",
            (
                [results[0], workspace[: results[1].numel() * 4].view(torch.float32).view(9, 30, 29)],
                factors,
                code,
                tasks,
                workspace,
            ),
        ),
    ]
    for message, given_arguments in wrong:
        given_arguments = tuple(
            a.to(backend_device[1]) if isinstance(a, Tensor) and a is given_arguments[1] else a for a in given_arguments
        )
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message) as raised:
            run(*given_arguments)
        assert len(str(raised.value).strip().splitlines()) == 1


BAD: dict[str, tuple[dict[str, int], str]] = {
    "kind": ({"kind": 3}, r"kind must be in \[0, 3\), got 3"),
    "no outputs": ({"out": 0}, "out must be in"),
    "no inputs": ({"inner": 0}, "inner must be in"),
    "a negative channel": ({"gradient_channel": -1}, "gradient_channel must be in"),
    "no stride": ({"stride_y": 0}, "stride_y must be in"),
    "no dilation": ({"dilation_x": -1}, "dilation_x must be in"),
    "no kernel": ({"kernel_x": 0}, "kernel_x must be in"),
    "no factor": ({"source_factor_y": 0}, "source_factor_y must be in"),
    "a far pad": ({"pad_y": 2**40}, "pad_y must be in"),
    "a flag": ({"source_broadcast": 2}, "source_broadcast must be in"),
    "a buffer that is none": ({"gradient_buffer": 5}, "gradient_buffer must be in"),
    "no source": ({"source_buffer": -1}, "source_buffer must be in"),
    "more outputs than channels": ({"out": 35}, "channels to 38 of 37 in buffer 0"),
    "more inputs than channels": ({"inner": 31}, "channels to 38 of 37 in buffer 1"),
    "a grid beyond the gradient": ({"height": 7}, "a grid of 7x9 is beyond buffer 0 of 6x9 pixels"),
    "a source beyond the buffer": ({"source_height": 7}, "a source of 7x0 is beyond buffer 1 of 6x9"),
    "a convolution per pixel": ({"per_pixel": 1}, "a convolution is not per_pixel"),
    "a large grid": (
        {"height": 2**30, "gradient_factor_y": 2**30},
        "its grid of 1073741824x9 is out of proportion to a slot",
    ),
    "a product beyond": ({"kind": 2, "source_buffer": 2, "inner": 1}, "a grid of 6x9 is beyond buffer 2 of 6x3 pixels"),
    "a sum with a source": ({"kind": 1}, "SUM has no source_buffer, it must be -1, got 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tasks_are_refused(backend_device, name):
    results, factors, code, tasks, workspace = arguments(backend_device[1])
    change, message = BAD[name]
    tasks = encode_tasks([replace(OTHERS["convolution of some channels"], result=1, **change)])
    with pytest.raises((ValueError, RuntimeError), match=f"tasks that can't run: task 0: {message}") as raised:
        weight_gradients_(results, factors, code, tasks, workspace)
    assert len(str(raised.value).strip().splitlines()) == 1
    assert not any(result.any() for result in results)


def test_two_tasks_for_one_result_are_refused(backend_device):
    results, factors, code, _, workspace = arguments(backend_device[1])
    tasks = encode_tasks([OTHERS["sum"], OTHERS["sum"]])
    with pytest.raises((ValueError, RuntimeError), match="task 1: result 0 is task 0's"):
        weight_gradients_(results, factors, code, tasks, workspace)


def test_buffers_that_are_not_kept_are_refused(backend_device):
    """One that is never written, one that another takes the place of, and one with room for fewer images."""
    plain = backend_device[0] == "triton"
    results, factors, _, tasks, workspace = arguments(backend_device[1])
    program = program_of(SHAPES, Lying(4, 3, 1, Layout.PLAIN if plain else Layout.PANELS))
    first, second, *rest = program.buffers
    overwritten = replace(program, buffers=(first, replace(second, offset=first.offset), *rest))
    short = replace(program, buffers=(replace(first, images=2), second, *rest))
    short = replace(short, segments=tuple(replace(s, images=2) for s in short.segments))
    for changed in (without(program, 0), overwritten, *([] if plain else [short])):
        with pytest.raises((ValueError, RuntimeError), match="buffer 0 does not hold every image"):
            weight_gradients_(results, factors, encode(changed), tasks, workspace)
    weight_gradients_(results, factors, encode(program), tasks, workspace)


def test_tasks_survive_encoding():
    assert decode_tasks(encode_tasks(ALL)) == tuple(ALL)
    _, found = checked_tasks(encode(program_of(SHAPES, Lying(4, 3, 1))), encode_tasks(ALL))
    assert found == tuple(ALL)
    assert encode_tasks([]).shape[0] == 0
