"""The nets of the benchmarks are energies: one number a sample, which depends on that sample alone."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import nets

SHAPES = {"UvA tutorial": (1, 28, 28)}


@pytest.mark.parametrize("name", nets.NETS)
def test_nets_are_energies_whose_samples_do_not_influence_each_other(name: str) -> None:
    if name == "wide residual 28-10":
        pytest.skip("36 million weights; its twin of width 2 is the same code")
    shape = SHAPES.get(name, (3, 32, 32))
    net = nets.build(name, shape, "cpu")
    x = torch.rand(2, *shape, requires_grad=True)
    energies = net(x)
    assert energies.shape == (2,)
    (slope,) = torch.autograd.grad(energies[0], x)
    assert slope[0].any()
    assert not slope[1].any()
    torch.testing.assert_close(nets.build(name, shape, "cpu")(x), energies)


def test_wide_nets_have_the_depth_and_width_of_their_names() -> None:
    net = nets.WideResidual(28, 2)
    convolutions = [part for part in net.modules() if isinstance(part, torch.nn.Conv2d) and part.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == 28 - 2  # three shortcuts of 1x1 are counted as layers, too, and the linear one
    assert max(part.out_channels for part in convolutions) == 128
    with pytest.raises(ValueError, match="6n \\+ 4"):
        nets.WideResidual(27, 2)
