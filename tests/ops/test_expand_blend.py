"""The Expand blend against plain PyTorch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastebm import ops
from fastebm.ops import backends
from tests.ops.agreement import exact
from tests.ops.precision import DTYPES, assert_precise, supported

_C = backends._extension
SHAPES = [(), (1,), (7,), (2, 3, 4, 5), (3, 1030), (0,), (2, 0, 3), (1, 1, 1, 1), (2, 8, 3, 3)]


def plain(primal: Tensor, fade: Tensor, beta: float) -> Tensor:
    """The operator in plain PyTorch."""
    return beta * primal + (1 - beta) * fade


def pair(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(device, dtype).requires_grad_() for _ in range(2)]


def differentiate(function, inputs: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The value, the gradients, and the derivative of those in the gradient that came in."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    value = function(*inputs)
    torch.manual_seed(1)
    grad, *directions = (torch.randn(x.shape).to(x) for x in (value, *inputs))
    grad.requires_grad_()
    first = torch.autograd.grad(value, inputs, grad, create_graph=True)
    (second,) = torch.autograd.grad(first, grad, directions)
    return [value, *first, second]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(backend_device, dtype, shape):
    if not supported(backend_device, dtype):
        pytest.skip("no float64")
    inputs = pair(shape, backend_device[1], dtype)
    exact_beta = 0.3 if dtype == torch.float64 else float(torch.tensor(0.3))
    results = (
        differentiate(lambda p, f: ops.expand_blend(p, f, 0.3), inputs),
        differentiate(lambda p, f: plain(p, f, exact_beta), inputs, torch.float64),
        differentiate(lambda p, f: plain(p, f, exact_beta), inputs),
    )
    for actual, truth, eager in zip(*results, strict=True):
        if truth.numel() > 10 or dtype in (torch.float32, torch.float64):
            assert_precise(actual, truth, eager)
        else:  # of a few numbers eager may lose nothing by chance
            torch.testing.assert_close(actual, truth.to(dtype))


@pytest.mark.skipif(_C is None, reason="needs the C++ operators")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gpu_and_cpp_are_bit_equal(backend_device, dtype):
    if backend_device[0] == "cpp" or not exact(backend_device):
        pytest.skip("the GPU's compiled backends")
    for shape in SHAPES:
        here, there = pair(shape, "cpu", dtype), pair(shape, backend_device[1], dtype)
        with ops.backend("cpp"):
            expected = differentiate(lambda p, f: ops.expand_blend(p, f, 0.3), here)
        actual = differentiate(lambda p, f: ops.expand_blend(p, f, 0.3), there)
        for ours, theirs in zip(actual, expected, strict=True):
            assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_at_both_ends(backend_device, dtype):
    if not supported(backend_device, dtype):
        pytest.skip("no float64")
    primal, fade = pair((3, 50), backend_device[1], dtype)
    for zero, one in ((0, 1), (0.0, 1.0), (torch.tensor(0.0), torch.tensor([1.0], dtype=torch.float64))):
        zero, one = (b.to(primal.device) if isinstance(b, Tensor) else b for b in (zero, one))
        assert torch.equal(ops.expand_blend(primal, fade, zero), fade)
        assert torch.equal(ops.expand_blend(primal, fade, one), primal)


def test_layouts(backend_device):
    _, device = backend_device
    primal, fade = (x.detach() for x in pair((2, 4, 6, 8), device))
    expected = ops.expand_blend(primal, fade, 0.3)
    layouts = [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.nn.functional.pad(x.flatten(), (1, 0))[1:].view(x.shape),
    ]
    for layout in layouts:
        for mixed in ((layout(primal), layout(fade)), (layout(primal), fade), (primal, layout(fade))):
            out = ops.expand_blend(*mixed, 0.3)
            assert torch.equal(out, expected)
            assert out.stride() == ops.expand_blend(mixed[0], mixed[0], 0.3).stride()
    channels_last = ops.expand_blend(layouts[0](primal), fade, 0.3)
    assert channels_last.is_contiguous(memory_format=torch.channels_last)


def test_stays_with_one_value(backend_device):
    """NaN passes, and a blend of equal numbers keeps them to an ulp at any beta."""
    _, device = backend_device
    x = torch.tensor([1.0, -3.0, 1e-20, 1e30, 0.0], device=device)
    for beta in (0.1, 0.3, 0.5, 0.7, 0.9):
        torch.testing.assert_close(ops.expand_blend(x, x, beta), x, rtol=2.0**-23, atol=0)
    x = torch.tensor([math.nan, 1.0], device=device)
    assert ops.expand_blend(x, torch.ones_like(x), 0.5).isnan().tolist() == [True, False]


@pytest.mark.skipif(_C is None, reason="fastebm's C++ operators are not built")
@pytest.mark.parametrize("variant", ["avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpp_variants_are_bit_equal(variant, dtype):
    before = _C.active_variant()
    try:
        _C.set_variant(variant)
    except RuntimeError as error:
        pytest.skip(str(error))
    inputs = pair((3, 1041), "cpu", dtype)
    try:
        results = []
        for name in (variant, "baseline"):
            _C.set_variant(name)
            with ops.backend("cpp"):
                results.append(differentiate(lambda p, f: ops.expand_blend(p, f, 0.3), inputs))
    finally:
        _C.set_variant(before)
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_gradcheck(backend_device):
    if not supported(backend_device, torch.float64):
        pytest.skip("no float64")
    inputs = pair((2, 5), backend_device[1], torch.float64)
    assert torch.autograd.gradcheck(lambda p, f: ops.expand_blend(p, f, 0.3), inputs)
    assert torch.autograd.gradgradcheck(lambda p, f: ops.expand_blend(p, f, 0.3), inputs)


def test_any_derivative_exists(backend_device):
    _, device = backend_device
    x, fade = pair((3,), device)
    value = ops.expand_blend(x**4, fade, 0.5).sum()
    for derivative in (2 * x**3, 6 * x**2, 12 * x, torch.full_like(x, 12.0)):
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        torch.testing.assert_close(gradient, derivative)
        value = gradient.sum()


def test_opcheck_and_compile(backend_device):
    _, device = backend_device
    primal, fade = pair((2, 3, 4, 5), device)
    beta = torch.full((1,), 0.3, device=device)
    torch.library.opcheck(torch.ops.fastebm.expand_blend.default, (primal, fade, beta))
    torch.library.opcheck(torch.ops.fastebm.expand_blend_backward.default, (primal, beta))
    compiled = torch.compile(lambda p, f: ops.expand_blend(p * 2, f, 0.3), fullgraph=True, backend="aot_eager")
    value = compiled(primal, fade)
    assert torch.equal(value, ops.expand_blend(primal * 2, fade, 0.3))
    gradients = torch.autograd.grad(value.sum(), (primal, fade))
    torch.testing.assert_close(gradients[0], torch.full_like(primal, 0.6))
    torch.testing.assert_close(gradients[1], torch.full_like(fade, 0.7))
    torch._dynamo.reset()


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, 1.0, 0.5), TypeError, "primal and fade must be tensors, got Tensor and float"),
        ((X, X[:1], 0.5), ValueError, r"fade must have shape \(2, 3\) for a primal of \(2, 3\), got \(1, 3\)"),
        ((X, X.double(), 0.5), TypeError, "fade must have primal's dtype torch.float32, got torch.float64"),
        ((X.int(), X.int(), 0.5), TypeError, "primal must be float32, float64, bfloat16 or float16, got torch.int32"),
        ((X, X, -0.1), ValueError, r"beta must be in \[0, 1\], got -0.1"),
        ((X, X, torch.ones(3)), ValueError, r"beta must be .* of one element, got torch.float32 \(3,\)"),
        ((X, X, torch.ones(1, requires_grad=True)), RuntimeError, "beta requires grad"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.expand_blend(*arguments)
