"""Traces on fake tensors, by `make_fx`: slower, but Python numbers that are taken from weights stay symbols."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fastebm.compiler.capture import leaving_no_graph

from .decompositions import DECOMPOSITIONS
from .recording import LaneError, line

aten = torch.ops.aten


def traced(function: Callable[[Tensor], Any], x: Tensor) -> tuple[fx.Graph, dict[str, Tensor], set[str]]:
    """The graph of `function` of x, the tensors that it reads, and which of them are literals."""
    try:
        module = _recorded(function, x)
    except LaneError:
        raise
    except GuardOnDataDependentSymNode as error:
        raise LaneError(f"the energy branches on a number that depends on x or on a weight{line(error)}") from error
    _refuse(module.graph)
    tensors: dict[str, Tensor] = {}
    literals = set()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            tensors[node.target] = getattr(module, node.target)
            if node.users and all(user.target is aten.lift_fresh_copy.default for user in node.users):
                literals.add(node.target)
    return module.graph, tensors, literals


def _recorded(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    record = make_fx(function, decomposition_table=DECOMPOSITIONS, tracing_mode="fake", _allow_non_fake_inputs=True)
    with leaving_no_graph():
        return record(*inputs)


def _refuse(graph: fx.Graph) -> None:
    """Raises LaneError for random numbers, writes to what lives longer, and shapes and numbers that depend on x."""
    of_sample: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(used in of_sample for used in node.all_input_nodes):
            of_sample.add(node)
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = node.target._schema.name.removeprefix("aten::")
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise LaneError(f"the energy draws random numbers by {name}")
        if node in of_sample and node.target is aten._local_scalar_dense.default:
            raise LaneError("the energy takes a Python number or a truth from a tensor that depends on x")
        if node.target._schema.is_mutable:
            raise LaneError(f"the energy writes in place, by {name}, and takes Python numbers from weights")
        value = node.meta.get("val")
        if isinstance(value, Tensor) and any(isinstance(n, SymInt) for n in value.shape):
            raise LaneError(f"the shape of what {name} returns depends on numbers, not on shapes alone")
