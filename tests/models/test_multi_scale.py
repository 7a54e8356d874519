"""The multi-scale energy: three views, spectral norm in bounds, and the fused engine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastebm.compiler import energy_gradient
from fastebm.models import MultiScaleEnergy


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256])
def test_one_energy_an_image_at_every_size(size: int) -> None:
    net = MultiScaleEnergy(size, 2, width=1)
    assert net(torch.zeros(3, 2, size, size)).shape == (3,)
    assert MultiScaleEnergy(**net.config).config == net.config


def test_the_demos_net_has_its_widths() -> None:
    net = MultiScaleEnergy(32)
    # Two residual layers of each width; where there are fewer pixels, fewer pools.
    assert [len(branch.layers) for branch in net.branches] == [8, 8, 6]
    assert [layer.conv2.weight.shape[0] for layer in net.branches[0].layers] == [128] * 2 + [256] * 6
    assert net.head.in_features == 3 * 256


def test_each_branch_sees_its_own_view() -> None:
    net = MultiScaleEnergy(8, 1, width=2).eval()
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    views = [x, F.avg_pool2d(x, 2), F.avg_pool2d(x, 4)]
    features = [branch(view) for branch, view in zip(net.branches, views, strict=True)]
    torch.testing.assert_close(net(x), net.head(torch.cat(features, 1)).squeeze(1))


def test_spectral_norm_moves_in_train_mode_only() -> None:
    net = MultiScaleEnergy(8, 1, width=2)
    x = torch.zeros(2, 1, 8, 8)
    before = {name: value.clone() for name, value in net.named_buffers()}
    assert before
    net.eval()(x)
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())
    net.train()(x)
    assert any(not torch.equal(value, before[name]) for name, value in net.named_buffers())
    assert not list(MultiScaleEnergy(8, 1, width=2, spectral_norm=False).named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3)])
def test_it_runs_on_fused_kernels(size: int, channels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = MultiScaleEnergy(size, channels, width=4)
    x = torch.rand(4, channels, size, size) * 2 - 1
    gradient = energy_gradient(net, dtype=dtype, engine="fused")
    energies, slopes = gradient(x)
    assert gradient.batch_invariant
    expected, true = energy_gradient(net, engine="autograd")(x)
    # In bfloat16 at most twice as far off as autocast.
    stock, rough = (
        (expected, true) if dtype is torch.float32 else energy_gradient(net, dtype=dtype, engine="autograd")(x)
    )
    assert (slopes - true).norm() <= 1e-5 * true.norm() + 2 * (rough - true).norm()
    assert (energies - expected).abs().max() <= 1e-5 * expected.abs().max() + 2 * (stock - expected).abs().max()


@pytest.mark.parametrize("options", [{"size": 4}, {"size": 24}, {"size": 512}, {"size": 8, "width": 0}])
def test_what_makes_no_net_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"is \d+; it must be"):
        MultiScaleEnergy(**options)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes .batch, 3, 8, 8"):
        MultiScaleEnergy(8, width=1)(torch.zeros(2, 3, 16, 16))
