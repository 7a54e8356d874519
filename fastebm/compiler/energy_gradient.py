"""`energy_gradient`: energies and their gradient with respect to the input, for any energy, fused or by autograd."""

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastebm.compiler.candidates import FUSED, LANES, STOCK
from fastebm.compiler.compiled_gradient import CHOICE, Chain, CompiledGradient, UnsupportedError
from fastebm.compiler.device_graphs import RepeatedWork, places_of
from fastebm.compiler.faults import users_level
from fastebm.compiler.fingerprint import Fingerprint, covers, fingerprint
from fastebm.compiler.frozen_weights import Evaluated, Place, evaluate_parametrised, frozen_weights
from fastebm.compiler.measuring import Timing
from fastebm.compiler.own_code import Conditions, OwnCode, energy_dtype
from fastebm.compiler.process_state import DeferredInterrupt, exclusive
from fastebm.ops import CompiledLanes, CompiledProgram
from fastebm.ops.backends import content_hash

Energy = Callable[..., Tensor]


class _OfThread(threading.local):
    """What one thread runs: how many `chain()` blocks are open, their one chain, and what froze the weights."""

    def __init__(self) -> None:
        self.state = _ThreadState()


class _ThreadState:
    # Apart from `_OfThread`, because a block may be left in another thread than it was entered in.
    blocks: int = 0
    chain: Chain | None = None
    frozen: AbstractContextManager[None] = nullcontext()
    deferred: DeferredInterrupt | None = None


ENGINES = ("auto", "autograd", "fused", "compile")
# Calls with states that differ at which samples are checked to be independent. At equal ones a gradient may be zero.
CHECKED_CALLS = 1
# Kinds of programs in a sentence.
SPOKEN = {LANES: "a lane program", FUSED: "a fused program", STOCK: "PyTorch's operations"}
DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


def energy_gradient(
    energy: Energy, *, dtype: torch.dtype | None = None, engine: str = "auto", reproducible: bool = True
) -> "EnergyGradient":
    """A callable `x -> (energies, gradient)` for any energy that returns one number per sample. See `EnergyGradient`.

    >>> gradient = energy_gradient(lambda x: 0.5 * x.square().sum(dim=1))
    >>> energies, g = gradient(torch.tensor([[3.0, 4.0]]))
    >>> energies, g
    (tensor([12.5000]), tensor([[3., 4.]]))
    """
    return EnergyGradient(energy, dtype=dtype, engine=engine, reproducible=reproducible)


class EnergyGradient:
    """Energies and their gradient with frozen weights: `energies, gradient = self(x)`.

    Args:
        energy: an `nn.Module`, a bound method of one, any function, or a `functools.partial` of these. It maps x of
            shape (B, ...) to one number per sample, of shape (B,), (B, 1), (B, 1, 1, 1) or the like. Low means likely.
        dtype: `torch.bfloat16` or `torch.float16` runs the energy under autocast to that dtype, `torch.float32` without
            autocast, None in the caller's autocast state. A float16 gradient may underflow: there is no loss scaling.
        engine: "fused" compiles the energy at first use and checks the program against autograd (`CompiledGradient`);
            if that is impossible, the first call raises an error with the reason. "auto" does the same, but falls back
            to autograd, and a warning and `repr` tell the reason. Where the compiler itself failed, that is an error
            with "fused" and a `FaultWarning` with "auto". "autograd" runs autograd, "compile" runs autograd on
            `torch.compile(energy)`.
        reproducible: with engine "auto", the same program runs for any batch, so that its bits are the same in any.
            False measures all programs and autograd on the first states of each shape, for 0.2 seconds and three
            rounds at least, and takes the fastest, whose bits may depend on the batch.

    During a call, or in a whole `chain()` block, the module is in eval mode, its weights need no gradient, and its
    parametrised weights (spectral norm and others of `torch.nn.utils.parametrize`) are evaluated once, without power
    iterations; the fused engine reuses them while a hash of all weights and buffers is unchanged. Afterwards everything
    is restored, also after an exception, and no `.grad` is written. A plain function has no flags to set: nets in its
    closure must be in eval mode already. All of this works under `no_grad` and `inference_mode` too.

    The first call checks that samples are independent: the gradient of the first energy must be exactly zero for all
    other samples. Non-finite energies and gradients are returned as they are, because the sampler or the guard decides
    about them.

    Several threads may use one object, or several over one module or over modules that share parts, at the same time:
    chains run in parallel, with the bits that each has alone. The module stays frozen until the last of them is over.
    First uses wait for one another, because PyTorch can capture only one energy at a time. While any chain runs, no
    thread may train the module: a step of an optimizer over its weights raises RuntimeError in the thread that takes
    it, `train()` at the end of the chain; writes to weights are not noticed. Sample from a copy (`copy.deepcopy`) then.
    Copies, pickles included, capture anew.

    Attributes, which the last call sets:
        engine: "fused", "autograd" or "compile".
        reason: why engine "autograd" runs, or "".
        program: what engine "fused" runs, as `repr` says it: "lane program", "fused program", "PyTorch operations" (a
            program without kernels of ours; `describe` gives the reason), or "" before the first call.
        batch_invariant: whether a sample gets the same bits in any batch: with a lane program or a fused program.

    Raises TypeError and ValueError for invalid arguments, and RuntimeError as described under `engine`.
    """

    def __init__(
        self,
        energy: Energy,
        *,
        dtype: torch.dtype | None = None,
        engine: str = "auto",
        reproducible: bool = True,
    ):
        if not callable(energy):
            raise TypeError(f"energy is a {type(energy).__name__}; it must be a module or a function of x")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype}; it must be one of {', '.join(map(str, DTYPES))}")
        if engine not in ENGINES:
            raise ValueError(f"engine is {engine!r}; it must be one of {', '.join(map(repr, ENGINES))}")
        self.energy = energy
        self.dtype = dtype
        self.reproducible = bool(reproducible)
        self._asked = engine
        self._start()

    def _start(self) -> None:
        """Nothing has run yet."""
        self._may_fall_back = self._asked == "auto"
        self.engine = "fused" if self._asked == "auto" else self._asked
        self.reason = "" if self.engine == "fused" else f"engine is {self._asked!r}"
        self.program = ""
        self.batch_invariant = False
        self._own = OwnCode(self.energy, compiled=self._asked == "compile")
        fused = self._asked == "fused"
        self._compiled = CompiledGradient(self._own, self.dtype, self.reproducible or self._asked != "auto", fused)
        self._calls_to_check = CHECKED_CALLS
        self._said: set[str] = set()
        self._of_thread = _OfThread()
        self._last: tuple[Any, int | None] = (None, None)
        self._evaluated: Evaluated = {}
        self._evaluating = RepeatedWork("the evaluation of parametrised weights")
        self._evaluated_in_place: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which have another module: without what has run."""
        names = ("energy", "dtype", "reproducible")
        return {"engine": self._asked} | {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.energy, self.dtype, self._asked = state["energy"], state["dtype"], state["engine"]
        self.reproducible = state["reproducible"]
        self._start()

    @property
    def name(self) -> str:
        """The energy's name, for messages."""
        return self._own.name

    def __call__(self, x: Tensor, conditions: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """Energies (B,), float32 (float64 for a float64 x), and the gradient, with x's shape and dtype; both detached.

        x is (B, ...) and floating-point, and is not changed; an empty batch gives empty results. `conditions` are
        tensors (B, ...) of any dtype, one row for each sample: `energy(x, *conditions)` is called.

        Raises TypeError for another kind of x, ValueError if the energy is not one number per sample or conditions
        don't have a row for each sample, and RuntimeError if the energy does not depend on x or if samples influence
        each other.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x is {kind}; it must be a floating-point tensor")
        if x.ndim == 0:
            raise ValueError("x has no dimensions; its first one must be the batch")
        given = as_conditions(conditions, x.shape[0])
        if x.shape[0] == 0:
            return x.new_empty(0, dtype=energy_dtype(x)), torch.empty_like(x)
        chain = self._of_thread.state.chain
        if chain is not None:
            return self._evaluate(x, given, chain)
        with self.chain():
            begun = self._of_thread.state.chain
            assert begun is not None
            result = self._evaluate(x, given, begun)
            self.leave_soon()
            return result

    @contextmanager
    def chain(self) -> Iterator["EnergyGradient"]:
        """A block of calls with frozen weights: flags are set and weights evaluated once, instead of in every call.

        Inside, the module must not be trained, given other weights or deep-copied. Blocks of one thread that nest or
        overlap, as those of asyncio tasks may, are one chain, which lasts until the last of them is left. A block may
        be left in another thread, as that of a generator may; calls in that thread are chains of their own.
        """
        state = self._of_thread.state
        with ExitStack() as undo:
            with exclusive():
                if state.blocks == 0:
                    self._begin(state)
                state.blocks += 1
                undo.push(functools.partial(_leave, state))
            yield self

    def leave_soon(self) -> None:
        """To be called last in a `chain()` block: a Ctrl-C waits until the block is left.

        Within the few instructions of Python between the two, it would keep the module frozen.
        """
        state = self._of_thread.state
        if state.blocks and state.deferred is None:
            state.deferred = DeferredInterrupt()
            state.deferred.__enter__()

    def _begin(self, state: _ThreadState) -> None:
        current = self._fingerprint_and_hash()
        if current[1] is None or current != self._last:
            self._evaluated = {}  # a new one, because another thread's chain may have begun with the old one
        self._last = current
        module = self._own.module
        covered = covers(self._own.energy, module)
        evaluating = functools.partial(self._evaluate_weights, current[0] if covered else None)
        frozen = nullcontext() if module is None else frozen_weights(module, self._evaluated, evaluating)
        frozen.__enter__()
        state.frozen, state.chain = frozen, Chain(*current, covered=covered)

    def _evaluate_weights(self, settings: Fingerprint | None, weights: Sequence[Place]) -> list[Tensor]:
        """Parametrised weights, on a GPU by a graph where all that they may be evaluated from lies where it lay before.

        `settings` are the fingerprint of an energy that reads nothing else, None for others. A graph writes to the
        places of an earlier chain's weights. No other chain reads these any more: one that is under way holds the
        module's parts, whose weights then are not evaluated anew.
        """
        module = self._own.module
        lie = None if module is None or settings is None else places_of(_tensors(module))
        kind = None if lie is None else (settings, lie, tuple((id(part), name) for part, name in weights))
        if self._evaluating.replay(kind):
            return self._evaluated_in_place
        values = evaluate_parametrised(weights)
        if kind is not None:
            device = values[0].device
            again = self._evaluating.capture(kind, device, lambda: evaluate_parametrised(weights))
            self._evaluated_in_place = [] if again is None else again
        return self._evaluated_in_place or values

    def _fingerprint_and_hash(self) -> tuple[Any, int | None]:
        """The energy's fingerprint and a hash of the module's weights, each None if it is unknown."""
        if self.engine in ("autograd", "compile") and not self._compiled.has_programs():
            return None, None
        module = self._own.module
        tensors = [] if module is None else _tensors(module)
        inference = any(tensor.is_inference() for tensor in tensors)
        return fingerprint(self._own.energy, module), None if inference else content_hash(tensors)

    def unsettled(self, x: Tensor, conditions: Sequence[Tensor] = ()) -> bool:
        """Whether the next call in this `chain()` block checks more than others do, and so has to be a call of its own.

        That is where the first states were equal, or where it was not shown yet that samples are independent.
        """
        chain = self._of_thread.state.chain
        if self._asked in ("autograd", "compile") or chain is None:
            return False
        unchecked = self._calls_to_check > 0 and x.shape[0] > 1
        return unchecked or self._compiled.unsettled(x, tuple(conditions), chain)

    def ready(self, x: Tensor, conditions: Sequence[Tensor] = ()) -> bool:
        """Whether a program that was checked before serves this `chain()` block from its first update on.

        That is where nothing has to be compared at x: the energy is one that its fingerprint and weights tell all of.
        The program's constants are those of this chain then, as after a call.
        """
        chain = self._of_thread.state.chain
        if self._asked in ("autograd", "compile") or chain is None or not len(x):
            return False
        if (self._calls_to_check and x.shape[0] > 1) or not self._compiled.ready(x, tuple(conditions), chain):
            return False
        self._note_program(x, tuple(conditions), chain)
        return True

    def keeps(self, program: CompiledProgram) -> bool:
        """Whether `program` may serve other chains."""
        return self._compiled.keeps(program)

    def compiled_program(self, x: Tensor, conditions: Sequence[Tensor] = ()) -> CompiledProgram | CompiledLanes | None:
        """The fused program that ran on samples like x in this `chain()` block, None if something else ran.

        Captured graphs, and whole chains in one call, run it themselves. During a chain it is one object, with its
        constants at the same addresses. It also is in later chains while the energy's fingerprint is unchanged, except
        where chains of several threads overlap and weights may differ. Read `workspace`, which each thread has its own
        of, after calling `code(batch)`, which may enlarge it.
        """
        chain = self._of_thread.state.chain
        return None if chain is None else self._compiled.compiled_program(x, tuple(conditions), chain)

    def __repr__(self) -> str:
        """The engine, the energy, the dtype and the kind of program; for autograd why nothing faster runs."""
        text = self._text("{engine} gradient of {name} ({dtype})")
        return f"{text} by {SPOKEN[self.program]}" if self.program else text

    @property
    def variant(self) -> str:
        """The engine and the dtype, for tables: "fused, bfloat16"."""
        return self._text("{engine}, {dtype}")

    def _text(self, template: str) -> str:
        dtype = "dtype follows autocast" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        text = template.format(engine=self.engine, name=self.name, dtype=dtype)
        if self.engine == "autograd":
            return f"{text}; not fused: {self.reason}"
        return text

    def describe(self) -> str:
        """The `repr`, and a table of every program so far: operations, shapes, FLOPs, bytes and the roofline.

        The last line of a table is "runs on fused kernels", with their backend, or "runs on PyTorch operations", with
        the reason. A lane program is a list of its instructions.
        """
        return "\n".join(filter(None, [repr(self), self._compiled.describe()]))

    def timings(self, x: Tensor, conditions: Sequence[Tensor] = ()) -> list[Timing]:
        """Every way to run the energy on samples like x, `torch.compile` included, measured in turns on x itself.

        `chosen` says how this gradient runs them. With engine "fused" and "auto" only.
        """
        if self._asked not in ("auto", "fused"):
            raise ValueError(f"engine is {self._asked!r}; timings are of what 'auto' chooses from")
        given = as_conditions(conditions, x.shape[0])
        with self.chain():
            chain = self._of_thread.state.chain
            assert chain is not None
            return self._compiled.timings(x, given, chain)

    def _evaluate(self, x: Tensor, conditions: Conditions, chain: Chain) -> tuple[Tensor, Tensor]:
        if self._calls_to_check and x.shape[0] > 1:
            left, self._calls_to_check = self._calls_to_check, CHECKED_CALLS  # anew after a refusal
            self._own.check_independence(x, conditions, self.dtype)
            self._calls_to_check = left - 1 if bool((x[1:] != x[:1]).any()) else left
        if self._asked in ("autograd", "compile") or (chain.refused is not None and chain.refused == _kind(x)):
            return self._own.by_autograd(x, conditions, self.dtype)
        return self._by_program(x, conditions, chain)

    def _by_program(self, x: Tensor, conditions: Conditions, chain: Chain) -> tuple[Tensor, Tensor]:
        try:
            result = self._compiled(x, conditions, chain)
        except UnsupportedError as error:
            if not self._may_fall_back:
                raise RuntimeError(
                    f"engine is 'fused', but no fused program exists for {self.name}: {error}; "
                    "engines 'auto' and 'autograd' can run it by autograd"
                ) from error
            self.engine, self.reason, self.program, self.batch_invariant = "autograd", str(error), "", False
            if error.node == CHOICE:
                self.reason = error.reason
            elif not self._compiled.faults.reported(error):
                self._say(self.reason)
            chain.refused = _kind(x)
            return self._own.by_autograd(x, conditions, self.dtype)
        self._note_program(x, conditions, chain)
        return result

    def _note_program(self, x: Tensor, conditions: Conditions, chain: Chain) -> None:
        self.engine, self.reason = "fused", ""
        self.program, stock = self._compiled.kind(x, conditions, chain)
        self.batch_invariant = not stock
        # On a CPU a lane program takes what a fused one does not; a GPU has none, and nobody sees the fallback.
        if stock and self._asked == "auto" and x.is_cuda and x.ndim == 4 and x.dtype is torch.float32:
            self._say(stock, "on PyTorch's operations", " or 'fused'")

    def _say(self, reason: str, how: str = "by autograd", others: str = "") -> None:
        """A fallback is said once for each reason."""
        if reason not in self._said:
            warnings.warn(
                f"{self.name} runs {how} instead of a fused program, which is slower, and its bits depend on the "
                f"batch: {reason} (engine='autograd'{others} asks for that without this warning)",
                RuntimeWarning,
                stacklevel=users_level(),
            )
            self._said.add(reason)  # not where the warning was an error


def _kind(x: Tensor) -> tuple[Any, ...]:
    """What decides within a chain whether there is a program."""
    return x.shape, x.dtype, x.device, torch.is_autocast_enabled(x.device.type)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and tensors that a module's parts keep as plain attributes."""
    plain = (value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor))
    return [*module.parameters(), *module.buffers(), *plain]


def as_conditions(conditions: Any, count: int) -> Conditions:
    """`conditions`, a tensor or several, as a tuple of tensors with `count` rows; one row serves all samples.

    Raises TypeError or ValueError for anything else.
    """
    if isinstance(conditions, tuple) and not conditions:
        return ()
    given = (conditions,) if isinstance(conditions, Tensor) else tuple(() if conditions is None else conditions)
    if any(isinstance(each, Tensor) and each.ndim and len(each) == 1 != count for each in given):
        given = tuple(each.expand(count, *each.shape[1:]) if len(each) == 1 else each for each in given)
    for condition in given:
        if not isinstance(condition, Tensor):
            raise TypeError(f"conditions must be tensors, got {type(condition).__name__}")
        if condition.ndim == 0 or condition.shape[0] != count:
            raise ValueError(
                f"a condition has one row for each of {count} samples, got a tensor of shape {tuple(condition.shape)}"
            )
    return given


def _leave(state: _ThreadState, *exception: Any) -> None:
    """Leave a block: the last one ends the chain and restores the module's flags."""
    deferred, state.deferred = state.deferred, None
    try:
        with exclusive():
            state.blocks -= 1
            if state.blocks == 0 and state.chain is not None:
                chain, state.chain = state.chain, None
                chain.close()
                state.frozen.__exit__(*exception)
    finally:
        if deferred is not None:
            deferred.__exit__()
