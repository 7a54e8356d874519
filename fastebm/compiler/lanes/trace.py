"""Traces the energy of one sample and its gradient as a graph of core ATen operations.

Autograd itself runs while the graph is recorded. So the gradient is what autograd gives, whatever the energy does:
`detach`, `no_grad`, custom backward functions, gradient hooks, checkpoints, gradients within the energy.
"""

from __future__ import annotations

import linecache
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import SymInt, Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fastebm.compiler.capture import tracing

from .decompositions import DECOMPOSITIONS

aten = torch.ops.aten


class LaneError(ValueError):
    """An energy, or an operation in it, that has no lane program."""


@dataclass(frozen=True)
class JointGraph:
    """Energy and gradient of a batch of one sample.

    Attributes:
        graph: has one placeholder, the sample, and returns (energy, gradient). Tensors that the energy reads are
            `get_attr` nodes.
        weights: for the name of each such tensor that isn't a literal of the energy's own code, how it is found: a
            path in the module, or the tensor itself.
    """

    graph: fx.GraphModule
    weights: dict[str, str | Tensor]


def trace(energy: Callable[[Tensor], Tensor], module: nn.Module | None, sample: Tensor) -> JointGraph:
    """The graph of `energy` for one sample, (1, ...).

    Raises LaneError with the operation, and its line in the energy, for what depends on the sample in a way that no
    graph can have. What the energy itself raises is passed on.
    """

    def joint(x: Tensor) -> tuple[Tensor, Tensor]:
        value = energy(x)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise LaneError(f"the energy of one sample has to be one number, got {shape}")
        if not value.requires_grad:
            raise LaneError("the energy does not depend on x in a way that autograd can differentiate")
        (gradient,) = torch.autograd.grad(value.reshape(()), x, allow_unused=True)
        if gradient is None:
            raise LaneError("the energy does not depend on x in a way that autograd can differentiate")
        return value.detach(), gradient

    x = torch.zeros_like(sample).requires_grad_()
    with _tracing(module):
        try:
            graph = _recorded(joint, x)
            _refuse(graph)
            if any(_mutates(node) for node in graph.graph.nodes):
                _refuse_writes(graph)
                graph = _without_writes(graph, x.detach())
        except LaneError:
            raise
        except Exception as error:
            raise _explained(error) from error
    graph.graph.eliminate_dead_code()
    return JointGraph(graph, _weights(graph, module))


def _recorded(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    record = make_fx(function, decomposition_table=DECOMPOSITIONS, tracing_mode="fake", _allow_non_fake_inputs=True)
    return record(*inputs)


def _without_writes(graph: fx.GraphModule, x: Tensor) -> fx.GraphModule:
    """The graph with writes in place as new tensors. Tensors that it reads are inputs meanwhile."""
    names: list[str] = []
    inputs: dict[str, fx.Node] = {}
    last = next(node for node in graph.graph.nodes if node.op == "placeholder")
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        if node.target not in inputs:
            with graph.graph.inserting_after(last):
                last = inputs[node.target] = graph.graph.placeholder(f"input{len(names)}")
            names.append(node.target)
        node.replace_all_uses_with(inputs[node.target])
        graph.graph.erase_node(node)
    tensors = [getattr(graph, name) for name in names]
    graph.recompile()
    made = _recorded(torch.func.functionalize(graph, remove="mutations"), x, *(t.detach() for t in tensors))
    _, *placeholders = [node for node in made.graph.nodes if node.op == "placeholder"]
    for name, tensor, node in zip(names, tensors, placeholders, strict=True):
        setattr(made, f"input_{name}", tensor)
        with made.graph.inserting_before(node):
            read = made.graph.get_attr(f"input_{name}")
        read.meta.update(node.meta)
        node.replace_all_uses_with(read)
        made.graph.erase_node(node)
    return made


@contextmanager
def _tracing(module: nn.Module | None) -> Iterator[None]:
    """Distributions don't check their arguments, attention is written as products, nothing is printed."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    validated = torch.distributions.Distribution._validate_args
    # The generator that `np.random.normal` and the like draw from.
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        with (
            tracing(module),
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.mkldnn.flags(enabled=False),
        ):
            yield
        if random.getstate() != states[0]:
            raise LaneError("the energy draws random numbers of Python's `random`")
        after = np.random.get_state()  # noqa: NPY002
        if not all(np.array_equal(a, b) for a, b in zip(after, states[1], strict=True)):
            raise LaneError("the energy draws random numbers of `numpy.random`")
    finally:
        torch.distributions.Distribution.set_default_validate_args(validated)
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.random.set_rng_state(states[2])


# ---- what no graph can have


def _schema(node: fx.Node) -> torch.FunctionSchema | None:
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def _mutates(node: fx.Node) -> bool:
    schema = _schema(node)
    return schema is not None and schema.is_mutable


def _refuse(graph: fx.GraphModule) -> None:
    """Raises LaneError for random numbers, and for shapes and Python numbers that depend on the sample."""
    of_sample: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or any(used in of_sample for used in node.all_input_nodes):
            of_sample.add(node)
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = node.target._schema.name.removeprefix("aten::")
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise LaneError(f"the energy draws random numbers by {name}")
        if node in of_sample and node.target is aten._local_scalar_dense.default:
            raise LaneError("the energy takes a Python number from a tensor that depends on x, by item() or the like")
        value = node.meta.get("val")
        if isinstance(value, Tensor) and any(isinstance(n, SymInt) for n in value.shape):
            raise LaneError(f"the shape of what {name} returns depends on numbers, not on shapes alone")


def _refuse_writes(graph: fx.GraphModule) -> None:
    """Raises LaneError for a write into x, or into a tensor that lives longer than the call."""
    root: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        root[node] = node
        schema = _schema(node)
        if schema is None:
            continue
        for argument, given in zip(schema.arguments, node.args, strict=False):
            if argument.alias_info is None or not isinstance(given, fx.Node):
                continue
            root[node] = root[given]
            if argument.alias_info.is_write and root[given].op in ("placeholder", "get_attr"):
                what = "x" if root[given].op == "placeholder" else "a tensor that it does not own"
                raise LaneError(f"the energy writes into {what}, by {schema.name.removeprefix('aten::')}")


def _explained(error: Exception) -> Exception:
    """The error itself, or in plain words what of the energy can't be traced."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # imports sympy, which takes long

    text = str(error)
    where = _line(error)
    if isinstance(error, GuardOnDataDependentSymNode) or "data-dependent" in text:
        return LaneError(f"the energy branches on a number that depends on x or on a weight{where}")
    if ".numpy() is not supported" in text or "tolist" in text:
        return LaneError(f"the energy leaves PyTorch with a tensor that depends on x{where}")
    if isinstance(error, torch._subclasses.fake_tensor.DynamicOutputShapeException):
        return LaneError(f"the shape of a tensor depends on numbers of x{where}")
    if isinstance(error, torch._subclasses.fake_tensor.DataDependentOutputException):
        return LaneError(f"the energy asks whether numbers of x are equal{where}")
    return error


def _line(error: Exception) -> str:
    """The last line of the energy's own code that an error passed through, in words."""
    library = Path(torch.__file__).parent, Path(__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if not any(parent in path.parents for parent in library):
            code = linecache.getline(frame.filename, frame.lineno or 0).strip()
            return f", in line {frame.lineno} of {path.name}" + (f": {code}" if code else "")
    return ""


# ---- weights


def _weights(graph: fx.GraphModule, module: nn.Module | None) -> dict[str, str | Tensor]:
    """How the tensors are found that the graph reads, but for literals such as `torch.tensor(0.5)`."""
    paths = {} if module is None else _paths(module)
    found: dict[str, str | Tensor] = {}
    for node in graph.graph.nodes:
        if node.op != "get_attr" or node.target in found:
            continue
        if node.users and all(user.target is aten.lift_fresh_copy.default for user in node.users):
            continue
        tensor = getattr(graph, node.target)
        assert isinstance(tensor, Tensor)
        found[node.target] = paths.get(id(tensor), tensor.detach())
    return found


def _paths(module: nn.Module) -> dict[int, str]:
    """For the id of every tensor that a module has as an attribute, its path."""
    paths: dict[int, str] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        for values in (part._parameters, part._buffers, vars(part)):
            for name, value in values.items():
                if isinstance(value, Tensor):
                    paths.setdefault(id(value), f"{prefix}.{name}" if prefix else name)
    return paths
