"""Energy gradients by compiled programs: captured, rewritten and checked at first use, then run without autograd."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastebm.compiler.autodiff import differentiate
from fastebm.compiler.candidates import Candidate, Executor, ProgramKey, candidates
from fastebm.compiler.capture import UnsupportedError
from fastebm.compiler.checks import (
    UNKNOWN,
    Agreement,
    DisagreementError,
    Reference,
    check_program,
    energies_agree,
    gradient_agrees,
    reference,
    shaken_by_rounding,
    unless_it_raises,
)
from fastebm.compiler.executor import AtenExecutor, CompiledExecutor
from fastebm.compiler.faults import CompilerFaultError, Faults, described
from fastebm.compiler.fingerprint import Fingerprint, changed, structure
from fastebm.compiler.lanes import LaneExecutor
from fastebm.compiler.measuring import Timing, as_in_a_chain, measured
from fastebm.compiler.own_code import Conditions, OwnCode, energy_dtype
from fastebm.compiler.precision import without_autocast
from fastebm.compiler.process_state import DeferredInterrupt, collecting_garbage, exclusive
from fastebm.compiler.program import Program
from fastebm.compiler.report import describe
from fastebm.compiler.roofline import measured_peak_rates
from fastebm.ops import CompiledLanes, CompiledProgram
from fastebm.ops.backends import content_hash, select_backend

__all__ = ["Chain", "CompiledGradient", "UnsupportedError"]

# Programs that one gradient keeps, each for another sample shape, dtype, device or precision.
MAX_PROGRAMS = 64
# States with which a program of an energy is checked that reads nothing but x and weights.
CHECKED_STATES = 3
# The largest whole number of a condition: lane programs compute with float32.
MOST_WHOLE = 1 << 24
# The node of a refusal that is a choice.
CHOICE = "choice"
# Chains in a row that each find another energy. After that many, captures cost more than they save.
MAX_MOVES = 8


@dataclass
class _Compiled:
    """A checked program, as captured and as it runs; without an executor, the node and the reason why there is none.

    `fingerprint` is the energy's when it was last checked, `structure` that at capture, `weights` a hash of the weights
    at the last refresh (None if unknown), `fallback_reason` says why the program runs on PyTorch's operations, if it
    does, `chains` counts the chains that read its constants now, `moves` those in a row that found it outdated,
    `of_one_chain` is set where a chain has constants of its own, `function` tells of a backward pass written by hand,
    whose settings no energy shows, and `harmless` names the entries of the fingerprint that changed without changing
    the program.
    """

    fingerprint: Fingerprint | None
    structure: Any
    captured: Program | None = None
    executor: Executor | None = None
    fallback_reason: str = ""
    unsupported: tuple[str, str] = ("program", "there is none")
    agreement: Agreement = UNKNOWN
    weights: tuple[int, int] | None = None
    chains: int = 0
    moves: int = 0
    of_one_chain: bool = False
    function: str = ""
    harmless: frozenset[tuple[str, ...]] = frozenset()


class Chain:
    """One chain in one thread: the energy's fingerprint and a hash of its weights, and the programs that it runs.

    `covered` says that the energy reads nothing beside what these two cover, so that equal ones mean an equal energy.
    `refused` is the kind of samples, as `EnergyGradient` tells them apart, for which there was no program. `looks` are
    the batches at which each program was compared with the energy's own code, `unsettled` the programs for which that
    was at states that say little, and is done once more.
    """

    def __init__(self, fingerprint: Fingerprint | None, weights: int | None, covered: bool):
        self.fingerprint = fingerprint
        self.weights = weights
        self.covered = covered
        self.refused: Any = None
        self.programs: dict[ProgramKey, _Compiled] = {}
        self.looks: dict[ProgramKey, set[int]] = {}
        self.unsettled: set[ProgramKey] = set()
        self._bound: dict[ProgramKey, tuple[Conditions, int | None, Executor]] = {}

    def bound(self, key: ProgramKey, executor: Executor, conditions: Conditions) -> Executor:
        """The executor for these conditions; the same one while they are the same tensors, and unchanged."""
        content = None if any(each.is_inference() for each in conditions) else content_hash(conditions)
        known = self._bound.get(key)
        same = known is not None and content is not None and known[1] == content and len(known[0]) == len(conditions)
        if known is None or not (same and all(a is b for a, b in zip(known[0], conditions, strict=True))):
            known = self._bound[key] = (conditions, content, _bound(executor, conditions))
        return known[2]

    def close(self) -> None:
        """The chain is over: it reads no constants any more."""
        with exclusive():
            for compiled in self.programs.values():
                compiled.chains -= 1
            self.programs.clear()


class CompiledGradient:
    """Energies and gradient of one energy, `energies, gradient = self(x, ...)`, by one program for each kind of x.

    A program is captured at the first call with a new sample shape, dtype, device or precision, and compared with
    autograd at the given samples. It reads the weights anew in every `Chain`: a program is reused as it is while a hash
    of the module's weights, and that of the tensors that it keeps by reference, are known and unchanged. The
    `MAX_PROGRAMS` that were used last are kept.

    The energy's own code may read anything. At the start of every chain, a program is therefore compared with it at the
    chain's first states: the energies, or the gradient too, and once more after the first update, where all states are
    equal, so that the energies say little. Where the fingerprint (settings of modules, closures, objects that the code
    refers to) has changed, the energy is captured anew; an entry that leaves the program as it was, such as a counter,
    may change from then on. A program that differs is captured anew, too; if that one differs as well, or if the
    energy moves in chain after chain, autograd runs. Only an energy that consists of PyTorch's and fastebm's own
    modules, and so can't read anything else, is not compared while the fingerprint is the same.

    Chains in several threads run the same programs at the same time. Constants that another chain reads are never
    written: where the weights may differ from them, the later chain gets constants of its own.

    Most programs run by `fastebm::run_program` or `run_lanes`, with the same bits for any batch and number of threads.
    Programs with an operation that these have no instruction for run on PyTorch's operations; `describe` says why.
    Those use library convolutions, which may sum in another order for another batch size, so their results agree only
    to rounding.

    Args:
        own: the energy's own code.
        dtype: that of the operations, or None to follow the caller's autocast state; float64 samples always run in
            float64.
        reproducible: the best batch-invariant program runs, whatever the batch. Otherwise all programs and autograd are
            measured on the first states of each shape, and the fastest one runs.
        strict: whether a fault of the compiler is an error (RuntimeError) instead of a warning, after which the next
            best program runs, or UnsupportedError says that there is none.
    """

    def __init__(self, own: OwnCode, dtype: torch.dtype | None, reproducible: bool = True, strict: bool = False):
        self.own = own
        self.dtype = dtype
        self.reproducible = reproducible
        self.faults = Faults(own.name, strict)
        self._programs: dict[ProgramKey, _Compiled] = {}

    def __call__(self, x: Tensor, conditions: Conditions, chain: Chain) -> tuple[Tensor, Tensor]:
        """Energies (B,), float32 or float64, and the gradient, with x's dtype and strides; both new tensors.

        Raises UnsupportedError with the node and the reason if the energy has no program.
        """
        key = self._key(x, conditions)
        with torch.inference_mode(False), torch.no_grad(), without_autocast(x.device.type):
            compiled, found = chain.programs.get(key), None
            if compiled is None or self._looks(key, x, chain):
                compiled, found = self._acquire(key, x, conditions, chain)
            if compiled.executor is None:
                raise UnsupportedError(*compiled.unsupported)
            if found is None:
                executor = chain.bound(key, compiled.executor, conditions) if conditions else compiled.executor
                found = executor(x)
            energies, gradient = found
            if not isinstance(compiled.executor, AtenExecutor):
                return energies, gradient if gradient.stride() == x.stride() else torch.empty_like(x).copy_(gradient)
            return (
                energies.to(energy_dtype(x), copy=True),
                torch.empty_like(x, requires_grad=False).copy_(gradient),
            )

    def describe(self) -> str:
        """All programs so far as tables, with the roofline of this machine."""
        texts = []
        for key, compiled in list(self._programs.items()):
            if isinstance(compiled.executor, LaneExecutor):
                texts.append(compiled.executor.describe())
            elif compiled.captured is not None and compiled.executor is not None:
                before = differentiate(compiled.captured)
                rates = measured_peak_rates(key.device, key.compute_dtype)
                text = describe(before, compiled.executor.program, key.compute_dtype, rates)
                texts.append(f"{text}\nruns {_how(key, compiled)}")
        return "\n\n".join(texts)

    def kind(self, x: Tensor, conditions: Conditions, chain: Chain) -> tuple[str, str]:
        """What ran on samples like x in this chain: its name, as `Timing` has it, and why PyTorch's operations did."""
        compiled = chain.programs[self._key(x, conditions)]
        assert compiled.executor is not None
        return Candidate(compiled.executor).name, compiled.fallback_reason

    def compiled_program(
        self, x: Tensor, conditions: Conditions, chain: Chain
    ) -> CompiledProgram | CompiledLanes | None:
        """The fused program that ran on samples like x in this chain, if one did."""
        key = self._key(x, conditions)
        compiled = chain.programs.get(key)
        executor = compiled.executor if compiled is not None else None
        if executor is not None and conditions:
            executor = chain.bound(key, executor, conditions)
        return None if executor is None or isinstance(executor, AtenExecutor) else executor.compiled

    def ready(self, x: Tensor, conditions: Conditions, chain: Chain) -> bool:
        """Whether a program serves x in this chain with nothing to be compared; it is up to date then."""
        key = self._key(x, conditions)
        if not chain.covered:
            return False
        with torch.inference_mode(False), torch.no_grad(), without_autocast(x.device.type):
            if key not in chain.programs:
                known = self._programs.get(key)
                if known is None or known.executor is None or known.fingerprint != chain.fingerprint:
                    return False
                self._acquire(key, x, conditions, chain)
            return chain.programs[key].executor is not None

    def keeps(self, program: CompiledProgram) -> bool:
        """Whether `program` may serve other chains."""
        kept = (compiled.executor for compiled in list(self._programs.values()))
        return any(isinstance(each, CompiledExecutor) and each.compiled is program for each in kept)

    def has_programs(self) -> bool:
        """Whether any kind of x has a program."""
        return any(compiled.executor is not None for compiled in list(self._programs.values()))

    def _key(self, x: Tensor, conditions: Conditions) -> ProgramKey:
        kinds = tuple((each.shape[1:], each.dtype, _is_large(each)) for each in conditions)
        batch = None if self.reproducible else x.shape[0]
        return ProgramKey(x.shape[1:], x.dtype, x.device, _compute_dtype(x, self.dtype), kinds, batch)

    def unsettled(self, x: Tensor, conditions: Conditions, chain: Chain) -> bool:
        """Whether the next call compares the program of samples like x once more."""
        return self._key(x, conditions) in chain.unsettled

    def _looks(self, key: ProgramKey, x: Tensor, chain: Chain) -> bool:
        """Whether a program that this chain has is to be compared at x: at another batch, or once more."""
        return not chain.covered and (key in chain.unsettled or x.shape[0] not in chain.looks.get(key, ()))

    def _acquire(
        self, key: ProgramKey, x: Tensor, conditions: Conditions, chain: Chain
    ) -> tuple[_Compiled, list[Tensor] | None]:
        """The program of `key` for `chain`, up to date with the energy and its weights, and what it gives, if known."""
        with exclusive(defer=False):
            running = chain.programs.get(key)
            compiled = kept = running or self._programs.pop(key, None)
            found = None
            if compiled is not None and compiled.executor is not None:
                compiled, found = self._up_to_date(compiled, key, x, conditions, chain)
            elif compiled is None or compiled.structure != structure(self.own.energy, self.own.module):
                compiled = self._compile(key, x, conditions, chain)
            while len(self._programs) >= MAX_PROGRAMS:
                del self._programs[next(iter(self._programs))]
            kept = kept if compiled.of_one_chain else compiled
            if kept is not None and kept.structure is not None and not kept.of_one_chain:
                self._programs[key] = kept  # last in order: the first one is the least recently used
            if compiled is not running:
                compiled.chains += 1
                if running is not None:
                    running.chains -= 1
                chain.programs[key] = compiled
            again = not chain.covered and key not in chain.looks and not _informative(x)
            chain.looks.setdefault(key, set()).add(x.shape[0])
            (chain.unsettled.add if again else chain.unsettled.discard)(key)
            return compiled, found

    def _up_to_date(
        self, compiled: _Compiled, key: ProgramKey, x: Tensor, conditions: Conditions, chain: Chain
    ) -> tuple[_Compiled, list[Tensor] | None]:
        """`compiled` with the weights of this chain, or what was captured anew because the energy has moved.

        Moreover what it gives at x, where that was computed.
        """
        moved = (
            frozenset()
            if compiled.fingerprint == chain.fingerprint
            else changed(compiled.fingerprint, chain.fingerprint)
        )
        refreshed = compiled if chain.programs.get(key) is compiled else self._refreshed(compiled, chain)
        if refreshed is not None and moved <= compiled.harmless:
            found = None if chain.covered and not moved else self._agrees(refreshed, key, x, conditions)
            if found is not None or (chain.covered and not moved):
                refreshed.fingerprint, refreshed.moves = chain.fingerprint, 0
                return refreshed, found
        moves = compiled.moves + 1
        if moves > MAX_MOVES:
            reason = (
                f"it changed between each two of the last {moves} chains, and each change needs a new program (keep "
                "what changes in a tensor and write it in place, as with fill_, or hand it over as a condition)"
            )
            now = structure(self.own.energy, self.own.module)
            return _Compiled(chain.fingerprint, now, unsupported=("energy", reason)), None
        made = self._compile(key, x, conditions, chain)
        made.harmless = compiled.harmless
        if refreshed is not None and _same_program(made.executor, refreshed.executor):
            refreshed.harmless |= moved
            refreshed.fingerprint, refreshed.agreement, refreshed.moves = chain.fingerprint, made.agreement, 0
            return refreshed, None
        made.moves = moves
        return made, None

    def _refreshed(self, compiled: _Compiled, chain: Chain) -> _Compiled | None:
        """`compiled` with the weights of this chain; None if the energy has others than those that it reads."""
        weights = _weights_hash(compiled, chain)
        if weights is not None and weights == compiled.weights:
            return compiled
        executor = compiled.executor
        assert executor is not None
        if compiled.chains:
            executor = executor.with_own_weights()
            compiled = replace(compiled, executor=executor, chains=0, of_one_chain=True)
        compiled.weights = None  # unknown if this fails
        try:
            executor.refresh()
        except Exception:
            return None  # weights are gone or have other shapes; if it is a fault, the program made anew meets it too
        compiled.weights = weights
        return compiled

    def _agrees(self, compiled: _Compiled, key: ProgramKey, x: Tensor, conditions: Conditions) -> list[Tensor] | None:
        """What the program gives at x, if that is what the energy's own code does; None if it is not."""
        assert compiled.executor is not None
        found, autocast = _bound(compiled.executor, conditions)(x), _autocast_dtype(compiled.executor, key)
        if not compiled.function and _informative(x):
            own = self.own.energies(x, conditions, autocast)
            if energies_agree(found[0], own, compiled.executor.dtype, compiled.agreement):
                return found
        by_autograd = self.own.by_autograd(x, conditions, autocast)
        return found if gradient_agrees(found, by_autograd, compiled.executor.dtype, compiled.agreement) else None

    def _compile(self, key: ProgramKey, x: Tensor, conditions: Conditions, chain: Chain) -> _Compiled:
        with DeferredInterrupt(), collecting_garbage():
            compiled = self._checked(key, x, conditions, chain)
        compiled.weights = _weights_hash(compiled, chain)
        return compiled

    def _checked(self, key: ProgramKey, x: Tensor, conditions: Conditions, chain: Chain) -> _Compiled:
        known = chain.fingerprint, structure(self.own.energy, self.own.module)
        whole = x, conditions
        if chain.covered:  # what can't know the batch is checked with a few of its states, which takes less memory
            x, conditions = x[:CHECKED_STATES], tuple(condition[:CHECKED_STATES] for condition in conditions)
        # Autograd first, so that an x which the energy does not accept raises the energy's own error.
        try:
            expected = reference(self.own, x, conditions, key.compute_dtype)
        except UnsupportedError as error:
            return _Compiled(*known, unsupported=(error.node, error.reason))
        if not bool((expected.energies.isfinite() & expected.gradient.isfinite().reshape(x.shape[0], -1).all(1)).any()):
            unchecked = "at none of the first states are energy and gradient finite, so that no program can be checked"
            return _Compiled(chain.fingerprint, None, unsupported=("energy", unchecked))  # not remembered
        found: list[_Compiled] = []
        refused = []
        wrong: list[CompilerFaultError] = []
        for name, made in self._tried(key, x, conditions, expected):
            if isinstance(made, UnsupportedError):
                if isinstance(made, CompilerFaultError):
                    self.faults.report(made)
                elif isinstance(made, DisagreementError):
                    wrong.append(CompilerFaultError(name, ArithmeticError(made.difference)))
                refused.append((made.node, made.reason))
                continue
            if wrong and not shaken_by_rounding(self.own, x, conditions, expected):
                for fault in wrong:  # the energy has a program, so that one with other numbers is a fault
                    self.faults.report(fault)
            wrong.clear()
            compiled = _Compiled(*known, made[0].captured, made[0].executor, made[0].fallback_reason)
            compiled.agreement, compiled.function = made[1], expected.function
            found.append(compiled)
            if self.reproducible:
                return compiled
        if not found:
            return _Compiled(*known, unsupported=refused[0])
        seconds = self._times(found, *whole)
        best = seconds.index(min(seconds))
        if best < len(found):
            return found[best]
        count, others = len(whole[0]), min(seconds[:-1])
        faster = f"it was the fastest: {seconds[-1]:.3g} s for {count} samples, {others:.3g} s by a program"
        return _Compiled(*known, unsupported=(CHOICE, faster))

    def _tried(
        self, key: ProgramKey, x: Tensor, conditions: Conditions, expected: Reference
    ) -> Iterator[tuple[str, tuple[Candidate, Agreement] | UnsupportedError]]:
        """Candidates by name, each checked, or why there is none. Made one by one, when they are asked for."""

        def elsewhere(at: Tensor) -> Reference | None:
            return unless_it_raises(lambda: reference(self.own, at, conditions, key.compute_dtype))

        for made in candidates(self.own.original, self.own.module, key, x, conditions, expected.function):
            if isinstance(made, UnsupportedError):
                yield made.node, made
                continue
            try:
                made.executor.refresh()
                yield made.name, (made, check_program(_bound(made.executor, conditions), x, expected, elsewhere))
            except UnsupportedError as refused:
                yield made.name, refused
            except Exception as error:
                yield made.name, CompilerFaultError(made.name, error)

    def _times(self, found: list[_Compiled], x: Tensor, conditions: Conditions) -> list[float]:
        """Seconds of each program, and of autograd."""
        executors = [compiled.executor for compiled in found if compiled.executor is not None]
        runs = [as_in_a_chain(_bound(executor, conditions), x) for executor in executors]
        by_autograd = functools.partial(self.own.by_autograd, x, conditions, self.dtype)
        return measured([*runs, by_autograd], x.device)

    def timings(self, x: Tensor, conditions: Conditions, chain: Chain) -> list[Timing]:
        """All ways to run the energy on samples like x, measured in turns on x; `chosen` is what this one takes."""
        key = self._key(x, conditions)
        with torch.inference_mode(False), torch.no_grad(), without_autocast(x.device.type), exclusive():
            chosen = (chain.programs.get(key) or self._acquire(key, x, conditions, chain)[0]).executor
            expected = reference(self.own, x, conditions, key.compute_dtype)
            tried = list(self._tried(key, x, conditions, expected))
            running = {name: made[0] for name, made in tried if not isinstance(made, UnsupportedError)}
            runs = [as_in_a_chain(_bound(each.executor, conditions), x) for each in running.values()]
            compiled = OwnCode(self.own.original, compiled=True)
            others = {"autograd": self.own, "torch.compile": compiled}
            for own in others.values():
                runs.append(functools.partial(own.by_autograd, x, conditions, self.dtype))
            refused = {name: str(made) for name, made in tried if isinstance(made, UnsupportedError)}
            try:
                runs[-1]()
            except Exception as error:  # whatever the compiler of others raises
                refused["torch.compile"] = described(error)
                runs.pop()
                del others["torch.compile"]
            seconds = measured(runs, x.device)
        names = [*running, *others]
        kinds = {name: type(each.executor) for name, each in running.items()}
        return [
            *(
                Timing(
                    name,
                    spent,
                    name in running and running[name].batch_invariant,
                    kinds.get(name) is type(chosen) if chosen is not None else name == "autograd",
                )
                for name, spent in zip(names, seconds, strict=True)
            ),
            *(Timing(name, None, False, refused=reason) for name, reason in refused.items()),
        ]


def _how(key: ProgramKey, compiled: _Compiled) -> str:
    """How a program of this kind runs now, for people."""
    if compiled.fallback_reason:
        return f"on PyTorch operations: {compiled.fallback_reason}"
    try:
        return f"on fused kernels, backend {select_backend(key.device.type, kernel='run_program')}"
    except RuntimeError as error:  # asked for since it was made
        return f"on fused kernels: {error}"


def _is_large(condition: Tensor) -> bool:
    """Whether a condition has whole numbers that float32 can't hold."""
    whole = not condition.is_floating_point() and not condition.is_complex() and condition.dtype is not torch.bool
    # Programs with conditions run on the CPU alone: on a GPU, nobody asks, and no chain waits for the answer.
    return whole and condition.is_cpu and condition.numel() > 0 and bool((condition.abs() > MOST_WHOLE).any())


def _same_program(a: Executor | None, b: Executor | None) -> bool:
    """Whether two executors with the weights of one chain compute the same."""
    if isinstance(a, LaneExecutor) and isinstance(b, LaneExecutor):
        return a.compiled.same_as(b.compiled)
    if isinstance(a, CompiledExecutor) and isinstance(b, CompiledExecutor):
        return a.compiled.same_as(b.compiled)
    return False


def _informative(x: Tensor) -> bool:
    """Whether samples, or the numbers of a single one, differ. Where all are equal, energies say little."""
    if x.shape[0] == 1:
        return bool((x != x.flatten()[0]).any())
    return bool((x[-1] != x[0]).any()) or bool((x[1:] != x[:1]).any())


def _bound(executor: Executor, conditions: Conditions) -> Executor:
    return executor.bound(conditions) if conditions and isinstance(executor, LaneExecutor) else executor


def _autocast_dtype(executor: Executor, key: ProgramKey) -> torch.dtype:
    """That to which autocast has to be set for the energy's own code to compute as the program does."""
    dtype = executor.dtype if isinstance(executor, LaneExecutor) else key.compute_dtype
    return torch.float32 if dtype is torch.float64 else dtype


def _weights_hash(compiled: _Compiled, chain: Chain) -> tuple[int, int] | None:
    """Hashes of all numbers from which the program's weights are evaluated; None if they are unknown."""
    if chain.weights is None or compiled.executor is None or isinstance(compiled.executor, AtenExecutor):
        return None
    others = content_hash(compiled.executor.referenced)
    return None if others is None else (chain.weights, others)


def _compute_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if x.dtype is torch.float64 or dtype is torch.float32:
        return x.dtype
    if dtype is not None:
        return dtype
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
