"""The table of docs/recipes.md, made from the constants of the recipes: `python -m tests.recipes.table` prints it."""

from __future__ import annotations

import torch
from torch import nn

from fastebm import recipes
from fastebm.ops.langevin import NoiseOrder
from fastebm.recipes import Optimizer, Recipe
from fastebm.sampling import Cascade, Langevin


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def energy(x: torch.Tensor, *conditions: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).square().sum(1)


def made() -> list[Recipe]:
    """All recipes with their published constants."""

    def decoder(latents: list[torch.Tensor], noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return noise, -energy(noise)

    return [
        recipes.igebm(energy),
        recipes.jem(nn.Identity()),
        recipes.jem_pp(nn.Identity(), nn.Identity(), means=torch.zeros(2, 3), covariances=torch.eye(3).expand(2, 3, 3)),
        recipes.short_run(energy),
        recipes.uva_tutorial(energy),
        recipes.improved_cd(energy),
        recipes.vaebm(energy, decoder, [(2,)], (3,)),
        recipes.ec_vae(energy, nn.Identity()),
        recipes.cf_ebm(dict.fromkeys((8, 16, 32), energy)),
        recipes.energy_matching(energy),
        recipes.eqm(nn.Identity()),
        recipes.recovery_likelihood(energy),
        recipes.cdrl(energy, lambda x, level: x),
        recipes.clel(energy),
    ]


def chain(recipe: Recipe) -> str:
    if isinstance(recipe, recipes.JEMPlusPlus):
        low, high = (number(bound) for bound in recipe.clamp)
        return (
            f"{recipe.num_steps} of: a step of {number(recipe.outer_step)}, then {recipe.inner_steps} steps of "
            f"{number(recipe.step_size)} with the first layer's adjoint frozen, clip {number(recipe.grad_clip)}, "
            f"clamp [{low}, {high}]"
        )
    if isinstance(recipe, recipes.EnergyMatching):
        return (
            f"{recipe.num_steps} steps of {number(recipe.step_size)}, temperature {number(recipe.epsilon)} from data, "
            f"0 and from time 1 on {number(recipe.epsilon)} from noise; clamp at the end"
        )
    if isinstance(recipe, recipes.EqM):
        return (
            f"{recipe.num_steps} steps of {number(recipe.step_size)} up the field, looking "
            f"{number(recipe.lookahead)} of a step ahead"
        )
    if isinstance(recipe, recipes.RecoveryLikelihood | recipes.CDRL):
        levels = recipe.num_levels if isinstance(recipe, recipes.CDRL) else len(recipe.sigmas) - 1
        return f"{recipe.num_steps} steps at one of {levels} levels, b² = {number(recipe.step_squared)}"
    sampler = recipe.sampler
    if isinstance(sampler, Cascade):
        each = sampler.levels[0].num_steps
        return f"{each} steps of {number(sampler.step_size)} a level, noise {sampler.noise_std}, clamp between levels"
    assert isinstance(sampler, Langevin)
    step_size, noise_std = (number(float(s(torch.zeros(1))[0])) for s in (sampler.step_size, sampler.noise_std))
    parts = [f"{recipe.num_steps} steps of {step_size}", f"noise {noise_std}"]
    if sampler.noise_order != NoiseOrder.WITH_GRADIENT:
        parts[1] += " first" + (", clamped" if sampler.noise_order == NoiseOrder.BEFORE_AND_BOUNDED else "")
    if sampler.grad_clip is not None:
        parts.append(f"clip {number(sampler.grad_clip)}")
    if sampler.clamp != (None, None):
        parts.append("clamp [{}, {}]".format(*(number(float(bound)) for bound in sampler.clamp)))
    if recipe.generation_steps is not None:
        parts.append(f"{recipe.generation_steps} steps to generate")
    return ", ".join(parts)


STARTS = {
    "ec_vae": "the decoder's samples",
    "cf_ebm": "U(-1, 1) at the lowest level",
    "energy_matching": "half data, half N(0, I)",
    "recovery_likelihood": "the image a level above",
    "cdrl": "the proposal's image",
    "jem_pp": "a normal distribution a class",
    "vaebm": "N(0, I)",
    "eqm": "N(0, I)",
}


def start(recipe: Recipe) -> str:
    given = recipe.start
    found = STARTS.get(recipe.name) or f"U({number(given.low)}, {number(given.high)})"
    if recipe.buffer is None:
        return found
    buffer = recipe.buffer((4,), capacity=8192 if recipe.name == "uva_tutorial" else 10_000)
    constants = recipe.buffer.keywords
    parts = [f"{number(constants['capacity'])} {buffer.write.replace('_', ' ')}", f"{100 * buffer.restart:.4g} % new"]
    return f"{found}; " + ", ".join(parts + (["uint8"] if buffer.dtype == torch.uint8 else []))


def loss(recipe: Recipe) -> str:
    found = recipe.loss
    if isinstance(found, recipes.ContrastiveLoss):
        weight = "" if found.l2 == 1 else f"{number(found.l2)} "
        return "CD" + (f" + {weight}L2" if found.l2 else "")
    if isinstance(found, recipes.JEMLoss):
        return "CD + cross-entropy"
    if isinstance(found, recipes.ImprovedCDLoss):
        return f"CD + L2 + KL - {number(found.repel)} log distance"
    if isinstance(found, recipes.VAEBMLoss):
        return f"CD + {number(found.spectral)} spectral norms"
    if isinstance(found, recipes.EnergyMatchingLoss):
        return f"flow matching + {number(found.weight)} CD without the highest {100 * found.trim:.4g} %"
    if isinstance(found, recipes.EqMLoss):
        return f"field to c(t) (x - x₀), c = {number(found.scale)} to t = {number(found.cut)}, then down to 0"
    return "recovery likelihood"


def optimizer(found: Optimizer) -> str:
    parts = [f"{found.method} {number(found.learning_rate)}"]
    if found.method == "SGD":
        parts.append(f"momentum {number(found.momentum)}")
    elif found.betas != (0.9, 0.999):
        parts[0] += " ({}, {})".format(*map(number, found.betas))
    if found.decay != 1:
        when = "an epoch" if found.decay_epochs is None else "at " + ", ".join(map(str, found.decay_epochs))
        parts.append(f"×{number(found.decay)} {when}")
    for name, value in (
        ("warm-up", found.warmup),
        ("weight decay", found.weight_decay),
        ("clip", found.grad_norm_clip),
        ("EMA", found.ema),
    ):
        if value:
            parts.append(f"{name} {number(value)}")
    return ", ".join([*parts, f"batch {found.batch_size}"])


def table() -> list[str]:
    """The lines of the table."""
    lines = ["| recipe | chain | start; buffer | loss | optimiser | source |", "|---|---|---|---|---|---|"]
    for recipe in made():
        shown = optimizer(recipe.optimizer)
        for other in ("decoder_optimizer", "proposal_optimizer"):
            if hasattr(recipe, other):
                shown += f"; {other.removesuffix('_optimizer')}: {optimizer(getattr(recipe, other))}"
        if recipe.data_noise:
            shown += f"; data noise {number(recipe.data_noise)}"
        cells = (f"`{recipe.name}`", chain(recipe), start(recipe), loss(recipe), shown, recipe.source)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
