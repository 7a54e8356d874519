"""Standard normal noise as a pure function of (seed, step, chain, stream, element).

The computation is that of csrc/philox.h and csrc/normal.h, step for step; `fastebm/rng.py` says what the counter
contains. The reference computes a fused multiply-add in float64 and rounds it to float32. In rare cases this double
rounding differs from a true one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import rng
from ..scalars import as_device, as_int
from .backends import launch, register

__all__ = ["normal"]

_WORD = 0xFFFFFFFF


def normal(
    shape: Sequence[int],
    *,
    seed: int,
    step: int = 0,
    stream: int = 0,
    chain_ids: int | Tensor = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Standard normal noise that depends only on seed, step, stream, chain id and element, not on the order of calls.

    Args:
        shape: (chains, ...); element e of a chain counts row-major through the rest of the shape.
        seed: in [-2^63, 2^64).
        step: in [0, 2^32).
        stream: in [0, 256); `fastebm.rng.Stream` lists the library's own.
        chain_ids: id of the first chain, the others follow; or an int64 tensor of shape (shape[0],). Ids in [0, 2^56).
        device: where the noise is made; bit-equal on every compiled backend.
        dtype: float32 (default), float64, bfloat16 or float16; drawn in float32, then cast. |x| <= 6.77.

    Returns:
        A contiguous tensor of `shape`.

    Raises:
        ValueError: for numbers or shapes out of range (the counter would overflow), or another dtype.

    Source: Box & Muller 1958 over Philox4x32-10 (Salmon et al., SC 2011).

    Example:
        >>> import fastebm
        >>> noise = fastebm.ops.normal((4, 3, 8, 8), seed=7, step=2)
        >>> bool((fastebm.ops.normal((2, 3, 8, 8), seed=7, step=2, chain_ids=2) == noise[2:]).all())
        True
    """
    return torch.ops.fastebm.normal(*_arguments(shape, seed, step, stream, chain_ids, device, dtype))


def _arguments(
    shape: Sequence[int],
    seed: int,
    step: int,
    stream: int,
    chain_ids: int | Tensor,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> tuple[list[int], Tensor, Tensor, int, torch.dtype]:
    """The operator's arguments from a user's, checked; shared with `uniform`."""
    shape = [as_int("a size of shape", size) for size in shape]
    if not shape or any(size < 0 for size in shape):
        raise ValueError(f"shape must be (chains, ...) with sizes that are not negative, got {tuple(shape)}")
    if shape[0] > rng.MAX_CHAIN:
        raise ValueError(f"there are at most 2^56 chains, shape {tuple(shape)} asks for {shape[0]}")
    if math.prod(shape[1:]) > rng.MAX_ELEMENTS:
        raise ValueError(f"a chain has at most 2^34 elements, shape {tuple(shape)} asks for {math.prod(shape[1:])}")
    if device is None and isinstance(chain_ids, Tensor):
        device = chain_ids.device
    device = torch.device("cpu") if device is None else as_device(device)
    key = rng.make_key(seed, step, device=device)
    dtype = torch.float32 if dtype is None else dtype
    _check_dtype(dtype)
    return shape, key, rng.make_chain_ids(chain_ids, shape[0], device), rng.check_stream(stream), dtype


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ValueError(f"noise is float32, float64, bfloat16 or float16, got {dtype}")


def check_address(key: Tensor, chain_ids: Tensor, batch: int) -> None:
    """Refuse keys and chain ids of the wrong form (their values are the kernels' to check)."""
    if key.dtype != torch.int64 or key.shape != (3,):
        raise ValueError(
            f"key must be an int64 tensor (seed, step, schedule index), got {key.dtype} {tuple(key.shape)}"
        )
    if chain_ids.dtype != torch.int64 or chain_ids.dim() != 1 or chain_ids.shape[0] not in (1, batch):
        raise ValueError(
            f"chain_ids must be an int64 tensor (1,) or ({batch},), got {chain_ids.dtype} {tuple(chain_ids.shape)}"
        )
    if chain_ids.device != key.device:
        raise ValueError(f"key and chains must be on one device, got {key.device} and {chain_ids.device}")


def empty_noise(shape: Sequence[int], key: Tensor, chain_ids: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """Room for the noise: the checks and the fake kernel of `normal` and `uniform`."""
    if len(shape) == 0:
        raise ValueError("shape must be (chains, ...), got ()")
    _check_dtype(dtype)
    check_address(key, chain_ids, int(shape[0]) if chain_ids.shape[0] != 1 else 1)
    return torch.empty(shape, dtype=dtype, device=key.device)


def draw(kernel: str, shape: Sequence[int], key: Tensor, chain_ids: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """Noise by `kernel`: the implementation of `normal` and `uniform`."""
    out = empty_noise(shape, key, chain_ids, stream, dtype)
    launch(kernel, out, key.contiguous(), chain_ids.contiguous(), rng.check_stream(stream))
    return out


register("normal", fake=empty_noise)(functools.partial(draw, "normal"))


# Reference ----------------------------------------------------------------------------------------------------------


def reference_normal(out: Tensor, key: Tensor, chain_ids: Tensor, stream: int) -> None:
    """Kernel `normal` in plain PyTorch."""
    fill_from_words(out, key, chain_ids, stream, normals_from_words)


def fill_from_words(
    out: Tensor, key: Tensor, chain_ids: Tensor, stream: int, transform: Callable[[Tensor], Tensor]
) -> None:
    """Fill `out` (B, ...) with `transform` of the Philox words (B, quads, 4) of its elements."""
    if out.numel() == 0:
        return
    batch, elements = out.shape[0], out[0].numel()
    ids = expand_chain_ids(chain_ids, batch)
    valid = check_addressable(key, ids)
    noise = transform(philox_words(key, ids, stream, -(-elements // 4))).flatten(1)[:, :elements]
    out.copy_(torch.where(valid[:, None], noise, torch.nan).reshape(out.shape))


def expand_chain_ids(chain_ids: Tensor, batch: int) -> Tensor:
    """Ids of all chains of a batch, from the id of the first or a list."""
    return chain_ids if chain_ids.shape[0] == batch else chain_ids + torch.arange(batch, device=chain_ids.device)


def check_addressable(key: Tensor, ids: Tensor) -> Tensor:
    """(B,) True where the counter has room for step and chain. On the CPU an overflow raises; a GPU is not read, its
    noise is NaN."""
    valid = (ids >= 0) & (ids < rng.MAX_CHAIN) & (key[1] >= 0) & (key[1] < rng.MAX_STEP)
    if valid.device.type == "cpu" and not bool(valid.all()):
        raise RuntimeError(
            f"the noise counter would overflow: steps must be in [0, 2^32) and chain ids in [0, 2^56), "
            f"got step {int(key[1])} and chains {int(ids.min())} to {int(ids.max())}"
        )
    return valid


def philox_words(key: Tensor, ids: Tensor, stream: int, quads: int) -> Tensor:
    """Philox4x32-10 words (B, quads, 4) as int64 in [0, 2^32)."""
    quad = torch.arange(quads, device=ids.device)
    chain_high = ((ids >> 32) | stream << 24)[:, None]
    counter = torch.broadcast_tensors(quad, key[1], (ids & _WORD)[:, None], chain_high)
    return philox(counter, (key[0] & _WORD, (key[0] >> 32) & _WORD))


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> Tensor:
    """Philox4x32-10 words (..., 4) of four counter words (...) under two key words, all as int64 in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two words wraps in int64, but its 64 bits are right.
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (product1 >> 32) & _WORD ^ c1 ^ k0, product1 & _WORD
        c2, c3 = (product0 >> 32) & _WORD ^ c3 ^ k1, product0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def fma(a: Tensor | float, b: Tensor, c: Tensor | float) -> Tensor:
    """a * b + c rounded once, for float32 (in float64, then down); for float64 rounded twice."""
    if b.dtype != torch.float32:
        return a * b + c
    a = a.double() if isinstance(a, Tensor) else a
    c = c.double() if isinstance(c, Tensor) else c
    return (a * b.double() + c).float()


def rounded_sqrt(x: Tensor) -> Tensor:
    """The correctly rounded square root; torch's own float32 one on the CPU is off by an ulp for one number in five."""
    return x.double().sqrt().to(x.dtype)


def uniforms_from_words(words: Tensor) -> Tensor:
    """float32 in (0, 1] from words."""
    return fma(2.0**-32, words.float(), 2.0**-33)


def _hexadecimal(*digits: str) -> list[float]:
    return [float.fromhex(number) for number in digits]


# The polynomials of csrc/normal.h, highest power first.
LOG = _hexadecimal(
    *("-0x1.6d469ep-3", "0x1.25e46ap-2", "-0x1.30ae24p-2", "0x1.5343a2p-2"),
    *("-0x1.98e430p-2", "0x1.000494p-1", "-0x1.5556b6p-1", "0x1p+0"),
)
SINE = _hexadecimal("-0x1.2d9b30p-8", "0x1.465ec4p-4", "-0x1.4abbbap-1", "0x1.921fb6p+0")
COSINE = [float.fromhex(h) for h in ("0x1.d9d4a6p-11", "-0x1.55c5dcp-6", "0x1.03c1dep-2", "-0x1.3bd3ccp+0", "0x1p+0")]


def _polynomial(coefficients: list[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = fma(value, x, coefficient)
    return value


def minus_two_log(u: Tensor) -> Tensor:
    """float32 -2 log(u) for contiguous u in (0, 1]."""
    bits = u.view(torch.int32)
    k = (bits - 0x3F3504F3) >> 23
    f = (bits - (k << 23)).view(torch.float32) - 1.0
    log1p = fma(f * f, _polynomial(LOG, f), -2.0 * f)
    return fma(float.fromhex("-0x1.62e430p+0"), k.float(), log1p)


def normals_from_words(words: Tensor) -> Tensor:
    """float32 normals (..., 4) from words (..., 4): radii from lanes 0 and 2, angles from lanes 1 and 3."""
    u = uniforms_from_words(words)
    radius, turn = rounded_sqrt(minus_two_log(u[..., 0::2].contiguous())), u[..., 1::2]
    quarters = 4.0 * turn
    quadrant = (quarters + 0.5).int()
    r = quarters - quadrant.float()
    z = r * r
    sine, cosine = _polynomial(SINE, z) * r, _polynomial(COSINE, z)
    swap = (quadrant & 1) != 0
    cosine, sine = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    cosine = torch.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    sine = torch.where((quadrant & 2) != 0, -sine, sine)
    return torch.stack((radius * cosine, radius * sine), dim=-1).flatten(-2)
