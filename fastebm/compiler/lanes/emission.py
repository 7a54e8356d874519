"""Writes the items of a planned program as instructions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastebm.ops.lanes import (
    Instruction,
    Map,
    Micro,
    Op,
    Operand,
    Output,
    PairProduct,
    Product,
    Reduction,
    Scan,
    Space,
)

from .planning import Plan
from .values import Array, Constant, FillItem, Group, Item, Number, PairItem, Places, Pointwise, ProductItem, Sums


class Emission:
    """The instructions of a plan. `numbers` are the scalars that they read, behind `constants` other constants."""

    def __init__(self, plan: Plan, constants: int) -> None:
        self._plan = plan
        self._constants = constants
        self._numbers: dict[bytes, float] = {}
        self._places: dict[bytes, int] = {}
        self.instructions: list[Instruction] = [self._emit(item) for item in plan.items]

    @property
    def numbers(self) -> list[float]:
        return list(self._numbers.values())

    def _number(self, value: float) -> Operand:
        key = np.float32(value).tobytes()  # apart for zeros of both signs
        if key not in self._numbers:
            self._places[key] = self._constants + len(self._numbers)
            self._numbers[key] = value
        return Operand(Space.NUMBER, np.array([self._places[key]]))

    def _emit(self, item: Item) -> Instruction:
        address = self._plan.address
        if isinstance(item, Group):
            return self._map(item)
        if isinstance(item, FillItem):
            micro = Micro(Op.COPY, 1, 0)
            output = Output(Reduction.STORE, 1, address(item.out).reshape(-1))
            return Map(1, 1, (self._number(item.number),), (micro,), (output,))
        if isinstance(item, ProductItem):
            out = address(item.out)
            return Product(
                self._rows(item.source), item.source.depth, out[:, 0], out[0] - out[0, 0], item.weight, item.bias
            )
        if isinstance(item, PairItem):
            count, rows, columns = item.out.shape
            return PairProduct(
                self._rows(item.left).reshape(count, rows),
                item.left.depth,
                self._rows(item.right).reshape(count, columns),
                item.right.depth,
                address(item.out),
            )
        return Scan(address(item.source), address(item.out))

    def _rows(self, sums: Sums) -> Array:
        return self._plan.address(Places(sums.row, sums.buffers))

    def _map(self, group: Group) -> Map:
        order = group.order or tuple(range(len(group.shape)))
        rows = len(order) if group.order is None else group.rows
        operands, inputs = self._operands(group, order)
        micros, registers = _allocate(group, len(operands), inputs)
        outputs = []
        for reduction, value, out in group.outputs:
            places = self._plan.address(out)
            if reduction is Reduction.STORE:
                places = places.transpose(order)
            outputs.append(Output(reduction, registers[id(value)], places.reshape(-1)))
        lengths = [group.shape[axis] for axis in order]
        return Map(math.prod(lengths[:rows]), math.prod(lengths[rows:]), operands, micros, tuple(outputs))

    def _operands(self, group: Group, order: Sequence[int]) -> tuple[tuple[Operand, ...], dict[int, int]]:
        """The operands of a loop, and for the id of each input which one it is."""
        operands: list[Operand] = []
        known: dict[Any, int] = {}
        inputs: dict[int, int] = {}
        for node in group.nodes:
            for value in node.inputs:
                if isinstance(value, Pointwise) or id(value) in inputs:
                    continue
                if isinstance(value, Number):
                    operand = self._number(value.value)
                elif isinstance(value, Constant):
                    flat = value.places.transpose(order).reshape(-1)
                    one = bool((flat == flat[0]).all())
                    operand = Operand(Space.NUMBER, flat[:1]) if one else Operand(Space.CONSTANT, flat)
                else:
                    operand = Operand(Space.ARENA, self._plan.address(value).transpose(order).reshape(-1))
                key = (operand.space, operand.addresses.tobytes())
                if key not in known:
                    known[key] = len(operands)
                    operands.append(operand)
                inputs[id(value)] = known[key]
        return tuple(operands), inputs


def _allocate(group: Group, operands: int, inputs: dict[int, int]) -> tuple[tuple[Micro, ...], dict[int, int]]:
    """The micro-operations, and for the id of each node its register, which is free after its last reader."""
    last = {id(value): at for at, node in enumerate(group.nodes) for value in node.inputs}
    last |= {id(value): len(group.nodes) for _, value, _ in group.outputs}
    registers: dict[int, int] = {}
    free: list[int] = []
    count = operands
    micros = []
    for at, node in enumerate(group.nodes):
        read = [registers[id(v)] if isinstance(v, Pointwise) else inputs[id(v)] for v in node.inputs]
        for used in dict.fromkeys(id(v) for v in node.inputs if isinstance(v, Pointwise)):
            if last[used] == at:
                free.append(registers[used])
        if not free:
            free.append(count)
            count += 1
        target = registers[id(node)] = free.pop()
        a, b, c = (*read, 0, 0)[:3]
        micros.append(Micro(node.op, target, a, b, c, node.number))
    return tuple(micros), registers
