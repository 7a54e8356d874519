"""Gradients of weights, lowered into the tasks of `fastebm::weight_gradients_`, which reads results that are kept."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from fastebm.compiler import operations as op
from fastebm.compiler.lazy_tensors import LazyTensor, lazy
from fastebm.compiler.lowering.epilogues import EpilogueBuilder
from fastebm.compiler.lowering.groups import Image, LoweringError, WeightResult
from fastebm.compiler.lowering.layout import bias_image, broadcast_to_image
from fastebm.compiler.operations import Operation
from fastebm.compiler.program import Node
from fastebm.ops.weight_gradients import WeightKind, WeightTask


class WeightBuilder(EpilogueBuilder):
    """Adds tasks for the gradients of the weights of an operation."""

    def add_weight_tasks(self, node: Node, operation: Operation) -> None:
        *inputs, gradient = node.inputs
        if isinstance(operation, op.Convolution):
            self._of_convolution(operation, inputs[0], gradient)
        elif isinstance(operation, op.Linear):
            self._of_linear(operation, inputs[0], gradient)
        elif isinstance(operation, op.Affine):
            for weight, source in ((operation.scale, inputs[0]), (operation.shift, None)):
                if weight is not None and weight in self.trained:
                    image = lazy(broadcast_to_image, weight, self.images[gradient], self.program[gradient].shape)
                    self._pixelwise(image, gradient, source)
        elif isinstance(operation, op.LinearCombination):
            for coefficient, source in zip(operation.coefficients, inputs, strict=True):
                if isinstance(coefficient, LazyTensor) and coefficient in self.trained:
                    self._add(coefficient, _total, WeightKind.PRODUCT, gradient, source, self.images[gradient])
        else:
            raise LoweringError(f"no task computes the gradient of the weights of {type(operation).__name__}")

    def _of_convolution(self, conv: op.Convolution, source: str, gradient: str) -> None:
        if conv.groups != 1:
            raise LoweringError("no task computes the gradient of a grouped convolution")
        if conv.weight in self.trained:
            # The weight of a transposed convolution is that of the one from its results to its inputs.
            read, summed = (gradient, source) if conv.transposed else (source, gradient)
            self._windows(conv.weight, _taps_last, read, summed, conv.kernel, conv.stride, conv.padding, conv.dilation)
        self._bias(conv.bias, gradient)

    def _of_linear(self, linear: op.Linear, source: str, gradient: str) -> None:
        if linear.weight in self.trained:
            given, result = self.images[source], self.images[gradient]
            if result[1:] == (1, 1):
                self._windows(linear.weight, _taps_last, source, gradient, given[1:])
            else:  # `given` has one pixel, or the map itself would have no instruction
                self._windows(linear.weight, _pixels_last, gradient, source, result[1:])
        self._bias(linear.bias, gradient)

    def _bias(self, bias: LazyTensor | None, gradient: str) -> None:
        if bias is None or bias not in self.trained:
            return
        self._pixelwise(bias_image(bias, self.images[gradient]), gradient, None)

    def _pixelwise(self, image: LazyTensor, gradient: str, source: str | None) -> None:
        """The gradient of an image that is added to the result, or multiplied with `source`."""
        size = self.images[gradient][1:]
        if image.shape[1:] not in ((1, 1), size):
            raise LoweringError("no task computes the gradient of a weight that is the same along one side of an image")
        per_pixel = image.shape[1:] != (1, 1)
        kind = WeightKind.SUM if source is None else WeightKind.PRODUCT
        restore = _pixels_last if per_pixel else _per_channel
        self._add(image, restore, kind, gradient, source, self.images[gradient], per_pixel=int(per_pixel))

    def _windows(
        self,
        weight: LazyTensor,
        restore: Any,
        source: str,
        gradient: str,
        kernel: op.Pair,
        stride: op.Pair = (1, 1),
        padding: op.Pair = (0, 0),
        dilation: op.Pair = (1, 1),
    ) -> None:
        grid = {"inner": self.images[source][0]}
        for name, pair in (("kernel", kernel), ("stride", stride), ("pad", padding), ("dilation", dilation)):
            grid |= {f"{name}_y": pair[0], f"{name}_x": pair[1]}
        self._add(weight, restore, WeightKind.CONVOLUTION, gradient, source, self.images[gradient], **grid)

    def _add(
        self,
        weight: LazyTensor,
        restore: Any,
        kind: WeightKind,
        gradient: str,
        source: str | None,
        grid: Image,
        **more: int,
    ) -> None:
        fields = {"out": grid[0], "height": grid[1], "width": grid[2], **more}
        for role, name in (("gradient", gradient), ("source", source)):
            if name is None:
                continue
            location = self.locate(name, plain=False)
            fields |= {
                f"{role}_buffer": location.buffer,
                f"{role}_channel": location.channel,
                f"{role}_factor_y": location.factor[0],
                f"{role}_factor_x": location.factor[1],
                f"{role}_broadcast": int(location.broadcast),
            }
        self.tasks.append(WeightTask(kind, len(self.tasks), **fields))
        self.results.append(WeightResult(weight, functools.partial(restore, shape=weight.shape)))


# ---- from the result of a task, contiguous, to the gradient of a weight of `shape`


def _taps_last(result: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(taps, out, in) to (out, in, taps), of a convolution or a linear map from an image, whose taps are pixels."""
    return result.permute(1, 2, 0).reshape(shape)


def _pixels_last(result: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(pixels, in, channels) to (channels, pixels, in) of a linear map to an image, and (H, W, C) to (C, H, W)."""
    return result.permute(2, 0, 1).reshape(shape)


def _per_channel(result: Tensor, shape: tuple[int, ...]) -> Tensor:
    return result.reshape(shape)


def _total(result: Tensor, shape: tuple[int, ...]) -> Tensor:
    return result.sum().reshape(shape)
