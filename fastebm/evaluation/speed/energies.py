"""One energy's gradients and Langevin chains against all peers."""

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
    last_resort,
)
from fastebm.evaluation.speed.comparison import Candidate, Candidates, Plan, compare, relative_error
from fastebm.evaluation.speed.eager import Energy, copied, module_of, stock
from fastebm.evaluation.speed.rows import Row
from fastebm.sampling import Langevin

# The first samples of a batch are verified: all are computed alike, and float64 is slow.
VERIFIED = 4


def compare_gradients(energy: Energy, plan: Plan) -> list[Row]:
    """One energy gradient, as rows of unit "gradient": ours within a chain, so that all have their weights fixed."""
    # A copy, because within a chain the energy itself must not be copied, as peers do.
    x, plain = plan.samples(), copied(stock(energy))
    ours = energy_gradient(energy, dtype=plan.dtype, engine=plan.engine)
    verified = Verified.at(x, plain, lambda baseline: baseline.gradient(x))
    with ours.chain():
        return compare(
            plan,
            verified.ours(ours, lambda: ours(x)),
            verified.all(gradient_baselines(plain, plan.dtype, plan.device)),
            unit="gradient",
            reserve={TORCH_COMPILE: verified.one(partial(last_resort, plain, plan.dtype, plan.device))},
            cost=partial(program_cost, ours, x),
        )


def compare_chains(energy: Energy, plan: Plan, updates: Updates) -> list[Row]:
    """Langevin chains, as rows of unit "step": the time of a whole chain over the number of its updates.

    Raises ValueError where the updates are not all alike.
    """
    if len(set(updates.schedule)) != 1:
        raise ValueError("chains are compared at one step size and noise std")
    x, plain, num_steps = plan.samples(), stock(energy), len(updates.schedule)
    ours = energy_gradient(energy, dtype=plan.dtype, engine=plan.engine)
    sampler = Langevin(ours, *updates.schedule[0], clamp=updates.clamp)
    verified = Verified.at(x, plain, lambda baseline: baseline.chain(x, updates))
    return compare(
        plan,
        verified.ours(ours, lambda: sampler.sample(x, num_steps, seed=0)),
        verified.all(chain_baselines(plain, plan.dtype, plan.device, updates.clamp)),
        unit="step",
        units=num_steps,
        reserve={TORCH_COMPILE: verified.one(partial(last_resort, plain, plan.dtype, plan.device))},
        cost=partial(program_cost, ours, x),
    )


@dataclass(frozen=True)
class Verified:
    """Makes entrants of one energy's peers, whose gradients at x are compared with the true ones.

    Attributes:
        x, truth: samples, and the gradient at the first of them.
        run: what an entrant does with its peer.
    """

    x: Tensor
    truth: Tensor
    run: Callable[[Baseline], object]

    @classmethod
    def at(cls, x: Tensor, energy: Energy, run: Callable[[Baseline], object]) -> Verified:
        return cls(x, true_gradient(energy, x), run)

    def ours(self, ours: EnergyGradient, run: Callable[[], object]) -> Candidate:
        """Ours, named by what runs it. Its gradient is taken here and now, so that no capture is timed."""
        error = gradient_error(ours, self.x, self.truth)
        return Candidate(ours.variant, run, lambda: error)

    def one(self, make: Callable[[], Baseline]) -> Callable[[], Candidate]:
        def entrant() -> Candidate:
            baseline = make()
            error = partial(gradient_error, baseline.gradient, self.x, self.truth)
            return Candidate(baseline.variant, lambda: self.run(baseline), error)

        return entrant

    def all(self, baselines: Mapping[str, Variants]) -> dict[str, Candidates]:
        return {name: [self.one(make) for make in variants] for name, variants in baselines.items()}


def true_gradient(energy: Energy, x: Tensor) -> Tensor:
    """The gradient at the first few samples by autograd in float64, in float32 where an energy's weights are not known.

    Raises ValueError where it is zero or not finite, so that nothing could be verified.
    """
    exact = copied(energy)
    module = module_of(exact)
    if module is not None:
        module.eval().double()
    first = x[:VERIFIED].detach()
    try:
        truth = _by_autograd(exact, first.double())
    except RuntimeError:
        if module is not None:
            raise
        truth = _by_autograd(exact, first)
    if not truth.isfinite().all() or not truth.any():
        raise ValueError("the energy's gradient at uniform noise is zero or not finite: there is nothing to verify")
    return truth


def gradient_error(gradient: Gradient, x: Tensor, truth: Tensor) -> float:
    """How far a gradient at x is from the true one of the first samples, relative to its norm."""
    return relative_error(gradient(x)[1][: len(truth)], truth)


def program_cost(ours: EnergyGradient, x: Tensor) -> Cost | None:
    """What the program of an energy costs for one sample; None where autograd runs it.

    The program is made once more, since that is its only input that is not hidden in the engine.
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
