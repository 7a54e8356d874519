"""Starts of chains: their distributions, one state for each seed and id, bad input."""

import math
import pickle

import pytest
import torch

from fastebm import starts

STATES = torch.arange(12.0).view(6, 2)
ALL = {
    "uniform": starts.uniform(-2, 3),
    "normal": starts.normal(1.0, 0.5),
    "images": starts.images(STATES),
    "images of classes": starts.images(STATES, torch.tensor([1, 0, 1, 0, 2, 0])),
    "normal of classes": starts.class_normal(STATES[:3], torch.eye(2).expand(3, 2, 2)),
}


@pytest.mark.parametrize("name", ALL)
def test_a_chain_starts_at_one_state_in_any_batch(name):
    start, labels = pickle.loads(pickle.dumps(ALL[name])), torch.arange(30) % 3
    whole = start((30, 2), seed=4, chain_ids=100, labels=labels)
    ids = torch.tensor([117, 100, 2**50])
    some = start((3, 2), seed=4, chain_ids=ids, labels=labels[torch.tensor([17, 0, 1])])
    assert torch.equal(some[:2], whole[[17, 0]])
    assert whole.dtype == torch.float32
    assert not torch.equal(start((30, 2), seed=5, chain_ids=100, labels=labels), whole)


def test_moments():
    uniform = ALL["uniform"]((20_000, 2), seed=0, chain_ids=0)
    assert -2 <= uniform.min() < -1.99
    assert 2.99 < uniform.max() <= 3
    torch.testing.assert_close(uniform.mean(), torch.tensor(0.5), rtol=0, atol=0.03)
    normal = ALL["normal"]((20_000, 2), seed=0, chain_ids=0)
    torch.testing.assert_close(torch.stack((normal.mean(), normal.std())), torch.tensor([1.0, 0.5]), rtol=0, atol=0.01)


def test_images_are_chosen_evenly_and_within_their_class():
    drawn = ALL["images"]((6000, 2), seed=1, chain_ids=0)[:, 0].div(2).long()
    assert torch.equal(STATES[drawn, 0], ALL["images"]((6000, 2), seed=1, chain_ids=0)[:, 0])
    assert (drawn.bincount(minlength=6) - 1000).abs().max() < 110
    labels = torch.arange(3000) % 3
    drawn = ALL["images of classes"]((3000, 2), seed=1, chain_ids=0, labels=labels)[:, 0].div(2).long()
    assert {*drawn[labels == 0].tolist()} == {1, 3, 5}
    assert {*drawn[labels == 1].tolist()} == {0, 2}
    assert {*drawn[labels == 2].tolist()} == {4}
    assert (drawn[labels == 0].bincount()[[1, 3, 5]] - 333).abs().max() < 60


def test_each_class_has_its_own_normal():
    means = torch.tensor([[[0.0, 1.0]], [[5.0, -5.0]]])
    covariances = torch.tensor([[[1.0, 0.5], [0.5, 2.0]], [[0.1, 0.0], [0.0, 0.2]]])
    labels = torch.arange(8000) % 2
    x = starts.class_normal(means, covariances)((8000, 1, 2), seed=2, chain_ids=0, labels=labels)
    for label in (0, 1):
        found = x[labels == label][:, 0]
        torch.testing.assert_close(found.mean(0), means[label, 0], rtol=0, atol=0.08)
        torch.testing.assert_close(found.T.cov(), covariances[label], rtol=0, atol=0.12)


def test_without_labels_every_class_is_a_start():
    start = starts.class_normal(STATES[:3], 1e-4 * torch.eye(2).expand(3, 2, 2), clamp=(-1, 4.5))
    x = start((3000, 2), seed=3, chain_ids=0)
    assert x.max() == 4.5
    first = x[:, 0].round().long()
    assert {*first.tolist()} == {0, 2, 4}
    assert (first.bincount()[[0, 2, 4]] - 1000).abs().max() < 100
    assert torch.equal(x[5:6], start((1, 2), seed=3, chain_ids=5))
    classes = ALL["images of classes"]((6000, 2), seed=1, chain_ids=0)[:, 0].div(2).long()
    assert (classes.bincount(minlength=6) - 1000).abs().max() < 110


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: starts.uniform(1, -1), ValueError, "finite low < high, got 1.0 and -1.0"),
        (lambda: starts.uniform(-math.inf, 1), ValueError, "finite low < high"),
        (lambda: starts.uniform("a", 1), TypeError, "low of a uniform start must be a real number"),
        (lambda: starts.normal(0, 0), ValueError, "finite std > 0, got 0.0 and 0.0"),
        (lambda: starts.normal(math.nan, 1), ValueError, "a finite mean"),
        (lambda: starts.images(torch.zeros(0, 2)), ValueError, "one state at least, got none"),
        (lambda: starts.images(torch.zeros(())), ValueError, r"states must have shape \(N, ...\)"),
        (lambda: starts.images(STATES.long()), TypeError, "states must be a tensor of floating point numbers"),
        (lambda: starts.images(STATES / 0), ValueError, "states must be finite"),
        (lambda: starts.images(STATES, torch.zeros(5).long()), ValueError, r"one int64 a state, shape \(6,\)"),
        (lambda: starts.images(STATES, torch.arange(6) - 1), ValueError, "labels must not be negative, got -1"),
        (lambda: starts.images(STATES, torch.arange(6) * 2), ValueError, "class 1 has none"),
        (
            lambda: starts.class_normal(STATES, torch.eye(2)),
            ValueError,
            r"means \(6, 2\) need covariances \(6, 2, 2\), got \(2, 2\)",
        ),
        (
            lambda: starts.class_normal(STATES, -torch.eye(2).expand(6, 2, 2)),
            ValueError,
            "covariance of class 0 is not positive definite",
        ),
        (lambda: ALL["images"]((3, 5), seed=0, chain_ids=0), ValueError, r"have shape \(2,\), but states of \(5,\)"),
        (lambda: starts.images(STATES, torch.full((6,), 10**15)), ValueError, "class 0 has none"),
        (
            lambda: starts.class_normal(STATES, torch.eye(2).expand(6, 2, 2), clamp=1.0),
            TypeError,
            r"clamp needs a pair \(low, high\), got 1.0",
        ),
        (
            lambda: ALL["images of classes"]((2, 2), seed=0, chain_ids=0, labels=torch.tensor([0, 3])),
            ValueError,
            r"needs 2 labels in \[0, 3\)",
        ),
        (lambda: ALL["uniform"]((3, 2), seed=2**64, chain_ids=0), ValueError, "seed must be in"),
    ],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message) as refused:
        make()
    assert "\n" not in str(refused.value)
