"""What tracing must not lose: the gradient is autograd's own, and what no program can follow is refused in words."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastebm import ops
from fastebm.compiler.lanes import LaneError, LaneExecutor, lower, trace

from .test_operations import one_by_one

Energy = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def compiled() -> None:
    if not ops.backends.runs_compiled("run_lanes"):
        pytest.skip("lane programs run on the compiled backend alone")


def executor_of(energy: Energy, x: Tensor, module: nn.Module | None = None) -> LaneExecutor:
    executor = LaneExecutor(lower(trace(energy, module, x[:1])), module)
    executor.refresh()
    return executor


def check(energy: Energy, x: Tensor, module: nn.Module | None = None) -> None:
    energies, gradient = executor_of(energy, x, module)(x)
    expected_energies, expected = one_by_one(energy, x)
    torch.testing.assert_close(energies, expected_energies, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, equal_nan=True)


def samples(*shape: int) -> Tensor:
    return torch.randn(9, *shape, generator=torch.Generator().manual_seed(3))


# ---- the gradient is autograd's


class Steep(torch.autograd.Function):
    """A sine whose backward is not its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 7 * grad * ctx.saved_tensors[0]


def without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        weight = x.cos()
    return (x * weight).sum(1)


def hooked(x: Tensor) -> Tensor:
    y = x.sin()
    y.register_hook(lambda grad: grad * 3)
    return y.sum(1)


def written_by_parts(x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 4)
    out[:, 0] = x[:, 0].sin()
    view = out[:, 1:3]
    view += x[:, 2:]
    view[:, 0] *= x[:, 1]
    out[:, 3] = out[:, 0] * 2
    return out.square().sum(1)


def written_integers(x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 4, dtype=torch.long)
    out[:] = x * 3
    return (out * x).sum(1)


def squeezed_in_place(x: Tensor) -> Tensor:
    y = x.sin().sum(1, keepdim=True)
    y.squeeze_(1)
    return y


def masked_write(x: Tensor) -> Tensor:
    y = x.clone()
    y[y > 0.5] = 0.0
    return y.square().sum(1)


@pytest.mark.parametrize(
    "energy",
    [
        pytest.param(lambda x: (x * x.detach().sin()).sum(1), id="detach"),
        pytest.param(lambda x: (x.data * x).sum(1), id="data"),
        pytest.param(without_gradient, id="no_grad"),
        pytest.param(lambda x: ((x.round() - x).detach() + x).square().sum(1), id="straight through"),
        pytest.param(lambda x: Steep.apply(x).sum(1), id="custom backward"),
        pytest.param(hooked, id="hook"),
        pytest.param(lambda x: x.sin().sum(1) if x.requires_grad else x.cos().sum(1), id="requires_grad"),
        pytest.param(written_by_parts, id="writes into views"),
        pytest.param(written_integers, id="writes into integers"),
        pytest.param(squeezed_in_place, id="squeeze_"),
        pytest.param(masked_write, id="masked write"),
    ],
)
def test_the_gradient_is_autograds(energy: Energy) -> None:
    check(energy, samples(4))


AT_POINTS: dict[str, Energy] = {
    "abs": lambda x: x.abs().sum(1),
    "norm": lambda x: x.norm(dim=1),
    "norm 1": lambda x: x.norm(1, dim=1),
    "norm 3": lambda x: x.norm(3, dim=1),
    "norm inf": lambda x: torch.linalg.vector_norm(x, math.inf, dim=1),
    "root": lambda x: x.square().sum(1).sqrt(),
    "sign": lambda x: (x.sign() * x).sum(1),
    "max": lambda x: x.max(1).values,
    "max of all": lambda x: x.max().reshape(1),
    "amax": lambda x: x.amax(1) - x.amin(1),
    "aminmax": lambda x: (lambda m: m.max - m.min)(x.aminmax(dim=1)),
    "maximum": lambda x: torch.maximum(x, x.roll(1, 1)).sum(1),
    "minimum": lambda x: torch.minimum(x, x.roll(1, 1)).square().sum(1),
    "fmax": lambda x: torch.fmax(x, x.roll(1, 1)).square().sum(1),
    "relu": lambda x: x.relu().sum(1) + F.leaky_relu(x).sum(1),
    "clamp": lambda x: x.clamp(0, 1).sum(1),
    "clamp with tensors": lambda x: torch.clamp(x, torch.zeros(4), torch.ones(4)).sum(1),
    "elu": lambda x: F.elu(x).sum(1) + F.celu(x).sum(1),
    "hard": lambda x: (F.hardtanh(x) + F.hardswish(x * 3) + F.hardsigmoid(x * 3)).sum(1),
    "shrink": lambda x: (F.softshrink(x, 1.0) + F.hardshrink(x, 1.0) + F.threshold(x, 0, 0)).sum(1),
    "huber": lambda x: F.huber_loss(x, torch.zeros(1, 4), reduction="none").sum(1),
    "prod": lambda x: x.prod(1),
    "cumprod": lambda x: x.cumprod(1).sum(1),
    "cummax": lambda x: (x.cummax(1).values * torch.arange(4.0)).sum(1),
    "sort": lambda x: (x.sort(1).values * torch.arange(4.0)).sum(1),
    "median": lambda x: x.median(1).values,
    "max pool": lambda x: F.max_pool1d(x[:, None], 2).sum((1, 2)),
    "adaptive max pool": lambda x: F.adaptive_max_pool1d(x[:, None], 3).sum((1, 2)),
    "standard deviation": lambda x: x.std(1),
    "cdist": lambda x: torch.cdist(x.reshape(1, 2, 2), x.reshape(1, 2, 2)).sum((1, 2)),
    "cdist 1": lambda x: torch.cdist(x.reshape(1, 2, 2), x.reshape(1, 2, 2), p=1).sum((1, 2)),
    "cdist 1.5": lambda x: torch.cdist(x.reshape(1, 2, 2), x.reshape(1, 2, 2), p=1.5).sum((1, 2)),
    "cdist 3": lambda x: torch.cdist(x.reshape(1, 2, 2), x.reshape(1, 2, 2), p=3).sum((1, 2)),
    "cdist inf": lambda x: torch.cdist(x.reshape(1, 2, 2), x.reshape(1, 2, 2), p=math.inf).sum((1, 2)),
    "pdist": lambda x: F.pdist(x.reshape(2, 2)).sum().reshape(1),
    "atan2": lambda x: torch.atan2(x, x.roll(1, 1)).sum(1),
    "hypot": lambda x: torch.hypot(x, x.roll(1, 1)).sum(1),
    "powers": lambda x: (x**0 + x + x.abs() ** 2.5 + x.abs() ** torch.tensor([1.0, 2.0, 0.0, 3.0])).sum(1),
    "xlogy": lambda x: torch.xlogy(x.abs(), x.abs()).sum(1),
    "sinc": lambda x: torch.sinc(x).sum(1),
    "softplus": lambda x: F.softplus(x * 40).sum(1) + F.logsigmoid(x).sum(1),
    "complex": lambda x: (lambda z: z.abs().sum(1) + z.angle().sum(1))(torch.view_as_complex(x.reshape(1, 2, 2))),
    "where": lambda x: torch.where(x > 0, x.sqrt(), x).sum(1),
    "logsumexp": lambda x: torch.logsumexp(torch.where(x == 0, -torch.inf, x), 1),
    "logaddexp": lambda x: torch.logaddexp(x, -x).sum(1),
    "normalize": lambda x: F.normalize(x, dim=1).sum(1) + F.cosine_similarity(x, x.roll(1, 1), dim=1),
    "copysign": lambda x: torch.copysign(torch.ones(1, 4) * x, x).sum(1),
}


@pytest.mark.parametrize("name", AT_POINTS)
def test_ties_and_zeros_are_as_in_autograd(name: str) -> None:
    points = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 1], [2, -2, 2, -2], [-1, -1, 0, -1], [0.5, 0, 0, -0.5]])
    check(AT_POINTS[name], torch.cat([points, 1e-5 * points, 1e3 * points]))


# ---- what is refused


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.square().sum(1)


class OfNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.from_numpy(np.sin(x.numpy()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def catching(x: Tensor) -> Tensor:
    try:
        return x.sum(1) * x[0, 0].item()
    except Exception:
        return x.sum(1)


def clamping(x: Tensor) -> Tensor:
    with torch.no_grad():
        x.clamp_(0, 1)
    return x.square().sum(1)


SPARSE = torch.eye(4).to_sparse()
BRANCHES = "takes a Python number or a truth from a tensor that depends on x, in line"
LEAVES = "leaves PyTorch with a tensor that depends on x, in line"
SHAPES = "depends on numbers, not on shapes alone, in line"


@pytest.mark.parametrize(
    ("energy", "words"),
    [
        pytest.param(lambda x: x.sum(1) if x.sum() > 0 else x.square().sum(1), BRANCHES, id="branch"),
        pytest.param(lambda x: x.sum(1) * x[0, 0].item(), BRANCHES, id="item"),
        pytest.param(lambda x: x.sum(1) * float(x[0, 0]), BRANCHES, id="float"),
        pytest.param(catching, BRANCHES, id="caught"),
        pytest.param(lambda x: x.sum(1) if torch.isfinite(x).all() else x, BRANCHES, id="assertion"),
        pytest.param(lambda x: x.sum(1) if torch.equal(x, x) else x, BRANCHES, id="equal"),
        pytest.param(lambda x: x.sum(1) * x.tolist()[0][0], LEAVES, id="tolist"),
        pytest.param(lambda x: x.sum(1) * x.detach().numpy()[0, 0], LEAVES, id="numpy"),
        pytest.param(lambda x: x.sum(1) * np.asarray(x.detach())[0, 0], LEAVES, id="asarray"),
        pytest.param(lambda x: OfNumpy.apply(x).sum(1), LEAVES, id="custom function of numpy"),
        pytest.param(lambda x: x[x > 0].sum().reshape(1), SHAPES, id="mask"),
        pytest.param(lambda x: torch.masked_select(x, x > 0).sum().reshape(1), SHAPES, id="masked_select"),
        pytest.param(lambda x: x.sum(1) * len(torch.nonzero(x)), SHAPES, id="nonzero"),
        pytest.param(lambda x: x.sum(1) * len(torch.unique(x)), SHAPES, id="unique"),
        pytest.param(lambda x: (x + torch.rand_like(x)).sum(1), "random numbers by rand_like", id="rand_like"),
        pytest.param(lambda x: (x + torch.randn(4)).sum(1), "random numbers by randn", id="randn"),
        pytest.param(lambda x: F.dropout(x, 0.5, True).sum(1), "random numbers by bernoulli_", id="dropout"),
        pytest.param(lambda x: x.sum(1) * random.random(), "random numbers of Python", id="random"),
        pytest.param(lambda x: x.sum(1) * np.random.rand(), "random numbers of `numpy.random`", id="numpy.random"),  # noqa: NPY002
        pytest.param(lambda x: torch.sparse.mm(SPARSE, x.T).sum(0), r"layout torch\.sparse_coo", id="sparse"),
        pytest.param(clamping, "writes into x, by clamp_", id="writes into x"),
        pytest.param(lambda x: torch.ones(1), "does not depend on x", id="constant"),
        pytest.param(lambda x: x.detach().sum(1), "does not depend on x", id="detached"),
        pytest.param(lambda x: x, r"has to be one number, got \(1, 4\)", id="not one number"),
        pytest.param(lambda x: x.double().sum(1), "float64, and lane programs compute in float32", id="float64"),
    ],
)
def test_what_no_program_can_follow_is_refused_in_words(
    energy: Energy, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    x = samples(4)
    before = x.clone()
    with pytest.raises(LaneError, match=words) as raised:
        executor_of(energy, x)
    if "in line" in words:
        assert "test_semantics.py" in str(raised.value)
    assert torch.equal(x, before)
    assert capfd.readouterr() == ("", "")


def test_a_write_to_a_buffer_is_refused_before_it_happens() -> None:
    module = Counting()
    with pytest.raises(LaneError, match="writes into a tensor that it does not own, by add_"):
        executor_of(module, samples(4), module)
    assert module.calls == 0


def test_batch_norm_in_training_is_refused_and_keeps_its_statistics() -> None:
    norm = nn.BatchNorm1d(4).train()
    with pytest.raises(LaneError, match="writes into a tensor that it does not own"):
        executor_of(lambda x: norm(torch.cat([x, x + 1])).sum().reshape(1), samples(4), norm)
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(4))


def test_what_the_energy_itself_raises_is_passed_on() -> None:
    def broken(x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        executor_of(broken, samples(4))


# ---- what else tracing has to leave as it was


def test_python_numbers_from_weights_hold_until_the_weights_change() -> None:
    weight = torch.tensor([2.0])

    def energy(x: Tensor) -> Tensor:
        return x.square().sum(1) * weight.item() if weight > 0 else x.sum(1)

    x = samples(4)
    check(energy, x)
    executor = executor_of(energy, x)
    weight.fill_(3.0)
    with pytest.raises(LaneError, match=r"a Python number from a weight, which was 2\.0 and is 3\.0"):
        executor.refresh()


def test_new_weights_are_read_by_refresh() -> None:
    module = nn.Linear(4, 1).requires_grad_(False)
    outside = torch.full((4,), 2.0)

    def energy(x: Tensor) -> Tensor:
        return (module(x).squeeze(1) * outside.exp().sum()) + x.square() @ outside

    x = samples(4)
    executor = executor_of(energy, x, module)
    module.weight.mul_(-2)
    outside[0] = -1.0
    executor.refresh()
    for found, expected in zip(executor(x), one_by_one(energy, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_generators_and_settings_are_left_as_they_were() -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state(), random.getstate()
    validated = torch.distributions.Distribution._validate_args

    def energy(x: Tensor) -> Tensor:
        return (x + torch.rand(4) + random.random()).sum(1)

    with pytest.raises(LaneError):
        executor_of(energy, samples(4))
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert torch.distributions.Distribution._validate_args == validated
    assert torch.backends.mkldnn.enabled


def test_arguments_of_distributions_are_not_checked_while_tracing() -> None:
    check(lambda x: -torch.distributions.Gamma(2.0, 1.0).log_prob(x.square() + 0.1).sum(1), samples(4))


def test_an_index_that_changes_is_noticed_by_refresh() -> None:
    labels = torch.tensor([1, 3])
    executor = executor_of(lambda x: x[:, labels].square().sum(1), samples(4))
    labels[0] = 2
    with pytest.raises(LaneError, match="a tensor of integers or truths that has changed"):
        executor.refresh()


@pytest.mark.parametrize(
    "energy",
    [
        pytest.param(lambda x, n: sum(x[:, i] ** 2 for i in range(int(n[0]))), id="item"),
        pytest.param(lambda x, n: x.split(n.tolist(), 1)[0].square().sum(1), id="tolist"),
        pytest.param(lambda x, n: x.square().sum(1) if n[0] > 1 else x.sum(1), id="branch"),
    ],
)
def test_integers_that_leave_pytorch_are_noticed_by_refresh(energy: Callable[[Tensor, Tensor], Tensor]) -> None:
    counts = torch.tensor([3, 1])
    executor = executor_of(lambda x: energy(x, counts), samples(4))
    check(lambda x: energy(x, counts), samples(4))
    counts[0] -= 2
    with pytest.raises(LaneError, match="a tensor of integers or truths that has changed"):
        executor.refresh()


def test_a_program_is_the_same_whenever_it_is_made_and_whatever_runs_beside_it() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 1)).requires_grad_(False)
    x = samples(4)
    first, second = (executor_of(lambda x: net(x).squeeze(1), x, net) for _ in range(2))
    for a, b in zip(first.lowered.program.encoded(), second.lowered.program.encoded(), strict=True):
        assert torch.equal(a, b)
    energies, gradient = first(x)
    for i in range(len(x)):
        alone = second(x[i : i + 1])
        assert torch.equal(alone[0], energies[i : i + 1])
        assert torch.equal(alone[1], gradient[i : i + 1])


def test_weights_that_need_gradients_are_no_part_of_the_program() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1))
    check(lambda x: net(x).squeeze(1), samples(1, 4, 4), net)
    assert all(weight.grad is None for weight in net.parameters())


def test_old_spectral_norm_leaves_a_module_that_works() -> None:
    net = nn.utils.spectral_norm(nn.Linear(4, 3)).eval().requires_grad_(False)
    check(lambda x: net(x).tanh().sum(1), samples(4), net)


def test_a_sample_may_be_one_number() -> None:
    check(lambda x: (x.square() - 1).square(), samples())


def test_forward_hooks_are_not_called_in_a_trace() -> None:
    net, seen = nn.Linear(4, 1).requires_grad_(False), []
    net.register_forward_hook(lambda *_: seen.append(1))
    executor_of(lambda x: net(x).squeeze(1), samples(4), net)
    assert not seen


def test_compiled_functions_run_as_they_were_written() -> None:
    compiled = torch.compile(lambda x: x.sin().square().sum(1), backend="eager")
    check(compiled, samples(4))
