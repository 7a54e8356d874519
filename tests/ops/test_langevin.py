"""The fused Langevin step against the formula in float64, and every backend against the compiled one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastebm
from fastebm import rng
from fastebm.ops import backends
from tests.ops.agreement import assert_agrees, compiled_or_reference, exact, refuses, ulps

_C = backends._extension
ADDRESS = {"seed": -7, "step": 2**31 + 5, "chain_ids": 2**32 - 2}
SHAPES = [(1,), (5,), (3, 2), (2, 63), (2, 64), (2, 1025), (37, 1, 4, 4), (4, 3, 7, 5), (2, 3, 16, 16), (2, 3, 2, 3, 4)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash((shape, seed)) % 2**31))


def on(device: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options with their tensors on a device."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return tuple(move(v) for v in value) if isinstance(value, tuple) else value

    return {name: move(value) for name, value in options.items()}


def _hinged(shape: tuple[int, ...], weight: float = 0.4) -> tuple[Tensor, float, float]:
    """A data term whose hinge lets the nearer half of the chains free."""
    target = randn(*shape, seed=5)
    distances = (
        (randn(*shape) - target).flatten(1).square().sum(1) if len(shape) > 1 else (randn(*shape) - target).square()
    )
    return target, weight, 1.001 * float(distances.median())


def _bounds(sample: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return randn(*sample, seed=8).abs().neg().clamp(min=-0.9), randn(*sample, seed=9).abs().clamp(max=0.9)


OPTIONS: dict[str, Callable[[tuple[int, ...]], dict[str, Any]]] = {
    "plain": lambda shape: {},
    "no noise": lambda shape: {"noise_std": 0.0},
    "clamp": lambda shape: {"clamp": (-0.75, 0.5)},
    "clamp below": lambda shape: {"clamp": (-0.5, None)},
    "clamp above": lambda shape: {"clamp": (None, 0.5)},
    "bounds of each entry": lambda shape: {"clamp": _bounds(shape[1:])} if len(shape) > 1 else {},
    "bounds of each channel": lambda shape: (
        {"clamp": _bounds((shape[1], *(1,) * (len(shape) - 2)))} if len(shape) > 1 else {}
    ),
    "a bound of each entry below": lambda shape: {"clamp": (_bounds(shape[1:])[0], 1)} if len(shape) > 1 else {},
    "a bound of each entry above": lambda shape: {"clamp": (-1, _bounds(shape[1:])[1])} if len(shape) > 1 else {},
    "gradient clip": lambda shape: {"grad_clip": 0.6},
    "norm clip": lambda shape: {"grad_norm_clip": 0.9 * math.sqrt(math.prod(shape[1:]))},
    "mask": lambda shape: {"mask": randn(*shape, seed=3) > 0, "known": randn(*shape, seed=4)},
    "mask of one image": lambda shape: {"mask": randn(*shape[1:], seed=3) > 0, "known": randn(*shape[1:], seed=4)},
    "data_term": lambda shape: {"data_term": (randn(*shape, seed=5), 0.4)},
    "data term with a hinge": lambda shape: {"data_term": _hinged(shape)},
    "data term of one image": lambda shape: {"data_term": (randn(*shape[1:], seed=5), 0.4, 0.0)},
    "a step size for each chain": lambda shape: {"step_size": randn(shape[0], seed=6).abs() + 0.01},
    "a noise for each chain": lambda shape: {"noise_std": (randn(shape[0], seed=7) * 0.3).clamp(min=0)},
    "listed chains": lambda shape: {"chain_ids": torch.arange(shape[0]).flip(0) * 3 + 2**33},
    "everything": lambda shape: {
        "clamp": (-1.25, _bounds(shape[1:])[1] if len(shape) > 1 else 1.0),
        "grad_norm_clip": 0.9 * math.sqrt(math.prod(shape[1:])),
        "mask": randn(*shape, seed=3) > 0.5,
        "known": randn(*shape, seed=4),
        "data_term": _hinged(shape),
        "step_size": randn(shape[0], seed=6).abs() + 0.01,
    },
}


def by_chain(value: float | Tensor, x: Tensor) -> float | Tensor:
    return value.double().reshape(-1, *(1,) * (x.dim() - 1)) if isinstance(value, Tensor) and value.dim() else value


def formula(x: Tensor, grad: Tensor, noise: Tensor, **options: Any) -> Tensor:
    """The step in float64, from the docstring of `fastebm.langevin_step`."""
    x, g = x.double(), grad.double()
    if (limit := options.get("grad_clip")) is not None:
        g = g.clamp(-limit, limit)
    if (limit := options.get("grad_norm_clip")) is not None:
        norm = g.flatten(1).norm(dim=1) if g.dim() > 1 else g.abs()
        g = g * by_chain((limit / norm).clamp(max=1), x)
    if (data_term := options.get("data_term")) is not None:
        pull = x - data_term[0].double()
        if len(data_term) == 3 and data_term[2] > 0:
            pull = pull * by_chain((pull.reshape(len(x), -1).square().sum(1) > data_term[2]), x)
        g = g + data_term[1] * pull
    moved = x - by_chain(options["step_size"], x) * g + by_chain(options["noise_std"], x) * noise.double()
    low, high = options.get("clamp") or (None, None)
    if low is not None:
        moved = moved.maximum(torch.as_tensor(low, dtype=torch.float64))
    if high is not None:
        moved = moved.minimum(torch.as_tensor(high, dtype=torch.float64))
    return moved if options.get("mask") is None else torch.where(options["mask"], options["known"].double(), moved)


def run(x: Tensor, grad: Tensor, device: str, **options: Any) -> Tensor:
    return fastebm.langevin_step(x.to(device), grad.to(device), **on(device, options))


def agrees_with_compiled(x: Tensor, grad: Tensor, backend_device: tuple[str, str], **options: Any) -> Tensor:
    """Check a step against the compiled backend's, relative to the largest of the terms that it adds up."""
    drawn = run(x, grad, backend_device[1], **options)
    with fastebm.ops.backend(compiled_or_reference()):
        expected = run(x, grad, "cpu", **options)
    step_size, pull = options["step_size"], x - options["data_term"][0] if "data_term" in options else torch.zeros(())
    scale = x.abs() + by_chain(step_size, x) * (grad.float().abs() + pull.abs()) + 0.25
    assert_agrees(drawn, expected, backend_device, scale=scale)
    return drawn.cpu()


# The update ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_formula_and_compiled(backend_device, shape, name):
    options = {"step_size": 0.3, "noise_std": 0.2, **ADDRESS, **OPTIONS[name](shape)}
    x, grad = randn(*shape), randn(*shape, seed=1)
    drawn = agrees_with_compiled(x, grad, backend_device, **options)
    with fastebm.ops.backend(compiled_or_reference()):
        noise = fastebm.ops.normal(shape, **{key: options[key] for key in ADDRESS})
    expected = formula(x, grad, noise, **options)
    torch.testing.assert_close(drawn.double(), expected, rtol=3e-7, atol=6e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "gradient clip", "norm clip", "everything"])
@pytest.mark.parametrize("shape", [(3, 37), (2, 3, 8, 8)], ids=str)
def test_dtypes_of_the_gradient(backend_device, dtype, name, shape):
    options = {"step_size": 0.3, "noise_std": 0.2, **ADDRESS, **OPTIONS[name](shape)}
    x, grad = randn(*shape), randn(*shape, seed=1).to(dtype)
    drawn = agrees_with_compiled(x, grad, backend_device, **options)
    if exact(backend_device):
        # A narrow gradient is widened exactly.
        assert torch.equal(drawn, run(x, grad.float(), backend_device[1], **options).cpu())


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("grad_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_float64_state(backend_device, name, grad_dtype):
    backend, device = backend_device
    shape = (4, 3, 5, 5)
    options = {"step_size": 0.25, "noise_std": 0.125, **ADDRESS, **OPTIONS[name](shape)}
    x, grad = randn(*shape).double(), randn(*shape, seed=1).to(grad_dtype)
    if backend in ("triton", "cuda"):
        with pytest.raises(RuntimeError, match="float64"):
            run(x, grad, device, **options)
        return
    drawn = run(x, grad, device, **options)
    assert drawn.dtype == torch.float64
    noise = fastebm.ops.normal(shape, **{key: options[key] for key in ADDRESS}, device=device)
    if "data_term" in options:  # its weight is a float32 number
        options["data_term"] = (
            options["data_term"][0],
            float(torch.tensor(options["data_term"][1])),
            *options["data_term"][2:],
        )
    torch.testing.assert_close(drawn, formula(x, grad, noise, **options).to(device), rtol=1e-14, atol=1e-14)


def test_noise_is_that_of_normal(backend_device):
    _, device = backend_device
    for shape in ((3, 37), (2, 3, 8, 8), (130, 1, 4, 4)):
        zero = torch.zeros(shape, device=device)
        drawn = fastebm.langevin_step(zero, zero, step_size=1.0, noise_std=1.0, **ADDRESS)
        assert torch.equal(drawn, fastebm.ops.normal(shape, device=device, stream=rng.Stream.LANGEVIN, **ADDRESS))


def test_without_noise_nothing_is_drawn(backend_device):
    _, device = backend_device
    x, grad = randn(3, 37).to(device), randn(3, 37, seed=1).to(device)
    num_steps = [fastebm.langevin_step(x, grad, step_size=0.5, noise_std=0.0, seed=seed) for seed in (1, 2)]
    assert torch.equal(*num_steps)
    # 0.5 * grad is exact, so that the fused multiply-add is the difference, rounded once.
    assert torch.equal(num_steps[0], x - 0.5 * grad)
    mixed = fastebm.langevin_step(
        x, grad, step_size=0.5, noise_std=torch.tensor([0.0, 1.0, 0.0], device=device), seed=1
    )
    assert torch.equal(mixed[[0, 2]], num_steps[0][[0, 2]])
    assert not torch.equal(mixed[1], num_steps[0][1])


@pytest.mark.parametrize("name", ["plain", "norm clip", "everything"])
def test_in_place_is_the_same(backend_device, name):
    _, device = backend_device
    shape = (3, 2, 6, 6)
    options = on(device, {"step_size": 0.3, "noise_std": 0.2, **ADDRESS, **OPTIONS[name](shape)})
    for layout in LAYOUTS.values():
        x, grad = layout(randn(*shape).to(device)), randn(*shape, seed=1).to(device)
        before = x.clone()
        expected = fastebm.langevin_step(x, grad, **options)
        assert torch.equal(x, before)
        assert fastebm.langevin_step_(x, grad, **options) is x
        assert torch.equal(x, expected)


# Not numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "clamp", "gradient clip", "norm clip", "everything"])
def test_nan_passes_and_stays_in_its_place(backend_device, name):
    _, device = backend_device
    shape = (4, 2, 3, 3)
    options = {"step_size": 0.3, "noise_std": 0.2, **ADDRESS, **OPTIONS[name](shape)}
    options.pop("mask", None), options.pop("known", None)
    x, grad = randn(*shape), randn(*shape, seed=1)
    clean = run(x, grad, device, **options)
    x[1, 0, 0, 0] = math.nan
    grad[2, 1, 2, 2] = math.nan
    drawn = agrees_with_compiled(x, grad, backend_device, **options)
    assert bool(drawn[1, 0, 0, 0].isnan())
    assert bool(drawn[2, 1, 2, 2].isnan())
    assert torch.equal(drawn[[0, 3]], clean[[0, 3]].cpu())
    if name in ("plain", "clamp", "gradient clip"):
        assert int(drawn.isnan().sum()) == 2


def test_infinities(backend_device):
    _, device = backend_device
    x, grad = torch.zeros(2, 4), torch.tensor([[math.inf, -math.inf, 1.0, 0.0], [0.0] * 4])
    arguments = {"step_size": 0.5, "noise_std": 0.0, "seed": 0}
    assert run(x, grad, device, **arguments)[0].tolist() == [-math.inf, math.inf, -0.5, 0.0]
    assert run(x, grad, device, clamp=(-1, 1), **arguments)[0].tolist() == [-1.0, 1.0, -0.5, 0.0]
    assert run(x, grad, device, grad_clip=2.0, **arguments)[0].tolist() == [-1.0, 1.0, -0.5, 0.0]
    clipped = run(x, grad, device, grad_norm_clip=2.0, **arguments)
    assert clipped[0].isnan().tolist() == [True, True, False, False]  # an infinite norm makes a scale of 0
    assert clipped[1].tolist() == [0.0] * 4


def test_mask_hides_nan(backend_device):
    _, device = backend_device
    x = torch.full((2, 4), math.nan)
    mask = torch.tensor([True, False, True, False])
    drawn = run(x, x, device, step_size=0.5, noise_std=0.1, seed=0, mask=mask, known=torch.ones(4), clamp=(-0.5, 0.5))
    assert drawn.isnan().tolist() == [[False, True, False, True]] * 2
    assert drawn[:, [0, 2]].tolist() == [[1.0, 1.0]] * 2  # the mask comes after the clamp


# Options, on their own terms ----------------------------------------------------------------------------------------


def test_norm_clip_bounds_the_norm(backend_device):
    _, device = backend_device
    x, grad = (
        torch.zeros(5, 3, 20, 20),
        randn(5, 3, 20, 20, seed=1) * torch.tensor([0.01, 0.1, 1, 10, 1000])[:, None, None, None],
    )
    drawn = run(x, grad, device, step_size=1.0, noise_std=0.0, seed=0, grad_norm_clip=8.0).cpu()
    norms = drawn.flatten(1).double().norm(dim=1)
    before = grad.flatten(1).double().norm(dim=1)
    torch.testing.assert_close(norms, before.clamp(max=8.0), rtol=1e-6, atol=0)
    assert torch.equal(drawn[:2], -grad[:2])  # what is short enough stays as it is


def test_mask_may_be_of_numbers(backend_device):
    _, device = backend_device
    x, mask, known = randn(2, 8), (randn(2, 8, seed=3) > 0), randn(8, seed=4)
    arguments = {"step_size": 0.1, "noise_std": 0.1, "seed": 0, "known": known}
    expected = run(x, x, device, mask=mask, **arguments)
    assert torch.equal(run(x, x, device, mask=mask.float(), **arguments), expected)
    assert torch.equal(run(x, x, device, mask=mask.long(), **arguments), expected)


def test_hinge_is_by_chain(backend_device):
    _, device = backend_device
    at_the_hinge = [0.5] * 4 + [0.0]  # whose distance, 1, is computed without rounding
    x, zeros = torch.tensor([[0.1] * 5, [2.0] * 5, at_the_hinge]), torch.zeros(3, 5)
    drawn = run(x, zeros, device, step_size=1.0, noise_std=0.0, seed=0, data_term=(zeros, 0.5, 1.0)).cpu()
    assert torch.equal(drawn, torch.tensor([[0.1] * 5, [1.0] * 5, at_the_hinge]))


@pytest.mark.parametrize("hinge", [0.0, 1.0])
def test_a_data_term_of_no_weight_reads_no_target(backend_device, hinge):
    """Not even one that is not finite: 0 * inf is NaN."""
    _, device = backend_device
    x, target = randn(3, 7), torch.full((3, 7), torch.inf)
    options = {"step_size": 0.1, "noise_std": 0.2, "seed": 0}
    drawn = run(x, x, device, **options, data_term=(target, 0.0, hinge)).cpu()
    assert torch.equal(drawn, run(x, x, device, **options).cpu())


# Tables -------------------------------------------------------------------------------------------------------------

NO_OPTIONS = (None,) * 10 + (0.0,)


def step_operator(x: Tensor, grad: Tensor, schedule: Tensor, key: Tensor, chain_ids: Tensor | None = None) -> Tensor:
    chain_ids = rng.make_chain_ids(0, len(x), x.device) if chain_ids is None else chain_ids
    return torch.ops.fastebm.langevin_step(x, grad, schedule, key, chain_ids, *NO_OPTIONS)


@pytest.mark.parametrize("index", [0, 1, 2, 3, 100, 2**40])
def test_schedule_table(backend_device, index):
    """Row min(index, S - 1), whether there is one row for all chains or one for each."""
    _, device = backend_device
    x, grad = randn(3, 2, 5).to(device), randn(3, 2, 5, seed=1).to(device)
    shared = torch.tensor([[0.1, 0.5], [0.2, 0.0], [0.3, 0.25]], device=device)
    step_size, noise_std = shared[min(index, 2)].tolist()
    key = rng.make_key(4, 9, index, device=device)
    expected = fastebm.langevin_step(x, grad, step_size=step_size, noise_std=noise_std, seed=4, step=9)
    assert torch.equal(step_operator(x, grad, shared, key), expected)
    each = (shared[:, None] * torch.tensor([1.0, 2.0, 0.5], device=device)[None, :, None]).contiguous()
    row = each[min(index, 2)]
    expected = fastebm.langevin_step(x, grad, step_size=row[:, 0], noise_std=row[:, 1], seed=4, step=9)
    assert torch.equal(step_operator(x, grad, each, key), expected)
    # A table need not be contiguous.
    wide = torch.stack([each, each], dim=-1)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(step_operator(x, grad, wide, key), expected)


@pytest.mark.parametrize("index", [0, 1, 5])
@pytest.mark.parametrize("hinge", [0.0, 4.0])
def test_data_term_weight_table(backend_device, index, hinge):
    _, device = backend_device
    x, target = randn(3, 7).to(device), randn(3, 7, seed=5).to(device)
    weights = torch.tensor([0.5, 0.0, 2.0], device=device)
    schedule, key = torch.tensor([[0.1, 0.2]], device=device), rng.make_key(4, 9, index, device=device)
    address, off = (schedule, key, rng.make_chain_ids(0, 3, device)), (None,) * 8
    drawn = torch.ops.fastebm.langevin_step(x, x, *address, *off, target, weights, hinge)
    weight = weights[min(index, 2)].item()
    expected = fastebm.langevin_step(
        x, x, step_size=0.1, noise_std=0.2, seed=4, step=9, data_term=(target, weight, hinge)
    )
    assert torch.equal(drawn, expected)
    if weight == 0:
        assert torch.equal(drawn, fastebm.langevin_step(x, x, step_size=0.1, noise_std=0.2, seed=4, step=9))


def test_negative_index(backend_device):
    _, device = backend_device
    x, schedule = randn(2, 5).to(device), torch.tensor([[0.1, 0.0], [0.2, 0.0]], device=device)
    key = torch.tensor([0, 0, -1], device=device)
    if refuses(backend_device):
        with pytest.raises(RuntimeError, match="schedule index"):
            step_operator(x, x, schedule, key)
    else:
        assert bool(step_operator(x, x, schedule, key).isnan().all())


@pytest.mark.parametrize(
    ("key", "chain"), [((0, 2**32, 0), 0), ((0, -1, 0), 0), ((0, 0, 0), 2**56 - 1), ((0, 0, 0), -1)]
)
def test_overflow(backend_device, key, chain):
    _, device = backend_device
    x = randn(2, 5).to(device)
    arguments = (
        x,
        x,
        torch.tensor([[0.1, 0.1]], device=device),
        torch.tensor(key, device=device),
        torch.tensor([chain], device=device),
    )
    if refuses(backend_device):
        with pytest.raises(RuntimeError, match="overflow"):
            step_operator(*arguments)
    else:
        assert bool(step_operator(*arguments).isnan().all(dim=1).any())


def test_overflow_is_nan_in_a_kernel(backend_device, monkeypatch):
    if backend_device != ("triton", "cpu"):
        pytest.skip("shown on the interpreter, whose check before the kernel is taken away here")
    monkeypatch.setattr("fastebm.ops.triton.langevin.check_readable_address", lambda *_: None)
    monkeypatch.setattr("fastebm.ops.triton.langevin.check_index", lambda *_: None)
    x, schedule = randn(3, 8), torch.tensor([[0.1, 0.0]])
    chain_ids = torch.tensor([2**56, 5, -1])
    drawn = step_operator(x, x, schedule, torch.tensor([0, 0, 0]), chain_ids)
    assert drawn.isnan().all(dim=1).tolist() == [True, False, True]
    for key in ((0, 2**32, 0), (0, -1, 0), (0, 0, -1)):
        assert bool(step_operator(x, x, schedule, torch.tensor(key), torch.tensor([5, 6, 7])).isnan().all())


# Layouts ------------------------------------------------------------------------------------------------------------


def _sliced(t: Tensor) -> Tensor:
    """The same values as every other pixel of a larger image."""
    room = t.new_full((*t.shape[:2], 2 * t.shape[2], 2 * t.shape[3]), math.nan)
    room[:, :, ::2, ::2] = t
    return room[:, :, ::2, ::2]


def _shifted(t: Tensor) -> Tensor:
    """The same values one element into their storage: contiguous, but not aligned to 16 bytes."""
    room = t.new_empty(t.numel() + 1)
    room[1:] = t.flatten()
    return room[1:].view(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "sliced": _sliced,
    "sliced channels": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
    "shifted": _shifted,
}


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_nothing(backend_device, layout, grad_layout):
    _, device = backend_device
    for shape, name in (((2, 3, 4, 4), "plain"), ((3, 2, 3, 5), "everything")):
        x, grad = randn(*shape).to(device), randn(*shape, seed=1).to(device)
        options = on(device, {"step_size": 0.3, "noise_std": 0.2, **ADDRESS, **OPTIONS[name](shape)})
        expected = fastebm.langevin_step(x, grad, **options)
        laid = LAYOUTS[layout](x)
        drawn = fastebm.langevin_step(laid, LAYOUTS[grad_layout](grad), **options)
        assert torch.equal(drawn, expected)
        if layout == "channels last":
            assert drawn.is_contiguous(memory_format=torch.channels_last)
        fastebm.langevin_step_(laid, LAYOUTS[grad_layout](grad), **options)
        assert torch.equal(laid, expected)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 3, 5)], ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 3, 1, 1), (1, 1, 4, 4), (2, 1, 4, 1), (1, 3, 4, 4)], ids=str
)
def test_sides_may_be_broadcast(backend_device, shape, sizes):
    _, device = backend_device
    sizes = tuple(min(a, b) if a == 1 else b for a, b in zip(sizes, shape, strict=True))
    x = randn(*shape).to(device)
    sides = {
        "mask": (randn(*sizes, seed=3) > 0).to(device),
        "known": randn(*sizes, seed=4).to(device),
        "data_term": (randn(*sizes, seed=5).to(device), 0.3, 2.0),
    }
    whole = {
        "mask": sides["mask"].expand(shape).contiguous(),
        "known": sides["known"].expand(shape).contiguous(),
        "data_term": (sides["data_term"][0].expand(shape).contiguous(), 0.3, 2.0),
    }
    arguments = {"step_size": 0.3, "noise_std": 0.2, **ADDRESS}
    for laid in (x, x.contiguous(memory_format=torch.channels_last)):
        drawn = fastebm.langevin_step(laid, x, **arguments, **sides)
        assert torch.equal(drawn, fastebm.langevin_step(x, x, **arguments, **whole))


def test_expanded_gradient(backend_device):
    _, device = backend_device
    x, grad = randn(3, 2, 4, 4).to(device), randn(1, 2, 1, 1, seed=1).to(device)
    arguments = {"step_size": 0.3, "noise_std": 0.2, **ADDRESS}
    drawn = fastebm.langevin_step(x, grad.expand_as(x), **arguments)
    assert torch.equal(drawn, fastebm.langevin_step(x, grad.expand_as(x).contiguous(), **arguments))


def test_expanded_state(backend_device):
    _, device = backend_device
    x, grad = randn(1, 5).to(device).expand(3, 5), randn(3, 5, seed=1).to(device)
    arguments = {"step_size": 0.3, "noise_std": 0.2, **ADDRESS}
    assert torch.equal(
        fastebm.langevin_step(x, grad, **arguments), fastebm.langevin_step(x.contiguous(), grad, **arguments)
    )
    with pytest.raises(RuntimeError, match="in place"):
        fastebm.langevin_step_(x, grad, **arguments)


def test_in_place_on_a_view_writes_nothing_else(backend_device):
    _, device = backend_device
    room = torch.full((4, 3, 6, 6), 9.0, device=device)
    view = room[1:3, :2, 1:5, 1:5]
    fastebm.langevin_step_(view, torch.zeros_like(view), step_size=0.1, noise_std=0.1, seed=0)
    assert int((room != 9.0).sum()) == view.numel()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (0, 3, 4, 4), (2, 0, 4, 4)], ids=str)
@pytest.mark.parametrize("name", ["plain", "norm clip"])
def test_empty(backend_device, shape, name):
    _, device = backend_device
    x = torch.empty(shape, device=device)
    options = {
        "step_size": 0.1,
        "noise_std": 0.1,
        "seed": 0,
        "clamp": (-1, 1),
        **({"grad_norm_clip": 1.0} if name == "norm clip" else {}),
    }
    assert fastebm.langevin_step(x, x, **options).shape == shape
    assert fastebm.langevin_step_(x, x, **options) is x


# Splits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "norm clip", "everything"])
def test_batch_can_be_split_anyhow(backend_device, name):
    _, device = backend_device
    shape = (6, 3, 5, 5)
    options = on(device, {"step_size": 0.3, "noise_std": 0.2, **ADDRESS, **OPTIONS[name](shape)})
    x, grad = randn(*shape).to(device), randn(*shape, seed=1).to(device)
    whole = fastebm.langevin_step(x, grad, **options)
    parts = []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = {**options, "chain_ids": options["chain_ids"] + rows.start}
        for key in ("mask", "known", "step_size"):
            if isinstance(part.get(key), Tensor):
                part[key] = part[key][rows]
        if "data_term" in part:
            part["data_term"] = (part["data_term"][0][rows], *part["data_term"][1:])
        parts.append(fastebm.langevin_step(x[rows], grad[rows], **part))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("threads", [1, 2])
def test_thread_count_does_not_matter(backend_device, threads):
    _, device = backend_device
    shape = (3, 3, 50, 51)
    options = on(device, {"step_size": 0.3, "noise_std": 0.2, **ADDRESS, **OPTIONS["everything"](shape)})
    x, grad = randn(*shape).to(device), randn(*shape, seed=1).to(device)
    expected = fastebm.langevin_step(x, grad, **options)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(fastebm.langevin_step(x, grad, **options), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [16, 256])
def test_block_size_does_not_matter(backend_device, rows, monkeypatch):
    name, device = backend_device
    if name != "triton":
        pytest.skip("only Triton's programs have a size to choose")
    shape = (3, 2, 8, 8)
    options = on(device, {"step_size": 0.3, "noise_std": 0.2, **ADDRESS, **OPTIONS["everything"](shape)})
    x = randn(*shape).to(device)
    expected = fastebm.langevin_step(x, x, **options)
    monkeypatch.setattr("fastebm.ops.triton.philox.ROWS", rows)
    assert torch.equal(fastebm.langevin_step(x, x, **options), expected)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each C++ instruction set in turn, the one before restored."""
    before = _C.active_variant()
    try:
        _C.set_variant(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    _C.set_variant(before)


@pytest.mark.skipif(_C is None, reason="fastebm's C++ operators are not built")
@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpp_variants_are_bit_equal(variant, dtype, state):
    with fastebm.ops.backend("cpp"):
        for shape in ((4, 3, 7, 5), (2, 3, 32, 32)):
            for name in ("plain", "gradient clip", "everything"):
                options = {"step_size": 0.3, "noise_std": 0.2, **ADDRESS, **OPTIONS[name](shape)}
                for layout in ("contiguous", "channels last"):
                    x, grad = LAYOUTS[layout](randn(*shape).to(state)), LAYOUTS[layout](randn(*shape, seed=1).to(dtype))
                    drawn = fastebm.langevin_step(x, grad, **options)
                    _C.set_variant("baseline")
                    expected = fastebm.langevin_step(x, grad, **options)
                    _C.set_variant(variant)
                    assert torch.equal(drawn, expected)


# Dispatcher, compiler, graphs ---------------------------------------------------------------------------------------


def operator_arguments(device: str, name: str = "plain") -> tuple[Any, ...]:
    shape = (3, 2, 4, 4)
    x, grad = randn(*shape).to(device), randn(*shape, seed=1).to(device)
    schedule = torch.tensor([[0.1, 0.5], [0.2, 0.25]], device=device)
    address = (schedule, rng.make_key(4, 9, 1, device=device), rng.make_chain_ids(3, 3, device))
    if name == "plain":
        return x, grad, *address, *NO_OPTIONS
    mask, known = (randn(*shape, seed=3) > 0).to(device), randn(*shape, seed=4).to(device)
    return (
        x,
        grad,
        *address,
        -1.0,
        1.0,
        None,
        2.0,
        randn(2, 1, 1, seed=8).sub(1).to(device).expand(shape),
        randn(2, 4, 4, seed=9).add(1).to(device).expand(shape),
        mask,
        known,
        randn(*shape, seed=5).to(device),
        schedule[:, 0].contiguous(),
        3.0,
    )


@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("operator", ["langevin_step", "langevin_step_"])
def test_opcheck(backend_device, operator, name):
    arguments = operator_arguments(backend_device[1], name)
    torch.library.opcheck(getattr(torch.ops.fastebm, operator).default, arguments)
    laid = tuple(LAYOUTS["channels last"](a) if isinstance(a, Tensor) and a.dim() == 4 else a for a in arguments)
    torch.library.opcheck(getattr(torch.ops.fastebm, operator).default, laid)


@pytest.mark.parametrize("in_place", [False, True])
def test_compiles_as_one_graph(backend_device, in_place):
    _, device = backend_device
    x, _, *rest = operator_arguments(device)
    advance = torch.tensor([0, 1, 1], device=device)

    def chain(x: Tensor, schedule: Tensor, key: Tensor, chain_ids: Tensor) -> Tensor:
        x = x.clone()
        for _ in range(3):
            grad = x.tanh()
            if in_place:
                torch.ops.fastebm.langevin_step_(x, grad, schedule, key, chain_ids, -1.0, 1.0, *NO_OPTIONS[2:])
            else:
                x = torch.ops.fastebm.langevin_step(x, grad, schedule, key, chain_ids, -1.0, 1.0, *NO_OPTIONS[2:])
            key = key + advance
        return x

    torch._dynamo.reset()
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, *rest[:3]), chain(x, *rest[:3]))


def test_works_in_inference_mode(backend_device):
    x, *rest = operator_arguments(backend_device[1])
    expected = torch.ops.fastebm.langevin_step(x, *rest)
    with torch.inference_mode():
        assert torch.equal(torch.ops.fastebm.langevin_step(x, *rest), expected)
        inside = x.clone()
        torch.ops.fastebm.langevin_step_(inside, *rest)
    assert torch.equal(inside, expected)


def test_captured_graph_replays_at_a_later_step(backend_device):
    _, device = backend_device
    if device != "cuda" or backend_device[0] == "reference":
        pytest.skip("CUDA graphs need a GPU and a compiled backend")
    x, grad, schedule, key, chain_ids, *rest = operator_arguments(device, "everything")
    advance, start = torch.tensor([0, 1, 1], device=device), x.clone()
    expected = x.clone()
    for step in range(3):
        torch.ops.fastebm.langevin_step_(expected, grad, schedule, key + step * advance, chain_ids, *rest)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.ops.fastebm.langevin_step_(x, grad, schedule, key, chain_ids, *rest)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.fastebm.langevin_step_(x, grad, schedule, key, chain_ids, *rest)
        key += advance
    x.copy_(start)
    for _ in range(3):
        graph.replay()
    assert torch.equal(x, expected)


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["x", "grad", "known", "target"])
def test_autograd_is_refused(backend_device, which):
    _, device = backend_device
    tensors = {name: randn(2, 4, seed=k).to(device) for k, name in enumerate(("x", "grad", "known", "target"))}
    tensors[which].requires_grad_()
    arguments = {
        "step_size": 0.1,
        "noise_std": 0.1,
        "seed": 0,
        "mask": torch.ones(2, 4, dtype=torch.bool, device=device),
    }
    arguments |= {"known": tensors["known"], "data_term": (tensors["target"], 1.0)}
    for step in (fastebm.langevin_step, fastebm.langevin_step_):
        with pytest.raises(RuntimeError, match=r"no derivative.*no_grad"):
            step(tensors["x"], tensors["grad"], **arguments)
    with torch.no_grad():
        assert not fastebm.langevin_step(tensors["x"], tensors["grad"], **arguments).requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "must be tensors"),
        ({"grad": 1.0}, TypeError, "must be tensors"),
        ({"x": torch.zeros(()), "grad": torch.zeros(())}, ValueError, "without dimensions"),
        ({"x": torch.zeros(2, 4, dtype=torch.float16)}, TypeError, "x must be float32"),
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "x must be float32"),
        ({"grad": torch.zeros(2, 4, dtype=torch.float64)}, TypeError, "grad must be float32"),
        ({"grad": torch.zeros(2, 4, dtype=torch.int32)}, TypeError, "grad must be float32"),
        ({"grad": torch.zeros(2, 5)}, ValueError, "grad must have x's shape"),
        ({"grad": torch.zeros(1, 4)}, ValueError, "grad must have x's shape"),
        ({"grad": torch.zeros(2, 4, device="meta")}, ValueError, "device"),
        ({"step_size": 0.0}, ValueError, "step_size must be positive"),
        ({"step_size": -0.1}, ValueError, "step_size must be positive"),
        ({"step_size": math.inf}, ValueError, "step_size must be positive"),
        ({"step_size": math.nan}, ValueError, "step_size must be positive"),
        ({"noise_std": -1e-9}, ValueError, "noise_std must be finite"),
        ({"noise_std": math.nan}, ValueError, "noise_std must be finite"),
        ({"step_size": torch.zeros(3)}, ValueError, "step_size must be a number or one for each chain"),
        ({"noise_std": torch.zeros(2, 4)}, ValueError, "noise_std must be a number or one for each chain"),
        ({"seed": 2**64}, ValueError, "seed must be in"),
        ({"step": 2**32}, ValueError, "step must be in"),
        ({"chain_ids": 2**56}, ValueError, "chain ids must be in"),
        ({"chain_ids": torch.tensor([1, 2, 3])}, ValueError, "one id a chain"),
        ({"chain_ids": 0.5}, TypeError, "chain_ids must be"),
        ({"clamp": (1.0, -1.0)}, ValueError, "low <= high"),
        ({"clamp": (math.nan, 1.0)}, ValueError, "low <= high"),
        ({"grad_clip": 0.0}, ValueError, "grad_clip must be positive"),
        ({"grad_norm_clip": -1.0}, ValueError, "grad_norm_clip must be positive"),
        ({"grad_clip": 1.0, "grad_norm_clip": 1.0}, ValueError, "not both"),
        ({"mask": torch.ones(2, 4)}, ValueError, "mask and known go together"),
        ({"known": torch.ones(2, 4)}, ValueError, "mask and known go together"),
        ({"mask": torch.ones(3, 4), "known": torch.ones(4)}, ValueError, "mask must be broadcastable"),
        ({"mask": torch.ones(4), "known": torch.ones(5)}, ValueError, "known must be broadcastable"),
        ({"data_term": (torch.ones(5), 1.0)}, ValueError, "target of data_term must be broadcastable"),
        ({"data_term": (torch.ones(4),)}, ValueError, "data_term must be"),
        ({"data_term": (torch.ones(4), 1.0, -1.0)}, ValueError, "data_term_hinge must not be negative"),
        ({"data_term": (torch.ones(4), 1.0, math.nan)}, ValueError, "data_term_hinge must not be negative"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_errors(change, error, message):
    arguments = {
        "x": torch.zeros(2, 4),
        "grad": torch.zeros(2, 4),
        "step_size": 0.1,
        "noise_std": 0.1,
        "seed": 0,
        **change,
    }
    with pytest.raises(error, match=message):
        fastebm.langevin_step(**arguments)
    with pytest.raises(error, match=message):
        fastebm.langevin_step_(**arguments)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (2, torch.zeros(2), "schedule must be a float32 table"),
        (2, torch.zeros(0, 2), "schedule must be a float32 table"),
        (2, torch.zeros(2, 3), "schedule must be a float32 table"),
        (2, torch.zeros(2, 2, 2), "schedule must be a float32 table"),
        (2, torch.zeros(2, 2, dtype=torch.float64), "schedule must be a float32 table"),
        (3, torch.zeros(2, dtype=torch.int64), "key must be an int64 tensor"),
        (3, torch.zeros(3, dtype=torch.int32), "key must be an int64 tensor"),
        (4, torch.zeros(2, dtype=torch.int64), "chain_ids must be an int64 tensor"),
        (11, torch.zeros(3, 2, 4, 4), "mask must be torch.bool"),
        (12, torch.zeros(3, 2, 4), "known must be torch.float32"),
        (13, torch.zeros(3, 2, 4, 4, dtype=torch.float64), "data_target must be torch.float32"),
        (13, None, "data_target and data_term_weight go together"),
        (14, None, "data_target and data_term_weight go together"),
        (14, torch.zeros(2, 2), "data_term_weight must be a float32 table"),
        (14, torch.zeros(0), "data_term_weight must be a float32 table"),
        (2, torch.zeros(2, 2, device="meta"), "schedule must be on x's device"),
        (3, torch.zeros(3, dtype=torch.int64, device="meta"), "on one device"),
        (14, torch.zeros(2, device="meta"), "data_term_weight must be on x's device"),
    ],
)
def test_operator_errors(position, value, message):
    arguments = list(operator_arguments("cpu", "everything"))
    arguments[position] = value
    for operator in (torch.ops.fastebm.langevin_step, torch.ops.fastebm.langevin_step_):
        with pytest.raises(ValueError, match=message):
            operator(*arguments)


def test_reference_matches_compiled_to_the_last_bit():
    """The reference's fused multiply-adds are exact but for rare double roundings, which don't occur here."""
    if compiled_or_reference() != "cpp":
        pytest.skip("fastebm's C++ operators are not built")
    shape = (4, 3, 16, 16)
    for name in OPTIONS:
        options = {"step_size": 0.3, "noise_std": 0.2, **ADDRESS, **OPTIONS[name](shape)}
        results = []
        for backend in ("cpp", "reference"):
            with fastebm.ops.backend(backend):
                results.append(fastebm.langevin_step(randn(*shape), randn(*shape, seed=1), **options))
        assert ulps(*results) == 0, name
