"""Chains in CUDA graphs are the plain loop's, bit for bit; where there is no GPU, what decides about them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastebm import Langevin
from fastebm.models import CoarseToFineEnergy
from fastebm.sampling.graphs import ChainGraphs, blocks
from fastebm.sampling.observers import FiniteCheck, all_deferrable, progress_bar, trajectory_recorder
from fastebm.sampling.schedules import linear

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("num_steps", [0, 1, 7, 8, 9, 16, 61])
def test_blocks_make_up_the_chain(num_steps):
    lengths = list(blocks(num_steps))
    assert sum(lengths) == num_steps
    assert lengths == sorted(lengths, reverse=True)
    assert lengths.count(8) == num_steps // 8


def test_who_reads_every_state_keeps_the_plain_loop():
    watch, frames = FiniteCheck(0, torch.arange(2)), trajectory_recorder(torch.zeros(3, 2, 3), 1)
    assert all_deferrable(())
    assert all_deferrable((watch,))
    assert not all_deferrable((watch, frames))
    assert not all_deferrable((lambda done, x, energies: None,))
    with progress_bar(3, True) as bar:
        assert all_deferrable((watch, *bar))


def test_energies_may_be_told_in_blocks():
    """What a watch finds does not depend on when it is called, as long as the order is kept."""
    energies = torch.tensor([[1.0, 2.0], [1.0, float("inf")], [1.0, 2.0]])
    watch = FiniteCheck(5, torch.tensor([3, 8]))
    for done, of_update in enumerate(energies, 1):
        watch(done, torch.zeros(2, 4), of_update)
    with pytest.raises(FloatingPointError, match=r"chain 8, by its energy before update 2 of 3 \(step 6\)"):
        watch.check()


def test_samplers_can_be_copied():
    sampler = Langevin(lambda x: x.square().sum(1), 0.1, 0.1)
    sampler._graphs._captured["kept"] = object()
    assert copy.deepcopy(sampler)._graphs._captured == {}
    assert isinstance(sampler._graphs, ChainGraphs)


# On a GPU -----------------------------------------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    return CoarseToFineEnergy(8, base_width=8).cuda()


def start(batch: int = 4) -> Tensor:
    return torch.tanh(torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))).cuda()


def plain(sampler: Langevin, x: Tensor, num_steps: int, **options) -> Tensor:
    """The same chain with an observer that reads every state, and so without graphs."""
    state = sampler.init(x, seed=3, num_steps=num_steps, **options)
    return sampler.advance_(state, num_steps, (lambda done, x, energies: None,)).x


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replayed_chains_are_the_plain_loops(dtype):
    sampler = Langevin(net(), 0.5, 0.01, clamp=(-1, 1), dtype=dtype, engine="fused")
    for num_steps, batch in ((1, 4), (2, 4), (20, 4), (11, 3), (20, 4)):
        x = start(batch)
        assert torch.equal(sampler.sample(x, num_steps, seed=3), plain(sampler, x, num_steps))
    assert len(sampler._graphs._captured) == 2


@needs_gpu
def test_pinned_pixels_anchors_and_schedules_are_replayed():
    sampler = Langevin(net(), 0.5, linear(0.02, 0.0), engine="fused")
    x = start()
    mask = torch.zeros(8, 8, dtype=torch.bool, device="cuda")
    mask[2:5] = True
    for scale in (1.0, 0.5):  # the second chain has other values in tensors of the same shapes
        options = {"mask": mask, "known": scale * x, "data_term": (-scale * x, 0.3, 0.1)}
        assert torch.equal(sampler.sample(scale * x, 19, seed=3, **options), plain(sampler, scale * x, 19, **options))
    assert len(sampler._graphs._captured) == 1


@needs_gpu
def test_new_weights_are_seen_and_a_new_program_is_captured_anew():
    energy = net()
    sampler = Langevin(energy, 0.5, 0.01, engine="fused")
    x = start()
    ends = [sampler.sample(x, 12, seed=3)]
    (captured,) = sampler._graphs._captured.values()
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.mul_(1.5)
    ends.append(sampler.sample(x, 12, seed=3))
    assert next(iter(sampler._graphs._captured.values())) is captured
    assert not torch.equal(*ends)
    assert torch.equal(ends[1], plain(sampler, x, 12))
    sampler.gradient._fused._prepared.clear()  # as if what the energy decides by had changed
    assert torch.equal(sampler.sample(x, 12, seed=3), plain(sampler, x, 12))
    assert next(iter(sampler._graphs._captured.values())) is not captured


@needs_gpu
def test_lost_chains_are_found_in_graphs_too():
    sampler = Langevin(lambda x: -x.square().sum((1, 2, 3)), 1e6, 0.0, engine="fused")
    with pytest.raises(FloatingPointError, match="not finite"):
        sampler.sample(start(), 40, seed=3)


@needs_gpu
def test_autograd_keeps_the_plain_loop():
    sampler = Langevin(net(), 0.5, 0.01, engine="autograd")
    assert torch.equal(sampler.sample(start(), 12, seed=3), plain(sampler, start(), 12))
    assert not sampler._graphs._captured
