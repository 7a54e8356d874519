"""The gradient of anyone's energy with respect to its input, which is all that a Langevin chain asks of a net."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastebm.compiler.compiled_gradient import CompiledGradient, UnsupportedError
from fastebm.compiler.fingerprint import fingerprint
from fastebm.compiler.frozen_weights import Evaluated, frozen_weights
from fastebm.compiler.precision import autocast_to, without_autocast
from fastebm.ops import CompiledProgram
from fastebm.ops.backends import content_hash

Energy = Callable[[Tensor], Tensor]

# What "auto" tries first.
AUTO = "fused"
ENGINES = ("auto", "autograd", "fused")
DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


def energy_gradient(energy: Energy, *, dtype: torch.dtype | None = None, engine: str = "auto") -> "EnergyGradient":
    """A callable `x -> (energies, gradient)` for any energy that returns one number a sample. See `EnergyGradient`.

    >>> gradient = energy_gradient(lambda x: 0.5 * x.square().sum(dim=1))
    >>> energies, g = gradient(torch.tensor([[3.0, 4.0]]))
    >>> energies, g
    (tensor([12.5000]), tensor([[3., 4.]]))
    """
    return EnergyGradient(energy, dtype=dtype, engine=engine)


class EnergyGradient:
    """Energies and their gradient at fixed weights: `energies, gradient = self(x)`.

    Args:
        energy: an `nn.Module`, a bound method of one, or any function, or a `functools.partial` of these, that maps x
            (B, ...) to one number a sample, of shape (B,), (B, 1), (B, 1, 1, 1) or the like; low means real.
        dtype: `torch.bfloat16` or `torch.float16` runs the energy under autocast to it, `torch.float32` without
            autocast, None as the caller's own autocast state has it. A float16 gradient may underflow: there is no
            loss scaling.
        engine: "fused" captures a program at first use, rewrites it and checks it against autograd (see
            `CompiledGradient`); the first call is an error that says why where that can't be done. "auto" does the same
            and takes autograd where it can't, which `repr` then tells. "autograd" runs autograd.

    During a call, or a whole `chain()`, the module is in eval mode, its weights need no gradient, and its
    parametrised weights (spectral norm and others of `torch.nn.utils.parametrize`) are evaluated once, without power
    iterations, and by the fused engine only if anything changed since the last chain. Afterwards all is as it was, also
    after an exception, and no `.grad` is written. A plain function has no flags that could be set: nets that it closes
    over must be in eval mode already. All works under `no_grad` and `inference_mode` too.

    The first call checks that samples don't influence each other: the gradient of the first energy must be exactly
    zero for all other samples. Non-finite energies and gradients are passed on, because the sampler or a guard
    decides what they mean. One object must not be used by several threads at a time.

    Raises TypeError and ValueError for arguments of a wrong kind, and RuntimeError for `engine="fused"`.
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
        self.name, self._module = _origin(energy)
        self._may_fall_back = engine == "auto"
        self.engine = AUTO if engine == "auto" else engine
        self.reason = "" if self.engine == "fused" else f"engine is {engine!r}"
        in_full_precision = functools.partial(self._by_autograd, dtype=torch.float32)
        self._fused = CompiledGradient(energy, self._module, dtype, in_full_precision)
        self._run: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
        self._in_chain = False
        self._last: tuple[Any, int | None] = (None, None)
        self._evaluated: Evaluated = {}

    def __getstate__(self) -> dict[str, Any]:
        """For copies, whose module is another."""
        return vars(self) | {"_last": (None, None), "_evaluated": {}}

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (B,), float32 (float64 for a float64 x), and the gradient, of x's shape and dtype; both detached.

        x is (B, ...), floating point, and left as it is; an empty batch gives empty results. Raises TypeError for
        another kind of x, ValueError where the energy isn't one number a sample, RuntimeError where it doesn't depend
        on x or where samples influence each other.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x is {kind}; it must be a floating-point tensor")
        if x.ndim == 0:
            raise ValueError("x has no dimensions; its first one must be the batch")
        if x.shape[0] == 0:
            return x.new_empty(0, dtype=_energy_dtype(x)), torch.empty_like(x)
        if self._in_chain:
            return self._evaluate(x)
        with self.chain():
            return self._evaluate(x)

    @contextmanager
    def chain(self) -> Iterator["EnergyGradient"]:
        """A block of calls at fixed weights: flags are set and parametrised weights evaluated once, not in every call.

        Inside, the module must not be trained, given other weights or deep-copied. A chain inside of a chain is part
        of it.
        """
        if self._in_chain:
            yield self
            return
        with ExitStack() as undo:
            state, weights = self._now()
            if weights is None or (state, weights) != self._last:
                self._evaluated.clear()
            self._last = state, weights
            if self._module is not None:
                undo.enter_context(frozen_weights(self._module, self._evaluated))
            undo.callback(setattr, self, "_in_chain", False)
            self._in_chain = True
            self._fused.new_chain(state, weights)
            yield self

    def _now(self) -> tuple[Any, int | None]:
        """What the energy decides by (`fingerprint`), and what tells the module's weights from others, if known."""
        if self.engine == "autograd":
            return None, None
        tensors = [] if self._module is None else [*self._module.parameters(), *self._module.buffers()]
        inference = any(tensor.is_inference() for tensor in tensors)
        return fingerprint(self.energy, self._module), None if inference else content_hash(tensors)

    def compiled_program(self, x: Tensor) -> CompiledProgram | None:
        """The fused program that ran on samples like x in this `chain()`, or None where something else did.

        For those who run it themselves, as captured graphs and whole chains in one call do: it stays the same object,
        with its constants at the same places, for as long as the energy keeps its form. Ask for `workspace` after
        `code(batch)`, which may make a larger one.
        """
        return self._fused.compiled_program(x) if self._in_chain and self.engine == "fused" else None

    def __repr__(self) -> str:
        """One line for people: what runs, in which precision, and why nothing faster does."""
        precision = "as autocast is set around it" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        line = f"gradient of {self.name} by {self.engine}, {precision}"
        if self.engine == "autograd":
            return f"{line}; not fused: {self.reason}"
        return line

    def describe(self) -> str:
        """What `repr` says, and every program so far as a table: operations, shapes, FLOPs, bytes; and its floor."""
        return "\n".join(filter(None, [repr(self), self._fused.describe()]))

    def _evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self._run is None:
            self._check_independence(x)
            by_autograd = functools.partial(self._by_autograd, dtype=self.dtype)
            self._run = self._by_program if self.engine == "fused" else by_autograd
        return self._run(x)

    def _by_program(self, x: Tensor) -> tuple[Tensor, Tensor]:
        try:
            result = self._fused(x)
        except UnsupportedError as refusal:
            if not self._may_fall_back:
                raise RuntimeError(
                    f"engine is 'fused', but no fused program exists for {self.name}: {refusal}; "
                    "'auto' and 'autograd' use autograd"
                ) from refusal
            self.engine, self.reason = "autograd", str(refusal)
            return self._by_autograd(x, self.dtype)
        self.engine, self.reason = "fused", ""
        return result

    def _by_autograd(self, x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            x = _leaf(x)
            energies = self._energies(x, dtype)
            gradient = self._differentiate(energies, x)
        return energies.detach().to(_energy_dtype(x)), gradient

    def _energies(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        """The energies as the net gives them, attached to x, but flattened to (B,)."""
        with autocast_to(dtype, x.device.type):
            energies = self.energy(x)
        if not isinstance(energies, Tensor) or not energies.is_floating_point():
            kind = energies.dtype if isinstance(energies, Tensor) else type(energies).__name__
            raise TypeError(f"{self.name} returned {kind}; an energy must be a floating-point tensor")
        if energies.ndim == 0 or energies.shape[0] != x.shape[0] or energies.numel() != x.shape[0]:
            raise ValueError(
                f"{self.name} returned shape {tuple(energies.shape)} for x of shape {tuple(x.shape)}; "
                f"an energy must be one number a sample, ({x.shape[0]},)"
            )
        if not energies.requires_grad:
            raise _no_dependence(self.name)
        return energies.flatten()

    def _differentiate(self, energies: Tensor, x: Tensor) -> Tensor:
        """The gradient of the sum of `energies`, each backward operation in the dtype that its forward one had."""
        with without_autocast(x.device.type):
            (gradient,) = torch.autograd.grad(energies, x, torch.ones_like(energies), allow_unused=True)
        if gradient is None:
            raise _no_dependence(self.name)
        return gradient

    def _check_independence(self, x: Tensor) -> None:
        """Refuse an energy whose first sample has a gradient with respect to any other."""
        with torch.inference_mode(False), torch.enable_grad():
            # Chains often start alike, or at zero, where a gradient can vanish that isn't zero elsewhere: so move them.
            x = x.detach()
            ramp = torch.linspace(0.25, 1.0, x[0].numel(), dtype=x.dtype, device=x.device).reshape(x[0].shape)
            others = x[1:] if x.shape[0] > 1 else x
            batch = _leaf(torch.cat([x[:1] + ramp / 2, others + ramp]))
            gradient = self._differentiate(self._energies(batch, self.dtype)[0], batch)
        # Not `!= 0`: a sample outside of the energy's domain gives 0 * inf = NaN in its own derivative.
        if (gradient[1:].abs() > 0).any():
            raise RuntimeError(
                f"the energy that {self.name} gives one sample changes with the other samples of its batch, so chains "
                "would influence each other. The likely cause is batch norm in train mode: one without running "
                "statistics, or a function that closes over a net in train mode (call net.eval(), or hand over the net)"
            )


def _origin(energy: Energy) -> tuple[str, nn.Module | None]:
    """A name for messages, and the module whose weights and flags `energy` stands on, if it can be known."""
    while isinstance(energy, functools.partial):
        energy = energy.func
    owner = energy if isinstance(energy, nn.Module) else getattr(energy, "__self__", None)
    if isinstance(owner, nn.Module):
        return type(owner).__name__, owner
    return getattr(energy, "__name__", type(energy).__name__), None


def _leaf(x: Tensor) -> Tensor:
    """x as a new leaf that requires a gradient; an inference tensor has to be copied for that."""
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()


def _energy_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _no_dependence(name: str) -> RuntimeError:
    return RuntimeError(
        f"the energies that {name} returned don't depend on x, as autograd sees it: there is no gradient. "
        "Does it detach x, or run under no_grad?"
    )
