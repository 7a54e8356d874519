"""The Langevin sampler: `x' = clamp(x - step_size * clip(grad E(x)) + noise_std * noise)`, at fixed weights of E.

One update is the fused operator `fastebm::langevin_step` (`fastebm/ops/langevin.py`); this file is the loop around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from fastebm.compiler import ScoreGradient
from fastebm.ops import CompiledLanes, advance_chain, call_steps
from fastebm.ops.langevin import (
    Clamp,
    NoiseOrder,
    RepeatedStep,
    check_clamp,
    check_clip,
    check_mask,
    drift_options,
    expand_clamp,
    noise_options,
)
from fastebm.ops.options import StepOptions
from fastebm.sampling.diagnostics import Diagnostics
from fastebm.sampling.graphs import ChainGraphs, Update
from fastebm.sampling.minibatches import Minibatches
from fastebm.sampling.observers import Observer, all_deferrable, checking_finite, observe_block
from fastebm.sampling.sampler import (
    Callback,
    Energy,
    Projection,
    Sampler,
    check_steps,
    copied,
    expand_image,
    expand_to,
    gradient_of,
    key_increment,
    laid_like,
    number_of_rows,
    projected,
)
from fastebm.sampling.schedules import (
    Schedule,
    as_schedule,
    evaluate,
    evaluate_together,
    one_for_all,
    rows_to_try,
    table,
)
from fastebm.sampling.state import ChainState, StepInfo
from fastebm.scalars import as_count, as_real, shown

DataTerm = tuple[Tensor, float | Tensor | Schedule] | tuple[Tensor, float | Tensor | Schedule, float]


class LangevinOptions(TypedDict, total=False):
    """The optional arguments of `Langevin`, for samplers that pass them on to it."""

    clamp: Clamp | None
    grad_clip: float | None
    grad_norm_clip: float | None
    noise_first: bool
    clamp_noise: bool
    dtype: torch.dtype | None
    engine: str
    reproducible: bool


class Langevin(Sampler[ChainState]):
    """Langevin sampler of an energy `E(x) -> (B,)`, low meaning real: `init`, `step` on explicit state, and `sample`.

    `step_size` and `noise_std` are independent, because published recipes untie them. `schedules.from_epsilon(epsilon)`
    gives the pair with temperature 1; `temperature` gives the one that a pair implies.

    Args:
        energy: an `nn.Module` or function that returns one energy for each sample, or a ready `EnergyGradient`.
        step_size: a positive number, a schedule (`fastebm.schedules`), or a tensor with one for each chain, `(B,)`, or
            for each update and chain, `(num_steps, B)`.
        noise_std: the same, not negative; 0 draws no noise.
        clamp: `(low, high)`, imposed after every update. Each is None, a number, or a tensor that broadcasts to one
            sample, such as `(C, 1, 1)` for a bound of each channel, which is copied.
        grad_clip: the largest magnitude of an entry of the gradient.
        grad_norm_clip: the largest norm of a sample's gradient; not together with `grad_clip`.
        noise_first: adds the noise before the gradient is evaluated, `y = x + noise_std * noise` and
            `x' = clamp(y - step_size * clip(grad E(y)))`, as IGEBM does.
        clamp_noise: with `noise_first`, clamps y too.
        clamp_at: "step" clamps after every update; "end" clamps only the ends of chains that `sample` returns.
        momentum: `m' = momentum * m + clip(grad E(x))` takes the place of the gradient, in [0, 1); 0 keeps none.
        nesterov: "lookahead" evaluates the gradient at `x - step_size * momentum * m`; "corrected" steps by
            `grad E(x) + momentum * m'`, which is the same in other variables; None is the heavy ball.
        preconditioner: a positive tensor P that broadcasts to one sample, or "rms": `x' = clamp(x - step_size * P *
            clip(grad E(x)) + noise_std * sqrt(P) * noise)`, whose target is that without P. "rms" takes
            `P = 1 / (sqrt(v) + rms_epsilon)` with `v' = rms_decay * v + (1 - rms_decay) * clip(grad E(x))**2`, as
            preconditioned SGLD (Li et al., AAAI 2016) without its correction term Gamma, which takes second derivatives
            of E: it samples approximately, and a P kept from it (see the docs) exactly. Not with momentum, noise_first,
            grad_norm_clip or a data term.
        rms_decay, rms_epsilon: of "rms".
        minibatches: `fastebm.Minibatches` of data: each step estimates the energy, which it calls as
            `energy(x, *conditions, *rows)`, from rows drawn afresh (SGLD, Welling and Teh, ICML 2011). The noise of the
            estimate, of variance V in an entry of the gradient, widens the chain as `noise_std**2 + step_size**2 V`
            would.
        noise_correction: takes that noise out again: a step averages the gradients of two minibatches, estimates the
            average's V from their difference, and injects the variance `noise_std**2 - step_size**2 V`, or 0 where that
            is negative (as SGHMC and SGFS do). V is each entry's running mean, of decay `rms_decay`, from 0 on. Only
            with minibatches, and without momentum, preconditioner, noise_first, clips and data term.
        dtype, engine, reproducible: passed to `energy_gradient`.

    Several threads may use one sampler at the same time, or samplers of their own over one module, and get the bits
    that each gets alone; no thread may train the module meanwhile (see `EnergyGradient`). Copies and pickles work where
    those of the energy do.

    Raises ValueError or TypeError for options out of range.

    Example:
        >>> import torch, fastebm
        >>> normal = fastebm.Langevin(lambda x: 0.5 * x.square().sum(1), **fastebm.schedules.from_epsilon(0.5))
        >>> x = normal.sample(torch.zeros(1000, 2), num_steps=50, seed=1)
        >>> bool((x.std(0) - 1).abs().max() < 0.1)
        True
    """

    state_type = ChainState

    def __init__(
        self,
        energy: Energy,
        step_size: float | Tensor | Schedule,
        noise_std: float | Tensor | Schedule,
        *,
        clamp: Clamp | None = None,
        grad_clip: float | None = None,
        grad_norm_clip: float | None = None,
        noise_first: bool = False,
        clamp_noise: bool = False,
        clamp_at: Literal["step", "end"] = "step",
        momentum: float = 0.0,
        nesterov: Literal["lookahead", "corrected"] | None = None,
        preconditioner: Tensor | Literal["rms"] | None = None,
        rms_decay: float = 0.99,
        rms_epsilon: float = 1e-5,
        minibatches: Minibatches | None = None,
        noise_correction: bool = False,
        dtype: torch.dtype | None = None,
        engine: str = "auto",
        reproducible: bool = True,
    ) -> None:
        self.gradient = gradient_of(energy, dtype, engine, reproducible)
        self.step_size = as_schedule(step_size)
        self.noise_std = as_schedule(noise_std)
        table(
            self.step_size, self.noise_std, self._shortest()
        )  # a wrong range is found here rather than at the first chain
        self.clamp = check_clamp(_copied_bounds(clamp))
        self._constant: tuple[Schedule, Schedule, Tensor] | None = None
        self._clamps: dict[tuple[torch.device, torch.dtype], Clamp] = {}
        if grad_clip is not None and grad_norm_clip is not None:
            raise ValueError("give grad_clip (by value) or grad_norm_clip (by a sample's norm), not both")
        self.grad_clip = check_clip("grad_clip", grad_clip)
        self.grad_norm_clip = check_clip("grad_norm_clip", grad_norm_clip)
        if clamp_noise and not noise_first:
            raise ValueError("clamp_noise needs noise_first: noise that comes with the gradient is clamped anyway")
        self.noise_order = (
            NoiseOrder.WITH_GRADIENT
            if not noise_first
            else NoiseOrder.BEFORE_AND_BOUNDED
            if clamp_noise
            else NoiseOrder.BEFORE
        )
        if clamp_at not in ("step", "end"):
            raise ValueError(f'clamp_at is "step" or "end", got {clamp_at!r}')
        if clamp_at == "end" and (clamp_noise or self.clamp == (None, None)):
            raise ValueError('clamp_at="end" needs a clamp, and no clamp_noise')
        self.clamp_at = clamp_at
        self.momentum = as_real("momentum", momentum)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if self.momentum and grad_norm_clip is not None:
            raise ValueError("momentum gathers gradients that are clipped by grad_clip; it takes no grad_norm_clip")
        if nesterov not in (None, "lookahead", "corrected"):
            raise ValueError(f'nesterov is "lookahead", "corrected" or None, got {nesterov!r}')
        if nesterov is not None and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        self.nesterov = nesterov
        self.preconditioner = check_preconditioner(preconditioner)
        if preconditioner is not None and (self.momentum or noise_first or grad_norm_clip is not None):
            raise ValueError("preconditioner is not for momentum, noise_first or grad_norm_clip")
        self.rms_decay, self.rms_epsilon = as_real("rms_decay", rms_decay), as_real("rms_epsilon", rms_epsilon)
        if not (0 <= self.rms_decay < 1 and 0 < self.rms_epsilon < math.inf):
            raise ValueError(f"rms_decay must be in [0, 1) and rms_epsilon positive, got {rms_decay} and {rms_epsilon}")
        if minibatches is not None and not isinstance(minibatches, Minibatches):
            raise TypeError(f"minibatches is a fastebm.Minibatches or None, got {shown(minibatches)}")
        self.minibatches, self.noise_correction = minibatches, bool(noise_correction)
        clipped = grad_clip is not None or grad_norm_clip is not None
        if noise_correction and (minibatches is None or self.momentum or noise_first or clipped):
            raise ValueError("noise_correction needs minibatches, and no momentum, noise_first or clip")
        if noise_correction and preconditioner is not None:
            raise ValueError("noise_correction is not for a preconditioner")
        self._graphs = ChainGraphs()

    def __repr__(self) -> str:
        temperatures = self.temperature(self._shortest())
        start, end = float(temperatures[0].min()), float(temperatures[-1].max())
        temperature = f"{start:.3g}" if start == end else f"{start:.3g} to {end:.3g}"
        options = {"step_size": repr(self.step_size), "noise_std": repr(self.noise_std)}
        bounds = [f"bounds {tuple(b.shape)}" if isinstance(b, Tensor) else str(b) for b in self.clamp]
        if bounds != ["None", "None"]:
            options["clamp"] = f"({bounds[0]}, {bounds[1]})"
        for name, bound in (("grad_clip", self.grad_clip), ("grad_norm_clip", self.grad_norm_clip)):
            if bound is not None:
                options[name] = f"{bound:g}"
        if self.noise_order != NoiseOrder.WITH_GRADIENT:
            options["noise"] = self.noise_order.name.lower().replace("_", " ")
        if self.clamp_at == "end":
            options["clamp_at"] = '"end"'
        if self.momentum:
            options["momentum"] = f"{self.momentum:g}" + (f" ({self.nesterov})" if self.nesterov else "")
        if self.preconditioner is not None:
            given = self.preconditioner
            options["preconditioner"] = given if isinstance(given, str) else str(tuple(given.shape))
        if self.minibatches is not None:
            options["minibatches"] = repr(self.minibatches) + (", corrected" if self.noise_correction else "")
        listed = ", ".join(f"{name}={value}" for name, value in options.items())
        return f"Langevin({self.gradient!r}; {listed}; temperature {temperature})"

    def temperature(self, num_steps: int = 1) -> Tensor:
        """The temperature `T = noise_std**2 / (2 * step_size)` of each update, float64 `(num_steps,)`.

        It is `(num_steps, B)` where step sizes or noise are given for each chain.

        Small steps at constant `T` sample `p(x) ~ exp(-E(x) / T)`.
        """
        step_size, noise_std = evaluate_together(num_steps, self.step_size, self.noise_std)
        return noise_std.square() / (2 * step_size)

    def _shortest(self) -> int:
        """For how many updates the schedules can be evaluated whatever the chain: 2, or as many as they have rows."""
        return rows_to_try(self.step_size, self.noise_std)

    @torch.no_grad()
    def init(
        self,
        x0: Tensor,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        *,
        num_chains: int | None = None,
        start_step: int = 0,
        num_steps: int | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        data_term: DataTerm | None = None,
        conditions: Sequence[Tensor] = (),
    ) -> ChainState:
        """The state from which chains start.

        Args:
            x0: the starts of the chains, `(B, ...)`, float32 or float64; copied.
            seed: of all noise; None draws one from torch's default generator.
            chain_ids: the id of the first chain, or int64 ids `(B,)`. Equal seed, id and step mean equal noise.
            num_chains: the number of chains, by default B. A single start (B = 1) is repeated that many times.
            start_step: the step of the random numbers at which the chains start; a continued chain counts on.
            num_steps: the length of the chains; needed where a schedule is not constant.
            mask, known: where `mask` (bool, or 0 and 1) is True, a pixel is known, and `x` is set to `known` from the
                start on and after every update; both broadcast to `x0`. A mask of one channel serves all channels; a
                `known` or `target` that is an image of one channel does not.
            data_term: `(target, weight)` or `(target, weight, hinge)`: adds `weight * (x - target)` to the (clipped)
                gradient of the samples with `||x - target||**2 > hinge`; the weight is a number or a schedule, not
                negative.
            conditions: what the energy depends on besides x, such as labels, times or measurements: tensors `(B, ...)`
                of any dtype on `x0`'s device, one row for each chain. The energy is called as `energy(x, *conditions)`.
                One row serves all chains.
        """
        start_step, _ = check_steps(start_step, 0 if num_steps is None else num_steps)
        rows = self._rows(num_steps)
        start = self._common(x0, seed, chain_ids, num_chains, start_step, conditions, self._table(rows))
        self._clamp_of(start["x"])  # bounds that don't fit are found here rather than at the first update
        if self.clamp_at == "end":
            self._clamp_of(start["x"], at_end=True)
        momentum = torch.zeros_like(start["x"]) if self.momentum else None
        second_moment = torch.zeros_like(start["x"]) if self.preconditioner == "rms" else None
        if isinstance(self.preconditioner, Tensor):
            self._root(start["x"])
        if data_term is not None and (self.preconditioner is not None or self.noise_correction):
            raise ValueError("preconditioner and noise_correction are not for a data term")
        if self.minibatches is not None:
            self.minibatches.check(start["x"])
        variance = torch.zeros_like(start["x"]) if self.noise_correction else None
        state = ChainState(**start, momentum=momentum, second_moment=second_moment, gradient_variance=variance)
        return self.constrain(state, mask, known, data_term, num_steps)

    def constrain(
        self,
        state: ChainState,
        mask: Tensor | None,
        known: Tensor | None,
        data_term: DataTerm | None,
        num_steps: int | None = None,
        weights: Tensor | None = None,
    ) -> ChainState:
        """`state` with its known pixels set, and with what keeps them there and pulls the others; see `init`.

        `weights`, one for each row of the state's schedule, stand for the data term's own, which then is not read.
        """
        x = state.x
        mask, known, term = self.check_constraints(x.shape, x.device, mask, known, data_term, num_steps, weights)
        if mask is not None and known is not None:
            mask, known = laid_like(x, mask, torch.bool), laid_like(x, known, x.dtype)
            state = replace(state, x=torch.where(mask, known, x), mask=mask, known=known)
        if term is None:
            return state
        target, weights, hinge = term
        return replace(
            state,
            data_target=laid_like(x, target, x.dtype),
            data_term_weight=weights.float().to(x.device),
            data_term_hinge=hinge,
        )

    def check_constraints(
        self,
        shape: torch.Size,
        device: torch.device,
        mask: Tensor | None,
        known: Tensor | None,
        data_term: DataTerm | None,
        num_steps: int | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor, float] | None]:
        """Mask, known and target as views of `shape`, the weights for each update and the hinge.

        Raises ValueError or TypeError for those of `constrain` that don't fit states of that shape.
        """
        if (mask is None) != (known is None):
            raise ValueError(f"mask and known come together, got only {'known' if mask is None else 'mask'}")
        if mask is not None and known is not None:
            mask = check_mask(expand_to(shape, "mask", mask, device))
            known = expand_image(shape, "known", known, device)
        if data_term is None:
            return mask, known, None
        if not isinstance(data_term, tuple) or len(data_term) not in (2, 3):
            raise TypeError("data_term is a tuple (target, weight) or (target, weight, hinge)")
        target, weight, *rest = data_term
        hinge = as_real("the hinge of data_term", rest[0]) if rest else 0.0
        if weights is None:
            weight = one_for_all("the weight of data_term", weight)
            weights = evaluate(weight, number_of_rows(num_steps, weight))
        if not (math.isfinite(hinge) and hinge >= 0) or not bool(((weights >= 0) & weights.float().isfinite()).all()):
            raise ValueError(
                f"data_term needs a finite weight >= 0 and a finite hinge >= 0, "
                f"got weight {shown(weight)}, hinge {hinge}"
            )
        return mask, known, (expand_image(shape, "the target of data_term", target, device), weights, hinge)

    @torch.no_grad()
    def step(self, state: ChainState, *, project: Projection | None = None) -> tuple[ChainState, StepInfo]:
        """One update, followed by `project` if it is given (see `sample`). `state` is left as it was.

        Outside of `with sampler.gradient.chain():` every call reads the weights anew.
        """
        check_steps(self.own_state(state).step, 1)
        after = copied(state)
        energy, gradient = self._mover(after)()
        if project is not None:
            after = replace(after, x=projected(project, after.x))
        after.key.add_(key_increment(state.key))
        return replace(after, step=state.step + 1), StepInfo(energy, gradient, state.x, after.x)

    def advance(
        self, state: ChainState, num_steps: int, *, project: Projection | None = None, check: bool = True
    ) -> ChainState:
        """The state `num_steps` updates after `state`, which is left as it was: the bits of `step` without its copies.

        Raises FloatingPointError where energies or states are not finite, unless `check` is False.
        """
        state = copied(self.own_state(state))
        with checking_finite(state, check) as observers:
            return self.advance_(state, num_steps, observers, project=project)

    @torch.no_grad()
    def advance_(
        self,
        state: ChainState,
        num_steps: int,
        observers: Sequence[Observer] = (),
        *,
        project: Projection | None = None,
    ) -> ChainState:
        """`advance` in place: overwrites the `x` and `key` of `state`, which must not be used afterwards.

        Never waits for the device, and does not look for energies that are not finite. If no observer reads every state
        and there is no `project`, updates are replayed from CUDA graphs on a CUDA device; on the CPU, small images get
        many updates in one call. The first update is made alone where its program is compared with the energy.
        """
        _, num_steps = check_steps(state.step, num_steps)
        update = self._update(key_increment(state.key), project)
        with self.gradient.chain():
            done, blocks_tried = 0, self.minibatches is not None  # a block has the same side inputs throughout
            while done < num_steps:
                if not blocks_tried and project is None and all_deferrable(observers) and self._settled(state, done):
                    blocks_tried = True
                    done += self._advance_blocks_(update, state, num_steps - done, observers, done)
                    if done == num_steps:
                        break
                energies = update(state)
                done += 1
                for observe in observers:
                    observe(done, state.x, energies)
            self.gradient.leave_soon()
        return replace(state, step=state.step + num_steps)

    def _settled(self, state: ChainState, done: int) -> bool:
        """Whether a checked program is up to date, so that everything that changes from now on is on the device."""
        if done == 0:
            return self.gradient.ready(state.x, state.conditions)
        return done > 1 or not self.gradient.unsettled(state.x, state.conditions)

    def _update(self, one: Tensor, project: Projection | None) -> Update:
        """The function that moves a state on in place, its key by `one`, and returns the energies of its gradient."""
        movers: dict[int, tuple[ChainState, Callable[[], tuple[Tensor, Tensor]]]] = {}

        def update(state: ChainState) -> Tensor:
            known = movers.get(id(state))
            if known is None:
                movers.clear()
                known = movers[id(state)] = state, self._mover(state)
            energies, _ = known[1]()
            if project is not None:
                state.x.copy_(projected(project, state.x))
            state.key.add_(one)
            return energies

        return update

    def _mover(self, state: ChainState) -> Callable[[], tuple[Tensor, Tensor]]:
        """The function that makes one update of x, and of a momentum, in place; returns energies and their gradient."""
        x, options = state.x, StepOptions(*self._arguments(state))
        if self.preconditioner is not None:
            return self._preconditioned_mover(state, options)
        if self.noise_correction:
            return self._corrected_mover(state, options)
        before = self.noise_order != NoiseOrder.WITH_GRADIENT
        noise, drift = noise_options(options, self.noise_order), drift_options(options) if before else options
        nothing = torch.zeros_like(x) if before else None
        momentum, share = state.momentum, self.momentum
        clip = self.grad_clip
        if momentum is not None:
            drift = drift._replace(grad_clip=None)  # what the momentum gathers is clipped already
        repeated: list[RepeatedStep] = []

        def move() -> tuple[Tensor, Tensor]:
            if nothing is not None:
                torch.ops.fastebm.langevin_step_(x, nothing, *noise)
            ahead = x if momentum is None or self.nesterov != "lookahead" else _ahead(state, momentum, share)
            energies, gradient = self.gradient(ahead, self._side_inputs(state))
            direction = gradient
            if momentum is not None:
                clipped = gradient if clip is None else gradient.clamp(-clip, clip)
                momentum.mul_(share).add_(clipped)
                direction = momentum if self.nesterov != "corrected" else clipped + share * momentum
            if repeated:
                repeated[0](direction)
            else:
                torch.ops.fastebm.langevin_step_(x, direction, *drift)
                repeated.append(RepeatedStep(x, tuple(drift)))
            return energies, gradient

        return move

    def _preconditioned_mover(self, state: ChainState, options: StepOptions) -> Callable[[], tuple[Tensor, Tensor]]:
        """`_mover` in coordinates that are divided by sqrt(P), in which the step is the plain one."""
        x, squares, clip = state.x, state.second_moment, self.grad_clip
        fixed = self._root(x) if squares is None else None
        moved = torch.zeros_like(x)

        def move() -> tuple[Tensor, Tensor]:
            energies, gradient = self.gradient(x, self._side_inputs(state))
            clipped = gradient if clip is None else gradient.clamp(-clip, clip)
            if squares is not None:
                squares.mul_(self.rms_decay).add_(clipped.square() * (1 - self.rms_decay))
            root = (1 / (squares.sqrt() + self.rms_epsilon)).sqrt() if squares is not None else fixed
            assert root is not None
            torch.ops.fastebm.langevin_step_(moved.zero_(), root * clipped, *_bare(options))
            x.add_(root * moved)
            _bound_(x, options)
            return energies, gradient

        return move

    def _corrected_mover(self, state: ChainState, options: StepOptions) -> Callable[[], tuple[Tensor, Tensor]]:
        """`_mover` that injects less noise by what two minibatches' gradients have of their own."""
        x, variance, batches = state.x, state.gradient_variance, self.minibatches
        if variance is None or batches is None:
            raise ValueError("noise_correction goes on from a state that this sampler's init made")
        noise, nothing = torch.zeros_like(x), torch.zeros_like(x)

        def move() -> tuple[Tensor, Tensor]:
            first, second = batches.draw(state, 2)
            energies, gradient = (part.clone() for part in self.gradient(x, (*state.conditions, *first)))
            others, slope = self.gradient(x, (*state.conditions, *second))
            variance.mul_(self.rms_decay).add_((gradient - slope).square() * ((1 - self.rms_decay) / 4))
            gradient = (gradient + slope) / 2
            step_size, noise_std = _row(state)
            own = torch.where(noise_std > 0, (step_size / noise_std).square() * variance, 0)
            torch.ops.fastebm.langevin_step_(noise.zero_(), nothing, *_bare(options))
            x.add_((1 - own).clamp_(min=0).sqrt_() * noise - step_size * gradient)
            _bound_(x, options)
            return (energies + others) / 2, gradient

        return move

    def _side_inputs(self, state: ChainState) -> tuple[Tensor, ...]:
        """What the energy is called with besides x."""
        if self.minibatches is None:
            return state.conditions
        return *state.conditions, *self.minibatches.draw(state)[0]

    def _root(self, x: Tensor) -> Tensor:
        """sqrt(P) as a view of x's shape. Raises ValueError where P does not broadcast to one sample."""
        assert isinstance(self.preconditioner, Tensor)
        given = self.preconditioner.to(x.device, torch.float64)
        sample = torch.Size(x.shape[1:])
        try:
            fits = torch.broadcast_shapes(given.shape, sample) == sample
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"preconditioner must broadcast to one sample {tuple(sample)}, got {tuple(self.preconditioner.shape)}"
            )
        return given.sqrt().to(x.dtype).expand(x.shape)

    def _advance_blocks_(
        self, update: Update, state: ChainState, num_steps: int, observers: Sequence[Observer], done: int
    ) -> int:
        """Moves `state` on by blocks of updates, after `done` earlier ones. Returns how many it did: all, or none."""
        if isinstance(self.gradient, ScoreGradient):
            return 0
        alone = state.momentum is not None or self.preconditioner is not None
        if state.x.is_cuda and not alone:
            return self._graphs.advance_(self.gradient, update, state, num_steps, observers, done)
        if alone:
            return 0
        program = self.gradient.compiled_program(state.x, state.conditions)
        if self.noise_order != NoiseOrder.WITH_GRADIENT and not isinstance(program, CompiledLanes):
            return 0
        at_once = 0 if program is None else call_steps(program, state.x)
        if program is None or not at_once:
            return 0
        options = self._arguments(state)
        for first in range(0, num_steps, at_once):
            block = min(at_once, num_steps - first)
            energies = advance_chain(state.x, program, block, *options, noise_order=self.noise_order)
            for observe in observers:
                observe_block(observe, done + first, state.x, energies)
        return num_steps

    def run_with_callback(
        self,
        state: ChainState,
        num_steps: int,
        callback: Callback,
        *,
        thin: int = 1,
        observers: Sequence[Observer] = (),
        project: Projection | None = None,
    ) -> ChainState:
        """`num_steps` updates by `step`, with `callback(k, x, info)` after every `thin`-th, which may keep both."""
        _, num_steps = check_steps(state.step, num_steps)
        thin = as_count("thin", thin, 1)
        with self.gradient.chain():
            for done in range(1, num_steps + 1):
                state, info = self.step(state, project=project)
                for observe in observers:
                    observe(done, state.x, info.energy)
                if done % thin == 0:
                    callback(done, state.x, info)
            self.gradient.leave_soon()
        return state

    @torch.no_grad()
    def sample(
        self,
        x0: Tensor,
        num_steps: int,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        *,
        num_chains: int | None = None,
        start_step: int = 0,
        thin: int = 1,
        keep: Literal["last", "trajectory"] | Callback = "last",
        batch_size: int | None = None,
        progress: bool = False,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        data_term: DataTerm | None = None,
        conditions: Sequence[Tensor] = (),
        project: Projection | None = None,
        check: bool = True,
        diagnostics: Diagnostics | bool = False,
    ) -> Any:
        """Runs chains of `num_steps` updates from `x0` and returns the states at their ends, `(B, ...)` like `x0`.

        Args:
            x0, seed, chain_ids, num_chains, start_step, mask, known, data_term, conditions: as in `init`.
            num_steps: the number of updates, 0 or more; schedules stretch over it.
            thin: the distance in updates between kept states or calls.
            keep: "last"; or "trajectory" for the start and every `thin`-th state after it,
                `(1 + num_steps // thin, B, ...)`; or a function called as `callback(k, x, info)` after every `thin`-th
                update `k`, batch after batch; it may keep `x` and the `StepInfo` but not change them.
            batch_size: runs this many chains at a time; ids, noise and order are those of a single batch.
            progress: shows a bar with the mean energy.
            project: a function from states to states `(B, ...)`, called after every update, behind the clamp. It acts
                on all chains at once: chains cannot be split into batches with it, nor replayed from CUDA graphs.
            check: raises FloatingPointError where an energy or a final state was not finite (one sync for each batch,
                at its end); False leaves that to the caller.
            diagnostics: True, or `fastebm.diagnostics.Diagnostics` with options: then `(x, summary)` is returned, with
                a `ChainSummary` of all chains.

        Example:
            >>> import torch, fastebm
            >>> sampler = fastebm.Langevin(lambda x: 0.5 * x.square().sum(1), 0.1, 0.0)
            >>> sampler.sample(torch.full((1, 2), 3.0), 50, num_chains=2, project=lambda x: x.clamp(min=1))
            tensor([[1., 1.],
                    [1., 1.]])
        """
        start_step, num_steps = check_steps(start_step, num_steps)
        state = self.init(
            x0,
            seed,
            chain_ids,
            num_chains=num_chains,
            start_step=start_step,
            num_steps=num_steps,
            mask=mask,
            known=known,
            data_term=data_term,
            conditions=conditions,
        )
        found = self.run(
            state,
            num_steps,
            thin=thin,
            keep=keep,
            batch_size=batch_size,
            progress=progress,
            check=check,
            diagnostics=diagnostics,
            project=project,
        )
        if self.clamp_at == "end":
            states = found if diagnostics is False else found[0]
            if keep != "trajectory":
                self._clamp_ends_(state, states)
            elif num_steps % thin == 0:
                self._clamp_ends_(state, states[-1])
        return found

    def _clamp_ends_(self, state: ChainState, ends: Tensor) -> None:
        """Clamps the ends of chains in place, but for what is known."""
        clamp_(ends, self._clamp_of(state.x, at_end=True))
        if state.mask is not None and state.known is not None:
            ends.copy_(torch.where(state.mask, state.known, ends))

    def _temperatures(self, num_steps: int) -> float | tuple[float, float] | None:
        found = self.temperature(number_of_rows(num_steps, self.step_size, self.noise_std))
        return None if found.dim() > 1 else (float(found[0]), float(found[-1]))

    def _arguments(self, state: ChainState) -> tuple[Any, ...]:
        """The operator's arguments after `x` and the gradient, in its order."""
        clamp_min, clamp_max, lower_bounds, upper_bounds = self._clamp_of(state.x)
        return (
            state.schedule,
            state.key,
            state.chain_ids,
            clamp_min,
            clamp_max,
            self.grad_clip,
            self.grad_norm_clip,
            lower_bounds,
            upper_bounds,
            state.mask,
            state.known,
            state.data_target,
            state.data_term_weight,
            state.data_term_hinge,
        )

    def _clamp_of(
        self, x: Tensor, at_end: bool = False
    ) -> tuple[float | None, float | None, Tensor | None, Tensor | None]:
        """`clamp` as the operator takes it for states like x; its tensors stay in place, as captured graphs need it."""
        if self.clamp_at == "end" and not at_end:
            return None, None, None, None
        kind = (x.device, x.dtype)
        if kind not in self._clamps:
            low, high = (b.to(x.device, x.dtype) if isinstance(b, Tensor) else b for b in self.clamp)
            self._clamps[kind] = low, high
        return expand_clamp(self._clamps[kind], x)

    def _table(self, rows: int) -> Tensor:
        """The schedules' table; that of constants, which most chains have, is kept."""
        if rows != 1:
            return table(self.step_size, self.noise_std, rows)
        if self._constant is None or self._constant[:2] != (self.step_size, self.noise_std):
            self._constant = self.step_size, self.noise_std, table(self.step_size, self.noise_std, 1)
        return self._constant[2]

    def _rows(self, num_steps: int | None) -> int:
        """How many rows the sampler's own table needs for `num_steps` updates."""
        return number_of_rows(num_steps, self.step_size, self.noise_std)


def _copied_bounds(clamp: Any) -> Any:
    """A clamp whose tensors are copies on the CPU, where they are checked."""
    if not isinstance(clamp, tuple | list):
        return clamp
    return tuple(b.detach().to("cpu", copy=True) if isinstance(b, Tensor) and not b.is_meta else b for b in clamp)


def check_preconditioner(given: Any) -> Tensor | Literal["rms"] | None:
    """A copy of a preconditioner. Raises TypeError or ValueError for what is not positive numbers or "rms"."""
    if given is None:
        return None
    if isinstance(given, str) and given == "rms":
        return "rms"
    if not isinstance(given, Tensor) or not given.is_floating_point() or given.is_meta:
        raise TypeError(f'preconditioner must be a tensor of positive numbers or "rms", got {shown(given)}')
    if not bool(((given > 0) & given.isfinite()).all()):
        raise ValueError("preconditioner must hold positive, finite numbers")
    return given.detach().to("cpu", copy=True)


def _ahead(state: ChainState, momentum: Tensor, share: float) -> Tensor:
    """x moved on by the momentum that it will have without a new gradient."""
    moved = state.x - _row(state)[0] * share * momentum
    return moved if state.mask is None else torch.where(state.mask, state.x, moved)


def _row(state: ChainState) -> tuple[Tensor, Tensor]:
    """Step size and noise std of the state's row, `(1, ...)` or `(B, 1, ...)` in x's dtype."""
    row = state.schedule[state.key[2].clamp(max=state.schedule.shape[0] - 1)].to(state.x.dtype)
    shape = (-1, *(1,) * (state.x.dim() - 1))
    return row[..., 0].reshape(shape), row[..., 1].reshape(shape)


def _bare(options: StepOptions) -> StepOptions:
    """A step without what is done to x at its end; `_bound_` does that."""
    return options._replace(
        clamp_min=None, clamp_max=None, lower_bounds=None, upper_bounds=None, mask=None, known=None, grad_clip=None
    )


def _bound_(x: Tensor, options: StepOptions) -> None:
    """Clamps x and sets its known entries, in place."""
    clamp_(x, (options.clamp_min, options.clamp_max, options.lower_bounds, options.upper_bounds))
    if options.mask is not None and options.known is not None:
        x.copy_(torch.where(options.mask, options.known, x))


def clamp_(x: Tensor, bounds: tuple[float | None, float | None, Tensor | None, Tensor | None]) -> None:
    """Clamps states in place, by numbers or by entries."""
    low, high, lower, upper = bounds
    for each in (low, lower):
        if each is not None:
            x.clamp_(min=each)
    for each in (high, upper):
        if each is not None:
            x.clamp_(max=each)
