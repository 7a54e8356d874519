"""Activations of programs in bfloat16, as compiled: what their approximate instructions lose, and what they save."""

from __future__ import annotations

import functools
import importlib.util
import math

import pytest
import torch

from fastebm.ops.activations import PROGRAM_ACTIVATIONS, program_activation, program_derivative
from tests.gpu.ptx import machine
from tests.ops.precision import relative_error

pytestmark = [
    pytest.mark.skipif(machine.missing() is not None, reason=machine.missing() or ""),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]
NAMES = ("silu", "gelu", "gelu_tanh", "elu", "softplus", "tanh", "sigmoid", "exp")
SPECIAL = (math.nan, math.inf, -math.inf, 1e4, -1e4, 1e30)


@functools.cache
def x_and_found(name):
    """All of bfloat16 between -88 and 88 and special numbers, and what the compiled kernel makes of them."""
    from benchmarks.gpu_model import activations

    x = activations.finite_bfloat16()
    x[-len(SPECIAL) :] = torch.tensor(SPECIAL)
    return x[: -len(SPECIAL)], activations.as_compiled(name, x)


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """The interpreter would take the compiler's place."""
    from fastebm.ops.triton.philox import INTERPRETED

    if INTERPRETED:
        pytest.skip("Triton's interpreter runs here, which compiles nothing")


@pytest.mark.parametrize("name", NAMES)
def test_as_near_as_eager_bfloat16(name):
    from benchmarks.gpu_model import activations

    assert {*NAMES} == {*activations.SMOOTH}
    x, found = x_and_found(name)
    number, parameters = PROGRAM_ACTIVATIONS.index(name), activations.PARAMETERS.get(name, ())
    eager = (
        program_activation(x.bfloat16(), number, parameters),
        program_derivative(x.bfloat16(), number, parameters, of_result=False),
    )
    for ours, theirs, right in zip(found, eager, activations.truth(name, x), strict=True):
        ours = ours[: len(x)]
        # A share of the half unit that rounding loses. A tangent near 1 has no more bits to tell its derivative by.
        assert activations.units(ours, right) < (2**-5 if name == "tanh" else 2**-8)
        assert relative_error(ours.bfloat16(), right) <= 1.01 * relative_error(theirs, right)


@pytest.mark.parametrize("name", NAMES)
def test_special_numbers(name):
    from benchmarks.gpu_model import activations

    value, slope = (each[-len(SPECIAL) :] for each in x_and_found(name)[1])
    assert value[0].isnan()
    assert slope[0].isnan()
    number, parameters = PROGRAM_ACTIVATIONS.index(name), activations.PARAMETERS.get(name, ())
    if name in ("gelu", "gelu_tanh"):
        assert torch.equal(value[[1, 3, 5]], torch.tensor([math.inf, 1e4, 1e30]))
        assert abs(value[4]) < 1e-20
    else:
        expected = program_activation(torch.tensor(SPECIAL), number, parameters)
        torch.testing.assert_close(value, expected, equal_nan=True, atol=1e-30, rtol=1e-6)
    expected = program_derivative(torch.tensor(SPECIAL[3:5]), number, parameters, of_result=False)
    torch.testing.assert_close(slope[3:5], expected, atol=1e-30, rtol=1e-6)


def test_silu_and_its_derivative_take_few_instructions():
    """It was 36 of each element; the page docs/results/gpu-model has the others."""
    from benchmarks.gpu_model import activations

    assert activations.instructions("silu", True) <= 10
    assert activations.instructions("silu", False) >= 30  # float32 keeps its own, rounded, way
