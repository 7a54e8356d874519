"""The flow: that it is invertible, that its determinants and densities are right, that noise is a function of seeds."""

import doctest
import importlib
import math

import pytest
import torch
from torch import Tensor, nn

from fastebm.models import Flow, dequantize
from fastebm.models.flow import ActivationNorm, AffineCoupling, InvertibleConvolution


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For every test here."""


def moved(module: nn.Module, std: float = 0.1, *, seed: int = 0) -> nn.Module:
    """The module with all weights moved, so that nothing is at its special initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return module


def make_flow(shape: tuple[int, int, int], *, dtype: torch.dtype = torch.float64, std: float = 0.1, **options) -> Flow:
    torch.manual_seed(0)
    return moved(Flow(shape, **({"levels": 2, "flow_steps": 3, "width": 8} | options)).to(dtype), std)


def images(shape: tuple[int, int, int], count: int = 4, *, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype) * 2 - 1


SHAPES = [((1, 8, 8), 2), ((3, 8, 8), 3), ((3, 4, 8), 1), ((2, 1, 1), 0), ((5, 3, 3), 0)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(("shape", "levels"), SHAPES)
def test_decode_inverts_encode_and_encode_decode(shape, levels, dtype, tolerance):
    flow = make_flow(shape, levels=levels, dtype=dtype, std=0.03)
    x = images(shape, dtype=dtype)
    latents, _ = flow.encode(x)
    assert (flow.decode(latents) - x).abs().max() < tolerance
    z = images((math.prod(shape), 1, 1), dtype=dtype).flatten(1)
    assert (flow.encode(flow.decode(z))[0] - z).abs().max() < tolerance
    assert not torch.allclose(latents, x.flatten(1), atol=0.1)


@pytest.mark.parametrize(("shape", "levels"), [((1, 4, 4), 2), ((3, 2, 2), 1), ((4, 1, 1), 0), ((3, 2, 3), 0)])
def test_log_determinant_is_that_of_autograds_jacobian(shape, levels):
    flow = make_flow(shape, levels=levels, std=0.3)
    x = images(shape, 3)
    _, log_determinants = flow.encode(x)
    for one, log_determinant in zip(x, log_determinants, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x: flow.encode(x[None])[0][0], one).flatten(1)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_determinant)


def test_density_of_vectors_integrates_to_one():
    flow = make_flow((2, 1, 1), levels=0, flow_steps=4)
    side, count = 16.0, 801
    line = torch.linspace(-side, side, count, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)[:, :, None, None]
    with torch.no_grad():
        density = flow.log_prob(grid).exp()
    assert float(density.sum()) * (2 * side / (count - 1)) ** 2 == pytest.approx(1.0, abs=1e-6)
    # Not a normal distribution: its mean, covariance and peak would go together.
    mean = (density[:, None] * grid.flatten(1)).sum(0) / density.sum()
    centred = grid.flatten(1) - mean
    covariance = (density[:, None] * centred).mT @ centred / density.sum()
    peak = 1 / (2 * math.pi * math.sqrt(float(torch.linalg.det(covariance))))
    assert abs(float(density.max()) / peak - 1) > 0.02


def test_samples_have_the_density():
    flow = make_flow((2, 1, 1), levels=0, flow_steps=4)
    x = flow.sample(20000, seed=1)
    assert x.dtype == torch.float64
    with torch.no_grad():
        # E_p[f] by samples, and by importance weights from a wide normal proposal.
        proposal = 3.0 * torch.randn(200_000, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        log_proposal = -proposal.square().sum((1, 2, 3)) / 18 - math.log(18 * math.pi)
        weights = (flow.log_prob(proposal) - log_proposal).exp()
    for function in (lambda x: x[:, 0, 0, 0], lambda x: x[:, 1, 0, 0], lambda x: (x[:, 0] * x[:, 1]).flatten().tanh()):
        expected = float((weights * function(proposal)).mean())
        assert float(function(x).mean()) == pytest.approx(expected, abs=0.04)


def test_convolution_is_its_factors_and_begins_as_a_rotation():
    torch.manual_seed(0)
    convolution = InvertibleConvolution(6).double()
    weight = convolution.weight()
    torch.testing.assert_close(weight @ weight.mT, torch.eye(6, dtype=torch.float64), atol=1e-6, rtol=0)
    moved(convolution, 0.3)
    weight, (lower, upper) = convolution.weight(), convolution.factors()
    assert torch.equal(lower, lower.tril())
    assert torch.equal(lower.diagonal(), torch.ones(6, dtype=torch.float64))
    assert torch.equal(upper, upper.triu())
    x = images((6, 3, 2))
    y, log_determinant = convolution(x)
    torch.testing.assert_close(y, torch.einsum("ij,bjhw->bihw", weight, x))
    torch.testing.assert_close(log_determinant, (6 * torch.linalg.slogdet(weight).logabsdet).expand(4))
    torch.testing.assert_close(convolution.inverse(y), x)
    assert convolution.log_diagonal.exp().min() > 0


def test_couplings_begin_as_the_identity_and_stay_bounded():
    coupling = AffineCoupling(5, 8, 3, 1.5).double()
    x = images((5, 4, 4))
    y, log_determinant = coupling(x)
    assert torch.equal(y, x)
    assert not log_determinant.any()
    moved(coupling, 30.0)
    y, log_determinant = coupling(x)
    assert torch.equal(y[:, :2], x[:, :2])
    assert log_determinant.abs().max() <= 1.5 * 3 * 16
    assert log_determinant.abs().max() > 10


def test_activation_norms_are_set_by_the_first_batch():
    torch.manual_seed(0)
    flow = Flow((1, 8, 8), levels=2, flow_steps=2, width=8).double()
    batch = 5 + 3 * images((1, 8, 8), 64)
    flow.initialize(batch)
    seen = []
    hooks = [
        module.register_forward_hook(lambda m, i, o: seen.append(o[0]))
        for module in flow.modules()
        if isinstance(module, ActivationNorm)
    ]
    flow.encode(batch)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 4
    for features in seen:
        assert features.mean((0, 2, 3)).abs().max() < 1e-10
        torch.testing.assert_close(features.var((0, 2, 3), correction=0), torch.ones_like(features[0, :, 0, 0]))


def test_initialization_survives_constant_channels():
    flow = Flow((1, 8, 8), levels=1, flow_steps=1, width=8)
    flow.initialize(torch.full((4, 1, 8, 8), -1.0))
    assert all(parameter.isfinite().all() for parameter in flow.parameters())


def test_bits_of_the_uniform_distribution():
    """A density that is constant over the brightnesses of a pixel needs log2(brightnesses) bits."""

    class Uniform(Flow):
        def log_prob(self, images):
            width = 2 + 2 / 16  # 17 brightnesses, half a distance beyond either end
            return images.new_full((len(images),), -math.log(width) * self.dimensions)

    x = (torch.randint(0, 17, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 8 - 1).double()
    bits = Uniform((1, 4, 4), levels=1, flow_steps=1, width=2).bits_per_dimension(x, seed=0, brightnesses=17)
    torch.testing.assert_close(bits, torch.full((3,), math.log2(17), dtype=torch.float64))


def test_dequantized_images_stay_nearest_to_their_brightness():
    x = torch.randint(0, 256, (5, 3, 4, 4), generator=torch.Generator().manual_seed(0)).double() * 2 / 255 - 1
    spread = dequantize(x, seed=3)
    assert torch.equal(((spread + 1) / 2 * 255).round(), ((x + 1) / 2 * 255).round())
    assert (spread - x).abs().max() > 0.9 / 255
    assert torch.equal(dequantize(x[2:], seed=3, chain_ids=2), spread[2:])
    assert not torch.equal(dequantize(x, seed=3, step=1), spread)


def test_samples_are_functions_of_seed_and_chain():
    flow = make_flow((1, 4, 4), dtype=torch.float32)
    whole = flow.sample(5, seed=2)
    torch.testing.assert_close(flow.sample(3, seed=2, chain_ids=2), whole[2:])
    assert not torch.allclose(flow.sample(5, seed=3), whole, atol=0.1)
    assert not torch.allclose(flow.sample(5, seed=2, step=1), whole, atol=0.1)
    narrow = flow.sample(5, seed=2, temperature=0.0)
    torch.testing.assert_close(narrow, narrow[:1].expand(5, -1, -1, -1))


def test_likelihood_training_learns_a_distribution():
    torch.manual_seed(0)
    flow = Flow((2, 1, 1), levels=0, flow_steps=4, width=16)
    generator = torch.Generator().manual_seed(1)
    angle = 2 * math.pi * torch.rand(1024, generator=generator)
    ring = torch.stack((angle.cos(), angle.sin()), 1) + 0.1 * torch.randn(1024, 2, generator=generator)
    x = ring[:, :, None, None]
    flow.initialize(x)
    before = flow.log_prob(x).mean().item()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()
    assert flow.log_prob(x).mean().item() > before + 0.4
    assert (flow.decode(flow.encode(x)[0]) - x).abs().max() < 1e-4


def test_config_rebuilds_the_flow():
    flow = make_flow((3, 8, 8), dtype=torch.float32)
    again = Flow(**flow.config)
    again.load_state_dict(flow.state_dict())
    x = images((3, 8, 8), dtype=torch.float32)
    assert torch.equal(again(x), flow(x))
    assert "levels=2" in repr(flow)


def test_impossible_flows_and_images_are_refused():
    for build, message in (
        (lambda: Flow((1, 6, 8)), "can't be halved 2 times"),
        (lambda: Flow((1, 1, 1), levels=0), "two channels, got 1"),
        (lambda: Flow((1, 8, 8), flow_steps=0), "flow_steps=0"),
        (lambda: Flow((0, 8, 8)), "each at least 1"),
        (lambda: make_flow((1, 4, 4)).encode(torch.zeros(2, 3, 4, 4)), r"\(B, 1, 4, 4\), got \(2, 3, 4, 4\)"),
        (lambda: make_flow((1, 4, 4)).decode(torch.zeros(2, 15)), r"\(B, 16\), got \(2, 15\)"),
        (lambda: make_flow((1, 4, 4)).initialize(torch.zeros(1, 1, 4, 4)), "at least two images, got 1"),
        (lambda: dequantize(torch.zeros(1, 1, 2, 2), seed=0, brightnesses=1), "two brightnesses, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            build()


def test_docstring_example():
    assert doctest.testmod(importlib.import_module("fastebm.models.flow")) == (0, 8)
