"""Programs as tables for people: the operations, their shapes and their costs."""

import math

import torch

from fastebm.compiler.cost_model import Cost, cost, node_cost
from fastebm.compiler.operations import Input
from fastebm.compiler.program import Node, Program
from fastebm.compiler.roofline import Rates

_LAYOUT = "{:<24} {:<12} {:<38} {:<44} {:>9} {:>9}"


def describe(captured: Program, rewritten: Program, dtype: torch.dtype, rates: Rates) -> str:
    """The rewritten program as a table with costs for one sample, and how it compares with the captured program."""
    before, after = cost(captured, dtype.itemsize), cost(rewritten, dtype.itemsize)
    flops = before.flops / after.flops if after.flops else math.inf
    moved = before.bytes / after.bytes if after.bytes else math.inf
    samples, name = "x".join(map(str, rewritten.nodes[0].shape)), str(dtype).removeprefix("torch.")
    machine = f"{rates.flops / 1e9:.0f} GFLOP/s in matrix products and {rates.bytes / 1e9:.0f} GB/s in copies"
    lines = [
        f"program for samples {samples} in {name}; costs are for one sample, without reading weights:",
        _LAYOUT.format("result", "shape", "operation", "inputs", "MFLOP", "kB").rstrip(),
        *(
            _LAYOUT.format(*cells(rewritten, node, dtype.itemsize))
            for node in rewritten
            if not isinstance(node.operation, Input)
        ),
        _total("captured", captured, before),
        _total("rewritten", rewritten, after),
        f"{flops:.2f} times fewer FLOPs, {moved:.2f} times fewer bytes",
        f"roofline of {machine}: at least {1e6 * rates.seconds(after):.1f} us per sample",
    ]
    return "\n".join(lines)


def cells(program: Program, node: Node, itemsize: int) -> tuple[str, ...]:
    """What a row of `describe` says of a node: result, shape, operation, inputs, MFLOP and kB for one sample."""
    spent = node_cost(program, node, itemsize)
    operation = f"{type(node.operation).__name__} {node.operation.attributes()}".strip()
    shape = "x".join(map(str, node.shape)) or "1"
    flops, kilobytes = f"{spent.flops / 1e6:.3f}", f"{spent.bytes / 1e3:.1f}"
    return node.name, shape, operation, ", ".join(node.inputs), flops, kilobytes


def _total(label: str, program: Program, spent: Cost) -> str:
    return f"{label}: {len(program.nodes)} operations, {spent.flops / 1e6:.2f} MFLOP, {spent.bytes / 1e3:.1f} kB"
