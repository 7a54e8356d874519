import copy
import doctest
import functools
import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from fastebm import compiler as gradients
from fastebm import ops
from fastebm.compiler import EnergyGradient
from fastebm.models import CoarseToFineEnergy
from tests.gpu.graph_recorder import GraphRecorder

# What this file pins down, to the last bit, is the engine that the fused one is compared with in
# test_program_engine.py.
energy_gradient = functools.partial(gradients.energy_gradient, engine="autograd")


def images(count: int = 4, size: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(7), dtype=dtype) * 2 - 1


def make_net(**options) -> CoarseToFineEnergy:
    torch.manual_seed(3)
    return CoarseToFineEnergy(8, **({"base_width": 4, "lowest": 4} | options))


def by_autograd(energy, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    energies = energy(x)
    return energies.detach(), torch.autograd.grad(energies.sum(), x)[0]


def snapshot(module: nn.Module) -> tuple:
    """All that an energy gradient promises to leave as it was."""
    return (
        [(type(part), part.training, sorted(vars(part))) for part in module.modules()],
        [(name, id(p), p.requires_grad, p.grad) for name, p in module.named_parameters()],
        [(name, id(t)) for name, t in module.named_buffers()],
        {name: t.clone() for name, t in module.state_dict().items()},
    )


def assert_untouched(module: nn.Module, before: tuple) -> None:
    after = snapshot(module)
    assert after[:3] == before[:3]
    assert after[3].keys() == before[3].keys()
    assert all(torch.equal(t, before[3][name]) for name, t in after[3].items())


class Counted(nn.Module):
    """A parametrisation that counts how often it is evaluated."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight * 2


class Mixed(nn.Module):
    """Dropout, batch norm, spectral norm, a counted and a frozen parameter, sub-modules in different modes."""

    def __init__(self):
        super().__init__()
        self.conv = spectral_norm(nn.Conv2d(3, 8, 3))
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(8 * 36, 1)
        self.counted = Counted()
        parametrize.register_parametrization(self.linear, "weight", self.counted)
        self.conv.bias.requires_grad_(False)
        self.train()
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.drop(torch.tanh(self.norm(self.conv(x)))).flatten(1))


# ---- what it computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_autograd_in_eval_mode(dtype):
    net = Mixed().to(dtype)
    x = images(dtype=dtype)
    energies, gradient = energy_gradient(net)(x)
    expected_energies, expected = by_autograd(copy.deepcopy(net).eval(), x)
    assert torch.equal(energies, expected_energies.flatten())
    assert torch.equal(gradient, expected)
    assert gradient.abs().max() > 0
    assert (energies.dtype, gradient.dtype) == (dtype, dtype)
    assert not energies.requires_grad
    assert not gradient.requires_grad


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (-1, 1, 1, 1)])
def test_one_number_a_sample_in_any_shape(shape):
    for count in (1, 4):
        x = images(count)
        energies, gradient = energy_gradient(lambda x: x.square().sum((1, 2, 3)).reshape(shape))(x)
        assert torch.equal(energies, x.square().sum((1, 2, 3)))
        assert torch.equal(gradient, 2 * x)


def test_functions_partials_and_bound_methods():
    net = make_net().train()
    x, before = images(), snapshot(net)
    expected = by_autograd(copy.deepcopy(net).eval(), x)
    faded = by_autograd(functools.partial(copy.deepcopy(net).eval(), beta=0.3), x)
    for energy, (energies, gradient) in [
        (net, expected),
        (net.forward, expected),
        (functools.partial(net, beta=0.3), faded),
        (functools.partial(functools.partial(net.forward), beta=0.3), faded),
    ]:
        ours = energy_gradient(energy)(x)
        assert torch.equal(ours[0], energies)
        assert torch.equal(ours[1], gradient)
        assert_untouched(net, before)


@pytest.mark.parametrize("compiled", [False, True])
def test_coarse_to_fine_gradient_is_autograd_and_not_zero(compiled):
    """`torch.func.grad` under `torch.compile` gives silent zeros (pytorch#193279): this fails if it is ever taken."""
    net = make_net().train()
    energy = torch.compile(net, backend="aot_eager") if compiled else net
    gradient = energy_gradient(energy)
    x = images()
    for _ in range(2):
        before = snapshot(net)
        with gradient.chain():
            for _ in range(2):
                energies, g = gradient(x)
        assert_untouched(net, before)
        expected_energies, expected = by_autograd(copy.deepcopy(net).eval(), x)
        torch.testing.assert_close(energies, expected_energies)
        torch.testing.assert_close(g, expected, rtol=1e-5, atol=1e-8)
        assert g.flatten(1).norm(dim=1).min() > 1e-4
        energy(x).sum().backward()  # a training step between two chains
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_autocast(dtype):
    net, x = make_net().eval(), images()
    energies, gradient = energy_gradient(net, dtype=dtype)(x)
    full_energies, full = energy_gradient(net)(x)
    assert energies.dtype == gradient.dtype == torch.float32
    error = (gradient - full).norm() / full.norm()
    assert 0 < error < 0.03
    assert (energies - full_energies).abs().max() < 0.03 * max(1.0, full_energies.abs().max())


def test_float32_switches_autocast_off_and_none_leaves_it():
    net, x = make_net().eval(), images()
    full = energy_gradient(net)(x)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(energy_gradient(net, dtype=torch.float32)(x)[1], full)
        assert not torch.equal(energy_gradient(net)(x)[1], full)


def test_non_finite_energies_are_passed_on():
    x = torch.tensor([[1.0], [-1.0], [0.0]])
    energies, gradient = energy_gradient(lambda x: x.log().sum(1))(x)
    assert torch.equal(energies.isfinite(), torch.tensor([True, False, False]))
    assert gradient[0] == 1
    assert gradient[2].isinf()


def test_empty_batch_gives_empty_results():
    gradient = energy_gradient(make_net().train())
    for dtype in (torch.float32, torch.float64):
        energies, g = gradient(images(0, dtype=dtype))
        assert (energies.shape, energies.dtype) == ((0,), dtype)
        assert (g.shape, g.dtype) == ((0, 3, 8, 8), dtype)


def test_x_is_left_alone():
    x = images().requires_grad_()
    kept = x.detach().clone()
    energy_gradient(make_net().eval())(x)
    assert x.requires_grad
    assert x.grad is None
    assert torch.equal(x, kept)


# ---- what it leaves behind: nothing


def test_flags_weights_and_buffers_come_back():
    net = Mixed()
    net.linear.bias.grad = torch.ones(1)
    before = snapshot(net)
    gradient = energy_gradient(net)
    gradient(images())
    assert_untouched(net, before)
    with gradient.chain():
        assert not any(part.training for part in net.modules())
        assert not any(p.requires_grad for p in net.parameters())
        gradient(images())
    assert_untouched(net, before)


def test_all_comes_back_after_an_exception():
    net = Mixed()
    before = snapshot(net)
    gradient = energy_gradient(net)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        gradient(images(size=9))
    assert_untouched(net, before)
    with pytest.raises(KeyError), gradient.chain():
        raise KeyError
    assert_untouched(net, before)
    assert torch.equal(gradient(images())[1], by_autograd(copy.deepcopy(net).eval(), images())[1])


def test_all_comes_back_when_the_set_up_fails():
    class EvalFails(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            if not self.training:
                raise ArithmeticError
            return weight

    net = Mixed()
    net.norm.train()
    parametrize.register_parametrization(net.norm, "bias", EvalFails())
    before = snapshot(net)
    with pytest.raises(ArithmeticError):
        energy_gradient(net)(images())
    assert_untouched(net, before)


def test_training_goes_on_after_sampling():
    net = make_net().train()
    gradient = energy_gradient(net)
    net(images()).sum().backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    gradient(images())
    assert all(torch.equal(net.get_parameter(name).grad, g) for name, g in expected.items())
    net.zero_grad()
    with gradient.chain():
        gradient(images())
    net(images()).sum().backward()
    assert {name for name, p in net.named_parameters() if p.grad is not None} == expected.keys()


# ---- weights are read once a chain


def test_parametrised_weights_are_evaluated_once_a_chain():
    net = Mixed()
    gradient = energy_gradient(net)
    start = net.counted.calls
    for chain in range(1, 4):
        with gradient.chain() as inner:
            assert inner is gradient
            for _ in range(5):
                inner(images())
            with gradient.chain():
                gradient(images())
            gradient(images())
        assert net.counted.calls == start + chain
    gradient(images())
    assert net.counted.calls == start + 4


def test_new_weights_are_seen_by_the_next_chain():
    net = make_net().train()
    gradient = energy_gradient(net)
    first = gradient(images())[1]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1)
    assert torch.equal(gradient(images())[1], by_autograd(copy.deepcopy(net).eval(), images())[1])
    assert not torch.equal(gradient(images())[1], first)


def test_chains_of_copies_that_overlap_keep_their_own_weights():
    """A deep copy shares the parametrised class of its original, and with it the keys of `parametrize.cached()`."""
    net = make_net().train()
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    expected, expected_other = (by_autograd(copy.deepcopy(n).eval(), images())[1] for n in (net, other))
    gradient, gradient_other = energy_gradient(net), energy_gradient(other)
    both = energy_gradient(lambda x: net(x) - other(x))
    with gradient.chain(), gradient_other.chain():
        assert torch.equal(gradient(images())[1], expected)
        assert torch.equal(gradient_other(images())[1], expected_other)
        torch.testing.assert_close(both(images())[1], expected - expected_other)


def test_two_gradients_of_one_net_nest():
    net = Mixed()
    before = snapshot(net)
    expected = by_autograd(copy.deepcopy(net).eval(), images())[1]
    outer, inner = energy_gradient(net), energy_gradient(net.forward)
    with outer.chain():
        with inner.chain():
            assert torch.equal(inner(images())[1], expected)
        assert torch.equal(outer(images())[1], expected)
    assert_untouched(net, before)


def test_the_cache_of_a_training_step_around_it_is_left_alone():
    net = make_net().train()
    weight = net.head.conv1.parametrizations.weight.original
    expected = by_autograd(copy.deepcopy(net).eval(), images())[1]
    with parametrize.cached():
        assert torch.equal(energy_gradient(net)(images())[1], expected)
        net(images()).sum().backward()
    assert weight.grad.abs().max() > 0


# ---- inference mode


@contextmanager
def grad_mode(name: str) -> Iterator[None]:
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[name]():
        yield


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_works_without_gradients_around_it(mode):
    net = Mixed()
    before = snapshot(net)
    x = images()
    expected = by_autograd(copy.deepcopy(net).eval(), x)
    gradient = energy_gradient(net)
    with grad_mode(mode):
        for _ in range(2):
            energies, g = gradient(x.clone())  # under inference_mode: an inference tensor
            assert torch.equal(g, expected[1])
            with gradient.chain():
                assert torch.equal(gradient(x * 1)[1], expected[1])
            assert not torch.is_grad_enabled()
    assert_untouched(net, before)
    assert torch.equal(energies, expected[0].flatten())


def test_grad_mode_is_the_callers_own_inside_a_chain():
    gradient = energy_gradient(make_net())
    with torch.inference_mode(), gradient.chain():
        gradient(images())
        assert torch.is_inference_mode_enabled()
    with gradient.chain():
        gradient(images())
        assert torch.is_grad_enabled()


def test_weights_and_input_that_are_inference_tensors():
    with torch.inference_mode():
        net = Mixed()
        net.tied = net.linear.parametrizations.weight.original
        x = images().clone()
    assert next(net.parameters()).is_inference()
    assert x.is_inference()
    before = snapshot(net)
    plain = Mixed().eval()
    plain.load_state_dict({name: t.clone() for name, t in net.state_dict().items() if name != "tied"})
    expected = by_autograd(plain, x.clone())
    for energy in (net, net.forward):
        energies, g = energy_gradient(energy)(x)
        assert torch.equal(energies, expected[0].flatten())
        assert torch.equal(g, expected[1])
        with torch.inference_mode():
            assert torch.equal(energy_gradient(energy)(x)[1], expected[1])
    assert_untouched(net, before)


# ---- refusals


def batch_norm_energy() -> nn.Module:
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    return nn.Sequential(norm, nn.Tanh(), nn.Flatten(), nn.Linear(192, 1))


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("value", [0.0, None])
def test_refuses_samples_that_influence_each_other(count, value):
    x = images(count) if value is None else torch.full((count, 3, 8, 8), value)
    closed_over = nn.Sequential(nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(192, 1)).train()

    def spread(x: Tensor) -> Tensor:
        return x.flatten(1).sum(1) * (x - x.mean(0)).square().mean()

    for energy in (batch_norm_energy(), lambda x: closed_over(x), spread):
        gradient = energy_gradient(energy)
        if energy is spread and value is not None:
            gradient(x)  # all samples are equal: its gradient happens to be zero there
            gradient = energy_gradient(energy)
            for first in (x, x[:1]):  # a batch of one can't tell
                gradient(first)
            with pytest.raises(RuntimeError, match="batch norm in train mode"):
                gradient(images(count))
            continue
        for _ in range(2):
            with pytest.raises(RuntimeError, match="batch norm in train mode"):
                gradient(x)
    # The module itself is put into eval mode, where batch norm uses its running statistics.
    energy_gradient(closed_over)(x)


def test_an_energy_that_is_nan_beside_a_good_sample_is_no_influence():
    x = torch.tensor([[1.0], [-5.0], [-9.0]])
    assert energy_gradient(lambda x: x.sqrt().sum(1))(x)[1][0] == 0.5


@pytest.mark.parametrize(
    ("energy", "error", "message"),
    [
        (lambda x: x.sum(), ValueError, r"shape \(\) for x of shape \(4, 3, 8, 8\)"),
        (lambda x: x.flatten(1), ValueError, r"shape \(4, 192\).*\(4,\)"),
        (lambda x: x[:2].sum((1, 2, 3)), ValueError, r"shape \(2,\)"),
        (lambda x: x.sum((1, 2, 3))[None], ValueError, r"shape \(1, 4\)"),
        (lambda x: (x.sum((1, 2, 3)), x), TypeError, "returned tuple"),
        (lambda x: x.sum((1, 2, 3)).long(), TypeError, "returned torch.int64"),
        (lambda x: torch.zeros(len(x)), RuntimeError, "don't depend on x"),
        (lambda x: x.detach().sum((1, 2, 3)), RuntimeError, "don't depend on x"),
        (lambda x: torch.ones(len(x), requires_grad=True) * 2, RuntimeError, "don't depend on x"),
    ],
)
def test_refuses_what_is_no_energy(energy, error, message):
    with pytest.raises(error, match=message):
        energy_gradient(energy)(images())


def test_refuses_impossible_inputs():
    gradient = energy_gradient(make_net())
    with pytest.raises(TypeError, match=r"torch\.int64"):
        gradient(torch.zeros(1, 3, 8, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match="list"):
        gradient([1.0])
    with pytest.raises(ValueError, match="no dimensions"):
        gradient(torch.tensor(1.0))


def test_refuses_impossible_options():
    with pytest.raises(TypeError, match="Tensor"):
        energy_gradient(torch.zeros(1))
    with pytest.raises(ValueError, match=r"torch\.int8"):
        energy_gradient(make_net(), dtype=torch.int8)
    with pytest.raises(ValueError, match="'fastest'"):
        energy_gradient(make_net(), engine="fastest")


def test_says_what_runs():
    gradient = energy_gradient(make_net(), dtype=torch.bfloat16)
    assert isinstance(gradient, EnergyGradient)
    assert gradient.engine == "autograd"
    assert gradient.reason == "engine is 'autograd'"
    text = "autograd gradient of CoarseToFineEnergy (bfloat16); not fused: engine is 'autograd'"
    assert gradient.describe() == text


def test_the_fused_engine_is_what_people_get():
    gradient = gradients.energy_gradient(make_net(), dtype=torch.bfloat16)
    gradient(images())
    assert repr(gradient) == "fused gradient of CoarseToFineEnergy (bfloat16) by a fused program"
    assert gradient.variant == "fused, bfloat16"


def grouped() -> nn.Module:
    """A net that no fused program has instructions for."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.SiLU(), nn.Flatten(), nn.Linear(108, 1))


def test_the_repr_says_which_kind_of_program_runs():

    def flat(x):
        return x.square().sum(1)

    made = gradients.energy_gradient(grouped())
    assert (made.program, repr(made)) == ("", "fused gradient of Sequential (dtype follows autocast)")
    with ops.backend("reference"):
        made(images())
        assert repr(made).endswith("by PyTorch's operations")
        assert (made.program, made.batch_invariant) == ("PyTorch operations", False)
        assert "runs on PyTorch operations: " in made.describe().splitlines()[-1]
    net = gradients.energy_gradient(make_net())
    with ops.backend("reference"):
        net(images())
        assert repr(net).endswith("by a fused program")
        assert net.describe().splitlines()[-1] == "runs on fused kernels, backend reference"
    if ops.backends.runs_compiled("run_lanes"):
        made = gradients.energy_gradient(flat)
        made(torch.randn(3, 2))
        assert repr(made).endswith("by a lane program")
        assert (made.program, made.batch_invariant) == ("lane program", True)


def test_images_that_run_on_stock_operations_of_a_gpu_are_said_once():
    """On the CPU nothing is said, and neither where the engine was asked for."""
    with ops.backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients.energy_gradient(grouped())(images())
        with GraphRecorder().installed():
            x = images()
            gradients.energy_gradient(grouped(), engine="fused")(x)
            made = gradients.energy_gradient(grouped())
            with pytest.raises(
                RuntimeWarning, match=r"Sequential runs on PyTorch's operations instead of a fused program"
            ):
                made(x)
            warnings.simplefilter("default")
            with pytest.warns(RuntimeWarning, match="Sequential runs on PyTorch's operations") as said:
                made(x)
            warnings.simplefilter("error")
            made(x)
    assert len(said) == 1
    assert Path(said[0].filename) == Path(__file__)


def test_docstring_example():
    assert doctest.testmod(importlib.import_module("fastebm.compiler.energy_gradient")) == (0, 3)
