"""Fused programs: an energy and its gradient with respect to the input, by a list of instructions, in one call.

`LoweredProgram` is a program as `fastebm.compiler` lowers it: buffers, instructions, and constants (weights, biases,
factors), whose values are computed once a chain. `CompiledProgram` makes it runnable. It packs the constants as the
backend reads them, plans for each batch size which images go through the program together and where each buffer lies,
and calls the operator

    run_program(x, code, constants, workspace) -> (energies, gradient)

Images are independent of one another: the value of each number, order of summation included, is the same for any batch,
chunk and number of threads.

The reference carries out one instruction after the other on whole batches in plain PyTorch, in float64 where `x` is. It
reads weights in every layout.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .activations import program_activation, program_derivative
from .backends import launch, refuse_autograd, register
from .instructions import (
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
from .program_check import LANES, check_code, checked_program
from .tiles import DENSE, tile_reach, tile_window

__all__ = ["CompiledProgram", "Constant", "LoweredProgram", "pack_convolution", "unpack_convolution"]

# Rows of dense images end in at least so many pixels of zeros.
DENSE_MARGIN = 8
# Bytes that the instructions of one segment may touch, so that they stay in a core's own cache.
CACHE_BYTES = 1 << 20
# A chunk has at most CHUNK images, as many as a matrix tile has rows. Where their results take more than CHUNK_BYTES,
# it has so few that they take half of that.
CHUNK = 16
CHUNK_BYTES = 80 << 20
# Vectors multiply neighbouring pixels, of one image or of several, so that few images are enough: what the forward part
# keeps of them then is nearer when the backward part reads it. At 32x32 with 128 channels, 4 images take 0.9 of the
# time of 16.
VECTOR_CHUNK_BYTES = 8 << 20
LINE = 64
# Codes that a thread keeps of one program, each a few kilobytes.
MAX_CODES = 16


@dataclass(frozen=True)
class Constant:
    """A tensor that is computed from the weights.

    Attributes:
        kind: "convolution", (out, in, kernel_y, kernel_x); or "image", (channels, H or 1, W or 1), in float32.
        dense: for a convolution, whether it reads an image of few channels (`DENSE`).
    """

    kind: str
    dense: bool = False


@dataclass(frozen=True)
class LoweredProgram:
    """A program before its memory is planned: `Buffer`s have only channels, height, width, bytes and margin.

    Attributes:
        sample: the shape of one sample of x.
        bytes: of the numbers that convolutions read: 2 (bfloat16), 4 or 8.
        constants: what `CompiledProgram.refresh` gets values for, in that order, after the numbers.
        kept: buffers that hold the results of all images of a call when it is over, for `weight_gradients_`. A call
            then takes `CompiledProgram.images_at_once` images or fewer.
    """

    sample: tuple[int, ...]
    bytes: int
    buffers: tuple[Buffer, ...]
    instructions: tuple[Instruction, ...]
    epilogues: tuple[Epilogue, ...]
    constants: tuple[Constant, ...]
    kept: frozenset[int] = frozenset()

    def reads(self, instruction: Instruction) -> list[int]:
        """The buffers that an instruction reads."""
        found = [instruction.source] if instruction.source >= 0 else []
        for step in self.epilogue(instruction):
            if step.op in (EpilogueOp.ADD, EpilogueOp.MULTIPLY, EpilogueOp.SLOPE):
                found.append(step.buffer)
        return found

    def writes(self, instruction: Instruction) -> list[int]:
        """The buffers that an instruction writes."""
        return [s.buffer for s in self.epilogue(instruction) if s.op in (EpilogueOp.STORE, EpilogueOp.ACTIVATE_KEEPING)]

    def epilogue(self, instruction: Instruction) -> tuple[Epilogue, ...]:
        return self.epilogues[instruction.first : instruction.first + instruction.count]


class CompiledProgram:
    """A program that runs on one device: `energies, gradient = self(x)`, after `refresh`.

    Args:
        lowered: the program.
        device: of x and the constants.

    Threads may run one program at the same time. Each has its own workspace and codes; they share the constants.

    Attributes:
        constants: the tensors that the operator reads besides the code. `refresh` writes into them.

    Raises:
        RuntimeError: where the chosen backend can't run it there.
    """

    def __init__(self, lowered: LoweredProgram, device: torch.device) -> None:
        self.lowered = lowered
        self.device = device
        self.layout, self.panel = layout_for(device, lowered.bytes)
        self.constants: list[Tensor] = []
        convolutions = (i for i in lowered.instructions if i.kind == Kind.CONVOLUTION)
        self._taps_are_outputs = {i.constant for i in convolutions if i.taps_are_outputs}
        self._of_thread = _ThreadMemory(device)
        self._plain: tuple[list[float], Tensor] | None = None

    @torch.no_grad()
    def refresh(self, numbers: Sequence[float | Tensor], values: Sequence[Tensor]) -> None:
        """New constants, written to the places of the old ones: all factors, and then `lowered.constants` in order."""
        packed = [self._numbers(numbers)]
        for number, value in enumerate(values, 1):
            packed.append(self._packed(number, value))
        if self.constants:
            torch._foreach_copy_(self.constants, packed)  # one launch on a GPU
        else:
            self.constants = [tensor.clone() for tensor in packed]  # some are views of the values, which stay their own

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (B,) and the gradient, like x; float32, or float64 in the reference. x is contiguous."""
        code = self.code(x.shape[0])
        sample = x.view(x.shape[0], *self.lowered.sample)
        energies, gradient = torch.ops.fastebm.run_program(sample, code, self.constants, self.workspace)
        return energies, gradient.view(x.shape)

    @property
    def images_at_once(self) -> int:
        """The images of a call that leaves all of `lowered.kept`: each worker takes one chunk, as large as may be."""
        workers = torch.get_num_threads() if self.device.type == "cpu" else 1
        return workers * most_images(self.lowered, self.layout)

    def same_as(self, other: CompiledProgram) -> bool:
        """Whether both are one program with one set of constants."""
        if self.lowered != other.lowered or len(self.constants) != len(other.constants):
            return False
        return all(torch.equal(*pair) for pair in zip(self.constants, other.constants, strict=True))

    def takes(self, x: Tensor) -> bool:
        """Whether x has the program's own sample shape; a program of vectors takes images only as a view."""
        return x.shape[1:] == self.lowered.sample

    def code(self, batch: int) -> Tensor:
        """The code for one length of the batch; the thread's workspace grows with it."""
        workers = torch.get_num_threads() if self.device.type == "cpu" else 1
        own = self._of_thread
        key = (batch, workers)
        code = own.codes.pop(key, None)
        if code is None:
            code = encode(plan_batch(self.lowered, self.layout, self.panel, batch, workers, self.device.type))
            while len(own.codes) >= MAX_CODES:
                del own.codes[next(iter(own.codes))]
            needed = int(code[9] * code[10])
            if own.workspace.numel() < needed:
                # More than is needed, so that batches that grow and grow don't leave a heap of freed workspaces.
                size = max(needed, own.workspace.numel() * 5 // 4)
                own.workspace = torch.empty(0, dtype=torch.uint8, device=self.device)
                own.workspace = torch.empty(size, dtype=torch.uint8, device=self.device)
                backends.use_large_pages(own.workspace)
                own.workspace.zero_()  # finite numbers behind the last channel of every pixel
        own.codes[key] = code  # last in order: the first one is the least recently used
        return code

    @property
    def workspace(self) -> Tensor:
        """Memory for the buffers of this thread's calls. `code` may replace it by a larger tensor."""
        return self._of_thread.workspace

    @property
    def workspace_bytes(self) -> int:
        """Memory that is kept for this thread's next call, without the constants."""
        return self.workspace.numel()

    def _numbers(self, numbers: Sequence[float | Tensor]) -> Tensor:
        """All numbers in one tensor. Those that are no tensors are copied from the host once."""
        given = {i: n for i, n in enumerate(numbers) if isinstance(n, Tensor)}
        # One more, so that there is a tensor for programs without numbers.
        plain = [*(0.0 if isinstance(n, Tensor) else float(n) for n in numbers), 0.0]
        dtype = torch.float64 if self.lowered.bytes == 8 else torch.float32
        if self._plain is None or self._plain[0] != plain:
            self._plain = plain, torch.tensor(plain, dtype=dtype, device="cpu").to(self.device)
        tensor = self._plain[1].clone()
        for i, number in given.items():
            tensor[i] = number.reshape(()).to(self.device, dtype)
        return tensor

    def _packed(self, number: int, value: Tensor) -> Tensor:
        constant = self.lowered.constants[number - 1]
        if constant.kind == "image":
            return packed_image(
                value, LANES[self.lowered.bytes], torch.float64 if self.lowered.bytes == 8 else torch.float32
            )
        dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[self.lowered.bytes]
        if self.layout == Layout.PAIRS and number in self._taps_are_outputs:
            value = taps_as_outputs(value)
        return pack_convolution(value, self.layout, self.panel, constant.dense, dtype)


class _ThreadMemory(threading.local):
    """What a program keeps for one thread: its workspace, and codes by the length of the batch and the workers."""

    def __init__(self, device: torch.device) -> None:
        self.workspace = torch.zeros(0, dtype=torch.uint8, device=device)
        self.codes: dict[tuple[int, int], Tensor] = {}


def layout_for(device: torch.device, itemsize: int) -> tuple[Layout, int]:
    """(layout, outputs in a panel) of weights of `itemsize` bytes, for the backend that runs on `device` now."""
    if itemsize == 8 or backends.select_backend(device.type, kernel="run_program") != "cpp":
        return Layout.PLAIN, 0
    kind, panel = backends.program_layout(itemsize)
    return Layout(kind), panel


# ---- constants as kernels read them


def packed_image(value: Tensor, lanes: int, dtype: torch.dtype) -> Tensor:
    """(C, H, W) to (H, W, C filled up with zeros to a multiple of `lanes`)."""
    channels = value.shape[0]
    return F.pad(value.to(dtype).permute(1, 2, 0), (0, -channels % lanes)).contiguous()


def pack_convolution(weight: Tensor, layout: Layout, panel: int, dense: bool, dtype: torch.dtype) -> Tensor:
    """A convolution's weight (out, in, kernel_y, kernel_x) in a layout; `dense` is for sources of few channels."""
    out, inner, height, width = weight.shape
    if layout == Layout.PLAIN:
        return weight.permute(2, 3, 1, 0).reshape(height * width, inner, out).to(dtype).contiguous()
    if layout == Layout.PANELS:
        filled = F.pad(weight.float(), (0, 0, 0, 0, 0, 0, 0, -out % panel))
        return filled.reshape(-1, panel, inner, height * width).permute(0, 3, 2, 1).contiguous()
    weight = weight.to(torch.bfloat16)
    if layout == Layout.PAIRS:
        filled = F.pad(weight, (0, 0, 0, 0, 0, inner % 2, 0, -out % panel))
        pairs = filled.reshape(-1, panel, (inner + 1) // 2, 2, height * width)
        return pairs.permute(0, 4, 2, 1, 3).contiguous()
    tiles = tiles_of_panel(out)
    weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, -out % (16 * tiles)))
    if dense:
        # One step for each row of the kernel: its 32 numbers are (x, channel) with four channels to a pixel.
        rows = F.pad(weight, (0, 0, 0, 0, 0, DENSE - inner)).permute(0, 2, 3, 1).reshape(-1, height, width * DENSE)
        steps = F.pad(rows, (0, 32 - width * DENSE))
    else:
        filled = F.pad(weight, (0, 0, 0, 0, 0, -inner % 32))
        steps = filled.permute(0, 2, 3, 1).reshape(len(filled), -1, 32)
    panels = steps.reshape(-1, tiles, 16, steps.shape[1], 16, 2)  # panel, tile, output, step, pair, one of the pair
    return panels.permute(0, 3, 1, 4, 2, 5).contiguous()


def unpack_convolution(
    packed: Tensor, layout: Layout, shape: tuple[int, int, int, int], dense: bool, dtype: torch.dtype
) -> Tensor:
    """The inverse of `pack_convolution`: the weight of `shape`."""
    out, inner, height, width = shape
    packed = packed.to(dtype)
    if layout == Layout.PLAIN:
        return packed.reshape(height, width, inner, out).permute(3, 2, 0, 1)
    if layout == Layout.PANELS:
        return packed.permute(0, 3, 2, 1).reshape(-1, inner, height, width)[:out]
    if layout == Layout.PAIRS:
        panels, _, pairs, panel, _ = packed.shape
        filled = packed.permute(0, 3, 2, 4, 1).reshape(panels * panel, 2 * pairs, height, width)
        return filled[:out, :inner]
    steps = packed.permute(0, 2, 4, 1, 3, 5)
    steps = steps.reshape(-1, steps.shape[3], 32)[:out]
    if dense:
        return steps[:, :, : width * DENSE].reshape(out, height, width, DENSE)[..., :inner].permute(0, 3, 1, 2)
    return steps.reshape(out, height, width, -1)[..., :inner].permute(0, 3, 1, 2)


def taps_as_outputs(weight: Tensor) -> Tensor:
    """A convolution's weight as that of a 1x1 convolution whose outputs are (tap, output)."""
    out, inner, height, width = weight.shape
    return weight.permute(2, 3, 0, 1).reshape(height * width * out, inner, 1, 1)


def tiles_of_panel(out: int) -> int:
    """How many tiles of 16 outputs a panel of `Layout.TILES` has."""
    return 1 if out <= 16 else 2


# ---- planning


def plan_batch(
    lowered: LoweredProgram, layout: Layout, panel: int, batch: int, workers: int, device: str
) -> PlannedProgram:
    """Plan chunks, segments and buffers for one batch size. Only the C++ kernels divide images among workers."""
    whole = device != "cpu" or layout == Layout.PLAIN
    team = not whole and workers > 1 and batch < workers
    if whole:
        chunk, segments = max(batch, 1), [Segment(0, len(lowered.instructions), max(batch, 1))]
    else:
        chunk = max(1, batch) if team else chunk_size(batch, workers, most_images(lowered, layout))
        segments = split_into_segments(lowered, chunk)
    slot, buffers = allocate_buffers(lowered, layout, segments, chunk)
    header = Header(layout, panel, lowered.bytes, chunk, slot, 1 if team or whole else workers, int(team))
    planned = PlannedProgram(header, buffers, lowered.instructions, lowered.epilogues, tuple(segments))
    check_code(planned)
    return planned


def most_images(lowered: LoweredProgram, layout: Layout) -> int:
    """The images that a worker may take at a time: `CHUNK`, and fewer where they are large.

    Where results are kept, as many as with matrix tiles: each call adds to the gradients of all weights.
    """
    image_bytes = sum(math.prod(_strides(buffer)[2:]) * buffer.bytes for buffer in lowered.buffers)
    many = layout == Layout.TILES or lowered.kept
    whole, part = (CHUNK_BYTES, CHUNK_BYTES // 2) if many else (VECTOR_CHUNK_BYTES,) * 2
    most = CHUNK
    while most > 1 and most * image_bytes > (whole if most == CHUNK else part):
        most //= 2
    return most


def chunk_size(batch: int, workers: int, most: int) -> int:
    """The images that a worker takes at a time: at most so many, and as equal as may be."""
    rounds = max(1, -(-batch // (workers * most)))
    return max(1, -(-batch // (workers * rounds)))


def split_into_segments(lowered: LoweredProgram, chunk: int) -> list[Segment]:
    """Runs of instructions that work on as many images at a time as a core's cache holds, a power of two.

    Small instructions go along with their neighbours. Convolutions of narrow maps take the whole chunk, because rows of
    matrix tiles then are images.
    """
    segments: list[Segment] = []
    for i, instruction in enumerate(lowered.instructions):
        narrow = instruction.kind == Kind.CONVOLUTION and instruction.width < 16
        images = chunk if narrow else _images_in_cache(lowered, instruction, chunk)
        last = segments[-1] if segments else None
        if last is not None and (images == last.images or _can_join_segment(instruction, images, last.images, chunk)):
            segments[-1] = Segment(last.first, last.count + 1, min(images, last.images))
        else:
            segments.append(Segment(i, 1, images))
    return segments


def _can_join_segment(instruction: Instruction, images: int, with_images: int, chunk: int) -> bool:
    """Whether an instruction for `images` joins a segment for another number, none of which is a whole chunk's."""
    if instruction.kind != Kind.CONVOLUTION:
        return images >= with_images
    return with_images < chunk and images < chunk and max(images, with_images) <= 2 * min(images, with_images)


def _images_in_cache(lowered: LoweredProgram, instruction: Instruction, chunk: int) -> int:
    touched = {*lowered.reads(instruction), *lowered.writes(instruction)}
    size = sum(_strides(lowered.buffers[b])[2] * lowered.buffers[b].bytes for b in touched)
    images = 1
    while 2 * images <= chunk and 2 * images * size <= CACHE_BYTES:
        images *= 2
    return chunk if 2 * images > chunk else images


def _strides(buffer: Buffer, together: int = 1, zeros: int = DENSE_MARGIN) -> tuple[int, int, int]:
    """Numbers from pixel to pixel, row to row and image to image.

    With `together` > 1 so many images lie pixel by pixel beside each other: for tiles whose rows are images. Rows of
    dense images end in `zeros` pixels of zeros or more.
    """
    lanes = LANES[buffer.bytes]
    pixel = DENSE if buffer.channels <= DENSE and buffer.pixel_stride == DENSE else -(-buffer.channels // lanes) * lanes
    margin = buffer.margin
    if together > 1:
        return together * pixel, (2 * margin + buffer.width) * together * pixel, pixel
    extra = max(0, zeros - margin) if pixel == DENSE else 0
    row = (2 * margin + extra + buffer.width) * pixel
    line = LINE // buffer.bytes
    # An odd number of cache lines from image to image: equal pixels of 16 images then lie in different cache sets.
    image = -(-buffer.height * row // line)
    return pixel, row, (image + (image % 2 == 0)) * line


def _margins(lowered: LoweredProgram) -> dict[int, int]:
    """The zeros beside the rows of each buffer that tiles of neighbouring pixels read in convolutions with padding."""
    margins: dict[int, int] = {}
    for i in lowered.instructions:
        if i.kind == Kind.CONVOLUTION:
            # Those that dense images need behind their rows on top of it are no margin of both sides.
            beside = tile_window(i, replace(lowered.buffers[i.source], pixel_stride=0))
            margins[i.source] = max(margins.get(i.source, 0), *beside)
    return margins


def allocate_buffers(
    lowered: LoweredProgram, layout: Layout, segments: Sequence[Segment], chunk: int
) -> tuple[int, tuple[Buffer, ...]]:
    """The bytes of one slot, and the buffers with strides and offsets in it.

    A buffer that lives within one segment has room for that segment's images only; memory is used again once the last
    reader is through. What crosses segments holds its place for the whole of them, because within a segment
    instructions repeat. What is kept holds it to the end.
    """
    of_instruction = [number for number, s in enumerate(segments) for _ in range(s.count)]
    lives: dict[int, list[int]] = {}
    for i, instruction in enumerate(lowered.instructions):
        for b in (*lowered.reads(instruction), *lowered.writes(instruction)):
            lives.setdefault(b, []).append(i)
    placed_at: list[tuple[int, int, int, int]] = []  # first, last, offset, end
    convolutions = [i for i in lowered.instructions if i.kind == Kind.CONVOLUTION and layout == Layout.TILES]
    margins = _margins(lowered) if layout == Layout.TILES else {}
    buffers = [replace(buffer, margin=margins.get(b, 0)) for b, buffer in enumerate(lowered.buffers)]
    order = sorted(lives, key=lambda b: lives[b][0])
    for b in order:
        first, last = min(lives[b]), max(lives[b])
        local = of_instruction[first] == of_instruction[last] and b not in lowered.kept
        last = len(lowered.instructions) - 1 if b in lowered.kept else last
        images = segments[of_instruction[first]].images if local else chunk
        if not local:
            first = segments[of_instruction[first]].first
            end_segment = segments[of_instruction[last]]
            last = end_segment.first + end_segment.count - 1
        narrow = layout == Layout.TILES and buffers[b].width < 16 and buffers[b].pixel_stride != DENSE
        zeros = (tile_window(i, buffers[b])[1] for i in convolutions if i.source == b)
        pixel, row, image = _strides(buffers[b], images if narrow else 1, max(DENSE_MARGIN, *zeros, 0))
        whole = buffers[b].height * row if narrow and images > 1 else images * image
        # Behind the last image a matrix tile may read, and not use, 16 pixels at a stride.
        size = -(-((whole + 64 * pixel) * buffers[b].bytes) // LINE) * LINE
        taken = sorted((o, e) for begin, end, o, e in placed_at if begin <= last and first <= end)
        offset = 0
        for start, end in taken:
            if offset + size <= start:
                break
            offset = max(offset, end)
        placed_at.append((first, last, offset, offset + size))
        buffers[b] = replace(
            buffers[b], images=images, offset=offset, pixel_stride=pixel, row_stride=row, image_stride=image
        )
    # Matrix tiles of 16 images read, and do not use, what lies behind the last image of a short chunk.
    largest = max((b.image_stride * b.bytes for b in buffers if b.width < 32), default=0)
    slot = max((end for *_, end in placed_at), default=0) + 16 * largest
    reaches = (tile_reach(i, buffers[i.source], buffers[i.source].images) for i in convolutions)
    return -(-max(slot, *reaches, 0) // 4096) * 4096, tuple(buffers)


# Operator -----------------------------------------------------------------------------------------------------------


def check(name: str, x: Tensor, code: Tensor, constants: Sequence[Tensor], workspace: Tensor) -> None:
    """Raises where operator `name` can't run this program on x."""
    if x.dim() == 0:
        raise ValueError("x must be (batch, ...), got a tensor without dimensions")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be float32 (float64 in the reference), got {x.dtype}")
    if code.dtype != torch.int64 or code.dim() != 1 or code.device.type not in ("cpu", "meta"):
        raise ValueError(
            f"code must be an int64 vector on the CPU, got {code.dtype} {tuple(code.shape)} on {code.device}"
        )
    for what, tensor in (("workspace", workspace), *(("a constant", t) for t in constants)):
        if tensor.device != x.device:
            raise ValueError(f"{what} must be on x's device {x.device}, got {tensor.device}")
    refuse_autograd(name, x, *constants)


def _results(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0]), torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_run_program(x: Tensor, code: Tensor, constants: Sequence[Tensor], workspace: Tensor) -> tuple[Tensor, Tensor]:
    check("run_program", x, code, constants, workspace)
    return _results(x)


@register("run_program", fake=_fake_run_program)
def _run_program(x: Tensor, code: Tensor, constants: Sequence[Tensor], workspace: Tensor) -> tuple[Tensor, Tensor]:
    check("run_program", x, code, constants, workspace)
    energies, gradient = _results(x)
    if x.dtype == torch.float64:
        reference_run_program(energies, gradient, x, code, constants, workspace)
    elif x.numel():
        launch("run_program", energies, gradient, x.contiguous(), code, list(constants), workspace)
    return energies, gradient


# Reference ----------------------------------------------------------------------------------------------------------


def reference_run_program(
    energies: Tensor, gradient: Tensor, x: Tensor, code: Tensor, constants: Sequence[Tensor], workspace: Tensor
) -> None:
    """Kernel `run_program` in plain PyTorch. It computes with tensors of its own, and leaves what a kernel leaves."""
    program, needs = checked_program(code)
    if not needs.check_call(x, constants):
        energies.zero_()
        gradient.zero_()
    _Reference(program, x, list(constants), energies, gradient, workspace).run()


def first_maximum(x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """1 where a pixel of x (B, C, H, W) is the first of the largest in its window, 0 elsewhere; see `Kind`."""
    result = torch.zeros_like(x)
    if x.shape[2] >= kernel[0] and x.shape[3] >= kernel[1]:
        _, at = F.max_pool2d(x, kernel, return_indices=True)
        result.flatten(2).scatter_(2, at.flatten(2), 1.0)
    return result


class _Reference:
    """One run: every buffer as a dense (B, C, H, W) tensor, from its first write on."""

    def __init__(
        self,
        code: PlannedProgram,
        x: Tensor,
        constants: list[Tensor],
        energies: Tensor,
        gradient: Tensor,
        workspace: Tensor,
    ) -> None:
        self.code, self.x, self.constants = code, x, constants
        self.energies, self.gradient, self.workspace = energies, gradient, workspace
        self.stored = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
        self.buffers: dict[int, Tensor] = {}

    def run(self) -> None:
        for instruction in self.code.instructions:
            v = self._computed(instruction)
            for step in self.code.epilogue(instruction):
                v = self._done(instruction, step, v)

    def _computed(self, i: Instruction) -> Tensor:
        """The values before the epilogue, (B, channels, height, width)."""
        if i.kind == Kind.LOAD:
            if not i.source_channels:
                return self.x.new_ones(len(self.x), i.channels, i.height, i.width)
            v = self.x.reshape(len(self.x), i.source_channels, i.height, i.width)
            return torch.cat([v, torch.ones_like(v[:, :1])], 1) if i.constant > 0 else v
        source = self.buffers[i.source][:, i.source_channel : i.source_channel + i.source_channels].to(self.x.dtype)
        if i.kind == Kind.GATHER:
            return self._gathered(i, source)
        if i.kind == Kind.CONVOLUTION:
            return self._convolved(i, source)
        if i.kind == Kind.POOL:
            ones = torch.ones(i.channels, 1, i.kernel_y, i.kernel_x, dtype=source.dtype, device=source.device)
            return F.conv2d(self._window(i, source), ones, None, (i.stride_y, i.stride_x), groups=i.channels)
        if i.kind == Kind.LOG_SUM_EXP:
            return source.logsumexp(1, keepdim=True)
        return self._first_maximum(i, source) if i.kind == Kind.FIRST_MAXIMUM else source.softmax(1)

    def _first_maximum(self, i: Instruction, source: Tensor) -> Tensor:
        return first_maximum(source, (i.kernel_y, i.kernel_x))

    def _gathered(self, i: Instruction, source: Tensor) -> Tensor:
        rows = torch.arange(i.height, device=source.device) - i.pad_y
        columns = torch.arange(i.width, device=source.device) - i.pad_x
        inside_y = (rows >= 0) & (rows < source.shape[2] * i.kernel_y)
        inside_x = (columns >= 0) & (columns < source.shape[3] * i.kernel_x)
        rows, columns = (
            (rows // i.kernel_y).clamp(0, source.shape[2] - 1),
            (columns // i.kernel_x).clamp(0, source.shape[3] - 1),
        )
        v = source[:, :, rows][:, :, :, columns]
        if not bool(inside_y.all() & inside_x.all()):
            fill = (
                self.constants[0][i.constant].to(v.dtype)
                if i.constant >= 0
                else torch.zeros((), dtype=v.dtype, device=v.device)
            )
            v = torch.where(inside_y[:, None] & inside_x[None], v, fill)
        return v.expand(-1, i.channels, -1, -1)

    def _window(self, i: Instruction, source: Tensor) -> Tensor:
        """The source with the border of zeros that makes the grid come out of a convolution without padding."""
        height, width = (
            (n - 1) * s + (k - 1) * d + 1
            for n, s, k, d in (
                (i.height, i.stride_y, i.kernel_y, i.dilation_y),
                (i.width, i.stride_x, i.kernel_x, i.dilation_x),
            )
        )
        behind = (max(0, width - i.pad_x - source.shape[3]), max(0, height - i.pad_y - source.shape[2]))
        padded = F.pad(source, (max(0, i.pad_x), behind[0], max(0, i.pad_y), behind[1]))
        top, left = max(0, -i.pad_y), max(0, -i.pad_x)
        return padded[:, :, top : top + height, left : left + width]

    def _convolved(self, i: Instruction, source: Tensor) -> Tensor:
        shape = (i.channels, i.source_channels, i.kernel_y, i.kernel_x)
        dense = self.code.buffers[i.source].pixel_stride == DENSE
        layout = Layout(self.code.header.layout)
        packed = self.constants[i.constant]
        if layout == Layout.PAIRS and i.taps_are_outputs:
            columns = (i.channels * i.kernel_y * i.kernel_x, i.source_channels, 1, 1)
            flat = unpack_convolution(packed, layout, columns, dense, self.x.dtype)
            weight = flat.reshape(i.kernel_y, i.kernel_x, i.channels, i.source_channels).permute(2, 3, 0, 1)
        else:
            weight = unpack_convolution(packed, layout, shape, dense, self.x.dtype)
        stride, dilation = (i.stride_y, i.stride_x), (i.dilation_y, i.dilation_x)
        return F.conv2d(self._window(i, source), weight, None, stride, 0, dilation)

    def _done(self, i: Instruction, step: Epilogue, v: Tensor) -> Tensor:
        """The values after one operation of the epilogue."""
        do = EpilogueOp(step.op)
        if do in (EpilogueOp.ADD_CONSTANT, EpilogueOp.MULTIPLY_CONSTANT):
            constant = self.constants[step.number].permute(2, 0, 1)[: i.channels].to(v.dtype)
            if constant.shape[1] > 1 or constant.shape[2] > 1:
                rows, columns = self._pixels(i)
                constant = constant[:, rows if constant.shape[1] > 1 else rows * 0][
                    :, :, columns if constant.shape[2] > 1 else columns * 0
                ]
            return v + constant if do == EpilogueOp.ADD_CONSTANT else v * constant
        if do == EpilogueOp.SCALE:
            return v * self._number(step, v)
        if do == EpilogueOp.ADD:
            return v + self._number(step, v) * self._read(i, step, v)
        if do == EpilogueOp.MULTIPLY:
            return v * self._read(i, step, v)
        if do == EpilogueOp.ACTIVATE:
            return program_activation(v, step.activation, self._parameters(step))
        if do == EpilogueOp.ACTIVATE_KEEPING:
            self._write(i, step, program_derivative(v, step.activation, self._parameters(step), of_result=False))
            return program_activation(v, step.activation, self._parameters(step))
        if do == EpilogueOp.SLOPE:
            kept = self._read(i, step, v)
            return v * program_derivative(kept, step.activation, self._parameters(step), of_result=bool(step.of_result))
        if do == EpilogueOp.STORE:
            self._write(i, step, v)
        elif do == EpilogueOp.STORE_GRADIENT:
            rows, columns = self._pixels(i)
            shaped = self.gradient.view(len(v), i.channels, -1, self._width())
            shaped[:, :, rows[:, None], columns] = v.to(shaped.dtype)
        else:
            self.energies.copy_(v.reshape(-1))
        return v

    def _width(self) -> int:
        return self.x.shape[-1] if self.x.dim() == 4 else 1

    def _pixels(self, i: Instruction) -> tuple[Tensor, Tensor]:
        """The rows and columns of buffers that the grid stands for."""
        rows = torch.arange(i.height, device=self.x.device) * i.step_y + i.start_y
        return rows, torch.arange(i.width, device=self.x.device) * i.step_x + i.start_x

    def _read(self, i: Instruction, step: Epilogue, v: Tensor) -> Tensor:
        rows, columns = self._pixels(i)
        count = 1 if step.broadcast else v.shape[1]
        part = self.buffers[step.buffer][:, step.channel : step.channel + count]
        return part[:, :, rows // step.factor_y][:, :, :, columns // step.factor_x].to(v.dtype)

    def _write(self, i: Instruction, step: Epilogue, v: Tensor) -> None:
        rows, columns = self._pixels(i)
        if step.buffer not in self.buffers:
            b = self.code.buffers[step.buffer]
            shape = (len(self.x), b.channels, b.height, b.width)
            self.buffers[step.buffer] = torch.zeros(shape, dtype=self.stored[b.bytes], device=self.x.device)
        buffer = self.buffers[step.buffer]
        part = (slice(None), slice(step.channel, step.channel + v.shape[1]), rows[:, None], columns)
        buffer[part] = v.to(buffer.dtype)
        chunk = self.code.header.chunk
        if self.code.buffers[step.buffer].images >= chunk:
            for number, images in enumerate(buffer.split(chunk)):
                self._stored_images(step.buffer, number, len(images))[part] = images[part]

    def _stored_images(self, number: int, chunk: int, images: int) -> Tensor:
        """The images (images, channels, height, width) of a buffer in the workspace, as a kernel writes them."""
        b, header = self.code.buffers[number], self.code.header
        begin = chunk % header.workers * header.slot
        numbers = self.workspace[begin : begin + header.slot // b.bytes * b.bytes].view(self.stored[b.bytes])
        first = numbers.storage_offset() + b.offset // b.bytes + b.margin * b.pixel_stride
        strides = (b.image_stride, 1, b.row_stride, b.pixel_stride)
        return numbers.as_strided((images, b.channels, b.height, b.width), strides, first)

    def _number(self, step: Epilogue, v: Tensor) -> Tensor | float:
        return self.constants[0][step.number].to(v.dtype) if step.number >= 0 else 1.0

    def _parameters(self, step: Epilogue) -> list[float]:
        return self.constants[0][step.number : step.number + 3].tolist() if step.number >= 0 else []
