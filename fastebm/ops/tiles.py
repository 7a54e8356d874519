"""What matrix tiles of x86 (AMX) read around a convolution's windows, for the plan of a program and its check.

A tile is 16 rows of 32 numbers. Its rows are 16 neighbouring pixels, or one pixel of 16 images; so it reads beside the
image what a padded window sees there, which must be zeros, and behind the last image what nobody uses, which must be
memory of the slot. `csrc/cpu/program_convolution_amx.h` is the reader.
"""

from __future__ import annotations

from .instructions import Buffer, Instruction

__all__ = ["DENSE", "tile_reach", "tile_window"]

# Images of few channels stay dense: a pixel then has this many numbers, and a row of a kernel is one short vector.
DENSE = 4
ROWS, INPUTS = 16, 32


def tile_window(i: Instruction, b: Buffer) -> tuple[int, int]:
    """Pixels beside the rows of b, (left, right), that are multiplied for results that count: they must be zeros.

    Over dense images a load is 8 pixels, however narrow the kernel: 0 * NaN is NaN where weights are zero, too.
    """
    columns = INPUTS // DENSE - 1 if b.pixel_stride == DENSE else (i.kernel_x - 1) * i.dilation_x
    return max(0, i.pad_x), max(0, (i.width - 1) * i.stride_x + columns - i.pad_x - (b.width - 1))


def tile_reach(i: Instruction, b: Buffer, images: int) -> int:
    """The byte of the slot behind the last one that a load may touch, with so many images at a time."""
    dense = b.pixel_stride == DENSE
    tap = 0 if dense else (i.kernel_x - 1) * i.dilation_x
    inputs = 1 if dense else -(-i.source_channels // INPUTS)
    column = (i.width - 1) * i.stride_x - i.pad_x + tap
    row_end = (-(-i.width // ROWS) * ROWS - 1) * i.stride_x - i.pad_x + tap
    last = max(
        (images - 1) * b.image_stride + (b.margin + row_end) * b.pixel_stride,
        (-(-images // ROWS) * ROWS - 1) * b.image_stride + (b.margin + max(column, b.width - 1)) * b.pixel_stride,
    )
    number = last + (b.height - 1) * b.row_stride + i.source_channel + INPUTS * inputs
    return b.offset + number * b.bytes
