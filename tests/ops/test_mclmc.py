"""The microcanonical Langevin step against its formulas in float64, and every backend against the compiled one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastebm
from fastebm import ops, rng
from fastebm.ops import backends
from fastebm.ops.mclmc import RepeatedTurns
from tests.ops.agreement import assert_agrees, compiled_or_reference, exact, ulps
from tests.ops.precision import supported

_C = backends._extension
ADDRESS = {"seed": -7, "step": 2**31 + 5, "chain_ids": 2**32 - 2}
SHAPES = [(1, 2), (3, 2), (5, 3), (2, 63), (2, 64), (2, 1024), (3, 1025), (37, 1, 4, 4), (4, 3, 7, 5), (2, 3, 2, 3, 4)]
WHOLE = {"closing": 0.2, "refresh": 0.3, "opening": 0.4, "drift": 0.1}
OPTIONS: dict[str, dict[str, Any]] = {
    "closing": {"closing": 0.7},
    "opening": {"opening": 0.7},
    "both": {"closing": 0.2, "opening": 0.7, "drift": 0.3},
    "refresh": {"refresh": 0.4},
    "drift": {"drift": 0.25},
    "whole": WHOLE,
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash((shape, seed)) % 2**31))


def unit(x: Tensor) -> Tensor:
    return x / by_chain(x.flatten(1).norm(dim=1), x)


def by_chain(value: float | Tensor, x: Tensor) -> float | Tensor:
    return value.reshape(-1, *(1,) * (x.dim() - 1)) if isinstance(value, Tensor) and value.dim() else value


def chains(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, momentum, work and gradient, of a size that turns the momentum by about one."""
    size = math.sqrt(math.prod(shape[1:]))
    momentum = unit(randn(*shape, seed=1).to(dtype))
    return (
        randn(*shape).to(dtype),
        momentum,
        randn(shape[0], 2, seed=2).double(),
        size * randn(*shape, seed=3).to(dtype),
    )


def options_of(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Options by the name of a variety, besides those of `OPTIONS`."""
    if name in OPTIONS:
        return OPTIONS[name]
    batch = torch.arange(shape[0]).double()
    return {
        "per chain": {"closing": 0.1 * batch, "refresh": 0.2 * (batch % 2), "opening": 0.3, "drift": 0.1 * (batch % 3)},
        "mass": {**WHOLE, "inverse_mass": randn(*shape[1:], seed=4).square() + 0.1},
        "mass per chain": {**WHOLE, "inverse_mass": by_chain(randn(shape[0], seed=4).square() + 0.1, randn(*shape))},
        "mass of each entry": {**WHOLE, "inverse_mass": randn(*shape, seed=4).square() + 0.1},
        "listed chains": {**WHOLE, "chain_ids": torch.arange(shape[0]).flip(0) * 3 + 2**33},
    }[name]


VARIETIES = [*OPTIONS, "per chain", "mass", "mass per chain", "mass of each entry", "listed chains"]


def step(given: tuple[Tensor, ...], device: str = "cpu", **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(x, momentum, work) after the step, of copies."""
    x, momentum, work, grad = (tensor.to(device, copy=True) for tensor in given)
    options = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in {**ADDRESS, **options}.items()}
    assert ops.mclmc_step_(x, momentum, work, grad, **options) is x
    return x, momentum, work


def turned(u: Tensor, g: Tensor, time: float | Tensor) -> tuple[Tensor, Tensor]:
    """The momentum after the flow and the change of the kinetic energy, (B, N), as the papers write them."""
    dimensions, force = u.shape[1], g.norm(dim=1)
    delta = (time * force / (dimensions - 1))[:, None]
    zeta, e = torch.exp(-delta), -g / force[:, None]
    along = (e * u).sum(1, keepdim=True)
    raw = e * (1 - zeta) * (1 + zeta + along * (1 - zeta)) + 2 * zeta * u
    change = (dimensions - 1) * (delta - math.log(2) + torch.log(1 + along + (1 - along) * zeta**2))
    moved = (time != 0) if isinstance(time, Tensor) else torch.full((len(u),), time != 0)
    return torch.where(moved[:, None], raw / raw.norm(dim=1, keepdim=True), u), torch.where(moved, change[:, 0], 0.0)


def formula(given: tuple[Tensor, ...], noise: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The step in float64, from the docstring of `mclmc_step_`."""
    x, u, work, g = (tensor.double().flatten(1) for tensor in given)
    shape = given[0].shape
    mass = options.get("inverse_mass", torch.ones(()))
    scale = mass.double().expand(shape).flatten(1).sqrt()
    u, closed = turned(u, scale * g, options.get("closing", 0.0))
    refresh = torch.as_tensor(options.get("refresh", 0.0), dtype=torch.float64).expand(len(x))[:, None]
    mixed = u + refresh * noise.double().flatten(1)
    u = torch.where(refresh == 0, u, mixed / mixed.norm(dim=1, keepdim=True))
    u, opened = turned(u, scale * g, options.get("opening", 0.0))
    drift = torch.as_tensor(options.get("drift", 0.0), dtype=torch.float64).expand(len(x))[:, None]
    return (x + drift * scale * u).reshape(shape), u.reshape(shape), work + torch.stack((closed, opened), 1)


# The update ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIETIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_formula_and_compiled(backend_device, shape, name):
    options, given = options_of(name, shape), chains(shape)
    results = step(given, backend_device[1], **options)
    with ops.backend(compiled_or_reference()):
        compiled = step(given, **options)
        address = {key: {**ADDRESS, **options}[key] for key in ADDRESS}
        noise = ops.normal(shape, stream=rng.Stream.REFRESH, **address)
    for result, expected in zip(results[:2], compiled[:2], strict=True):
        assert_agrees(result, expected, backend_device, scale=1.0)
    for result, expected in zip(results, formula(given, noise, **options), strict=True):
        torch.testing.assert_close(result.cpu().double(), expected, rtol=4e-7, atol=1e-6)


@pytest.mark.parametrize("name", VARIETIES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 1025), (4, 3, 7, 5)], ids=str)
def test_float64(backend_device, shape, name):
    options, given = options_of(name, shape), chains(shape, torch.float64)
    if "inverse_mass" in options:
        options = options | {"inverse_mass": options["inverse_mass"].double()}
    if not supported(backend_device, torch.float64):
        with pytest.raises(RuntimeError, match="float64"):
            step(given, backend_device[1], **options)
        return
    address = {key: {**ADDRESS, **options}[key] for key in ADDRESS}
    noise = ops.normal(shape, stream=rng.Stream.REFRESH, **address)
    results = step(given, backend_device[1], **options)
    for result, expected in zip(results, formula(given, noise, **options), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13 * math.prod(shape[1:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["whole", "mass"])
def test_a_narrow_gradient_is_widened_exactly(backend_device, dtype, name):
    shape = (4, 3, 7, 5)
    *state, grad = chains(shape)
    narrow = grad.to(dtype)
    results = step((*state, narrow), backend_device[1], **options_of(name, shape))
    expected = step((*state, narrow.float()), backend_device[1], **options_of(name, shape))
    for result, wide in zip(results, expected, strict=True):
        assert torch.equal(result, wide)


def test_float64_takes_any_gradient(backend_device):
    if not supported(backend_device, torch.float64):
        pytest.skip("no float64")
    *state, grad = chains((2, 7), torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        narrow = grad.to(dtype)
        for result, wide in zip(step((*state, narrow), **WHOLE), step((*state, narrow.double()), **WHOLE), strict=True):
            assert torch.equal(result, wide)


def test_it_is_the_flow_of_the_dynamics(backend_device):
    """Against many small steps of Runge and Kutta along du/dt = -(1 - u u^T) g / (d - 1); d log r/dt is the work."""
    shape, time = (3, 5), 1.5
    given = chains(shape)
    u, g = given[1].double(), given[3].double()

    def rate(u: Tensor) -> Tensor:
        return -(g - u * (u * g).sum(1, keepdim=True)) / (shape[1] - 1)

    work, count = torch.zeros(3, dtype=torch.float64), 2000
    for _ in range(count):
        h = time / count
        first = rate(u)
        second = rate(u + h / 2 * first)
        third = rate(u + h / 2 * second)
        after = u + h / 6 * (first + 2 * second + 2 * third + rate(u + h * third))
        # Simpson's rule of the force along the momentum.
        middle = u + h / 2 * (first + second) / 2
        work -= h / 6 * ((u + 4 * middle + after) * g).sum(1)
        u = after
    _, momentum, done = step(given, backend_device[1], opening=time)
    torch.testing.assert_close(momentum.cpu().double(), u, rtol=0, atol=2e-7)
    torch.testing.assert_close((done.cpu() - given[2])[:, 1], work, rtol=1e-6, atol=1e-6)


def test_exponential_and_logarithm_to_1e_14(backend_device):
    """At a right angle in two dimensions the change is log cosh(delta), the momentum (tanh, 1 / cosh)."""
    delta = torch.cat((torch.logspace(-9, 2, 400), torch.tensor([350.0, 600.0, 700.0, 1e4]))).double()
    dtype = torch.float64 if supported(backend_device, torch.float64) else torch.float32
    rows = torch.zeros(len(delta), 2, dtype=dtype, device=backend_device[1])
    momentum, grad, work = rows.clone(), rows.clone(), rows.to(torch.float64, copy=True)
    momentum[:, 1], grad[:, 0] = 1, -1
    ops.mclmc_step_(rows, momentum, work, grad, opening=delta.to(rows.device))
    change = delta + torch.log((1 + torch.exp(-2 * delta)) / 2)
    torch.testing.assert_close(work[:, 1].cpu(), change, rtol=1e-14, atol=3e-16)
    expected = torch.stack((torch.tanh(delta), 1 / torch.cosh(delta.clamp(max=709))), 1)
    limit = 1e-14 if dtype == torch.float64 else 1.2e-7
    torch.testing.assert_close(momentum.cpu().double(), expected, rtol=limit, atol=1e-16)
    assert bool((work[:, 0] == 0).all())


def test_along_and_against_the_force(backend_device):
    """There the momentum stays, and the kinetic energy changes by (d - 1) delta, however long it takes."""
    grad = torch.tensor([[-3.0, 0.0, 4.0]], device=backend_device[1])
    for time in (1e-3, 1.0, 30.0, 1e3, 1e6):
        for sign in (1.0, -1.0):
            momentum, work = -sign * grad / 5, torch.zeros(1, 2, dtype=torch.float64, device=grad.device)
            before = momentum.clone()
            ops.mclmc_step_(torch.zeros_like(grad), momentum, work, grad, closing=time)
            torch.testing.assert_close(momentum, before, rtol=0, atol=1e-7)
            torch.testing.assert_close(work[0, 0].item(), sign * 5 * time, rtol=1e-6, atol=1e-6)


def test_a_momentum_against_the_force_stays_of_length_one(backend_device):
    """Where the flow is unstable, what rounding leaves decides the direction, but nothing overflows."""
    grad = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    start = unit(grad) + 1e-7 * torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    for time in (1.0, 10.0, 100.0, 1000.0):
        _, momentum, work = step(
            (grad, unit(start), torch.zeros(200, 2).double(), grad), backend_device[1], opening=time
        )
        assert bool(work.isfinite().all())
        torch.testing.assert_close(momentum.norm(dim=1).cpu(), torch.ones(200), rtol=0, atol=2e-4)


def test_without_a_force_the_momentum_stays(backend_device):
    x, momentum, work, grad = chains((3, 7))
    grad[1] = 0
    moved, after, done = (t.cpu() for t in step((x, momentum, work, grad), backend_device[1], closing=1, opening=2))
    assert torch.equal(after[1], momentum[1])
    assert torch.equal(done[1], work[1])
    assert torch.equal(moved, x)
    assert not torch.equal(after[0], momentum[0])


def test_what_is_zero_is_skipped(backend_device):
    """A gradient that is not used is not read, and nothing is drawn."""
    x, momentum, work, grad = chains((3, 7))
    given = (x, momentum, work, torch.full_like(grad, math.nan))
    for result, before in zip(step(given, backend_device[1]), given, strict=False):
        assert torch.equal(result.cpu(), before)
    moved, after, _ = step(given, backend_device[1], drift=0.5)
    assert torch.equal(after.cpu(), momentum)
    assert torch.equal(moved.cpu(), x + 0.5 * momentum)
    results = [step((x, momentum, work, grad), backend_device[1], opening=0.3, seed=seed)[1] for seed in (1, 2)]
    assert torch.equal(*results)
    refresh = torch.tensor([0.0, 0.5, 0.0])
    results = [step((x, momentum, work, grad), backend_device[1], refresh=refresh, seed=seed)[1] for seed in (1, 2)]
    assert (results[0] == results[1]).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 8, 8), (2, 2050)], ids=str)
def test_a_momentum_of_zero_is_drawn_anew(backend_device, shape):
    zero = torch.zeros(shape)
    _, momentum, _ = step((zero, zero, torch.zeros(shape[0], 2).double(), zero), backend_device[1], refresh=1.0)
    noise = ops.normal(shape, stream=rng.Stream.REFRESH, device=backend_device[1], **ADDRESS)
    torch.testing.assert_close(momentum, unit(noise.double()).float(), rtol=0, atol=1e-7)


# Masses -------------------------------------------------------------------------------------------------------------


def test_mass_is_a_change_of_variables(backend_device):
    """x / sqrt(w) moves as x does without masses, for the gradient in those variables."""
    x, momentum, work, grad = chains((3, 7))
    scale = torch.tensor([0.5, 1, 2, 4, 0.25, 1, 8])  # powers of two, of which all products are exact
    with_mass = step((scale * x, momentum, work, grad / scale), backend_device[1], inverse_mass=scale**2, **WHOLE)
    without = step((x, momentum, work, grad), backend_device[1], **WHOLE)
    assert torch.equal(with_mass[0] / scale.to(x.device), without[0]) or not exact(backend_device)
    for result, expected in zip((with_mass[0].cpu() / scale, *with_mass[1:]), without, strict=True):
        torch.testing.assert_close(result.cpu(), expected.cpu(), rtol=1e-6, atol=1e-6)


def test_entries_of_mass_zero_stay_and_count_nowhere(backend_device):
    x, momentum, work, grad = chains((3, 9))
    free = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0, 1]).bool()
    momentum = unit(momentum * free)
    wild = torch.where(free, grad, math.inf)
    kinds = {"closing": 0.3, "opening": 0.2, "drift": 0.5}
    for mass in (free.float(), free.float().expand(3, 9)):
        given = (x, momentum, work, torch.where(free, grad, 7.0))
        result = [t.cpu() for t in step(given, backend_device[1], inverse_mass=mass, **kinds)]
        alone = step((x[:, free], momentum[:, free], work, grad[:, free]), backend_device[1], **kinds)
        for entries, expected in zip((result[0][:, free], result[1][:, free], result[2]), alone, strict=True):
            torch.testing.assert_close(entries, expected.cpu(), rtol=1e-6, atol=1e-6)
        for before, after in ((x, result[0]), (momentum, result[1])):
            assert torch.equal(after[:, ~free], before[:, ~free])
        drawn = step((x, 0 * momentum, work, grad), backend_device[1], refresh=1.0, drift=1.0, inverse_mass=mass)
        assert bool((drawn[1].cpu()[:, ~free] == 0).all())
        assert torch.equal(drawn[0].cpu()[:, ~free], x[:, ~free])
        torch.testing.assert_close(drawn[1].norm(dim=1).cpu(), torch.ones(3), rtol=0, atol=1e-6)
    assert bool(step((x, momentum, work, wild), inverse_mass=free.float(), opening=1.0)[1].isnan().all())


# Splits and layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIETIES)
def test_batch_can_be_split_anyhow(backend_device, name):
    shape = (6, 3, 5, 5)
    given, options = chains(shape), {**ADDRESS, **options_of(name, shape)}
    whole = step(given, backend_device[1], **options)
    parts = []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = {
            key: value[rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == 6 else value
            for key, value in options.items()
        }
        if not isinstance(options["chain_ids"], Tensor):
            part["chain_ids"] = options["chain_ids"] + rows.start
        parts.append(step(tuple(t[rows] for t in given), backend_device[1], **part))
    for result, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces), result)


@pytest.mark.parametrize("threads", [1, 2])
def test_thread_count_does_not_matter(backend_device, threads):
    given = chains((40, 3, 50, 17))
    expected = step(given, backend_device[1], **WHOLE)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for result, one in zip(step(given, backend_device[1], **WHOLE), expected, strict=True):
            assert torch.equal(result, one)
    finally:
        torch.set_num_threads(before)


def test_a_lost_chain_changes_no_other(backend_device):
    x, momentum, work, grad = chains((5, 7))
    expected = step((x, momentum, work, grad), backend_device[1], **WHOLE)
    for bad in (math.nan, math.inf, -math.inf, 3e38):
        spoiled = grad.clone()
        spoiled[2, 3] = bad
        for result, one in zip(step((x, momentum, work, spoiled), backend_device[1], **WHOLE), expected, strict=True):
            keep = [0, 1, 3, 4]
            assert torch.equal(result[keep], one[keep])
            assert bad == 3e38 or not bool(result[2].isfinite().all())


def test_gradient_in_another_layout(backend_device):
    x, momentum, work, grad = chains((2, 3, 4, 4))
    expected = step((x, momentum, work, grad), backend_device[1], **WHOLE)
    laid = grad.contiguous(memory_format=torch.channels_last)
    for result, one in zip(step((x, momentum, work, laid), backend_device[1], **WHOLE), expected, strict=True):
        assert torch.equal(result, one)
    # A gradient that is the state itself is read before it is written.
    shared, u, done = (tensor.to(backend_device[1], copy=True) for tensor in (x, momentum, work))
    ops.mclmc_step_(shared, u, done, shared, **ADDRESS, **WHOLE)
    for result, one in zip((shared, u, done), step((x, momentum, work, x), backend_device[1], **WHOLE), strict=True):
        assert torch.equal(result, one)


def test_repeated_calls_have_the_bits_of_single_ones(backend_device):
    """With gradients of other layouts and types, and one that is the state itself."""
    x, momentum, work, grad = (tensor.to(backend_device[1]) for tensor in chains((2, 3, 4, 4)))
    key, ids = rng.make_key(3, 4, device=x.device), rng.make_chain_ids(5, 2, x.device)
    row = torch.tensor([[0.2, 0.3, 0.4, 0.1]], dtype=torch.float64, device=x.device)
    ours, theirs = ([tensor.clone() for tensor in (x, momentum, work)] for _ in range(2))
    repeated = RepeatedTurns(*ours, key, ids, None)
    laid = grad.contiguous(memory_format=torch.channels_last)
    for gradient in (grad, grad, laid, grad.bfloat16(), None, grad):
        repeated(ours[0] if gradient is None else gradient, row)
        torch.ops.fastebm.mclmc_step_(*theirs, theirs[0] if gradient is None else gradient, row, key, ids, None)
        key[1] += 1
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpp_variants_are_bit_equal(variant, dtype, state):
    with ops.backend("cpp"):
        for shape in ((5, 2), (4, 3, 7, 5), (2, 3, 32, 32)):
            *given, grad = chains(shape, state)
            for name in VARIETIES:
                results = []
                for isa in (variant, "baseline"):
                    _C.set_variant(isa)
                    results.append(step((*given, grad.to(dtype)), **options_of(name, shape)))
                _C.set_variant(variant)
                for result, expected in zip(*results, strict=True):
                    assert torch.equal(result, expected)


def test_reference_matches_compiled():
    """The numbers of a chain agree to 1e-13 and the states nearly always to the last bit."""
    if compiled_or_reference() != "cpp":
        pytest.skip("fastebm's C++ operators are not built")
    for shape in ((50, 2), (4, 3, 16, 16)):
        for name in VARIETIES:
            results = []
            for backend in ("cpp", "reference"):
                with ops.backend(backend):
                    results.append(step(chains(shape), **options_of(name, shape)))
            for compiled, plain in zip(*(r[:2] for r in results), strict=True):
                assert ulps(compiled, plain, scale=1e-3) <= 1
            torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-13, atol=1e-13 * math.prod(shape[1:]))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 4, 4)], ids=str)
def test_empty(backend_device, shape):
    x = torch.empty(shape, device=backend_device[1])
    work = torch.zeros(shape[0], 2, dtype=torch.float64, device=x.device)
    assert ops.mclmc_step_(x, torch.empty_like(x), work, x, **WHOLE).shape == shape


# Dispatcher, compiler -----------------------------------------------------------------------------------------------


def operator_arguments(device: str, mass: bool = True) -> list[Any]:
    shape = (3, 2, 4, 4)
    x, momentum, work, grad = (tensor.to(device) for tensor in chains(shape))
    coefficients = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64, device=device)
    address = (rng.make_key(4, 9, 1, device=device), rng.make_chain_ids(3, 3, device))
    inverse_mass = (randn(1, 32, seed=4).square() + 0.1).to(device) if mass else None
    return [x, momentum, work, grad, coefficients, *address, inverse_mass]


@pytest.mark.parametrize("mass", [False, True])
def test_opcheck(backend_device, mass):
    torch.library.opcheck(torch.ops.fastebm.mclmc_step_.default, operator_arguments(backend_device[1], mass))


def test_compiles_as_one_graph(backend_device):
    x, momentum, work, _, *rest = operator_arguments(backend_device[1])

    def chain(x: Tensor, momentum: Tensor, work: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, momentum, work = x.clone(), momentum.clone(), work.clone()
        for _ in range(3):
            torch.ops.fastebm.mclmc_step_(x, momentum, work, x.tanh(), *rest)
        return x, momentum, work

    torch._dynamo.reset()
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    for result, expected in zip(compiled(x, momentum, work), chain(x, momentum, work), strict=True):
        assert torch.equal(result, expected)


def test_works_in_inference_mode(backend_device):
    expected = step(chains((3, 7)), backend_device[1], **WHOLE)
    with torch.inference_mode():
        for result, one in zip(step(chains((3, 7)), backend_device[1], **WHOLE), expected, strict=True):
            assert torch.equal(result, one)


# Errors -------------------------------------------------------------------------------------------------------------


def test_autograd_is_refused(backend_device):
    for which in range(4):
        given = [tensor.to(backend_device[1]) for tensor in chains((2, 4))]
        given[which].requires_grad_()
        with pytest.raises(RuntimeError, match=r"no derivative.*no_grad"):
            ops.mclmc_step_(*given, opening=1.0)


X, WORK = torch.zeros(2, 4), torch.zeros(2, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"momentum": None}, TypeError, "momentum must be a tensor"),
        ({"work": 0.0}, TypeError, "work must be a tensor"),
        ({"grad": 1.0}, TypeError, "grad must be a tensor"),
        ({"x": torch.zeros(())}, ValueError, "without dimensions"),
        ({"x": X.half()}, TypeError, "x must be float32"),
        ({"momentum": X.double()}, TypeError, "momentum must have x's dtype"),
        ({"momentum": torch.zeros(2, 5)}, ValueError, "momentum must have x's shape"),
        ({"grad": torch.zeros(2, 5)}, ValueError, "grad must have x's shape"),
        ({"grad": X.double()}, TypeError, "grad must be float32"),
        ({"work": torch.zeros(2, 2)}, ValueError, r"work must be float64 \(2, 2\), got torch.float32"),
        ({"work": torch.zeros(2).double()}, ValueError, r"work must be float64 \(2, 2\)"),
        ({"x": torch.zeros(4, 2).T}, ValueError, "x must be contiguous"),
        ({"momentum": torch.zeros(4, 2).T}, ValueError, "momentum must be contiguous"),
        ({"closing": -0.1}, ValueError, "closing must be finite and not negative, got -0.1"),
        ({"opening": math.inf}, ValueError, "opening must be finite"),
        ({"refresh": math.nan}, ValueError, "refresh must be finite"),
        ({"drift": torch.tensor([0.1, -0.1])}, ValueError, "drift must be finite"),
        ({"drift": torch.zeros(3)}, ValueError, "drift must be a number or one for each chain"),
        ({"drift": torch.zeros(2, dtype=torch.bool)}, TypeError, "drift must be of real numbers"),
        ({"seed": 2**64}, ValueError, "seed must be in"),
        ({"step": 2**32}, ValueError, "step must be in"),
        ({"chain_ids": 2**56}, ValueError, "chain ids must be in"),
        ({"chain_ids": torch.tensor([1, 2, 3])}, ValueError, "one id a chain"),
        ({"inverse_mass": 1.0}, TypeError, "inverse_mass must be a tensor of floating point numbers"),
        ({"inverse_mass": torch.ones(4, dtype=torch.int64)}, TypeError, "inverse_mass must be a tensor of floating"),
        ({"inverse_mass": torch.ones(3)}, ValueError, "inverse_mass must be broadcastable to x's shape"),
        ({"inverse_mass": torch.ones(1, 2, 4)}, ValueError, "inverse_mass must be broadcastable to x's shape"),
        ({"inverse_mass": torch.tensor([1.0, 1.0, -1.0, 1.0])}, ValueError, "finite and not negative"),
        ({"inverse_mass": torch.tensor([1.0, 1.0, math.nan, 1.0])}, ValueError, "finite and not negative"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_errors(change, error, message):
    arguments = {"x": X.clone(), "momentum": X.clone(), "work": WORK.clone(), "grad": X.clone(), **change}
    with pytest.raises(error, match=message):
        ops.mclmc_step_(**arguments)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (4, torch.zeros(1, 3).double(), "coefficients must be float64"),
        (4, torch.zeros(2, 4).double(), "coefficients must be float64"),
        (4, torch.zeros(1, 4), "coefficients must be float64"),
        (4, torch.zeros(1, 4, device="meta").double(), "coefficients must be on x's device"),
        (5, torch.zeros(2, dtype=torch.int64), "key must be an int64 tensor"),
        (6, torch.zeros(2, dtype=torch.int64), "chain_ids must be an int64 tensor"),
        (7, torch.zeros(32), "inverse_mass must be torch.float32"),
        (7, torch.zeros(2, 32), "inverse_mass must be torch.float32"),
        (7, torch.zeros(1, 31), "inverse_mass must be torch.float32"),
        (7, torch.zeros(1, 32).double(), "inverse_mass must be torch.float32"),
    ],
)
def test_operator_errors(position, value, message):
    arguments = operator_arguments("cpu")
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.fastebm.mclmc_step_(*arguments)


def test_what_is_written_must_lie_apart():
    x = torch.zeros(2, 8)
    with pytest.raises(RuntimeError, match="x and momentum can't be written in place"):
        ops.mclmc_step_(x, x, WORK.clone(), x)
    memory = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="momentum and work can't be written in place"):
        ops.mclmc_step_(torch.zeros(2, 4), memory.view(torch.float32), memory, torch.zeros(2, 4))


def test_addresses_beyond_the_counter_are_refused():
    arguments = operator_arguments("cpu")
    arguments[6] = torch.tensor([0, 2**56, 1])
    for backend in ("reference", "cpp"):
        if backends.unavailable_reason(backend, "cpu") is None:
            with ops.backend(backend), pytest.raises(RuntimeError, match="overflow"):
                torch.ops.fastebm.mclmc_step_(*arguments)


def test_it_is_public():
    assert fastebm.ops.mclmc_step_ is ops.mclmc.mclmc_step_
