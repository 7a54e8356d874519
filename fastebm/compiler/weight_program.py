"""Programs for the gradients of an energy's weights: run on images, and differentiated through folded weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastebm.compiler.autodiff import differentiate_weights
from fastebm.compiler.capture import UnsupportedError
from fastebm.compiler.cost_model import Machine, node_cost
from fastebm.compiler.lazy_tensors import LazyTensor, evaluate
from fastebm.compiler.lowering import LoweringError, LoweringResult, lower
from fastebm.compiler.program import Program
from fastebm.compiler.rewrites import FORWARD, WITHOUT_POLYPHASE, build_weight_program, simplify
from fastebm.ops import CompiledProgram
from fastebm.ops.weight_gradients import encode_tasks, weight_gradients_

# The factor of each image of some rows of the batch, from their energies.
Factors = Callable[[Tensor, slice], Tensor]


class WeightProgram:
    """A program that computes energies, and the sum over samples of a factor times the gradient of the weights.

    Its weights are folded: they are functions of the energy's parameters. `evaluated` gives their values with the graph
    of autograd, and `gradients` goes back through that graph, whose cost does not depend on the batch.

    Args:
        program: that was lowered.
        lowered: with tasks.
        trained: the weights of the program that gradients are wanted of.
        device: of the samples.
        saving: how many times as many operations autograd carries out for a sample.
    """

    def __init__(
        self,
        program: Program,
        lowered: LoweringResult,
        trained: frozenset[LazyTensor],
        device: torch.device,
        saving: float,
    ) -> None:
        self.program = program
        self.trained = trained
        self.saving = saving
        self.lowered = lowered
        self.device = device
        self.compiled = CompiledProgram(lowered.program, device)
        self._tasks = encode_tasks(lowered.tasks)
        self._wanted = [*lowered.lazy_tensors(), *(result.weight for result in lowered.results)]

    @classmethod
    def of(cls, captured: Program, x: Tensor, compute_dtype: torch.dtype) -> WeightProgram:
        """The program of an energy for samples like x. Gradients are wanted of parameters that require one.

        To be called within `differentiable_weights`. Raises UnsupportedError with the node and the reason where there
        is none.
        """
        machine = replace(Machine.of(x.device, compute_dtype), strided_adjoint=1.0)
        forward = simplify(captured, machine, FORWARD)
        trained = _trained(forward)
        if not trained:
            raise UnsupportedError("weights", "the energies depend on no parameter that requires a gradient")
        program = build_weight_program(forward, trained, machine, WITHOUT_POLYPHASE)
        lowered = _lowered(program, 8 if x.dtype is torch.float64 else compute_dtype.itemsize, trained)
        unfolded = differentiate_weights(captured, _trained(captured))
        return cls(program, lowered, trained, x.device, _flops(unfolded) / max(1, _flops(program)))

    def precise(self) -> WeightProgram:
        """The same program in float32."""
        lowered = _lowered(self.program, torch.float32.itemsize, self.trained)
        return WeightProgram(self.program, lowered, self.trained, self.device, self.saving)

    def evaluated(self) -> dict[LazyTensor, Any]:
        """The folded weights of now, with their graph; the constants of the program are set to their values."""
        with torch.enable_grad():
            values = evaluate(self._wanted)
        plain = {weight: value.detach() if isinstance(value, Tensor) else value for weight, value in values.items()}
        self.compiled.refresh(*self.lowered.constants(plain))
        return values

    @torch.no_grad()
    def run(self, x: Tensor, factors: Factors) -> tuple[Tensor, list[Tensor]]:
        """Energies (B,) of samples, contiguous, and the gradients with respect to `lowered.results`, summed over them.

        Some images at a time: their results are in the workspace until the gradients are summed up.
        """
        dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
        sums = [torch.zeros(task.result_shape(), dtype=dtype, device=x.device) for task in self.lowered.tasks]
        energies = torch.empty(len(x), dtype=dtype, device=x.device)
        step = self.compiled.images_at_once
        for first in range(0, len(x), step):
            rows = slice(first, min(first + step, len(x)))
            energies[rows] = self.compiled(x[rows])[0]
            given = factors(energies[rows], rows).to(x.device, dtype)
            code = self.compiled.code(rows.stop - rows.start)
            weight_gradients_(sums, given, code, self._tasks, self.compiled.workspace)
        return energies, [result.restore(each) for result, each in zip(self.lowered.results, sums, strict=True)]

    def gradients(
        self, values: dict[LazyTensor, Any], folded: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The gradients with respect to `parameters`, None where the energies don't depend on one."""
        of = [values[result.weight] for result in self.lowered.results]
        given = [each.to(value.dtype) for each, value in zip(folded, of, strict=True)]
        return list(torch.autograd.grad(of, parameters, given, allow_unused=True))


def _lowered(program: Program, itemsize: int, trained: frozenset[LazyTensor]) -> LoweringResult:
    try:
        return lower(program, itemsize, trained)
    except LoweringError as error:
        raise UnsupportedError("program", str(error)) from error


def _flops(program: Program) -> int:
    return sum(node_cost(program, node, itemsize=4).flops for node in program)


def _trained(program: Program) -> frozenset[LazyTensor]:
    """The weights of a program that depend on a parameter that requires a gradient."""
    weights = [weight for node in program for weight in node.operation.weights()]
    with torch.enable_grad():
        values = evaluate(weights)
    return frozenset(weight for weight in weights if values[weight].requires_grad)
