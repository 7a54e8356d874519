"""`weight_gradient`: the gradients of an energy's parameters by a compiled program, for the update of a training."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _modules

from fastebm.compiler.capture import UnsupportedError, capture
from fastebm.compiler.checks import (
    LOW_PRECISION_DRIFT,
    TOLERANCE,
    UNKNOWN,
    energies_agree,
    low_precision_excess,
    mixed,
    near,
    unless_it_raises,
)
from fastebm.compiler.compiled_gradient import CHOICE
from fastebm.compiler.faults import CompilerFaultError, Faults, as_faults, users_level
from fastebm.compiler.fingerprint import Fingerprint, covers, fingerprint
from fastebm.compiler.frozen_weights import (
    DifferentiableWeights,
    differentiable_weights,
    frozen_weights,
    refuse_frozen,
)
from fastebm.compiler.lazy_tensors import LazyTensor
from fastebm.compiler.own_code import OwnCode, energy_dtype
from fastebm.compiler.precision import autocast_to, without_autocast
from fastebm.compiler.process_state import collecting_garbage, evaluating, exclusive, exporting
from fastebm.compiler.weight_program import Factors, WeightProgram
from fastebm.ops.backends import backend, refusal_of_programs
from fastebm.scalars import as_count

__all__ = ["WeightGradient", "weight_gradient"]

ENGINES = ("auto", "fused", "autograd")
# Kinds of samples, settings and modes whose programs are kept.
MAX_PROGRAMS = 16
# Energies, and the gradient of each parameter.
_Result = tuple[Tensor, list[Tensor | None]]
# With "auto", folding has to save so many operations. Libraries' gradients of weights are as fast as ours, or faster in
# small nets and bfloat16: three nets of others, of which little folds, took 0.96 to 2.4 times as long by their programs
# (AVX-512, one thread, beside other work).
WORTH = 1.5
LITTLE = (
    "autograd carries out {:.2g} times as many operations only, and takes about as long (engine='fused' asks for the "
    "program, whose gradients have the same bits for any number of threads)"
)
# Calls in a row that each find another energy. After that many, captures cost more than they save.
MAX_MOVES = 8
# Samples with which a program is compared with autograd before its first use, and an energy that may read more than
# its module holds, in every call.
CHECKED = 3


@dataclass
class _Known:
    """A program that was checked, or why there is none; not `lasting` where that is due to the samples.

    `moves` counts the calls in a row, up to the one for which it was made, that each found another energy.
    """

    program: WeightProgram | None
    reason: str = ""
    node: str = "weights"
    moves: int = 0
    lasting: bool = True


class WeightGradient:
    """Energies, and the gradients of the parameters: `energies, gradients = self(x, cotangent)`.

    Build it with `weight_gradient`.

    Attributes:
        engine: what ran last, "fused" or "autograd".
        reason: why it is "autograd", "" otherwise.
    """

    def __init__(self, energy: Callable[..., Tensor], dtype: torch.dtype | None = None, engine: str = "auto") -> None:
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
        if dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or None, got {dtype}")
        self._own = OwnCode(energy)
        parts = () if self._own.module is None else self._own.module.modules()
        if any(isinstance(part, nn.parallel.DistributedDataParallel) for part in (energy, *parts)):
            raise TypeError(
                "DistributedDataParallel adds up gradients in a backward pass of its own, which does not run here; "
                "hand over its `module`, and add up `grad` over the processes"
            )
        if not callable(energy):
            raise TypeError(f"energy is a {type(energy).__name__}; it must be a module, a method or a partial of one")
        self.energy = energy
        self.dtype = dtype
        self.engine = "autograd" if engine == "autograd" else "fused"
        self.reason = "engine is 'autograd'" if engine == "autograd" else ""
        self._asked = engine
        self._known: list[tuple[Any, Fingerprint, _Known]] = []
        self._said: set[str] = set()
        self._faults = Faults(f"the gradients of the weights of {self._own.name}", engine == "fused")
        self._lock = threading.RLock()
        self._running = False

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightGradient, (self.energy, self.dtype, self._asked)  # programs belong to the weights of the original

    def __repr__(self) -> str:
        dtype = "dtype follows autocast" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        reason = f"; not fused: {self.reason}" if self.reason else ""
        return f"{self.engine} weight gradient of {self._own.name} ({dtype}){reason}"

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that require a gradient, by the names that the energy's module gives them."""
        if self._own.module is None:
            raise TypeError(
                f"{self._own.name} is no module, so its parameters are unknown; hand over the module itself, a method "
                "of it or a functools.partial of it"
            )
        for name, parameter in self._own.module.named_parameters():
            if nn.parameter.is_lazy(parameter):
                raise ValueError(f"{name} of {self._own.name} has no shape yet: call the energy once beforehand")
        with exclusive():
            refuse_frozen(self._own.module)  # its parameters would seem to require no gradient
            return {name: p for name, p in self._own.module.named_parameters() if p.requires_grad}

    def __call__(
        self, x: Tensor, cotangent: Tensor | Factors, batch_size: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Energies (B,), and the gradients of `sum(cotangent * energies)`, both detached.

        Args:
            x: samples (B, ...), floating-point.
            cotangent: the derivative of the loss with respect to each energy, (B,); or a function that is called with
                the energies of some rows of the batch and these rows, a slice, and returns that. It is called for all
                rows, some at a time, so a cotangent may depend on its own energy alone.
            batch_size: the samples that go through autograd at a time, which takes the less memory; all of them by
                default. A program needs no such limit: it takes few at a time by itself.

        Returns:
            The energies, float32 (float64 for a float64 x), and the gradients by the names of `parameters`, each in
            memory of its own and laid out like its parameter. One that no energy depends on has no entry.

        Raises:
            TypeError, ValueError: for another x or cotangent, or where the energy is not one number per sample.
            RuntimeError: with engine "fused", where there is no program; and while a chain over the weights runs.
        """
        step = None if batch_size is None else as_count("batch_size", batch_size, 1)
        with self._lock, self._once():
            parameters = self.parameters()
            energies, found = self._evaluate(x, cotangent, list(parameters.values()), step)
            pairs = zip(parameters.items(), found, strict=True)
            return energies, {name: _like(p, each) for (name, p), each in pairs if each is not None}

    @contextmanager
    def _once(self) -> Iterator[None]:
        """Raises RuntimeError where a call's cotangent, or its energy, makes another call: both use one workspace."""
        if self._running:
            raise RuntimeError(
                "a weight gradient was asked for within a call of itself, by the energy or by the cotangent's "
                "function; make another one with fastebm.weight_gradient for that"
            )
        self._running = True
        try:
            yield
        finally:
            self._running = False

    def backward(self, x: Tensor, cotangent: Tensor | Factors, batch_size: int | None = None) -> Tensor:
        """The energies; the gradients are added to the `grad` of the parameters, as `Tensor.backward` does.

        Arguments and errors as those of a call.
        """
        parameters = self.parameters()
        energies, gradients = self(x, cotangent, batch_size)
        for name, gradient in gradients.items():
            parameter = parameters[name]
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            for hook in (parameter._post_accumulate_grad_hooks or {}).values():  # type: ignore[attr-defined]
                hook(parameter)
        return energies

    def _evaluate(
        self, x: Tensor, cotangent: Tensor | Factors, parameters: list[nn.Parameter], step: int | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim == 0:
            given = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor (B, ...), got {given}")
        factors = _factors(cotangent, x)
        if not len(x) or not parameters:
            with torch.no_grad():
                energies = self._own.energies(x, (), self.dtype) if len(x) else x.new_empty(0)
            return energies.to(energy_dtype(x)), [None] * len(parameters)
        with torch.inference_mode(False):
            x = x.clone() if x.is_inference() else x.detach()
            if self._asked != "autograd":
                try:
                    return self._by_program(x, factors, parameters)
                except UnsupportedError as error:
                    self._fall_back(error)
            return self._by_autograd(x, factors, parameters, step or len(x))

    def _fall_back(self, error: UnsupportedError) -> None:
        if self._asked == "fused":
            raise RuntimeError(
                f"engine is 'fused', but no program computes the gradients of the weights of {self._own.name}: "
                f"{error}; engines 'auto' and 'autograd' can do that by autograd"
            ) from error
        self.engine, self.reason = "autograd", error.reason if error.node == CHOICE else str(error)
        if error.node != CHOICE and self.reason not in self._said and not self._faults.reported(error):
            warnings.warn(
                f"the gradients of the weights of {self._own.name} come from autograd instead of a fused program, and "
                f"their bits depend on the batch: {self.reason} (engine='autograd' asks for that without this warning)",
                RuntimeWarning,
                stacklevel=users_level(),
            )
            self._said.add(self.reason)  # not where the warning was an error

    def _by_autograd(
        self, x: Tensor, factors: Factors, parameters: list[nn.Parameter], step: int
    ) -> tuple[Tensor, list[Tensor | None]]:
        """By autograd, `step` samples at a time. Parametrised weights are evaluated once, as for a program."""
        module = self._own.module
        assert module is not None
        with differentiable_weights(module) as evaluated:
            shown = [*parameters, *evaluated.shown()]
            sums: list[Tensor | None] = [None] * len(shown)
            energies = []
            for first in range(0, len(x), step):
                rows = slice(first, min(first + step, len(x)))
                found, gradients = self._plain(x[rows], factors, rows, shown, self.dtype)
                energies.append(found)
                for at, gradient in enumerate(gradients):
                    before = sums[at]
                    sums[at] = before if gradient is None else gradient if before is None else before + gradient
            return torch.cat(energies), evaluated.through(parameters, sums)

    def _plain(
        self, x: Tensor, factors: Factors, rows: slice, of: Sequence[Tensor], dtype: torch.dtype | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Energies of some rows, and gradients with respect to `of`, by the energy's own code in the module's mode."""
        with evaluating(), torch.enable_grad():
            with autocast_to(dtype, x.device.type):
                energies = self._own.energies_with_graph(x)
            detached = energies.detach().to(energy_dtype(x))
            given = factors(detached, rows).to(energies.device, energies.dtype)
            if not energies.requires_grad:
                return detached, [None] * len(of)
            return detached, list(torch.autograd.grad(energies, of, given, allow_unused=True))

    def _by_program(
        self, x: Tensor, factors: Factors, parameters: list[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor | None]]:
        module = self._own.module
        assert module is not None
        if _modules._global_backward_hooks or _modules._global_backward_pre_hooks:
            raise UnsupportedError("backward", "a backward hook of all modules is set")
        compute_dtype = self._compute_dtype(x)
        now = fingerprint(self._own.energy, module)
        known = self._program(x, compute_dtype, now, parameters)
        with without_autocast(x.device.type):
            restore = None if covers(self._own.energy, module) else _saved_buffers(module)
            program, evaluated, values = self._evaluated(known, x, compute_dtype, restore)
            if program is None:
                known = self._moved(known, x, compute_dtype, now, parameters)
                program, evaluated, values = self._evaluated(known, x, compute_dtype, None)
            assert program is not None
            energies, folded = program.run(x.contiguous(), factors)
            with exclusive():  # no capture freezes the weights meanwhile
                refuse_frozen(module)
                found = _through(evaluated, program, values, folded, parameters)
        self.engine, self.reason = "fused", ""
        return energies, found

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        if x.dtype is torch.float64:
            return torch.float64
        if self.dtype is not None:
            return self.dtype
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

    def _program(
        self, x: Tensor, compute_dtype: torch.dtype, now: Fingerprint, parameters: list[nn.Parameter]
    ) -> _Known:
        """What is known of samples like x and the energy as it is now: a checked program, or else UnsupportedError."""
        module = self._own.module
        assert module is not None
        key = self._key(x, compute_dtype)
        at = next((i for i, (of, when, _) in enumerate(self._known) if of == key and when == now), None)
        known = self._made(x, compute_dtype, parameters) if at is None else self._known.pop(at)[2]
        if known.lasting:
            self._known.append((key, now, known))  # last in order: the first one is the least recently used
        del self._known[:-MAX_PROGRAMS]
        if known.program is None:
            raise UnsupportedError(known.node, known.reason)
        return known

    def _moved(
        self, known: _Known, x: Tensor, compute_dtype: torch.dtype, now: Fingerprint, parameters: list[nn.Parameter]
    ) -> _Known:
        """What is known of an energy that has moved and is captured anew. Raises UnsupportedError."""
        self._known = [entry for entry in self._known if entry[2] is not known]
        if known.moves >= MAX_MOVES:
            reason = (
                f"it changed between each two of the last {known.moves + 1} calls, and each change needs a new program "
                "(keep what changes in a tensor and write it in place, as with fill_)"
            )
            self._known.append((self._key(x, compute_dtype), now, _Known(None, reason)))
            raise UnsupportedError("energy", reason)
        made = self._program(x, compute_dtype, now, parameters)
        made.moves = known.moves + 1
        return made

    def _key(self, x: Tensor, compute_dtype: torch.dtype) -> tuple[Any, ...]:
        module = self._own.module
        assert module is not None
        modes = tuple(part.training for part in module.modules())
        wanted = tuple(p.requires_grad for p in module.parameters())
        return (x.shape[1:], x.dtype, x.device, compute_dtype, modes, wanted)

    def _made(self, x: Tensor, compute_dtype: torch.dtype, parameters: list[nn.Parameter]) -> _Known:
        module = self._own.module
        assert module is not None
        precise = (torch.float32, torch.float64)
        if x.dtype not in precise or compute_dtype not in (*precise, torch.bfloat16):
            return _Known(
                None,
                f"kernels compute with float32 samples in float32 or bfloat16, not with {x.dtype} in {compute_dtype}",
            )
        reason = _coupling(module) if x[0].numel() else "samples hold no numbers"
        if reason := reason or refusal_of_programs(x.device):
            return _Known(None, reason)
        try:
            # In one thread at a time: a capture freezes the weights that others would differentiate meanwhile, or take
            # for those of a chain.
            with exclusive(), collecting_garbage(), without_autocast(x.device.type):
                # Autograd first, so that an x which the energy does not accept raises the energy's own error.
                expected = self._expected(x[:CHECKED], compute_dtype, parameters)
                if not _is_finite(expected[0]):
                    return _Known(None, "autograd's own energies or gradients are not finite", lasting=False)
                with as_faults("weights"):
                    with frozen_weights(module):
                        captured = capture(self._own.original, module, x)
                    with _leaving_no_trace(module, x.device), differentiable_weights(module):
                        program = WeightProgram.of(captured, x, compute_dtype)
                if self._asked == "auto" and program.saving < WORTH:
                    return _Known(None, LITTLE.format(program.saving), CHOICE)
                self._check(program, x[:CHECKED], compute_dtype, parameters, expected)
                if _hidden(expected[0]):
                    self._check_elsewhere(program, x[:CHECKED], compute_dtype, parameters)
        except UnsupportedError as error:
            if isinstance(error, CompilerFaultError):
                self._faults.report(error)
            return _Known(None, error.reason, error.node)
        return _Known(program)

    def _expected(
        self, x: Tensor, compute_dtype: torch.dtype, parameters: list[nn.Parameter]
    ) -> tuple[_Result, _Result | None]:
        """Autograd's energies and gradients in the module's own mode, in x's dtype, and in 16 bits where asked for.

        Raises UnsupportedError for an energy that is random or writes to a buffer.
        """
        module = self._own.module
        assert module is not None
        factors, rows = _factors(_checked_cotangent(x), x), slice(0, len(x))
        with _leaving_no_trace(module, x.device) as changed:
            expected = self._plain(x.clone(), factors, rows, parameters, torch.float32)
            touched = changed()
        with _leaving_no_trace(module, x.device):
            again, handwritten = self._own.evaluated_again(x.clone())
        if touched == _GENERATOR or not energies_agree(again, expected[0], torch.float32, UNKNOWN):
            raise UnsupportedError("energy", "it is random, or another one each time it is evaluated")
        if touched:
            raise UnsupportedError(touched, "the energy writes to it in the module's mode")
        if handwritten:
            raise UnsupportedError("backward", handwritten)
        if compute_dtype is x.dtype:
            return expected, None
        with _leaving_no_trace(module, x.device):
            return expected, self._plain(x.clone(), factors, rows, parameters, compute_dtype)

    def _expected_elsewhere(
        self, x: Tensor, compute_dtype: torch.dtype, parameters: list[nn.Parameter]
    ) -> tuple[_Result, _Result | None] | None:
        """The same at points that nobody asked for; None where there is no energy."""
        return unless_it_raises(lambda: self._expected(x, compute_dtype, parameters))

    def _check(
        self,
        program: WeightProgram,
        x: Tensor,
        compute_dtype: torch.dtype,
        parameters: list[nn.Parameter],
        expected: tuple[_Result, _Result | None],
    ) -> None:
        """Raises UnsupportedError where the program differs from autograd: in x's dtype, and in 16 bits if it has them.

        In 16 bits, the error may be twice that of autocast, or 0.1, at x or in the median of points around it.
        """
        exact, autocast = expected
        if autocast is None:
            _compare(self._found(program, x, parameters), exact, TOLERANCE[x.dtype])
            return
        with backend("reference"):  # no kernels are compiled for one comparison
            _compare(self._found(program.precise(), x, parameters), exact, TOLERANCE[x.dtype])

        def errors(at: Tensor) -> tuple[list[float], list[float]] | None:
            found = expected if at is x else self._expected_elsewhere(at, compute_dtype, parameters)
            if found is None:
                return None
            known, low = found
            assert low is not None
            return _low_precision_errors(self._found(program, at, parameters), known), _low_precision_errors(low, known)

        if excess := low_precision_excess(errors, x):
            raise _disagreement(*excess)

    def _found(self, program: WeightProgram, x: Tensor, parameters: list[nn.Parameter]) -> _Result:
        """What a program gives at x, with the cotangents of a check."""
        module = self._own.module
        assert module is not None
        with as_faults("weights"), _leaving_no_trace(module, x.device):
            with differentiable_weights(module) as evaluated:
                values = program.evaluated()
            energies, folded = program.run(x.contiguous(), _factors(_checked_cotangent(x), x))
            return energies, _through(evaluated, program, values, folded, parameters)

    def _check_elsewhere(
        self, program: WeightProgram, x: Tensor, compute_dtype: torch.dtype, parameters: list[nn.Parameter]
    ) -> None:
        """Another check near x and the weights of now, where a gradient hides there: behind a layer of zeros, say.

        Raises UnsupportedError where the program differs. There may be no energy there, which says nothing.
        """
        with exporting(), _moved(parameters), torch.no_grad():
            for at in (near(x), mixed(x, seed=0)):
                expected = self._expected_elsewhere(at, compute_dtype, parameters)
                if expected is not None and _is_finite(expected[0]):
                    self._check(program, at, compute_dtype, parameters, expected)
                    return

    def _evaluated(
        self, known: _Known, x: Tensor, compute_dtype: torch.dtype, restore: Callable[[], None] | None
    ) -> tuple[WeightProgram | None, DifferentiableWeights, dict[LazyTensor, Any]]:
        """The program with the weights of now, and these.

        With `restore` the energy may read more than its module holds, and its own code is asked: where it gives other
        energies than the program, the buffers are restored, and None comes in the place of the program.
        """
        module, program = self._own.module, known.program
        assert module is not None
        assert program is not None
        some = x[:CHECKED].contiguous()
        with differentiable_weights(module) as evaluated:
            values = program.evaluated()
            if restore is None:
                return program, evaluated, values
            own = self._own.energies(some.clone(), (), torch.float32).double()
            low = self._own.energies(some.clone(), (), torch.bfloat16) if compute_dtype is torch.bfloat16 else own
        zeros = torch.zeros(len(some), dtype=energy_dtype(x), device=x.device)
        found = program.run(some, _factors(zeros, some))[0].double()
        if compute_dtype is not torch.bfloat16:
            same = energies_agree(found, own, compute_dtype, UNKNOWN)
        else:  # energies near zero are differences of larger numbers: autocast's own error is the measure
            rounding = 4 * float((low.double() - own).abs().max())
            same = float((found - own).abs().max()) <= max(rounding, LOW_PRECISION_DRIFT * float(own.abs().max()))
        if same:
            known.moves = 0
            return program, evaluated, values
        restore()
        return None, evaluated, values


def weight_gradient(
    energy: Callable[..., Tensor], *, dtype: torch.dtype | None = None, engine: str = "auto"
) -> WeightGradient:
    """The gradients of an energy's parameters, for the update of a training, by a program where the energy has one.

    The energy is captured as `energy_gradient` captures it, and rewritten: linear layers fold into each other. The
    kernels differentiate with respect to the folded weights, and autograd goes from there to the parameters, at a cost
    that does not depend on the batch. Programs compute with fixed orders of summation: gradients have the same bits
    for any number of threads. Before its first use a program is compared with autograd. An energy without a program is
    differentiated by autograd, which is said once: batch norm in train mode, dropout, samples that influence each
    other, and operations that kernels don't have.

    Args:
        energy: a module, a method of one or a `functools.partial` of either: `energy(x)` gives one number per sample.
            The module stays in its mode; a spectral norm in train mode does one power iteration in each call.
        dtype: `torch.float32` or `torch.bfloat16`, that of the operations; None follows autocast at each call.
        engine: "auto", "fused" (RuntimeError where there is no program) or "autograd".

    Raises ValueError for another dtype or engine, and TypeError for a net in `DistributedDataParallel`.

    Example:
        >>> import torch, fastebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.SiLU(), torch.nn.Linear(16, 1))
        >>> gradient = fastebm.weight_gradient(net)
        >>> data, samples = torch.randn(8, 2), torch.randn(8, 2)
        >>> cotangent = torch.cat((torch.full((8,), 1 / 8), torch.full((8,), -1 / 8)))  # of contrastive divergence
        >>> energies = gradient.backward(torch.cat((data, samples)), cotangent)
        >>> net[0].weight.grad.shape
        torch.Size([16, 2])
    """
    return WeightGradient(energy, dtype, engine)


def _through(
    evaluated: DifferentiableWeights,
    program: WeightProgram,
    values: dict[LazyTensor, Any],
    folded: Sequence[Tensor],
    parameters: list[nn.Parameter],
) -> list[Tensor | None]:
    """The gradients of parameters from those of folded weights."""
    return evaluated.through(parameters, program.gradients(values, folded, [*parameters, *evaluated.shown()]))


# ---- the loss


def _factors(cotangent: Tensor | Factors, x: Tensor) -> Factors:
    """The cotangents of some rows, checked."""
    if isinstance(cotangent, Tensor):
        if cotangent.shape != x.shape[:1] or not cotangent.is_floating_point():
            raise ValueError(
                f"cotangent must be a floating-point tensor ({len(x)},), one number for each sample, got "
                f"{cotangent.dtype} {tuple(cotangent.shape)}"
            )
        fixed = cotangent.detach()
        return lambda energies, rows: fixed[rows]
    if not callable(cotangent):
        raise TypeError(f"cotangent must be a tensor or a function, got {type(cotangent).__name__}")
    function = cotangent

    def checked(energies: Tensor, rows: slice) -> Tensor:
        with torch.enable_grad():  # it may differentiate a loss; and what it does to its argument stays there
            found = function(energies.clone(), rows)
        if not isinstance(found, Tensor) or found.shape != energies.shape or not found.is_floating_point():
            given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"the cotangents of {len(energies)} energies must be ({len(energies)},), got {given}")
        return found.detach()

    return checked


def _checked_cotangent(x: Tensor) -> Tensor:
    """That with which programs are compared with autograd."""
    return torch.linspace(-1.0, 1.5, len(x), dtype=energy_dtype(x), device=x.device)


def _like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A gradient in memory of its own, laid out like its parameter.

    Autograd gives both to `grad` too, and fused optimizers, which go through memory, rely on the layout unchecked.
    """
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty_like(parameter, requires_grad=False).copy_(gradient)


# ---- what programs can't do

# What `_leaving_no_trace` calls torch's generators.
_GENERATOR = "torch's generator"


def _coupling(module: nn.Module) -> str:
    """Why an energy has no program in its module's mode, "" if nothing is known against it."""
    for name, part in module.named_modules():
        where = f"{name or 'the module'} is a {type(part).__name__} in train mode"
        if not part.training:
            continue
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            return f"{where}, so that samples influence each other"
        if isinstance(part, nn.modules.instancenorm._InstanceNorm) and part.track_running_stats:
            return f"{where}, which changes its running statistics"
        dropout = isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0
        if dropout or isinstance(part, nn.RReLU):
            return f"{where}, which is random"
    return ""


@contextmanager
def _leaving_no_trace(module: nn.Module, device: torch.device) -> Iterator[Callable[[], str]]:
    """Afterwards the module's buffers and torch's generators are as they were.

    Yields a function that names what was changed inside: a buffer, or "torch's generator"; "" if nothing was. Buffers
    of parametrisations, which a program evaluates itself, don't count.
    """
    parts = dict(module.named_modules())
    before = {name: dict(part._buffers) for name, part in parts.items()}
    values = {id(b): (b, b.detach().clone()) for found in before.values() for b in found.values() if b is not None}
    cuda = device.type == "cuda"

    def state() -> Tensor:
        return torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()

    def changed() -> str:
        if not torch.equal(state(), generator):
            return _GENERATOR
        for name, part in parts.items():
            found, now = before[name], dict(part._buffers)
            for each in () if "parametrizations" in name.split(".") else (found | now):
                old, new = found.get(each), now.get(each)
                if old is not new or (old is not None and not _equal(*values[id(old)])):
                    return f"{name}.{each}".removeprefix(".")
        return ""

    try:
        with torch.random.fork_rng(devices=[device] if cuda else []):
            generator = state()
            yield changed
    finally:
        with torch.no_grad():
            for name, part in parts.items():
                found, now = before[name], dict(part._buffers)
                for each in found | now:
                    if each not in found:
                        del part._buffers[each]
                    elif now.get(each) is not found[each]:
                        part._buffers[each] = found[each]
            for buffer, value in values.values():
                if not _equal(buffer, value):
                    buffer.copy_(value)


def _saved_buffers(module: nn.Module) -> Callable[[], None]:
    """A function that gives the module's buffers the values that they have now."""
    values = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]

    def restore() -> None:
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)

    return restore


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


# ---- the comparison with autograd

# How many times the error of all gradients that of one parameter may have, and the smallest share of the norm of all
# that a parameter's own is taken for.
_OF_ONE = 5.0
_SMALL = 1e-3


def _is_finite(result: _Result) -> bool:
    return all(each is None or bool(each.isfinite().all()) for each in (result[0], *result[1]))


def _hidden(expected: _Result) -> bool:
    """Whether a parameter's gradient is so small that nearly any other passes for it."""
    sizes = [0.0 if each is None else float(each.double().norm()) for each in expected[1]]
    return min(sizes, default=0.0) <= _SMALL * sum(size**2 for size in sizes) ** 0.5


@contextmanager
def _moved(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters have other numbers, in other memory: to autograd, nothing was written to them."""
    before = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = near(parameter.data)
        torch.clear_autocast_cache()  # which holds weights of the caller's block in 16 bits
        yield
    finally:
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data
        torch.clear_autocast_cache()


def _compare(found: _Result, expected: _Result, allowed: float) -> None:
    """Raises UnsupportedError where energies or gradients are further from autograd's than rounding explains."""
    for which, error in enumerate(_errors(found, expected)):
        if not error <= allowed:
            raise _disagreement(which, error, allowed)


def _disagreement(which: int, error: float, allowed: float) -> UnsupportedError:
    name = ("energies", "gradients", "a parameter's gradient")[which]
    return UnsupportedError(
        "check",
        f"its {name} differ from autograd's by {error:.2g}, more than {allowed:.2g} (an energy that depends on the "
        "other samples of its batch, or on the mode in another way than PyTorch's layers, has no program)",
    )


def _low_precision_errors(found: _Result, expected: _Result) -> list[float]:
    """As `_errors`, but of energies relative to the largest one, or to 1 where all are smaller: they may cancel."""
    theirs = expected[0].double()
    of_energies = float((found[0].double() - theirs).norm()) / max(1.0, float(theirs.abs().max()))
    return [of_energies, *_errors(found, expected)[1:]]


def _errors(found: _Result, expected: _Result) -> list[float]:
    energies, theirs = found[0].double(), expected[0].double()
    of_energies = float((energies - theirs).norm() / theirs.norm().clamp(min=1e-30))
    pairs = []
    for a, b in zip(found[1], expected[1], strict=True):
        known = a if a is not None else b
        if known is not None:
            pairs.append(tuple(torch.zeros_like(known) if each is None else each for each in (a, b)))
    gaps = [float((a.double() - b.double()).norm()) for a, b in pairs]
    sizes = [float(b.double().norm()) for _, b in pairs]
    total = max(sum(size**2 for size in sizes) ** 0.5, 1e-30)
    worst = max((gap / max(size, _SMALL * total) for gap, size in zip(gaps, sizes, strict=True)), default=0.0)
    return [of_energies, sum(gap**2 for gap in gaps) ** 0.5 / total, worst / _OF_ONE]
