"""Every baseline computes what it should: gradients as float64 autograd's, chains as the update's formula."""

import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from fastebm.build_extension import cpp_compiler
from fastebm.evaluation.speed import Updates, baselines
from fastebm.evaluation.speed.baselines import (
    Baseline,
    SkippedError,
    research_eager,
    torch_compile_chain,
    torch_compile_gradient,
    torchebm_langevin,
    tuned_eager,
)
from fastebm.evaluation.speed.eager import eager_twin
from fastebm.evaluation.speed.energies import gradient_error, true_gradient
from fastebm.models import CoarseToFineEnergy
from tests.evaluation.speed.networks import convolutional, samples

CLAMP = (-1.0, 1.0)
LOW, FULL = torch.bfloat16, torch.float32
needs_compiler = pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler: torch.compile can't run")
needs_torchebm = pytest.mark.skipif(find_spec("torchebm") is None, reason="torchebm is not installed")


def made(kind: str, energy: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Baseline:
    makers = {
        "research": partial(research_eager, energy),
        "tuned, cast": partial(tuned_eager, energy, dtype, "cast"),
        "tuned, autocast": partial(tuned_eager, energy, dtype, "autocast"),
        "compiled gradient": partial(torch_compile_gradient, energy, dtype, "cpu"),
        "compiled energy": partial(torch_compile_gradient, energy, dtype, "cpu", "autograd"),
        "compiled, noise inside": partial(torch_compile_chain, energy, dtype, "cpu", "inside", CLAMP),
        "compiled, noise outside": partial(torch_compile_chain, energy, dtype, "cpu", "outside", CLAMP),
        "torchebm": partial(torchebm_langevin, energy, dtype),
        "torchebm, autocast": partial(torchebm_langevin, energy, dtype, "autocast"),
    }
    return makers[kind]()


KINDS = [
    "research",
    "tuned, cast",
    "tuned, autocast",
    *(
        pytest.param(kind, marks=needs_compiler)
        for kind in ("compiled gradient", "compiled energy", "compiled, noise inside", "compiled, noise outside")
    ),
    *(pytest.param(kind, marks=needs_torchebm) for kind in ("torchebm", "torchebm, autocast")),
]


@pytest.mark.parametrize("dtype", [FULL, LOW], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_float64_autograd(kind: str, dtype: torch.dtype) -> None:
    net, x = convolutional(), samples()
    start = x.clone()
    truth = true_gradient(net, x)
    baseline = made(kind, net, dtype)
    precise = dtype is FULL or kind == "research"
    assert gradient_error(baseline.gradient, x, truth) < (1e-4 if precise else 0.05)
    assert torch.equal(x, start)
    assert not x.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_without_noise_follows_the_gradient(kind: str) -> None:
    net, x = convolutional(), samples()
    # torchebm wants some noise; this much does not show.
    updates = Updates(((0.5, 1e-9), (0.5, 1e-9)), CLAMP)
    expected = x
    for step_size, _ in updates.schedule:
        expected = (expected - step_size * true_gradient(net, expected).float()).clamp(*CLAMP)
    start = x.clone()
    end = made(kind, net, FULL).chain(x, updates)
    torch.testing.assert_close(end, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, start)


class Flat(nn.Module):
    """An energy whose gradient is 1e-6 of everything: what remains of an update is noise."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e-6 * x.sum(dim=(1, 2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_noise_has_the_standard_deviation_that_was_asked_for(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.zeros(8, 2, 16, 16)
    end = made(kind, Flat(), FULL).chain(x, Updates.constant(2, 1.0, 0.1))
    # 4096 draws: the standard deviation of this estimate is 1.1 %.
    assert float(end.std()) == pytest.approx(0.1 * 2**0.5, rel=0.06)
    assert abs(float(end.mean())) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_clamped(kind: str) -> None:
    end = made(kind, Flat(), FULL).chain(torch.zeros(2, 2, 8, 8), Updates.constant(1, 1.0, 5.0))
    assert (float(end.min()), float(end.max())) == CLAMP


@needs_compiler
def test_the_gradient_that_an_update_implies_is_found_at_any_scale() -> None:
    for scale in (1e-5, 1.0, 1e5):

        def energy(x: Tensor, scale: float = scale) -> Tensor:
            return scale * x.square().sum(dim=(1, 2, 3))

        baseline = torch_compile_chain(energy, FULL, "cpu", "outside", CLAMP)
        x = samples()
        assert gradient_error(baseline.gradient, x, 2 * scale * x.double()) < 1e-4


@needs_compiler
def test_a_compiled_update_has_the_clamp_it_was_made_with() -> None:
    baseline = torch_compile_chain(convolutional(), FULL, "cpu", "outside", None)
    with pytest.raises(ValueError, match="compiled with clamp None"):
        baseline.chain(samples(), Updates.constant(1, 1.0, 0.1))
    unclamped = Updates(((1.0, 5.0),), clamp=None)
    assert float(baseline.chain(samples(), unclamped).abs().max()) > 1.5


def test_baselines_of_our_own_net_read_its_eager_twin() -> None:
    net = CoarseToFineEnergy(8, 2, base_width=2)
    x = samples()
    truth = true_gradient(net, x)
    for kind in ("research", "tuned, cast"):
        assert gradient_error(made(kind, eager_twin(net), FULL).gradient, x, truth) < 1e-4


def test_functions_and_vectors_are_energies_too() -> None:
    x = samples(5, (7,))
    for kind in ("research", "tuned, cast", "tuned, autocast"):
        baseline = made(kind, lambda x: x.square().sum(dim=1), FULL)
        energies, gradient = baseline.gradient(x)
        torch.testing.assert_close(gradient, 2 * x)
        torch.testing.assert_close(energies, x.square().sum(dim=1))


def test_what_is_missing_is_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "cpp_compiler", lambda: None)
    with pytest.raises(SkippedError, match="needs a C\\+\\+ compiler"):
        torch_compile_gradient(convolutional(), FULL, "cpu")
    monkeypatch.setitem(sys.modules, "torchebm.core", None)
    with pytest.raises(SkippedError, match="torchebm can't be imported"):
        torchebm_langevin(convolutional(), FULL)


def test_a_gradient_that_verifies_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="zero or not finite"):
        true_gradient(lambda x: 0 * x.sum(dim=1), samples(3, (7,)))
    with pytest.raises(ValueError, match="zero or not finite"):
        true_gradient(lambda x: x.sum(dim=1).log() * float("nan"), samples(3, (7,)))
