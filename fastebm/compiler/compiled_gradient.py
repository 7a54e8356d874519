"""Energy gradients by compiled programs: captured, rewritten and checked at first use, then run without autograd."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastebm.compiler.autodiff import differentiate
from fastebm.compiler.capture import UnsupportedError, capture
from fastebm.compiler.cost_model import Machine
from fastebm.compiler.executor import AtenExecutor, CompiledExecutor
from fastebm.compiler.lanes import LaneError, LaneExecutor
from fastebm.compiler.lowering import LoweringError, lower
from fastebm.compiler.precision import without_autocast
from fastebm.compiler.process_state import DeferredInterrupt, collecting_garbage, exclusive, exporting
from fastebm.compiler.program import Program
from fastebm.compiler.report import describe
from fastebm.compiler.rewrites import WITHOUT_POLYPHASE, build_gradient_program
from fastebm.compiler.roofline import measured_peak_rates
from fastebm.ops import CompiledLanes, CompiledProgram
from fastebm.ops.backends import content_hash, has_matrix_units, select_backend

__all__ = ["Chain", "CompiledGradient", "UnsupportedError"]

Energy = Callable[[Tensor], Tensor]
Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]
Executor = AtenExecutor | CompiledExecutor | LaneExecutor

# The largest accepted difference from autograd, relative to the gradient: well above rounding, well below the error of
# a wrong program. The largest seen is 1.1e-3 in float32, for a deep net of leaky ReLUs, where a pre-activation near
# zero was rounded to the other side of the kink.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-2}
LOW_PRECISION_TOLERANCE = 0.1
# Programs that one gradient keeps, each for another sample shape, dtype, device or precision.
MAX_PROGRAMS = 64


@dataclass(frozen=True)
class _ProgramKey:
    """What a program is specialised for."""

    sample: torch.Size
    dtype: torch.dtype
    device: torch.device
    compute_dtype: torch.dtype


@dataclass
class _Compiled:
    """A checked program, as captured and as it runs; without an executor, the node and the reason why there is none.

    `fingerprint` is the energy's at capture, `weights` a hash of the weights at the last refresh (None if unknown),
    `fallback_reason` says why the program runs on PyTorch's operations, if it does, and `chains` counts the chains that
    read its constants now.
    """

    fingerprint: Any
    captured: Program | None = None
    executor: Executor | None = None
    fallback_reason: str = ""
    unsupported: tuple[str, str] = ("program", "there is none")
    weights: tuple[int, int] | None = None
    chains: int = 0


class Chain:
    """One chain in one thread: the energy's fingerprint and a hash of its weights, and the programs that it runs."""

    def __init__(self, fingerprint: Any, weights: int | None):
        self.fingerprint = fingerprint
        self.weights = weights
        self.programs: dict[_ProgramKey, _Compiled] = {}

    def close(self) -> None:
        """The chain is over: it reads no constants any more."""
        with exclusive():
            for compiled in self.programs.values():
                compiled.chains -= 1
            self.programs.clear()


class CompiledGradient:
    """Energies and gradient of one energy, `energies, gradient = self(x)`, by one program for each kind of x.

    A program is captured at the first call with a new sample shape, dtype, device or precision, and compared with
    autograd on samples near the given ones. It reads the weights anew in every `Chain`: a program is reused as it is
    while a hash of the module's weights, and that of the tensors that it keeps by reference, are known and unchanged.
    It is captured again if the energy's fingerprint has changed: settings of its modules, closures of its functions, or
    shapes and dtypes of its weights. The `MAX_PROGRAMS` that were used last are kept.

    Chains in several threads run the same programs at the same time. Constants that another chain reads are never
    written: where the weights may differ from them, the later chain gets constants of its own.

    Most programs run by `fastebm::run_program`, with the same bits for any batch and number of threads. Programs with
    an operation that it has no instruction for run on PyTorch's operations; `describe` says why. Those use library
    convolutions, which may sum in another order for another batch size, so their results agree only to rounding.

    Args:
        energy, module: as for `capture`.
        dtype: that of the operations, or None to follow the caller's autocast state; float64 samples always run in
            float64.
    """

    def __init__(self, energy: Energy, module: nn.Module | None, dtype: torch.dtype | None):
        self.energy = energy
        self.module = module
        self.dtype = dtype
        self._programs: dict[_ProgramKey, _Compiled] = {}

    def __call__(self, x: Tensor, chain: Chain, reference: Gradient) -> tuple[Tensor, Tensor]:
        """Energies (B,), float32 or float64, and the gradient, with x's dtype and strides; both new tensors.

        `reference` gives both by autograd in x's dtype. A new program is compared with it.

        Raises UnsupportedError with the node and the reason if the energy has no program.
        """
        key = self._key(x)
        with torch.inference_mode(False), torch.no_grad(), without_autocast(x.device.type):
            compiled = chain.programs.get(key) or self._acquire(key, x, chain, reference)
            if compiled.executor is None:
                raise UnsupportedError(*compiled.unsupported)
            energies, gradient = compiled.executor(x)
            if not isinstance(compiled.executor, AtenExecutor):
                return energies, gradient if gradient.stride() == x.stride() else torch.empty_like(x).copy_(gradient)
            energy_dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
            return energies.to(energy_dtype, copy=True), torch.empty_like(x, requires_grad=False).copy_(gradient)

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
                reason = compiled.fallback_reason
                texts.append(f"{text}\nruns on {f'PyTorch operations: {reason}' if reason else 'fused kernels'}")
        return "\n\n".join(texts)

    def compiled_program(self, x: Tensor, chain: Chain) -> CompiledProgram | CompiledLanes | None:
        """The fused program that ran on samples like x in this chain, if one did."""
        compiled = chain.programs.get(self._key(x))
        executor = compiled.executor if compiled is not None else None
        return None if executor is None or isinstance(executor, AtenExecutor) else executor.compiled

    def has_programs(self) -> bool:
        """Whether any kind of x has a program."""
        return any(compiled.executor is not None for compiled in list(self._programs.values()))

    def _key(self, x: Tensor) -> _ProgramKey:
        return _ProgramKey(x.shape[1:], x.dtype, x.device, _compute_dtype(x, self.dtype))

    def _acquire(self, key: _ProgramKey, x: Tensor, chain: Chain, reference: Gradient) -> _Compiled:
        """The program of `key` for `chain`, up to date with the energy and its weights."""
        with exclusive(defer=False):
            compiled = self._programs.pop(key, None)
            is_new = compiled is None or compiled.fingerprint != chain.fingerprint
            if compiled is None or is_new:
                with DeferredInterrupt(), collecting_garbage():
                    compiled = self._compile(key, x, chain, reference)
                compiled.weights = _weights_hash(compiled, chain)
            while len(self._programs) >= MAX_PROGRAMS:
                del self._programs[next(iter(self._programs))]
            self._programs[key] = compiled  # last in order: the first one is the least recently used
            if compiled.executor is not None and not is_new:
                weights = _weights_hash(compiled, chain)
                if weights is None or weights != compiled.weights:
                    executor = compiled.executor
                    if compiled.chains:
                        executor = executor.with_own_weights()
                        compiled = replace(compiled, executor=executor, chains=0)
                    compiled.weights = None  # unknown if this fails
                    executor.refresh()
                    compiled.weights = weights
            compiled.chains += 1
            chain.programs[key] = compiled
            return compiled

    def _compile(self, key: _ProgramKey, x: Tensor, chain: Chain, reference: Gradient) -> _Compiled:
        # Autograd first, so that an x which the energy does not accept raises the energy's own error.
        nearby = _nearby_samples(x)
        expected = reference(nearby)
        try:
            captured, executor, fallback_reason = self._make_executor(key, x)
            executor.refresh()
            _check(executor, nearby, expected)
        except UnsupportedError as error:
            return _Compiled(chain.fingerprint, unsupported=(error.node, error.reason))
        except Exception as error:  # a fault of the compiler must not stop an energy that autograd can differentiate
            return _Compiled(chain.fingerprint, unsupported=("program", f"{type(error).__name__}: {error}"))
        return _Compiled(chain.fingerprint, captured, executor, fallback_reason)

    def _make_executor(self, key: _ProgramKey, x: Tensor) -> tuple[Program | None, Executor, str]:
        """The captured program, the executor, and why it does not use the fused kernels, if it does not.

        Samples without pixels run as lane programs. So does what fused programs have no instruction for.
        """
        lanes = _lanes_take(key)
        if lanes and len(key.sample) != 3:
            with contextlib.suppress(LaneError):
                return None, self._lane_executor(x), ""
        try:
            captured = capture(self.energy, self.module, x)
            executor, reason = _make_executor(captured, key)
        except UnsupportedError:
            if lanes and len(key.sample) == 3:
                with contextlib.suppress(LaneError):
                    return None, self._lane_executor(x), ""
            raise
        if reason and lanes and len(key.sample) == 3:
            with contextlib.suppress(LaneError):
                return None, self._lane_executor(x), ""
        return captured, executor, reason

    def _lane_executor(self, x: Tensor) -> LaneExecutor:
        with exporting():
            return LaneExecutor.of(self.energy, self.module, x[:1].detach())


def _lanes_take(key: _ProgramKey) -> bool:
    """Whether lane programs are for samples of this kind: float32 on the CPU, with the compiled operators.

    They compute in float32 also where bfloat16 is allowed. Matrix units for bfloat16 are faster than that.
    """
    if key.device.type != "cpu" or key.dtype is not torch.float32:
        return False
    if select_backend("cpu", kernel="run_lanes") != "cpp":
        return False
    return key.compute_dtype is torch.float32 or (key.compute_dtype is torch.bfloat16 and not has_matrix_units())


def _weights_hash(compiled: _Compiled, chain: Chain) -> tuple[int, int] | None:
    """Hashes of all numbers from which the program's weights are evaluated; None if they are unknown."""
    if chain.weights is None or compiled.executor is None or isinstance(compiled.executor, AtenExecutor):
        return None
    others = content_hash(compiled.executor.referenced)
    return None if others is None else (chain.weights, others)


def _make_executor(captured: Program, key: _ProgramKey) -> tuple[Executor, str]:
    """The executor of a captured program, and why it does not use the fused kernels, if it does not."""
    machine = Machine.of(key.device, key.compute_dtype)
    if key.dtype is not torch.float32 or key.compute_dtype not in (torch.float32, torch.bfloat16):
        reason = f"fused kernels take float32 samples in float32 or bfloat16, not {key.dtype} in {key.compute_dtype}"
    else:
        try:
            program = build_gradient_program(captured, replace(machine, strided_adjoint=1.0), WITHOUT_POLYPHASE)
            lowered = lower(program, key.compute_dtype.itemsize)
            return CompiledExecutor(program, lowered, key.compute_dtype, key.device), ""
        except LoweringError as error:
            reason = str(error)
    return AtenExecutor(build_gradient_program(captured, machine), key.compute_dtype), reason


def _check(executor: Executor, x: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    """Compare with autograd, in x's own dtype and then, if it is another one, in the executor's."""
    if not all(part.isfinite().all() for part in expected):
        raise UnsupportedError("check", "autograd's energies or gradients are not finite, so the program is unchecked")
    if executor.dtype is not x.dtype and not isinstance(executor, LaneExecutor):
        precise = AtenExecutor(executor.program, x.dtype)
        precise.refresh()
        _compare(precise(x), expected, TOLERANCE.get(x.dtype, LOW_PRECISION_TOLERANCE))
    _compare(executor(x), expected, TOLERANCE.get(executor.dtype, LOW_PRECISION_TOLERANCE))


def _compare(found: list[Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    """Raise UnsupportedError if energies or gradients differ."""
    for name, ours, theirs in zip(("energies", "gradients"), found, expected, strict=True):
        ours, theirs = ours.double(), theirs.double()
        size = theirs.norm() if name == "gradients" else max(1.0, float(theirs.abs().max()))
        error = float((ours - theirs).norm() / size) if float(size) else float(ours.norm())
        if not error <= tolerance:
            raise UnsupportedError(
                "check", f"its {name} differ from autograd's by {error:.2g}, more than {tolerance:g}"
            )


def _compute_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if x.dtype is torch.float64 or dtype is torch.float32:
        return x.dtype
    if dtype is not None:
        return dtype
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _nearby_samples(x: Tensor) -> Tensor:
    """Three samples near the first two of x. Chains often start at equal samples or at zero, where errors can hide."""
    base = x.detach()[[0, min(1, x.shape[0] - 1), 0]].clone()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(base.shape, generator=generator, dtype=torch.float64, device="cpu").to(base)
    return base + 0.1 * noise
