"""Hand-written PTX, a few lines at a time, for the tests of the machine itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from .machine import Kernel

REGISTERS = """
    .reg .pred %p<9>; .reg .b16 %h<20>; .reg .b32 %r<99>; .reg .b64 %rd<99>;
"""


def kernel(body: str, shared: int = 0, functions: str = "") -> Kernel:
    """A kernel whose parameters are three addresses, which begins with them in %rd0, %rd1, %rd2 and tid.x in %r0."""
    memory = f".shared .align 16 .b8 room[{shared}];" if shared else ""
    return Kernel(f"""
        .version 8.0
        .target sm_80
        .address_size 64
        {functions}
        .visible .entry tested(.param .u64 first, .param .u64 second, .param .u64 third)
        {{
            {memory} {REGISTERS}
            ld.param.u64 %rd0, [first]; ld.param.u64 %rd1, [second]; ld.param.u64 %rd2, [third];
            mov.u32 %r0, %tid.x;
            {body}
            ret;
        }}""")


def run(
    tested: Kernel, *arrays: np.ndarray, warps: int = 1, blocks: int = 1, seed: int = 0, budget: int = 10**6
) -> None:
    """One launch on arrays, in place."""
    places = [(array.ctypes.data, array.nbytes) for array in arrays]
    tested.run((blocks,), warps, [address for address, _ in places], places, seed=seed, budget=budget)


def each_lane(instruction: str, result: int, *inputs: tuple[int, Sequence[int]]) -> list[int]:
    """What an instruction makes of inputs, given as (bits of the register, values), in %a, %b and %c; in %d."""
    count = len(inputs[0][1])
    padded = -(-count // 32) * 32
    table = np.zeros((max(len(inputs), 1), padded), dtype=np.uint64)
    for row, (width, values) in zip(table, inputs, strict=True):
        row[:count] = [value & (2**width - 1) for value in values]
    found = np.zeros(padded, dtype=np.uint64)
    loads = "".join(
        f".reg .b{width} %{name}; ld.global.b{width} %{name}, [%rd3+{8 * padded * k}];"
        for k, (name, (width, _)) in enumerate(zip("abc", inputs, strict=False))
    )
    body = f"""
        mov.u32 %r1, %ctaid.x; mad.lo.s32 %r2, %r1, 32, %r0; mad.wide.u32 %rd3, %r2, 8, %rd1;
        mad.wide.u32 %rd4, %r2, 8, %rd0;
        {loads} .reg .b{result} %d;
        {instruction}
        st.global.b{result} [%rd4], %d;"""
    run(kernel(body), found, table, blocks=padded // 32)
    return [int(value) for value in found[:count]]


def signed(value: int, width: int) -> int:
    """The number that so many bits stand for in two's complement."""
    value &= 2**width - 1
    return value - 2**width if value >> (width - 1) else value


def bits32(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def from_bits(bits: int, mantissa: int, exponent: int) -> float:
    """The number of an IEEE format with so many bits, without the sign, in each part."""
    sign = -1.0 if bits >> (mantissa + exponent) & 1 else 1.0
    power, part = bits >> mantissa & (2**exponent - 1), bits & (2**mantissa - 1)
    if power == 2**exponent - 1:
        return math.nan if part else sign * math.inf
    bias = 2 ** (exponent - 1) - 1
    if power == 0:
        return sign * math.ldexp(part, 1 - bias - mantissa)
    return sign * math.ldexp(2**mantissa + part, power - bias - mantissa)


def to_bits(value: Fraction, mantissa: int, exponent: int) -> int:
    """The nearest number of such a format, ties to even; value must not be zero."""
    sign, size, bias = int(value < 0), abs(value), 2 ** (exponent - 1) - 1
    power = max(1 - bias, math.floor(math.log2(size)) - 1)
    while power < bias and size >= Fraction(2) ** (power + 1):
        power += 1
    steps = size / Fraction(2) ** (power - mantissa)
    whole = int(steps)
    whole += steps - whole > Fraction(1, 2) or (steps - whole == Fraction(1, 2) and whole % 2 == 1)
    found = ((power + bias - 1) << mantissa) + whole  # a carry goes into the exponent
    return (sign << (mantissa + exponent)) | min(found, (2**exponent - 1) << mantissa)
