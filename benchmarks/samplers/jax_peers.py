"""blackjax and numpyro, in a process of their own that runs one block of steps whenever it is told to.

    JAX_PYTHON -m benchmarks.samplers.jax_peers 2           on two cores; a line of JSON in, a line of JSON out

Commands have a target and a sampler, `{"do": ..., "target": ..., "sampler": ...}`:

- tune: finds its options with 100 chains, traces chains, and returns a `Quality`, with the options as a note.
- prepare: compiles blocks of so many "chains" and runs some; returns the seconds of a step.
- time: runs "steps" steps of those chains; returns the seconds of it.
- versions: of the libraries.

All chains of a sampler have the same step size and masses, as those of fastebm. Steps are compiled loops.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.samplers.autocorrelation import quality, step_seconds
from benchmarks.samplers.targets import TARGETS, Target

# How chains are tuned: as the warm-up of fastebm does it, whose constants these are.
GAMMA, T0, KAPPA = 0.05, 10.0, 0.75


def set_cores(threads: int) -> None:
    """Confines this process to so many cores, before JAX counts them."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


if __name__ == "__main__":
    set_cores(int(sys.argv[1]))

import blackjax  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpyro.infer  # noqa: E402


class Chains(NamedTuple):
    """A sampler with options: `init(keys, x)` of all chains, and `step(keys, state)` to the state and its report."""

    init: Callable[[Any, Any], Any]
    step: Callable[[Any, Any], tuple[Any, Any]]
    position: Callable[[Any], Any]


class Report(NamedTuple):
    """Of one step of each chain."""

    acceptance: Any
    gradients: Any


class Ops:
    softplus = staticmethod(jax.nn.softplus)


def energy_of(target: Target) -> Callable[[Any], Any]:
    constants = {name: jnp.asarray(value, jnp.float32) for name, value in target.constants.items()}
    return lambda x: target.energy(x, constants, Ops)


# Samplers -------------------------------------------------------------------------------------------------------------


def of_blackjax(energy: Callable, name: str, step_size: Any, inverse_mass: Any, length: Any) -> Chains:
    """`length` is the number of leapfrogs of HMC, and the decoherence length of MCLMC."""

    def log_density(x: Any) -> Any:
        return -energy(x)

    if name == "mala":
        made = blackjax.mala(log_density, step_size)
    elif name == "hmc":
        made = blackjax.hmc(log_density, step_size, inverse_mass, length)
    else:
        made = blackjax.mclmc(log_density, L=length, step_size=step_size, inverse_mass_matrix=inverse_mass)
    evaluations = {"mala": 1, "hmc": length, "mclmc": 2}[name]

    def init(keys: Any, x: Any) -> Any:
        return jax.vmap(made.init)(x, keys) if name == "mclmc" else jax.vmap(made.init)(x)

    def step(keys: Any, state: Any) -> tuple[Any, Report]:
        state, info = jax.vmap(made.step)(keys, state)
        accepted = getattr(info, "acceptance_rate", jnp.full(len(keys), jnp.nan))
        return state, Report(accepted, jnp.full(len(keys), evaluations))

    return Chains(init, step, lambda state: state.position)


def of_numpyro(energy: Callable, name: str, step_size: Any, inverse_mass: Any, length: Any) -> Chains:
    options: dict[str, Any] = {"step_size": step_size, "inverse_mass_matrix": inverse_mass}
    return numpyro_chains(energy, name, length, 0, adapt_step_size=False, adapt_mass_matrix=False, **options)


def numpyro_chains(energy: Callable, name: str, length: int | None, warm_up: int, **options: Any) -> Chains:
    """What `MCMC(..., chain_method="vectorized")` runs, without its loop in Python."""
    kernel: Any = None

    def init(keys: Any, x: Any) -> Any:
        nonlocal kernel  # a new one each time: `init` wraps its step for so many chains once more
        if name == "hmc":
            kernel = numpyro.infer.HMC(potential_fn=energy, num_steps=length, trajectory_length=None, **options)
        else:
            kernel = numpyro.infer.NUTS(potential_fn=energy, **options)
        return kernel.init(keys, warm_up, x)

    def step(keys: Any, state: Any) -> tuple[Any, Report]:
        state = kernel.sample(state, (), {})
        return state, Report(state.accept_prob, state.num_steps)

    return Chains(init, step, lambda state: state.z)


def advanced(chains: Chains) -> Callable[[Any, Any, Any], Any]:
    """A compiled function of a key, a state and a number of steps."""

    def run(key: Any, state: Any, steps: Any) -> Any:
        count = len(chains.position(state))

        def body(i: Any, state: Any) -> Any:
            return chains.step(jax.random.split(jax.random.fold_in(key, i), count), state)[0]

        return jax.lax.fori_loop(0, steps, body, state)

    return jax.jit(run)


def traced(chains: Chains, energy: Callable, key: Any, state: Any, steps: int) -> tuple[Any, Any, Any]:
    """The state after `steps` steps, the summaries (3, steps, chains) and the means of the reports."""
    count = len(chains.position(state))

    def body(state: Any, i: Any) -> Any:
        state, report = chains.step(jax.random.split(jax.random.fold_in(key, i), count), state)
        x = chains.position(state)
        means = Report(jnp.mean(report.acceptance), jnp.mean(report.gradients.astype(jnp.float32)))
        return state, (jnp.stack([x[:, 0], x[:, 0] ** 2, jax.vmap(energy)(x)]), means)

    state, (summaries, means) = jax.jit(lambda state: jax.lax.scan(body, state, jnp.arange(steps)))(state)
    return state, np.asarray(summaries).transpose(1, 0, 2), Report(*(float(np.mean(value)) for value in means))


# Options --------------------------------------------------------------------------------------------------------------


def dual_averaging(
    make: Callable[[Any, Any], Chains], x: Any, key: Any, steps: int, target: float, masses: bool, first: float
) -> tuple[float, Any]:
    """A step size for all chains by their mean acceptance, and their variances in the middle of the warm-up."""
    count, dim = x.shape
    centre, average, error, since = math.log(10 * first), math.log(first), 0.0, 0
    inverse_mass, moments = jnp.ones(dim), []
    begin, end = (steps * 3 // 20, steps * 3 // 4) if masses else (steps, steps)

    @jax.jit
    def take(key: Any, x: Any, step_size: Any, inverse_mass: Any) -> tuple[Any, Any]:
        chains = make(step_size, inverse_mass)
        keys = jax.random.split(key, count)
        state, report = chains.step(keys, chains.init(keys, x))
        return chains.position(state), jnp.mean(jnp.nan_to_num(report.acceptance))

    step_size = first
    for done in range(1, steps + 1):
        x, acceptance = take(jax.random.fold_in(key, done), x, step_size, inverse_mass)
        since += 1
        share = 1 / (since + T0)
        error = (1 - share) * error + share * (target - float(acceptance))
        logarithm = centre - math.sqrt(since) / GAMMA * error
        weight = since**-KAPPA
        average = weight * logarithm + (1 - weight) * average
        step_size = math.exp(logarithm)
        if begin < done <= end and masses:
            moments.append(np.asarray(x, np.float64))
            if done == end:
                inverse_mass = jnp.asarray(np.concatenate(moments).var(0), jnp.float32)
                centre, error, since = math.log(10) + average, 0.0, 0
    return math.exp(average), inverse_mass


class Peer:
    """One sampler of one target, with its options once they are found."""

    def __init__(self, target: str, sampler: str) -> None:
        self.library, self.name = sampler.split()
        self.target = TARGETS[target]
        self.energy = energy_of(self.target)
        self.options: tuple[Any, ...] = ()
        self.made: Chains | None = None
        self.states: dict[int, Any] = {}
        self.runs: Callable[[Any, Any, Any], Any] | None = None
        self.blocks = 0

    def make(self, step_size: Any, inverse_mass: Any, length: Any) -> Chains:
        of = of_blackjax if self.library == "blackjax" else of_numpyro
        return of(self.energy, self.name, step_size, inverse_mass, length)

    def tune(self, chains: int, warm_up: int, steps: int, lengths: list[int]) -> dict[str, Any]:
        best: tuple[float, Any, tuple[Any, ...]] | None = None
        for length in lengths if self.name == "hmc" else [0]:
            options = self.adapted(length, warm_up)
            found = self.trace(options, chains, steps)
            rate = found.effective / found.gradients
            if best is None or rate > best[0]:
                best = rate, found, options
        assert best is not None
        _, found, self.options = best
        self.made = self.make(*self.options)
        self.runs = advanced(self.made)
        step_size, _, length = self.options
        long = f", decoherence length {length:.3g}" if self.name == "mclmc" else f", {length} steps a trajectory"
        return found.to_json() | {"note": f"step size {step_size:.3g}{long if length else ''}"}

    def adapted(self, length: int, warm_up: int) -> tuple[Any, Any, Any]:
        """Step size, inverse masses and length."""
        x = jnp.asarray(self.target.starts(100, seed=2))
        key = jax.random.key(length)
        if self.library == "numpyro":
            return *self.numpyro_warm_up(length, warm_up, x, key), length
        if self.name == "mclmc":
            return self.mclmc_warm_up(50 * warm_up, x[0], key)

        def make(step_size: Any, inverse_mass: Any) -> Chains:
            return self.make(step_size, inverse_mass, length)

        aim, first = (0.574, 0.1) if self.name == "mala" else (0.8, 0.3)
        return *dual_averaging(make, x, key, warm_up, aim, self.name == "hmc", first), length

    def numpyro_warm_up(self, length: int, warm_up: int, x: Any, key: Any) -> tuple[float, Any]:
        """numpyro's own, in which each chain adapts by itself; the median step size and the mean variances of all."""
        chains = numpyro_chains(self.energy, self.name, length or None, warm_up)
        keys = jax.random.split(key, len(x))
        adapt = advanced(chains)(key, chains.init(keys, x), warm_up).adapt_state
        return float(jnp.median(adapt.step_size)), jnp.mean(adapt.inverse_mass_matrix, 0)

    def mclmc_warm_up(self, steps: int, x: Any, key: Any) -> tuple[Any, Any, Any]:
        """blackjax's own, of one long chain."""

        def log_density(x: Any) -> Any:
            return -self.energy(x)

        state = blackjax.mcmc.mclmc.init(x, log_density, key)
        kernel = blackjax.mcmc.mclmc.build_kernel()
        _, found, _ = blackjax.mclmc_find_L_and_step_size(kernel, steps, state, key, logdensity_fn=log_density)
        return float(found.step_size), found.inverse_mass_matrix, float(found.L)

    def trace(self, options: tuple[Any, ...], chains: int, steps: int) -> Any:
        made = self.make(*options)
        x = jnp.asarray(self.target.starts(chains, seed=3))
        state = made.init(jax.random.split(jax.random.key(1), chains), x)
        if not self.target.starts_exact:
            state = advanced(made)(jax.random.key(2), state, steps // 4)
        _, summaries, means = traced(made, self.energy, jax.random.key(3), state, steps)
        return quality(self.target, summaries, means.gradients, means.acceptance)

    def prepare(self, chains: int) -> dict[str, float]:
        if self.made is None:
            raise RuntimeError("tune first")
        x = jnp.asarray(self.target.starts(chains, seed=4))
        self.states = {chains: self.made.init(jax.random.split(jax.random.key(4), chains), x)}
        self.time(chains, 1)  # compiles
        return {"seconds": step_seconds(lambda steps: self.time(chains, steps)["seconds"])}

    def time(self, chains: int, steps: int) -> dict[str, float]:
        assert self.runs is not None
        self.blocks += 1
        key, state = jax.random.key(100 + self.blocks), self.states[chains]
        jax.block_until_ready(state)
        begun = time.perf_counter()
        self.states[chains] = jax.block_until_ready(self.runs(key, state, steps))
        return {"seconds": time.perf_counter() - begun}


def versions() -> dict[str, Any]:
    names = ("jax", "blackjax", "numpyro")
    return {name: importlib.metadata.version(name) for name in names}


def main() -> None:
    peers: dict[tuple[str, str], Peer] = {}
    answers = sys.stdout
    for line in sys.stdin:
        given = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr):
            do = given.pop("do")
            try:
                if do == "versions":
                    answer = versions()
                else:
                    place = given.pop("target"), given.pop("sampler")
                    if place not in peers:
                        peers[place] = Peer(*place)
                    answer = getattr(peers[place], do)(**given)
            except Exception as failure:  # a peer that can't run is a result
                answer = {"failed": f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
