"""`energy_gradient`: energies and their gradient with respect to the input, for any energy, fused or by autograd."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastebm.compiler.compiled_gradient import Chain, CompiledGradient, UnsupportedError
from fastebm.compiler.fingerprint import fingerprint
from fastebm.compiler.frozen_weights import Evaluated, frozen_weights
from fastebm.compiler.precision import autocast_to, without_autocast
from fastebm.compiler.process_state import evaluating, exclusive
from fastebm.ops import CompiledLanes, CompiledProgram
from fastebm.ops.backends import content_hash

Energy = Callable[[Tensor], Tensor]


class _OfThread(threading.local):
    """What one thread runs: how many `chain()` blocks are open, their one chain, and what froze the weights."""

    def __init__(self) -> None:
        self.state = _ThreadState()


class _ThreadState:
    # Apart from `_OfThread`, because a block may be left in another thread than it was entered in.
    blocks: int = 0
    chain: Chain | None = None
    frozen: AbstractContextManager[None] = nullcontext()


ENGINES = ("auto", "autograd", "fused")
DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


def energy_gradient(energy: Energy, *, dtype: torch.dtype | None = None, engine: str = "auto") -> "EnergyGradient":
    """A callable `x -> (energies, gradient)` for any energy that returns one number per sample. See `EnergyGradient`.

    >>> gradient = energy_gradient(lambda x: 0.5 * x.square().sum(dim=1))
    >>> energies, g = gradient(torch.tensor([[3.0, 4.0]]))
    >>> energies, g
    (tensor([12.5000]), tensor([[3., 4.]]))
    """
    return EnergyGradient(energy, dtype=dtype, engine=engine)


class EnergyGradient:
    """Energies and their gradient with frozen weights: `energies, gradient = self(x)`.

    Args:
        energy: an `nn.Module`, a bound method of one, any function, or a `functools.partial` of these. It maps x of
            shape (B, ...) to one number per sample, of shape (B,), (B, 1), (B, 1, 1, 1) or the like. Low means likely.
        dtype: `torch.bfloat16` or `torch.float16` runs the energy under autocast to that dtype, `torch.float32` without
            autocast, None in the caller's autocast state. A float16 gradient may underflow: there is no loss scaling.
        engine: "fused" compiles the energy at first use and checks the program against autograd (`CompiledGradient`);
            if that is impossible, the first call raises an error with the reason. "auto" does the same, but falls back
            to autograd, and `repr` tells the reason. "autograd" runs autograd.

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

    Raises TypeError and ValueError for invalid arguments, and RuntimeError as described under `engine`.
    """

    def __init__(self, energy: Energy, *, dtype: torch.dtype | None = None, engine: str = "auto"):
        if not callable(energy):
            raise TypeError(f"energy is a {type(energy).__name__}; it must be a module or a function of x")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype}; it must be one of {', '.join(map(str, DTYPES))}")
        if engine not in ENGINES:
            raise ValueError(f"engine is {engine!r}; it must be one of {', '.join(map(repr, ENGINES))}")
        self.energy = energy
        self.dtype = dtype
        self.name, self._module = _name_and_module(energy)
        self._asked = engine
        self._start()

    def _start(self) -> None:
        """Nothing has run yet."""
        self._may_fall_back = self._asked == "auto"
        self.engine = "fused" if self._asked == "auto" else self._asked
        self.reason = "" if self.engine == "fused" else f"engine is {self._asked!r}"
        self._compiled = CompiledGradient(self.energy, self._module, self.dtype)
        self._checked = False
        self._of_thread = _OfThread()
        self._last: tuple[Any, int | None] = (None, None)
        self._evaluated: Evaluated = {}

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which have another module: without what has run."""
        return {"energy": self.energy, "dtype": self.dtype, "engine": self._asked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.energy, self.dtype, self._asked = state["energy"], state["dtype"], state["engine"]
        self.name, self._module = _name_and_module(self.energy)
        self._start()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (B,), float32 (float64 for a float64 x), and the gradient, with x's shape and dtype; both detached.

        x is (B, ...) and floating-point, and is not changed; an empty batch gives empty results. Raises TypeError for
        another kind of x, ValueError if the energy is not one number per sample, and RuntimeError if it does not depend
        on x or if samples influence each other.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x is {kind}; it must be a floating-point tensor")
        if x.ndim == 0:
            raise ValueError("x has no dimensions; its first one must be the batch")
        if x.shape[0] == 0:
            return x.new_empty(0, dtype=_energy_dtype(x)), torch.empty_like(x)
        chain = self._of_thread.state.chain
        if chain is not None:
            return self._evaluate(x, chain)
        with self.chain():
            begun = self._of_thread.state.chain
            assert begun is not None
            return self._evaluate(x, begun)

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

    def _begin(self, state: _ThreadState) -> None:
        current = self._fingerprint_and_hash()
        if current[1] is None or current != self._last:
            self._evaluated = {}  # a new one, because another thread's chain may have begun with the old one
        self._last = current
        frozen = nullcontext() if self._module is None else frozen_weights(self._module, self._evaluated)
        frozen.__enter__()
        state.frozen, state.chain = frozen, Chain(*current)

    def _fingerprint_and_hash(self) -> tuple[Any, int | None]:
        """The energy's fingerprint and a hash of the module's weights, each None if it is unknown."""
        if self.engine == "autograd" and not self._compiled.has_programs():
            return None, None
        tensors = [] if self._module is None else [*self._module.parameters(), *self._module.buffers()]
        inference = any(tensor.is_inference() for tensor in tensors)
        return fingerprint(self.energy, self._module), None if inference else content_hash(tensors)

    def compiled_program(self, x: Tensor) -> CompiledProgram | CompiledLanes | None:
        """The fused program that ran on samples like x in this `chain()` block, None if something else ran.

        Captured graphs, and whole chains in one call, run it themselves. During a chain it is one object, with its
        constants at the same addresses. It also is in later chains while the energy's fingerprint is unchanged, except
        where chains of several threads overlap and weights may differ. Read `workspace`, which each thread has its own
        of, after calling `code(batch)`, which may enlarge it.
        """
        chain = self._of_thread.state.chain
        return None if chain is None else self._compiled.compiled_program(x, chain)

    def __repr__(self) -> str:
        """The engine, the energy and the dtype; for autograd also the reason why nothing faster runs."""
        return self._text("{engine} gradient of {name} ({dtype})")

    @property
    def variant(self) -> str:
        """The `repr` without the energy's name, for tables: "fused, bfloat16"."""
        return self._text("{engine}, {dtype}")

    def _text(self, template: str) -> str:
        dtype = "dtype follows autocast" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        text = template.format(engine=self.engine, name=self.name, dtype=dtype)
        return f"{text}; not fused: {self.reason}" if self.engine == "autograd" else text

    def describe(self) -> str:
        """The `repr`, and a table of every program so far: operations, shapes, FLOPs, bytes and the roofline."""
        return "\n".join(filter(None, [repr(self), self._compiled.describe()]))

    def _evaluate(self, x: Tensor, chain: Chain) -> tuple[Tensor, Tensor]:
        if not self._checked:
            self._check_independence(x)
            self._checked = True
        return self._by_autograd(x, self.dtype) if self._asked == "autograd" else self._by_program(x, chain)

    def _by_program(self, x: Tensor, chain: Chain) -> tuple[Tensor, Tensor]:
        try:
            result = self._compiled(x, chain, self._in_full_precision)
        except UnsupportedError as error:
            if not self._may_fall_back:
                raise RuntimeError(
                    f"engine is 'fused', but no fused program exists for {self.name}: {error}; "
                    "engines 'auto' and 'autograd' can run it by autograd"
                ) from error
            self.engine, self.reason = "autograd", str(error)
            return self._by_autograd(x, self.dtype)
        self.engine, self.reason = "fused", ""
        return result

    def _in_full_precision(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._by_autograd(x, torch.float32)

    def _by_autograd(self, x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        with evaluating(), torch.inference_mode(False), torch.enable_grad():
            x = _leaf(x)
            energies = self._energies(x, dtype)
            gradient = self._differentiate(energies, x)
        return energies.detach().to(_energy_dtype(x)), gradient

    def _energies(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        """The energies, attached to x and flattened to (B,)."""
        with autocast_to(dtype, x.device.type):
            energies = self.energy(x)
        if not isinstance(energies, Tensor) or not energies.is_floating_point():
            kind = energies.dtype if isinstance(energies, Tensor) else type(energies).__name__
            raise TypeError(f"{self.name} returned {kind}; an energy must be a floating-point tensor")
        if energies.ndim == 0 or energies.shape[0] != x.shape[0] or energies.numel() != x.shape[0]:
            raise ValueError(
                f"{self.name} returned shape {tuple(energies.shape)} for x of shape {tuple(x.shape)}; "
                f"an energy must be one number per sample, ({x.shape[0]},)"
            )
        if not energies.requires_grad:
            raise _no_dependence(self.name)
        return energies.flatten()

    def _differentiate(self, energies: Tensor, x: Tensor) -> Tensor:
        """The gradient of the sum of `energies`; each backward operation runs in the dtype of its forward operation."""
        with without_autocast(x.device.type):
            (gradient,) = torch.autograd.grad(energies, x, torch.ones_like(energies), allow_unused=True)
        if gradient is None:
            raise _no_dependence(self.name)
        return gradient

    def _check_independence(self, x: Tensor) -> None:
        """Raise RuntimeError if the first energy has a gradient with respect to any other sample."""
        with evaluating(), torch.inference_mode(False), torch.enable_grad():
            # Chains often start at equal samples or at zero, where a gradient may vanish by chance, so move them.
            x = x.detach()
            ramp = torch.linspace(0.25, 1.0, x[0].numel(), dtype=x.dtype, device=x.device).reshape(x[0].shape)
            others = x[1:] if x.shape[0] > 1 else x
            batch = _leaf(torch.cat([x[:1] + ramp / 2, others + ramp]))
            gradient = self._differentiate(self._energies(batch, self.dtype)[0], batch)
        # Not `!= 0`: for a sample outside the energy's domain, 0 * inf gives NaN in its own derivative.
        if (gradient[1:].abs() > 0).any():
            raise RuntimeError(
                f"the energy that {self.name} gives a sample changes with the other samples of its batch, so chains "
                "would influence each other. The likely cause is batch norm in train mode: either it has no running "
                "statistics, or a function has a net in train mode in its closure (call net.eval(), or pass the net)"
            )


def _leave(state: _ThreadState, *exception: Any) -> None:
    """Leave a block: the last one ends the chain and restores the module's flags."""
    with exclusive():
        state.blocks -= 1
        if state.blocks == 0 and state.chain is not None:
            chain, state.chain = state.chain, None
            chain.close()
            state.frozen.__exit__(*exception)


def _name_and_module(energy: Energy) -> tuple[str, nn.Module | None]:
    """A name for messages, and the module whose weights and flags `energy` uses, if it can be found."""
    while isinstance(energy, functools.partial):
        energy = energy.func
    owner = energy if isinstance(energy, nn.Module) else getattr(energy, "__self__", None)
    if isinstance(owner, nn.Module):
        return type(owner).__name__, owner
    return getattr(energy, "__name__", type(energy).__name__), None


def _leaf(x: Tensor) -> Tensor:
    """x as a new leaf that requires a gradient; an inference tensor must be copied for that."""
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()


def _energy_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _no_dependence(name: str) -> RuntimeError:
    return RuntimeError(
        f"the energies that {name} returned don't depend on x: autograd finds no gradient. "
        "Does it detach x or run under no_grad?"
    )
