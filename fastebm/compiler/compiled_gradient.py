"""Energy gradients by programs: captured, rewritten and checked at first use, then run without autograd."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastebm.compiler.autodiff import differentiate
from fastebm.compiler.capture import UnsupportedError, capture
from fastebm.compiler.cost_model import Machine
from fastebm.compiler.executor import AtenExecutor, CompiledExecutor
from fastebm.compiler.lowering import LoweringError, lower
from fastebm.compiler.precision import without_autocast
from fastebm.compiler.program import Program
from fastebm.compiler.report import describe
from fastebm.compiler.rewrites import WITHOUT_POLYPHASE, build_gradient_program
from fastebm.compiler.roofline import measured_rates
from fastebm.ops import CompiledProgram
from fastebm.ops.backends import content_hash

__all__ = ["CompiledGradient", "UnsupportedError"]

Energy = Callable[[Tensor], Tensor]
Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]

# How far a program may be from autograd, relative to the gradient: rounding is far below, a wrong program above. A
# deep net of leaky ReLUs was seen at 1.1e-3 in float32, where a pre-activation near zero rounds to the other side of
# the kink.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-2}
LOW_PRECISION_TOLERANCE = 0.1


@dataclass(frozen=True)
class _ProgramKey:
    """What a program is made for."""

    sample: torch.Size
    dtype: torch.dtype
    device: torch.device
    compute_dtype: torch.dtype


@dataclass(frozen=True)
class _Prepared:
    """A program that was checked, as captured and as it runs; or the node and the reason why there is none.

    `fallback_reason` says why it runs on stock operations, if it does.
    """

    state: Any
    captured: Program | None = None
    execution: AtenExecutor | CompiledExecutor | None = None
    fallback_reason: str = ""
    refusal: tuple[str, str] = ("program", "there is none")


class CompiledGradient:
    """Energies and gradient of one energy, `energies, gradient = self(x)`, by a program for each kind of x.

    A program is captured at the first call for a shape of a sample, dtype, device and precision, and compared with
    autograd on samples near the given ones. It reads weights anew in every chain, which `new_chain` announces. If what
    the energy decides by has changed since capture (numbers and settings in its modules, what a function closes over,
    shapes and types of weights), it is captured anew.

    Most programs run by `fastebm::run_program`, whose results are the same bits for any batch and number of threads.
    Those that it has no instructions for run on stock operations of PyTorch (`describe` says why): library convolutions
    may choose another order of summation for another length of the batch, so that these are equal to rounding only.

    Args:
        energy, module: as for `capture`.
        dtype: that in which the operations run, None for the caller's autocast state; float64 samples always run in
            float64.
        reference: energies and gradient by autograd, in the precision of x.
    """

    def __init__(self, energy: Energy, module: nn.Module | None, dtype: torch.dtype | None, reference: Gradient):
        self.energy = energy
        self.module = module
        self.dtype = dtype
        self.reference = reference
        self._prepared: dict[_ProgramKey, _Prepared] = {}
        self._current: set[_ProgramKey] = set()
        self._state: Any = None
        self._weights: int | None = None
        self._seen: dict[_ProgramKey, tuple[int, int] | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without programs, which hold on to the original's weights."""
        return vars(self) | {"_prepared": {}, "_current": set(), "_seen": {}}

    def new_chain(self, state: Any, weights: int | None) -> None:
        """Weights may have changed: what they decide is evaluated at the next call.

        `state` is the energy's `fingerprint`. `weights` tells the module's weights from others, if it is known: a
        program that has seen them, and in what it holds by reference the same numbers, is as it should be.
        """
        self._current.clear()
        self._state = state
        self._weights = weights

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (B,), float32 or float64, and the gradient like x; both fresh.

        Raises Unsupported where the energy has no program, with the node and the reason.
        """
        kind = self._kind(x)
        with torch.inference_mode(False), torch.no_grad(), without_autocast(x.device.type):
            if kind not in self._current:
                self._bring_up_to_date(kind, x)
            prepared = self._prepared[kind]
            if prepared.execution is None:
                raise UnsupportedError(*prepared.refusal)
            energies, gradient = prepared.execution(x)
            if isinstance(prepared.execution, CompiledExecutor):
                return energies, gradient if gradient.stride() == x.stride() else torch.empty_like(x).copy_(gradient)
            precise = torch.float64 if x.dtype is torch.float64 else torch.float32
            return energies.to(precise, copy=True), torch.empty_like(x, requires_grad=False).copy_(gradient)

    def describe(self) -> str:
        """The programs so far, as tables, with the floor that measured rates of this machine set."""
        texts = []
        for kind, prepared in self._prepared.items():
            if prepared.captured is not None and prepared.execution is not None:
                before = differentiate(prepared.captured)
                rates = measured_rates(kind.device, kind.compute_dtype)
                text = describe(before, prepared.execution.program, kind.compute_dtype, rates)
                where = f"stock operations: {prepared.fallback_reason}" if prepared.fallback_reason else "fused kernels"
                texts.append(f"{text}\nruns on {where}")
        return "\n\n".join(texts)

    def compiled_program(self, x: Tensor) -> CompiledProgram | None:
        """The fused program that ran on samples like x since `new_chain`, if one did."""
        prepared = self._prepared.get(kind) if (kind := self._kind(x)) in self._current else None
        execution = None if prepared is None else prepared.execution
        return execution.fused if isinstance(execution, CompiledExecutor) else None

    def _kind(self, x: Tensor) -> _ProgramKey:
        return _ProgramKey(x.shape[1:], x.dtype, x.device, _compute_dtype(x, self.dtype))

    def _bring_up_to_date(self, kind: _ProgramKey, x: Tensor) -> None:
        prepared = self._prepared.get(kind)
        if prepared is None or prepared.state != self._state:
            self._prepared[kind] = prepared = self._prepare(kind, x, self._state)
            self._seen[kind] = self._weights_seen(prepared)
        elif prepared.execution is not None:
            seen = self._weights_seen(prepared)
            if seen is None or seen != self._seen.get(kind):
                prepared.execution.refresh()
            self._seen[kind] = seen
        self._current.add(kind)

    def _weights_seen(self, prepared: _Prepared) -> tuple[int, int] | None:
        """What tells all numbers that a program is made of from others, None where it isn't known."""
        if self._weights is None or not isinstance(prepared.execution, CompiledExecutor):
            return None
        others = content_hash(prepared.execution.referenced)
        return None if others is None else (self._weights, others)

    def _prepare(self, kind: _ProgramKey, x: Tensor, state: Any) -> _Prepared:
        # First of all, so that what is no energy of x raises what it always does.
        near = _near(x)
        expected = self.reference(near)
        try:
            captured = capture(self.energy, self.module, x)
            execution, fallback_reason = _executed(captured, kind)
            execution.refresh()
            _check(execution, near, expected)
        except UnsupportedError as refusal:
            return _Prepared(state, refusal=(refusal.node, refusal.reason))
        except Exception as error:  # a flaw of ours must not stop anyone whose energy autograd can do
            return _Prepared(state, refusal=("program", f"{type(error).__name__}: {error}"))
        return _Prepared(state, captured, execution, fallback_reason)


def _executed(captured: Program, kind: _ProgramKey) -> tuple[AtenExecutor | CompiledExecutor, str]:
    """What runs the program: our own kernels, or stock operations with the reason why."""
    machine = Machine.of(kind.device, kind.compute_dtype)
    reason = ""
    if kind.dtype is not torch.float32 or kind.compute_dtype not in (torch.float32, torch.bfloat16):
        reason = f"fused kernels take float32 samples in float32 or bfloat16, not {kind.dtype} in {kind.compute_dtype}"
    else:
        try:
            program = build_gradient_program(captured, replace(machine, strided_adjoint=1.0), WITHOUT_POLYPHASE)
            recipe = lower(program, kind.compute_dtype.itemsize)
            return CompiledExecutor(program, recipe, kind.compute_dtype, kind.device), ""
        except LoweringError as refusal:
            reason = str(refusal)
    return AtenExecutor(build_gradient_program(captured, machine), kind.compute_dtype), reason


def _check(execution: AtenExecutor | CompiledExecutor, x: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    """Compare with autograd, in x's own precision and then, if that is another, in the one it will run in."""
    if not all(part.isfinite().all() for part in expected):
        raise UnsupportedError("check", "energies or gradients by autograd are not finite, so nothing can be compared")
    if execution.dtype is not x.dtype:
        precise = AtenExecutor(execution.program, x.dtype)
        precise.refresh()
        _compare(precise(x), expected, TOLERANCE.get(x.dtype, LOW_PRECISION_TOLERANCE))
    _compare(execution(x), expected, TOLERANCE.get(execution.dtype, LOW_PRECISION_TOLERANCE))


def _compute_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if x.dtype is torch.float64 or dtype is torch.float32:
        return x.dtype
    if dtype is not None:
        return dtype
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _near(x: Tensor) -> Tensor:
    """Three samples beside the first two of x: chains often start alike, or at zero, where little can be told apart."""
    base = x.detach()[[0, min(1, x.shape[0] - 1), 0]].clone()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(base.shape, generator=generator, dtype=torch.float64).to(base)
    return base + 0.1 * noise


def _compare(found: list[Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    """Raise Unsupported where energies or gradients differ."""
    for name, ours, theirs in zip(("energies", "gradients"), found, expected, strict=True):
        ours, theirs = ours.double(), theirs.double()
        size = theirs.norm() if name == "gradients" else max(1.0, float(theirs.abs().max()))
        error = float((ours - theirs).norm() / size) if float(size) else float(ours.norm())
        if not error <= tolerance:
            raise UnsupportedError(
                "check", f"its {name} differ from autograd's by {error:.2g}, more than {tolerance:g}"
            )
