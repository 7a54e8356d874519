"""Philox words, uniforms and normals as Triton device functions: csrc/philox.h and csrc/normal.h, step for step.

A row is one quad of one chain: four consecutive elements, drawn by one thread from one counter. A program covers QUADS
quads of NUM_CHAINS chains, so that tiny images (4x4 is four quads) fill its lanes too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ... import rng
from ..normal import COSINE, LOG, SINE, check_addressable, expand_chain_ids

# Two rows a thread: key, schedule and the keys of rounds, which are the same for both, are worked out once. The
# interpreter pays for each operation and not for each row, so it gets long programs.
WARPS = 4
INTERPRETED: bool = triton.knobs.runtime.interpret
QUADS_A_THREAD = 2
ROWS = 1 << 16 if INTERPRETED else 32 * WARPS * QUADS_A_THREAD
_INTERPRETED = tl.constexpr(INTERPRETED)

_MULTIPLIER0, _MULTIPLIER1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_WEYL0, _WEYL1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
_MAX_STEP, _MAX_CHAIN = tl.constexpr(rng.MAX_STEP), tl.constexpr(rng.MAX_CHAIN)
_LOG, _SINE, _COSINE = (tl.constexpr(tuple(coefficients)) for coefficients in (LOG, SINE, COSINE))
_MINUS_TWO_LOG_TWO = tl.constexpr(float.fromhex("-0x1.62e430p-23"))


@triton.jit
def philox(quad: tl.tensor, step: tl.tensor, chain: tl.tensor, stream: tl.tensor, seed: tl.tensor) -> tl.tuple:
    """The four words of each quad. `quad` (rows,), `chain` (rows,) or a number; int64 all, taken as they are."""
    c0, c1, c2 = quad.to(tl.uint32), step.to(tl.uint32), chain.to(tl.uint32)
    c3 = (chain >> 32).to(tl.uint32) | tl.cast(stream << 24, tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, _MULTIPLIER0), c0 * _MULTIPLIER0
        high1, low1 = tl.umulhi(c2, _MULTIPLIER1), c2 * _MULTIPLIER1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += _WEYL0
        k1 += _WEYL1
    return c0, c1, c2, c3


@triton.jit
def polynomial(x: tl.tensor, COEFFICIENTS: tl.constexpr, COUNT: tl.constexpr) -> tl.tensor:
    """A polynomial, whose COUNT coefficients (3 or more) are given from the highest power on."""
    p = tl.fma(x, COEFFICIENTS[0], COEFFICIENTS[1])
    for i in tl.static_range(2, COUNT):
        p = tl.fma(p, x, COEFFICIENTS[i])
    return p


@triton.jit
def root_of_log(x: tl.tensor) -> tl.tensor:
    """The rounded square root of x = 0 or x in [2^-24, 2^7], without the branches that all of float32 takes.

    Newton's steps of csrc/normal.h, from any number within 4 units in the last place of 1 / sqrt(x).
    """
    if _INTERPRETED:
        return tl.sqrt_rn(x)
    else:
        inverse = tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x + 2.0**-100], tl.float32, is_pure=True, pack=1
        )
        root, half = x * inverse, 0.5 * inverse
        error = tl.fma(-root, half, 0.5)
        root, half = tl.fma(root, error, root), tl.fma(half, error, half)
        return tl.fma(tl.fma(-root, root, x), half, root)


@triton.jit
def uniform_from_bits(bits: tl.tensor) -> tl.tensor:
    """float32 in (0, 1]."""
    return tl.fma(bits.to(tl.float32), 2.0**-32, 2.0**-33)


@triton.jit
def minus_two_log(u: tl.tensor) -> tl.tensor:
    """-2 log(u) for u in (0, 1]."""
    bits = u.to(tl.int32, bitcast=True)
    scaled = (bits - 0x3F3504F3) & -0x800000  # 2^23 k where u is 2^k (1 + f)
    f = (bits - scaled).to(tl.float32, bitcast=True) - 1.0
    log1p = tl.fma(f * f, polynomial(f, _LOG, 8), -2.0 * f)
    return tl.fma(scaled.to(tl.float32), _MINUS_TWO_LOG_TWO, log1p)


@triton.jit
def cos_sin_turn(bits: tl.tensor) -> tl.tuple:
    """cos and sin of an angle, (bits + 1/2) / 2^32 of a turn."""
    quarters = tl.fma(bits.to(tl.float32), 2.0**-30, 2.0**-31)
    quadrant = (quarters + 0.5).to(tl.int32)
    r = quarters - quadrant.to(tl.float32)
    z = r * r
    s = polynomial(z, _SINE, 4) * r
    c = polynomial(z, _COSINE, 5)
    swap = (quadrant & 1) != 0
    cosine = tl.where(swap, s, c).to(tl.int32, bitcast=True) ^ (((quadrant + 1) & 2) << 30)
    sine = tl.where(swap, c, s).to(tl.int32, bitcast=True) ^ ((quadrant & 2) << 30)
    return cosine.to(tl.float32, bitcast=True), sine.to(tl.float32, bitcast=True)


@triton.jit
def normal_pair(radius_bits: tl.tensor, angle_bits: tl.tensor) -> tl.tuple:
    """Two independent standard normals: radius from the first word, angle from the second."""
    radius = root_of_log(minus_two_log(uniform_from_bits(radius_bits)))
    cosine, sine = cos_sin_turn(angle_bits)
    return radius * cosine, radius * sine


@triton.jit
def side_by_side(n0: tl.tensor, n1: tl.tensor, n2: tl.tensor, n3: tl.tensor) -> tl.tensor:
    """(rows, 4) from four (rows,): the four elements of a row stay in the thread that has it."""
    return tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape((n0.shape[0], 4))


@triton.jit
def normal_rows(words: tl.tuple) -> tl.tensor:
    """(rows, 4) normals from words."""
    n0, n1 = normal_pair(words[0], words[1])
    n2, n3 = normal_pair(words[2], words[3])
    return side_by_side(n0, n1, n2, n3)


@triton.jit
def uniform_rows(words: tl.tuple) -> tl.tensor:
    """(rows, 4) uniforms from words."""
    return side_by_side(
        uniform_from_bits(words[0]),
        uniform_from_bits(words[1]),
        uniform_from_bits(words[2]),
        uniform_from_bits(words[3]),
    )


@triton.jit
def quads_of(elements: tl.tensor) -> tl.tensor:
    """Quads of a chain, one where it has no elements. The sum of `tl.cdiv` overflows from 2^31 - 3 elements on."""
    return (elements - 1) // 4 + 1


@triton.jit
def rows_of_program(batch: tl.tensor, elements: tl.tensor, QUADS: tl.constexpr, NUM_CHAINS: tl.constexpr) -> tl.tuple:
    """(slot of the chain in the batch, quad, whether the two exist), int64, of each row of this program."""
    quads = quads_of(elements)
    across = tl.cdiv(quads, QUADS)
    program = tl.program_id(0)
    lane = tl.arange(0, QUADS * NUM_CHAINS)
    quad = (program % across).to(tl.int64) * QUADS + lane % QUADS
    slot = (program // across).to(tl.int64) * NUM_CHAINS + lane // QUADS
    return slot, quad, (slot < batch) & (quad < quads)


@triton.jit
def chain_of(chain_ids: tl.tensor, slot: tl.tensor, inside: tl.tensor, LISTED: tl.constexpr) -> tl.tensor:
    """Ids of the chains of rows: listed one by one, or consecutive from the first."""
    if LISTED:
        return tl.load(chain_ids + slot, mask=inside, other=0)
    else:
        return tl.load(chain_ids) + slot


@triton.jit
def addressable(step: tl.tensor, chain: tl.tensor) -> tl.tensor:
    """Whether the counter has room for step and chain; where not, the noise is NaN, since a kernel can't raise."""
    return (step >= 0) & (step < _MAX_STEP) & (chain >= 0) & (chain < _MAX_CHAIN)


def tile(batch: int, quads: int) -> tuple[tuple[int], int, int]:
    """(grid, QUADS, NUM_CHAINS) of programs that cover `batch` chains of `quads` quads."""
    # Plain integers: triton.cdiv and its kin take microseconds each when called from the host.
    across = min(ROWS, 1 << (quads - 1).bit_length())
    chain_ids = ROWS // across
    if INTERPRETED:
        chain_ids = min(chain_ids, 1 << (batch - 1).bit_length())
    return (-(-quads // across) * -(-batch // chain_ids),), across, chain_ids


def check_readable_address(key: Tensor, chain_ids: Tensor, batch: int) -> None:
    """Raise on an overflow where the address can be read without stalling a GPU, as the other CPU backends do."""
    if not key.is_cuda:
        check_addressable(key, expand_chain_ids(chain_ids, batch))
