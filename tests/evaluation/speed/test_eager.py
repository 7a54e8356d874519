"""The copies that baselines run: they compute the same as the original and do not change it."""

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from fastebm.evaluation.speed.eager import (
    EagerCoarseToFine,
    copy_energy,
    eager_twin,
    module_of,
    refold,
    research_copy,
    tuned_copy,
)
from fastebm.models import CoarseToFineEnergy
from tests.evaluation.speed.networks import SHAPE, convolutional, samples


class Namespaces(TorchDispatchMode):
    """Collects the namespaces of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.seen.add(function.namespace)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("size", [4, 8, 16, 32])
@pytest.mark.parametrize("norm", [True, False])
def test_the_eager_twin_of_our_net_agrees_in_float64_and_uses_no_operator_of_ours(size: int, norm: bool) -> None:
    torch.manual_seed(0)
    net = CoarseToFineEnergy(32, 2, base_width=2, lowest=4, spectral_norm=norm).double().eval()
    twin = eager_twin(net)
    assert isinstance(twin, EagerCoarseToFine)
    x = samples(3, (2, size, size)).double().requires_grad_()
    with Namespaces() as ran:
        theirs = twin(x)
    assert ran.seen == {"aten"}
    ours = net(x)
    torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=1e-12)
    (slope,), (expected,) = (torch.autograd.grad(energies.sum(), x) for energies in (theirs, ours))
    torch.testing.assert_close(slope, expected, rtol=1e-10, atol=1e-12)
    assert twin.state_dict().keys() == net.state_dict().keys()


def test_the_eager_twin_has_weights_of_its_own_and_knows_one_activation() -> None:
    net = CoarseToFineEnergy(8, 2, base_width=2)
    twin = EagerCoarseToFine(net)
    assert {p.data_ptr() for p in twin.parameters()}.isdisjoint(p.data_ptr() for p in net.parameters())
    assert twin.training is net.training
    with pytest.raises(ValueError, match="knows scaled_swish, not relu"):
        EagerCoarseToFine(CoarseToFineEnergy(8, 2, base_width=2, activation="relu"))


def test_other_energies_are_left_as_they_are() -> None:
    net = convolutional()
    assert eager_twin(net) is net


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("weights", [None, torch.float64, torch.bfloat16])
def test_a_tuned_copy_is_folded_and_frozen_and_the_original_is_not(weights: torch.dtype | None) -> None:
    net = convolutional().train()
    before, x = state_of(net), samples()
    made = tuned_copy(net, weights)
    assert isinstance(made, nn.Module)
    assert not any(parametrize.is_parametrized(part) or part._forward_pre_hooks for part in made.modules())
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert made.first.weight.is_contiguous(memory_format=torch.channels_last)
    assert {parameter.dtype for parameter in made.parameters()} == {weights or torch.float32}
    assert parametrize.is_parametrized(net.first)
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())

    tolerance = {None: 1e-6, torch.float64: 1e-6, torch.bfloat16: 0.05}[weights]
    expected = net.eval()(x)
    torch.testing.assert_close(made(x.to(weights or x.dtype)).float(), expected, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    # The class that a copy shares with its original still has the weight that it computes.
    assert net.first.weight.shape == (6, 2, 3, 3)
    copy_energy(net)(x)


def test_a_written_copy_keeps_its_parametrisations_and_wants_gradients() -> None:
    net = convolutional().requires_grad_(False)
    written = research_copy(net)
    assert isinstance(written, nn.Module)
    assert parametrize.is_parametrized(written.first)
    assert not written.training
    assert all(parameter.requires_grad for parameter in written.parameters())
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_functions_are_copied_as_far_as_they_are_known() -> None:
    net = convolutional().eval()
    partial, method = functools.partial(net), net.forward
    for energy in (partial, method):
        assert module_of(energy) is net
        made = tuned_copy(energy)
        assert module_of(made) is not net
        torch.testing.assert_close(made(samples()), net(samples()))

    def closure(x: Tensor) -> Tensor:
        return net(x)

    assert module_of(closure) is None
    assert tuned_copy(closure) is closure
    with pytest.raises(ValueError, match="weights are not known"):
        tuned_copy(closure, torch.bfloat16)


@pytest.mark.parametrize("made_by", [tuned_copy, research_copy])
def test_new_weights_are_folded_in_place(made_by) -> None:
    # With parametrisations only: the older spectral norm keeps a weight of its own besides.
    net = CoarseToFineEnergy(8, 2, base_width=2)
    made = made_by(net)
    addresses = [parameter.data_ptr() for parameter in made.parameters()]
    x = samples(3, (2, 8, 8))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    before = made(x).detach()
    refold(made, net)
    torch.testing.assert_close(made(x), copy.deepcopy(net).eval()(x))
    assert not torch.allclose(made(x), before)
    assert [parameter.data_ptr() for parameter in made.parameters()] == addresses
    assert net.training
    assert net.blocks["8"].conv1.parametrizations.weight.training


def test_shapes_of_samples() -> None:
    assert convolutional()(samples()).shape == (3,)
    assert samples().shape == (3, *SHAPE)
