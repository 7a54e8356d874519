"""A score `s(x) = grad log p(x)` in place of an energy's gradient, for samplers that need no energy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastebm.compiler.energy_gradient import EnergyGradient, as_conditions
from fastebm.compiler.frozen_weights import frozen_weights
from fastebm.compiler.own_code import Conditions, energy_dtype

Score = nn.Module | Callable[..., Tensor]


class ScoreGradient:
    """`x -> (zeros, -score(x))`: a score network as the samplers take gradients. Build it with `score_gradient`.

    It runs as it is, in eval mode and without autograd, whose bits may depend on the batch.
    """

    engine = "score"
    reason = "a score is not an energy"
    batch_invariant = False

    def __init__(self, score: Score):
        if not callable(score):
            raise TypeError(f"score is a {type(score).__name__}; it must be a module or a function of x")
        self.score = score
        self._frozen = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"score": self.score}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["score"])  # type: ignore[misc]

    @property
    def name(self) -> str:
        """The score's name, for messages."""
        return getattr(self.score, "__name__", type(self.score).__name__)

    def __repr__(self) -> str:
        return f"score {self.name}"

    @torch.no_grad()
    def __call__(self, x: Tensor, conditions: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """Zeros (B,), because a score tells no energy, and the gradient, with x's shape and dtype.

        Raises TypeError or ValueError where the score is not a tensor like x.
        """
        given: Conditions = as_conditions(conditions, x.shape[0])
        with self.chain():
            found = self.score(x.clone(), *given)  # a layer may work in place, and x is the state of the chains
        if not isinstance(found, Tensor) or not found.is_floating_point():
            raise TypeError(f"the score must be a tensor of floating point numbers, got {type(found).__name__}")
        if found.shape != x.shape:
            raise ValueError(f"the score must have x's shape {tuple(x.shape)}, got {tuple(found.shape)}")
        return x.new_zeros(x.shape[0], dtype=energy_dtype(x)), found.detach().to(x.dtype).neg()

    @contextmanager
    def chain(self) -> Iterator[ScoreGradient]:
        """A block of calls with frozen weights."""
        if getattr(self._frozen, "now", False) or not isinstance(self.score, nn.Module):
            yield self
            return
        with frozen_weights(self.score):
            self._frozen.now = True
            try:
                yield self
            finally:
                self._frozen.now = False

    def leave_soon(self) -> None:
        """Nothing to wait for."""

    def ready(self, x: Tensor, conditions: Sequence[Tensor] = ()) -> bool:
        """There is no program."""
        return False

    def unsettled(self, x: Tensor, conditions: Sequence[Tensor] = ()) -> bool:
        """Nothing is compared with anything."""
        return False

    def compiled_program(self, x: Tensor, conditions: Sequence[Tensor] = ()) -> Any:
        """There is none."""
        return None


def require_energy(gradient: EnergyGradient | ScoreGradient, who: str) -> EnergyGradient:
    """The gradient itself. Raises TypeError for a score, which tells `who` no energies."""
    if isinstance(gradient, ScoreGradient):
        raise TypeError(
            f"{who} needs energies, and a score tells none; Langevin, Underdamped and MCLMC without warm_up take scores"
        )
    return gradient


def score_gradient(score: Score) -> ScoreGradient:
    """A score as what samplers take for an energy: `Langevin(fastebm.score_gradient(net), ...)`.

    Args:
        score: a module or function `s(x, *conditions) -> (B, ...)` with x's shape, the gradient of the log density.

    Samplers that accept or reject by the energy refuse it, with the reason.

    Example:
        >>> import torch, fastebm
        >>> normal = fastebm.Langevin(fastebm.score_gradient(lambda x: -x), **fastebm.schedules.from_epsilon(0.5))
        >>> x = normal.sample(torch.zeros(1000, 2), num_steps=50, seed=1)
        >>> bool((x.std(0) - 1).abs().max() < 0.1)
        True
    """
    return ScoreGradient(score)
