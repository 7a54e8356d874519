"""How closely a backend must agree, and with what: shared by the operators' tests."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fastebm import ops

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def exact(backend_device: tuple[str, str]) -> bool:
    """Whether the backend promises the last bit. The reference rounds a fused multiply-add in float64 first, Triton's
    interpreter rounds it twice."""
    name, _ = backend_device
    return name in ("cpp", "cuda") or (name == "triton" and not INTERPRETED)


def truncates(backend_device: tuple[str, str], dtype: torch.dtype) -> bool:
    """Triton's interpreter cuts bfloat16 off (in its own conversion, not ours) where hardware rounds."""
    return backend_device[0] == "triton" and INTERPRETED and dtype == torch.bfloat16


def refuses(backend_device: tuple[str, str]) -> bool:
    """Whether a key out of range is an error. CUDA's kernels, wherever they run, read it where nothing can be raised:
    what it addresses becomes NaN."""
    name, device = backend_device
    return device == "cpu" and name != "cuda"


def assert_cast(actual: Tensor, expected: Tensor, backend_device: tuple[str, str]) -> None:
    """`actual` equals `expected`, which was cast to its dtype from float32."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if truncates(backend_device, actual.dtype):
        torch.testing.assert_close(actual, expected, rtol=2.0**-7, atol=0)
    else:
        torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True)


def compiled_or_reference() -> str:
    """The backend to compare with: the C++ one where it was built."""
    return "cpp" if ops.backends.unavailable_reason("cpp", "cpu") is None else "reference"


def ulps(actual: Tensor, expected: Tensor, scale: Tensor | float = 0.0) -> float:
    """Largest distance in units of the last place of float32 at `expected`, or at `scale` where that is larger (the
    size of what was added up, where terms cancel). NaN agrees with NaN only, infinities with themselves."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    if actual.numel() == 0:
        return 0.0
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    size = torch.maximum(expected.abs(), torch.as_tensor(scale, dtype=torch.float64).cpu().abs().expand_as(expected))
    spacing = torch.exp2(torch.floor(torch.log2(size.clamp(min=2.0**-126))) - 23)
    distance = torch.where(same, 0.0, (actual - expected).abs() / spacing)
    return float(torch.where(distance.isnan(), torch.inf, distance).max())


def assert_agrees(
    actual: Tensor,
    expected: Tensor,
    backend_device: tuple[str, str],
    *,
    scale: Tensor | float = 0.0,
    within: float = 4.0,
) -> None:
    """`actual`, from this backend, equals `expected`, from the compiled one; for the reference and the interpreter
    within some ulp."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if exact(backend_device) and compiled_or_reference() == "cpp":
        torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True)
    else:
        assert ulps(actual, expected, scale) <= within
