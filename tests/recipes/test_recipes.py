"""What all recipes share: documented constants, overrides, noise, learning rates, bad input, docstrings."""

import dataclasses
import doctest
import importlib
import pkgutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastebm
from fastebm import recipes
from fastebm.recipes import Optimizer
from tests.recipes.published import Bowl
from tests.recipes.table import energy, made, table

DOCS = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
NAMES = [
    "igebm",
    "jem",
    "jem_pp",
    "short_run",
    "uva_tutorial",
    "improved_cd",
    "vaebm",
    "ec_vae",
    "cf_ebm",
    "energy_matching",
    "eqm",
    "recovery_likelihood",
    "cdrl",
    "clel",
]
MODULES = [f"fastebm.recipes.{module.name}" for module in pkgutil.iter_modules(recipes.__path__)]


def test_docs_have_the_constants_of_the_code():
    lines = DOCS.read_text().splitlines()
    assert [line for line in table() if line not in lines] == [], "python -m tests.recipes.table prints the table"
    assert sum(line.startswith("| `") for line in lines) == len(NAMES)


@pytest.mark.parametrize("recipe", made(), ids=lambda recipe: recipe.name)
def test_a_recipe_names_its_source(recipe):
    assert [each.name for each in made()] == NAMES
    function = getattr(recipes, recipe.name)
    documented = " ".join((function.__doc__ or "").split())
    assert "Source: " in documented
    for part in recipe.source.split("; ")[1:]:
        repository, *files = part.split()
        assert repository in documented.replace("`", "")
        assert all(file in documented for file in files)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.num_steps = 3


@pytest.mark.parametrize("name", [*MODULES, "fastebm.recipes"])
def test_docstrings_run(name):
    importlib.import_module(name)
    found = doctest.testmod(sys.modules[name])
    assert found.failed == 0


@pytest.mark.parametrize("name", ["short_run", "eqm", "energy_matching", "recovery_likelihood"])
def test_negatives_do_not_depend_on_the_batch(name):
    """Chains of one seed and their own ids end alike in one batch and in two; without a seed each call has its own."""
    if name == "eqm":
        recipe = recipes.eqm(lambda x: 0.1 - x, num_steps=5)
    else:
        recipe = getattr(recipes, name)(lambda x, *level: 0.01 * energy(x), num_steps=5, engine="autograd")
    real = torch.rand(4, 1, 4, 4)
    together = recipe.negatives(real, seed=3, chain_ids=7).x
    if name != "energy_matching":  # whose chains start at data in the first half of a batch
        apart = [
            recipe.negatives(real[rows], seed=3, chain_ids=7 + rows.start).x for rows in (slice(0, 1), slice(1, 4))
        ]
        assert torch.equal(torch.cat(apart), together)
    assert torch.equal(recipe.negatives(real, seed=3, chain_ids=torch.arange(7, 11)).x, together)
    torch.manual_seed(1)
    first, second = recipe.negatives(real).x, recipe.negatives(real).x
    torch.manual_seed(1)
    assert torch.equal(recipe.negatives(real).x, first)
    assert not torch.equal(first, second)


def test_a_conditional_energy_gets_the_labels_of_its_chains():
    centers = torch.tensor([0.1, 0.5, 0.9])

    def labelled(x, y):
        return 0.05 * (x - centers[y][:, None]).square().sum(1)

    recipe = recipes.igebm(labelled, engine="autograd", noise_std=0.0)
    buffer = recipe.buffer((4,), capacity=30, num_classes=3, dtype=torch.float32, value_range=None)
    labels = torch.tensor([0, 1, 2])
    negatives = recipe.negatives(torch.zeros(3, 4), buffer, labels=labels)
    torch.testing.assert_close(negatives.x, centers[:, None].expand(3, 4), rtol=0, atol=1e-3)
    loss = recipe.loss(labelled, centers[:, None].expand(3, 4), negatives, labels)
    assert abs(float(loss)) < 1e-4


@pytest.mark.parametrize("kind", ["MALT", "a sampler of one's own"])
def test_a_recipe_runs_any_sampler(kind):
    """Its chains are those of the sampler at the buffer's addresses, and no step of the random numbers comes twice."""

    class RandomWalk(fastebm.sampling.ProposalSampler):
        def propose(self, x, gradient, step_size, noise):
            return x + step_size * noise.normal()

    net = Bowl(1.0)
    sampler = fastebm.MALT(net, 0.2, 3, friction=1.0) if kind == "MALT" else RandomWalk(net, 0.2)
    recipe = dataclasses.replace(recipes.uva_tutorial(net), sampler=sampler, num_steps=4)
    buffer = recipe.buffer((1, 4, 4), seed=5, capacity=16)
    for cycle in range(2):
        negatives = recipe.negatives(torch.zeros(6, 1, 4, 4), buffer)
        draw = negatives.draw
        assert draw.start_step == cycle * 4 * sampler.key_steps
        ends = sampler.sample(draw.x, 4, seed=5, chain_ids=draw.chain_ids, start_step=draw.start_step)
        assert torch.equal(negatives.x, ends)
    assert sampler.key_steps == (3 if kind == "MALT" else 1)


def test_overrides_and_buffers():
    recipe = recipes.igebm(energy, num_steps=3, step_size=2.0, grad_clip=None, clamp=(-1, 1))
    assert recipe.num_steps == 3
    assert recipe.sampler.grad_clip is None
    assert recipe.sampler.clamp == (-1, 1)
    buffer = recipe.buffer((2,), capacity=7, dtype=torch.float32, value_range=None, start=fastebm.starts.normal())
    assert (buffer.capacity, buffer.dtype, buffer.write) == (7, torch.float32, "ring")


def test_a_chain_that_is_lost_starts_anew():
    """With `check=False` the buffer replaces ends that are not finite; by default they are an error."""
    recipe = recipes.clel(lambda x: (x * torch.nan).sum(1), num_steps=1, engine="autograd")
    buffer = recipe.buffer((3,), seed=0)
    with pytest.raises(FloatingPointError):
        recipe.negatives(torch.rand(2, 3), buffer)
    recipe.negatives(torch.rand(2, 3), buffer, check=False)
    assert buffer.nonfinite == 2
    assert all(bool(buffer.draw(5, 1).x.isfinite().all()) for _ in range(3))


def test_noise_on_real_images():
    torch.manual_seed(0)
    real = torch.full((2000, 1), 0.999)
    noisy = recipes.uva_tutorial(energy).noisy(real)
    assert float(noisy.max()) == 1.0
    assert float((recipes.jem(nn.Identity()).noisy(real) - real).std()) == pytest.approx(0.03, rel=0.1)
    assert recipes.igebm(energy).noisy(real) is real


def test_optimizers():
    weight = nn.Parameter(torch.zeros(2))
    jem = recipes.jem(nn.Identity()).optimizer
    made_by = jem.build([weight])
    assert isinstance(made_by, torch.optim.Adam)
    assert made_by.defaults["lr"] == 1e-4
    assert made_by.defaults["betas"] == (0.9, 0.999)
    rates = [jem.rate(*at) for at in ((0, 0), (500, 0), (1000, 5), (9000, 160), (9000, 180))]
    assert rates == pytest.approx([0, 5e-5, 1e-4, 3e-5, 9e-6])
    uva = recipes.uva_tutorial(energy).optimizer
    assert [uva.rate(0, epoch) for epoch in (0, 2)] == pytest.approx([1e-4, 0.97**2 * 1e-4])
    sgd = Optimizer(method="SGD", learning_rate=0.1, momentum=0.9, weight_decay=1e-3, batch_size=2).build([weight])
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.9, 1e-3)
    adamw = Optimizer(method="AdamW", learning_rate=0.1, batch_size=2).build([weight])
    assert isinstance(adamw, torch.optim.AdamW)


BAD = {
    "no buffer": (lambda: recipes.igebm(energy).negatives(torch.rand(2, 3)), TypeError, "needs its replay buffer"),
    "a buffer where there is none": (
        lambda: recipes.short_run(energy).negatives(torch.rand(2, 3), fastebm.ReplayBuffer((3,), 9)),
        ValueError,
        "short_run has no replay buffer",
    ),
    "another buffer": (
        lambda: recipes.igebm(energy).negatives(torch.rand(2, 3), fastebm.ReplayBuffer((4,), 9)),
        ValueError,
        r"states of \(4,\), but the images are \(3,\)",
    ),
    "labels without classes": (
        lambda: recipes.short_run(energy).negatives(torch.rand(2, 3), labels=torch.zeros(2).long()),
        ValueError,
        "need a buffer with classes",
    ),
    "whole numbers": (
        lambda: recipes.short_run(energy).negatives(torch.zeros(2, 3).long()),
        TypeError,
        "real images are float32 or float64",
    ),
    "no images": (lambda: recipes.short_run(energy).negatives(torch.zeros(0, 3)), ValueError, "B >= 1"),
    "unknown override": (lambda: recipes.igebm(energy, steps=3), TypeError, "igebm can override .*, got steps"),
    "no steps": (lambda: recipes.igebm(energy, num_steps=0), ValueError, "num_steps"),
    "a schedule for improved CD": (
        lambda: recipes.improved_cd(energy, step_size=fastebm.schedules.linear(1.0, 2.0)),
        TypeError,
        "step_size is a number",
    ),
    "a clip for improved CD": (
        lambda: recipes.improved_cd(energy, grad_clip=0.1),
        ValueError,
        "improved_cd differentiates a step with the noise first and without a clip",
    ),
    "clamped noise for improved CD": (
        lambda: recipes.improved_cd(energy, clamp_noise=True),
        ValueError,
        "improved_cd differentiates a step with the noise first and without a clip",
    ),
    "other negatives": (
        lambda: recipes.improved_cd(energy).loss(
            energy, torch.rand(2, 3), recipes.Negatives(torch.rand(2, 3), torch.rand(2, 3), torch.rand(2, 3))
        ),
        TypeError,
        "needs the negatives of improved_cd",
    ),
    "images of another size": (
        lambda: recipes.cf_ebm({4: energy, 8: energy}).negatives(torch.rand(2, 1, 4, 4)),
        ValueError,
        r"float32 images \(B, C, 8, 8\)",
    ),
    "a decoder of another size": (
        lambda: recipes.ec_vae(energy, nn.Linear(4, 5), latent=4).negatives(torch.rand(2, 3)),
        ValueError,
        r"the decoder must give images \(2, 3\)",
    ),
    "other images for a VAE": (
        lambda: made()[6].negatives(torch.rand(2, 5)),
        ValueError,
        r"made for images \(3,\), got \(5,\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message) as found:
        call()
    assert "\n" not in str(found.value)


def test_fused_and_eager_engines_agree():
    """The default engine, in float32, runs the same chains."""
    net = Bowl(0.02).float()
    ends = []
    for engine in ("auto", "autograd"):
        recipe = recipes.igebm(net, engine=engine)
        buffer = recipe.buffer((1, 8, 8), seed=1)
        for _ in range(2):
            negatives = recipe.negatives(torch.rand(4, 1, 8, 8), buffer)
        ends.append(negatives.x)
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["Negated", "HalfSquaredNorm", "jem"])
def test_chains_have_nets_in_eval_mode(name):
    """A batch norm in train mode would let chains influence each other; afterwards it is in train mode again."""
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    net.train()
    if name == "jem":
        recipe = recipes.jem(net, num_steps=2, engine="autograd")
    elif name == "HalfSquaredNorm":
        recipe = recipes.clel(recipes.HalfSquaredNorm(net), num_steps=2, engine="autograd")
    else:
        recipe = recipes.igebm(recipes.Negated(net.append(nn.Linear(3, 1))), num_steps=2, engine="autograd")
    before = net[1].running_mean.clone()
    recipe.negatives(torch.rand(4, 4), recipe.buffer((4,), seed=0, capacity=10))
    assert torch.equal(net[1].running_mean, before)
    assert net[1].training
