"""What the rules of operations know of the graph: values of nodes, and nodes that don't depend on the sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fastebm.ops.lanes import Op

from .builder import Builder
from .recording import LaneError, storage_id
from .trace import JointGraph
from .values import Array, Complex, Deferred, Number, Places, Shape, Value


def _within_storage(tensor: Tensor) -> Array:
    """For each number of a tensor its index in the storage, where a complex number is two real ones."""
    places = np.full(tensor.shape, tensor.storage_offset(), np.int64)
    for axis, (n, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        places += (np.arange(n) * stride).reshape([-1 if i == axis else 1 for i in range(tensor.ndim)])
    return places * 2 if tensor.is_complex() else places


class Lowering(Builder):
    """Values of the nodes of a graph.

    Attributes:
        values: of the nodes that depend on the sample.
        static: what the other nodes are, where they depend on nothing that may change.
        lazy: the rest; they are evaluated from the weights once a chain.
    """

    def __init__(self, traced: JointGraph) -> None:
        super().__init__()
        self.traced = traced
        self.values: dict[fx.Node, Value] = {}
        self.static: dict[fx.Node, Any] = {}
        self.lazy: set[fx.Node] = set()
        self._constants: dict[fx.Node, Value] = {}
        self._memory: dict[int, Places] = {}

    def value(self, given: Any) -> Value:
        """The value of an argument: a node or a Python number."""
        if not isinstance(given, fx.Node):
            return Number(float(given))
        if given in self.values:
            found = self.values[given]
            if isinstance(found, Deferred):
                return found.value()
            return self._read(found) if isinstance(found, Tensor) else found
        if given not in self._constants:
            self._constants[given] = self._constant(given)
        return self._constants[given]

    def _constant(self, node: fx.Node) -> Value:
        if node in self.static:
            found = self.static[node]
            if not isinstance(found, Tensor):
                return Number(float(found))
            if found.is_complex():
                return Complex(self.literal(found.real), self.literal(found.imag))
            return self.literal(found.detach().to(torch.float64))
        meta = node.meta["val"]
        if not isinstance(meta, Tensor):  # a number that is taken from a weight
            return self.constant(node, (), _as_tensor, "number")
        shape = tuple(meta.shape)
        if meta.is_complex():
            # The evaluator hands over complex tensors as (..., 2) real ones.
            return Complex(self.constant(node, shape, _real, "real"), self.constant(node, shape, _imag, "imag"))
        return self.constant(node, shape, _as_tensor, "plain")

    # Tensors in storages that the energy writes to stand for themselves in `values`: what they are when a node reads
    # them is looked up in the storage, so that views see the writes of one another.

    def _read(self, tensor: Tensor) -> Value:
        storage = self._memory[storage_id(tensor)]
        places = _within_storage(tensor)
        value: Value = Places(storage.codes[places], storage.buffers)
        if not tensor.is_complex():
            return self.pointwise(Op.NEGATE, value) if tensor.is_neg() else value
        imag = Places(storage.codes[places + 1], storage.buffers)
        return Complex(value, self.pointwise(Op.NEGATE, imag) if tensor.is_conj() else imag)

    def write(self, tensor: Tensor, value: Value) -> None:
        """Now the tensor is `value`."""
        if tensor.is_conj() or tensor.is_neg():
            raise LaneError("a write into a conjugate")
        shape = tuple(tensor.shape)
        if tensor.is_complex():
            pair = as_complex(value)
            parts = [self.places(self.broadcast(part, shape)) for part in (pair.real, pair.imag)]
        else:
            parts = [self.places(self.broadcast(value, shape))]
        key = storage_id(tensor)
        size = tensor.untyped_storage().nbytes() * len(parts) // tensor.element_size()
        known = self._memory.get(key, Places(np.zeros(size, np.int64), frozenset()))
        codes = known.codes.copy()
        for i, part in enumerate(parts):
            codes[_within_storage(tensor) + i] = part.codes
        self._memory[key] = Places(codes, known.buffers.union(*(part.buffers for part in parts)))

    def shape(self, node: fx.Node) -> Shape:
        """Of a node's tensor."""
        return tuple(self.static[node].shape if node in self.static else node.meta["val"].shape)

    def dtype(self, node: Any) -> torch.dtype | None:
        """Of a node's tensor; None for Python numbers."""
        if not isinstance(node, fx.Node):
            return None
        found = self.static[node] if node in self.static else node.meta["val"]
        return found.dtype if isinstance(found, Tensor) else None

    def of_sample(self, given: Any) -> bool:
        return isinstance(given, fx.Node) and given in self.values

    def known(self, given: Any, what: str) -> Tensor:
        """A tensor that is known while lowering, such as an index."""
        if isinstance(given, fx.Node) and given in self.static:
            return torch.as_tensor(self.static[given], device="cpu")
        raise LaneError(f"{what} that depends on weights")

    def moved(self, value: Value, move: Callable[[Tensor], Tensor], shape: Shape) -> Value:
        """What an operation of PyTorch that only moves numbers does, on their addresses."""
        if isinstance(value, Complex):
            return Complex(self.moved(value.real, move, shape), self.moved(value.imag, move, shape))

        def view(array: Array) -> Array:
            moved = move(torch.from_numpy(array if array.flags.writeable and _positive(array) else array.copy()))
            return moved.numpy()

        return self.view(value, view, shape)

    def cat(self, values: Sequence[Value], dim: int) -> Value:
        if any(isinstance(value, Complex) for value in values):
            pairs = [as_complex(value) for value in values]
            return Complex(self.cat([p.real for p in pairs], dim), self.cat([p.imag for p in pairs], dim))
        parts = [self.places(value) for value in values if value.shape != (0,)]
        return Places.joined(parts, lambda arrays: np.concatenate(arrays, dim))

    def stack(self, values: Sequence[Value], dim: int = 0) -> Value:
        def widened(value: Value) -> Value:
            axis = dim % (len(value.shape) + 1)
            shape = (*value.shape[:axis], 1, *value.shape[axis:])
            if isinstance(value, Complex):
                return Complex(self.reshaped(value.real, shape), self.reshaped(value.imag, shape))
            return self.reshaped(value, shape)

        return self.cat([widened(value) for value in values], dim)


def as_complex(value: Value) -> Complex:
    return value if isinstance(value, Complex) else Complex(value, Number(0.0, value.shape))


def flat_places(shape: Shape) -> Tensor:
    """The index in memory of each number of a contiguous tensor."""
    return torch.arange(math.prod(shape), device="cpu").reshape(shape)


def _positive(array: Array) -> bool:
    return all(stride >= 0 for stride in array.strides)


def _as_tensor(value: Any) -> Tensor:
    return torch.as_tensor(value, device="cpu").reshape(-1)


def _real(value: Tensor) -> Tensor:
    return value[..., 0].reshape(-1)


def _imag(value: Tensor) -> Tensor:
    return value[..., 1].reshape(-1)
