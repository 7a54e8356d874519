"""The import rules: each translates one ATen operation on samples into operations of a program.

An energy that uses an operation without a rule runs by autograd.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fastebm.compiler import operations as op
from fastebm.compiler.lazy_tensors import Coefficient, LazyTensor, Shape, lazy, product
from fastebm.compiler.program import Builder
from fastebm.ops.activations import ACTIVATION_TABLE, SWISH_SCALE


class UnsupportedError(Exception):
    """An energy has no program: the node and the reason."""

    def __init__(self, node: str, reason: str):
        super().__init__(f"{node}: {reason}")
        self.node = node
        self.reason = reason


@dataclass(frozen=True)
class SampleTensor:
    """A result that depends on x, by its name in the program."""

    name: str


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a function that translates these ATen operations; it gets the operation's arguments by name."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class AtenImporter:
    """Imports one graph into the nodes of `builder`; `dtype` is that of x and of all results.

    Weights are folded in float64 if x is float64, and in float32 otherwise.
    """

    def __init__(self, builder: Builder, dtype: torch.dtype):
        self.builder = builder
        self.dtype = dtype
        self.fold_dtype = torch.float64 if dtype is torch.float64 else torch.float32
        self.batch: Any = None
        self.node: fx.Node = None  # type: ignore[assignment]
        self._weights: dict[LazyTensor, LazyTensor] = {}

    def apply(self, rule: Rule, node: fx.Node, positional: Sequence[Any], keywords: dict[str, Any]) -> Any:
        """Run the rule for `node`, and check that its result has the shape and dtype that export recorded."""
        self.node = node
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        given = {a.name: a.default_value for a in schema if a.has_default_value()}
        given |= dict(zip((a.name for a in schema), positional, strict=False)) | keywords
        # In the order of the schema. Rules call the first argument h, which is self or input in ATen.
        arguments = {a.name: given[a.name] for a in schema}
        if schema[0].name in ("self", "input"):
            arguments = {"h": arguments.pop(schema[0].name)} | arguments
        for name, value in arguments.items():
            if isinstance(value, SampleTensor) and name in ("weight", "bias"):
                raise self.unsupported(f"its {name} depends on x")
        result = rule(self, **arguments)
        self._check(result, node.meta.get("val"))
        return result

    def unsupported(self, reason: str) -> UnsupportedError:
        """An exception that names the current node."""
        return UnsupportedError(self.node.name, f"{self.node.target}: {reason}")

    def _check(self, result: Any, recorded: Any) -> None:
        if isinstance(result, list | tuple):
            for part, tensor in zip(result, recorded, strict=True):
                self._check(part, tensor)
        elif isinstance(result, SampleTensor) and isinstance(recorded, Tensor):
            self.require_batch_first(recorded.shape)
            if self.shape(result) != tuple(recorded.shape[1:]):
                raise self.unsupported(f"shape {tuple(recorded.shape)} was not expected")
            if recorded.dtype is not self.dtype:
                raise self.unsupported(f"its result is {recorded.dtype}, x is {self.dtype}")

    def require_batch_first(self, shape: Sequence[Any]) -> None:
        """Raise UnsupportedError unless the first dimension, and no other, is that of the batch."""
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy: 0.3 s

        if not shape or not statically_known_true(shape[0] == self.batch):
            raise self.unsupported("the first dimension of its result is not that of the batch")
        if not all(isinstance(length, int) for length in shape[1:]):
            raise self.unsupported("the shape of a sample depends on the batch size")

    # ---- what rules use

    def add(self, operation: op.Operation, *inputs: SampleTensor) -> SampleTensor:
        return SampleTensor(self.builder.add(operation, *(h.name for h in inputs), name=self.node.name))

    def shape(self, h: SampleTensor) -> Shape:
        return self.builder.shape(h.name)

    def samples(self, h: Any, argument: str = "an argument") -> SampleTensor:
        """h, which must depend on x."""
        if not isinstance(h, SampleTensor):
            raise self.unsupported(f"{argument} must depend on x here")
        return h

    def images(self, h: Any) -> SampleTensor:
        """h, whose samples must be (C, H, W)."""
        h = self.samples(h, "its input")
        if len(self.shape(h)) != 3:
            raise self.unsupported(f"its input has shape {self.shape(h)} per sample, not (channels, height, width)")
        return h

    def dim(self, h: SampleTensor, dim: int) -> int:
        """The dimension of a sample that is dimension `dim` of the batch."""
        ndim = len(self.shape(h)) + 1
        if not -ndim <= dim < ndim:
            raise self.unsupported(f"there is no dimension {dim}")
        if dim % ndim == 0:
            raise self.unsupported(_OVER_THE_BATCH)
        return dim % ndim - 1

    def optional_weight(self, value: Any) -> LazyTensor | None:
        """A lazy tensor in the dtype of folding, or None for None."""
        if value is None:
            return None
        if not isinstance(value, LazyTensor):
            raise self.unsupported(f"a weight is a {type(value).__name__}")
        if value not in self._weights:
            self._weights[value] = LazyTensor(Tensor.to, (value, self.fold_dtype), value.shape)
        return self._weights[value]

    def weight(self, value: Any) -> LazyTensor:
        """A lazy tensor in the dtype of folding."""
        weight = self.optional_weight(value)
        if weight is None:
            raise self.unsupported("it has no weight")
        return weight

    def coefficient(self, value: Any) -> Coefficient:
        """A plain number, or a lazy tensor without dimensions."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, LazyTensor) and math.prod(value.shape) == 1:
            return lazy(Tensor.reshape, self.weight(value), ())
        raise self.unsupported("a factor must be one number")

    def constant(self, coefficient: Coefficient) -> LazyTensor:
        """A coefficient as a lazy tensor."""
        if isinstance(coefficient, LazyTensor):
            return coefficient
        device = self.node.meta["val"].device
        return LazyTensor(torch.full, ((), coefficient), (), dtype=self.fold_dtype, device=device)

    def reshape(self, h: SampleTensor, target: Shape) -> SampleTensor:
        if self.shape(h) == target:
            return h
        return SampleTensor(self.builder.add(op.Reshape(target), h.name, name=h.name))

    def broadcast(self, h: SampleTensor, target: Shape) -> SampleTensor:
        """h, broadcast within samples."""
        shape = self.shape(h)
        if shape == target:
            return h
        if len(shape) != len(target):
            raise self.unsupported(f"shapes {shape} and {target} per sample don't broadcast within samples")
        return self.add(op.Broadcast(target), h)

    def broadcast_together(self, *parts: SampleTensor) -> list[SampleTensor]:
        """The parts, broadcast to one shape."""
        try:
            target = tuple(torch.broadcast_shapes(*((1, *self.shape(h)) for h in parts)))[1:]
        except RuntimeError:
            raise self.unsupported("its inputs don't broadcast") from None
        return [self.broadcast(h, target) for h in parts]

    def broadcast_with(self, value: LazyTensor, h: SampleTensor) -> tuple[LazyTensor, SampleTensor]:
        """A weight without its batch dimension, and h broadcast with it."""
        ndim = len(self.shape(h)) + 1
        if len(value.shape) > ndim or (len(value.shape) == ndim and value.shape[0] != 1):
            raise self.unsupported(f"a tensor of shape {value.shape} differs from sample to sample")
        inner = value.shape[1:] if len(value.shape) == ndim else value.shape
        weight = lazy(Tensor.reshape, self.weight(value), inner)
        target = tuple(torch.broadcast_shapes(inner, self.shape(h)))
        return weight, self.broadcast(h, target)


def _pair(numbers: Any) -> op.Pair:
    if isinstance(numbers, int):
        return numbers, numbers
    numbers = tuple(numbers)
    return (numbers[0], numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])


# ---- linear maps


@_rule("aten.conv2d.default", "aten.conv2d.padding", "aten.conv_transpose2d.input")
def _convolution(
    t: AtenImporter, h: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int, **rest: Any
) -> SampleTensor:
    weight, dilation = t.weight(weight), _pair(dilation)
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(n % 2 for n in total):
            raise t.unsupported("'same' padding of an even kernel pads unequally")
        padding = (total[0] // 2, total[1] // 2)
    settings = (_pair(stride), _pair(padding), dilation, "transpose" in str(t.node.target))
    output_padding = _pair(rest.get("output_padding", 0))
    return t.add(op.Convolution(weight, t.optional_weight(bias), *settings, output_padding, groups), t.images(h))


@_rule("aten.linear.default")
def _linear(t: AtenImporter, h: Any, weight: Any, bias: Any) -> SampleTensor:
    h = t.samples(h, "its input")
    if not t.shape(h):
        raise t.unsupported("its input has no features")
    return t.add(op.Linear(t.weight(weight), t.optional_weight(bias)), h)


@_rule("aten.matmul.default", "aten.mm.default", "aten.mv.default")
def _matmul(t: AtenImporter, h: Any, other: Any = None, mat2: Any = None, vec: Any = None) -> SampleTensor:
    matrix = next(m for m in (other, mat2, vec) if m is not None)
    if isinstance(h, SampleTensor) and isinstance(matrix, SampleTensor):
        raise t.unsupported("a product of two results is not supported")
    if isinstance(matrix, SampleTensor):  # columns are multiplied: samples of vectors would be mixed
        weight, dim = t.weight(h), len(t.shape(matrix)) - 2
        if len(weight.shape) > 2 or dim < 0:
            raise t.unsupported(f"a product of a weight of shape {weight.shape} with samples is not supported")
        rows = lazy(Tensor.reshape, weight, (-1, weight.shape[-1]))
        product = _swapped(t, t.add(op.Linear(rows), _swapped(t, matrix)))
    else:
        weight, h = t.weight(matrix), t.samples(h)
        if len(weight.shape) > 2 or not t.shape(h):
            raise t.unsupported(f"a product with a weight of shape {weight.shape} is not supported")
        dim = len(t.shape(h)) - 1
        product = t.add(op.Linear(lazy(_rows, weight)), h)
    shape = t.shape(product)
    return t.reshape(product, (*shape[:dim], *shape[dim + 1 :])) if len(weight.shape) == 1 else product


def _rows(matrix: Tensor) -> Tensor:
    """The weight of a linear map for a product with a matrix (in, out) or a vector (in,) from the right."""
    return matrix.t() if matrix.dim() == 2 else matrix[None]


def _swapped(t: AtenImporter, h: SampleTensor) -> SampleTensor:
    """h with its last two dimensions exchanged."""
    dims = list(range(len(t.shape(h))))
    return t.add(op.Permute((*dims[:-2], dims[-1], dims[-2])), h)


@_rule("aten.einsum.default")
def _einsum(t: AtenImporter, equation: str, tensors: Any, **_: Any) -> SampleTensor:
    """Sums of one result, of a product of two, or of a product with one weight."""
    terms, arrow, out = equation.replace(" ", "").partition("->")
    letters = terms.split(",")
    plain = arrow and "." not in equation and all(len(set(part)) == len(part) for part in letters)
    of_x = [(part, h) for part, h in zip(letters, tensors, strict=True) if isinstance(h, SampleTensor)]
    weights = [(part, w) for part, w in zip(letters, tensors, strict=True) if not isinstance(w, SampleTensor)]
    if not plain or len(of_x) > 2 or len(of_x) + len(weights) > 2 or any(part[0] != out[:1] for part, _ in of_x):
        raise t.unsupported(f"{equation} is not supported")
    if any(out[0] in part for part, _ in weights):
        raise t.unsupported(_OVER_THE_BATCH)
    (axes, h), out = of_x[0], out[1:]
    axes = axes[1:]
    if len(of_x) == 2:
        other, factor = of_x[1]
        if set(other[1:]) != set(axes):
            raise t.unsupported(f"{equation} is not supported")
        h = t.add(op.Multiply(), h, _ordered(t, factor, other[1:], axes))
    for part, weight in weights:
        summed = [axis for axis in axes if axis in part]
        new = [axis for axis in part if axis not in axes]
        weight = lazy(_permuted, t.weight(weight), [part.index(axis) for axis in (*new, *summed)])
        if not new:
            scale = tuple(weight.shape[summed.index(axis)] if axis in part else 1 for axis in axes)
            h = t.add(op.Affine(lazy(Tensor.reshape, weight, scale)), h)
            continue
        if any(axis in out for axis in summed) or not summed:
            raise t.unsupported(f"{equation} is not supported")
        kept = [axis for axis in axes if axis not in summed]
        h = _ordered(t, h, axes, "".join([*kept, *summed]))
        sizes, lengths = t.shape(h)[: len(kept)], weight.shape[: len(new)]
        flat = t.reshape(h, (*sizes, math.prod(t.shape(h)[len(kept) :])))
        matrix = lazy(Tensor.reshape, weight, (math.prod(lengths), -1))
        h, axes = t.reshape(t.add(op.Linear(matrix), flat), (*sizes, *lengths)), "".join([*kept, *new])
    gone = tuple(i for i, axis in enumerate(axes) if axis not in out)
    h = t.add(op.Sum(gone), h) if gone else h
    kept_axes = "".join(axis for axis in axes if axis in out)
    h = t.reshape(h, tuple(n for i, n in enumerate(t.shape(h)) if i not in gone))
    return _ordered(t, h, kept_axes, out)


def _ordered(t: AtenImporter, h: SampleTensor, axes: str, target: str) -> SampleTensor:
    """h with its dimensions, which have letters, in another order."""
    return h if axes == target else t.add(op.Permute(tuple(axes.index(axis) for axis in target)), h)


def _permuted(weight: Tensor, order: list[int]) -> Tensor:
    return weight.permute(order)


@_rule("aten.addmm.default")
def _addmm(t: AtenImporter, h: Any, mat1: Any, mat2: Any, beta: Any, alpha: Any) -> SampleTensor:
    if isinstance(h, SampleTensor) or isinstance(mat2, SampleTensor) or (beta, alpha) != (1, 1):
        raise t.unsupported("only the weight and bias of a linear layer are supported")
    return t.add(op.Linear(lazy(Tensor.t, t.weight(mat2)), t.weight(h)), t.samples(mat1))


@_rule("aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default")
def _batch_norm(
    t: AtenImporter,
    h: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    eps: float,
    training: bool = False,
    **_: Any,
) -> Any:
    if training or running_mean is None:
        raise t.unsupported("it takes its statistics from the batch")
    scale_parts = (t.optional_weight(weight), t.weight(running_var), eps, (-1, *[1] * (len(t.shape(h)) - 1)))
    shift = lazy(_norm_shift, t.optional_weight(bias), t.weight(running_mean), *scale_parts)
    result = t.add(op.Affine(lazy(_norm_scale, *scale_parts), shift), t.samples(h))
    return (result, None, None) if "legit" in str(t.node.target) else result


def _norm_scale(weight: Tensor | None, variance: Tensor, eps: float, shape: tuple[int, ...]) -> Tensor:
    scale = (variance + eps).rsqrt()
    return (scale if weight is None else scale * weight).reshape(shape)


def _norm_shift(
    bias: Tensor | None, mean: Tensor, weight: Tensor | None, variance: Tensor, eps: float, shape: tuple[int, ...]
) -> Tensor:
    shift = -mean.reshape(shape) * _norm_scale(weight, variance, eps, shape)
    return shift if bias is None else shift + bias.reshape(shape)


@_rule("aten.instance_norm.default")
def _instance_norm(
    t: AtenImporter,
    h: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    use_input_stats: bool,
    eps: float,
    **_: Any,
) -> Any:
    if not use_input_stats:
        return _batch_norm(t, h, weight, bias, running_mean, running_var, eps)
    h = t.images(h)
    return _scaled(t, _normalized(t, h, eps, lambda g: _group_mean(t, g, t.shape(h)[0])), weight, bias)


@_rule("aten.group_norm.default")
def _group_norm(t: AtenImporter, h: Any, num_groups: int, weight: Any, bias: Any, eps: float, **_: Any) -> SampleTensor:
    h = t.images(h)
    return _scaled(t, _normalized(t, h, eps, lambda g: _group_mean(t, g, num_groups)), weight, bias)


@_rule("aten.layer_norm.default")
def _layer_norm(
    t: AtenImporter, h: Any, normalized_shape: Any, weight: Any, bias: Any, eps: float, **_: Any
) -> SampleTensor:
    h = t.samples(h)
    return _scaled(t, _normalized(t, h, eps, lambda g: _last_mean(t, g, normalized_shape)), weight, bias)


@_rule("aten.rms_norm.default")
def _rms_norm(t: AtenImporter, h: Any, normalized_shape: Any, weight: Any, eps: Any) -> SampleTensor:
    h, eps = t.samples(h), torch.finfo(t.dtype).eps if eps is None else eps
    squares = _last_mean(t, t.add(op.Activation("square"), h), normalized_shape)
    return _scaled(t, _by_deviation(t, h, squares, eps), weight, None)


def _last_mean(t: AtenImporter, h: SampleTensor, normalized_shape: Any) -> SampleTensor:
    """The mean over the last dimensions, which keep length 1."""
    count = len(t.shape(h))
    if count == len(normalized_shape) == 3:
        return _group_mean(t, h, 1)
    return _mean(t, h, tuple(range(count - len(normalized_shape), count)))


def _group_mean(t: AtenImporter, h: SampleTensor, groups: int) -> SampleTensor:
    """The mean over the pixels and the channels of each group, for each channel: (channels, 1, 1).

    Pixels and channels are summed in turn, here and in the gradient: one sum over both takes ten times as long.
    """
    mean, channels = _mean(t, h, (1, 2)), t.shape(h)[0]
    if groups == channels:
        return mean
    if groups == 1:
        return t.broadcast(_mean(t, mean, (0,)), t.shape(mean))
    arguments = (groups, channels // groups, t.fold_dtype, t.node.meta["val"].device)
    weight = LazyTensor(_group_matrix, arguments, (channels, channels, 1, 1))
    return t.add(op.Convolution(weight), mean)


def _group_matrix(groups: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weight of a convolution that gives each channel the mean of its group of `size`."""
    block = torch.full((size, size), 1.0 / size, dtype=dtype, device=device)
    return torch.block_diag(*[block] * groups)[:, :, None, None]


def _normalized(
    t: AtenImporter, h: SampleTensor, eps: float, mean: Callable[[SampleTensor], SampleTensor]
) -> SampleTensor:
    """h without its mean, over its standard deviation. The variance is that of the difference: nothing cancels."""
    centred = t.add(op.LinearCombination((1.0, -1.0)), h, t.broadcast(mean(h), t.shape(h)))
    return _by_deviation(t, centred, mean(t.add(op.Activation("square"), centred)), eps)


def _by_deviation(t: AtenImporter, h: SampleTensor, variance: SampleTensor, eps: float) -> SampleTensor:
    inverse = t.add(op.Activation("rsqrt"), t.add(op.Affine(None, t.constant(eps)), variance))
    return t.add(op.Multiply(), h, t.broadcast(inverse, t.shape(h)))


def _scaled(t: AtenImporter, h: SampleTensor, weight: Any, bias: Any) -> SampleTensor:
    """h with the scale and shift of a norm: for each channel, or of the shape of the last dimensions."""
    scale, shift = t.optional_weight(weight), t.optional_weight(bias)
    if "layer" not in str(t.node.target) and "rms" not in str(t.node.target):
        scale, shift = (None if w is None else lazy(Tensor.reshape, w, (-1, 1, 1)) for w in (scale, shift))
    return h if scale is None and shift is None else t.add(op.Affine(scale, shift), h)


# ---- sums and products


@_rule("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar", "aten.rsub.Scalar")
def _add(t: AtenImporter, h: Any, other: Any, alpha: Any) -> SampleTensor:
    name = str(t.node.target)
    if "rsub" in name:
        h, other = other, h
    sign = -1.0 if "sub" in name else 1.0
    return _weighted_sum(t, [(1.0, h), (sign * alpha, other)])


def _weighted_sum(t: AtenImporter, terms: Sequence[tuple[Coefficient, Any]]) -> SampleTensor:
    """The sum of coefficient * term, where a term may depend on x, be a weight or be a number."""
    inputs = [(c, term) for c, term in terms if isinstance(term, SampleTensor)]
    parts = t.broadcast_together(*(term for _, term in inputs))
    result = t.add(op.LinearCombination(tuple(c for c, _ in inputs)), *parts)
    for c, term in terms:
        if isinstance(term, LazyTensor):
            shift, result = t.broadcast_with(term, result)
            result = t.add(op.Affine(None, lazy(operator.mul, shift, c)), result)
        elif not isinstance(term, SampleTensor):
            result = t.add(op.Affine(None, t.constant(product(t.coefficient(term), c))), result)
    return result


@_rule("aten.neg.default")
def _neg(t: AtenImporter, h: Any) -> SampleTensor:
    return t.add(op.LinearCombination((-1.0,)), t.samples(h))


@_rule("aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.div.Scalar")
def _mul(t: AtenImporter, h: Any, other: Any) -> SampleTensor:
    dividing = "div" in str(t.node.target)
    if dividing and isinstance(other, SampleTensor):
        other, dividing = t.add(op.Activation("reciprocal"), other), False
    if isinstance(h, SampleTensor) and isinstance(other, SampleTensor):
        return t.add(op.Multiply(), *t.broadcast_together(h, other))
    if not isinstance(h, SampleTensor):
        h, other = other, h
    if isinstance(other, LazyTensor) and math.prod(other.shape) != 1:
        scale, h = t.broadcast_with(other, h)
        return t.add(op.Affine(lazy(torch.reciprocal, scale) if dividing else scale), h)
    if isinstance(other, LazyTensor) and len(other.shape) > len(t.shape(h)) + 1:
        raise t.unsupported("it adds dimensions to samples")
    factor = t.coefficient(other)
    if dividing:
        factor = lazy(torch.reciprocal, factor) if isinstance(factor, LazyTensor) else 1.0 / factor
    return t.add(op.LinearCombination((factor,)), h)


@_rule("fastebm.expand_blend.default")
def _expand_blend(t: AtenImporter, primal: Any, fade: Any, beta: Any) -> SampleTensor:
    beta = t.coefficient(beta)
    return t.add(op.LinearCombination((beta, _complement(beta))), t.samples(primal), t.samples(fade))


def _complement(beta: Coefficient) -> Coefficient:
    return lazy(operator.sub, 1, beta) if isinstance(beta, LazyTensor) else 1.0 - beta


@_rule("fastebm.block_tail.default")
def _block_tail(
    t: AtenImporter, main: Any, skip: Any, fade: Any, beta: Any, activation: int, parameter: float
) -> SampleTensor:
    name, scale = ACTIVATION_TABLE[activation].name, math.sqrt(0.5)
    pool = op.AveragePool((2, 2), (2, 2))
    pooled, skip = t.add(pool, t.images(main)), t.add(pool, t.images(skip))
    parameters = {"elu": (parameter, 1.0, 1.0), "leaky_relu": (parameter,)}.get(name, ())
    active = t.add(op.Activation("silu" if name == "scaled_swish" else name, parameters), pooled)
    weight = 1.0 / SWISH_SCALE if name == "scaled_swish" else 1.0
    tail = t.add(op.LinearCombination((scale * weight, scale)), active, skip)
    if fade is None:
        return tail
    beta = t.coefficient(beta)
    return t.add(op.LinearCombination((beta, _complement(beta))), tail, t.samples(fade))


# ---- pointwise


@_rule("aten.silu.default", "aten.relu.default", "aten.tanh.default", "aten.sigmoid.default", "aten.exp.default")
@_rule("aten.elu.default", "aten.leaky_relu.default", "aten.softplus.default", "aten.square.default")
@_rule("aten.hardswish.default", "aten.hardsigmoid.default", "aten.mish.default", "aten.abs.default")
@_rule("aten.sqrt.default", "aten.rsqrt.default", "aten.reciprocal.default")
def _activation(t: AtenImporter, h: Any, **parameters: float) -> SampleTensor:
    """An activation with ATen's name, whose parameters are ATen's arguments in ATen's order."""
    kind = str(t.node.target).split(".")[1]
    return t.add(op.Activation(kind, tuple(map(float, parameters.values()))), t.samples(h))


@_rule("aten.gelu.default")
def _gelu(t: AtenImporter, h: Any, approximate: str) -> SampleTensor:
    return t.add(op.Activation("gelu" if approximate == "none" else "gelu_tanh"), t.samples(h))


@_rule("aten.selu.default")
def _selu(t: AtenImporter, h: Any) -> SampleTensor:
    # The constants of Klambauer et al., "Self-Normalizing Neural Networks", 2017.
    return t.add(op.Activation("elu", (1.6732632423543772, 1.0507009873554805, 1.0)), t.samples(h))


@_rule("aten.celu.default")
def _celu(t: AtenImporter, h: Any, alpha: float) -> SampleTensor:
    return t.add(op.Activation("elu", (alpha, 1.0, 1.0 / alpha)), t.samples(h))


@_rule("aten.hardtanh.default", "aten.relu6.default")
def _hardtanh(t: AtenImporter, h: Any, min_val: float = 0.0, max_val: float = 6.0) -> SampleTensor:
    return t.add(op.Activation("hardtanh", (float(min_val), float(max_val), 0.0)), t.samples(h))


@_rule("aten.clamp.default", "aten.clamp_min.default", "aten.clamp_max.default", "aten.clip.default")
def _clamp(t: AtenImporter, h: Any, **bounds: Any) -> SampleTensor:
    low, high = bounds.get("min"), bounds.get("max")
    low, high = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    if low > high:
        raise t.unsupported("its bounds are out of order")
    return t.add(op.Activation("hardtanh", (low, high, 1.0)), t.samples(h))


@_rule("aten.threshold.default")
def _threshold(t: AtenImporter, h: Any, threshold: Any, value: Any) -> SampleTensor:
    if threshold != value:
        raise t.unsupported("it has a jump")
    return t.add(op.Activation("hardtanh", (float(value), math.inf, 0.0)), t.samples(h))


@_rule("aten.softshrink.default")
def _softshrink(t: AtenImporter, h: Any, lambd: float) -> SampleTensor:
    h = t.samples(h)
    return t.add(op.LinearCombination((1.0, -1.0)), h, t.add(op.Activation("hardtanh", (-lambd, lambd, 1.0)), h))


@_rule("aten.log_sigmoid.default")
def _log_sigmoid(t: AtenImporter, h: Any) -> SampleTensor:
    negative = t.add(op.LinearCombination((-1.0,)), t.samples(h))
    # Beyond 40 the exponential adds nothing in float64 either.
    return t.add(op.LinearCombination((-1.0,)), t.add(op.Activation("softplus", (1.0, 40.0)), negative))


@_rule("aten.rrelu.default")
def _rrelu(t: AtenImporter, h: Any, lower: float, upper: float, training: bool, **_: Any) -> SampleTensor:
    if training:
        raise t.unsupported("it is random")
    return t.add(op.Activation("leaky_relu", ((lower + upper) / 2,)), t.samples(h))


@_rule("aten.prelu.default", "aten._prelu_kernel.default")
def _prelu(t: AtenImporter, h: Any, weight: Any) -> SampleTensor:
    """w h + (1 - w) relu(h), with one w or one for each channel."""
    h, slope = t.samples(h), t.weight(weight)
    channels = (-1, *[1] * (len(t.shape(h)) - 1)) if math.prod(slope.shape) > 1 else ()
    slope = lazy(Tensor.reshape, slope, channels)
    positive = t.add(op.Affine(lazy(torch.rsub, slope, 1)), t.add(op.Activation("relu"), h))
    return t.add(op.LinearCombination((1.0, 1.0)), positive, t.add(op.Affine(slope), h))


_POWERS = {2: "square", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}


@_rule("aten.pow.Tensor_Scalar")
def _pow(t: AtenImporter, h: Any, exponent: Any) -> SampleTensor:
    h = t.samples(h)
    if exponent in _POWERS:
        return t.add(op.Activation(_POWERS[exponent]), h)
    if exponent not in (1, 3, 4):
        raise t.unsupported(f"the power {exponent} is not supported")
    if exponent == 1:
        return h
    square = t.add(op.Activation("square"), h)
    return t.add(op.Activation("square"), square) if exponent == 4 else t.add(op.Multiply(), square, h)


@_rule("aten.glu.default")
def _glu(t: AtenImporter, h: Any, dim: int) -> SampleTensor:
    h = t.samples(h)
    dim = t.dim(h, dim)
    half = t.shape(h)[dim] // 2
    value = t.add(op.Slice(dim, 0, half), h)
    gate = t.add(op.Activation("sigmoid"), t.add(op.Slice(dim, half, 2 * half), h))
    return t.add(op.Multiply(), value, gate)


# ---- resolution, sums


@_rule("aten.avg_pool2d.default")
def _avg_pool2d(t: AtenImporter, h: Any, kernel_size: Any, stride: Any, padding: Any, **rest: Any) -> SampleTensor:
    kernel = _pair(kernel_size)
    pool = op.AveragePool(kernel, _pair(stride) if stride else kernel, _pair(padding), *rest.values())
    return t.add(pool, t.images(h))


@_rule("aten.max_pool2d.default", "aten.max_pool2d_with_indices.default")
def _max_pool2d(
    t: AtenImporter, h: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Any:
    """The sum of what is the first maximum of its window."""
    h, kernel = t.images(h), _pair(kernel_size)
    plain = (_pair(stride) if stride else kernel, _pair(padding), _pair(dilation)) == (kernel, (0, 0), (1, 1))
    if not plain or (ceil_mode and any(n % k for n, k in zip(t.shape(h)[1:], kernel, strict=True))):
        raise t.unsupported("only windows that lie side by side are supported")
    largest = t.add(op.Multiply(), h, t.add(op.FirstMaximum(kernel), h))
    result = t.add(op.LinearCombination((float(math.prod(kernel)),)), t.add(op.AveragePool(kernel, kernel), largest))
    return (result, None) if "indices" in str(t.node.target) else result


@_rule("aten.adaptive_avg_pool2d.default")
def _adaptive_avg_pool2d(t: AtenImporter, h: Any, output_size: Any) -> SampleTensor:
    h = t.images(h)
    size, out = t.shape(h)[1:], _pair(output_size)
    if any(n % m for n, m in zip(size, out, strict=True)):
        raise t.unsupported(f"{size} is no multiple of {out}")
    kernel = (size[0] // out[0], size[1] // out[1])
    return t.add(op.AveragePool(kernel, kernel), h)


@_rule("aten.var.correction", "aten.var.dim")
def _variance(
    t: AtenImporter, h: Any, dim: Any, keepdim: bool, correction: Any = None, unbiased: bool = True
) -> SampleTensor:
    h = t.samples(h)
    if not dim:
        raise t.unsupported(_OVER_THE_BATCH)
    dims = tuple(sorted(t.dim(h, d) for d in ([dim] if isinstance(dim, int) else dim)))
    shape = t.shape(h)
    count = math.prod(shape[d] for d in dims)
    removed = float(unbiased if correction is None else correction)
    if count <= removed:
        raise t.unsupported("it has no degree of freedom")
    centred = t.add(op.LinearCombination((1.0, -1.0)), h, t.broadcast(_mean(t, h, dims), shape))
    squares = _mean(t, t.add(op.Activation("square"), centred), dims)
    variance = t.add(op.LinearCombination((count / (count - removed),)), squares)
    return variance if keepdim else t.reshape(variance, tuple(n for d, n in enumerate(shape) if d not in dims))


@_rule("aten.avg_pool1d.default", "aten.adaptive_avg_pool1d.default")
def _avg_pool1d(
    t: AtenImporter, h: Any, output_size: Any = None, kernel_size: Any = None, padding: Any = 0, **_: Any
) -> SampleTensor:
    """Only a mean over all of the last dimension."""
    h = t.samples(h)
    whole = output_size is not None or (_pair(kernel_size)[0], _pair(padding)[0]) == (t.shape(h)[-1], 0)
    if not whole or t.node.meta["val"].shape[-1] != 1:
        raise t.unsupported("only a mean over the whole length is supported")
    return _mean(t, h, (len(t.shape(h)) - 1,))


_OVER_THE_BATCH = "it works along the batch, so samples would influence each other"


@_rule("aten.sum.default", "aten.mean.default", "aten.sum.dim_IntList", "aten.mean.dim", "aten.logsumexp.default")
def _reduction(t: AtenImporter, h: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> SampleTensor:
    h = t.samples(h)
    shape, kind = t.shape(h), str(t.node.target).split(".")[1]
    if not dim:
        raise t.unsupported(_OVER_THE_BATCH)
    dims = tuple(sorted(t.dim(h, d) for d in ([dim] if isinstance(dim, int) else dim)))
    if kind == "logsumexp":
        if len(dims) != 1:
            raise t.unsupported("only one dimension is supported")
        reduced = t.add(op.LogSumExp(dims[0]), h)
    else:
        reduced = _mean(t, h, dims) if kind == "mean" else t.add(op.Sum(dims), h)
    return reduced if keepdim else t.reshape(reduced, tuple(n for d, n in enumerate(shape) if d not in dims))


def _mean(t: AtenImporter, h: SampleTensor, dims: tuple[int, ...]) -> SampleTensor:
    """The mean over dimensions of a sample, which keep length 1."""
    shape = t.shape(h)
    if dims == (1, 2) and len(shape) == 3:
        return t.add(op.AveragePool(shape[1:], shape[1:]), h)
    return t.add(op.LinearCombination((1.0 / math.prod(shape[d] for d in dims),)), t.add(op.Sum(dims), h))


@_rule(
    "aten.upsample_nearest2d.vec",
    "aten.upsample_nearest2d.default",
    "aten._upsample_nearest_exact2d.vec",
    "aten._upsample_nearest_exact2d.default",
)
def _upsample(t: AtenImporter, h: Any, **_: Any) -> SampleTensor:
    h = t.images(h)
    size, out = t.shape(h)[1:], tuple(t.node.meta["val"].shape[2:])
    if any(m % n for n, m in zip(size, out, strict=True)):
        raise t.unsupported(f"{out} is no multiple of {size}")
    return t.add(op.Upsample((out[0] // size[0], out[1] // size[1])), h)


# ---- moving data


@_rule("aten.flatten.using_ints", "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")
@_rule("aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default", "aten.unsqueeze.default")
@_rule("aten.unflatten.int", "aten.expand.default", "aten.expand_as.default")
def _reshape_or_expand(t: AtenImporter, h: Any, **_: Any) -> SampleTensor:
    shape = t.node.meta["val"].shape
    t.require_batch_first(shape)
    change = t.broadcast if "expand" in str(t.node.target) else t.reshape
    return change(t.samples(h), tuple(shape[1:]))


@_rule("aten.clone.default", "aten.contiguous.default", "aten.alias.default", "aten.lift_fresh_copy.default")
def _identity(t: AtenImporter, h: Any, **_: Any) -> SampleTensor:
    return t.samples(h)


@_rule("aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default")
def _dropout(t: AtenImporter, h: Any, p: float, train: bool) -> SampleTensor:
    if train and p:
        raise t.unsupported("it is random")
    return t.samples(h)


@_rule("aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten._to_copy.default", "aten.type_as.default")
def _to(t: AtenImporter, h: Any, **_: Any) -> SampleTensor:
    before, after = t.node.args[0].meta["val"], t.node.meta["val"]  # type: ignore[union-attr]
    if (before.dtype, before.device) != (after.dtype, after.device):
        raise t.unsupported(f"it changes {before.dtype} on {before.device} to {after.dtype} on {after.device}")
    return t.samples(h)


@_rule("aten.permute.default")
def _permute(t: AtenImporter, h: Any, dims: Any) -> SampleTensor:
    h = t.samples(h)
    count = len(t.shape(h)) + 1
    if dims[0] % count != 0:
        raise t.unsupported("it moves the batch")
    return t.add(op.Permute(tuple(t.dim(h, d) for d in dims[1:])), h)


@_rule("aten.transpose.int", "aten.swapaxes.default", "aten.swapdims.default")
def _transpose(t: AtenImporter, h: Any, **dims: int) -> SampleTensor:
    order = list(range(len(t.shape(t.samples(h))) + 1))
    first, second = dims.values()
    order[first], order[second] = order[second], order[first]
    return _permute(t, h, order)


@_rule("aten.mT.default", "aten.adjoint.default")
def _matrix_transpose(t: AtenImporter, h: Any) -> SampleTensor:
    h = t.samples(h)
    if len(t.shape(h)) < 2:
        raise t.unsupported(_OVER_THE_BATCH)
    return _swapped(t, h)


@_rule("aten.movedim.int", "aten.moveaxis.int", "aten.movedim.intlist", "aten.moveaxis.intlist")
def _movedim(t: AtenImporter, h: Any, source: Any, destination: Any) -> SampleTensor:
    count = len(t.shape(t.samples(h))) + 1
    moved = [[dim % count for dim in ([dims] if isinstance(dims, int) else dims)] for dims in (source, destination)]
    rest = [dim for dim in range(count) if dim not in moved[0]]
    for place, dim in sorted(zip(moved[1], moved[0], strict=True)):
        rest.insert(place, dim)
    return _permute(t, h, rest)


@_rule("aten.slice.Tensor")
def _slice(t: AtenImporter, h: Any, dim: int, start: Any, end: Any, step: Any) -> SampleTensor:
    h = t.samples(h)
    count = len(t.shape(h)) + 1
    if dim % count == 0 and (start or 0) == 0 and (end is None or end >= 2**62) and step == 1:
        return h
    dim = t.dim(h, dim)
    first, last, stride = slice(start, end, step).indices(t.shape(h)[dim])
    if stride != 1 or last <= first:
        raise t.unsupported("only slices with step 1 are supported")
    return h if last - first == t.shape(h)[dim] else t.add(op.Slice(dim, first, last), h)


@_rule("aten.select.int")
def _select(t: AtenImporter, h: Any, dim: int, index: int) -> SampleTensor:
    h = t.samples(h)
    dim = t.dim(h, dim)
    shape = t.shape(h)
    index %= shape[dim]
    part = h if shape[dim] == 1 else t.add(op.Slice(dim, index, index + 1), h)
    return t.reshape(part, (*shape[:dim], *shape[dim + 1 :]))


@_rule("aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default", "aten.split.sizes")
def _split(t: AtenImporter, h: Any, dim: int, **_: Any) -> list[SampleTensor]:
    h = t.samples(h)
    dim = t.dim(h, dim)
    start, parts = 0, []
    for tensor in t.node.meta["val"]:
        stop = start + tensor.shape[dim + 1]
        parts.append(t.add(op.Slice(dim, start, stop), h))
        start = stop
    return parts


@_rule("aten.cat.default", "aten.concat.default")
def _cat(t: AtenImporter, tensors: Any, dim: int) -> SampleTensor:
    parts = [t.samples(h, "each part") for h in tensors]
    return t.add(op.Concatenate(t.dim(parts[0], dim)), *parts)


@_rule("aten.stack.default")
def _stack(t: AtenImporter, tensors: Any, dim: int) -> SampleTensor:
    parts = [t.samples(h, "each part") for h in tensors]
    shape = t.shape(parts[0])
    at = dim % (len(shape) + 2) - 1
    if at < 0:
        raise t.unsupported(_OVER_THE_BATCH)
    return t.add(op.Concatenate(at), *(t.reshape(h, (*shape[:at], 1, *shape[at:])) for h in parts))


@_rule("aten.constant_pad_nd.default", "aten.pad.default")
def _pad(t: AtenImporter, h: Any, pad: Any, value: Any, mode: str = "constant") -> SampleTensor:
    h = t.samples(h)
    count = len(t.shape(h))
    if mode != "constant" or len(pad) > 2 * count or any(n < 0 for n in pad):
        raise t.unsupported("only constant padding within samples is supported")
    before, after = [0] * count, [0] * count
    for i in range(len(pad) // 2):
        before[count - 1 - i], after[count - 1 - i] = pad[2 * i], pad[2 * i + 1]
    return t.add(op.Pad(tuple(before), tuple(after), float(value or 0.0)), h)


@_rule("aten.pixel_shuffle.default")
def _pixel_shuffle(t: AtenImporter, h: Any, upscale_factor: int) -> SampleTensor:
    h = t.images(h)
    (channels, height, width), r = t.shape(h), upscale_factor
    split = t.reshape(h, (channels // r**2, r, r, height, width))
    return t.reshape(t.add(op.Permute((0, 3, 1, 4, 2)), split), (channels // r**2, height * r, width * r))
