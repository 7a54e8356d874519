"""`run_lanes` and `run_lane_chain`: every instruction against float64, the same bits whatever runs beside it."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
from fastebm.ops.options import StepOptions

try:
    from fastebm import _C
except ImportError:
    _C = None

pytestmark = pytest.mark.skipif(
    os.environ.get("FASTEBM_BACKEND") in ("triton", "cuda"), reason="lane programs have no kernel for a GPU"
)


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
    many = x.repeat(60, 1)  # enough work for several threads
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(made, many, constants)[1], gradient.repeat(60, 1))
    finally:
        torch.set_num_threads(threads)
    _C.set_variant("baseline")
    assert torch.equal(run(made, x, constants)[1], gradient)


@pytest.mark.parametrize(
    ("rows", "columns", "depth"),
    [(1, 1, 1), (9, 1, 5), (8, 16, 3), (4, 5, 7), (3, 40, 600), (5, 20, 33), (1, 150, 9), (2, 12, 1100), (17, 35, 2)],
)
def test_products_of_all_shapes(variant: str, rows: int, columns: int, depth: int) -> None:
    """Tiles of rows, columns and lanes, depths of several blocks; the bits of a sample are those that it has alone."""
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(depth, columns, generator=generator), torch.randn(columns, generator=generator)
    constants = torch.cat([pack_matrix(weight), bias])
    sample, start = rows + depth, len(constants) - columns
    out = sample + np.arange(rows * columns).reshape(rows, columns)[::-1]  # rows from the last to the first
    made: list[Instruction] = [
        Product(np.arange(rows), np.arange(depth)[::-1].copy(), out[:, 0], np.arange(columns), 0, start),
        Map(1, out.size, (Operand(Space.ARENA, out.reshape(-1)),), (Micro(Op.COPY, 1, 0),),
            (Output(Reduction.SUM, 1, places(sample + out.size)),)),
        Map(sample, 1, (Operand(Space.ARENA, sample + np.arange(sample) % out.size),), (Micro(Op.COPY, 1, 0),),
            (Output(Reduction.STORE, 1, sample + out.size + 1 + np.arange(sample)),)),
    ]  # fmt: skip
    code = program(made, sample, 2 * sample + out.size + 1, sample + out.size, sample + out.size + 1, len(constants))
    x = samples(300, sample)
    all_, gradient = run(code, x, constants)
    exact, exact_gradient = run(code, x.double(), constants.double())
    assert (gradient - exact_gradient).norm() <= 1e-6 * depth**0.5 * exact_gradient.norm()
    assert (all_ - exact).norm() <= 1e-5 * depth**0.5 * exact.norm()
    for size in (1, 5, 33, 70, 130):
        energies, part = run(code, x[:size].contiguous(), constants)
        assert torch.equal(energies, all_[:size])
        assert torch.equal(part, gradient[:size])


def test_results_that_overlap_what_a_loop_reads_are_those_of_the_reference(variant: str) -> None:
    """A loop that writes where it reads, in order: its results may not lie in place before all is read."""
    read = (Operand(Space.ARENA, np.arange(4)), Operand(Space.ARENA, np.arange(4)))
    micros = (Micro(Op.ADD_NUMBER, 2, 0, number=1.0), Micro(Op.MULTIPLY, 3, 1, 2))
    kept = (Output(Reduction.STORE, 2, np.arange(4)), Output(Reduction.STORE, 3, 4 + np.arange(4)))
    made = program([Map(4, 1, read, micros, kept)], sample=4, arena=8, energy=4, gradient=4)
    x = samples(20, 4)
    assert torch.equal(run(made, x, torch.zeros(1))[1], x * (x + 1))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_callers_in_several_threads_share_the_helpers(two_threads: None) -> None:
    made, constants = mixed()
    code, x = made.encoded(), samples(333).repeat(60, 1)
    expected = torch.ops.fastebm.run_lanes(x, *code, constants)[1]

    def work(_: int) -> bool:
        torch.set_num_threads(2)  # each thread has a number of its own
        found = [torch.ops.fastebm.run_lanes(x, *code, constants)[1] for _ in range(10)]
        return all(torch.equal(each, expected) for each in found)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_forked_process_has_helpers_of_its_own(two_threads: None) -> None:
    made, constants = mixed()
    code, x = made.encoded(), samples(333).repeat(60, 1)
    energies, gradient = torch.empty(len(x)), torch.empty_like(x)
    expected = torch.ops.fastebm.run_lanes(x, *code, constants)[1]
    if not ops.backends.runs_compiled("run_lanes"):
        pytest.skip("another backend than the compiled one was asked for")
    child = os.fork()
    if child == 0:  # nothing but the kernel: pytest and the libraries are not made for this
        torch.ops.fastebm_cpp.run_lanes(energies, gradient, x, *code, constants, torch.empty(len(x), 0))
        os._exit(0 if np.array_equal(gradient.numpy(), expected.numpy()) else 1)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert ended[1] == 0


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


OPTIONS = {
    "plain": (),
    "clamp": ("clamp",),
    "grad_clip": ("grad_clip",),
    "grad_norm_clip": ("grad_norm_clip",),
    "bounds": ("bounds",),
    "mask": ("mask",),
    "data term": ("target",),
    "hinge": ("target", "hinge"),
    "all": ("clamp", "grad_norm_clip", "bounds", "mask", "target", "hinge"),
    "all with grad_clip": ("clamp", "grad_clip", "bounds", "mask", "target"),
}


def chain_options(x: Tensor, rows: int, per_chain: bool, *used: str) -> StepOptions:
    """Options of chains x. Each of them changes some of the chains, or some of their entries, and leaves others."""
    generator = torch.Generator().manual_seed(2)
    batch = x.shape[0]
    shape = (rows, batch, 2) if per_chain else (rows, 2)
    schedule = 0.1 * torch.rand(shape, generator=generator)
    if per_chain:
        schedule[:, ::3, 1] = 0  # chains without noise beside others

    def near(scale: float) -> Tensor:
        return x + scale * torch.randn(x.shape, generator=generator)

    low, high = near(0.3) - 0.3, near(0.3) + 0.3
    low[:, ::2] = math.nan
    target = near(0.2)
    target[::2] += 2
    return StepOptions(
        schedule,
        rng.make_key(7, 3),
        rng.make_chain_ids(2**40 + 5, batch),
        -0.5 if "clamp" in used else None,
        0.7 if "clamp" in used else None,
        0.2 if "grad_clip" in used else None,
        1.5 if "grad_norm_clip" in used else None,
        low if "bounds" in used else None,
        high if "bounds" in used else None,
        torch.rand(x.shape, generator=generator) < 0.3 if "mask" in used else None,
        near(1.0) if "mask" in used else None,
        target if "target" in used else None,
        torch.tensor([0.3, 0.0, 0.7]) if "target" in used else None,
        0.5 * x[0].numel() if "hinge" in used else 0.0,
    )


def one_by_one(x: Tensor, code: tuple[Tensor, Tensor], constants: Tensor, options: StepOptions, steps: int) -> Any:
    """States and energies of a chain by `run_lanes` and `langevin_step_` in turn; the key moves on."""
    x, energies = x.clone(), []
    for _ in range(steps):
        energy, gradient = torch.ops.fastebm.run_lanes(x, *code, constants)
        torch.ops.fastebm.langevin_step_(x, gradient, *options)
        energies.append(energy)
        options.key[1:] += 1
    return x, torch.stack(energies)


@pytest.mark.parametrize("used", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("per_chain", [False, True], ids=["one schedule", "a schedule each"])
def test_a_chain_is_one_update_after_the_other(variant: str, used: tuple[str, ...], per_chain: bool) -> None:
    made, constants = mixed()
    code = made.encoded()
    for batch in (1, 2, 5, 40, 150):
        x = samples(batch)
        options = chain_options(x, 4, per_chain, *used)
        expected, energies = one_by_one(x, code, constants, options._replace(key=options.key.clone()), 6)
        whole = torch.ops.fastebm.run_lane_chain(x, *code, constants, 6, *options)
        assert torch.equal(x, expected)
        assert torch.equal(whole, energies)
        assert options.key.tolist() == [7, 9, 6]


def quadratic(sample: int) -> LaneProgram:
    """E(x) = |x|^2 / 2, whose gradient is a copy of x."""
    read = (Operand(Space.ARENA, np.arange(sample)),)
    square = Micro(Op.MULTIPLY_NUMBER, 1, 0, number=0.5), Micro(Op.MULTIPLY, 1, 1, 0), Micro(Op.COPY, 2, 0)
    kept = (Output(Reduction.SUM, 1, places(2 * sample)), Output(Reduction.STORE, 2, sample + np.arange(sample)))
    return program([Map(1, sample, read, square, kept)], sample, 2 * sample + 1, 2 * sample, sample)


@pytest.mark.parametrize("sample", [1, 2, 3, 63, 64, 65, 1024, 1500, 3000])
def test_chains_of_all_sizes_are_one_update_after_the_other(variant: str, sample: int) -> None:
    """Norms are summed in the order of `langevin_step_`; a single chain takes its elements side by side."""
    code, constants = quadratic(sample).encoded(), torch.zeros(1)
    for batch in (1, 3, 20, 70):
        x = samples(batch, sample)
        options = chain_options(x, 4, True, "grad_norm_clip", "target", "hinge", "bounds", "mask")
        options = options._replace(grad_norm_clip=0.9 * sample**0.5)
        expected, energies = one_by_one(x, code, constants, options._replace(key=options.key.clone()), 3)
        assert torch.equal(torch.ops.fastebm.run_lane_chain(x, *code, constants, 3, *options), energies)
        assert torch.equal(x, expected)


def test_bits_of_chains_do_not_depend_on_the_batch_the_threads_or_the_instruction_set(variant: str) -> None:
    made, constants = mixed()
    code, start, threads = made.encoded(), samples(333), torch.get_num_threads()
    whole = chain_options(start, 4, True, *OPTIONS["all"])

    def chains(first: int, last: int) -> Tensor:
        part = [None if each is None else each[first:last].clone() for each in whole[7:12]]
        schedule, ids = whole.schedule[:, first:last].contiguous(), whole.chain_ids + first
        options = StepOptions(schedule, whole.key.clone(), ids, *whole[3:7], *part, *whole[12:])
        x = start[first:last].clone()
        torch.ops.fastebm.run_lane_chain(x, *code, constants, 70, *options)
        return x

    all_ = chains(0, 333)
    assert all_.isfinite().all()
    for size in (1, 2, 5, 16, 31, 64, 200):
        parts = [chains(first, min(first + size, 333)) for first in range(0, 333, size)]
        assert torch.equal(torch.cat(parts), all_)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(chains(0, 333), all_)
    finally:
        torch.set_num_threads(threads)
    _C.set_variant("baseline")
    assert torch.equal(chains(0, 333), all_)


def test_chains_write_over_nothing_that_they_read() -> None:
    """Options that are views of x or of the key act as their values before the call; x that is the key is refused."""
    made, constants = mixed()
    code, x = made.encoded(), samples(5)
    options = chain_options(x, 4, False, "bounds", "mask", "target")._replace(
        data_target=x, known=x, chain_ids=torch.tensor([3])
    )
    apart = options._replace(data_target=x.clone(), known=x.clone(), key=options.key.clone())
    expected, energies = one_by_one(x, code, constants, apart, 6)
    found = torch.ops.fastebm.run_lane_chain(x, *code, constants, 6, *options)
    assert torch.equal(x, expected)
    assert torch.equal(found, energies)
    both = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="share memory"):
        torch.ops.fastebm.run_lane_chain(
            both.view(torch.float32).view(1, 6),
            *code,
            constants,
            1,
            *chain_options(samples(1), 4, False)._replace(key=both),
        )


def test_opcheck() -> None:
    made, constants = mixed()
    code = made.encoded()
    torch.library.opcheck(torch.ops.fastebm.run_lanes.default, (samples(5), *code, constants))
    options = chain_options(samples(5), 2, False, *OPTIONS["all"])
    torch.library.opcheck(torch.ops.fastebm.run_lane_chain.default, (samples(5), *code, constants, 2, *options))


def test_wrong_programs_are_refused() -> None:
    if not ops.backends.runs_compiled("run_lanes"):
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
