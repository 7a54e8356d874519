"""Gradients of weights by programs: against autograd, in their bits, and where autograd runs instead."""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import fastebm
from fastebm.compiler import weight_gradient
from fastebm.compiler.checks import LOW_PRECISION_POINTS
from fastebm.models import CoarseToFineEnergy, MultiScaleEnergy
from tests.compiler import networks

Shape = tuple[int, ...]
# The energies are exact to rounding, so their gradients are: float64 programs run in the reference.
TIGHT = 1e-11


OF_WEIGHTS = importlib.import_module("fastebm.compiler.weight_gradient")


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(5)
    monkeypatch.setattr(OF_WEIGHTS, "WORTH", 0.0)  # of most nets here nothing folds
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # an energy that is meant to have a program has one
        yield


def dense(*widths: int, act: Callable[[], nn.Module] = nn.SiLU) -> nn.Sequential:
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), act())]
    return nn.Sequential(*layers[:-1])


def deconvolved() -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(3, 5, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(5, 4, 3, dilation=2),
        nn.Tanh(),
        nn.Conv2d(4, 3, (1, 3), stride=(2, 1), padding=(0, 2), bias=False),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(3 * 6 * 14, 1),
    )


class Gains(nn.Module):
    """A gain for each channel, for each pixel, and one number; a shift; a weight and an input that are used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.channel = nn.Parameter(torch.randn(1, 3, 1, 1))
        self.pixel = nn.Parameter(torch.randn(3, 6, 6))
        self.one = nn.Parameter(torch.tensor(0.7))
        self.shift = nn.Parameter(torch.randn(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.conv(x) * self.channel + self.shift)
        h = torch.tanh(self.conv(h) * self.pixel) + self.one * x
        return h.square().sum((1, 2, 3))


class Upsampled(nn.Module):
    """Pools and nearest upsampling, whose results programs read as views."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        low = self.inner(nn.functional.avg_pool2d(h, 2))
        h = torch.cat((h, nn.functional.interpolate(low, scale_factor=2)), 1)
        return torch.logsumexp(torch.tanh(self.last(h)).sum((2, 3)), 1)


def normed() -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(80, 1)
    )
    nn.init.uniform_(net[1].running_mean, -0.5, 0.5)
    nn.init.uniform_(net[1].running_var, 0.5, 2.0)
    return net.eval()


def normed_maps() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.InstanceNorm2d(6, affine=True), nn.Mish(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.PReLU(4), nn.Flatten(), nn.Linear(64, 1)),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "dense": (lambda: dense(2, 16, 16, 1), (2,)),
    "relu": (lambda: dense(10, 33, 17, 1, act=nn.ReLU), (10,)),
    "flattened image": (lambda: nn.Sequential(nn.Flatten(), dense(1 * 9 * 7, 20, 1)), (1, 9, 7)),
    "tutorial": (networks.TutorialNet, (1, 16, 16)),
    "residual": (networks.ResidualNet, (3, 16, 16)),
    "wide residual": (lambda: networks.WideNet().eval(), (3, 16, 16)),
    "transposed, dilated, strided": (deconvolved, (3, 8, 8)),
    "gains": (Gains, (3, 6, 6)),
    "upsampled": (Upsampled, (3, 6, 6)),
    "batch norm in eval mode": (normed, (3, 8, 8)),
    "norms over maps": (normed_maps, (3, 8, 8)),
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Linear(6, 8)), nn.SiLU(), nn.Linear(8, 1)), (6,)),
    "multi-scale": (lambda: MultiScaleEnergy(16, 3, width=4), (3, 16, 16)),
    "coarse to fine": (lambda: CoarseToFineEnergy(16, base_width=4, lowest=4), (3, 16, 16)),
}


def references(net: nn.Module, x: Tensor, cotangent: Tensor, energy: Callable | None = None) -> dict[str, Tensor]:
    """Autograd's gradients in the net's own mode, which a copy of it takes part in."""
    copied = copy.deepcopy(net)
    energies = (copied if energy is None else functools.partial(energy, copied))(x).flatten()
    named = {name: p for name, p in copied.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(energies, list(named.values()), cotangent, allow_unused=True)
    return {name: each for name, each in zip(named, found, strict=True) if each is not None}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of a parameter's gradient, relative to its norm, or to a small part of that of all."""
    assert found.keys() == expected.keys()
    total = sum(float(each.double().norm()) ** 2 for each in expected.values()) ** 0.5
    return max(
        float((found[name].double() - each.double()).norm()) / max(float(each.double().norm()), 1e-6 * total)
        for name, each in expected.items()
    )


def total_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The error of all gradients relative to their norm."""
    gaps = sum(float((found[name].double() - each.double()).norm()) ** 2 for name, each in expected.items())
    return (gaps / sum(float(each.double().norm()) ** 2 for each in expected.values())) ** 0.5


def batch(shape: Shape, count: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(count, *shape, dtype=dtype), torch.randn(count, dtype=dtype)


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_autograds(name: str) -> None:
    make, shape = NETS[name]
    net = make().double()
    x, cotangent = batch(shape, dtype=torch.float64)
    expected = references(net, x, cotangent)
    energies, found = weight_gradient(net, engine="fused")(x, cotangent)
    assert error(found, expected) < TIGHT
    assert energies.dtype is torch.float64
    assert not energies.requires_grad


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_as_good_as_autograds(name: str, dtype: torch.dtype) -> None:
    make, shape = NETS[name]
    net = make()
    x, cotangent = batch(shape, 32)
    exact = references(copy.deepcopy(net).double(), x.double(), cotangent.double())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        eager = references(net, x, cotangent)
    _, found = weight_gradient(net, dtype=dtype, engine="fused")(x, cotangent)
    # float32 sums of a few terms may be exact in one order and not in another.
    assert total_error(found, exact) <= 2 * total_error(eager, exact) + (1e-6 if dtype is torch.float32 else 0)


@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("size", [8, 16])
def test_a_blend_of_two_nets_in_train_mode(beta: float, size: int) -> None:
    net = CoarseToFineEnergy(size, base_width=4, lowest=4).double()
    x, cotangent = batch((3, size, size), dtype=torch.float64)
    blend = torch.tensor(beta, dtype=torch.float64)
    expected = references(net, x, cotangent, lambda copied, x: copied(x, blend))
    before = copy.deepcopy(net)
    before(x, beta)  # one power iteration
    _, found = weight_gradient(functools.partial(net, beta=blend), engine="fused")(x, cotangent)
    assert error(found, expected) < TIGHT
    for (name, mine), (_, theirs) in zip(net.named_buffers(), before.named_buffers(), strict=True):
        assert torch.equal(mine, theirs), name
    assert net.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads_or_on_how_a_batch_is_cut(dtype: torch.dtype) -> None:
    net = CoarseToFineEnergy(8, base_width=8, lowest=4).eval()
    x, cotangent = batch((3, 8, 8), 37)
    gradient = weight_gradient(net, dtype=dtype, engine="fused")
    threads = torch.get_num_threads()
    found = []
    try:
        for workers in (1, 2, 3):
            torch.set_num_threads(workers)
            found.append(gradient(x, cotangent)[1])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(other[name], each) for name, each in found[0].items())


def test_a_cotangent_that_depends_on_the_energies_sees_all_rows_once() -> None:
    net = dense(4, 8, 1)
    x, _ = batch((4,), 100)
    rows_seen: list[slice] = []

    def squares(energies: Tensor, rows: slice) -> Tensor:
        rows_seen.append(rows)
        return 2 * energies / len(x)

    energies, found = weight_gradient(net, engine="fused")(x, squares)
    assert [i for rows in rows_seen for i in range(rows.start, rows.stop)][-100:] == list(range(100))
    net(x).flatten().square().mean().backward()
    assert torch.allclose(found["0.weight"], net[0].weight.grad, rtol=1e-4, atol=1e-7)
    assert torch.allclose(energies, net(x).flatten(), atol=1e-6)


def test_backward_adds_to_grad_as_autograd_does() -> None:
    net, twin = dense(4, 8, 1), None
    twin = copy.deepcopy(net)
    x, cotangent = batch((4,))
    gradient = weight_gradient(net)
    for _ in range(2):
        gradient.backward(x, cotangent)
        twin(x).flatten().backward(cotangent)
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_a_training_by_it_is_a_training_by_autograd() -> None:
    net = CoarseToFineEnergy(8, base_width=4, lowest=4).double()
    twin = copy.deepcopy(net)
    x, cotangent = batch((3, 8, 8), 6, torch.float64)
    gradient = weight_gradient(net, engine="fused")
    optimizers = [torch.optim.Adam(each.parameters(), 1e-3) for each in (net, twin)]
    for _ in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        gradient.backward(x, cotangent)
        twin(x).backward(cotangent)
        for optimizer in optimizers:
            optimizer.step()
    for (name, mine), (_, theirs) in zip(net.state_dict().items(), twin.state_dict().items(), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-9), name


def test_frozen_and_unused_parameters_have_no_gradient() -> None:
    net = dense(4, 8, 1)
    net.register_parameter("spare", nn.Parameter(torch.zeros(3)))
    net[0].weight.requires_grad_(False)
    x, cotangent = batch((4,))
    gradient = weight_gradient(net, engine="fused")
    assert set(gradient(x, cotangent)[1]) == {"0.bias", "2.weight", "2.bias"}
    net[0].weight.requires_grad_(True)  # another program
    assert error(gradient(x, cotangent)[1], references(net, x, cotangent)) < 1e-5


def test_modes_flags_and_autocast_of_the_caller_stay_as_they_are() -> None:
    net = nn.Sequential(spectral_norm(nn.Linear(4, 8)), nn.SiLU(), nn.Linear(8, 1).eval())
    x, cotangent = batch((4,))
    flags = [(type(part), part.training) for part in net.modules()]
    names = [name for name, _ in net.named_parameters()]
    generator = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        gradient = weight_gradient(net, dtype=torch.float32, engine="fused")
        gradient(x, cotangent)
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
    assert [(type(part), part.training) for part in net.modules()] == flags
    assert [name for name, _ in net.named_parameters()] == names
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    copy.deepcopy(net)


def test_the_dtype_follows_autocast_where_none_is_given() -> None:
    net = dense(4, 8, 1)
    x, cotangent = batch((4,), 16)
    gradient = weight_gradient(net, engine="fused")
    _, precise = gradient(x, cotangent)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, low = gradient(x, cotangent)
    assert 1e-4 < total_error(low, precise) < 0.1


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x))
        return nn.functional.dropout(h, 0.5, self.training).sum(1)


class OfMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)).sum(1) * (3 if self.training else 1)


class Counting(OfMode):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return torch.tanh(self.layer(x)).sum(1)


class Centred(OfMode):
    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return torch.tanh(h - h.mean(0)).sum(1)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class StraightThrough(OfMode):
    def forward(self, x: Tensor) -> Tensor:
        return (Straight.apply(self.layer(x)) * x.sum(1, keepdim=True)).sum(1)


OTHERS = {
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)), "BatchNorm1d in train"),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)), "Dropout in train mode"),
    "functional dropout": (Dropped, "random|in the mode"),
    "another energy in train mode": (OfMode, "on the mode"),
    "a buffer that is written": (Counting, "writes to it"),
    "samples that influence each other": (Centred, "other samples|batch"),
    "a backward pass written by hand": (StraightThrough, "Function|differ|program"),
    "an older spectral norm": (
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 8)), nn.SiLU(), nn.Linear(8, 1)),
        "writes to it",
    ),
    "grouped convolutions": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (4, 1, 1)), nn.Conv2d(4, 4, 1, groups=2), nn.SiLU(), nn.Flatten(1), nn.Linear(4, 1)
        ),
        "grouped|instruction",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_has_no_program_goes_to_autograd_and_says_so_once(name: str) -> None:
    make, reason = OTHERS[name]
    net = make()
    x, cotangent = batch((4,), 12)
    gradient = weight_gradient(net)
    torch.manual_seed(1)
    expected = references(net, x, cotangent)
    torch.manual_seed(1)
    with pytest.warns(RuntimeWarning, match=reason):
        _, found = gradient(x, cotangent)
    assert error(found, expected) < 1e-4
    assert gradient.engine == "autograd"
    assert gradient.reason
    assert "autograd weight gradient of" in repr(gradient)
    gradient(x, cotangent)  # a second warning would be an error
    with pytest.raises(RuntimeError, match="engine is 'fused', but no program computes the gradients"):
        weight_gradient(net, engine="fused")(x, cotangent)


def test_eval_mode_brings_a_program_where_train_mode_has_none() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    x, cotangent = batch((4,), 12)
    gradient = weight_gradient(net)
    with pytest.warns(RuntimeWarning):
        gradient(x, cotangent)
    net.eval()
    assert error(gradient(x, cotangent)[1], references(net, x, cotangent)) < 1e-4
    assert (gradient.engine, gradient.reason) == ("fused", "")


def test_an_energy_that_moves_is_captured_anew_or_refused() -> None:
    net = dense(4, 8, 1)
    settings_of = {"factor": 2.0}
    x, cotangent = batch((4,), 12)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return settings_of["factor"] * self.net(x).flatten()

    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

    Moving.forward = forward
    energy = Moving()
    gradient = weight_gradient(energy)
    for factor in (2.0, 3.0, -1.0):
        settings_of["factor"] = factor
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, found = gradient(x, cotangent)
        assert error(found, references(energy, x, cotangent)) < 1e-4


def test_weights_of_a_running_chain_are_refused() -> None:
    net = dense(4, 8, 1)
    x, cotangent = batch((4,))
    gradient = weight_gradient(net)
    with fastebm.energy_gradient(net).chain(), pytest.raises(RuntimeError, match="while a chain over them ran"):
        gradient(x, cotangent)
    gradient(x, cotangent)


def test_a_weight_that_another_nets_chain_holds_is_refused() -> None:
    net, other = dense(4, 8, 1), dense(4, 8, 1)
    other[0].weight = net[0].weight
    x, cotangent = batch((4,))
    gradient = weight_gradient(net)
    with fastebm.energy_gradient(other).chain(), pytest.raises(RuntimeError, match="while a chain over them ran"):
        gradient(x, cotangent)
    assert "0.weight" in gradient(x, cotangent)[1]


def test_bad_input_is_one_line() -> None:
    net = dense(4, 8, 1)
    x, cotangent = batch((4,))
    gradient = weight_gradient(net)
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (TypeError, "x must be a floating-point tensor", lambda: gradient(x.long(), cotangent)),
        (TypeError, "x must be a floating-point tensor", lambda: gradient(3, cotangent)),
        (ValueError, r"cotangent must be a floating-point tensor \(5,\)", lambda: gradient(x, cotangent[:4])),
        (TypeError, "cotangent must be a tensor or a function", lambda: gradient(x, 1.0)),
        (ValueError, "the cotangents of 5 energies must be", lambda: gradient(x, lambda e, rows: e[:1])),
        (ValueError, "batch_size", lambda: gradient(x, cotangent, 0)),
        (ValueError, "engine must be one of", lambda: weight_gradient(net, engine="compile")),
        (ValueError, "dtype must be", lambda: weight_gradient(net, dtype=torch.float16)),
        (TypeError, "parameters are unknown", lambda: weight_gradient(lambda x: x.sum(1))(x, cotangent)),
        (ValueError, "has no shape yet", lambda: weight_gradient(nn.LazyLinear(1))(x, cotangent)),
        (ValueError, "one number per sample", lambda: weight_gradient(nn.Linear(4, 2))(x, cotangent)),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_an_empty_batch_and_no_parameters() -> None:
    net = dense(4, 8, 1)
    assert weight_gradient(net)(torch.zeros(0, 4), torch.zeros(0))[1] == {}
    net.requires_grad_(False)
    x, cotangent = batch((4,))
    energies, found = weight_gradient(net)(x, cotangent)
    assert found == {}
    assert torch.allclose(energies, net(x).flatten())


def test_autograd_takes_some_samples_at_a_time_with_one_power_iteration() -> None:
    net = nn.Sequential(spectral_norm(nn.Linear(4, 8)), nn.SiLU(), nn.Linear(8, 1)).double()
    x, cotangent = batch((4,), 7, torch.float64)
    expected = references(net, x, cotangent)
    once = copy.deepcopy(net)
    once(x)
    _, found = weight_gradient(net, engine="autograd")(x, cotangent, batch_size=3)
    assert error(found, expected) < TIGHT
    for mine, theirs in zip(net.buffers(), once.buffers(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("engine", ["fused", "autograd"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_laid_out_like_their_parameters(engine: str, layout: torch.memory_format) -> None:
    """A fused optimizer goes through memory, and does not look at the layout."""
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.SiLU(), nn.Flatten(), nn.Linear(180, 1)).to(memory_format=layout)
    twin = copy.deepcopy(net)
    x, cotangent = batch((3, 8, 8))
    weight_gradient(net, engine=engine).backward(x.contiguous(memory_format=torch.channels_last), cotangent)
    twin(x).flatten().backward(cotangent)
    for each in (net, twin):
        torch.optim.Adam(each.parameters(), 0.1, fused=True).step()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert mine.grad.stride() == mine.stride()
        assert torch.allclose(mine, theirs, atol=1e-4)


class Summed(nn.Module):
    """Two parameters with one gradient, and one whose gradient is one number many times."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * (self.a + self.b)).sum(1) * self.c.sum()


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_gradients_have_memory_of_their_own(engine: str) -> None:
    net = Summed()
    x, cotangent = batch((4,))
    gradient = weight_gradient(net, engine=engine)
    gradient.backward(x, cotangent)
    once = [p.grad.clone() for p in net.parameters()]
    net.a.grad.zero_()
    gradient.backward(x, cotangent)
    for p, first, times in zip(net.parameters(), once, (1, 2, 2), strict=True):
        assert torch.allclose(p.grad, times * first)


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_inference_mode_of_the_caller(engine: str) -> None:
    net = dense(4, 8, 1)
    with torch.inference_mode():
        x, cotangent = batch((4,))
        gradient = weight_gradient(net, engine=engine)
        energies = gradient.backward(x, cotangent)
    assert not energies.is_inference()
    expected = references(net, x.clone(), cotangent.clone())
    gradient.backward(x, cotangent)  # adds to what was made in inference mode
    assert error({name: p.grad / 2 for name, p in net.named_parameters()}, expected) < 1e-5


class PlusWeight(nn.Module):
    """A parametrisation that reads the weight of another layer."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.others = [other]  # no submodule

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.others[0].weight


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("reader", [0, 2])
def test_a_parametrisation_that_reads_a_parametrised_weight(engine: str, reader: int) -> None:
    net = dense(4, 4, 4, 1).double().eval()
    spectral_norm(net[2 - reader])
    nn.utils.parametrize.register_parametrization(net[reader], "weight", PlusWeight(net[2 - reader]))
    x, cotangent = batch((4,), dtype=torch.float64)
    named = dict(net.named_parameters())
    expected = dict(zip(named, torch.autograd.grad(net(x).flatten(), list(named.values()), cotangent), strict=True))
    assert error(weight_gradient(net, engine=engine)(x, cotangent)[1], expected) < TIGHT


class Flattening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.conv(x)).view(len(x), -1))


def test_autograd_leaves_x_in_its_layout() -> None:
    net = Flattening()  # `view` does not take channels last
    x, cotangent = batch((3, 6, 6))
    assert error(weight_gradient(net, engine="autograd")(x, cotangent)[1], references(net, x, cotangent)) < 1e-5


class Replacing(OfMode):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls = self.calls + 1
        return torch.tanh(self.layer(x)).sum(1)


def test_a_buffer_that_is_replaced_is_replaced_once_a_call() -> None:
    net = Replacing()
    x, cotangent = batch((4,))
    gradient = weight_gradient(net)
    with pytest.warns(RuntimeWarning, match="calls: the energy writes to it"):
        gradient(x, cotangent)
    gradient(x, cotangent)
    assert net.calls == 2


def test_buffers_that_can_not_be_written_to() -> None:
    net = OfMode().eval()
    net.register_buffer("mask", torch.ones(1).expand(8))
    net.register_buffer("unknown", torch.full((2,), torch.nan))
    weight_gradient(net, engine="fused")(*batch((4,)))
    assert net.mask.stride() == (0,)


class RarelyDropped(Dropped):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(torch.tanh(self.layer(x)), 1e-6, self.training).sum(1)


class CentredBatches(OfMode):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x))
        return (h - h.mean(0) / 2 if self.training and len(x) > 1 else h).sum(1)


class Blocked(nn.Module):
    """A layer without a gradient, which a last layer of zeros hides at first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocked, self.layer, self.last = nn.Linear(4, 4, bias=False), nn.Linear(4, 4), nn.Linear(4, 1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = torch.tanh(self.blocked(x))
        return self.last(torch.tanh(self.layer(h)))


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_power_iterations_of_weights_that_are_read(engine: str) -> None:
    """A net that grows has layers that its energy does not read yet."""
    net = CoarseToFineEnergy(8, base_width=4, lowest=4)
    twin = copy.deepcopy(net)
    x, cotangent = batch((3, 4, 4))
    weight_gradient(net, engine=engine)(x, cotangent)
    twin(x)
    for (name, mine), theirs in zip(net.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, theirs), name


def test_the_callers_autocast_keeps_no_weights_of_a_check() -> None:
    net = dense(4, 8, 1)
    net.register_parameter("spare", nn.Parameter(torch.zeros(3)))  # for another check at other weights
    x, cotangent = batch((4,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = net(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight_gradient(net, engine="fused")(x, cotangent)
        assert torch.equal(net(x), expected)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight.detach()


@pytest.mark.parametrize("parametrization", [nn.Identity, Doubled])
def test_parametrisations_that_give_the_parameter_or_nothing_to_differentiate(parametrization: Callable) -> None:
    net = dense(4, 4, 4, 1).double()
    nn.utils.parametrize.register_parametrization(net[0], "weight", parametrization())
    before = copy.deepcopy(net.state_dict())
    gradient = weight_gradient(net, engine="fused")
    for _ in range(2):
        x, cotangent = batch((4,), dtype=torch.float64)
        assert error(gradient(x, cotangent)[1], references(net, x, cotangent)) < TIGHT
        assert all(torch.equal(before[name], each) for name, each in net.state_dict().items())
        nn.init.normal_(net[2].weight)
        before = copy.deepcopy(net.state_dict())


def test_parameters_that_were_replaced_stay_as_they_are() -> None:
    net = dense(4, 4, 4, 1).double()
    gradient = weight_gradient(net, engine="fused")
    x, cotangent = batch((4,), dtype=torch.float64)
    gradient(x, cotangent)
    old = [layer.weight for layer in net if isinstance(layer, nn.Linear)]
    values = copy.deepcopy(old)
    for layer in net:
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    assert error(gradient(x, cotangent)[1], references(net, x, cotangent)) < TIGHT
    assert all(map(torch.equal, old, values))


class Writing(OfMode):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x.mul_(2))).sum(1)


def test_an_energy_that_writes_to_x_does_so_once_a_call() -> None:
    net = Writing()
    x, cotangent = batch((4,))
    expected = references(net, x.clone(), cotangent)
    twice = 2 * x
    with pytest.warns(RuntimeWarning, match="x: the energy writes to it"):
        assert error(weight_gradient(net)(x, cotangent)[1], expected) < 1e-5
    assert torch.equal(x, twice)


def test_dropout_that_no_check_would_see() -> None:
    with pytest.warns(RuntimeWarning, match="it is random"):
        weight_gradient(RarelyDropped())(*batch((4,)))


def test_a_program_checked_at_one_sample_is_checked_again_at_more() -> None:
    net = CentredBatches()
    gradient = weight_gradient(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for count in (1, 2, 6):
            x, cotangent = batch((4,), count)
            assert error(gradient(x, cotangent)[1], references(net, x, cotangent)) < 1e-5


@pytest.mark.parametrize("zeros", ["weights", "samples"])
def test_a_check_sees_gradients_behind_zeros(zeros: str) -> None:
    net = Blocked()
    x, cotangent = batch((4,))
    data = [p.data_ptr() for p in net.parameters()]
    versions = [p._version for p in net.parameters()]
    if zeros == "samples":
        nn.init.normal_(net.last.weight)
        versions = [p._version for p in net.parameters()]
    gradient = weight_gradient(net)
    with pytest.warns(RuntimeWarning, match="gradients differ from autograd's"):
        gradient(torch.zeros_like(x) if zeros == "samples" else x, cotangent)
    assert [p.data_ptr() for p in net.parameters()] == data
    assert [p._version for p in net.parameters()] == versions
    nn.init.normal_(net.last.weight)
    assert error(gradient(x, cotangent)[1], references(net, x, cotangent)) < 1e-5


def test_a_check_in_16_bits_sees_what_their_rounding_would_hide(monkeypatch: pytest.MonkeyPatch) -> None:
    run = OF_WEIGHTS.WeightProgram.run

    def off(program: Any, *given: Any) -> tuple[Tensor, list[Tensor]]:
        energies, gradients = run(program, *given)
        return energies, [1.03 * gradient for gradient in gradients]

    monkeypatch.setattr(OF_WEIGHTS.WeightProgram, "run", off)
    with pytest.warns(RuntimeWarning, match="gradients differ from autograd's by 0.03, more than 0.01"):
        weight_gradient(dense(4, 8, 1), dtype=torch.bfloat16)(*batch((4,)))


@pytest.mark.parametrize("at", ["the first point", "one point in three", "most points", "all points"])
def test_a_rounded_kink_does_not_decide_about_a_program(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits. What is off at most points is."""
    net, x = dense(4, 8, 1), batch((4,))[0]
    found, points = OF_WEIGHTS.WeightGradient._found, itertools.count(-1)  # first, the program in float32
    wrong: dict[str, Callable[[int], bool]] = {
        "the first point": lambda n: n == 0,
        "one point in three": lambda n: n % 3 == 0,
        "most points": lambda n: n % 3 != 1,
        "all points": lambda n: True,
    }

    def kinked(self: Any, program: Any, *given: Any) -> tuple[Tensor, list[Tensor]]:
        energies, gradients = found(self, program, *given)
        if (point := next(points)) >= 0 and wrong[at](point):
            gradients = [1.3 * gradient for gradient in gradients]
        return energies, gradients

    monkeypatch.setattr(OF_WEIGHTS.WeightGradient, "_found", kinked)
    gradient = weight_gradient(net, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gradient(x, torch.ones(len(x)))
    assert gradient.engine == ("autograd" if at in ("most points", "all points") else "fused")
    assert next(points) == LOW_PRECISION_POINTS + 1


@pytest.mark.parametrize("offset", [0.0, 1000.0, 5000.0])
def test_a_16_bit_program_that_loses_what_autocast_keeps_is_refused(offset: float) -> None:
    """Autocast's group norm is in float32. Points at another offset would not show what 16 bits lose at this one."""
    layers = nn.GroupNorm(1, 3), nn.Conv2d(3, 8, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)
    net = nn.Sequential(*layers)
    x, cotangent = batch((3, 12, 12))
    x = (x + offset).to(torch.bfloat16).float()
    expected = references(copy.deepcopy(net).double(), x.double(), cotangent.double())
    autocast = total_error(weight_gradient(net, dtype=torch.bfloat16, engine="autograd")(x, cotangent)[1], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = total_error(weight_gradient(net, dtype=torch.bfloat16)(x, cotangent)[1], expected)
    assert found <= max(0.1, 2 * autocast + 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checks_ask_for_no_energy_outside_of_its_domain(dtype: torch.dtype) -> None:
    class OfPixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 36, 1))
            nn.init.zeros_(self.net[-1].weight)  # behind it, gradients hide

        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_exporting() and (x.min() < 0 or x.max() > 1):
                raise ValueError("pixels must be in [0, 1]")
            return self.net(x).squeeze(1)

    net = OfPixels()
    x, cotangent = batch((3, 8, 8))
    x = x.sigmoid().round(decimals=1)
    expected = references(net, x, cotangent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert error(weight_gradient(net, dtype=dtype)(x, cotangent)[1], expected) < 0.02


@pytest.mark.parametrize("hook", ["module", "tensor"])
def test_backward_hooks_run(hook: str) -> None:
    net = dense(4, 8, 1)
    if hook == "module":  # which a check with small gradients does not see
        net[1].register_full_backward_hook(lambda module, given, result: (given[0].clamp(-9, 9),))
    else:
        net[1].register_forward_hook(
            lambda module, given, result: result.register_hook(lambda gradient: gradient.clamp(-9, 9)) and None
        )
    gradient = weight_gradient(net)
    x, cotangent = batch((4,))
    with pytest.warns(RuntimeWarning, match="hook"):
        gradient(x, cotangent)
    expected = references(net, x, 1e3 * cotangent)
    assert error(gradient(x, 1e3 * cotangent)[1], expected) < 1e-5


def test_backward_hooks_of_all_modules_run() -> None:
    net = dense(4, 8, 1)
    x, cotangent = batch((4,))
    gradient = weight_gradient(net)
    gradient(x, cotangent)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_full_backward_hook(lambda module, *_: seen.append(module))
    try:
        with pytest.warns(RuntimeWarning, match="hook of all modules"):
            gradient(x, cotangent)
    finally:
        handle.remove()
    assert set(net) <= set(seen)
    gradient(x, cotangent)
    assert gradient.engine == "fused"


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_hooks_of_parameters_run_once(engine: str) -> None:
    net = dense(4, 8, 1)
    x, cotangent = batch((4,))
    expected = references(net, x, cotangent)
    gradient = weight_gradient(net, engine=engine)
    net[0].weight.register_hook(lambda found: 2 * found)
    seen = []
    net[2].bias.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    gradient.backward(x, cotangent)
    assert torch.allclose(net[0].weight.grad, 2 * expected["0.weight"], atol=1e-5)
    assert len(seen) == 1
    assert torch.allclose(seen[0], expected["2.bias"])


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_a_cotangent_may_differentiate_and_write_to_its_argument(engine: str) -> None:
    net = dense(4, 8, 1)
    x, _ = batch((4,))
    energies = net(x).flatten().detach()
    expected = references(net, x, 2 * energies)

    def of_loss(found: Tensor, rows: slice) -> Tensor:
        found.requires_grad_()
        (derivative,) = torch.autograd.grad(found.square().sum(), found)
        return derivative

    for function in (of_loss, lambda found, rows: found.mul_(2)):
        found_energies, found = weight_gradient(net, engine=engine)(x, function)
        assert error(found, expected) < 1e-5
        assert torch.allclose(found_energies, energies, atol=1e-6)


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_a_call_within_a_call_is_refused(engine: str) -> None:
    net = dense(4, 8, 1)
    x, cotangent = batch((4,))
    gradient = weight_gradient(net, engine=engine)
    with pytest.raises(RuntimeError, match="within a call of itself"):
        gradient(x, lambda energies, rows: gradient(x, cotangent)[0])
    assert error(gradient(x, cotangent)[1], references(net, x, cotangent)) < 1e-5


def test_weights_are_evaluated_once_at_a_time() -> None:
    net = nn.Sequential(spectral_norm(nn.Linear(4, 8)), nn.SiLU(), nn.Linear(8, 1))
    x, cotangent = batch((4,))
    inner = weight_gradient(net, engine="autograd")
    kinds = [type(part) for part in net.modules()]
    with pytest.raises(RuntimeError, match="were asked for while their gradients are computed"):
        weight_gradient(net, engine="autograd")(x, lambda energies, rows: inner(x, cotangent)[0])
    assert [type(part) for part in net.modules()] == kinds
    assert error(inner(x, cotangent)[1], references(net.eval(), x, cotangent)) < 1e-2


def test_samples_without_a_finite_energy_do_not_settle_the_engine() -> None:
    net = dense(4, 8, 1)
    x, cotangent = batch((4,))
    gradient = weight_gradient(net)
    with pytest.warns(RuntimeWarning, match="not finite"):
        gradient(torch.where(torch.arange(5)[:, None] == 1, torch.nan, x), cotangent)
    gradient(x, cotangent)
    assert gradient.engine == "fused"


def test_power_iterations_where_a_program_is_refused_late(tmp_path: Path) -> None:
    path = tmp_path / "factor"

    class OfFile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = spectral_norm(nn.Linear(4, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.layer(x)).sum(1) * float(path.read_text())

    net = OfFile()
    x, cotangent = batch((4,))
    gradient = weight_gradient(net)
    for factor in ("1", "2"):
        path.write_text(factor)
        twin = copy.deepcopy(net)
        expected = references(twin, x, cotangent)
        twin(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert error(gradient(x, cotangent)[1], expected) < 1e-5
        assert all(map(torch.equal, net.buffers(), twin.buffers()))


def test_threads_may_start_at_once() -> None:
    net = dense(4, 8, 1)
    x, cotangent = batch((4,))
    shared = weight_gradient(net, engine="fused")
    gradients = [shared, shared, weight_gradient(net, engine="fused"), weight_gradient(net, engine="fused")]
    with ThreadPoolExecutor(len(gradients)) as pool:
        found = list(pool.map(lambda gradient: gradient(x, cotangent)[1], gradients))
    assert all(torch.equal(other[name], each) for other in found for name, each in found[0].items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda gradient: pickle.loads(pickle.dumps(gradient))])
def test_copies_have_weights_of_their_own(copied: Callable) -> None:
    net = dense(4, 8, 1)
    x, cotangent = batch((4,))
    gradient = weight_gradient(net, dtype=torch.float32, engine="fused")
    _, expected = gradient(x, cotangent)
    other = copied(gradient)
    nn.init.zeros_(net[2].weight)
    assert other.dtype is torch.float32
    assert error(other(x, cotangent)[1], expected) < 1e-6


def test_compiled_and_scripted_modules() -> None:
    net = dense(4, 8, 1)
    x, cotangent = batch((4,))
    expected = references(net, x, cotangent)
    _, found = weight_gradient(torch.compile(net, backend="eager"), engine="fused")(x, cotangent)
    assert error({name.removeprefix("_orig_mod."): each for name, each in found.items()}, expected) < 1e-5
    with pytest.warns(RuntimeWarning):
        _, found = weight_gradient(torch.jit.script(net))(x, cotangent)
    assert error(found, expected) < 1e-5


def test_distributed_data_parallel_is_refused(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(dense(4, 8, 1))
        for energy in (wrapped, functools.partial(wrapped), nn.Sequential(wrapped)):
            with pytest.raises(TypeError, match="hand over its `module`"):
                weight_gradient(energy)
    finally:
        torch.distributed.destroy_process_group()


@st.composite
def convolutional(draw: st.DrawFn) -> tuple[nn.Module, Shape]:
    """Random small nets of convolutions of all strides, paddings and dilations, with pools, biases and activations."""
    channels, size = draw(st.integers(1, 5)), draw(st.integers(5, 9))
    shape, layers = (channels, size, size), []
    for _ in range(draw(st.integers(1, 3))):
        width, kernel = draw(st.integers(1, 18)), draw(st.integers(1, 3))
        options = {
            "stride": draw(st.integers(1, 2)), "padding": draw(st.integers(0, 2)), "bias": draw(st.booleans()),
        }  # fmt: skip
        if draw(st.booleans()):
            layer: nn.Module = nn.Conv2d(channels, width, kernel, dilation=draw(st.integers(1, 2)), **options)
        else:
            layer = nn.ConvTranspose2d(channels, width, max(kernel, 2), **options)
        length = layer(torch.zeros(1, channels, size, size)).shape[-1] if _fits(layer, channels, size) else 0
        if length < 1:
            continue
        layers += [layer, draw(st.sampled_from([nn.SiLU, nn.Tanh, nn.Softplus, nn.GELU]))()]
        channels, size = width, length
        if size % 2 == 0 and draw(st.booleans()):
            layers.append(nn.AvgPool2d(2))
            size //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, 1)), shape


def _fits(layer: nn.Module, channels: int, size: int) -> bool:
    try:
        layer(torch.zeros(1, channels, size, size))
    except RuntimeError:
        return False
    return True


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(net=convolutional(), count=st.integers(1, 5))
def test_gradients_of_random_architectures(net: tuple[nn.Module, Shape], count: int) -> None:
    module, shape = net
    x, cotangent = batch(shape, count)
    exact = references(copy.deepcopy(module).double(), x.double(), cotangent.double())
    gradient = weight_gradient(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, found = gradient(x, cotangent)
    assert total_error(found, exact) < 1e-4
    double = weight_gradient(copy.deepcopy(module).double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, found = double(x.double(), cotangent.double())
    assert total_error(found, exact) < TIGHT


def test_a_net_of_many_layers_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """More settings than a fingerprint looks at; torch.export puts other tuples in the place of those it finds."""
    net = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(130)), nn.Flatten(), nn.Linear(4, 1))
    captures = []
    own = OF_WEIGHTS.capture
    monkeypatch.setattr(OF_WEIGHTS, "capture", lambda *arguments: captures.append(1) or own(*arguments))
    x, cotangent = batch((1, 2, 2))
    gradient = weight_gradient(net)
    for _ in range(3):
        gradient(x, cotangent)
    assert len(captures) == 1


def test_autograd_runs_where_folding_saves_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OF_WEIGHTS, "WORTH", 1.5)
    x, cotangent = batch((3, 8, 8))
    plain, folding = networks.ResidualNet(), CoarseToFineEnergy(8, base_width=4, lowest=4)
    gradient, expected = weight_gradient(plain), references(plain, x, cotangent)
    _, found = gradient(x, cotangent)  # a warning would be an error
    assert gradient.engine == "autograd"
    assert "times as many operations only" in gradient.reason
    asked = weight_gradient(plain, engine="fused")
    assert error(found, expected) < 1e-4
    asked(x, cotangent)
    folded = weight_gradient(folding)
    folded(x, cotangent)
    assert (asked.engine, folded.engine) == ("fused", "fused")
