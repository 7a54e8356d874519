"""Compares the gradients or the Langevin chains of one energy with all baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastebm.compiler import EnergyGradient, energy_gradient
from fastebm.compiler.capture import UnsupportedError, capture
from fastebm.compiler.cost_model import Cost, Machine, cost
from fastebm.compiler.frozen_weights import frozen_weights
from fastebm.compiler.rewrites import build_gradient_program
from fastebm.evaluation.speed.baselines import (
    TORCH_COMPILE,
    Baseline,
    Gradient,
    Updates,
    Variants,
    chain_baselines,
    gradient_baselines,
    torch_compile_gradient,
)
from fastebm.evaluation.speed.comparison import Candidate, Candidates, Plan, compare, relative_error
from fastebm.evaluation.speed.eager import Energy, copy_energy, eager_twin, module_of
from fastebm.evaluation.speed.rows import Row
from fastebm.sampling import Langevin

# Only the first samples of a batch are verified: all are computed alike, and float64 is slow.
VERIFIED = 4


def compare_gradients(energy: Energy, plan: Plan) -> list[Row]:
    """Measures one energy gradient, as rows of unit "gradient".

    Ours runs within a chain, so that its weights are read once, as those of the baselines are.
    """
    # A copy, because within a chain the energy itself must not be copied, as baselines do.
    x, twin = plan.samples(), copy_energy(eager_twin(energy))
    ours = energy_gradient(energy, dtype=plan.dtype, engine=plan.engine)
    verifier = GradientVerifier.at(x, twin, lambda baseline: baseline.gradient(x))
    with ours.chain():
        return compare(
            plan,
            verifier.ours(ours, lambda: ours(x)),
            verifier.candidates(gradient_baselines(twin, plan.dtype, plan.device)),
            unit="gradient",
            fallback=verifier.fallback(twin, plan),
            cost=partial(program_cost, ours, x),
        )


def compare_chains(energy: Energy, plan: Plan, updates: Updates) -> list[Row]:
    """Measures Langevin chains, as rows of unit "step": the time of a whole chain over the number of its updates.

    Raises ValueError where the updates are not all alike.
    """
    if len(set(updates.schedule)) != 1:
        raise ValueError("chains are compared at one step size and noise std")
    x, twin, num_steps = plan.samples(), eager_twin(energy), len(updates.schedule)
    ours = energy_gradient(energy, dtype=plan.dtype, engine=plan.engine)
    sampler = Langevin(ours, *updates.schedule[0], clamp=updates.clamp)
    verifier = GradientVerifier.at(x, twin, lambda baseline: baseline.chain(x, updates))
    return compare(
        plan,
        verifier.ours(ours, lambda: sampler.sample(x, num_steps, seed=0)),
        verifier.candidates(chain_baselines(twin, plan.dtype, plan.device, updates.clamp)),
        unit="step",
        units=num_steps,
        fallback=verifier.fallback(twin, plan),
        cost=partial(program_cost, ours, x),
    )


@dataclass(frozen=True)
class GradientVerifier:
    """Makes candidates of baselines, whose gradients at x are compared with the true ones.

    Attributes:
        x, truth: samples, and the true gradient at the first of them.
        run: what a candidate does with its baseline.
    """

    x: Tensor
    truth: Tensor
    run: Callable[[Baseline], object]

    @classmethod
    def at(cls, x: Tensor, energy: Energy, run: Callable[[Baseline], object]) -> GradientVerifier:
        return cls(x, true_gradient(energy, x), run)

    def ours(self, ours: EnergyGradient, run: Callable[[], object]) -> Candidate:
        """Our candidate, named by its engine. Its gradient is taken here, so that its capture is not timed."""
        error = gradient_error(ours, self.x, self.truth)
        return Candidate(ours.variant, run, lambda: error)

    def candidate(self, make: Callable[[], Baseline]) -> Candidate:
        baseline = make()
        error = partial(gradient_error, baseline.gradient, self.x, self.truth)
        return Candidate(baseline.variant, partial(self.run, baseline), error)

    def candidates(self, baselines: Mapping[str, Variants]) -> dict[str, Candidates]:
        return {name: [partial(self.candidate, make) for make in made] for name, made in baselines.items()}

    def fallback(self, energy: Energy, plan: Plan) -> dict[str, Callable[[], Candidate]]:
        """What `torch.compile` still does for an energy whose gradient it gets wrong as one function."""
        make = partial(torch_compile_gradient, energy, plan.dtype, plan.device, backward="autograd")
        return {TORCH_COMPILE: partial(self.candidate, make)}


def true_gradient(energy: Energy, x: Tensor) -> Tensor:
    """The gradient at the first few samples by autograd in float64, in float32 where an energy can't run in float64.

    Raises ValueError where it is zero or not finite, so that nothing could be verified.
    """
    exact = copy_energy(energy)
    module = module_of(exact)
    if module is not None:
        module.eval().double()
    first = x[:VERIFIED].detach()
    try:
        truth = _by_autograd(exact, first.double())
    except RuntimeError:  # weights that a function hides, or an energy that sets a dtype itself
        if module is not None:
            module.float()
        truth = _by_autograd(exact, first)
    if not truth.isfinite().all() or not truth.any():
        raise ValueError("the energy's gradient at uniform noise is zero or not finite: there is nothing to verify")
    return truth


def gradient_error(gradient: Gradient, x: Tensor, truth: Tensor) -> float:
    """The distance of a gradient at x from the true one of the first samples, relative to the norm of that."""
    return relative_error(gradient(x)[1][: len(truth)], truth)


def program_cost(ours: EnergyGradient, x: Tensor) -> Cost | None:
    """FLOPs and bytes of an energy's program for one sample; None where autograd runs it.

    The program is built once more, because the engine hides its own.
    """
    if ours.engine != "fused":
        return None
    module, dtype = module_of(ours.energy), ours.dtype or x.dtype
    with nullcontext() if module is None else frozen_weights(module), torch.no_grad():
        try:
            program = build_gradient_program(capture(ours.energy, module, x), Machine.of(x.device, dtype))
        except UnsupportedError:
            return None
    return cost(program, dtype.itemsize)


def _by_autograd(energy: Energy, x: Tensor) -> Tensor:
    x = x.requires_grad_(True)
    with torch.enable_grad():
        total = energy(x).sum()
    return torch.autograd.grad(total, x)[0]
