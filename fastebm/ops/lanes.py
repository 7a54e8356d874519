"""Lane programs: the energy and gradient of one sample as instructions on numbers with addresses, run on many samples.

    run_lanes(x, code, tables, constants, conditions) -> (energies, gradient)
    run_lane_chain(x, code, tables, constants, num_steps, ..., conditions) -> energies (num_steps, B), each before its
                                                                              update

An instruction is a loop over an index space, and says for every operand where its numbers lie: in an arena, which has
one address for each number of a sample, or among the constants. Views, slices, transposes, gathers and broadcasts of
the energy are nothing but addresses. On the CPU a worker takes many samples through the program side by side, one in
each lane of its vectors, and stays with them for a whole chain. The value of each number is the same for any batch and
any number of threads.

The reference carries out one instruction after the other on whole batches in plain PyTorch, in float64 where `x` is.
"""

from __future__ import annotations

import copy
import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backends import launch, refuse_autograd, register, runs_compiled
from .langevin import NoiseOrder, drift_options, noise_options, reference_langevin_step
from .langevin import check as check_update
from .memory import share_memory, without_aliasing
from .options import StepOptions

__all__ = [
    "CompiledLanes",
    "Kind",
    "LaneProgram",
    "Map",
    "Micro",
    "Op",
    "Operand",
    "Output",
    "PairProduct",
    "Product",
    "Reduction",
    "Scan",
    "Space",
]

Addresses = np.ndarray[Any, np.dtype[np.int64]]

VERSION = 1
PANEL = 16
MAX_REGISTERS = 64
# Updates in one call: so many that its own cost, and that of waiting for threads at its end, does not count, and so few
# that they can be interrupted (some 50 ms on one thread) and their energies stay in the caches.
CALL_STEPS = 1024
CALL_NUMBERS = 1 << 25
CALL_ENERGIES = 1 << 18


class Op(IntEnum):
    """Micro-operations, numbered as LaneOp in csrc/cpu/lanes.h."""

    COPY = 0
    ADD = 1
    SUBTRACT = 2
    MULTIPLY = 3
    DIVIDE = 4
    NEGATE = 5
    MULTIPLY_ADD = 6
    ADD_NUMBER = 7
    MULTIPLY_NUMBER = 8
    NUMBER_MINUS = 9
    NUMBER_OVER = 10
    SQUARE = 11
    RECIPROCAL = 12
    SQUARE_ROOT = 13
    RECIPROCAL_ROOT = 14
    ABSOLUTE = 15
    SIGN = 16
    FLOOR = 17
    CEIL = 18
    ROUND = 19
    TRUNCATE = 20
    EXP = 21
    EXPM1 = 22
    LOG = 23
    LOG1P = 24
    SIN = 25
    COS = 26
    TANH = 27
    SIGMOID = 28
    SOFTPLUS = 29
    ERF = 30
    ATAN = 31
    ATAN2 = 32
    POWER = 33
    SILU = 34
    MINIMUM = 35
    MAXIMUM = 36
    MINIMUM_NUMBER = 37
    MAXIMUM_NUMBER = 38
    POWER_NUMBER = 39
    LESS = 40
    LESS_EQUAL = 41
    EQUAL = 42
    NOT_EQUAL = 43
    GREATER = 44
    GREATER_EQUAL = 45
    LESS_NUMBER = 46
    LESS_EQUAL_NUMBER = 47
    EQUAL_NUMBER = 48
    NOT_EQUAL_NUMBER = 49
    GREATER_NUMBER = 50
    GREATER_EQUAL_NUMBER = 51
    SELECT = 52
    LOGICAL_AND = 53
    LOGICAL_OR = 54
    LOGICAL_NOT = 55
    IS_NAN = 56
    REMAINDER = 57
    ROUND_BFLOAT16 = 58


class Space(IntEnum):
    """Where the numbers of an operand lie."""

    ARENA = 0
    CONSTANT = 1
    NUMBER = 2


class Reduction(IntEnum):
    """What becomes of a result: each number is stored, or the rows of the index space are reduced."""

    STORE = 0
    SUM = 1
    MAXIMUM = 2
    MINIMUM = 3
    PRODUCT = 4


class Kind(IntEnum):
    """Kinds of instructions, numbered as LaneKind."""

    MAP = 0
    PRODUCT = 1
    PAIR_PRODUCT = 2
    SCAN = 3


@dataclass(frozen=True)
class Operand:
    """The numbers that an instruction reads: for `ARENA` and `CONSTANT` one address for each place of the index space.

    A `NUMBER` is a single constant, at `addresses[0]`.
    """

    space: Space
    addresses: Addresses


@dataclass(frozen=True)
class Micro:
    """One operation on registers: `target = op(a, b, c, number)`. The first registers are the operands."""

    op: Op
    target: int
    a: int
    b: int = 0
    c: int = 0
    number: float = 0.0


@dataclass(frozen=True)
class Output:
    """A register that is stored at `addresses`: one for each place, or, where `reduction` reduces, for each row."""

    reduction: Reduction
    source: int
    addresses: Addresses


@dataclass(frozen=True)
class Map:
    """Micro-operations at each place of an index space of `outer` rows of `inner` places."""

    outer: int
    inner: int
    operands: tuple[Operand, ...]
    micros: tuple[Micro, ...]
    outputs: tuple[Output, ...]


@dataclass(frozen=True)
class Product:
    """target[r, c] = bias[c] + sum over k of arena[rows[r] + depth[k]] * weight[k, c].

    `weight` and `bias` are places in the constants: a panel (K, 16) for each 16 columns, filled up with zeros, and C
    numbers (-1: none).
    """

    rows: Addresses
    depth: Addresses
    target_rows: Addresses
    target_columns: Addresses
    weight: int
    bias: int = -1


@dataclass(frozen=True)
class PairProduct:
    """target[b, i, j] = sum over k of arena[left[b, i] + left_depth[k]] * arena[right[b, j] + right_depth[k]]."""

    left: Addresses
    left_depth: Addresses
    right: Addresses
    right_depth: Addresses
    target: Addresses


@dataclass(frozen=True)
class Scan:
    """target[r, j] = the sum of the operand at [r, 0] to [r, j]."""

    source: Addresses
    target: Addresses


Instruction = Map | Product | PairProduct | Scan


@dataclass(frozen=True)
class LaneProgram:
    """A program for samples of `sample` numbers, which lie at addresses from 0; `energy`, `gradient` are addresses.

    Behind a sample lie the `conditions` numbers that it comes with; nothing is written to those.
    """

    sample: int
    arena: int
    energy: int
    gradient: int
    instructions: tuple[Instruction, ...]
    constants: int
    conditions: int = 0

    def encoded(self) -> tuple[Tensor, Tensor]:
        """(code, tables) as the operators take them."""
        return _Encoder(self).encoded()


class _Encoder:
    def __init__(self, program: LaneProgram) -> None:
        self.program = program
        self.instructions: list[list[int]] = []
        self.operands: list[list[int]] = []
        self.micros: list[list[int]] = []
        self.outputs: list[list[int]] = []
        self.tables: list[Addresses] = []
        self.length = 0
        self.known: dict[bytes, int] = {}

    def encoded(self) -> tuple[Tensor, Tensor]:
        for instruction in self.program.instructions:
            self._add(instruction)
        p = self.program
        sizes = [len(part) for part in (self.instructions, self.operands, self.micros, self.outputs)]
        header = [
            VERSION,
            p.sample,
            p.arena,
            *sizes,
            self.length,
            p.constants,
            p.energy,
            p.gradient,
            0,
            p.conditions,
            0,
            0,
            0,
        ]
        rows = [*self.instructions, *self.operands, *self.micros, *self.outputs]
        code = torch.tensor([*header, *(number for row in rows for number in row)], dtype=torch.int64, device="cpu")
        tables = np.concatenate([np.zeros(0, np.int64), *self.tables]).astype(np.int32)
        return code, torch.from_numpy(tables)

    def _table(self, addresses: Addresses) -> tuple[int, int]:
        """(base, table) of addresses; the table is -1 where they are consecutive."""
        flat = np.asarray(addresses, np.int64).reshape(-1)
        base = int(flat[0]) if len(flat) else 0
        if np.array_equal(flat, np.arange(base, base + len(flat))):
            return base, -1
        base = int(flat.min())
        relative = flat - base
        key = relative.tobytes()
        if key not in self.known:
            self.known[key] = self.length
            self.tables.append(relative)
            self.length += len(relative)
        return base, self.known[key]

    def _add(self, i: Instruction) -> None:
        row = dict.fromkeys(_FIELDS, 0)
        if isinstance(i, Map):
            row |= {"kind": Kind.MAP, "outer": i.outer, "inner": i.inner, "first_operand": len(self.operands)}
            row |= {"operands": len(i.operands), "first_micro": len(self.micros), "micros": len(i.micros)}
            row |= {"first_output": len(self.outputs), "outputs": len(i.outputs)}
            for operand in i.operands:
                self.operands.append([operand.space, *self._table(operand.addresses)])
            for m in i.micros:
                bits = struct.unpack("<i", struct.pack("<f", m.number))[0]
                self.micros.append([m.op, m.target, m.a, m.b, m.c, bits])
            for output in i.outputs:
                self.outputs.append([output.reduction, output.source, *self._table(output.addresses)])
        elif isinstance(i, Product):
            row |= {"kind": Kind.PRODUCT, "rows": len(i.rows), "columns": len(i.target_columns), "depth": len(i.depth)}
            row |= self._sum("source", row_table=i.rows, k_table=i.depth)
            row |= self._sum("target", target_row_table=i.target_rows, target_column_table=i.target_columns)
            row |= {"weight": i.weight, "bias": i.bias}
        elif isinstance(i, PairProduct):
            batch, rows = i.left.shape
            row |= {"kind": Kind.PAIR_PRODUCT, "batch": batch, "rows": rows, "columns": i.right.shape[1]}
            row |= {"depth": len(i.left_depth)}
            row |= self._sum("source", row_table=i.left, k_table=i.left_depth)
            row |= self._sum("other", other_table=i.right, other_k_table=i.right_depth)
            row |= self._sum("target", target_row_table=i.target)
        else:
            row |= {"kind": Kind.SCAN, "outer": i.source.shape[0], "inner": i.source.shape[1]}
            row |= {"first_operand": len(self.operands), "operands": 1}
            self.operands.append([Space.ARENA, *self._table(i.source)])
            row |= self._sum("target", target_row_table=i.target)
        self.instructions.append([int(row[name]) for name in _FIELDS])

    def _sum(self, base: str, **tables: Addresses) -> dict[str, int]:
        found = {name: self._table(addresses) for name, addresses in tables.items()}
        return {base: sum(start for start, _ in found.values())} | {name: table for name, (_, table) in found.items()}


_FIELDS = [
    "kind",
    "outer",
    "inner",
    "first_operand",
    "operands",
    "first_micro",
    "micros",
    "first_output",
    "outputs",
    "rows",
    "columns",
    "depth",
    "source",
    "row_table",
    "k_table",
    "target",
    "target_row_table",
    "target_column_table",
    "weight",
    "bias",
    "other",
    "other_table",
    "other_k_table",
    "batch",
]


class CompiledLanes:
    """A lane program that runs on the CPU: `energies, gradient = self(x)`, after `refresh`.

    Attributes:
        constants: the tensor that the operators read besides the code. `refresh` writes into it.
        conditions: the numbers (B, C) that samples come with, or None.
    """

    def __init__(self, program: LaneProgram) -> None:
        self.program = program
        self.conditions: Tensor | None = None
        self._code, self._tables = program.encoded()
        self.constants = torch.zeros(program.constants, dtype=torch.float32, device="cpu")

    @torch.no_grad()
    def refresh(self, parts: Sequence[tuple[int, Tensor]]) -> None:
        """New constants: flat tensors, each with the place of its first number."""
        for start, values in parts:
            self.constants[start : start + values.numel()] = values

    def same_as(self, other: CompiledLanes) -> bool:
        """Whether both are one program with one set of constants."""
        pairs = ((self._code, other._code), (self._tables, other._tables), (self.constants, other.constants))
        return all(torch.equal(*pair) for pair in pairs)

    def bound(self, conditions: Tensor) -> CompiledLanes:
        """This program with the conditions (B, C) of samples, float32; it shares the constants."""
        made = copy.copy(self)
        made.conditions = conditions
        return made

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (B,) and the gradient, like x; x is contiguous and float32."""
        return torch.ops.fastebm.run_lanes(x, self._code, self._tables, self.constants, self.conditions)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Code, tables and constants, as operators take them."""
        return self._code, self._tables, self.constants

    def call_steps(self, x: Tensor) -> int:
        """How many updates of chains x one call of `advance` should make; 0 where it can't make any."""
        possible = x.is_cpu and x.is_contiguous() and x.dtype == torch.float32
        if not possible or not runs_compiled("run_lane_chain"):
            return 0
        batch = max(1, len(x))
        return max(4, min(CALL_STEPS, CALL_ENERGIES // batch, CALL_NUMBERS // (batch * self.program.arena)))

    def advance(
        self, x: Tensor, num_steps: int, options: StepOptions, noise_order: NoiseOrder = NoiseOrder.WITH_GRADIENT
    ) -> Tensor:
        """Advances chains x in place, and the key; returns the energies of each update's gradient, (num_steps, B)."""
        given = (x, self._code, self._tables, self.constants, num_steps)
        return torch.ops.fastebm.run_lane_chain(*given, *options, self.conditions, int(noise_order))


def pack_matrix(weight: Tensor) -> Tensor:
    """(K, C) as a product reads it: (panels, K, 16), flat."""
    depth, columns = weight.shape
    filled = torch.nn.functional.pad(weight, (0, -columns % PANEL))
    return filled.reshape(depth, -1, PANEL).transpose(0, 1).reshape(-1)


# Operators ----------------------------------------------------------------------------------------------------------


def check(name: str, x: Tensor, code: Tensor, tables: Tensor, constants: Tensor) -> None:
    """Raises TypeError or ValueError for tensors that no backend takes as a program and its samples."""
    for what, tensor, dtypes in (
        ("x", x, (torch.float32, torch.float64)),
        ("code", code, (torch.int64,)),
        ("tables", tables, (torch.int32,)),
        ("constants", constants, (x.dtype,)),
    ):
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name}: {what} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: {what} must be contiguous, got strides {tensor.stride()}")
    if x.ndim < 1:
        raise ValueError(f"{name}: x must be (B, ...), got no dimensions")


def conditions_of(name: str, x: Tensor, conditions: Tensor | None) -> Tensor:
    """`conditions` as kernels take them: (B, C), without columns where there are none."""
    if conditions is None:
        return x.new_empty(x.shape[0], 0)
    if conditions.dtype != x.dtype:
        raise TypeError(f"{name}: conditions must be {x.dtype} as x is, got {conditions.dtype}")
    if conditions.ndim != 2 or conditions.shape[0] != x.shape[0] or not conditions.is_contiguous():
        raise ValueError(
            f"{name}: conditions must be contiguous ({x.shape[0]}, C), got shape {tuple(conditions.shape)} and strides "
            f"{conditions.stride()}"
        )
    return conditions


def _fake_run_lanes(
    x: Tensor, code: Tensor, tables: Tensor, constants: Tensor, conditions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check("run_lanes", x, code, tables, constants)
    return x.new_empty(x.shape[0]), torch.empty_like(x)


@register("run_lanes", fake=_fake_run_lanes)
def _run_lanes(
    x: Tensor, code: Tensor, tables: Tensor, constants: Tensor, conditions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check("run_lanes", x, code, tables, constants)
    refuse_autograd("run_lanes", x, conditions)
    given = conditions_of("run_lanes", x, conditions)
    energies, gradient = x.new_empty(x.shape[0]), torch.empty_like(x)
    if x.numel():
        run = reference_run_lanes if x.dtype == torch.float64 else functools.partial(launch, "run_lanes")
        run(energies, gradient, x, code, tables, constants, given)
    return energies, gradient


def _fake_run_lane_chain(
    x: Tensor, code: Tensor, tables: Tensor, constants: Tensor, num_steps: int, *options: Any
) -> Tensor:
    check("run_lane_chain", x, code, tables, constants)
    return x.new_empty(num_steps, x.shape[0])


@register("run_lane_chain", fake=_fake_run_lane_chain)
def _run_lane_chain(
    x: Tensor, code: Tensor, tables: Tensor, constants: Tensor, num_steps: int, *arguments: Any
) -> Tensor:
    options = StepOptions(*arguments[: len(StepOptions._fields)])
    rest = arguments[len(options) :]
    given, noise_order = rest[0] if rest else None, rest[1] if len(rest) > 1 else 0
    check("run_lane_chain", x, code, tables, constants)
    conditions = conditions_of("run_lane_chain", x, given)
    if noise_order not in NoiseOrder._value2member_map_:
        raise ValueError(f"run_lane_chain: there is no order of noise {noise_order}")
    check_update("run_lane_chain", x, x, options)
    if num_steps < 0:
        raise ValueError(f"num_steps must not be negative, got {num_steps}")
    if not options.key.is_contiguous():
        raise ValueError(f"key is written in place and must be contiguous, got strides {options.key.stride()}")
    energies = x.new_empty(num_steps, x.shape[0])
    if x.numel() == 0:
        options.key[1:].add_(num_steps)
        return energies
    # Kernels write x and the key while they still read the other tensors, which therefore must not share their memory.
    if share_memory(x, options.key):
        raise ValueError("x and key are both written in place, but share memory")
    read = (code, tables, constants, conditions, *options[:1], *options[2:3], *options[7:-1])
    apart = without_aliasing(read, x, options.key)
    schedule, chain_ids, *sides = (None if each is None else each.contiguous() for each in apart[4:])
    run = reference_run_lane_chain if x.dtype == torch.float64 else functools.partial(launch, "run_lane_chain")
    run(
        energies,
        x,
        *apart[:4],
        noise_order,
        schedule,
        options.key,
        chain_ids,
        *options[3:7],
        *sides,
        options.data_term_hinge,
    )
    return energies


# Reference ----------------------------------------------------------------------------------------------------------


def _truth(value: Tensor, x: Tensor) -> Tensor:
    return value.to(x.dtype)


def _where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition != 0, a, b)


_REFERENCE: dict[Op, Callable[..., Tensor]] = {
    Op.COPY: lambda x, y, z, n: x,
    Op.ADD: lambda x, y, z, n: x + y,
    Op.SUBTRACT: lambda x, y, z, n: x - y,
    Op.MULTIPLY: lambda x, y, z, n: x * y,
    Op.DIVIDE: lambda x, y, z, n: x / y,
    Op.NEGATE: lambda x, y, z, n: -x,
    Op.MULTIPLY_ADD: lambda x, y, z, n: x * y + z,
    Op.ADD_NUMBER: lambda x, y, z, n: x + n,
    Op.MULTIPLY_NUMBER: lambda x, y, z, n: x * n,
    Op.NUMBER_MINUS: lambda x, y, z, n: n - x,
    Op.NUMBER_OVER: lambda x, y, z, n: n / x,
    Op.SQUARE: lambda x, y, z, n: x * x,
    Op.RECIPROCAL: lambda x, y, z, n: 1 / x,
    Op.SQUARE_ROOT: lambda x, y, z, n: x.sqrt(),
    Op.RECIPROCAL_ROOT: lambda x, y, z, n: 1 / x.sqrt(),
    Op.ABSOLUTE: lambda x, y, z, n: x.abs(),
    Op.SIGN: lambda x, y, z, n: x.sign() + 0 * x,
    Op.FLOOR: lambda x, y, z, n: x.floor(),
    Op.CEIL: lambda x, y, z, n: x.ceil(),
    Op.ROUND: lambda x, y, z, n: x.round(),
    Op.TRUNCATE: lambda x, y, z, n: x.trunc(),
    Op.EXP: lambda x, y, z, n: x.exp(),
    Op.EXPM1: lambda x, y, z, n: x.expm1(),
    Op.LOG: lambda x, y, z, n: x.log(),
    Op.LOG1P: lambda x, y, z, n: x.log1p(),
    Op.SIN: lambda x, y, z, n: x.sin(),
    Op.COS: lambda x, y, z, n: x.cos(),
    Op.TANH: lambda x, y, z, n: x.tanh(),
    Op.SIGMOID: lambda x, y, z, n: x.sigmoid(),
    Op.SOFTPLUS: lambda x, y, z, n: torch.logaddexp(x, torch.zeros_like(x)),
    Op.ERF: lambda x, y, z, n: x.erf(),
    Op.ATAN: lambda x, y, z, n: x.atan(),
    Op.ATAN2: lambda x, y, z, n: torch.atan2(x, y),
    Op.POWER: lambda x, y, z, n: x.pow(y),
    Op.SILU: lambda x, y, z, n: x * x.sigmoid(),
    Op.MINIMUM: lambda x, y, z, n: torch.minimum(x, y),
    Op.MAXIMUM: lambda x, y, z, n: torch.maximum(x, y),
    Op.MINIMUM_NUMBER: lambda x, y, z, n: x.clamp(max=n),
    Op.MAXIMUM_NUMBER: lambda x, y, z, n: x.clamp(min=n),
    Op.POWER_NUMBER: lambda x, y, z, n: x.pow(n),
    Op.LESS: lambda x, y, z, n: _truth(x < y, x),
    Op.LESS_EQUAL: lambda x, y, z, n: _truth(x <= y, x),
    Op.EQUAL: lambda x, y, z, n: _truth(x == y, x),
    Op.NOT_EQUAL: lambda x, y, z, n: _truth(x != y, x),
    Op.GREATER: lambda x, y, z, n: _truth(x > y, x),
    Op.GREATER_EQUAL: lambda x, y, z, n: _truth(x >= y, x),
    Op.LESS_NUMBER: lambda x, y, z, n: _truth(x < n, x),
    Op.LESS_EQUAL_NUMBER: lambda x, y, z, n: _truth(x <= n, x),
    Op.EQUAL_NUMBER: lambda x, y, z, n: _truth(x == n, x),
    Op.NOT_EQUAL_NUMBER: lambda x, y, z, n: _truth(x != n, x),
    Op.GREATER_NUMBER: lambda x, y, z, n: _truth(x > n, x),
    Op.GREATER_EQUAL_NUMBER: lambda x, y, z, n: _truth(x >= n, x),
    Op.SELECT: lambda x, y, z, n: _where(x, y, z),
    Op.LOGICAL_AND: lambda x, y, z, n: _truth((x != 0) & (y != 0), x),
    Op.LOGICAL_OR: lambda x, y, z, n: _truth((x != 0) | (y != 0), x),
    Op.LOGICAL_NOT: lambda x, y, z, n: _truth(x == 0, x),
    Op.IS_NAN: lambda x, y, z, n: _truth(x.isnan(), x),
    Op.REMAINDER: lambda x, y, z, n: torch.remainder(x, y),
    Op.ROUND_BFLOAT16: lambda x, y, z, n: x.bfloat16().to(x.dtype),
}
_REDUCED: dict[Reduction, Callable[[Tensor], Tensor]] = {
    Reduction.SUM: lambda v: v.sum(1),
    Reduction.MAXIMUM: lambda v: v.amax(1),
    Reduction.MINIMUM: lambda v: v.amin(1),
    Reduction.PRODUCT: lambda v: v.prod(1),
}


class _Reader:
    """The parts of a program's code."""

    def __init__(self, code: Tensor, tables: Tensor) -> None:
        numbers = code.tolist()
        self.header = numbers[:16]
        self.tables = tables.long()
        at = 16
        self.parts = []
        for count, width in zip(self.header[3:7], (len(_FIELDS), 3, 6, 4), strict=True):
            self.parts.append([numbers[at + i * width : at + (i + 1) * width] for i in range(count)])
            at += count * width
        self.instructions = [dict(zip(_FIELDS, row, strict=True)) for row in self.parts[0]]

    def addresses(self, base: int, table: int, count: int) -> Tensor:
        offsets = torch.arange(count, device="cpu") if table < 0 else self.tables[table : table + count]
        return offsets + base


def reference_run_lanes(
    energies: Tensor,
    gradient: Tensor,
    x: Tensor,
    code: Tensor,
    tables: Tensor,
    constants: Tensor,
    conditions: Tensor,
) -> None:
    """Kernel `run_lanes` in plain PyTorch."""
    reader = _Reader(code, tables)
    _, sample, arena_size, *_ = reader.header
    energy, start = reader.header[9:11]
    arena = x.new_zeros(arena_size, x.shape[0])
    arena[:sample] = x.reshape(x.shape[0], sample).T
    arena[sample : sample + reader.header[12]] = conditions.T
    for i in reader.instructions:
        _RUN[Kind(i["kind"])](reader, i, arena, constants)
    energies.copy_(arena[energy])
    gradient.copy_(arena[start : start + sample].T.reshape(x.shape))


def _run_map(reader: _Reader, i: dict[str, int], arena: Tensor, constants: Tensor) -> None:
    total = i["outer"] * i["inner"]
    _, operands, micros, outputs = reader.parts
    registers: dict[int, Tensor] = {}
    for r, (space, base, table) in enumerate(operands[i["first_operand"] : i["first_operand"] + i["operands"]]):
        if space == Space.NUMBER:
            registers[r] = constants[base].expand(total, arena.shape[1])
        elif space == Space.CONSTANT:
            registers[r] = constants[reader.addresses(base, table, total)][:, None].expand(total, arena.shape[1])
        else:
            registers[r] = arena[reader.addresses(base, table, total)]
    for op, target, a, b, c, bits in micros[i["first_micro"] : i["first_micro"] + i["micros"]]:
        number = struct.unpack("<f", struct.pack("<i", bits))[0]
        x = registers[a]
        registers[target] = _REFERENCE[Op(op)](x, registers.get(b, x), registers.get(c, x), number)
    for kind, source, base, table in outputs[i["first_output"] : i["first_output"] + i["outputs"]]:
        value = registers[source]
        if kind == Reduction.STORE:
            arena[reader.addresses(base, table, total)] = value
        else:
            rows = value.reshape(i["outer"], i["inner"], -1)
            arena[reader.addresses(base, table, i["outer"])] = _REDUCED[Reduction(kind)](rows)


def _run_product(reader: _Reader, i: dict[str, int], arena: Tensor, constants: Tensor) -> None:
    rows, columns, depth = i["rows"], i["columns"], i["depth"]
    panels = -(-columns // PANEL)
    packed = constants[i["weight"] : i["weight"] + panels * depth * PANEL].reshape(panels, depth, PANEL)
    weight = packed.transpose(0, 1).reshape(depth, -1)[:, :columns]
    source = reader.addresses(i["source"], i["row_table"], rows)[:, None] + reader.addresses(0, i["k_table"], depth)
    out = torch.einsum("rkb,kc->rcb", arena[source], weight)
    if i["bias"] >= 0:
        out = out + constants[i["bias"] : i["bias"] + columns][:, None]
    target = reader.addresses(i["target"], i["target_row_table"], rows)[:, None]
    arena[target + reader.addresses(0, i["target_column_table"], columns)] = out


def _run_pair_product(reader: _Reader, i: dict[str, int], arena: Tensor, constants: Tensor) -> None:
    batch, rows, columns, depth = i["batch"], i["rows"], i["columns"], i["depth"]
    left = reader.addresses(i["source"], i["row_table"], batch * rows).reshape(batch, rows, 1)
    right = reader.addresses(i["other"], i["other_table"], batch * columns).reshape(batch, columns, 1)
    a = arena[left + reader.addresses(0, i["k_table"], depth)]
    b = arena[right + reader.addresses(0, i["other_k_table"], depth)]
    target = reader.addresses(i["target"], i["target_row_table"], batch * rows * columns)
    arena[target] = torch.einsum("bikn,bjkn->bijn", a, b).reshape(batch * rows * columns, -1)


def _run_scan(reader: _Reader, i: dict[str, int], arena: Tensor, constants: Tensor) -> None:
    total = i["outer"] * i["inner"]
    _, base, table = reader.parts[1][i["first_operand"]]
    value = arena[reader.addresses(base, table, total)].reshape(i["outer"], i["inner"], -1)
    arena[reader.addresses(i["target"], i["target_row_table"], total)] = value.cumsum(1).reshape(total, -1)


_RUN: dict[Kind, Callable[[_Reader, dict[str, int], Tensor, Tensor], None]] = {
    Kind.MAP: _run_map,
    Kind.PRODUCT: _run_product,
    Kind.PAIR_PRODUCT: _run_pair_product,
    Kind.SCAN: _run_scan,
}


def reference_run_lane_chain(
    energies: Tensor,
    x: Tensor,
    code: Tensor,
    tables: Tensor,
    constants: Tensor,
    conditions: Tensor,
    noise_order: int,
    *options: Any,
) -> None:
    """Kernel `run_lane_chain` in plain PyTorch: its two parts in turn."""
    given = StepOptions(*options)
    one = torch.arange(3, device=given.key.device).clamp_(max=1)
    gradient = torch.empty_like(x)
    noise, drift = noise_options(given, NoiseOrder(noise_order)), drift_options(given)
    for row in energies:
        if noise_order != NoiseOrder.WITH_GRADIENT:
            reference_langevin_step(x, x, torch.zeros_like(x), *noise)
        reference_run_lanes(row, gradient, x, code, tables, constants, conditions)
        reference_langevin_step(x, x, gradient, *(given if noise_order == NoiseOrder.WITH_GRADIENT else drift))
        given.key.add_(one)
