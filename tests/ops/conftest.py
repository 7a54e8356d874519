"""One suite for all backends: `backend_device` runs a test once on each (backend, device) that this process can use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from fastebm import ops

try:
    from fastebm import _C
except ImportError:
    _C = None


def backends_here() -> list[tuple[str, str]]:
    """(backend, device) pairs to test. FASTEBM_BACKEND narrows them to one backend, as it does for the process.

    Triton runs on the CPU only in its interpreter, which is chosen before Triton is first imported: that run is a
    process of its own, `TRITON_INTERPRET=1 FASTEBM_BACKEND=triton pytest tests/ops`.
    """
    asked = os.environ.get("FASTEBM_BACKEND") or "auto"
    names = [name for name in ops.backends.BACKENDS if name != "auto"] if asked == "auto" else [asked]
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() and not interpreted else ["cpu"]
    return [
        (name, device) for device in devices for name in names if ops.backends.unavailable_reason(name, device) is None
    ]


@pytest.fixture(params=backends_here(), ids=lambda pair: f"{pair[0]}-{pair[1]}")
def backend_device(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """(backend, device), with that backend chosen for the length of the test."""
    name, _ = request.param
    with ops.backend(name):
        yield request.param


VARIANTS = ("baseline", "avx2", "avx512")


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set of the C++ operators, each that this CPU has, chosen for the length of the test."""
    if _C is None:
        pytest.skip("the compiled operators are not built")
    if not ops.backends.runs_compiled("run_lanes"):
        pytest.skip("another backend than the compiled one was asked for")
    if VARIANTS.index(request.param) > VARIANTS.index(
        min(_C.best_variant(), "avx512", key=[*VARIANTS, "avx512_bf16", "amx"].index)
    ):
        pytest.skip(f"this CPU has no {request.param}")
    before = _C.active_variant()
    _C.set_variant(request.param)
    yield request.param
    _C.set_variant(before)
