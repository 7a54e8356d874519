"""Records the operations of a computation while it runs on real tensors, below autograd."""

from __future__ import annotations

import linecache
import operator
import traceback
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .decompositions import DECOMPOSITIONS

aten = torch.ops.aten


class LaneError(ValueError):
    """An energy, or an operation in it, that has no lane program."""


class Depends(IntEnum):
    """What a tensor depends on at most."""

    NOTHING = 0
    INTEGERS = 1  # or truths, that were there before: a program is made for those that it finds
    WEIGHTS = 2
    SAMPLE = 3


# These take numbers out of PyTorch, past every dispatcher.
_ESCAPES = frozenset(
    (
        Tensor.numpy,
        Tensor.tolist,
        Tensor.__array__,
        Tensor.__dlpack__,
        Tensor.data_ptr,
        Tensor.storage,
        Tensor.untyped_storage,
        Tensor.__reduce_ex__,
        Tensor.__deepcopy__,
    )
)

_BUILDERS = frozenset((torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor))


class Recorder(TorchDispatchMode):
    """A mode within which every operation becomes a node of `graph`, after decomposition.

    Attributes:
        graph: `get_attr` nodes name the tensors of `tensors`, which were there before.
        literals: names of those that come from numbers in the code, as in `torch.tensor(0.5)`.
        assumed: Python numbers and truths that were taken from weights or integers, by the nodes that take them.
        written: the storages of tensors that are written to, and what these depend on then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.tensors: dict[str, Tensor] = {}
        self.literals: set[str] = set()
        self.assumed: dict[fx.Node, Any] = {}
        self.written: dict[int, Depends] = {}
        self._nodes: dict[int, fx.Node] = {}
        self._storages: set[int] = set()  # of what operations gave
        self._alive: list[Tensor] = []
        self._count = 0
        self._refusal: LaneError | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: PyTorch would load its compiler, which takes seconds, to keep it away from every operation."""
        return False

    def record(self, function: Callable[..., Any], *given: Tensor) -> Any:
        """What `function` gives of a sample and its conditions; its graph is `graph`."""
        for i, tensor in enumerate(given):
            self._track(tensor, self._new("placeholder", f"given{i}", (), {}, Depends.SAMPLE))
        with _Escapes(self), self:
            results = function(*given)
        if self._refusal is not None:  # the energy's own code caught it
            raise self._refusal
        self._new("output", "output", (tuple(self._node(result) for result in results),), {}, Depends.SAMPLE)
        return results

    def _refused(self, reason: str) -> LaneError:
        self._refusal = LaneError(reason)
        return self._refusal

    def depends(self, tensor: Tensor) -> Depends:
        node = self._nodes.get(id(tensor))
        if node is None:
            return Depends.WEIGHTS if tensor.is_floating_point() or tensor.is_complex() else Depends.INTEGERS
        depends: Depends = node.meta["depends"]
        return max(depends, self.written.get(storage_id(tensor), depends)) if self.written else depends

    # ---- one operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        simpler = DECOMPOSITIONS.get(func)
        if simpler is not None:
            with self:
                result = simpler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        inputs = _tensors(args, kwargs)
        depends = max(map(self.depends, inputs), default=Depends.NOTHING)
        if func in (aten.lift_fresh.default, aten.lift_fresh_copy.default):
            return self._lifted(args[0])
        if func is aten._local_scalar_dense.default or torch.Tag.data_dependent_output in func.tags:
            return self._number(func, args, kwargs, depends)
        if func is aten.copy_.default:
            return self._copy(*args)
        if func._schema.is_mutable:
            return self._write(func, args, kwargs)
        self._refuse(func, inputs, depends)
        result = func(*args, **kwargs)
        node = self._new("call_function", func, self._nodes_of(args), self._nodes_of(kwargs), depends)
        if isinstance(result, Tensor):
            self._track(result, node)
        elif isinstance(result, (tuple, list)):
            node.meta["val"] = result
            for i, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._track(part, self._new("call_function", operator.getitem, (node, i), {}, depends))
        return result

    def _new(self, op: str, target: Any, args: Any, kwargs: Any, depends: Depends) -> fx.Node:
        self._count += 1
        node = self.graph.create_node(op, target, args, kwargs, name=f"n_{self._count}")
        node.meta["depends"] = depends
        return node

    def _track(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)
        if node.op != "get_attr" and node.meta["depends"]:
            self._storages.add(storage_id(tensor))
        node.meta.setdefault("val", tensor)

    def _node(self, tensor: Tensor) -> fx.Node:
        found = self._nodes.get(id(tensor))
        if found is None:
            found = self._attribute(tensor)
        return found

    def _attribute(self, tensor: Tensor) -> fx.Node:
        if tensor.layout is not torch.strided:
            raise self._refused(
                f"the energy reads a tensor of layout {tensor.layout}; `to_dense()` gives another{line()}"
            )
        if storage_id(tensor) in self._storages:
            raise self._refused(f"the energy takes a tensor that depends on x past PyTorch's dispatcher{line()}")
        name = f"tensor{len(self.tensors)}"
        self.tensors[name] = tensor
        node = self._new("get_attr", name, (), {}, self.depends(tensor))
        self._track(tensor, node)
        return node

    def _nodes_of(self, given: Any) -> Any:
        if isinstance(given, Tensor):
            return self._node(given)
        if isinstance(given, (tuple, list)):
            return type(given)([self._nodes_of(part) for part in given])
        if isinstance(given, dict):
            return {key: self._nodes_of(part) for key, part in given.items()}
        return given

    def _lifted(self, tensor: Tensor) -> Tensor:
        """Numbers of the code. What may be written to is a copy of them."""
        kept = tensor.clone()
        node = self._attribute(kept)
        self.literals.add(str(node.target))
        node.meta["depends"] = Depends.NOTHING
        copied = kept.clone()
        self._track(copied, self._new("call_function", aten.clone.default, (node,), {}, Depends.NOTHING))
        return copied

    def _number(self, func: Any, args: Any, kwargs: Any, depends: Depends) -> Any:
        if depends is Depends.SAMPLE:
            raise self._refused(f"the energy takes a Python number or a truth from a tensor that depends on x{line()}")
        value = func(*args, **kwargs)
        if depends is not Depends.NOTHING:
            node = self._new("call_function", func, self._nodes_of(args), self._nodes_of(kwargs), depends)
            self.assumed[node] = value
        return value

    def escape(self, tensor: Tensor) -> None:
        """The numbers of a tensor are used outside of PyTorch, where nothing follows them."""
        depends = self.depends(tensor)
        if depends > Depends.INTEGERS:
            of = "x" if depends is Depends.SAMPLE else "a weight"
            raise self._refused(f"the energy leaves PyTorch with a tensor that depends on {of}{line()}")
        if depends is Depends.INTEGERS:
            self.assumed[self._new("call_function", aten.alias.default, (self._node(tensor),), {}, depends)] = None

    def _refuse(self, func: Any, inputs: list[Tensor], depends: Depends) -> None:
        name = func._schema.name.removeprefix("aten::")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise self._refused(f"the energy draws random numbers by {name}{line()}")
        if depends <= Depends.INTEGERS:
            return
        masks = func is aten.index.Tensor and any(
            t.dtype in (torch.bool, torch.uint8) and self.depends(t) > Depends.INTEGERS for t in inputs[1:]
        )
        if masks or (torch.Tag.dynamic_output_shape in func.tags and func is not aten.index.Tensor):
            raise self._refused(f"the shape of what {name} returns depends on numbers, not on shapes alone{line()}")

    # ---- writes in place

    def _write(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Every write is the operation that returns a new tensor, and then a copy."""
        name = func._schema.name.removeprefix("aten::")
        target = args[0] if args else None
        writes = [argument.name for argument in func._schema.arguments if argument.is_write]
        plain = getattr(aten, name.removesuffix("_"), None)
        if writes != [func._schema.arguments[0].name] or not isinstance(target, Tensor) or plain is None:
            raise self._refused(f"the energy writes by {name}{line()}")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise self._refused(f"the energy draws random numbers by {name}{line()}")
        self._own(target, name)
        if torch.Tag.inplace_view in func.tags:
            return self._view_in_place(func, plain, args, kwargs)
        with self:
            target.copy_(plain(*args, **kwargs))
        return target

    def _copy(self, target: Tensor, source: Tensor, blocking: bool = False) -> Tensor:
        self._own(target, "copy_")
        source_node, target_node = self._node(source), self._node(target)
        depends = max(self.depends(source), self.depends(target))
        target.copy_(source)
        storage = storage_id(target)
        self.written[storage] = max(depends, self.written.get(storage, Depends.NOTHING))
        node = self._new("call_function", aten.copy_.default, (target_node, source_node), {}, depends)
        self._track(target, node)
        return target

    def _own(self, target: Tensor, name: str) -> None:
        """Refuses a write into what isn't the energy's own, before it happens."""
        root = _root(self._nodes[id(target)]) if id(target) in self._nodes else None
        if root is None or root.op != "call_function":
            what = "x" if root is not None and root.op == "placeholder" else "a tensor that it does not own"
            raise self._refused(f"the energy writes into {what}, by {name}{line()}")

    def _view_in_place(self, func: Any, plain: Any, args: Any, kwargs: Any) -> Tensor:
        """`squeeze_` and the like give a tensor another shape: from now on it is the view that they would return."""
        target: Tensor = args[0]
        before = aten.alias.default(target)
        for node in self.graph.nodes:
            if node.meta.get("val") is target:
                node.meta["val"] = before
        with self:
            view = plain(*args, **kwargs)
        func(*args, **kwargs)
        self._nodes[id(target)] = self._nodes[id(view)]
        return target


class _Escapes(TorchFunctionMode):
    """Refuses to take numbers that may change out of PyTorch."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        if func in _ESCAPES:
            self._recorder.escape(args[0])
        elif func in _BUILDERS:  # they read the numbers of tensors in lists past every dispatcher
            for tensor in _tensors([part for part in args if isinstance(part, (list, tuple))]):
                self._recorder.escape(tensor)
        return func(*args, **(kwargs or {}))


def _one_hot(index: Tensor, num_classes: int = -1) -> Tensor:
    """Without PyTorch's look at the numbers."""
    if num_classes < 0:
        raise LaneError(f"the energy leaves it to the numbers how many classes one_hot has{line()}")
    return (index.unsqueeze(-1) == torch.arange(num_classes, device=index.device)).to(torch.int64)


def storage_id(tensor: Tensor) -> int:
    """The same for all views of one memory, as long as it is alive."""
    return torch._C._storage_id(tensor)  # type: ignore[attr-defined]


def _root(node: fx.Node) -> fx.Node:
    """The node whose memory a node shares, through views and writes."""
    while node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        shared = [
            given
            for argument, given in zip(schema.arguments, node.args, strict=False)
            if argument.alias_info is not None and isinstance(given, fx.Node)
        ]
        if not shared:
            return node
        node = shared[0]
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return _root(node.args[0])
    return node


_composite: dict[Any, bool] = {}


def _is_composite(func: Any) -> bool:
    """Whether PyTorch writes an operation as others."""
    found = _composite.get(func)
    if found is None:
        found = _composite[func] = func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return found


def _tensors(*given: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for part in given:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (tuple, list)):
            found += _tensors(*part)
        elif isinstance(part, dict):
            found += _tensors(*part.values())
    return found


_LIBRARY = Path(torch.__file__).parent, Path(__file__).parents[2], Path(np.__file__).parent
_STANDARD = Path(linecache.__file__).parent


def line(error: BaseException | None = None) -> str:
    """The last line of the energy's own code, now or where an error passed through it, in words."""
    frames = traceback.extract_stack() if error is None else traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        path = Path(frame.filename)
        standard = path.parent == _STANDARD or path.parent.parent == _STANDARD
        if not standard and not any(parent in path.parents for parent in _LIBRARY):
            code = linecache.getline(frame.filename, frame.lineno or 0).strip()
            return f", in line {frame.lineno} of {path.name}" + (f": {code}" if code else "")
    return ""


__all__ = ["Depends", "LaneError", "Recorder", "line"]
