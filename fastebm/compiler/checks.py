"""How a program is compared with the energy's own code: before its first use, and at the start of every chain."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from fastebm.compiler.candidates import Executor
from fastebm.compiler.capture import UnsupportedError
from fastebm.compiler.executor import AtenExecutor
from fastebm.compiler.lanes import LaneExecutor
from fastebm.compiler.own_code import Conditions, OwnCode

__all__ = [
    "UNKNOWN",
    "Agreement",
    "DisagreementError",
    "Reference",
    "check_program",
    "energies_agree",
    "gradient_agrees",
    "low_precision_excess",
    "mixed",
    "near",
    "reference",
    "shaken_by_rounding",
    "unless_it_raises",
]

Found = TypeVar("Found")

# The largest accepted difference from autograd, relative to the gradient: well above rounding, well below the error of
# a wrong program. The largest seen is 1.1e-3 in float32, for a deep net of leaky ReLUs, where a pre-activation near
# zero was rounded to the other side of the kink.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-2}
# In 16 bits, a program may have this error, or twice that of autocast itself where that is larger, as in deep nets.
LOW_PRECISION_TOLERANCE = 0.1
LOW_PRECISION_FLOOR = 1e-2
# The choice of a program must not hang on rounding: a resumed run has to take the same one. One pre-activation that is
# rounded to the other side of a kink may change half of a gradient, in a program as in autocast. So a program whose
# gradient is further off, but not by more than LOW_PRECISION_KINK, is held to the medians over this many other points.
LOW_PRECISION_POINTS = 8
LOW_PRECISION_KINK = 0.5
# The largest accepted differences at the start of a later chain, if those of the first check were smaller: of energies,
# and as many times that of gradients. What moves energies by less than that between two chains is not seen.
DRIFT = {torch.float64: 1e-9, torch.float32: 2e-4}
LOW_PRECISION_DRIFT = 2e-2
GRADIENT_DRIFT = 5.0


class DisagreementError(UnsupportedError):
    """A program computes other numbers than autograd, as `difference` says."""

    def __init__(self, difference: str) -> None:
        why = "an energy that depends on the other samples of its batch, or on how many there are, has no program"
        super().__init__("check", f"{difference} ({why})")
        self.difference = difference


@dataclass(frozen=True)
class Reference:
    """What autograd finds at the states where a program is checked.

    Attributes:
        energies, gradient: in x's own dtype.
        autocast: both in the program's 16-bit dtype, where it has one.
        function: says that the backward pass is an `autograd.Function`'s, which only traces of autograd follow.
    """

    energies: Tensor
    gradient: Tensor
    autocast: tuple[Tensor, Tensor] | None = None
    function: str = ""


def reference(own: OwnCode, x: Tensor, conditions: Conditions, compute_dtype: torch.dtype) -> Reference:
    """Autograd's energies and gradient at x.

    Raises UnsupportedError for an energy whose gradient no program can have: of code that is random, or that sets
    hooks in its backward pass.
    """
    energies, gradient, hook, function = own.examined(x, conditions, torch.float32)
    if hook:
        raise UnsupportedError("backward", hook)
    once, again = (own.energies(x, conditions, torch.float32) for _ in range(2))
    if not _close(once, again, 1e-6):
        raise UnsupportedError(
            "energy",
            "it is random: evaluated twice at the same states, it gives other energies (where that is dropout of a net "
            "in train mode, call net.eval(), or hand over the net itself)",
        )
    low = compute_dtype in (torch.bfloat16, torch.float16) and compute_dtype is not x.dtype
    autocast = own.by_autograd(x, conditions, compute_dtype) if low else None
    return Reference(energies, gradient, autocast, function)


@dataclass(frozen=True)
class Agreement:
    """How far a program was from autograd when it was checked: the relative errors of energies and of the gradient."""

    energy: float
    gradient: float


UNKNOWN = Agreement(0.0, 0.0)


def shaken_by_rounding(own: OwnCode, x: Tensor, conditions: Conditions, expected: Reference) -> bool:
    """Whether autograd itself finds other numbers where x moves by a few units in its last place.

    Programs may then differ from it without a fault: energies near 0 that are a sum of large terms, say.
    """
    unit = 4 * torch.finfo(x.dtype).eps * x.abs().clamp(min=float(x.abs().mean()))
    signs = 1 - 2 * (torch.arange(x.numel(), device=x.device) % 2).reshape(x.shape)
    moved = own.by_autograd(x + signs * unit, conditions, torch.float32)
    tolerance = TOLERANCE.get(x.dtype, LOW_PRECISION_FLOOR) / 10
    try:
        _compare(moved, (expected.energies, expected.gradient), tolerance)
    except DisagreementError:
        return True
    return False


def check_program(
    executor: Executor, x: Tensor, expected: Reference, elsewhere: Callable[[Tensor], Reference | None]
) -> Agreement:
    """Raises DisagreementError if the program's energies or gradient at x differ from autograd's.

    A program of 16 bits may be twice as far from float32 as autocast is, or 0.1, at x or in the median of points around
    it, where `elsewhere` says what autograd finds, if there is an energy. It is compared in x's own dtype too.
    """
    theirs = (expected.energies, expected.gradient)
    found = executor(x)
    if expected.autocast is None or isinstance(executor, LaneExecutor):
        return _compare(found, theirs, TOLERANCE.get(x.dtype, LOW_PRECISION_FLOOR))
    precise = AtenExecutor(executor.program, x.dtype)
    precise.refresh()
    _compare(precise(x), theirs, TOLERANCE.get(x.dtype, LOW_PRECISION_FLOOR))

    agreement = _agreement(found, theirs)
    at_x = _low_precision_errors(found, theirs), _low_precision_errors(expected.autocast, theirs)

    def errors(at: Tensor) -> tuple[list[float], list[float]] | None:
        if at is x:
            return at_x
        known = elsewhere(at)
        if known is None:
            return None
        assert known.autocast is not None
        exact = known.energies, known.gradient
        return _low_precision_errors(executor(at), exact), _low_precision_errors(known.autocast, exact)

    if excess := low_precision_excess(errors, x):
        raise _disagreement(_NAMES, *excess)
    usual = _allowed(at_x[1][1])
    return replace(agreement, gradient=min(agreement.gradient, usual))  # no kink widens what later chains are held to


def low_precision_excess(
    errors: Callable[[Tensor], tuple[list[float], list[float]] | None], x: Tensor
) -> tuple[int, float, float] | None:
    """Which error of a 16-bit program is larger than autocast's own explain, it, and the largest one allowed.

    Energies have no kinks: theirs counts at x.

    Args:
        errors: at samples like x, those of the program, and those of autocast: first that of energies, then that of the
            gradient, then those of parts of it. None where there is no energy, which says nothing.
        x: where the program is compared first.
    """
    at_x = errors(x)
    assert at_x is not None
    excess = _excess(*at_x)
    if excess is None or excess[0] == 0 or not at_x[0][1] <= LOW_PRECISION_KINK:
        return excess
    found = [at_x, *(errors(mixed(x, seed)) for seed in range(LOW_PRECISION_POINTS))]
    finite = [each for each in found if each and all(math.isfinite(error) for of in each for error in of)]
    if len(finite) <= LOW_PRECISION_POINTS // 2:
        return excess
    program, autocast = (
        [statistics.median(each) for each in zip(*of, strict=True)] for of in zip(*finite, strict=True)
    )
    return _excess(program, autocast)


def unless_it_raises(find: Callable[[], Found]) -> Found | None:
    """What an energy's own code gives at points that its owner did not ask for; None where there is no energy.

    Raises UnsupportedError for energies without a program.
    """
    try:
        return find()
    except UnsupportedError:
        raise
    except Exception:
        return None


def mixed(x: Tensor, seed: int) -> Tensor:
    """Each sample, and up to a half of another one; of a single sample, of the mean of its numbers.

    So they are where samples are: within bounds, at the same offset, as sparse or as correlated.
    """
    shape, generator = (len(x), *(1,) * (x.dim() - 1)), torch.Generator().manual_seed(seed)
    shares = torch.rand(shape, generator=generator, device="cpu").to(x) / 2
    return torch.lerp(x, x.roll(1, 0) if len(x) > 1 else x.mean().expand_as(x), shares)


def near(tensor: Tensor) -> Tensor:
    """Other numbers: a tenth away, with their signs, and small ones in the place of zeros."""
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0), device="cpu").clamp(-3, 3).to(tensor)
    return torch.where(tensor == 0, 0.1 * noise, tensor * (1 + 0.1 * noise))


def energies_agree(found: Tensor, own: Tensor, compute_dtype: torch.dtype, before: Agreement) -> bool:
    """Whether a program's energies are those of the energy's own code, up to rounding, at each sample."""
    return _close(found, own, max(DRIFT.get(compute_dtype, LOW_PRECISION_DRIFT), 4 * before.energy))


def gradient_agrees(
    found: list[Tensor], own: tuple[Tensor, Tensor], compute_dtype: torch.dtype, before: Agreement
) -> bool:
    """Whether a program's energies and gradient are autograd's, up to rounding."""
    if not energies_agree(found[0], own[0], compute_dtype, before):
        return False
    finite = own[1].isfinite()
    ours, theirs = found[1].where(finite, 0), own[1].where(finite, 0)
    drift = GRADIENT_DRIFT * DRIFT.get(compute_dtype, LOW_PRECISION_DRIFT)
    return _gradient_error(ours, theirs) <= max(drift, 4 * before.gradient)


_NAMES = ("energies", "gradients")
# Samples whose gradient may be off, because a kink of the energy was rounded to the other side.
_AT_KINKS = 0.25
# How many times the error of all gradients that of one sample may have.
_OF_ONE = 5.0


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Whether energies are close to those of the same samples. None may hide behind others that are far larger."""
    ours, theirs = ours.double(), theirs.double()
    finite = theirs.isfinite()
    if not finite.all():
        if not torch.equal(ours.isfinite(), finite):
            return False
        ours, theirs = ours[finite], theirs[finite]
    return theirs.numel() == 0 or _energy_error(ours, theirs) <= tolerance


def _energy_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest error of an energy, relative to that energy, or to the median one where it is smaller."""
    ours, theirs = ours.double(), theirs.double()
    size = theirs.abs()
    error = (ours - theirs).abs() / size.clamp(min=max(float(size.median()), 1e-30))
    return float(error.max())


def _gradient_error(ours: Tensor, theirs: Tensor) -> float:
    """The error of gradients relative to their norm, and that of most samples relative to theirs, whichever is larger.

    The norm of all may be that of one sample.
    """
    ours, theirs = (part.double().reshape(len(part), -1) for part in (ours, theirs))
    sizes, errors = theirs.norm(dim=1), (ours - theirs).norm(dim=1)
    whole = float(sizes.norm())
    if whole == 0:
        return float(errors.max())
    relative = errors / sizes.clamp(min=max(float(sizes.median()), 1e-30))
    most = relative.sort().values[math.ceil((1 - _AT_KINKS) * len(relative)) - 1]
    return max(float(errors.norm()) / whole, float(most) / _OF_ONE)


def _excess(program: list[float], autocast: list[float]) -> tuple[int, float, float] | None:
    for which, (error, theirs) in enumerate(zip(program, autocast, strict=True)):
        if not error <= (allowed := _allowed(theirs)):
            return which, error, allowed
    return None


def _allowed(autocast: float) -> float:
    return max(LOW_PRECISION_TOLERANCE, 2 * autocast + LOW_PRECISION_FLOOR)


def _low_precision_errors(ours: Sequence[Tensor], theirs: tuple[Tensor, Tensor]) -> list[float]:
    """Of energies relative to the largest one, or to 1 where all are smaller; of gradients relative to their norm.

    Not a number where autograd's numbers are finite at no sample.
    """
    ours, theirs = _finite(ours, theirs)
    if not len(theirs[0]):
        return [math.nan, math.nan]
    (energies, gradient), (true_energies, true_gradient) = ([part.double() for part in pair] for pair in (ours, theirs))
    of_energies = (energies - true_energies).norm() / max(1.0, float(true_energies.abs().max()))
    size = float(true_gradient.norm())
    return [float(of_energies), float((gradient - true_gradient).norm()) / (size or 1.0)]


def _finite(found: Sequence[Tensor], expected: tuple[Tensor, Tensor]) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """At the samples where autograd's numbers are finite."""
    finite = expected[0].isfinite() & expected[1].isfinite().reshape(len(expected[0]), -1).all(1)
    if finite.all():
        return [*found], expected
    return [part[finite] for part in found], (expected[0][finite], expected[1][finite])


def _agreement(found: Sequence[Tensor], expected: tuple[Tensor, Tensor]) -> Agreement:
    found, expected = _finite(found, expected)
    return Agreement(_energy_error(found[0], expected[0]), _gradient_error(found[1], expected[1]))


def _compare(found: Sequence[Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> Agreement:
    agreement = _agreement(found, expected)
    for which, error in enumerate((agreement.energy, agreement.gradient)):
        if not error <= tolerance:
            raise _disagreement(_NAMES, which, error, tolerance)
    return agreement


def _disagreement(names: Sequence[str], which: int, error: float, allowed: float) -> DisagreementError:
    return DisagreementError(f"its {names[which]} differ from autograd's by {error:.2g}, more than {allowed:.2g}")
