"""The cost model: FLOPs and bytes of a program for one sample, and the time that a machine needs for them."""

import math
from dataclasses import dataclass

import torch

from fastebm.compiler.operations import Convolution
from fastebm.compiler.program import Node, Program


@dataclass(frozen=True)
class Cost:
    """FLOPs (a multiply-add counts two) and bytes read and written, without the weights, which a batch shares."""

    flops: int
    bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Machine:
    """The properties of a machine that decide whether a rewrite pays.

    Attributes:
        flops_per_byte: the FLOPs that take as long as moving one byte. The default of 16 is a core with AVX-512, the
            most cautious choice: machines with matrix units have a higher ratio, so that bytes count more.
        strided_adjoint: the slowdown of the library's transposed convolution with a stride relative to a plain
            convolution of equal FLOPs. Measured: 1.0 to 1.2 with AVX-512, 10 with AMX (0.3 against 3.0 TFLOP/s in
            bfloat16).
        lanes: output channels that a convolution computes together. With AVX-512, 1 or 3 channels took as long as 16.
        itemsize: bytes per number.
    """

    flops_per_byte: float = 16.0
    strided_adjoint: float = 1.0
    lanes: int = 16
    itemsize: int = 4

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> "Machine":
        """The properties of `device` for numbers of `dtype`."""
        has_amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)  # private, so it may disappear
        amx = device.type == "cpu" and dtype is torch.bfloat16 and has_amx()
        return cls(
            flops_per_byte=64.0 if amx or device.type == "cuda" else 16.0,
            strided_adjoint=10.0 if amx else 1.0,
            itemsize=dtype.itemsize,
        )

    def time(self, program: Program) -> float:
        """An estimate for one sample, in units of the time to move one byte; only good for comparing programs."""
        return sum(self._node_time(program, node) for node in program)

    def _node_time(self, program: Program, node: Node) -> float:
        spent = node_cost(program, node, self.itemsize)
        time = spent.flops / self.flops_per_byte
        if isinstance(node.operation, Convolution):
            outputs = node.shape[0]
            time *= -(-outputs // self.lanes) * self.lanes / outputs
            if node.operation.transposed and node.operation.stride != (1, 1):
                time *= self.strided_adjoint
        return time + spent.bytes


def node_cost(program: Program, node: Node, itemsize: int = 4) -> Cost:
    """The cost of one node for one sample."""
    shapes = program.input_shapes(node)
    moved = 0 if node.operation.is_view else sum(map(math.prod, [*shapes, node.shape]))
    return Cost(node.operation.flops(node.shape, *shapes), moved * itemsize)


def cost(program: Program, itemsize: int = 4) -> Cost:
    """The cost of a program for one sample."""
    return sum((node_cost(program, node, itemsize) for node in program), Cost(0, 0))
