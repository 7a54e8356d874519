"""`run_lanes` and `run_lane_chain`: every instruction against float64, the same bits whatever runs beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from fastebm import ops, rng
from fastebm.ops.lanes import (
    Instruction,
    LaneProgram,
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
    pack_matrix,
)

try:
    from fastebm import _C
except ImportError:
    _C = None

VARIANTS = ("baseline", "avx2", "avx512")


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    if _C is None:
        pytest.skip("the compiled operators are not built")
    if ops.backends.select_backend("cpu", kernel="run_lanes") != "cpp":
        pytest.skip("another backend than the compiled one was asked for")
    if VARIANTS.index(request.param) > VARIANTS.index(min(_C.best_variant(), "avx512", key=[*VARIANTS, "amx"].index)):
        pytest.skip(f"this CPU has no {request.param}")
    before = _C.active_variant()
    _C.set_variant(request.param)
    yield request.param
    _C.set_variant(before)


def places(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def program(
    instructions: list[Instruction], sample: int, arena: int, energy: int, gradient: int, constants: int = 1
) -> LaneProgram:
    return LaneProgram(sample, arena, energy, gradient, tuple(instructions), constants)


def run(made: LaneProgram, x: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.fastebm.run_lanes(x, *made.encoded(), constants)


def pointwise(op: Op, operands: int, number: float) -> LaneProgram:
    """out = op(x0, x1, x2, number): the energy, and three times the gradient of a sample of three numbers."""
    read = tuple(Operand(Space.ARENA, places(i)) for i in range(3))
    micro = Micro(op, 3, *range(operands), number=number)
    stored = tuple(Output(Reduction.STORE, 3, places(3 + i)) for i in range(3))
    return program([Map(1, 1, read, (micro,), stored)], sample=3, arena=6, energy=3, gradient=3)


BINARY = {
    Op.ADD, Op.SUBTRACT, Op.MULTIPLY, Op.DIVIDE, Op.ATAN2, Op.POWER, Op.MINIMUM, Op.MAXIMUM, Op.LESS, Op.LESS_EQUAL,
    Op.EQUAL, Op.NOT_EQUAL, Op.GREATER, Op.GREATER_EQUAL, Op.LOGICAL_AND, Op.LOGICAL_OR, Op.REMAINDER,
}  # fmt: skip
TERNARY = {Op.MULTIPLY_ADD, Op.SELECT}
# Units in the last place of float32; those with a number also where the result is far from 1.
UNITS = {
    Op.EXP: 2, Op.EXPM1: 4, Op.LOG: 2, Op.LOG1P: 3, Op.SIN: 2, Op.COS: 2, Op.TANH: 6, Op.SIGMOID: 4, Op.SOFTPLUS: 4,
    Op.ERF: 4, Op.ATAN: 3, Op.ATAN2: 4, Op.SILU: 5, Op.RECIPROCAL_ROOT: 2, Op.REMAINDER: 0,
}  # fmt: skip


def numbers() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2000, 3, generator=generator)
    return torch.cat([drawn, 0.01 * drawn, 10 * drawn, drawn * drawn.abs().log2().mul(8).clamp(-40, 40).exp2()])


def operand_count(op: Op) -> int:
    return 2 if op in BINARY else 3 if op in TERNARY else 1


@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.name.lower())
def test_operations_against_float64(op: Op, variant: str) -> None:
    x, number = numbers(), 0.75
    if op in (Op.SELECT, Op.LOGICAL_AND, Op.LOGICAL_OR, Op.LOGICAL_NOT):
        x = x * (x > 0)
    if op is Op.POWER:
        x[:, 0] = x[:, 0].abs().clamp(1e-3, 1e3)
        x[:, 1] = x[:, 1].clamp(-6, 6)
    if op is Op.POWER_NUMBER:
        x = x.abs().clamp(1e-6, 1e6)
    if op is Op.SILU:  # a factor below the normal numbers has few places
        x = x.clamp_min(-80)
    if op is Op.REMAINDER:
        x = x.clamp(-100, 100)
        x[:, 1] += x[:, 1].sign()
    made = pointwise(op, operand_count(op), number)
    ours, _ = run(made, x, torch.zeros(1))
    exact, _ = run(made, x.double(), torch.zeros(1, dtype=torch.float64))
    finite = exact.isfinite() & (exact.abs() < 3e38)
    assert torch.equal(ours.isnan(), exact.isnan())
    unit = torch.finfo(torch.float32).eps * exact.abs().clamp_min(torch.finfo(torch.float32).tiny)
    allowed = 64 if op in (Op.POWER, Op.POWER_NUMBER) else UNITS.get(op, 1)
    error = ((ours.double() - exact).abs() / unit)[finite]
    assert error.max() <= max(allowed, 1)


@pytest.mark.parametrize("op", sorted(UNITS), ids=lambda op: op.name.lower())
def test_operations_at_the_ends(op: Op, variant: str) -> None:
    """Infinities, zeros of both signs, NaN, the smallest and the largest numbers."""
    ends = [
        math.inf,
        -math.inf,
        0.0,
        -0.0,
        math.nan,
        1e-45,
        -1e-45,
        1e-38,
        3e38,
        -3e38,
        88.0,
        89.0,
        -87.5,
        -103.0,
        -105.0,
        1.0,
    ]
    x = torch.tensor([[a, b, 1.0] for a in ends for b in ends])
    if op in (Op.SIN, Op.COS):  # beyond 2^30 turns are NaN rather than wrong
        x = x[(x[:, 0].abs() < 2**30) | ~x[:, 0].isfinite()]
    made = pointwise(op, operand_count(op), 1.0)
    ours, _ = run(made, x, torch.zeros(1))
    exact, _ = run(made, x.double(), torch.zeros(1, dtype=torch.float64))
    rounded = exact.float()
    assert torch.equal(ours.isnan(), rounded.isnan()), x[ours.isnan() != rounded.isnan()]
    both = ~rounded.isnan()
    assert torch.allclose(ours[both], rounded[both], rtol=2e-6, atol=128 * 1.4e-45)


def mixed() -> tuple[LaneProgram, Tensor]:
    """All kinds of instructions on samples of 6 numbers, each of which reads what the one before it wrote."""
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(3, 21, generator=generator), torch.randn(21, generator=generator)
    constants = torch.cat([pack_matrix(weight), bias, torch.tensor([0.5, 1.5, 2.5, 3.5, 4.5, 5.5])])
    start = pack_matrix(weight).numel()
    shuffled = places(5, 3, 4, 0, 2, 1)
    made: list[Instruction] = [
        # y = tanh(x permuted * constants), with the sums of its two rows and their largest
        Map(
            2,
            3,
            (Operand(Space.ARENA, shuffled), Operand(Space.CONSTANT, start + 21 + np.arange(6))),
            (Micro(Op.MULTIPLY, 2, 0, 1), Micro(Op.TANH, 2, 2)),
            (
                Output(Reduction.STORE, 2, 6 + np.arange(6)),
                Output(Reduction.SUM, 2, places(12, 13)),
                Output(Reduction.MAXIMUM, 2, places(15, 14)),
            ),
        ),
        Product(6 + places(0, 3), places(2, 0, 1), 16 + places(0, 21), np.arange(21), 0, start),
        PairProduct(
            16 + np.arange(42).reshape(2, 21)[:, :4].reshape(1, 8),
            places(0, 4),
            16 + np.arange(42).reshape(2, 21)[:, 8:13].reshape(1, 10),
            places(0, 4),
            58 + np.arange(80).reshape(1, 8, 10),
        ),
        Scan(58 + np.arange(80).reshape(8, 10), 138 + np.arange(80).reshape(8, 10)),
        Map(
            1,
            80,
            (Operand(Space.ARENA, 138 + np.arange(80)), Operand(Space.NUMBER, places(start + 21))),
            (Micro(Op.SIN, 2, 0), Micro(Op.MULTIPLY_ADD, 3, 2, 1, 0)),
            (Output(Reduction.SUM, 3, places(218)),),
        ),
        Map(
            6,
            1,
            (Operand(Space.ARENA, 138 + np.arange(6)), Operand(Space.ARENA, places(12, 13, 14, 15, 12, 13))),
            (Micro(Op.MULTIPLY, 2, 0, 1),),
            (Output(Reduction.STORE, 2, 219 + np.arange(6)),),
        ),
    ]
    return program(made, sample=6, arena=225, energy=218, gradient=219, constants=len(constants)), constants


def samples(batch: int, numbers: int = 6) -> Tensor:
    return torch.randn(batch, numbers, generator=torch.Generator().manual_seed(batch))


def test_instructions_against_float64(variant: str) -> None:
    made, constants = mixed()
    for batch in (1, 3, 4, 17, 100):
        x = samples(batch)
        ours = run(made, x, constants)
        exact = run(made, x.double(), constants.double())
        for a, b in zip(ours, exact, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


def test_bits_do_not_depend_on_the_batch_the_threads_or_the_instruction_set(variant: str) -> None:
    made, constants = mixed()
    x, threads = samples(333), torch.get_num_threads()
    all_, gradient = run(made, x, constants)
    for size in (1, 2, 5, 16, 31, 64, 200):
        parts = [run(made, x[first : first + size].contiguous(), constants) for first in range(0, len(x), size)]
        assert torch.equal(torch.cat([part[0] for part in parts]), all_)
        assert torch.equal(torch.cat([part[1] for part in parts]), gradient)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(made, x, constants)[1], gradient)
    finally:
        torch.set_num_threads(threads)
    _C.set_variant("baseline")
    assert torch.equal(run(made, x, constants)[1], gradient)


def test_samples_do_not_touch_one_another(variant: str) -> None:
    made, constants = mixed()
    x = samples(40)
    good = run(made, x, constants)
    bad = x.clone()
    bad[7], bad[21, 2] = math.nan, math.inf
    others = [i for i in range(40) if i not in (7, 21)]
    spoiled = run(made, bad, constants)
    assert torch.equal(spoiled[1][others], good[1][others])
    assert torch.equal(run(made, x, constants)[1], good[1])


def chain_options(batch: int, rows: int, per_chain: bool, **more: float) -> dict[str, object]:
    generator = torch.Generator().manual_seed(2)
    shape = (rows, batch, 2) if per_chain else (rows, 2)
    schedule = 0.1 * torch.rand(shape, generator=generator)
    if per_chain:
        schedule[:, ::3, 1] = 0  # chains without noise beside others
    none = dict.fromkeys(
        ("clamp_min", "clamp_max", "grad_clip", "grad_norm_clip", "mask", "known", "data_target", "data_term_weight")
    )
    return {
        "schedule": schedule,
        "key": rng.make_key(7, 3),
        "chain_ids": rng.make_chain_ids(2**40 + 5, batch),
        **none,
        "data_term_hinge": 0.0,
        **more,
    }


@pytest.mark.parametrize(
    "more", [{}, {"clamp_min": -0.5, "clamp_max": 0.7}, {"grad_clip": 0.2}], ids=["plain", "clamp", "clip"]
)
@pytest.mark.parametrize("per_chain", [False, True], ids=["one schedule", "a schedule each"])
def test_a_chain_is_one_update_after_the_other(variant: str, more: dict[str, float], per_chain: bool) -> None:
    made, constants = mixed()
    code = made.encoded()
    for batch in (1, 5, 40):
        x, options = samples(batch), chain_options(batch, 4, per_chain, **more)
        expected, energies = x.clone(), []
        key = options["key"].clone()
        for _ in range(6):
            energy, gradient = torch.ops.fastebm.run_lanes(expected, *code, constants)
            torch.ops.fastebm.langevin_step_(expected, gradient, *(options | {"key": key}).values())
            energies.append(energy)
            key[1:] += 1
        whole = torch.ops.fastebm.run_lane_chain(x, *code, constants, 6, *options.values())
        assert torch.equal(x, expected)
        assert torch.equal(whole, torch.stack(energies))
        assert torch.equal(options["key"], key)


def test_opcheck() -> None:
    made, constants = mixed()
    code = made.encoded()
    torch.library.opcheck(torch.ops.fastebm.run_lanes.default, (samples(5), *code, constants))
    options = chain_options(5, 2, False)
    torch.library.opcheck(
        torch.ops.fastebm.run_lane_chain.default, (samples(5), *code, constants, 2, *options.values())
    )


def test_wrong_programs_are_refused() -> None:
    if ops.backends.select_backend("cpu", kernel="run_lanes") != "cpp":
        pytest.skip("another backend than the compiled one was asked for")
    made, constants = mixed()
    code, tables = made.encoded()
    x = samples(3)
    refused = 0
    for place in range(len(code)):
        for value in (-1, -(2**40), 2**40, 2**62, int(code[place]) + 1, 7):
            changed = code.clone()
            changed[place] = value
            try:
                torch.ops.fastebm.run_lanes(x, changed, tables, constants)
            except (RuntimeError, ValueError):
                refused += 1
    assert refused > 2 * len(code)
    for wrong in (code[:-1], code[:5], torch.zeros(0, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="code"):
            torch.ops.fastebm.run_lanes(x, wrong.clone(), tables, constants)
    with pytest.raises(RuntimeError, match="constants"):
        torch.ops.fastebm.run_lanes(x, code, tables, constants[:-1].clone())
    with pytest.raises(RuntimeError, match="samples of 6"):
        torch.ops.fastebm.run_lanes(samples(3, 5), code, tables, constants)
