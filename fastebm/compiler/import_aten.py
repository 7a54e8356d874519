"""What each ATen operation on samples is in a program's vocabulary. What has no rule here goes to autograd."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fastebm.compiler.lazy_tensors import Coefficient, LazyTensor, Shape, lazy, product
from fastebm.compiler.operations import (
    Activation,
    Affine,
    AveragePool,
    Broadcast,
    Concatenate,
    Convolution,
    Linear,
    LinearCombination,
    LogSumExp,
    Multiply,
    Operation,
    Pad,
    Pair,
    Permute,
    Reshape,
    Slice,
    Sum,
    Upsample,
)
from fastebm.compiler.program import Builder
from fastebm.ops.activations import ACTIVATIONS, SWISH_SCALE


class UnsupportedError(Exception):
    """Why an energy has no program."""

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
    """Decorator: the function translates these ATen operations. It gets the operation's arguments by their names."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


class AtenImporter:
    """Translates one graph into the nodes of `builder`; `dtype` is that of x, and so of all results.

    Weights are folded in float64 for a float64 x, and otherwise in float32.
    """

    def __init__(self, builder: Builder, dtype: torch.dtype):
        self.builder = builder
        self.dtype = dtype
        self.fold_dtype = torch.float64 if dtype is torch.float64 else torch.float32
        self.batch: Any = None
        self.node: fx.Node = None  # type: ignore[assignment]
        self._weights: dict[LazyTensor, LazyTensor] = {}

    def translate(self, rule: Rule, node: fx.Node, arguments: tuple[Any, Any]) -> Any:
        """Run the rule, and check that what it gives has the shape that export saw."""
        self.node = node
        positional, keywords = arguments
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        defaults = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}  # type: ignore[union-attr]
        given = defaults | dict(zip(names, positional, strict=False)) | keywords
        # ATen's first argument is self or input; rules call it h.
        given = {("h" if i == 0 and name in ("self", "input") else name): given[name] for i, name in enumerate(names)}
        for name, value in given.items():
            if isinstance(value, SampleTensor) and name in ("weight", "bias"):
                raise self.unsupported(f"its {name} depends on x")
        result = rule(self, **given)
        self._check(result, node.meta.get("val"))
        return result

    def unsupported(self, reason: str) -> UnsupportedError:
        """An exception that names the node now translated."""
        return UnsupportedError(self.node.name, f"{self.node.target}: {reason}")

    def _check(self, result: Any, seen: Any) -> None:
        if isinstance(result, list | tuple):
            for part, tensor in zip(result, seen, strict=True):
                self._check(part, tensor)
        elif isinstance(result, SampleTensor) and isinstance(seen, Tensor):
            self.require_batch_first(seen.shape)
            if self.shape(result) != tuple(seen.shape[1:]):
                raise self.unsupported(f"shape {tuple(seen.shape)} was not expected")
            if seen.dtype is not self.dtype:
                raise self.unsupported(f"its result is {seen.dtype}, x is {self.dtype}")

    def require_batch_first(self, shape: Sequence[Any]) -> None:
        """Refuse a result whose samples don't lie along the first dimension."""
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy: 0.3 s

        if not shape or not statically_known_true(shape[0] == self.batch):
            raise self.unsupported("its result does not have the samples along the first dimension")
        if not all(isinstance(length, int) for length in shape[1:]):
            raise self.unsupported("the shape of a sample depends on the length of the batch")

    # ---- what rules are made of

    def add(self, operation: Operation, *inputs: SampleTensor) -> SampleTensor:
        return SampleTensor(self.builder.add(operation, *(h.name for h in inputs), name=self.node.name))

    def shape(self, h: SampleTensor) -> Shape:
        return self.builder.shape(h.name)

    def samples(self, h: Any, argument: str = "an argument") -> SampleTensor:
        """h, which has to depend on x."""
        if not isinstance(h, SampleTensor):
            raise self.unsupported(f"{argument} must depend on x here")
        return h

    def dim(self, h: SampleTensor, dim: int) -> int:
        """A dimension of the batch as one of a sample."""
        count = len(self.shape(h)) + 1
        if not -count <= dim < count:
            raise self.unsupported(f"there is no dimension {dim}")
        if dim % count == 0:
            raise self.unsupported(_OVER_THE_BATCH)
        return dim % count - 1

    def weight(self, value: Any) -> LazyTensor | None:
        """A value in the dtype of folds."""
        if value is None:
            return None
        if not isinstance(value, LazyTensor):
            raise self.unsupported(f"a weight is a {type(value).__name__}")
        if value not in self._weights:
            self._weights[value] = LazyTensor(Tensor.to, (value, self.fold_dtype), value.shape)
        return self._weights[value]

    def coefficient(self, value: Any) -> Coefficient:
        """A number, or a value of one element without dimensions."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, LazyTensor) and math.prod(value.shape) == 1:
            return lazy(_scalar, self.weight(value))
        raise self.unsupported("a factor must be one number")

    def constant(self, coefficient: Coefficient) -> LazyTensor:
        """A coefficient as a value."""
        if isinstance(coefficient, LazyTensor):
            return coefficient
        device = self.node.meta["val"].device
        return LazyTensor(torch.full, ((), coefficient), (), dtype=self.fold_dtype, device=device)

    def reshaped(self, h: SampleTensor, target: Shape) -> SampleTensor:
        if self.shape(h) == target:
            return h
        return SampleTensor(self.builder.add(Reshape(target), h.name, name=h.name))

    def broadcast(self, h: SampleTensor, target: Shape) -> SampleTensor:
        """h with dimensions put in front, as broadcasting does, and stretched."""
        shape = self.shape(h)
        if shape == target:
            return h
        if len(shape) != len(target):
            raise self.unsupported(f"shapes {shape} and {target} a sample don't broadcast within samples")
        return self.add(Broadcast(target), h)

    def together(self, *parts: SampleTensor) -> list[SampleTensor]:
        """The parts broadcast to one shape."""
        try:
            target = tuple(torch.broadcast_shapes(*((1, *self.shape(h)) for h in parts)))[1:]
        except RuntimeError:
            raise self.unsupported("its inputs don't broadcast") from None
        return [self.broadcast(h, target) for h in parts]

    def beside(self, value: LazyTensor, h: SampleTensor) -> tuple[LazyTensor, SampleTensor]:
        """A value without its batch dimension, and h broadcast with it."""
        count = len(self.shape(h)) + 1
        if len(value.shape) > count or (len(value.shape) == count and value.shape[0] != 1):
            raise self.unsupported(f"a tensor of shape {value.shape} differs from sample to sample")
        inner = value.shape[1:] if len(value.shape) == count else value.shape
        weight = lazy(Tensor.reshape, self.weight(value), inner)
        target = tuple(torch.broadcast_shapes(inner, self.shape(h)))
        return weight, self.broadcast(h, target)


def _scalar(value: Tensor) -> Tensor:
    return value.reshape(())


def _pair(numbers: Any) -> Pair:
    if isinstance(numbers, int):
        return numbers, numbers
    numbers = tuple(numbers)
    return (numbers[0], numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])


# ---- linear maps


@_rule("aten.conv2d.default", "aten.conv2d.padding")
def _conv2d(
    t: AtenImporter, h: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> SampleTensor:
    weight = t.weight(weight)
    dilation = _pair(dilation)
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(n % 2 for n in reach):
            raise t.unsupported("'same' padding of an even kernel pads unequally")
        padding = (reach[0] // 2, reach[1] // 2)
    return t.add(
        Convolution(weight, t.weight(bias), _pair(stride), _pair(padding), dilation, groups=groups), _images(t, h)
    )


@_rule("aten.conv_transpose2d.input")
def _conv_transpose2d(
    t: AtenImporter,
    h: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
) -> SampleTensor:
    operation = Convolution(
        t.weight(weight) or _missing(t),
        t.weight(bias),
        _pair(stride),
        _pair(padding),
        _pair(dilation),
        transposed=True,
        output_padding=_pair(output_padding),
        groups=groups,
    )
    return t.add(operation, _images(t, h))


def _missing(t: AtenImporter) -> LazyTensor:
    raise t.unsupported("it has no weight")


def _images(t: AtenImporter, h: Any) -> SampleTensor:
    """h, whose samples must be (C, H, W)."""
    h = t.samples(h, "its input")
    if len(t.shape(h)) != 3:
        raise t.unsupported(f"its input has shape {t.shape(h)} a sample instead of (channels, height, width)")
    return h


@_rule("aten.linear.default")
def _linear(t: AtenImporter, h: Any, weight: Any, bias: Any) -> SampleTensor:
    h = t.samples(h, "its input")
    if not t.shape(h):
        raise t.unsupported("its input has no features")
    return t.add(Linear(t.weight(weight) or _missing(t), t.weight(bias)), h)


@_rule("aten.matmul.default", "aten.mm.default")
def _matmul(t: AtenImporter, h: Any, other: Any = None, mat2: Any = None) -> SampleTensor:
    weight = t.weight(mat2 if other is None else other) if not isinstance(other or mat2, SampleTensor) else None
    if not isinstance(h, SampleTensor) or weight is None:
        raise t.unsupported("only a product of samples with one matrix of weights is known")
    if len(weight.shape) != 2 or not t.shape(h):
        raise t.unsupported(f"a product with a weight of shape {weight.shape} is not known")
    return t.add(Linear(lazy(Tensor.t, weight)), h)


@_rule("aten.addmm.default")
def _addmm(t: AtenImporter, h: Any, mat1: Any, mat2: Any, beta: Any, alpha: Any) -> SampleTensor:
    if isinstance(h, SampleTensor) or isinstance(mat2, SampleTensor) or (beta, alpha) != (1, 1):
        raise t.unsupported("only weights of a linear layer are known here")
    return t.add(Linear(lazy(Tensor.t, t.weight(mat2)), t.weight(h)), t.samples(mat1))


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
    mean, variance = t.weight(running_mean), t.weight(running_var)
    trailing = len(t.shape(h)) - 1
    scale = lazy(_norm_scale, t.weight(weight), variance, eps, trailing)
    shift = lazy(_norm_shift, t.weight(weight), t.weight(bias), mean, variance, eps, trailing)
    result = t.add(Affine(scale, shift), t.samples(h))
    return (result, None, None) if "legit" in str(t.node.target) else result


def _norm_scale(weight: Tensor | None, variance: Tensor, eps: float, trailing: int) -> Tensor:
    scale = (variance + eps).rsqrt()
    return (scale if weight is None else scale * weight).reshape(-1, *[1] * trailing)


def _norm_shift(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float, trailing: int
) -> Tensor:
    shift = -mean.reshape(-1, *[1] * trailing) * _norm_scale(weight, variance, eps, trailing)
    return shift if bias is None else shift + bias.reshape(-1, *[1] * trailing)


# ---- sums and products


@_rule("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar", "aten.rsub.Scalar")
def _add(t: AtenImporter, h: Any, other: Any, alpha: Any) -> SampleTensor:
    name = str(t.node.target)
    if "rsub" in name:
        h, other = other, h
    sign = -1.0 if "sub" in name else 1.0
    return _weighted_sum(t, [(1.0, h), (sign * alpha, other)])


def _weighted_sum(t: AtenImporter, terms: Sequence[tuple[Coefficient, Any]]) -> SampleTensor:
    """The sum of coefficient * term, where some terms are samples and others numbers or values."""
    inputs = [(c, term) for c, term in terms if isinstance(term, SampleTensor)]
    parts = t.together(*(term for _, term in inputs))
    result = t.add(LinearCombination(tuple(c for c, _ in inputs)), *parts)
    for c, term in terms:
        if isinstance(term, LazyTensor):
            shift, result = t.beside(term, result)
            result = t.add(Affine(None, lazy(_times, shift, c)), result)
        elif not isinstance(term, SampleTensor):
            result = t.add(Affine(None, t.constant(product(t.coefficient(term), c))), result)
    return result


def _times(value: Tensor, factor: Any) -> Tensor:
    return value * factor


@_rule("aten.neg.default")
def _neg(t: AtenImporter, h: Any) -> SampleTensor:
    return t.add(LinearCombination((-1.0,)), t.samples(h))


@_rule("aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.div.Scalar")
def _mul(t: AtenImporter, h: Any, other: Any) -> SampleTensor:
    dividing = "div" in str(t.node.target)
    if isinstance(h, SampleTensor) and isinstance(other, SampleTensor):
        if dividing:
            raise t.unsupported("a quotient of two results is not in the vocabulary")
        return t.add(Multiply(), *t.together(h, other))
    if not isinstance(h, SampleTensor):
        if dividing:
            raise t.unsupported("a quotient by a result is not in the vocabulary")
        h, other = other, h
    if isinstance(other, LazyTensor) and math.prod(other.shape) != 1:
        scale, h = t.beside(other, h)
        return t.add(Affine(lazy(torch.reciprocal, scale) if dividing else scale), h)
    if isinstance(other, LazyTensor) and len(other.shape) > len(t.shape(h)) + 1:
        raise t.unsupported("it adds dimensions")
    factor = t.coefficient(other)
    if dividing:
        factor = lazy(torch.reciprocal, factor) if isinstance(factor, LazyTensor) else 1.0 / factor
    return t.add(LinearCombination((factor,)), h)


@_rule("fastebm.expand_blend.default")
def _expand_blend(t: AtenImporter, primal: Any, fade: Any, beta: Any) -> SampleTensor:
    beta = t.coefficient(beta)
    return t.add(LinearCombination((beta, _complement(beta))), t.samples(primal), t.samples(fade))


def _complement(beta: Coefficient) -> Coefficient:
    return lazy(_one_minus, beta) if isinstance(beta, LazyTensor) else 1.0 - beta


def _one_minus(beta: Tensor) -> Tensor:
    return 1 - beta


@_rule("fastebm.block_tail.default")
def _block_tail(
    t: AtenImporter, main: Any, skip: Any, fade: Any, beta: Any, activation: int, parameter: float
) -> SampleTensor:
    name, scale, weight = ACTIVATIONS[activation], math.sqrt(0.5), 1.0
    pool = AveragePool((2, 2), (2, 2))
    pooled, skip = t.add(pool, _images(t, main)), t.add(pool, _images(t, skip))
    active = t.add(_tail_activation(name, parameter), pooled)
    if name == "scaled_swish":
        weight = 1.0 / SWISH_SCALE
    if fade is None:
        return t.add(LinearCombination((scale * weight, scale)), active, skip)
    beta = t.coefficient(beta)
    tail = t.add(LinearCombination((scale * weight, scale)), active, skip)
    return t.add(LinearCombination((beta, _complement(beta))), tail, t.samples(fade))


def _tail_activation(name: str, parameter: float) -> Activation:
    if name in ("scaled_swish", "silu"):
        return Activation("silu")
    if name in ("elu", "leaky_relu"):
        return Activation(name, (parameter, 1.0, 1.0) if name == "elu" else (parameter,))
    return Activation(name)


# ---- pointwise


@_rule("aten.silu.default", "aten.relu.default", "aten.tanh.default", "aten.sigmoid.default", "aten.exp.default")
def _unary(t: AtenImporter, h: Any) -> SampleTensor:
    return t.add(Activation(str(t.node.target).split(".")[1]), t.samples(h))


@_rule("aten.gelu.default")
def _gelu(t: AtenImporter, h: Any, approximate: str) -> SampleTensor:
    return t.add(Activation("gelu" if approximate == "none" else "gelu_tanh"), t.samples(h))


@_rule("aten.elu.default")
def _elu(t: AtenImporter, h: Any, alpha: float, scale: float, input_scale: float) -> SampleTensor:
    return t.add(Activation("elu", (float(alpha), float(scale), float(input_scale))), t.samples(h))


@_rule("aten.selu.default")
def _selu(t: AtenImporter, h: Any) -> SampleTensor:
    # The constants of Klambauer et al., "Self-Normalizing Neural Networks", 2017.
    return t.add(Activation("elu", (1.6732632423543772, 1.0507009873554805, 1.0)), t.samples(h))


@_rule("aten.leaky_relu.default")
def _leaky_relu(t: AtenImporter, h: Any, negative_slope: float) -> SampleTensor:
    return t.add(Activation("leaky_relu", (float(negative_slope),)), t.samples(h))


@_rule("aten.softplus.default")
def _softplus(t: AtenImporter, h: Any, beta: float, threshold: float) -> SampleTensor:
    return t.add(Activation("softplus", (float(beta), float(threshold))), t.samples(h))


@_rule("aten.square.default")
def _square(t: AtenImporter, h: Any) -> SampleTensor:
    return t.add(Activation("square"), t.samples(h))


@_rule("aten.pow.Tensor_Scalar")
def _pow(t: AtenImporter, h: Any, exponent: Any) -> SampleTensor:
    if exponent != 2:
        raise t.unsupported(f"only the second power is in the vocabulary, not {exponent}")
    return t.add(Activation("square"), t.samples(h))


@_rule("aten.glu.default")
def _glu(t: AtenImporter, h: Any, dim: int) -> SampleTensor:
    h = t.samples(h)
    dim = t.dim(h, dim)
    half = t.shape(h)[dim] // 2
    value = t.add(Slice(dim, 0, half), h)
    gate = t.add(Activation("sigmoid"), t.add(Slice(dim, half, 2 * half), h))
    return t.add(Multiply(), value, gate)


# ---- resolution, sums


@_rule("aten.avg_pool2d.default")
def _avg_pool2d(
    t: AtenImporter,
    h: Any,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> SampleTensor:
    kernel = _pair(kernel_size)
    pool = AveragePool(
        kernel, _pair(stride) if stride else kernel, _pair(padding), ceil_mode, count_include_pad, divisor_override
    )
    return t.add(pool, _images(t, h))


@_rule("aten.adaptive_avg_pool2d.default")
def _adaptive_avg_pool2d(t: AtenImporter, h: Any, output_size: Any) -> SampleTensor:
    h = _images(t, h)
    size, out = t.shape(h)[1:], _pair(output_size)
    if any(n % m for n, m in zip(size, out, strict=True)):
        raise t.unsupported(f"{size} is no multiple of {out}")
    kernel = (size[0] // out[0], size[1] // out[1])
    return t.add(AveragePool(kernel, kernel), h)


_OVER_THE_BATCH = "it works along the batch, so that samples would influence each other"


def _dims(t: AtenImporter, h: SampleTensor, dim: Any) -> tuple[int, ...]:
    if not dim:
        raise t.unsupported(_OVER_THE_BATCH)
    return tuple(sorted(t.dim(h, d) for d in ([dim] if isinstance(dim, int) else dim)))


def _without(t: AtenImporter, h: SampleTensor, dims: tuple[int, ...], keepdim: bool) -> SampleTensor:
    if keepdim:
        return h
    return t.reshaped(h, tuple(n for dim, n in enumerate(t.shape(h)) if dim not in dims))


@_rule("aten.sum.default", "aten.mean.default")
def _everything(t: AtenImporter, h: Any, **_: Any) -> SampleTensor:
    raise t.unsupported(_OVER_THE_BATCH)


@_rule("aten.sum.dim_IntList")
def _sum(t: AtenImporter, h: Any, dim: Any, keepdim: bool, dtype: Any) -> SampleTensor:
    h = t.samples(h)
    dims = _dims(t, h, dim)
    return _without(t, t.add(Sum(dims), h), dims, keepdim)


@_rule("aten.mean.dim")
def _mean(t: AtenImporter, h: Any, dim: Any, keepdim: bool, dtype: Any) -> SampleTensor:
    h = t.samples(h)
    dims = _dims(t, h, dim)
    count = math.prod(t.shape(h)[d] for d in dims)
    if dims == (1, 2) and len(t.shape(h)) == 3:
        kernel = (t.shape(h)[1], t.shape(h)[2])
        return _without(t, t.add(AveragePool(kernel, kernel), h), dims, keepdim)
    return _without(t, t.add(LinearCombination((1.0 / count,)), t.add(Sum(dims), h)), dims, keepdim)


@_rule("aten.logsumexp.default")
def _logsumexp(t: AtenImporter, h: Any, dim: Any, keepdim: bool) -> SampleTensor:
    h = t.samples(h)
    dims = _dims(t, h, dim)
    if len(dims) != 1:
        raise t.unsupported("only one dimension is in the vocabulary")
    return _without(t, t.add(LogSumExp(dims[0]), h), dims, keepdim)


@_rule(
    "aten.upsample_nearest2d.vec",
    "aten.upsample_nearest2d.default",
    "aten._upsample_nearest_exact2d.vec",
    "aten._upsample_nearest_exact2d.default",
)
def _upsample(t: AtenImporter, h: Any, **_: Any) -> SampleTensor:
    h = _images(t, h)
    size, out = t.shape(h)[1:], tuple(t.node.meta["val"].shape[2:])
    if any(m % n for n, m in zip(size, out, strict=True)):
        raise t.unsupported(f"{out} is no multiple of {size}")
    return t.add(Upsample((out[0] // size[0], out[1] // size[1])), h)


# ---- moving data


@_rule("aten.flatten.using_ints", "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")
@_rule("aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default", "aten.unsqueeze.default")
@_rule("aten.unflatten.int")
def _reshape(t: AtenImporter, h: Any, **_: Any) -> SampleTensor:
    seen = t.node.meta["val"].shape
    t.require_batch_first(seen)
    return t.reshaped(t.samples(h), tuple(seen[1:]))


@_rule("aten.clone.default", "aten.contiguous.default", "aten.alias.default", "aten.lift_fresh_copy.default")
def _same(t: AtenImporter, h: Any, **_: Any) -> SampleTensor:
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
    return t.add(Permute(tuple(t.dim(h, d) for d in dims[1:])), h)


@_rule("aten.transpose.int")
def _transpose(t: AtenImporter, h: Any, dim0: int, dim1: int) -> SampleTensor:
    h = t.samples(h)
    order = list(range(len(t.shape(h))))
    a, b = t.dim(h, dim0), t.dim(h, dim1)
    order[a], order[b] = b, a
    return t.add(Permute(tuple(order)), h)


@_rule("aten.slice.Tensor")
def _slice(t: AtenImporter, h: Any, dim: int, start: Any, end: Any, step: Any) -> SampleTensor:
    h = t.samples(h)
    count = len(t.shape(h)) + 1
    if dim % count == 0 and (start or 0) == 0 and (end is None or end >= 2**62) and step == 1:
        return h
    dim = t.dim(h, dim)
    first, last, stride = slice(start, end, step).indices(t.shape(h)[dim])
    if stride != 1 or last <= first:
        raise t.unsupported("only slices without steps are in the vocabulary")
    return t.add(Slice(dim, first, last), h)


@_rule("aten.select.int")
def _select(t: AtenImporter, h: Any, dim: int, index: int) -> SampleTensor:
    h = t.samples(h)
    dim = t.dim(h, dim)
    index %= t.shape(h)[dim]
    return _without(t, t.add(Slice(dim, index, index + 1), h), (dim,), keepdim=False)


@_rule("aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default", "aten.split.sizes")
def _split(t: AtenImporter, h: Any, dim: int, **_: Any) -> list[SampleTensor]:
    h = t.samples(h)
    dim = t.dim(h, dim)
    start, parts = 0, []
    for tensor in t.node.meta["val"]:
        stop = start + tensor.shape[dim + 1]
        parts.append(t.add(Slice(dim, start, stop), h))
        start = stop
    return parts


@_rule("aten.cat.default", "aten.concat.default")
def _cat(t: AtenImporter, tensors: Any, dim: int) -> SampleTensor:
    parts = [t.samples(h, "each part") for h in tensors]
    return t.add(Concatenate(t.dim(parts[0], dim)), *parts)


@_rule("aten.constant_pad_nd.default", "aten.pad.default")
def _pad(t: AtenImporter, h: Any, pad: Any, value: Any, mode: str = "constant") -> SampleTensor:
    h = t.samples(h)
    count = len(t.shape(h))
    if mode != "constant" or len(pad) > 2 * count or any(n < 0 for n in pad):
        raise t.unsupported("only constant borders around samples are in the vocabulary")
    before, after = [0] * count, [0] * count
    for i in range(len(pad) // 2):
        before[count - 1 - i], after[count - 1 - i] = pad[2 * i], pad[2 * i + 1]
    return t.add(Pad(tuple(before), tuple(after), float(value or 0.0)), h)


@_rule("aten.pixel_shuffle.default")
def _pixel_shuffle(t: AtenImporter, h: Any, upscale_factor: int) -> SampleTensor:
    h = _images(t, h)
    (channels, height, width), r = t.shape(h), upscale_factor
    apart = t.reshaped(h, (channels // r**2, r, r, height, width))
    return t.reshaped(t.add(Permute((0, 3, 1, 4, 2)), apart), (channels // r**2, height * r, width * r))


@_rule("aten.expand.default", "aten.expand_as.default")
def _expand(t: AtenImporter, h: Any, **_: Any) -> SampleTensor:
    seen = t.node.meta["val"].shape
    t.require_batch_first(seen)
    return t.broadcast(t.samples(h), tuple(seen[1:]))
