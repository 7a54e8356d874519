import copy
import doctest
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastebm.models import CoarseToFineEnergy

from . import plain_coarse_to_fine as plain

SIZES_AND_BETAS = [(4, 1.0)] + [(size, beta) for size in (8, 16, 32, 64) for beta in (0.0, 0.3, 1.0)]


def make_net(image_size: int = 64, *, dtype: torch.dtype = torch.float64, **options) -> CoarseToFineEnergy:
    """A small net in eval mode whose biases and spectral directions are not at their special initial values."""
    torch.manual_seed(1)
    net = CoarseToFineEnergy(image_size, **({"channels": 3, "base_width": 4, "lowest": 4} | options)).to(dtype)
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return net.eval()


def images(size: int, count: int = 3, *, channels: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(size), dtype=dtype) * 2 - 1


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max()


def assert_agrees_with_plain(net: CoarseToFineEnergy, x: Tensor, beta: float) -> None:
    """Energies, and the gradients of an uneven sum of them with respect to x and to every weight."""
    names = [name for name, _ in net.named_parameters()]
    state = {name: t.detach().clone().requires_grad_(name in names) for name, t in net.state_dict().items()}
    x, plain_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    energies, plain_energies = net(x, beta), plain.energy(state, plain_x, beta, net.activation)
    assert_close(energies, plain_energies)

    uneven = torch.linspace(-1, 2, len(x), dtype=x.dtype)
    ours = torch.autograd.grad(energies @ uneven, [x, *net.parameters()], allow_unused=True)
    theirs = torch.autograd.grad(plain_energies @ uneven, [plain_x, *(state[n] for n in names)], allow_unused=True)
    for name, mine, other in zip(["x", *names], ours, theirs, strict=True):
        if other is None or not other.any():  # at beta = 0 the plain net multiplies a block's gradient by zero
            assert mine is None or not mine.any(), name
        else:
            assert_close(mine, other)


@pytest.mark.parametrize(("size", "beta"), SIZES_AND_BETAS)
def test_agrees_with_plain_net(size, beta):
    assert_agrees_with_plain(make_net(), images(size), beta)


@pytest.mark.parametrize("activation", plain.ACTIVATIONS)
def test_every_activation_agrees_with_plain_net(activation):
    assert_agrees_with_plain(make_net(16, activation=activation), images(16), 0.3)


@pytest.mark.parametrize("spectral_norm", [True, False])
def test_gray_and_without_spectral_norm(spectral_norm):
    net = make_net(16, channels=1, lowest=8, spectral_norm=spectral_norm)
    assert_agrees_with_plain(net, images(16, channels=1), 0.3)
    assert any("_u" in name for name in net.state_dict()) == spectral_norm


def test_tensor_beta_is_the_number_it_holds():
    net, x = make_net(), images(16)
    for beta in (0.0, 0.25, 1.0):  # exact in float32
        for shape in ((), (1,)):
            assert_close(net(x, torch.full(shape, beta)), net(x, beta))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_zero_beta_is_exactly_the_half_size_energy(size, dtype):
    net, x = make_net(dtype=dtype), images(size, dtype=dtype)
    half = net(F.avg_pool2d(x, 2))
    assert torch.equal(net(x, 0), half)
    assert torch.equal(net(x, 0.0), half)
    assert torch.equal(net(x, torch.tensor(0.0)), half)
    assert not torch.equal(net(x, 1.0), half)


def test_high_resolutions_run_and_fade_from_the_half_size():
    net = CoarseToFineEnergy(512, base_width=4).eval().requires_grad_(False)
    for size in (128, 256, 512):
        x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(size)) * 2 - 1
        half = net(F.avg_pool2d(x, 2))
        assert half.isfinite().all()
        assert torch.equal(net(x, torch.tensor(0.0)), half)
        assert not torch.equal(net(x), half)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_growing_leaves_the_energy_unchanged(dtype):
    net = make_net(16, dtype=dtype).requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    grown, x = net.grown(), images(32, dtype=dtype)
    assert grown.sizes == (4, 8, 16, 32)
    assert torch.equal(grown(x, 0.0), net(F.avg_pool2d(x, 2)))
    assert torch.equal(grown(x[..., ::2, ::2]), net(x[..., ::2, ::2]))
    assert all(p.requires_grad and p.dtype == dtype for p in grown.parameters())
    with torch.no_grad():
        for parameter in grown.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_growing_keeps_the_mode_and_the_order_of_a_fresh_net():
    assert make_net(8).train().grown().training
    assert not make_net(8).grown().training
    fresh = CoarseToFineEnergy(16, base_width=4, lowest=4)
    assert list(make_net(8).grown().state_dict()) == list(fresh.state_dict())


def test_frozen_is_an_independent_sub_net():
    net = make_net(32).train()
    x, state = images(16), torch.get_rng_state()
    frozen = net.frozen(16)
    assert torch.equal(torch.get_rng_state(), state)
    assert frozen.sizes == (4, 8, 16)
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    net.eval()
    expected = net(x, 0.3)
    assert torch.equal(frozen(x, 0.3), expected)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.mul_(2.0)
    assert torch.equal(frozen(x, 0.3), expected)
    assert not torch.equal(net(x, 0.3), expected)


def test_deep_copy_is_independent():
    net, x = make_net(16), images(16)
    twin, expected = copy.deepcopy(net), net(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.head.linear.bias.add_(1.0)
        net.blocks["16"].conv1.bias.add_(1.0)
    assert_close(twin(x), expected + 1.0)


@pytest.mark.parametrize(("size", "beta"), [(4, 1.0), (8, 0.3), (16, 0.3)])
def test_parameters_at_are_those_with_a_gradient(size, beta):
    net = make_net(16)
    net(images(size), beta).sum().backward()
    used = {id(p) for p in net.parameters() if p.grad is not None}
    listed = [id(p) for p in net.parameters_at(size)]
    assert set(listed) == used
    assert len(listed) == len(used)


def test_power_iterations_run_in_train_mode_only():
    net, x = make_net(8), images(8)
    original = net.blocks["8"].conv1.parametrizations.weight.original
    with torch.no_grad():
        original.copy_(torch.randn_like(original))  # no longer what u and v were found for

    def directions() -> dict[str, Tensor]:
        return {name: t.clone() for name, t in net.state_dict().items() if name.endswith(("_u", "_v"))}

    before = directions()
    net(x)
    assert all(torch.equal(t, before[name]) for name, t in directions().items())
    net.train()
    energies = net(x)
    assert not any(torch.equal(t, before[name]) for name, t in directions().items())
    assert_close(energies, plain.energy(net.state_dict(), x))
    for _ in range(100):
        net(x)
    largest = torch.linalg.matrix_norm(net.blocks["8"].conv1.weight.flatten(1), ord=2)
    assert largest.item() == pytest.approx(1.0, abs=1e-3)


def test_equalized_weights_start_like_he():
    torch.manual_seed(0)
    skip = CoarseToFineEnergy(8, base_width=64).blocks["8"].skip
    assert skip.parametrizations.weight.original.std().item() == pytest.approx(1.0, abs=0.02)
    assert skip.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    assert not skip.bias.any()
    value = torch.randn_like(skip.weight)
    skip.weight = value
    torch.testing.assert_close(skip.weight, value)


def test_widths():
    with torch.device("meta"):
        net = CoarseToFineEnergy(512, base_width=32)
    widths = [(int(size), block.conv1.in_channels, block.conv2.out_channels) for size, block in net.blocks.items()]
    assert widths[:3] == [(8, 128, 128), (16, 128, 128), (32, 128, 128)]
    assert widths[3:] == [(64, 64, 128), (128, 32, 64), (256, 16, 32), (512, 8, 16)]
    assert list(net.from_rgb) == ["8", "16", "32", "64", "128", "256", "512"]
    assert net.sizes == (8, 16, 32, 64, 128, 256, 512)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_exports_with_a_dynamic_batch(beta):
    net = make_net(16, dtype=torch.float32)
    shapes = {"x": {0: torch.export.Dim("batch")}, "beta": None}
    example = images(16, 2, dtype=torch.float32)
    program = torch.export.export(net, (example, beta), dynamic_shapes=shapes)
    for count in (1, 5):
        x = images(16, count, dtype=torch.float32)
        torch.testing.assert_close(program.module()(x, beta), net(x, beta))


def test_empty_batch():
    assert make_net()(images(16, 0), 0.3).shape == (0,)
    assert make_net()(images(4, 0)).shape == (0,)


def test_config_rebuilds_the_net():
    net = make_net(16, lowest=8, activation="gelu", spectral_norm=False)
    again = CoarseToFineEnergy(**net.config).double().eval()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(images(16)), net(images(16)))
    assert "activation='gelu'" in repr(net)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 24}, "image_size is 24"),
        ({"image_size": 1024}, "1024"),
        ({"image_size": 8, "lowest": 16}, "lowest 16"),
        ({"image_size": 8, "lowest": 2}, "lowest 2"),
        ({"image_size": 8, "channels": 0}, "channels is 0"),
        ({"image_size": 8, "base_width": 0}, "base_width is 0"),
        ({"image_size": 256, "base_width": 3}, "multiple of 2"),
        ({"image_size": 512, "base_width": 6}, "1.5 channels at 512x512.*multiple of 4"),
        ({"image_size": 8, "activation": "tanh"}, "tanh"),
    ],
)
def test_refuses_impossible_nets(options, message):
    with pytest.raises(ValueError, match=message):
        CoarseToFineEnergy(**options)


@pytest.mark.parametrize("shape", [(1, 3, 8), (1, 1, 8, 8), (1, 3, 8, 4), (1, 3, 2, 2), (1, 3, 32, 32), (1, 3, 12, 12)])
def test_refuses_what_is_no_image_of_the_net(shape):
    with pytest.raises(ValueError, match=r"takes \(batch, 3, s, s\) with s in \(4, 8, 16\)"):
        make_net(16)(torch.zeros(shape, dtype=torch.float64))


def test_refuses_impossible_betas():
    net = make_net(16)
    for beta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            net(images(8), beta)
    with pytest.raises(ValueError, match="one element"):
        net(images(8), torch.zeros(3))
    for beta in (0, 0.5, torch.tensor(0.5)):
        with pytest.raises(ValueError, match="nothing to fade from"):
            net(images(4), beta)
    for method in (net.frozen, net.parameters_at):
        with pytest.raises(ValueError, match="size is 32"):
            method(32)
    with pytest.raises(ValueError, match="1024"), torch.device("meta"):
        CoarseToFineEnergy(512).grown()


def test_docstring_example():
    assert doctest.testmod(importlib.import_module("fastebm.models.coarse_to_fine")) == (0, 2)
