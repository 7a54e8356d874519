"""The block tail against plain PyTorch in float64: values, derivatives, layouts, shapes, autograd."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastebm import ops
from fastebm.ops import backends
from fastebm.ops.activations import activation_code
from tests.ops.agreement import exact, ulps
from tests.ops.precision import DTYPES, assert_precise, relative_error, supported

_C = backends._extension
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last

# The definitions, spelled out; gelu's two in a form that keeps the left tail: 1 + erf(z) = erfc(-z) and
# 1 + tanh(z) = 2 sigmoid(2 z).
DEFINITIONS = {
    "scaled_swish": lambda x: x * torch.sigmoid(x) / 1.1,
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * torch.special.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    "elu": lambda x: torch.where(x > 0, x, 1.5 * torch.expm1(x.clamp(max=0))),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.1 * x),
    "relu": lambda x: torch.where(x > 0, x, 0),
}
PARAMETERS = {"negative_slope": 0.1, "alpha": 1.5}


def plain(
    main: Tensor, skip: Tensor, fade: Tensor | None = None, beta: float = 1.0, activation: str = "scaled_swish"
) -> Tensor:
    """The operator in plain PyTorch."""
    tail = (DEFINITIONS[activation](F.avg_pool2d(main, 2)) + F.avg_pool2d(skip, 2)) / math.sqrt(2)
    return tail if fade is None else beta * tail + (1 - beta) * fade


def ours(
    main: Tensor, skip: Tensor, fade: Tensor | None = None, beta: float = 1.0, activation: str = "scaled_swish"
) -> Tensor:
    return ops.block_tail(main, skip, fade=fade, beta=beta, activation=activation, **PARAMETERS)


def pooled(shape: tuple[int, ...]) -> tuple[int, ...]:
    return *shape[:2], shape[2] // 2, shape[3] // 2


def images(
    shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32, layout: torch.memory_format = CONTIGUOUS
):
    """main, skip, fade."""
    torch.manual_seed(0)
    parts = (2 * torch.randn(shape), torch.randn(shape), torch.randn(pooled(shape)))
    return [part.to(device, dtype).contiguous(memory_format=layout) for part in parts]


def differentiate(function, inputs: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The value, the gradients, and the derivatives of those along random directions, by main and by the gradient."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    value = function(*inputs)
    torch.manual_seed(1)
    grad, *directions = (torch.randn(x.shape).to(x) for x in (value, *inputs))
    grad.requires_grad_()
    first = torch.autograd.grad(value, inputs, grad, create_graph=True)
    second = torch.autograd.grad(first, [inputs[0], grad], directions, allow_unused=True, materialize_grads=True)
    return [value, *first, *second]


# Values and derivatives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_against_float64(backend_device, activation, dtype):
    if not supported(backend_device, dtype):
        pytest.skip("no float64")
    cases = itertools.product([((2, 3, 8, 12), CONTIGUOUS), ((2, 16, 6, 4), CHANNELS_LAST)], (None, 0.3))
    for (shape, layout), beta in cases:
        inputs = images(shape, backend_device[1], dtype, layout)[: 2 if beta is None else 3]
        options = {"activation": activation}
        if beta is not None:  # operators take it as float32, except for float64
            options["beta"] = beta if dtype == torch.float64 else float(torch.tensor(beta))
        results = (
            differentiate(functools.partial(ours, **options), inputs),
            differentiate(functools.partial(plain, **options), inputs, torch.float64),
            differentiate(functools.partial(plain, **options), inputs),
        )
        for actual, truth, eager in zip(*results, strict=True):
            assert_precise(actual, truth, eager)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activation_element_by_element(backend_device, activation):
    """Windows of equal pixels leave the activation alone: x -> act(x) / sqrt(2), and its derivatives."""
    name, device = backend_device
    edges = torch.tensor([0.0, 1e-30, -1e-30, 1e-6, -1e-6, 60.0, -60.0, 1e4, -1e4])
    x = torch.cat([torch.linspace(-20, 20, 4001), edges])
    keeps_tails = name != "reference" and not INTERPRETED and activation != "gelu_tanh"

    def results(function, dtype: torch.dtype) -> list[Tensor]:
        wide = x.to(device, dtype)[:, None, None, None]
        main, skip = wide.expand(-1, 1, 2, 2), torch.zeros_like(wide).expand(-1, 1, 2, 2)
        main = main.detach().requires_grad_()
        value = function(main, skip, activation=activation)
        (slope,) = torch.autograd.grad(value.sum(), main, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), main, allow_unused=True, materialize_grads=True)
        return [value.flatten(), slope[:, 0, 0, 0], curvature[:, 0, 0, 0]]

    value, slope, curvature = results(ours, torch.float32)
    true_value, true_slope, true_curvature = results(plain, torch.float64)
    # PyTorch's own gelu loses the left tail to cancellation, where ours keeps its relative accuracy; the exponent of
    # gelu_tanh's tail is itself rounded. Derivatives are sums of terms of the order of 1.
    near = true_value.abs() > 1e-30
    scale = 0.0 if keeps_tails else x.abs()[near.cpu()]
    assert ulps(value[near], true_value[near], scale) <= 6
    assert ulps(slope, true_slope, 1.0) <= 4
    assert ulps(curvature, true_curvature, 1.0) <= 6


def test_extremes(backend_device):
    """Finite in, finite out; NaN stays where it is and never turns into a number."""
    _, device = backend_device
    for activation in ops.ACTIVATIONS:
        main = torch.tensor([3e38, -3e38, 1e20, -1e20, 100.0, -100.0], device=device)[:, None, None, None] / 4
        main = main.repeat(1, 1, 2, 2).requires_grad_()
        value = ours(main, torch.zeros_like(main), activation=activation)
        truth = plain(main.double(), torch.zeros_like(main).double(), activation=activation)
        (slope,) = torch.autograd.grad(value.sum(), main, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), main)
        torch.testing.assert_close(value, truth.float(), rtol=1e-6, atol=1e-30)
        if backend_device[0] != "reference":
            assert slope.isfinite().all()
            assert curvature.isfinite().all()
        main = torch.zeros(1, 1, 4, 4, device=device)
        main[0, 0, 1, 2] = math.nan
        out = ours(main, torch.zeros_like(main), activation=activation)
        assert out.isnan().tolist() == [[[[False, True], [False, False]]]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_blend_is_exact_at_both_ends(backend_device, dtype):
    if not supported(backend_device, dtype):
        pytest.skip("no float64")
    _, device = backend_device
    main, skip, fade = images((2, 3, 8, 8), device, dtype)
    tail = ours(main, skip)
    for beta in (0.0, torch.tensor(0.0), torch.zeros(1, dtype=torch.float64)):
        beta = beta.to(device) if isinstance(beta, Tensor) else beta
        assert torch.equal(ours(main, skip, fade, beta), fade)
    for beta in (1.0, 1, torch.tensor([1.0])):
        beta = beta.to(device) if isinstance(beta, Tensor) else beta
        assert torch.equal(ours(main, skip, fade, beta), tail)


def test_beta_is_read_where_it_lies(backend_device):
    """A tensor beta may change between two launches of the same thing."""
    _, device = backend_device
    main, skip, fade = images((1, 2, 4, 4), device)
    beta = torch.zeros(1, device=device)
    for value in (0.0, 0.25, 1.0):
        beta.fill_(value)
        assert torch.equal(ours(main, skip, fade, beta), ours(main, skip, fade, value))


# Shapes and layouts -------------------------------------------------------------------------------------------------

WHOLE = [(1, 1, 2, 2), (2, 3, 5, 7), (3, 1, 9, 2), (2, 5, 3, 3), (2, 7, 16, 6), (1, 2, 4, 40), (2, 600, 4, 2)]
LONG = [(5, 2, 2, 1030), (1, 1030, 2, 4)]
EMPTY = [(1, 1, 1, 1), (2, 3, 1, 8), (2, 3, 8, 1), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (0, 3, 5, 5)]
SHAPES = [*WHOLE, *LONG, *EMPTY]


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend_device, shape, layout):
    inputs = images(shape, backend_device[1], layout=layout)
    results = differentiate(lambda m, s, f: ours(m, s, f, 0.3), inputs)
    assert results[0].shape == pooled(shape)
    # avg_pool2d refuses what leaves no windows: nothing to compare then, but gradients are zero.
    if results[0].numel() == 0:
        assert all(not x.any() for x in results)
        return
    truths = differentiate(lambda m, s, f: plain(m, s, f, float(torch.tensor(0.3))), inputs, torch.float64)
    for actual, truth in zip(results, truths, strict=True):
        assert actual.shape == truth.shape
        assert relative_error(actual, truth) <= 1e-6
    height, width = 2 * (shape[2] // 2), 2 * (shape[3] // 2)
    for gradient in (results[1], results[2], results[4]):
        assert not gradient[:, :, height:].any()
        assert not gradient[:, :, :, width:].any()


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=CHANNELS_LAST),
    "every other channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "cut out": lambda x: F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1],
    "off by one element": lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape),
}


@pytest.mark.parametrize("skip_layout", LAYOUTS)
@pytest.mark.parametrize("main_layout", LAYOUTS)
def test_layouts(backend_device, main_layout, skip_layout):
    inputs = images((2, 4, 6, 8), backend_device[1])
    expected = differentiate(lambda m, s, f: ours(m, s, f, 0.3), inputs)
    laid_out = [LAYOUTS[layout](x) for layout, x in zip((main_layout, skip_layout, skip_layout), inputs, strict=True)]
    results = differentiate(lambda m, s, f: ours(m, s, f, 0.3), laid_out)
    for actual, wanted in zip(results, expected, strict=True):
        assert torch.equal(actual, wanted)
    layout = CHANNELS_LAST if main_layout == "channels-last" else CONTIGUOUS
    assert results[0].is_contiguous(memory_format=layout)


def test_inputs_are_left_alone(backend_device):
    inputs = images((2, 3, 5, 6), backend_device[1])
    before = [x.clone() for x in inputs]
    differentiate(lambda m, s, f: ours(m, s, f, 0.3), inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_neither_batch_nor_threads_matter(backend_device, layout):
    if backend_device[0] == "reference":
        pytest.skip("PyTorch's own operations promise no such thing")
    inputs = images((5, 24, 10, 14), backend_device[1], layout=layout)
    expected = differentiate(lambda m, s, f: ours(m, s, f, 0.3), inputs)[:4]
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            whole = differentiate(lambda m, s, f: ours(m, s, f, 0.3), inputs)[:4]
            assert all(torch.equal(a, b) for a, b in zip(whole, expected, strict=True))
    finally:
        torch.set_num_threads(before)
    alone = ours(*(x[3:4] for x in inputs), 0.3)
    assert torch.equal(alone, expected[0][3:4])


@pytest.mark.skipif(_C is None, reason="fastebm's C++ operators are not built")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["avx2", "avx512"])
def test_cpp_variants_are_bit_equal(variant, dtype):
    before = _C.active_variant()
    try:
        _C.set_variant(variant)
    except RuntimeError as error:
        pytest.skip(str(error))
    try:
        for activation, layout in itertools.product(ops.ACTIVATIONS, (CONTIGUOUS, CHANNELS_LAST)):
            inputs = images((2, 19, 6, 14), "cpu", dtype, layout)
            results = []
            for name in (variant, "baseline"):
                _C.set_variant(name)
                with ops.backend("cpp"):
                    results.append(differentiate(lambda m, s, f: ours(m, s, f, 0.3, activation), inputs))  # noqa: B023
            for actual, expected in zip(*results, strict=True):
                assert torch.equal(actual, expected)
    finally:
        _C.set_variant(before)


@pytest.mark.skipif(_C is None, reason="needs the C++ operators")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gpu_and_cpp_are_bit_equal(backend_device, dtype):
    name, device = backend_device
    if name == "cpp" or not exact(backend_device):
        pytest.skip("the GPU's compiled backends")
    for activation, layout in itertools.product(ops.ACTIVATIONS, (CONTIGUOUS, CHANNELS_LAST)):
        inputs = images((2, 24, 6, 16), "cpu", dtype, layout)
        with ops.backend("cpp"):
            expected = differentiate(lambda m, s, f: ours(m, s, f, 0.3, activation), inputs)  # noqa: B023
        actual = differentiate(lambda m, s, f: ours(m, s, f, 0.3, activation), [x.to(device) for x in inputs])  # noqa: B023
        for ours_there, ours_here in zip(actual, expected, strict=True):
            assert torch.equal(ours_there.cpu(), ours_here)


# Autograd -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("beta", [None, 0.3])
def test_gradcheck(backend_device, activation, beta):
    if not supported(backend_device, torch.float64):
        pytest.skip("no float64")
    inputs = images((1, 2, 5, 4), backend_device[1], torch.float64)[: 2 if beta is None else 3]
    inputs = [x.requires_grad_() for x in inputs]

    def function(*x: Tensor) -> Tensor:
        return ours(*x, activation=activation) if beta is None else ours(*x, beta, activation)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_weights_learn_through_it(backend_device):
    """Gradients of convolutions before it, of a loss and of a penalty on its gradient: second derivatives."""
    _, device = backend_device
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5)).to(device)

    def gradients(function, dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(0)
        nets = [torch.nn.Conv2d(3, 4, size, padding=size // 2).to(device, dtype) for size in (3, 1)]
        image = x.to(dtype).requires_grad_()
        energy = function(nets[0](image), nets[1](image)).square().sum()
        (gradient,) = torch.autograd.grad(energy, image, create_graph=True)
        weights = [p for net in nets for p in net.parameters()]
        return list(torch.autograd.grad(energy + gradient.square().sum(), weights))

    for actual, truth in zip(gradients(ours, torch.float32), gradients(plain, torch.float64), strict=True):
        assert truth.abs().max() > 0
        assert relative_error(actual, truth) <= 1e-5


class FunctorchRefusalError(Exception):
    """What torch says of torch.func over operators with register_autograd."""


def refusing(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    try:
        return function(x)
    except RuntimeError as error:
        if "setup_context" in str(error) or "functorch" in str(error):
            raise FunctorchRefusalError from error
        raise


def test_func_grad_is_right_or_an_error(backend_device):
    """torch.func.grad over an opaque operator can silently give zeros under torch.compile (pytorch#193279)."""
    _, device = backend_device
    main, skip, _ = images((1, 2, 4, 4), device)

    def loss(x: Tensor) -> Tensor:
        return ours(x, skip).sum()

    x = main.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    assert expected.abs().min() > 0
    for way in (torch.func.grad(loss), torch.compile(torch.func.grad(loss), backend="aot_eager")):
        # torch.library's formulas don't know functorch, and say so. Once they do, the result must be right.
        with contextlib.suppress(FunctorchRefusalError):
            torch.testing.assert_close(refusing(way, main), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("beta", [None, 0.3])
def test_compiles_with_its_backward(backend_device, beta):
    _, device = backend_device

    def function(main: Tensor, skip: Tensor, fade: Tensor) -> Tensor:
        h = torch.tanh(main)
        return ours(h, skip) * 2 if beta is None else ours(h, skip, fade, beta) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for shape in ((2, 3, 6, 4), (3, 3, 5, 8)):
        inputs = [x.requires_grad_() for x in images(shape, device)]
        results = []
        for f in (compiled, function):
            value = f(*inputs)
            results.append([value, *torch.autograd.grad(value.square().sum(), inputs[: 2 if beta is None else 3])])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("faded", [False, True])
def test_opcheck(backend_device, faded, layout):
    _, device = backend_device
    main, skip, fade = (x.requires_grad_() for x in images((2, 3, 5, 6), device, layout=layout))
    beta = torch.full((1,), 0.3, device=device) if faded else None
    by_main, by_skip, by_fade = images((2, 3, 5, 6), device)
    grad = torch.randn_like(fade).requires_grad_()
    code, parameter = activation_code("elu", **PARAMETERS)
    operators = torch.ops.fastebm
    torch.library.opcheck(operators.block_tail.default, (main, skip, fade if faded else None, beta, code, parameter))
    torch.library.opcheck(operators.block_tail_backward.default, (grad, main, beta, code, parameter))
    arguments = (by_main, by_skip, by_fade if faded else None, grad, main, beta, code, parameter)
    # Its derivative is an error, which the test of a compiled backward would run into.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operators.block_tail_double_backward.default, arguments, test_utils=tests)


def test_without_gradients(backend_device):
    inputs = images((2, 3, 4, 4), backend_device[1])
    expected = ours(*inputs, 0.3)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(ours(*(x.clone() for x in inputs), 0.3), expected)


def test_third_derivative_is_an_error(backend_device):
    _, device = backend_device
    main, skip, _ = images((1, 1, 2, 2), device)
    main.requires_grad_()
    (first,) = torch.autograd.grad(ours(main, skip).sum(), main, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), main, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(second.sum(), main)


# Errors -------------------------------------------------------------------------------------------------------------

IMAGE, SMALL = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"main": [1.0]}, TypeError, "main must be a tensor, got list"),
        ({"main": IMAGE[0]}, ValueError, r"main must be \(batch, channels, height, width\), got \(3, 4, 4\)"),
        ({"main": IMAGE.int()}, TypeError, "main must be float32, float64, bfloat16 or float16, got torch.int32"),
        ({"skip": SMALL}, ValueError, r"skip must have shape \(2, 3, 4, 4\) for a main of .*, got \(2, 3, 2, 2\)"),
        ({"skip": IMAGE.half()}, TypeError, "skip must have main's dtype torch.float32, got torch.float16"),
        ({"skip": IMAGE.to("meta")}, ValueError, "skip must be on main's device cpu, got meta"),
        ({"fade": IMAGE, "beta": 0.5}, ValueError, r"fade must have shape \(2, 3, 2, 2\)"),
        ({"fade": SMALL.double(), "beta": 0.5}, TypeError, "fade must have main's dtype"),
        ({"fade": SMALL, "beta": 1.5}, ValueError, r"beta must be in \[0, 1\], got 1.5"),
        ({"fade": SMALL, "beta": math.nan}, ValueError, r"beta must be in \[0, 1\], got nan"),
        ({"fade": SMALL, "beta": torch.ones(2)}, ValueError, "tensor of one element, got torch.float32"),
        ({"fade": SMALL, "beta": torch.ones(1, device="meta")}, ValueError, "beta must be on the device"),
        ({"beta": 0.5}, ValueError, "beta = 0.5 blends with `fade`, which is missing"),
        ({"beta": torch.ones(1)}, ValueError, "which is missing"),
        ({"activation": "swish"}, ValueError, "activation must be one of scaled_swish, .* got 'swish'"),
        ({"fade": SMALL, "beta": torch.ones(1, requires_grad=True)}, RuntimeError, "beta requires grad"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.block_tail(**{"main": IMAGE, "skip": IMAGE, **arguments})


def test_errors_of_the_operator():
    operator = torch.ops.fastebm.block_tail
    with pytest.raises(ValueError, match="fade and beta go together, got only fade"):
        operator(IMAGE, IMAGE, SMALL, None, 0, 0.0)
    with pytest.raises(ValueError, match=r"activation must be a number in \[0, 1, 2, 3, 4, 5, 19\], got 7"):
        operator(IMAGE, IMAGE, None, None, 7, 0.0)
    with pytest.raises(ValueError, match="grad must have shape"):
        torch.ops.fastebm.block_tail_backward(IMAGE, IMAGE, None, 0, 0.0)
    with pytest.raises(ValueError, match="grad_fade and beta go together, got only beta"):
        torch.ops.fastebm.block_tail_double_backward(IMAGE, IMAGE, None, SMALL, IMAGE, torch.ones(1), 0, 0.0)
