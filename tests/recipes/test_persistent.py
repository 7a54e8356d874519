"""Recipes with a buffer: steps, chains, cycles of the buffer and losses are those of the published loops."""

import pytest
import torch
import torch.nn.functional as F

from fastebm import ops, recipes
from fastebm.rng import Stream
from tests.recipes import published
from tests.recipes.published import F64, Bowl, ConvNet, PlainBuffer, gradient, noise_of

SHAPE = (1, 8, 8)
# Scales for which the published clips and clamps bind in some places and not in others.
RECIPES = {
    "igebm": (recipes.igebm, published.igebm_chain, "ring", (0, 1), 0.012),
    "uva_tutorial": (recipes.uva_tutorial, published.uva_chain, "newest_first", (-1, 1), 0.035),
    "improved_cd": (recipes.improved_cd, published.improved_cd_chain, "reservoir", (0, 1), 0.003),
    "clel": (recipes.clel, published.clel_chain, "drawn", (0, 1), 0.003),
    "jem": (recipes.jem, published.jem_chain, "drawn", (-1, 1), 0.5),
}
NETS = {"bowl": lambda name, scale: Bowl(scale), "conv": lambda name, scale: ConvNet(scale=8 * scale)}


def net_of(name, kind):
    scale = RECIPES[name][4]
    if name == "jem":
        return ConvNet(outputs=3, scale=scale)
    return NETS[kind](name, scale)


def uniform(low, high):
    def start(ids, draw):
        u = ops.uniform((1, *SHAPE), seed=draw.seed, stream=Stream.BUFFER_RESTART, chain_ids=ids)
        return (u * (high - low) + low)[0].double()

    return start


def real_images(count=5, low=0.0):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, *SHAPE, dtype=F64, generator=generator) * (1 - low) + low


@pytest.mark.parametrize("num_steps", [1, None], ids=["step", "chain"])
@pytest.mark.parametrize("kind", ["bowl", "conv"])
@pytest.mark.parametrize("name", RECIPES)
def test_cycles_are_those_of_the_published_loop(name, kind, num_steps):
    """One step, and the published number of them, in each of six cycles of a small buffer that fills and overflows."""
    make, chain, write, (low, high), _ = RECIPES[name]
    net = net_of(name, kind)
    recipe = make(net, engine="autograd", **({} if num_steps is None else {"num_steps": num_steps}))
    buffer = recipe.buffer(SHAPE, seed=11, capacity=12, restart=0.2, dtype=F64, value_range=None)
    assert buffer.write == write
    plain = PlainBuffer(write, 12, uniform(low, high), 11)
    went_on = 0
    for _ in range(6):
        negatives = recipe.negatives(real_images(), buffer)
        draw = negatives.draw
        start = plain.starts(draw)
        torch.testing.assert_close(negatives.start, start, rtol=0, atol=1e-6)
        ends = chain(net, start, noise_of(draw.seed, draw.start_step, draw.chain_ids), recipe.num_steps)
        torch.testing.assert_close(negatives.x, ends, rtol=0, atol=1e-6)
        assert not torch.equal(ends, start)
        plain.add(draw, ends)
        went_on += int((~draw.restarted).sum())
    assert went_on >= 10
    assert buffer.step == 6 * recipe.num_steps


@pytest.mark.parametrize("name", ["igebm", "improved_cd"])
def test_cycles_of_a_buffer_in_uint8(name):
    """As published: an end is stored as `floor(256 x)`, and a draw adds a fraction that is uniform in (0, 1]."""
    make, chain, write, _, _ = RECIPES[name]
    net = net_of(name, "conv")
    recipe = make(net, engine="autograd", num_steps=3)
    buffer = recipe.buffer(SHAPE, seed=11, capacity=12, restart=0.2)
    plain = PlainBuffer(write, 12, uniform(0, 1), 11)
    for _ in range(5):
        draw = (negatives := recipe.negatives(real_images(), buffer)).draw
        u = ops.uniform((5, *SHAPE), seed=11, step=draw.number, stream=Stream.BUFFER_NOISE, chain_ids=draw.chain_ids)
        stored = plain.starts(draw)
        fractions = torch.where(draw.restarted[:, None, None, None], 0.0, u.double() / 256)
        torch.testing.assert_close(negatives.start, stored + fractions, rtol=0, atol=1e-6)
        ends = chain(net, negatives.start, noise_of(11, draw.start_step, draw.chain_ids), 3)
        torch.testing.assert_close(negatives.x, ends, rtol=0, atol=1e-6)
        plain.add(draw, (negatives.x * 256).floor().clamp(max=255) / 256)


def test_jem_by_class():
    """Chains of p(x | y) start in the share of their class, and move along the logit of it."""
    net = ConvNet(outputs=3, scale=0.5)
    recipe = recipes.jem(net, num_classes=3, engine="autograd")
    buffer = recipe.buffer(SHAPE, seed=11, capacity=12, restart=0.2, dtype=F64)
    plain = PlainBuffer("drawn", 12, uniform(-1, 1), 11)
    for cycle in range(6):
        labels = torch.tensor([0, 1, 2, 2, 1]) if cycle % 2 else None
        draw = (negatives := recipe.negatives(real_images(), buffer, labels=labels)).draw
        assert torch.equal(draw.slots // 4, negatives.labels)
        assert labels is None or torch.equal(labels, negatives.labels)
        noise = noise_of(draw.seed, draw.start_step, draw.chain_ids)
        ends = published.jem_chain(net, plain.starts(draw), noise, 20, negatives.labels)
        torch.testing.assert_close(negatives.x, ends, rtol=0, atol=1e-6)
        plain.add(draw, ends)


# Losses ---------------------------------------------------------------------------------------------------------------


def assert_same_loss(net, found, wanted):
    """Equal losses, with equal gradients for all weights."""
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    weights = list(net.parameters())
    ours = torch.autograd.grad(found, weights, allow_unused=True, materialize_grads=True, retain_graph=True)
    theirs = torch.autograd.grad(wanted, weights, allow_unused=True, materialize_grads=True, retain_graph=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("name", "weight"), [("igebm", 1.0), ("clel", 1.0), ("uva_tutorial", 0.1)])
def test_losses(name, weight):
    net = net_of(name, "conv")
    recipe = RECIPES[name][0](net, engine="autograd", num_steps=2)
    real = real_images()
    negatives = recipe.negatives(real, recipe.buffer(SHAPE, seed=1, dtype=F64, value_range=None))
    plus, minus = net(real), net(negatives.x)
    wanted = plus.mean() - minus.mean() + weight * (plus**2).mean() + weight * (minus**2).mean()
    assert_same_loss(net, recipe.loss(net, real, negatives), wanted)


def test_loss_of_jem():
    net = net_of("jem", "conv")
    recipe = recipes.jem(net, engine="autograd", num_steps=2)
    real, labels = real_images(), torch.tensor([0, 1, 2, 0, 1])
    negatives = recipe.negatives(real, recipe.buffer(SHAPE, seed=1, dtype=F64))
    difference = -(net(real).logsumexp(1).mean() - net(negatives.x).logsumexp(1).mean())
    assert_same_loss(net, recipe.loss(net, real, negatives), difference)
    wanted = difference + F.cross_entropy(net(real), labels)
    assert_same_loss(net, recipe.loss(net, real, negatives, labels), wanted)


@pytest.mark.parametrize("kept", [True, False], ids=["repelled", "at first"])
def test_loss_of_improved_cd(kept):
    """The last step is differentiated, the outer energy is not, and ends are held apart from states of the buffer."""
    net = net_of("improved_cd", "conv")
    recipe = recipes.improved_cd(net, engine="autograd", num_steps=3)
    recipe = type(recipe)(**{**vars(recipe), "repel_from": 4, "num_kept": 3} if kept else vars(recipe))
    real = real_images()
    buffer = recipe.buffer(SHAPE, seed=11, capacity=12, dtype=F64, value_range=None)
    negatives = recipe.negatives(real, buffer)
    draw = negatives.draw
    x = published.improved_cd_chain(net, negatives.start, noise := noise_of(11, draw.start_step, draw.chain_ids), 2)
    x = x + 0.001 * noise(2, x)
    torch.testing.assert_close(negatives.before_last, x, rtol=0, atol=1e-6)
    at = negatives.before_last.clone().requires_grad_()
    (step,) = torch.autograd.grad(net(at).sum(), at, create_graph=True)
    ends = (at - 100.0 * step).clamp(0, 1)
    torch.testing.assert_close(ends.detach(), negatives.x, rtol=0, atol=1e-6)
    assert 0 < float((ends == ends.clamp(1e-9, 1 - 1e-9)).double().mean()) < 1  # the clamp binds in some places
    plus, minus = net(real), net(negatives.x)
    wanted = plus.mean() - minus.mean() + (plus**2).mean() + (minus**2).mean()
    frozen = ConvNet(scale=net.scale)
    frozen.load_state_dict(net.state_dict())
    wanted = wanted + frozen.requires_grad_(False)(ends).mean()
    assert (negatives.kept is not None) == kept
    if kept:
        assert negatives.kept.shape == (3, *SHAPE)
        distances = torch.norm(ends.flatten(1)[:, None] - negatives.kept.flatten(1)[None], p=2, dim=-1)
        wanted = wanted - 0.3 * torch.log(distances.min(dim=1)[0]).mean()
    assert_same_loss(net, recipe.loss(net, real, negatives), wanted)


def test_energy_of_clel():
    net = ConvNet(outputs=4)
    x = real_images()
    torch.testing.assert_close(recipes.HalfSquaredNorm(net)(x), net(x).pow(2).sum(dim=1).div(2))
    assert gradient(recipes.HalfSquaredNorm(net), x).shape == x.shape
