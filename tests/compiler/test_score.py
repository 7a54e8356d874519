"""A score in place of an energy: `fastebm.score_gradient`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastebm


class Score(nn.Module):
    """A score net with dropout, which eval mode turns off, and side inputs."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, t=None):
        out = self.dropout(self.inner(x))
        return out if t is None else out * t


def test_it_is_the_negated_score_in_eval_mode():
    net = Score().train()
    x = torch.randn(5, 3)
    energies, gradient = fastebm.score_gradient(net)(x)
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert torch.equal(energies, torch.zeros(5))
    assert torch.equal(gradient, -net.inner(x).detach())


def test_chains_follow_it_as_they_follow_the_energy():
    start = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    by_score = fastebm.Langevin(fastebm.score_gradient(lambda x: -x), 0.1, 0.2).sample(start, 20, seed=3)
    by_energy = fastebm.Langevin(lambda x: 0.5 * x.square().sum(1), 0.1, 0.2).sample(start, 20, seed=3)
    assert torch.allclose(by_score, by_energy, atol=1e-6)


def test_a_score_that_works_in_place_leaves_the_chains_alone():
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    def in_place(x):
        return x.neg_()

    for make in (lambda e: fastebm.Langevin(e, 0.1, 0.4), lambda e: fastebm.Underdamped(e, 0.2, 1.0)):
        found, expected = (make(fastebm.score_gradient(s)).sample(start, 9, seed=1) for s in (in_place, torch.neg))
        assert torch.equal(found, expected)


def test_conditions_go_along_with_their_chains():
    net = Score().eval()
    t = torch.rand(6, 1)
    sampler = fastebm.Langevin(fastebm.score_gradient(net), 0.1, 0.0)
    whole = sampler.sample(torch.zeros(6, 3), 4, seed=0, conditions=(t,))
    split = sampler.sample(torch.zeros(6, 3), 4, seed=0, conditions=(t,), batch_size=2)
    assert torch.allclose(whole, split, atol=1e-6)
    assert not torch.allclose(whole[0], whole[1], atol=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_work(copied):
    net = Score().eval()
    x = torch.randn(2, 3)
    original = fastebm.score_gradient(net)
    assert torch.equal(copied(original)(x)[1], original(x)[1])


@pytest.mark.parametrize(
    ("score", "error", "words"),
    [
        (3, TypeError, "must be a module or a function"),
        (lambda x: x.sum(1), ValueError, r"must have x's shape \(2, 3\)"),
        (lambda x: 1.0, TypeError, "must be a tensor of floating point numbers"),
    ],
)
def test_what_is_no_score_is_refused(score, error, words):
    with pytest.raises(error, match=words):
        fastebm.score_gradient(score)(torch.zeros(2, 3))
