"""`fastebm::run_chain`: a chain in one call is one update after the other, bit for bit, on the same backend."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import fastebm
from fastebm import Langevin, ops, rng
from fastebm.models import CoarseToFineEnergy
from fastebm.ops import CALL_STEPS, CompiledProgram, advance_chain, prefer_fused_chain
from fastebm.ops.activations import PROGRAM_ACTIVATIONS
from fastebm.ops.instructions import Epilogue, EpilogueOp, Instruction, Kind
from fastebm.ops.options import StepOptions
from tests.ops.small_lowered_programs import ProgramBuilder, normal

SIZES = {torch.float32: 4, torch.bfloat16: 2}
STORE = EpilogueOp.STORE
# Triton's interpreter takes seconds for an update.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
UPDATES = 2 if INTERPRETED else 5


@pytest.fixture(autouse=True)
def products_in_order(monkeypatch):
    """The interpreter's products, input after input, as tensor cores add them: NumPy's bits depend on a row's place."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    def create_dot(self, a, b, sums, *_):
        total = sums.data.copy()
        for column, row in zip(a.data.T.astype(total.dtype), b.data.astype(total.dtype), strict=True):
            total += column[:, None] * row
        return interpreter.TensorHandle(total, sums.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def images(batch: int, sample: tuple[int, ...], device: str = "cpu") -> Tensor:
    return torch.tanh(normal(batch, *sample, seed=5)).float().to(device)


def every_kind(size: int = 4) -> ProgramBuilder:
    """All kinds of instructions on images of size x size, each of which reads what the one before it wrote."""
    making = ProgramBuilder((3, size, size))
    square = {"height": size, "width": size}
    wide, kept = making.buffer((33, size, size)), making.buffer((33, size, size))
    silu = Epilogue(EpilogueOp.ACTIVATE_KEEPING, kept, activation=PROGRAM_ACTIVATIONS.index("silu"))
    bias = Epilogue(EpilogueOp.ADD_CONSTANT, number=making.image(33, 1, 1))
    making.convolution(0, (33, size, size), (3, 3), bias, silu, Epilogue(STORE, wide), pad_y=1, pad_x=1)
    again = making.buffer((33, size, size))
    num_steps = (
        Epilogue(EpilogueOp.MULTIPLY, kept),
        Epilogue(EpilogueOp.SCALE, number=making.number(0.8)),
        Epilogue(STORE, again),
    )
    making.convolution(wide, (33, size, size), (3, 3), *num_steps, pad_y=1, pad_x=1)
    soft = making.stored(Instruction(Kind.SOFTMAX, again, source_channels=33, channels=33, **square))
    one = making.stored(Instruction(Kind.LOG_SUM_EXP, again, source_channels=33, **square))
    window = {"kernel_y": 2, "kernel_x": 2, "stride_y": 2, "stride_x": 2}
    half = {"source_channels": 33, "channels": 33, "height": size // 2, "width": size // 2}
    pooled = making.stored(Instruction(Kind.POOL, soft, **half, **window))
    gather = Instruction(Kind.GATHER, pooled, source_channels=33, channels=33, kernel_y=2, kernel_x=2, **square)
    large = making.stored(gather, Epilogue(EpilogueOp.ADD, one, broadcast=1))
    phased = making.buffer((33, size, size))
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        phase = {"start_y": y, "start_x": x, "step_y": 2, "step_x": 2, "pad_y": 1 - y, "pad_x": 1 - x}
        num_steps = (Epilogue(EpilogueOp.ADD, large), Epilogue(STORE, phased))
        making.convolution(pooled, (33, size // 2, size // 2), (2 - y, 2), *num_steps, **phase)
    return making.finish(phased)


def coarse_to_fine(size: int, dtype: torch.dtype | None) -> Langevin:
    torch.manual_seed(0)
    return Langevin(CoarseToFineEnergy(size, lowest=4, base_width=8), 0.5, 0.01, clamp=(-1, 1), dtype=dtype)


def address(device: str, batch: int, step: int = 3) -> dict[str, Any]:
    return {"key": rng.make_key(7, step, device=device), "chain_ids": rng.make_chain_ids(5, batch, device)}


def options(name: str, x: Tensor, num_steps: int = UPDATES) -> tuple[Any, ...]:
    """Arguments of the operator behind `num_steps`."""
    device, batch = x.device, len(x)
    given: dict[str, Any] = {
        "schedule": torch.tensor([[0.05, 0.02]], device=device),
        **address(str(device), batch),
        **dict.fromkeys(("clamp_min", "clamp_max", "grad_clip", "grad_norm_clip")),
        **dict.fromkeys(("lower_bounds", "upper_bounds", "mask", "known", "data_term", "data_term_weight")),
        "data_term_hinge": 0.0,
    }
    rows = torch.linspace(1.0, 0.0, num_steps, device=device)[:, None] * given["schedule"] + 1e-3
    data_term = {"data_term": 0.3 * x.flip(0), "data_term_weight": torch.linspace(0.5, 0.0, num_steps, device=device)}
    given |= {
        "plain": {},
        "a schedule": {"schedule": rows, "clamp_min": -0.9, "clamp_max": 0.8},
        "a schedule for each chain": {"schedule": rows[:, None].expand(-1, batch, -1).contiguous()},
        "bounds of each channel": {
            "lower_bounds": torch.tensor([-0.2, -0.4, -0.6], device=device).view(3, 1, 1).expand(x.shape),
            "upper_bounds": torch.tensor([0.3, 0.1, 0.2], device=device).view(3, 1, 1).expand(x.shape),
        },
        "no noise": {"schedule": torch.tensor([[0.05, 0.0]], device=device), "grad_clip": 0.1},
        "listed chains": {"chain_ids": torch.arange(batch, device=device).flip(0) * 3},
        "masked": {"mask": x > 0, "known": 0.5 * x},
        "data_term": data_term,
        "norm clip": {"grad_norm_clip": 0.3},
        "data term with a hinge": {**data_term, "data_term_hinge": 0.5},
    }[name]
    return tuple(given.values())


OPTIONS = (
    "plain",
    "a schedule",
    "a schedule for each chain",
    "bounds of each channel",
    "no noise",
    "listed chains",
    "masked",
    "data_term",
    "norm clip",
    "data term with a hinge",
)


def one_by_one(
    x: Tensor, fused: CompiledProgram, num_steps: int, schedule: Tensor, key: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """Energies, state and key by the operators of one update."""
    x, key, energies = x.clone(), key.clone(), []
    for _ in range(num_steps):
        found, gradient = fused(x)
        torch.ops.fastebm.langevin_step_(x, gradient, schedule, key, *rest)
        key += torch.tensor([0, 1, 1], device=key.device)
        energies.append(found)
    return torch.stack(energies), x, key


def in_one(
    x: Tensor, fused: CompiledProgram, num_steps: int, schedule: Tensor, key: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    x, key = x.clone(), key.clone()
    return advance_chain(x, fused, num_steps, schedule, key, *rest), x, key


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for name, ours, theirs in zip(("energies", "state", "key"), found, wanted, strict=True):
        assert ours.isfinite().all()
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(("size", "dtype"), [(4, torch.float32), (8, torch.bfloat16)], ids=str)
def test_is_one_update_after_the_other(backend_device, size, dtype):
    making, device = every_kind(size), backend_device[1]
    batch = 5 if size == 4 else 2  # a block of threads has four images of 4x4, or one of 8x8
    fused, x = making.fused(SIZES[dtype], device), images(batch, making.sample, device)
    given = options("a schedule", x)
    wanted, found = one_by_one(x, fused, UPDATES, *given), in_one(x, fused, UPDATES, *given)
    assert_same(found, wanted)
    assert not torch.equal(wanted[0][0], wanted[0][1])


@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend_device, name):
    making, device = ProgramBuilder((3, 3, 3)).finish(0), backend_device[1]  # 27 numbers: the last quad is not whole
    fused, x = making.fused(4, device), images(3, making.sample, device)
    given = options(name, x)
    assert_same(in_one(x, fused, UPDATES, *given), one_by_one(x, fused, UPDATES, *given))


def test_noise_is_where_normal_draws_it(backend_device):
    """One update of a state of zeros whose gradient counts for nothing: noise_std times the normals of that step."""
    making, device = ProgramBuilder((3, 4, 4)).finish(0), backend_device[1]
    fused, x = making.fused(4, device), torch.zeros(3, 3, 4, 4, device=device)
    given = list(options("plain", x))
    given[0] = torch.tensor([[1e-30, 1.0]], device=device)
    _, state, _ = in_one(x, fused, 1, *given)
    noise = fastebm.ops.normal(x.shape, seed=7, step=3, chain_ids=5, device=device)
    torch.testing.assert_close(state, noise, rtol=1e-6, atol=1e-6)


def test_a_chain_may_be_cut_anywhere(backend_device):
    making, device = ProgramBuilder((3, 4, 4)).finish(0), backend_device[1]
    fused, x = making.fused(4, device), images(2, making.sample, device)
    schedule, key, *rest = options("a schedule", x, 5)
    whole = in_one(x, fused, 5, schedule, key, *rest)
    first = in_one(x, fused, 2, schedule, key, *rest)
    none = in_one(first[1], fused, 0, schedule, first[2], *rest)
    assert none[0].shape == (0, 2)
    second = in_one(none[1], fused, 3, schedule, none[2], *rest)
    assert_same((torch.cat([first[0], second[0]]), *second[1:]), whole)


def test_neither_batch_nor_neighbours_matter(backend_device):
    """A block of threads has several images of this size, the last one fewer."""
    if backend_device[0] == "reference":
        pytest.skip("PyTorch's convolutions sum in another order for another batch")
    making, device = ProgramBuilder((3, 4, 4)).finish(0), backend_device[1]
    fused, x = making.fused(4, device), images(7, making.sample, device)
    schedule, key, chain_ids, *rest = options("plain", x)
    energies, state, _ = in_one(x, fused, 2, schedule, key, chain_ids, *rest)
    for i in (0, 4, 6):
        alone = in_one(x[i : i + 1], fused, 2, schedule, key, chain_ids + i, *rest)
        assert torch.equal(alone[1], state[i : i + 1])
        assert torch.equal(alone[0], energies[:, i : i + 1])


def test_float64(backend_device):
    if backend_device[0] == "triton":
        pytest.skip("Triton has no float64")
    making, device = every_kind(), backend_device[1]
    x = images(3, making.sample, device).double()
    with ops.backend("reference"):
        exact = making.fused(8, device)
    given = options("a schedule", x)
    wanted = one_by_one(x, exact, UPDATES, *given)
    assert_same(in_one(x, exact, UPDATES, *given), wanted)
    rounded = in_one(x.float(), making.fused(4, device), UPDATES, *given)
    assert (rounded[1] - wanted[1]).abs().max() < 1e-5
    assert (rounded[0] - wanted[0]).abs().max() < 1e-4


def test_no_images(backend_device):
    making, device = ProgramBuilder((3, 4, 4)).finish(0), backend_device[1]
    fused, x = making.fused(4, device), torch.zeros(0, 3, 4, 4, device=device)
    energies, state, key = in_one(x, fused, 3, *options("plain", x))
    assert energies.shape == (3, 0)
    assert state.shape == x.shape
    assert key.tolist() == [7, 6, 3]


def test_sides_may_share_memory_with_the_state(backend_device):
    making, device = ProgramBuilder((3, 4, 4)).finish(0), backend_device[1]
    fused, x = making.fused(4, device), images(2, making.sample, device)
    given = dict(zip(StepOptions._fields, options("data_term", x), strict=True))
    apart = in_one(x, fused, 3, *(given | {"data_target": x.clone()}).values())
    state, key = x.clone(), given["key"].clone()
    advance_chain(state, fused, 3, *(given | {"key": key, "data_target": state}).values())
    assert torch.equal(state, apart[1])
    # Tables that lie in the state or the key are those of before the first update.
    state = x.clone()
    state.view(-1)[:2] = torch.tensor([0.05, 0.02], device=device)
    for inside in (
        lambda x, key: {"key": key, "schedule": x.view(-1)[:2].view(1, 2)},
        lambda x, key: {"key": key, "chain_ids": key[1:2]},
    ):
        start, key = state.clone(), given["key"].clone()
        tables = {name: table.clone() for name, table in inside(start, key).items()}
        wanted = in_one(start, fused, 3, *(given | tables).values())
        advance_chain(start, fused, 3, *(given | inside(start, key)).values())
        assert torch.equal(start, wanted[1])
    with pytest.raises(ValueError, match="x and key are both written in place, but share memory"):
        advance_chain(state, fused, 1, *(given | {"key": state.view(torch.int64).flatten()[:3]}).values())


# In samplers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [4, 8])
def test_samplers_run_the_same_chains(monkeypatch, dtype, size):
    monkeypatch.setattr("fastebm.compiler.candidates.LARGE_IMAGE", 0)  # no lane programs, which take longer calls
    sampler, x = coarse_to_fine(size, dtype), images(3, (3, size, size))
    calls = []
    monkeypatch.setattr(
        "fastebm.sampling.langevin.advance_chain", lambda *a, **k: (calls.append(a[2]), advance_chain(*a, **k))[1]
    )
    told = []
    late = lambda done, x, energies: told.append((done, energies.clone()))  # noqa: E731
    late.reads_states = False
    num_steps = 2 * CALL_STEPS + 4
    ends, energies = [], []
    with ops.backend("cpp" if ops.backends._extension else "reference"):
        for allowed in (True, False):
            monkeypatch.setattr(
                "fastebm.ops.chain.prefer_fused_chain", lambda x, a=allowed: a and prefer_fused_chain(x)
            )
            told.clear()
            state = sampler.init(x, seed=3, num_steps=num_steps)
            ends.append(sampler.advance_(state, num_steps, (late,)))
            assert [done for done, _ in told] == list(range(1, num_steps + 1))
            energies.append(torch.stack([e for _, e in told]))
    assert calls == ([CALL_STEPS, CALL_STEPS, 3] if ops.backends._extension else [])
    assert torch.equal(ends[0].x, ends[1].x)
    assert torch.equal(ends[0].key, ends[1].key)
    assert torch.equal(*energies)


def test_what_runs_in_one_call():
    small = torch.zeros(2, 3, 8, 8)
    cpp = ops.backends._extension is not None
    with ops.backend("reference"):
        assert not prefer_fused_chain(small)
    with ops.backend("cpp" if cpp else "reference"):
        assert prefer_fused_chain(small) == cpp
        assert prefer_fused_chain(torch.zeros(2, 3, 16, 16)) == cpp
        assert prefer_fused_chain(torch.zeros(2)) == prefer_fused_chain(torch.zeros(2, 500)) == cpp
        assert not prefer_fused_chain(torch.zeros(2, 3, 32, 32))
        assert not prefer_fused_chain(small.double())
        assert not prefer_fused_chain(small.transpose(2, 3))


def test_lost_chains_are_found(backend_device):
    if backend_device != ("cpp", "cpu"):
        pytest.skip("samplers run chains in one call in C++ alone")
    sampler = Langevin(lambda x: -x.square().sum((1, 2, 3)), 1e6, 0.0)
    with pytest.raises(FloatingPointError, match="not finite"):
        sampler.sample(images(2, (3, 4, 4)), 40, seed=3)


# The operator -------------------------------------------------------------------------------------------------------


def arguments(device: str, name: str = "masked") -> tuple[Any, ...]:
    making = ProgramBuilder((3, 4, 5)).finish(0)
    fused, x = making.fused(4, device), images(2, making.sample, device)
    return x, fused.code(2), fused.constants, fused.workspace, 2, *options(name, x)


def test_opcheck(backend_device):
    # The workspace is scratch, as in run_program.
    tests = ("test_autograd_registration", "test_faketensor", "test_schema")
    for name in ("plain", "masked", "data_term"):
        given = arguments(backend_device[1], name)
        torch.library.opcheck(torch.ops.fastebm.run_chain.default, given, test_utils=tests)


def test_errors(backend_device):
    x, code, constants, workspace, num_steps, schedule, key, chain_ids, *rest = arguments(backend_device[1])
    run = torch.ops.fastebm.run_chain
    rest = [schedule, key, chain_ids, *rest]
    with pytest.raises(RuntimeError, match="run_chain has no derivative"):
        run(x.clone().requires_grad_(), code, constants, workspace, num_steps, *rest)
    with pytest.raises(ValueError, match="steps must not be negative, got -1"):
        run(x, code, constants, workspace, -1, *rest)
    with pytest.raises(ValueError, match="x is written in place and must be contiguous"):
        run(x.transpose(2, 3), code, constants, workspace, num_steps, *rest[:9], None, None, *rest[11:])
    with pytest.raises(TypeError, match="x must be float32"):
        run(x.half(), code, constants, workspace, num_steps, *rest)
    with pytest.raises(ValueError, match="code must be an int64 vector"):
        run(x, code.int(), constants, workspace, num_steps, *rest)
    with pytest.raises(ValueError, match="mask and known go together"):
        run(x, code, constants, workspace, num_steps, *rest[:10], None, *rest[11:])
    late = rng.make_key(7, 2**32 - 1, device=x.device)
    if x.device.type == "cpu":
        with pytest.raises((ValueError, RuntimeError), match=r"overflow|outside"):
            run(x, code, constants, workspace, num_steps, schedule, late, *rest[2:])
