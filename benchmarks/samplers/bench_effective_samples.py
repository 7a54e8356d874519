"""Effective samples a second and per evaluation of the gradient: fastebm's samplers, blackjax and numpyro.

    python -m benchmarks.samplers.bench_effective_samples                                    ours alone
    python -m benchmarks.samplers.bench_effective_samples --jax-python ENVIRONMENT/bin/python     and the peers
    python -m benchmarks.samplers.bench_effective_samples --targets banana --chains 100      a part
    ... --out benchmarks/results/MACHINE/effective_samples.json                              keeps the rows

Each sampler is tuned on 100 chains: ours and blackjax's MALA and HMC by the same dual averaging of one step size for
all chains and the same variances as masses, numpyro and blackjax's MCLMC by their own warm-up. The length of
trajectories of HMC and MALT is the one of --lengths that gives the most effective samples a gradient.

What a step is worth comes from a trace of stationary chains, which is not timed: effective samples of x_1, x_1^2 and
the energy, the least of them counts (`autocorrelation`). Its means are held against the truth; where one is more than
four standard errors away, the row is marked as biased. The time of a step comes from blocks that return their last
states alone, for each number of chains, ours and each peer's in turns, one at a time, on the same number of cores.

A row's figures are seconds, or gradients, for an effective sample. Ratios are to our fastest sampler without bias.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastebm
from benchmarks.harness.pages import ROOT
from benchmarks.samplers.autocorrelation import Quality, quality, step_seconds
from benchmarks.samplers.targets import TARGETS, Target
from fastebm.evaluation.speed import Row, Run, machine_facts, record
from fastebm.evaluation.speed.comparison import reason
from fastebm.evaluation.speed.rows import OURS

SUITE = "effective_samples"
UNIT = "effective sample"
PEERS = ("blackjax mala", "blackjax hmc", "blackjax mclmc", "numpyro hmc", "numpyro nuts")
# Samplers of trajectories, whose steps are long.
TRAJECTORIES = ("HMC", "MALT", "AdjustedMCLMC")
LONG_STEPS = (*TRAJECTORIES, "blackjax hmc", "numpyro hmc", "numpyro nuts")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a sampler is tuned, traced and timed.

    Attributes:
        warm_up: steps of it, by 100 chains.
        traced_chains, traced_steps: of the trace; samplers of trajectories make a quarter of the steps.
        lengths: evaluations of the gradient along a trajectory, of which the best number is taken.
        block_seconds: a timed block takes about as long.
        rounds: timed blocks of each sampler.
    """

    warm_up: int = 400
    traced_chains: int = 200
    traced_steps: int = 2000
    lengths: tuple[int, ...] = (4, 8, 16)
    block_seconds: float = 0.3
    rounds: int = 5

    def steps_of(self, sampler: str) -> int:
        return self.traced_steps // 4 if sampler in LONG_STEPS else self.traced_steps


@dataclasses.dataclass
class Contender:
    """A sampler of one target: `prepare(chains)` gives the seconds of a step, `block(chains, steps)` of a block."""

    name: str
    found: Quality
    note: str
    prepare: Callable[[int], float]
    block: Callable[[int, int], float]


# fastebm --------------------------------------------------------------------------------------------------------------


class Torch:
    softplus = staticmethod(F.softplus)


def energy_of(target: Target) -> Callable[[Tensor], Tensor]:
    constants = {name: torch.tensor(value, dtype=torch.float32) for name, value in target.constants.items()}
    return lambda x: target.energy(x, constants, Torch)


def ours() -> dict[str, Callable[..., Any]]:
    """Makes our samplers of an energy, a step size and options: those that this fastebm has."""
    made: dict[str, Callable[..., Any]] = {"MALA": fastebm.MALA, "HMC": fastebm.HMC, "MALT": fastebm.MALT}
    for name in ("MCLMC", "AdjustedMCLMC"):
        if hasattr(fastebm, name):
            made[name] = getattr(fastebm, name)
    return made


def starts(target: Target, chains: int, seed: int) -> Tensor:
    return torch.from_numpy(target.starts(chains, seed))


def adapted(target: Target, name: str, make: Callable[..., Any], length: int, settings: Settings) -> tuple[Any, str]:
    """A sampler with the options that its warm-up found, the same for all chains."""
    energy, x = energy_of(target), starts(target, 100, seed=2)
    trajectories = name in TRAJECTORIES
    lengths = (length,) if trajectories else ()
    sampler = make(energy, 0.1 if name == "MALA" else 0.3, *lengths)
    masses = "given" if name == "MALA" else "diagonal"
    state = sampler.warm_up(sampler.init(x, seed=0), settings.warm_up, pooled=True, mass=masses)
    row = state.schedule[0].reshape(-1, state.schedule.shape[-1]).double().quantile(0.5, dim=0).tolist()
    mass = getattr(state, "inverse_mass", None)
    options = {} if mass is None else {"mass": 1 / mass[0]}
    note = f"step size {row[0]:.3g}"
    if trajectories:
        note += f", {length} steps a trajectory"
    if name == "MCLMC":
        options["decoherence_length"] = row[1]
        note += f", decoherence length {row[1]:.3g}"
    return make(energy, row[0], *lengths, **options), note


def traced(target: Target, name: str, sampler: Any, settings: Settings, gradients: float) -> Quality:
    """What a trace of its chains says. A step reports the state and the energy before it."""
    chains, steps = settings.traced_chains, settings.steps_of(name)
    state = sampler.init(starts(target, chains, seed=3), seed=1)
    if not target.starts_exact:
        state = sampler.advance(state, steps // 4)
    seen: list[Tensor] = []
    chances: list[Tensor] = []

    def keep(k: int, x: Tensor, info: Any) -> None:
        first = info.before[:, 0].double()
        seen.append(torch.stack((first, first**2, info.energy.double())))
        if hasattr(info, "acceptance_probability"):
            chances.append(info.acceptance_probability.mean())

    sampler.run_with_callback(state, steps, keep)
    acceptance = float(torch.stack(chances).mean()) if chances else float("nan")
    return quality(target, torch.stack(seen, dim=1).numpy(), gradients, acceptance)


def contender(target: Target, name: str, make: Callable[..., Any], settings: Settings) -> Contender:
    """Our sampler, tuned. Raises what it raises."""
    best: tuple[float, Quality, Any, str] | None = None
    each = 2 if name in ("MCLMC", "AdjustedMCLMC") else 1  # evaluations a step of the integrator
    for length in settings.lengths if name in TRAJECTORIES else (1,):
        sampler, note = adapted(target, name, make, max(1, length // each), settings)
        gradients = each * max(1, length // each)
        found = traced(target, name, sampler, settings, gradients)
        rate = found.effective / found.gradients
        if best is None or rate > best[0]:
            best = rate, found, sampler, note
    assert best is not None
    _, found, sampler, note = best
    states: dict[int, Any] = {}

    def block(chains: int, steps: int) -> float:
        begun = time.perf_counter()
        states[chains] = sampler.advance(states[chains], steps)
        return time.perf_counter() - begun

    def prepare(chains: int) -> float:
        states.clear()
        states[chains] = sampler.init(starts(target, chains, seed=4), seed=4)
        block(chains, 3)  # compiles
        return step_seconds(lambda steps: block(chains, steps))

    return Contender(name, found, note, prepare, block)


# Peers ----------------------------------------------------------------------------------------------------------------


class PeerError(RuntimeError):
    """What a peer said when it failed."""


class JaxProcess:
    """The process of `jax_peers`, which works only while it is asked."""

    def __init__(self, python: Path, threads: int) -> None:
        command = [str(python), "-m", "benchmarks.samplers.jax_peers", str(threads)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        try:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise SystemExit(f"--jax-python can't be started: {error}") from None

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        """The answer to a command. Raises PeerError for an error there, SystemExit where the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do} | given) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            code = self.process.wait()
            raise SystemExit(f"the process of --jax-python ended with code {code}; it needs jax, blackjax and numpyro")
        answer = json.loads(line)
        if "failed" in answer:
            raise PeerError(answer["failed"])
        return answer

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def peer(jax: JaxProcess, target: Target, name: str, settings: Settings) -> Contender:
    """A sampler of the peers, tuned. Raises PeerError."""
    place = {"target": target.name, "sampler": name}
    options = {"chains": settings.traced_chains, "warm_up": settings.warm_up, "lengths": list(settings.lengths)}
    found = jax.ask("tune", **place, **options, steps=settings.steps_of(name))
    note = found.pop("note")
    return Contender(
        name,
        Quality(**found),
        note,
        lambda chains: jax.ask("prepare", **place, chains=chains)["seconds"],
        lambda chains, steps: jax.ask("time", **place, chains=chains, steps=steps)["seconds"],
    )


# Measurement ----------------------------------------------------------------------------------------------------------


def label(name: str) -> tuple[str, str]:
    """Baseline and variant of a row: a peer's library and its sampler, or ours."""
    return tuple(name.split()) if name in PEERS else (OURS, name)  # type: ignore[return-value]


def row(target: Target, name: str, chains: int, quantity: str, note: str) -> Row:
    baseline, variant = label(name)
    return Row(SUITE, target.name, baseline, variant, (target.dim,), "float32", chains, UNIT, quantity, note=note)


def described(one: Contender) -> str:
    found = one.found
    accepts = "" if found.acceptance != found.acceptance else f", accepts {found.acceptance:.2f}"
    bias = f", biased: {found.bias:.2g} standard deviations, {found.error:.1f} errors" if found.biased else ""
    return f"{one.note}{accepts}, {found.gradients:.3g} gradients a step, least of {found.worst}{bias}"


def block_times(
    contenders: Sequence[Contender], chains: int, settings: Settings
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """The seconds of a step of each in each round, and why others failed. All take turns, in a random order."""
    steps, failed = {}, {}
    for one in contenders:
        try:
            steps[one.name] = max(1, round(settings.block_seconds / one.prepare(chains)))
        except Exception as failure:
            failed[one.name] = reason(failure)
    able = [one for one in contenders if one.name in steps]
    times: dict[str, list[float]] = {one.name: [] for one in able}
    shuffle = random.Random(0).shuffle
    for _ in range(settings.rounds):
        shuffle(able)
        for one in able:
            times[one.name].append(one.block(chains, steps[one.name]) / steps[one.name])
            time.sleep(0.01)  # threads that wait for more work go to sleep meanwhile
    return times, failed


def rows_of(
    target: Target, contenders: Sequence[Contender], chains: int, settings: Settings, notes: Mapping[str, str]
) -> list[Row]:
    """The rows of one target and number of chains: seconds and gradients for an effective sample."""
    times, failed = block_times(contenders, chains, settings)
    seconds = {
        one.name: [value / (chains * one.found.effective) for value in times[one.name]]
        for one in contenders
        if one.name in times
    }
    gradients = {one.name: [one.found.gradients / one.found.effective] for one in contenders}
    rows = [row(target, name, chains, "seconds", note) for name, note in {**notes, **failed}.items()]
    for quantity, values in (("seconds", seconds), ("gradients", gradients)):
        candidates = [one for one in contenders if label(one.name)[0] == OURS and one.name in values]
        candidates = [one for one in candidates if not one.found.biased] or candidates
        base = min(
            (values[one.name] for one in candidates), key=lambda found: sorted(found)[len(found) // 2], default=None
        )
        for one in contenders:
            if one.name in values:
                made = row(target, one.name, chains, quantity, described(one))
                rows.append(made.with_values(values[one.name], base or values[one.name]))
    return rows


def line(rows: Sequence[Row]) -> str:
    """A measured cell in a line for each sampler."""
    lines = []
    for found in rows:
        if found.quantity == "seconds":
            rate = "-" if found.median is None else f"{1 / found.median:12,.0f}/s  ratio {found.ratio:6.2f}"
            name = f"{found.baseline} {found.variant}"
            lines.append(f"{found.case:28} {found.batch:7} {name:22} {rate}  {found.note}")
    return "\n".join(lines)


def run(
    targets: Sequence[Target], chains: Sequence[int], settings: Settings, jax: JaxProcess | None, out: Path | None
) -> list[Row]:
    """Measures targets, prints a line a row, and keeps the rows after each target."""
    facts = machine_facts("cpu") | {"peers": None if jax is None else jax.ask("versions")}
    rows: list[Row] = []
    for target in targets:
        contenders, notes = [], {}
        makers: dict[str, Callable[[], Contender]] = {
            name: partial(contender, target, name, make, settings) for name, make in ours().items()
        }
        for name in PEERS:
            if jax is None:
                notes[name] = "skipped: no --jax-python was given"
            else:
                makers[name] = partial(peer, jax, target, name, settings)
        for name, make in makers.items():
            begun = time.perf_counter()
            try:
                contenders.append(make())
            except Exception as failure:  # what can't run is a result
                notes[name] = reason(failure)
            print(f"{target.name}: {name} tuned in {time.perf_counter() - begun:.1f} s", flush=True)
        fresh: list[Row] = []
        for count in chains:
            fresh += rows_of(target, contenders, count, settings, notes)
            print(line([found for found in fresh if found.batch == count]), flush=True)
        rows += fresh
        if out is not None:
            record(out, Run(facts, tuple(fresh)))
    return rows


def numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise SystemExit(f"{option} must be positive whole numbers with commas between, got {text!r}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jax-python", type=Path, default=None, help="a Python with jax, blackjax and numpyro")
    parser.add_argument("--targets", default="", help="only targets whose names begin so, with semicolons between")
    parser.add_argument("--chains", default="100,1000,10000", help="numbers of chains, with commas between")
    parser.add_argument("--lengths", default="4,8,16", help="evaluations along a trajectory, to choose from")
    parser.add_argument("--threads", type=int, default=2, help="of fastebm, and cores of the peers")
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="timed blocks of each sampler")
    parser.add_argument("--seconds", type=float, default=Settings.block_seconds, help="of a block")
    parser.add_argument("--warm-up", type=int, default=Settings.warm_up, help="steps that tune a sampler")
    parser.add_argument("--traced-steps", type=int, default=Settings.traced_steps, help="of the traces")
    parser.add_argument("--traced-chains", type=int, default=Settings.traced_chains, help="of the traces")
    parser.add_argument("--out", type=Path, default=None, help="a .json file that gets the rows; others stay in it")
    given = parser.parse_args(arguments)
    for option in ("threads", "rounds", "warm_up", "traced_steps", "traced_chains"):
        if getattr(given, option) < 1:
            raise SystemExit(f"--{option.replace('_', '-')} must be at least 1, got {getattr(given, option)}")
    names = [name for name in given.targets.split(";") if name]
    targets = [t for t in TARGETS.values() if not names or t.name.startswith(tuple(names))]
    if not targets:
        raise SystemExit(f"--targets: there is no {given.targets}; there are {'; '.join(TARGETS)}")
    torch.set_num_threads(given.threads)
    settings = Settings(
        given.warm_up,
        given.traced_chains,
        given.traced_steps,
        numbers("--lengths", given.lengths),
        given.seconds,
        given.rounds,
    )
    jax = None if given.jax_python is None else JaxProcess(given.jax_python, given.threads)
    try:
        run(targets, numbers("--chains", given.chains), settings, jax, given.out)
    finally:
        if jax is not None:
            jax.close()


if __name__ == "__main__":
    main()
