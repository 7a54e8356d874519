"""`energy_gradient(engine="fused")`: whole nets against autograd, weights that change, and what has no program."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastebm.compiler import energy_gradient
from fastebm.models import CoarseToFineEnergy
from tests.compiler.networks import Decoder, ResidualNet, TutorialNet, WideNet
from tests.compiler.small_programs import assert_close, tensor


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tanh(tensor(*shape, seed=7)).to(dtype)


def growing(size: int, **options) -> CoarseToFineEnergy:
    torch.manual_seed(3)
    return CoarseToFineEnergy(size, **({"base_width": 4} | options)).double()


def assert_agrees(energy, x: Tensor, tolerance: float = 1e-10):
    """By a program as by autograd, for two lengths of the batch. Returns the gradient by the program."""
    fused, autograd = energy_gradient(energy, engine="fused"), energy_gradient(energy, engine="autograd")
    for part in (x, x[:1]):
        for found, wanted in zip(fused(part), autograd(part), strict=True):
            assert (found.dtype, found.stride()) == (wanted.dtype, wanted.stride())
            assert_close(found, wanted, tolerance)
    return fused


# ---- whole nets


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_coarse_to_fine(size, beta):
    net = growing(size, lowest=4)
    assert_agrees(functools.partial(net, beta=beta), images(3, 3, size, size))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "elu", "leaky_relu", "relu"])
def test_coarse_to_fine_with_other_activations(activation):
    net = growing(16, activation=activation, spectral_norm=False)
    assert_agrees(functools.partial(net, beta=torch.tensor([0.6])), images(2, 3, 16, 16))


def test_coarse_to_fine_flops_fall_as_the_algebra_says():
    text = {}
    for size in (8, 32):
        gradient = energy_gradient(growing(size, base_width=32).float(), engine="fused")
        gradient(images(1, 3, size, size, dtype=torch.float32))
        text[size] = gradient.describe()
    assert "captured" in text[8]
    assert "3.18 times fewer FLOPs" in text[8]
    assert "2.93 times fewer FLOPs" in text[32]
    assert "Convolution 4x4 stride 2 + bias" in text[32]


FOREIGN = {
    "tutorial": (TutorialNet, (2, 1, 16, 16)),
    "odd tutorial": (functools.partial(TutorialNet, size=13), (2, 1, 13, 13)),
    "residual": (ResidualNet, (2, 3, 16, 16)),
    "odd residual": (ResidualNet, (2, 3, 15, 13)),
    "wide": (WideNet, (2, 3, 16, 16)),
    "odd wide": (WideNet, (2, 3, 13, 11)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_nets(name):
    make, shape = FOREIGN[name]
    torch.manual_seed(0)
    fused = assert_agrees(make().double(), images(*shape))
    assert "times fewer FLOPs" in fused.describe()


def test_a_decoder_followed_by_an_energy():
    torch.manual_seed(0)
    both = nn.Sequential(Decoder(), ResidualNet()).double()
    both(tensor(4, 6))  # in train mode: batch statistics have moved
    fused = assert_agrees(both, tensor(3, 6))
    assert "Affine" not in fused.describe()

    decoder, energy = both[0].eval(), both[1].eval()
    assert_agrees(lambda z: energy(decoder(z)) + 0.5 * z.square().sum(1, keepdim=True), tensor(3, 6))


# ---- precisions


@pytest.mark.parametrize("make", [lambda: growing(16, base_width=8), ResidualNet, WideNet])
def test_single_precision(make):
    torch.manual_seed(0)
    net, x = make().double(), images(4, 3, 16, 16)
    energies, gradient = energy_gradient(net, engine="autograd")(x)
    found = energy_gradient(net.float(), engine="fused")(x.float())
    assert found[0].dtype == found[1].dtype == torch.float32
    assert (found[0] - energies).norm() < 1e-5 * energies.norm()
    assert (found[1] - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("make", [lambda: growing(16, base_width=8), ResidualNet, WideNet])
def test_bfloat16_is_at_most_twice_as_far_off_as_autocast(make):
    torch.manual_seed(0)
    net, x = make().float(), images(8, 3, 16, 16, dtype=torch.float32)
    energies, gradient = energy_gradient(net, engine="autograd")(x)
    errors = {}
    for engine in ("fused", "autograd"):
        e, g = energy_gradient(net, dtype=torch.bfloat16, engine=engine)(x)
        assert e.dtype == g.dtype == torch.float32
        errors[engine] = ((e - energies).norm() / energies.norm(), (g - gradient).norm() / gradient.norm())
    for ours, theirs in zip(errors["fused"], errors["autograd"], strict=True):
        assert ours < 2 * theirs + 1e-3
    # Nets of few channels compute in float32 where there are no matrix units, as lane programs.
    assert min(errors["autograd"]) > 0


def test_the_callers_autocast_is_the_precision():
    net, x = growing(8).float(), images(2, 3, 8, 8, dtype=torch.float32)
    gradient = energy_gradient(net, engine="fused")
    full = gradient(x)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = gradient(x)[1]
    assert 0 < (low - full).norm() / full.norm() < 0.05
    assert torch.equal(gradient(x)[1], full)


# ---- weights, settings, modes


def test_weights_are_read_once_a_chain_and_anew_in_the_next():
    net = growing(8)
    x = images(2, 3, 8, 8)
    gradient = energy_gradient(net, engine="fused")
    with gradient.chain():
        first = gradient(x)
        again = gradient(x)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert first[1].data_ptr() != again[1].data_ptr()
    captured = gradient._compiled._programs
    program = next(iter(captured.values())).executor
    for _ in range(2):
        net.train()
        net(x).sum().backward()  # the power iterations of the spectral norm go on as well
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        for found, wanted in zip(gradient(x), energy_gradient(net, engine="autograd")(x), strict=True):
            assert_close(found, wanted)
        assert not torch.equal(gradient(x)[1], first[1])
    assert next(iter(captured.values())).executor is program


def test_weights_that_were_put_in_the_place_of_others():
    net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1)).double().eval()
    other = nn.Linear(8, 1).double()
    x = tensor(3, 4)
    for energy in (net, lambda x: net(x) * 2):
        gradient = energy_gradient(energy, engine="fused")
        gradient(x)
        for change in (
            lambda: net.load_state_dict({n: t * 1.5 for n, t in net.state_dict().items()}, assign=True),
            lambda: setattr(net[0].weight, "data", net[0].weight.data * 2),
            lambda: net.__setitem__(2, other),
            lambda: net.__setitem__(1, nn.Tanh()),
        ):
            change()
            for found, wanted in zip(gradient(x), energy_gradient(energy, engine="autograd")(x), strict=True):
                assert_close(found, wanted)
        net[1] = nn.SiLU()


def test_settings_that_change_are_captured_anew():
    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 1)
            self.temperature = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.inner(x)) / self.temperature

    net = Tempered().double().eval()
    factor = 3.0

    def closure(x):
        return net(x) * factor

    x = tensor(3, 4)
    for energy in (net, closure):
        gradient = energy_gradient(energy, engine="fused")
        for net.temperature in (2.0, 0.5):
            for factor in (3.0, 5.0):  # noqa: B007  (what closure reads)
                for found, wanted in zip(gradient(x), energy_gradient(energy, engine="autograd")(x), strict=True):
                    assert_close(found, wanted)


def test_an_object_that_is_called():
    class Energy:
        def __init__(self, net, scale):
            self.net, self.scale = net, scale

        def __call__(self, x):
            return self.net(x) * self.scale

    energy = Energy(nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1)).double().eval(), 2.0)
    gradient, x = energy_gradient(energy, engine="fused"), tensor(3, 4)
    for energy.scale in (2.0, 5.0):
        for found, wanted in zip(gradient(x), energy_gradient(energy, engine="autograd")(x), strict=True):
            assert_close(found, wanted)


def test_a_copy_has_its_own_weights():
    net = growing(8)
    gradient, x = energy_gradient(net, engine="fused"), images(2, 3, 8, 8)
    expected = gradient(x)
    other = copy.deepcopy(gradient)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)
    assert torch.equal(other(x)[1], expected[1])
    assert not torch.equal(gradient(x)[1], expected[1])


def test_a_beta_tensor_may_change_between_chains():
    net = growing(16)
    beta = torch.tensor([0.2])
    energy = functools.partial(net, beta=beta)
    gradient, x = energy_gradient(energy, engine="fused"), images(2, 3, 16, 16)
    for value in (0.2, 0.9, 0.0):
        beta.fill_(value)
        for found, wanted in zip(gradient(x), energy_gradient(energy, engine="autograd")(x), strict=True):
            assert_close(found, wanted)


def test_one_gradient_serves_all_sizes_and_batches():
    net = growing(32)
    gradient = energy_gradient(net, engine="fused")
    with gradient.chain():
        for count, size in ((2, 8), (1, 32), (5, 8), (3, 16), (2, 8), (7, 8)):
            x = images(count, 3, size, size)
            for found, wanted in zip(gradient(x), energy_gradient(net, engine="autograd")(x), strict=True):
                assert_close(found, wanted)
    assert gradient(x[:0])[1].shape == (0, 3, 8, 8)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_grad_mode(mode):
    net = growing(8)
    x = images(2, 3, 8, 8)
    expected = energy_gradient(net, engine="autograd")(x)
    gradient = energy_gradient(net, engine="fused")
    for context in (mode, torch.enable_grad, mode):
        with context(), gradient.chain():
            for _ in range(2):
                found = gradient(x * 1)
                assert not any(part.requires_grad or part.is_inference() for part in found)
                for ours, theirs in zip(found, expected, strict=True):
                    assert_close(ours, theirs)


def test_layouts_of_x():
    net = growing(8)
    x = images(2, 3, 8, 8)
    gradient = energy_gradient(net, engine="fused")
    expected = gradient(x)[1]
    for other in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        kept = other.clone()
        assert torch.equal(gradient(other)[1], expected)
        assert torch.equal(other, kept)


def test_nothing_is_left_behind():
    net = growing(8).train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    energy_gradient(net, engine="fused")(images(2, 3, 8, 8))
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_non_finite_energies_are_passed_on():
    net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1)).double()
    gradient = energy_gradient(net, engine="fused")
    gradient(tensor(2, 4))
    x = tensor(2, 4)
    x[1, 0] = float("nan")
    energies, g = gradient(x)
    assert energies.isfinite().tolist() == [True, False]
    assert g.isfinite().all(1).tolist() == [True, False]


# ---- no program


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return (torch.softmax(tokens @ tokens.transpose(1, 2), dim=-1) @ tokens).square().mean((1, 2))


class Largest(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.first(x)).amax((2, 3)).mean(1)


class Stepwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def reversed_gradient(x: Tensor) -> Tensor:
    """A hook that autograd runs and no program sees."""
    h = x.square()
    if h.requires_grad:
        h.register_hook(lambda gradient: -gradient)
    return h.sum((1, 2, 3))


@pytest.mark.parametrize(
    ("energy", "reason"),
    [
        (Attention(), "matmul"),
        (Largest(), r"amax: no rule imports aten\.amax\.default"),
        (lambda x: x.sum((1, 2, 3)) if x.sum() > 0 else x.square().sum((1, 2, 3)), r"torch\.export"),
        (lambda x: Stepwise.apply(x).square().sum((1, 2, 3)), r"autograd\.Function Stepwise"),
        (reversed_gradient, r"backward: a gradient hook"),
    ],
    ids=["attention", "largest value", "control flow", "custom function", "hook"],
)
def test_what_has_no_program_says_why(energy, reason):
    energy = energy.double() if isinstance(energy, nn.Module) else energy
    x = images(2, 3, 8, 8)
    gradient = energy_gradient(energy, engine="fused")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"no fused program exists for .*{reason}"):
            gradient(x)
    with pytest.warns(RuntimeWarning, match=f"runs by autograd.*{reason}"):
        assert energy_gradient(energy)(x)[1].abs().max() > 0


def test_auto_falls_back_and_says_why():
    gradient = energy_gradient(Largest().double())
    x = images(2, 3, 8, 8)
    with pytest.warns(RuntimeWarning, match="Largest runs by autograd instead of a fused program.*amax"):
        assert torch.equal(gradient(x)[1], energy_gradient(gradient.energy, engine="autograd")(x)[1])
    assert gradient.engine == "autograd"
    assert not gradient.batch_invariant
    assert "amax" in gradient.reason
    assert "autograd gradient of Largest" in repr(gradient)
    assert "not fused: amax: no rule imports aten.amax.default" in repr(gradient)
    other = energy_gradient(growing(8))
    other(x)
    assert (other.engine, other.reason) == ("fused", "")


def test_an_impossible_x_raises_what_the_net_raises():
    gradient = energy_gradient(growing(8), engine="fused")
    gradient(images(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"this net takes \(batch, 3, s, s\)"):
        gradient(images(2, 3, 9, 9))
    with pytest.raises(ValueError, match="must be one number per sample"):
        energy_gradient(lambda x: x.flatten(1), engine="fused")(images(2, 3, 9, 9))


def test_energies_that_cannot_be_compared_have_no_program():
    gradient = energy_gradient(lambda x: x.log().sum(1), engine="fused")
    with pytest.raises(RuntimeError, match="at none of the first states"):
        gradient(-tensor(2, 4).abs().float())
    gradient(tensor(2, 4).abs().float())  # the first states say nothing about later ones
    assert gradient.engine == "fused"
