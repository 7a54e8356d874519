"""Runs a lane program with the weights of an energy."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastebm.compiler.faults import described
from fastebm.ops import CompiledLanes

from .lower import LaneError, Lowered, lower
from .trace import OF_BATCH, trace


class LaneExecutor:
    """Energies and gradient of float32 samples by `fastebm::run_lanes`, with the same bits for any batch and threads.

    It has the interface of the other executors. `compiled` is what runs.
    """

    dtype = torch.float32

    def __init__(self, lowered: Lowered, module: nn.Module | None):
        self.lowered = lowered
        self.module = module
        self.referenced = [weight for weight in lowered.weights if isinstance(weight, Tensor)]
        self.compiled = CompiledLanes(lowered.program)

    @classmethod
    def of(
        cls, energy: Any, module: nn.Module | None, sample: Tensor, conditions: Sequence[Tensor] = ()
    ) -> LaneExecutor:
        """The executor of an energy for samples like `sample` (1, ...) that come with `conditions`, each (1, ...).

        Raises LaneError where there is none.
        """
        try:
            traced = trace(energy, module, sample, conditions)
        except LaneError:
            raise
        except Exception as error:
            if _is_own(error):
                raise
            # Whatever the energy or the exporter raises, something else may still work.
            text = described(error)
            of_batch = OF_BATCH if "must match the size" in text or "Size does not match" in text else ""
            raise LaneError(f"{text}{of_batch}") from error
        return cls(lower(traced), module)

    @torch.no_grad()
    def refresh(self) -> None:
        """Evaluate the program's constants from the weights."""
        weights = [
            weight if isinstance(weight, Tensor) else _find(self.module, weight) for weight in self.lowered.weights
        ]
        values = self.lowered.evaluate(*weights)
        parts = [
            (start, pack(value.float())) for (start, pack), value in zip(self.lowered.constants, values, strict=True)
        ]
        numbers = torch.tensor(self.lowered.numbers, dtype=torch.float32, device="cpu")
        self.compiled.refresh([*parts, (self.lowered.size, numbers)])

    @torch.no_grad()
    def __call__(self, x: Tensor) -> list[Tensor]:
        """Energies and gradient of a batch of samples, as new float32 tensors."""
        return list(self.compiled(x.detach().contiguous()))

    def bound(self, conditions: Sequence[Tensor]) -> LaneExecutor:
        """This executor for samples that come with `conditions`, each (B, ...); it shares the constants."""
        made = copy.copy(self)
        flat = [condition.detach().reshape(len(condition), -1).float() for condition in conditions]
        made.compiled = self.compiled.bound(torch.cat(flat, dim=1))
        return made

    def with_own_weights(self) -> LaneExecutor:
        """Another executor of the same program, which has no constants yet."""
        return LaneExecutor(self.lowered, self.module)

    def describe(self) -> str:
        """The kinds of instructions and how many there are of each, and the numbers of a sample that are kept."""
        program = self.lowered.program
        kinds = [type(instruction).__name__ for instruction in program.instructions]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
        return f"lane program: {counts}; {program.arena:,} numbers a sample, {program.constants:,} constants"


def _is_own(error: Exception) -> bool:
    """Whether a decomposition raised it, by a mistake of its own.

    PyTorch's operators raise RuntimeError, as they do for an energy that can't be traced; and what passes the recorder
    alone, which runs them for the energy, is the energy's.
    """
    innermost = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return not isinstance(error, RuntimeError) and innermost.is_relative_to(Path(__file__).parent / "decompositions")


def _find(module: Any, path: str) -> Tensor:
    found = module
    for part in path.split("."):
        found = getattr(found, part)
    return found
