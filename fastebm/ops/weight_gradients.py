"""Gradients with respect to weights, from the buffers that a fused program left in its workspace.

    weight_gradients_(results, factors, code, tasks, workspace)

runs right after `run_program` with the same code and workspace. Each task says which two buffers make the gradient of
one weight: a convolution's is a sum over pixels of the gradient behind it times the pixels before it, a bias' the sum
of the gradient, a gain's the sum of a product. All buffers that tasks read must be kept to the end of the program.

With `factors` (n,), one for each image of the call, every number of every result is

    for n in order:  partial = the sum over the grid's pixels, row by row, by fused multiply-adds, from zero
                     result  = fma(factors[n], partial, result)

in float32. So a result depends neither on threads nor on how a batch is cut into calls, and C++ gives the same bits on
all instruction sets. The reference sums each image's pixels in the order of PyTorch, in the dtype of the results.

`WeightTask` is the format of a task, `encode_tasks` makes the operator's tensor of them, `check_tasks` has the rules,
which `csrc/cpu/weight_gradients.cpp` repeats.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum

import torch
from torch import Tensor

from .backends import launch, refuse_autograd, register
from .instructions import Buffer, PlannedProgram
from .memory import share_memory
from .program_check import LIMIT, LINE, checked_bytes

__all__ = [
    "TASK_FIELDS",
    "WeightKind",
    "WeightTask",
    "check_tasks",
    "checked_tasks",
    "decode_tasks",
    "encode_tasks",
    "weight_gradients_",
]

_STORED = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
_RESULTS = (torch.float32, torch.float64)


class WeightKind(IntEnum):
    """What a task sums over the pixels (y, x) of its grid.

    CONVOLUTION: gradient[y, x, o] * source[y * stride_y - pad_y + ky * dilation_y, likewise x, c], without the pixels
    outside of the source, into a result (kernel_y * kernel_x, out, inner). A linear map is one of 1x1 over images of
    1x1; one from an image is a kernel as large as the image on a grid of 1x1. A transposed convolution's is the same
    with the two buffers exchanged.
    SUM: gradient[y, x, o], into a result (out,). PRODUCT: gradient[y, x, o] * source[y, x, o], likewise. With
    `per_pixel` the result of these two is (height, width, out), and nothing is summed but the images.
    """

    CONVOLUTION = 0
    SUM = 1
    PRODUCT = 2


@dataclass(frozen=True)
class WeightTask:
    """The gradient of one weight. Where a pair (y, x) is meant, fields come in twos.

    Attributes:
        kind: a `WeightKind`.
        result: its place in the list of results; each task has one of its own.
        gradient_buffer, gradient_channel, out: the buffer with the gradient, from which channel on, and how many.
        source_buffer, source_channel, inner: what it is multiplied by; for SUM -1, and for PRODUCT the `out` channels
            from there on. `inner` is the number of inputs of a convolution.
        height, width: of the grid.
        kernel_*, stride_*, pad_*, dilation_*: of a convolution, as in `WeightKind`; pads may be negative.
        per_pixel: whether SUM and PRODUCT leave pixels apart.
        gradient_factor_*, source_factor_*: pixel (y, x) is the stored pixel (y / factor_y, x / factor_x): an image
            enlarged by whole factors, which is stored small.
        gradient_broadcast, source_broadcast: whether one stored channel stands for all.
        source_height, source_width: of a convolution's source, beyond which it is zero; 0 for all that is stored times
            the factor.
    """

    kind: int
    result: int
    gradient_buffer: int
    gradient_channel: int = 0
    out: int = 1
    source_buffer: int = -1
    source_channel: int = 0
    inner: int = 1
    height: int = 1
    width: int = 1
    kernel_y: int = 1
    kernel_x: int = 1
    stride_y: int = 1
    stride_x: int = 1
    pad_y: int = 0
    pad_x: int = 0
    dilation_y: int = 1
    dilation_x: int = 1
    per_pixel: int = 0
    gradient_factor_y: int = 1
    gradient_factor_x: int = 1
    gradient_broadcast: int = 0
    source_factor_y: int = 1
    source_factor_x: int = 1
    source_broadcast: int = 0
    source_height: int = 0
    source_width: int = 0

    def result_shape(self) -> tuple[int, ...]:
        """The shape of its result."""
        if self.kind == WeightKind.CONVOLUTION:
            return (self.kernel_y * self.kernel_x, self.out, self.inner)
        return (self.height, self.width, self.out) if self.per_pixel else (self.out,)


TASK_FIELDS = len(fields(WeightTask))


def encode_tasks(tasks: Sequence[WeightTask]) -> Tensor:
    """The tasks as one int64 tensor (tasks, TASK_FIELDS) on the CPU."""
    rows = [[int(getattr(task, field.name)) for field in fields(WeightTask)] for task in tasks]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), TASK_FIELDS)


def decode_tasks(tensor: Tensor) -> tuple[WeightTask, ...]:
    """The tasks behind `encode_tasks`' tensor. Raises ValueError where it is none."""
    _check_table(tensor)
    return tuple(WeightTask(*row) for row in tensor.tolist())


def _check_table(tasks: Tensor) -> None:
    if (
        tasks.dtype != torch.int64
        or tasks.dim() != 2
        or tasks.shape[1] != TASK_FIELDS
        or tasks.device.type not in ("cpu", "meta")
    ):
        raise ValueError(
            f"tasks must be an int64 table (tasks, {TASK_FIELDS}) on the CPU, "
            f"got {tasks.dtype} {tuple(tasks.shape)} on {tasks.device}"
        )


# ---- rules


def check_tasks(program: PlannedProgram, kept: frozenset[int], tasks: Sequence[WeightTask]) -> None:
    """Raises ValueError, in one line, where tasks break a rule.

    Args:
        program: that runs before them.
        kept: the buffers that hold every image of a chunk when it has run (`program_check.Needs.kept`).
        tasks: at most one for each result.
    """
    owners: dict[int, int] = {}
    for number, task in enumerate(tasks):
        _CheckTask(program, kept, number, task).run()
        owner = owners.setdefault(task.result, number)
        if owner != number:
            raise ValueError(f"tasks that can't run: task {number}: result {task.result} is task {owner}'s")


@dataclass(frozen=True)
class _CheckTask:
    program: PlannedProgram
    kept: frozenset[int]
    number: int
    task: WeightTask

    def refuse_unless(self, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"tasks that can't run: task {self.number}: {rule}")

    def within(self, name: str, low: int, high: int = LIMIT) -> None:
        number = getattr(self.task, name)
        self.refuse_unless(low <= number < high, f"{name} must be in [{low}, {high}), got {number}")

    def run(self) -> None:
        t = self.task
        self.within("kind", 0, len(WeightKind))
        for name in ("out", "inner", "height", "width"):
            self.within(name, 1)
        for name in ("kernel_y", "kernel_x", "stride_y", "stride_x", "dilation_y", "dilation_x"):
            self.within(name, 1)
        for name in ("gradient_factor_y", "gradient_factor_x", "source_factor_y", "source_factor_x"):
            self.within(name, 1)
        for name in ("result", "gradient_channel", "source_channel", "source_height", "source_width"):
            self.within(name, 0)
        for name in ("pad_y", "pad_x"):
            self.within(name, 1 - LIMIT)
        for name in ("per_pixel", "gradient_broadcast", "source_broadcast"):
            self.within(name, 0, 2)
        slot = self.program.header.slot
        bounded = t.height * t.width <= (1 << 20) + 4 * slot
        self.refuse_unless(bounded, f"its grid of {t.height}x{t.width} is out of proportion to a slot of {slot} bytes")
        b = self.buffer("gradient_buffer", t.gradient_channel, 1 if t.gradient_broadcast else t.out)
        self.grid("gradient_buffer", b, t.gradient_factor_y, t.gradient_factor_x)
        if t.kind == WeightKind.SUM:
            self.refuse_unless(t.source_buffer == -1, f"SUM has no source_buffer, it must be -1, got {t.source_buffer}")
            return
        channels = t.inner if t.kind == WeightKind.CONVOLUTION else t.out
        b = self.buffer("source_buffer", t.source_channel, 1 if t.source_broadcast else channels)
        if t.kind == WeightKind.PRODUCT:
            self.grid("source_buffer", b, t.source_factor_y, t.source_factor_x)
            return
        self.refuse_unless(not t.per_pixel, "a convolution is not per_pixel")
        height, width = b.height * t.source_factor_y, b.width * t.source_factor_x
        self.refuse_unless(
            t.source_height <= height and t.source_width <= width,
            f"a source of {t.source_height}x{t.source_width} is beyond buffer {t.source_buffer} of {height}x{width}",
        )

    def buffer(self, name: str, channel: int, count: int) -> Buffer:
        """A buffer that is read, with the channels that must be there."""
        self.within(name, 0, len(self.program.buffers))
        number = getattr(self.task, name)
        self.refuse_unless(
            number in self.kept, f"buffer {number} does not hold every image when the program has run: it must be kept"
        )
        b = self.program.buffers[number]
        behind = channel + count
        self.refuse_unless(behind <= b.channels, f"channels to {behind} of {b.channels} in buffer {number}")
        return b

    def grid(self, name: str, b: Buffer, factor_y: int, factor_x: int) -> None:
        t = self.task
        self.refuse_unless(
            (t.height - 1) // factor_y < b.height and (t.width - 1) // factor_x < b.width,
            f"a grid of {t.height}x{t.width} is beyond buffer {getattr(t, name)} of {b.height}x{b.width} pixels",
        )


def checked_tasks(code: Tensor, tasks: Tensor) -> tuple[PlannedProgram, tuple[WeightTask, ...]]:
    """The program and the tasks. Raises ValueError where one breaks a rule."""
    if code.dtype != torch.int64 or code.dim() != 1 or code.device.type != "cpu":
        raise ValueError(f"code must be an int64 vector on the CPU, got {code.dtype} {tuple(code.shape)}")
    _check_table(tasks)
    return _checked_bytes(code.numpy().tobytes(), tasks.contiguous().numpy().tobytes())


@functools.lru_cache(maxsize=256)
def _checked_bytes(code: bytes, tasks: bytes) -> tuple[PlannedProgram, tuple[WeightTask, ...]]:
    program, needs = checked_bytes(code)
    table = torch.frombuffer(bytearray(tasks), dtype=torch.int64).view(-1, TASK_FIELDS) if tasks else None
    found = decode_tasks(table) if table is not None else ()
    check_tasks(program, needs.kept, found)
    return program, found


def check_call(
    program: PlannedProgram, tasks: Sequence[WeightTask], results: Sequence[Tensor], images: int, workspace: Tensor
) -> None:
    """Raises ValueError where results, the number of images or the workspace are not what checked tasks need."""
    header = program.header
    most = header.chunk * header.workers
    if images > most:
        raise ValueError(f"a workspace of this program holds {most} images, got factors of {images}")
    for number, task in enumerate(tasks):
        if task.result >= len(results):
            raise ValueError(f"task {number} has result {task.result}, got {len(results)} results")
        shape = tuple(results[task.result].shape)
        if shape != task.result_shape():
            raise ValueError(f"result {task.result} must be {task.result_shape()}, got {shape}")
    if header.slot % LINE and header.workers > 1:
        raise ValueError(f"slots must begin at multiples of {LINE} bytes, got slots of {header.slot}")
    vector = workspace.dtype == torch.uint8 and workspace.dim() == 1 and workspace.is_contiguous()
    if not vector or workspace.numel() < header.slot * header.workers or workspace.data_ptr() % LINE:
        raise ValueError(
            f"the workspace must be a vector of {header.slot * header.workers} bytes or more, at a multiple of {LINE}, "
            f"got {workspace.dtype} {tuple(workspace.shape)}"
        )


# Operator -----------------------------------------------------------------------------------------------------------


def weight_gradients_(
    results: Sequence[Tensor], factors: Tensor, code: Tensor, tasks: Tensor, workspace: Tensor
) -> None:
    """Adds to every result, in place, the gradients of one weight of all images of a call, each times its factor.

    Args:
        results: float32, contiguous, none sharing memory with another, on the workspace's device; of the shape that
            `WeightTask.result_shape` says. One that no task names stays as it is. float64 runs in the reference.
        factors: (n,) in the dtype of the results, for the n images of the last call of `run_program`.
        code: of that call.
        tasks: int64 (tasks, TASK_FIELDS) on the CPU, from `encode_tasks`.
        workspace: of that call, untouched since.

    Raises:
        ValueError, TypeError: in one line, for what breaks a rule.
        RuntimeError: where autograd would record it, which has no derivative.

    Example:
        >>> import torch
        >>> from fastebm.ops.instructions import Buffer, Epilogue, EpilogueOp, Header, Instruction, Kind, Layout
        >>> from fastebm.ops.instructions import PlannedProgram, Segment, encode
        >>> from fastebm.ops.weight_gradients import WeightKind, WeightTask, encode_tasks, weight_gradients_
        >>> buffer = Buffer(1, 2, 2, bytes=4, pixel_stride=16, row_stride=32, image_stride=64)
        >>> ones = Instruction(Kind.LOAD, height=2, width=2, count=1)  # one channel of ones, 2x2 pixels
        >>> header = Header(Layout.PLAIN, panel=0, bytes=4, chunk=1, slot=256, workers=1)
        >>> store = Epilogue(EpilogueOp.STORE, 0)
        >>> code = encode(PlannedProgram(header, (buffer,), (ones,), (store,), (Segment(0, 1, 1),)))
        >>> workspace = torch.ones(64).view(torch.uint8)  # as run_program leaves it
        >>> result, tasks = torch.zeros(1), encode_tasks([WeightTask(WeightKind.SUM, 0, 0, height=2, width=2)])
        >>> weight_gradients_([result], torch.tensor([0.5]), code, tasks, workspace)
        >>> result
        tensor([2.])
    """
    torch.ops.fastebm.weight_gradients_(list(results), factors, code, tasks, workspace)


def _check(results: Sequence[Tensor], factors: Tensor, code: Tensor, tasks: Tensor, workspace: Tensor) -> None:
    if factors.dtype not in _RESULTS or factors.dim() != 1:
        raise TypeError(
            f"factors must be a vector in float32 (float64 in the reference), "
            f"got {factors.dtype} {tuple(factors.shape)}"
        )
    if code.dtype != torch.int64 or code.dim() != 1 or code.device.type not in ("cpu", "meta"):
        raise ValueError(
            f"code must be an int64 vector on the CPU, got {code.dtype} {tuple(code.shape)} on {code.device}"
        )
    _check_table(tasks)
    if workspace.device != factors.device:
        raise ValueError(f"the workspace must be on the factors' device {factors.device}, got {workspace.device}")
    for number, result in enumerate(results):
        if result.dtype != factors.dtype:
            raise TypeError(f"result {number} must be {factors.dtype}, as factors are, got {result.dtype}")
        if result.device != factors.device:
            raise ValueError(f"result {number} must be on the factors' device {factors.device}, got {result.device}")
        if not result.is_contiguous():
            raise ValueError(f"result {number} must be contiguous, got strides {result.stride()}")
    refuse_autograd("weight_gradients_", factors, *results)


@register("weight_gradients_", fake=_check)
def _weight_gradients_(
    results: Sequence[Tensor], factors: Tensor, code: Tensor, tasks: Tensor, workspace: Tensor
) -> None:
    _check(results, factors, code, tasks, workspace)
    _refuse_shared_memory(results, factors, workspace)
    arguments = (list(results), code, tasks.contiguous(), workspace)
    if factors.dtype == torch.float64:
        reference_weight_gradients(factors, *arguments)
    else:
        launch("weight_gradients", factors.contiguous(), *arguments)


def _refuse_shared_memory(results: Sequence[Tensor], factors: Tensor, workspace: Tensor) -> None:
    in_order = sorted((result.data_ptr(), number) for number, result in enumerate(results) if result.numel())
    for (_, one), (_, other) in itertools.pairwise(in_order):
        if share_memory(results[one], results[other]):
            raise ValueError(f"results {one} and {other} are both written and must not share memory")
    for number, result in enumerate(results):
        if share_memory(result, factors) or share_memory(result, workspace):
            raise ValueError(f"result {number} is written and must not share memory with factors or the workspace")


# Reference ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def reference_weight_gradients(
    factors: Tensor, results: Sequence[Tensor], code: Tensor, tasks: Tensor, workspace: Tensor
) -> None:
    """Kernel `weight_gradients` in plain PyTorch."""
    program, found = checked_tasks(code, tasks)
    check_call(program, found, results, len(factors), workspace)
    for task in found:
        for n in range(len(factors)):
            partial = _partial(_Image(program, workspace, n, factors.dtype), task)
            results[task.result].add_(factors[n] * partial)


def buffer_image(program: PlannedProgram, workspace: Tensor, number: int, n: int) -> Tensor:
    """Image n of a buffer in the workspace, a view (height, width, channels) that may be written, too."""
    b, header = program.buffers[number], program.header
    begin = n // header.chunk * header.slot
    numbers = workspace[begin : begin + header.slot // b.bytes * b.bytes].view(_STORED[b.bytes])
    first = b.offset // b.bytes + n % header.chunk * b.image_stride + b.margin * b.pixel_stride
    strides = (b.row_stride, b.pixel_stride, 1)
    return numbers.as_strided((b.height, b.width, b.channels), strides, numbers.storage_offset() + first)


@dataclass(frozen=True)
class _Image:
    """One image of a call, whose pixels and channels are read as a task means them."""

    program: PlannedProgram
    workspace: Tensor
    n: int
    dtype: torch.dtype

    def gradient(self, t: WeightTask) -> Tensor:
        """(height, width, out)."""
        factors = (t.gradient_factor_y, t.gradient_factor_x)
        stored = self._read(t.gradient_buffer, t.gradient_channel, t.out, t.gradient_broadcast)
        return _enlarged(stored, factors, (t.height, t.width))

    def source(self, t: WeightTask) -> Tensor:
        """(height, width, channels) of the whole source."""
        channels, factors = t.out, (t.source_factor_y, t.source_factor_x)
        size = (t.height, t.width)
        b = self.program.buffers[t.source_buffer]
        if t.kind == WeightKind.CONVOLUTION:
            channels = t.inner
            size = (t.source_height or b.height * factors[0], t.source_width or b.width * factors[1])
        return _enlarged(self._read(t.source_buffer, t.source_channel, channels, t.source_broadcast), factors, size)

    def _read(self, buffer: int, channel: int, count: int, broadcast: int) -> Tensor:
        stored = buffer_image(self.program, self.workspace, buffer, self.n).to(self.dtype)
        part = stored[..., channel : channel + (1 if broadcast else count)]
        return part.expand(-1, -1, count)


def _enlarged(stored: Tensor, factors: tuple[int, int], size: tuple[int, int]) -> Tensor:
    rows, columns = (torch.arange(n, device=stored.device) // f for n, f in zip(size, factors, strict=True))
    return stored[rows][:, columns]


def _partial(image: _Image, t: WeightTask) -> Tensor:
    """One image's gradient of a weight."""
    gradient = image.gradient(t)
    if t.kind == WeightKind.SUM:
        return gradient if t.per_pixel else gradient.sum((0, 1))
    source = image.source(t)
    if t.kind == WeightKind.PRODUCT:
        product = gradient * source
        return product if t.per_pixel else product.sum((0, 1))
    partial = gradient.new_zeros(t.kernel_y, t.kernel_x, t.out, t.inner)
    for ky in range(t.kernel_y):
        rows, inside_y = _window(t.height, t.stride_y, ky * t.dilation_y - t.pad_y, len(source), gradient.device)
        for kx in range(t.kernel_x):
            columns, inside_x = _window(
                t.width, t.stride_x, kx * t.dilation_x - t.pad_x, source.shape[1], gradient.device
            )
            g = gradient[inside_y][:, inside_x].reshape(-1, t.out)
            partial[ky, kx] = g.T @ source[rows][:, columns].reshape(-1, t.inner)
    return partial.view(-1, t.out, t.inner)


def _window(count: int, stride: int, shift: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Along one axis, the places in the source of those of `count` pixels that lie inside, and which these are."""
    places = torch.arange(count, device=device) * stride + shift
    inside = (places >= 0) & (places < size)
    return places[inside], inside
