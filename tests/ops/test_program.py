"""`fastebm::run_program`: every instruction and every operation of an epilogue, against the reference in float64."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastebm import ops
from fastebm.compiler.capture import capture
from fastebm.compiler.cost_model import Machine
from fastebm.compiler.lowering import lower
from fastebm.compiler.rewrites import WITHOUT_POLYPHASE, build_gradient_program
from fastebm.models import CoarseToFineEnergy
from fastebm.ops import CompiledProgram
from fastebm.ops.activations import ACTIVATION_TABLE, PROGRAM_ACTIVATIONS
from fastebm.ops.backends import _extension as _C
from fastebm.ops.instructions import (
    BUFFER_FIELDS,
    EPILOGUE_FIELDS,
    HEADER,
    INSTRUCTION_FIELDS,
    Epilogue,
    EpilogueOp,
    Instruction,
    Kind,
    Layout,
    decode,
    encode,
)
from fastebm.ops.program import DENSE, pack_convolution, plan_batch, unpack_convolution
from tests.compiler.networks import Decoder, ResidualNet
from tests.ops.agreement import truncates
from tests.ops.precision import relative_error
from tests.ops.small_lowered_programs import ProgramBuilder, normal

STORE = EpilogueOp.STORE
SIZES = {torch.float32: 4, torch.bfloat16: 2}
both_dtypes = pytest.mark.parametrize("dtype", SIZES, ids=str)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def images(batch: int, sample: tuple[int, ...], seed: int = 5) -> Tensor:
    return torch.tanh(normal(batch, *sample, seed=seed)).float()


def limit(backend_device: tuple[str, str], dtype: torch.dtype, rounded: Tensor, truth: Tensor) -> float:
    """How far off a result may be: in float32 1e-5, in bfloat16 twice as far as the reference that rounds likewise."""
    if dtype == torch.float32:
        return 1e-5
    # Triton's interpreter truncates where a GPU rounds: every number loses up to 2^-7, and sums don't make up for it.
    spare = 4 * 2.0**-7 if truncates(backend_device, dtype) else 4e-3
    return 2 * relative_error(rounded, truth) + spare


def assert_right(making: ProgramBuilder, backend_device: tuple[str, str], dtype: torch.dtype, batch: int = 3) -> None:
    """Energies and gradient are within `limit` of the reference in float64."""
    x = images(batch, making.sample)
    with ops.backend("reference"):
        truth = making.fused(8, "cpu")(x.double())
        rounded = making.fused(SIZES[dtype], "cpu")(x)
    found = making.fused(SIZES[dtype], backend_device[1])(x.to(backend_device[1]))
    for actual, wanted, rough in zip(found, truth, rounded, strict=True):
        assert actual.dtype == torch.float32
        assert actual.shape == wanted.shape
        assert wanted.norm() > 0
        assert relative_error(actual.cpu(), wanted) < limit(backend_device, dtype, rough, wanted)


# Instructions -------------------------------------------------------------------------------------------------------

# inputs, outputs, (height, width), kernel, stride, padding, dilation
CONVOLUTIONS = [
    (1, 3, (5, 7), (3, 3), 1, 1, 1),
    (3, 16, (8, 8), (3, 3), 1, 1, 1),
    (4, 33, (6, 5), (4, 4), 2, 1, 1),
    (4, 64, (9, 17), (5, 3), 1, 2, 1),
    (5, 4, (7, 6), (3, 5), 1, 2, 1),
    (3, 5, (9, 9), (5, 5), 3, 2, 1),
    (3, 17, (12, 11), (3, 3), 1, 2, 2),
    (16, 17, (5, 5), (3, 3), 2, 1, 1),
    (17, 16, (9, 4), (3, 3), 1, 2, 2),
    (33, 64, (4, 4), (2, 2), 1, 0, 1),
    (64, 5, (3, 3), (3, 3), 1, 1, 1),
    (64, 33, (1, 1), (1, 1), 1, 0, 1),
    (33, 1, (1, 1), (3, 3), 1, 1, 1),
    (40, 70, (17, 16), (3, 3), 1, 1, 1),
    (33, 1, (20, 13), (5, 5), 1, 4, 2),
    (70, 3, (16, 17), (3, 3), 1, 1, 1),
]


@both_dtypes
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolution(backend_device, dtype, case):
    inputs, outputs, size, kernel, stride, pad, dilation = case
    making = ProgramBuilder((inputs, *size))
    grid = [(n + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(size, kernel, strict=True)]
    target = making.buffer((outputs, *grid))
    bias = Epilogue(EpilogueOp.ADD_CONSTANT, number=making.image(outputs, 1, 1))
    fields = {f"{name}_{axis}": value for name, value in (("stride", stride), ("pad", pad)) for axis in "yx"}
    fields |= {"dilation_y": dilation, "dilation_x": dilation}
    making.convolution(0, (outputs, *grid), kernel, bias, Epilogue(STORE, target), **fields)
    assert_right(making.finish(target), backend_device, dtype)


def test_a_lost_image_leaves_those_beside_it_alone(backend_device):
    """Taps that are shifted reach over images that lie one behind the other."""
    if backend_device[0] != "triton":
        pytest.skip("only Triton's kernels shift them")
    making = ProgramBuilder((33, 16, 17))
    target = making.buffer((1, 16, 17))
    making.convolution(0, (1, 16, 17), (5, 5), Epilogue(STORE, target), pad_y=2, pad_x=2)
    fused, x = making.finish(target).fused(4, backend_device[1]), images(3, (33, 16, 17)).to(backend_device[1])
    expected, lost = fused(x), x.clone()
    lost[1] = torch.nan
    for found, wanted in zip(fused(lost), expected, strict=True):
        assert torch.equal(found[::2], wanted[::2])
        assert found[1].isnan().any()


# inputs, outputs, (height, width) of the source
PHASES = [(4, 5, (5, 3)), (33, 40, (5, 3)), (40, 70, (9, 9))]


def phases(inputs: int, outputs: int, size: tuple[int, int]) -> ProgramBuilder:
    """A transposed convolution to twice as many columns and one row less, its phases with other taps and grids."""
    making, (height, width) = ProgramBuilder((inputs, *size)), (2 * size[0] - 1, 2 * size[1])
    target = making.buffer((outputs, height, width))
    for row, column in itertools.product((0, 1), (0, 1)):
        grid = (outputs, -(-(height - row) // 2), -(-(width - column) // 2))
        phase = {"start_y": row, "start_x": column, "step_y": 2, "step_x": 2, "pad_y": 1 - row, "pad_x": 1}
        making.convolution(0, grid, (2, 1 + column), Epilogue(STORE, target), **phase)
    return making.finish(target)


@both_dtypes
@pytest.mark.parametrize("case", PHASES, ids=str)
def test_phases_of_a_transposed_convolution(backend_device, dtype, case):
    assert_right(phases(*case), backend_device, dtype)


@both_dtypes
@pytest.mark.parametrize("case", PHASES, ids=str)
def test_phases_of_one_launch_have_the_bits_of_their_own(backend_device, dtype, case, monkeypatch):
    if backend_device[0] != "triton":
        pytest.skip("other backends compute one phase after the other")
    from fastebm.ops.triton import program

    monkeypatch.setattr(program, "calls_of", program.calls_of.__wrapped__)
    fused, x = phases(*case).fused(SIZES[dtype], backend_device[1]), images(3, (case[0], *case[2]))
    x = x.to(backend_device[1])
    together = fused(x)
    code, facts = fused.code(3).numpy().tobytes(), program.facts_of(x, fused.constants)
    assert [call.shape.phases for call in program.calls_of(code, facts)[1]] == [1, 4, 1, 1, 1]
    monkeypatch.setattr(program, "PHASES", 1)
    assert [call.shape.phases for call in program.calls_of(code, facts)[1]] == [1] * 8
    assert all(map(torch.equal, together, fused(x)))


@pytest.mark.parametrize("second", ["a phase", "the same pixels", "another step", "more", "taps side by side"])
def test_one_launch_only_for_what_does_not_wait_for_the_other(second):
    pytest.importorskip("triton")
    from fastebm.ops.triton.program import Facts, calls_of

    beside = second == "taps side by side"
    size, channels, taps = (16, 1, 3) if beside else (4, 33, 1)
    making, grid, pad = (
        ProgramBuilder((33, size, size)),
        (channels, size, size),
        {"pad_y": taps // 2, "pad_x": taps // 2},
    )
    twice = gather(channels, 2 * size, 2 * size, kernel_y=2, kernel_x=2)
    target, other = (making.stored(twice) for _ in range(2))
    steps, more = [Epilogue(STORE, target)], []
    making.convolution(0, grid, (taps, taps), *steps, step_y=2, step_x=2, **pad)
    place = {"start_x": 1, "step_y": 2, "step_x": 2}
    place |= {"the same pixels": {"start_x": 0}, "another step": {"step_y": 1}}.get(second, {})
    if second == "more":
        more = [Epilogue(STORE, other)]
    making.convolution(0, grid, (taps, taps), *steps, *more, **place, **pad)
    with ops.backend("reference"):  # whose weights lie as a GPU reads them
        made = making.finish(other).fused(4, "cpu")
    code = encode(plan_batch(made.lowered, Layout.PLAIN, 0, 3, 1, "cuda")).numpy().tobytes()
    facts = Facts((33, size, size), tuple((t.dtype, tuple(t.shape)) for t in made.constants))
    calls = calls_of(code, facts)[1]
    assert max(call.shape.phases for call in calls) == (2 if second == "a phase" else 1)
    assert any(call.shape.paired for call in calls) == beside


@both_dtypes
def test_convolution_of_some_channels(backend_device, dtype):
    making = ProgramBuilder((40, 4, 5))
    target = making.buffer((12, 4, 5))
    making.convolution(0, (12, 4, 5), (1, 1), Epilogue(STORE, target), source_channels=20, source_channel=16)
    assert_right(making.finish(target), backend_device, dtype)


def gather(channels: int, height: int, width: int, **fields: int) -> Instruction:
    given = {"source_channels": channels, "channels": channels, "height": height, "width": width, **fields}
    return Instruction(Kind.GATHER, **{"source": 0, **given})


def ones_beside(making: ProgramBuilder) -> int:
    """x with a channel of ones, and behind it another."""
    channels, height, width = making.sample
    target = making.buffer((channels + 2, height, width))
    size = {"height": height, "width": width}
    load = Instruction(Kind.LOAD, source_channels=channels, channels=channels + 1, constant=1, **size)
    making.add(load, Epilogue(STORE, target))
    making.add(Instruction(Kind.LOAD, constant=1, **size), Epilogue(STORE, target, channel=channels + 1))
    return target


def pooled(making: ProgramBuilder) -> int:
    size = {"channels": 5, "source_channels": 5, "height": 4, "width": 3}
    window = {"kernel_y": 3, "kernel_x": 2, "stride_y": 2, "stride_x": 2, "pad_y": 1, "pad_x": 0}
    return making.stored(Instruction(Kind.POOL, 0, **size, **window))


def summed(making: ProgramBuilder) -> int:
    return making.stored(Instruction(Kind.POOL, 0, source_channels=5, channels=5, kernel_y=7, kernel_x=6))


PLAIN_KINDS: dict[str, Callable[[ProgramBuilder], int]] = {
    "load with ones": ones_beside,
    "gather": lambda m: m.stored(gather(5, 7, 6)),
    "gather some channels": lambda m: m.stored(gather(2, 7, 6, source_channel=2)),
    "gather a part": lambda m: m.stored(gather(5, 4, 3, pad_y=-2, pad_x=-1)),
    "gather larger pixels": lambda m: m.stored(gather(5, 14, 18, kernel_y=2, kernel_x=3)),
    "gather with a border of zeros": lambda m: m.stored(gather(5, 10, 9, pad_y=1, pad_x=2)),
    "gather with a filled border": lambda m: m.stored(gather(5, 10, 9, pad_y=2, pad_x=1, constant=m.number(0.7))),
    "gather one channel for all": lambda m: m.stored(gather(9, 7, 6, source_channels=1, source_channel=3, broadcast=1)),
    "pool": pooled,
    "sum": summed,
    "first maximum": lambda m: m.stored(
        Instruction(Kind.FIRST_MAXIMUM, 0, source_channels=5, channels=5, height=7, width=6, kernel_y=2, kernel_x=2)
    ),
    "first maximum of equals": lambda m: m.stored(
        Instruction(
            Kind.FIRST_MAXIMUM,
            m.stored(
                gather(40, 7, 6, source_channels=1, broadcast=1),
                Epilogue(EpilogueOp.ACTIVATE, activation=PROGRAM_ACTIVATIONS.index("relu")),
            ),
            source_channels=33,
            source_channel=4,
            channels=33,
            height=7,
            width=6,
            kernel_y=3,
            kernel_x=2,
        )
    ),
    "softmax": lambda m: m.stored(Instruction(Kind.SOFTMAX, 0, source_channels=5, channels=5, height=7, width=6)),
    "log_sum_exp": lambda m: m.stored(Instruction(Kind.LOG_SUM_EXP, 0, source_channels=5, height=7, width=6)),
}


@both_dtypes
@pytest.mark.parametrize("name", PLAIN_KINDS)
def test_other_kinds(backend_device, dtype, name):
    making = ProgramBuilder((5, 7, 6))
    assert_right(making.finish(PLAIN_KINDS[name](making)), backend_device, dtype)


@both_dtypes
def test_softmax_of_many_channels_and_sizes(backend_device, dtype):
    making = ProgramBuilder((100, 2, 1))
    scaled = making.stored(gather(100, 2, 1), Epilogue(EpilogueOp.SCALE, number=making.number(30.0)))
    size = {"source_channels": 100, "height": 2, "width": 1}
    both = making.buffer((101, 2, 1))
    making.add(Instruction(Kind.SOFTMAX, scaled, channels=100, **size), Epilogue(STORE, both))
    making.add(Instruction(Kind.LOG_SUM_EXP, scaled, **size), Epilogue(STORE, both, channel=100))
    assert_right(making.finish(both), backend_device, dtype)


# Epilogues ----------------------------------------------------------------------------------------------------------

VALUES = {
    "elu": (0.7, 1.3, 0.9),
    "leaky_relu": (0.2, 0.0, 0.0),
    "softplus": (1.5, 2.0, 0.0),
    "hardtanh": (-1.2, 3.0, 0.0),
}
POSITIVE = ("sqrt", "rsqrt", "reciprocal")


def parameters(making: ProgramBuilder, kind: str) -> int:
    row = ACTIVATION_TABLE[PROGRAM_ACTIVATIONS.index(kind)]
    return making.number(*VALUES[kind]) if row.num_parameters else -1


@both_dtypes
@pytest.mark.parametrize("kind", PROGRAM_ACTIVATIONS)
def test_activations(backend_device, dtype, kind):
    """The value, the derivative kept and the derivative worked out again, side by side."""
    making, number = ProgramBuilder((19, 3, 5)), PROGRAM_ACTIVATIONS.index(kind)
    at, wide = parameters(making, kind), Epilogue(EpilogueOp.SCALE, number=making.number(4.0))
    both, kept = making.buffer((57, 3, 5)), making.buffer((19, 3, 5))
    exp = Epilogue(EpilogueOp.ACTIVATE, activation=PROGRAM_ACTIVATIONS.index("exp"))
    scaled = making.stored(gather(19, 3, 5), exp if kind in POSITIVE else wide)
    making.add(
        gather(19, 3, 5, source=scaled),
        Epilogue(EpilogueOp.ACTIVATE, activation=number, number=at),
        Epilogue(STORE, both),
    )
    keeping = Epilogue(EpilogueOp.ACTIVATE_KEEPING, kept, activation=number, number=at)
    making.add(
        gather(19, 3, 5, source=scaled), keeping, Epilogue(EpilogueOp.MULTIPLY, kept), Epilogue(STORE, both, channel=19)
    )
    again = Epilogue(EpilogueOp.SLOPE, scaled, activation=number, number=at)
    making.add(gather(19, 3, 5), again, Epilogue(STORE, both, channel=38))
    assert_right(making.finish(both), backend_device, dtype)


@both_dtypes
@pytest.mark.parametrize("kind", [row.name for row in ACTIVATION_TABLE if row.backward_of_result])
def test_slope_of_a_result(backend_device, dtype, kind):
    making, number = ProgramBuilder((6, 3, 5)), PROGRAM_ACTIVATIONS.index(kind)
    at = parameters(making, kind)
    exp = Epilogue(EpilogueOp.ACTIVATE, activation=PROGRAM_ACTIVATIONS.index("exp"))
    before = (exp,) if kind in POSITIVE else ()
    result = making.stored(gather(6, 3, 5), *before, Epilogue(EpilogueOp.ACTIVATE, activation=number, number=at))
    slope = Epilogue(EpilogueOp.SLOPE, result, activation=number, number=at, of_result=1)
    assert_right(making.finish(making.stored(gather(6, 3, 5), slope)), backend_device, dtype)


def operands(making: ProgramBuilder) -> dict[str, tuple[Epilogue, ...]]:
    half = making.stored(gather(6, 4, 3))
    column = making.stored(gather(6, 1, 1))
    one = making.stored(Instruction(Kind.LOG_SUM_EXP, 0, source_channels=6, height=7, width=5))
    factor = making.number(-0.7)
    larger = {"factor_y": 2, "factor_x": 2}
    return {
        "add": (Epilogue(EpilogueOp.ADD, 0),),
        "add with a factor": (Epilogue(EpilogueOp.ADD, 0, number=factor),),
        "add of larger pixels": (Epilogue(EpilogueOp.ADD, half, number=factor, **larger),),
        "add one channel for all": (Epilogue(EpilogueOp.ADD, one, number=factor, broadcast=1),),
        "add one pixel for all": (Epilogue(EpilogueOp.ADD, column, factor_y=7, factor_x=5),),
        "multiply": (Epilogue(EpilogueOp.MULTIPLY, 0),),
        "multiply by larger pixels": (Epilogue(EpilogueOp.MULTIPLY, half, **larger),),
        "multiply one channel for all": (Epilogue(EpilogueOp.MULTIPLY, one, broadcast=1),),
        "scale": (Epilogue(EpilogueOp.SCALE, number=factor),),
        "an image": (Epilogue(EpilogueOp.ADD_CONSTANT, number=making.image(6, 7, 5)),),
        "by an image": (Epilogue(EpilogueOp.MULTIPLY_CONSTANT, number=making.image(6, 7, 5)),),
        "by channels": (Epilogue(EpilogueOp.MULTIPLY_CONSTANT, number=making.image(6, 1, 1)),),
        "rows": (Epilogue(EpilogueOp.ADD_CONSTANT, number=making.image(6, 7, 1)),),
        "columns": (Epilogue(EpilogueOp.ADD_CONSTANT, number=making.image(6, 1, 5)),),
    }


@both_dtypes
@pytest.mark.parametrize("name", operands(ProgramBuilder((6, 7, 5))))
def test_operands(backend_device, dtype, name):
    making = ProgramBuilder((6, 7, 5))
    num_steps = operands(making)[name]
    assert_right(making.finish(making.stored(gather(6, 7, 5), *num_steps)), backend_device, dtype)


@both_dtypes
def test_everything_behind_phases(backend_device, dtype):
    """Operands are read and written at start + step * (y, x), constants as well."""
    making = ProgramBuilder((5, 6, 8))
    half, target = making.stored(gather(5, 3, 4)), making.buffer((5, 6, 8))
    kept = making.buffer((5, 6, 8))
    num_steps = (
        Epilogue(EpilogueOp.ADD_CONSTANT, number=making.image(5, 6, 8)),
        Epilogue(EpilogueOp.ACTIVATE_KEEPING, kept),
        Epilogue(EpilogueOp.ADD, half, factor_y=2, factor_x=2),
        Epilogue(EpilogueOp.MULTIPLY, kept),
        Epilogue(EpilogueOp.SLOPE, 0, activation=PROGRAM_ACTIVATIONS.index("gelu")),
        Epilogue(STORE, target),
    )
    for row, column in itertools.product((0, 1), (0, 1)):
        phase = {"start_y": row, "start_x": column, "step_y": 2, "step_x": 2}
        making.convolution(0, (5, 3, 4), (3, 3), *num_steps, pad_y=1, pad_x=1, **phase)
    assert_right(making.finish(target), backend_device, dtype)


def beside(axis: str) -> tuple[int, Instruction, Instruction]:
    """How much larger the whole is along one axis, and two copies that fill it."""
    height, width = (3, 6) if axis == "y" else (7, 2)
    part = gather(5, height, width, **{f"pad_{axis}": -1})
    moved = {"start_y": height} if axis == "y" else {"start_x": width}
    return (height if axis == "y" else width), part, gather(5, 7, 6, **moved)


@both_dtypes
@pytest.mark.parametrize("axis", ["y", "x"])
def test_images_side_by_side(backend_device, dtype, axis):
    making = ProgramBuilder((5, 7, 6))
    more, *copies = beside(axis)
    whole = (5, 7 + more, 6) if axis == "y" else (5, 7, 6 + more)
    target, constant = making.buffer(whole), making.image(*whole)
    for copy in copies:
        making.add(copy, Epilogue(EpilogueOp.ADD_CONSTANT, number=constant), Epilogue(STORE, target))
    assert_right(making.finish(target), backend_device, dtype)


@both_dtypes
def test_a_gradient_written_by_phases(backend_device, dtype):
    making = ProgramBuilder((3, 5, 4)).finish(0)
    making.instructions.pop()
    for row, column in itertools.product((0, 1), (0, 1)):
        phase = {"start_y": row, "start_x": column, "step_y": 2, "step_x": 2, "pad_y": 1, "pad_x": 1}
        grid = (3, 3 - row, 2)
        making.convolution(0, grid, (3, 3), Epilogue(EpilogueOp.STORE_GRADIENT), **phase)
    assert_right(making, backend_device, dtype)


@pytest.mark.parametrize("batch", [1, 17])
def test_batches(backend_device, batch):
    making = ProgramBuilder((5, 7, 6))
    assert_right(making.finish(pooled(making)), backend_device, torch.float32, batch)


def test_no_images(backend_device):
    energies, gradient = (
        ProgramBuilder((3, 4, 4))
        .finish(0)
        .fused(4, backend_device[1])(torch.zeros(0, 3, 4, 4, device=backend_device[1]))
    )
    assert energies.shape == (0,)
    assert gradient.shape == (0, 3, 4, 4)


# Whole gradients ----------------------------------------------------------------------------------------------------


def of_net(net: nn.Module, x: Tensor, dtype: torch.dtype, device: str) -> CompiledProgram:
    """The fused program of a net's energy and gradient, as `fastebm.compiler` lowers it."""
    machine = replace(Machine.of(torch.device("cpu"), dtype), strided_adjoint=1.0)
    with torch.no_grad():
        found = lower(build_gradient_program(capture(net, net, x), machine, WITHOUT_POLYPHASE), SIZES[dtype])
        numbers, values = found.constants()
        fused = CompiledProgram(found.program, torch.device(device))
        fused.refresh(numbers, [value.to(device) for value in values])
    return fused


def coarse_to_fine() -> tuple[nn.Module, tuple[int, ...]]:
    return CoarseToFineEnergy(16, base_width=8), (3, 16, 16)


def decoded() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(Decoder(width=4), ResidualNet(4)), (6,)


NETS = {"coarse to fine": coarse_to_fine, "a vector decoded": decoded}


def made(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    net, sample = NETS[name]()
    return net.eval().requires_grad_(False), sample


@both_dtypes
@pytest.mark.parametrize("name", NETS)
def test_nets(backend_device, dtype, name):
    net, sample = made(name)
    x = images(3, sample)
    with ops.backend("reference"):
        program = of_net(net, x, dtype, "cpu")
        y = x.double().requires_grad_()
        energies = net.double()(y).flatten()
        truth = (energies.detach(), torch.autograd.grad(energies.sum(), y)[0])
        rounded = program(x)
        net.float()
    found = of_net(net, x, dtype, backend_device[1])(x.to(backend_device[1]))
    for actual, wanted, rough in zip(found, truth, rounded, strict=True):
        assert relative_error(actual.cpu(), wanted) < limit(backend_device, dtype, rough, wanted)


def test_new_constants_take_the_places_of_the_old(backend_device):
    """As a chain in a captured graph needs it; results are those of the new ones."""
    making = ProgramBuilder((5, 7, 6))
    num_steps = (Epilogue(EpilogueOp.SCALE, number=making.number(2.0)), Epilogue(EpilogueOp.ACTIVATE))
    making.finish(making.stored(gather(5, 7, 6), *num_steps))
    fused, x = making.fused(4, backend_device[1]), images(2, making.sample).to(backend_device[1])
    first, places = fused(x), [constant.data_ptr() for constant in fused.constants]
    making.numbers[0] = -3.0
    fused.refresh(making.numbers, [2 * value.to(x.device) for value in making.values])
    assert [constant.data_ptr() for constant in fused.constants] == places
    second = fused(x)
    making.values = [2 * value for value in making.values]
    for actual, wanted, before in zip(second, making.fused(4, backend_device[1])(x), first, strict=True):
        assert torch.equal(actual, wanted)
        assert not torch.allclose(actual, before)


# The same bits ------------------------------------------------------------------------------------------------------

VARIANTS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")


@pytest.fixture(params=VARIANTS)
def variant(request):
    """One of the C++ backend's instruction sets, for the length of a test."""
    if _C is None:
        pytest.skip("fastebm's C++ operators are not built")
    before = _C.active_variant()
    try:
        _C.set_variant(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    with ops.backend("cpp"):
        yield request.param
    _C.set_variant(before)


@both_dtypes
@pytest.mark.parametrize("name", NETS)
def test_neither_batch_nor_threads_matter_in_cpp(variant, dtype, name):
    net, sample = made(name)
    x = images(65, sample)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        fused = of_net(net, x[:3], dtype, "cpu")
        expected = fused(x)
        assert all(part.isfinite().all() for part in expected)
        for threads, batch in itertools.product((1, 2), (1, 3, 16, 64, 65)):
            torch.set_num_threads(threads)
            parts = [fused(part) for part in x[: max(batch, 4)].split(batch)]
            for found, wanted in zip(map(torch.cat, zip(*parts, strict=True)), expected, strict=True):
                assert torch.equal(found, wanted[: len(found)]), f"{threads} threads, batches of {batch}"
    finally:
        torch.set_num_threads(before)


@both_dtypes
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_every_variant_in_cpp(variant, dtype, case):
    test_convolution(("cpp", "cpu"), dtype, case)


# inputs, outputs, (height, width), kernel, stride, (pad_y, pad_x), dilation
UNEVEN = [
    (4, 3, (6, 15), (2, 1), 1, (0, 3), 1),
    (4, 3, (3, 15), (1, 1), 1, (4, 9), 1),
    (1, 5, (2, 4), (1, 8), 1, (0, 9), 1),
    (2, 3, (5, 40), (3, 2), 3, (1, 5), 1),
    (3, 40, (4, 6), (1, 3), 5, (2, 7), 1),
    (5, 4, (6, 15), (2, 1), 1, (0, 3), 1),
    (20, 33, (4, 5), (3, 1), 1, (1, 2), 2),
    (33, 17, (3, 16), (1, 3), 2, (0, 5), 3),
    (48, 12, (2, 33), (1, 3), 1, (1, 1), 1),
    # All taps of these are one panel of `Layout.PAIRS`, in one tile or several; some pixels see zeros alone.
    (40, 3, (33, 34), (3, 3), 1, (1, 1), 1),
    (5, 1, (7, 140), (5, 5), 1, (2, 2), 1),
    (18, 2, (130, 9), (1, 3), 1, (0, 4), 7),
    (2, 10, (6, 5), (1, 3), 1, (3, 2), 1),
    (9, 16, (4, 4), (2, 1), 1, (2, 3), 5),
]


def uneven(case: tuple) -> ProgramBuilder:
    inputs, outputs, size, kernel, stride, pad, dilation = case
    making = ProgramBuilder((inputs, *size))
    grid = [(n + 2 * p - dilation * (k - 1) - 1) // stride + 1 for n, k, p in zip(size, kernel, pad, strict=True)]
    target = making.buffer((outputs, *grid))
    fields = {"pad_y": pad[0], "pad_x": pad[1], "stride_y": stride, "stride_x": stride}
    fields |= {"dilation_y": dilation, "dilation_x": dilation}
    making.convolution(0, (outputs, *grid), kernel, Epilogue(EpilogueOp.ACTIVATE), Epilogue(STORE, target), **fields)
    return making.finish(target)


def of_some_channels(first: int, count: int, channels: int) -> ProgramBuilder:
    """A convolution of some channels, behind which others lie, or nothing of this image."""
    making = ProgramBuilder((channels, 3, 5))
    target = making.buffer((7, 3, 5))
    making.convolution(0, (7, 3, 5), (1, 1), Epilogue(STORE, target), source_channels=count, source_channel=first)
    return making.finish(target)


def beside_and_filled() -> ProgramBuilder:
    """Channels written in two parts, the second of which ends short of the filling, and a kept slope that is read."""
    making = ProgramBuilder((5, 7, 6))
    both, kept = making.buffer((33, 7, 6)), making.buffer((3, 7, 6))
    making.add(gather(5, 7, 6), Epilogue(STORE, both))
    making.convolution(0, (28, 7, 6), (3, 3), Epilogue(STORE, both, channel=5), pad_y=1, pad_x=1)
    making.convolution(both, (3, 7, 6), (1, 1), Epilogue(EpilogueOp.ACTIVATE_KEEPING, kept))
    target = making.buffer((6, 7, 6))
    making.convolution(kept, (6, 7, 6), (3, 3), Epilogue(STORE, target), pad_y=1, pad_x=1)
    return making.finish(target)


def exponentials() -> ProgramBuilder:
    """Filling that an exponential makes infinite where each channel is small: -100 + 100, against 0 + 100."""
    making = ProgramBuilder((3, 4, 5))
    low = making.stored(gather(3, 4, 5), Epilogue(EpilogueOp.ADD_CONSTANT, number=making.image(3, 1, 1)))
    making.values[-1].fill_(-100.0)
    high = making.stored(
        Instruction(Kind.LOAD, height=4, width=5), Epilogue(EpilogueOp.SCALE, number=making.number(100.0))
    )
    exp = Epilogue(EpilogueOp.ACTIVATE, activation=PROGRAM_ACTIVATIONS.index("exp"))
    return making.finish(making.stored(gather(3, 4, 5, source=low), Epilogue(EpilogueOp.ADD, high, broadcast=1), exp))


LEFTOVERS: dict[str, Callable[[], ProgramBuilder]] = {
    **{str(case): lambda case=case: uneven(case) for case in UNEVEN},  # type: ignore[misc]
    "the last channels": lambda: of_some_channels(48, 12, 60),
    "the first channels": lambda: of_some_channels(0, 20, 60),
    "channels across": lambda: of_some_channels(40, 24, 64),
    "odd channels": lambda: of_some_channels(3, 7, 60),
    "two parts": beside_and_filled,
    "exponentials": exponentials,
}


@both_dtypes
@pytest.mark.parametrize("name", LEFTOVERS)
def test_uneven_programs(backend_device, dtype, name):
    assert_right(LEFTOVERS[name](), backend_device, dtype)


@both_dtypes
@pytest.mark.parametrize("name", LEFTOVERS)
def test_uneven_programs_in_every_variant(variant, dtype, name):
    test_uneven_programs(("cpp", "cpu"), dtype, name)


@both_dtypes
@pytest.mark.parametrize(("first", "count", "channels"), [(3, 7, 60), (0, 33, 64), (8, 1, 9), (0, 2, 4), (0, 3, 4)])
def test_channels_beside_those_that_are_read_do_not_matter(variant, dtype, first, count, channels):
    """Not even as NaN, which a weight of zero would not keep out."""
    fused, x = of_some_channels(first, count, channels).fused(SIZES[dtype], "cpu"), images(3, (channels, 3, 5))
    expected, _ = fused(x)
    x[:, :first] = x[:, first + count :] = float("nan")
    assert torch.equal(fused(x)[0], expected)


def test_rounding_to_bfloat16(variant):
    """To the nearest, ties to even, as torch rounds; NaN stays NaN. Subnormal numbers may become zero."""
    making = ProgramBuilder((40, 1, 64))  # a whole vector of channels, and a part of one
    making.add(gather(40, 1, 64), Epilogue(EpilogueOp.STORE_GRADIENT))
    bits = torch.randint(-(2**31), 2**31, (4, 40, 1, 64), generator=torch.Generator().manual_seed(3)).int()
    bits[1] = bits[1] & -(2**16) | 2**15  # ties
    bits[2, :, 0, ::2] = torch.tensor(
        [0x7F7FFFFF, 0x7F7F8000, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 1, 0, -(2**31)]
    ).repeat(4)
    x = bits.view(torch.float32)
    _, found = making.fused(2, "cpu")(x)
    wanted = x.bfloat16().float()
    right = (found == wanted) | (found.isnan() & wanted.isnan())
    assert bool((right | (x.abs() < torch.finfo(torch.float32).tiny) & (found == 0)).all())
    assert bool(wanted.isnan().any())


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 4, 3, 3), (16, 33, 1, 1), (33, 5, 2, 4), (70, 64, 3, 3)], ids=str)
@pytest.mark.parametrize("dense", [False, True])
def test_weights_are_unpacked_as_they_were_packed(layout, shape, dense):
    """The reference reads what kernels read."""
    if dense and shape[1] > DENSE:
        pytest.skip("only few channels are dense")
    weight = normal(*shape, seed=1).bfloat16()
    packed = pack_convolution(weight, layout, 32, dense, torch.bfloat16)
    assert torch.equal(unpack_convolution(packed, layout, shape, dense, torch.bfloat16), weight)


@both_dtypes
@pytest.mark.parametrize("name", LEFTOVERS)
def test_nothing_is_read_that_an_earlier_call_left(variant, dtype, name):
    """NaN in all of the workspace, as lost chains leave it, changes no bit of the next call."""
    making = LEFTOVERS[name]()
    for batch in (1, 3, 16, 17):
        fused, x = making.fused(SIZES[dtype], "cpu"), images(batch, making.sample)
        expected = fused(x)
        assert all(part.isfinite().all() for part in expected)
        fused.workspace.fill_(255)
        for found, wanted in zip(fused(x), expected, strict=True):
            assert torch.equal(found, wanted), batch


@both_dtypes
@pytest.mark.parametrize("name", LEFTOVERS)
@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_a_lost_chain_leaves_its_neighbours_alone(variant, dtype, name, lost):
    making = LEFTOVERS[name]()
    fused, x = making.fused(SIZES[dtype], "cpu"), images(17, making.sample)
    expected, kept = fused(x), torch.arange(17) != 3
    x[3] = lost
    for found, wanted in zip(fused(x), expected, strict=True):
        assert torch.equal(found[kept], wanted[kept])


@pytest.mark.parametrize("name", LEFTOVERS)
def test_plans_for_matrix_units_hold_their_rules(name):
    """On every machine: `plan_batch` refuses a plan whose tiles would read what the call does not write."""
    recipe = LEFTOVERS[name]().recipe(2)
    for batch, workers in ((1, 1), (3, 2), (17, 1), (65, 4), (40, 64)):
        plan_batch(recipe, Layout.TILES, 32, batch, workers, "cpu")


@both_dtypes
def test_batch_does_not_matter_on_a_gpu(backend_device, dtype):
    """Nor where its compiled kernels run as PTX, with fewer images."""
    name, device = backend_device
    if name != "triton" or INTERPRETED:
        pytest.skip("Triton's compiled kernels")
    net, sample = made("coarse to fine")
    x = images(65 if device == "cuda" else 5, sample)
    fused = of_net(net, x[:3], dtype, device)
    x = x.to(device)
    expected = fused(x)
    for batch in (1, 3, 16, 64):
        parts = [fused(part) for part in x.split(batch)]
        for found, wanted in zip(map(torch.cat, zip(*parts, strict=True)), expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")
def test_captured_in_a_graph_it_sees_new_constants():
    making = ProgramBuilder((5, 7, 6))
    making.finish(making.stored(gather(5, 7, 6), Epilogue(EpilogueOp.SCALE, number=making.number(2.0))))
    with ops.backend("triton"):
        fused, x = making.fused(4, "cuda"), images(2, making.sample).cuda()
        fused(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fused(x)
        making.numbers[0] = -3.0
        fused.refresh(making.numbers, [value.cuda() for value in making.values])
        graph.replay()
        for found, wanted in zip(captured, fused(x), strict=True):
            assert torch.equal(found, wanted)


# The operator -------------------------------------------------------------------------------------------------------


def arguments(device: str, batch: int = 2) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    making = ProgramBuilder((3, 4, 5)).finish(0)
    fused = making.fused(4, device)
    code = fused.code(batch)
    return images(batch, making.sample).to(device), code, fused.constants, fused.workspace


def test_opcheck(backend_device):
    # The workspace is scratch: what is left in it is nobody's business, so it is not compared.
    tests = ("test_autograd_registration", "test_faketensor", "test_schema")
    torch.library.opcheck(torch.ops.fastebm.run_program.default, arguments(backend_device[1]), test_utils=tests)


def test_compiles(backend_device):
    x, code, constants, workspace = arguments(backend_device[1])

    def doubled(x: Tensor) -> tuple[Tensor, Tensor]:
        energies, gradient = torch.ops.fastebm.run_program(x, code, constants, workspace)
        return 2 * energies, 2 * gradient

    with torch.no_grad():
        compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
        for found, wanted in zip(compiled(x), doubled(x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    torch._dynamo.reset()


def test_errors_of_every_backend(backend_device):
    x, code, constants, workspace = arguments(backend_device[1])
    run = torch.ops.fastebm.run_program
    with pytest.raises(RuntimeError, match="has no derivative"):
        run(x.clone().requires_grad_(), code, constants, workspace)
    with pytest.raises(ValueError, match="tensor without dimensions"):
        run(x[0, 0, 0, 0], code, constants, workspace)
    with pytest.raises(TypeError, match="x must be float32"):
        run(x.half(), code, constants, workspace)
    with pytest.raises(ValueError, match="code must be an int64 vector on the CPU"):
        run(x, code.int(), constants, workspace)
    with pytest.raises(ValueError, match="workspace must be on x's device"):
        run(x, code, constants, workspace.to("meta"))
    with pytest.raises(ValueError, match="a constant must be on x's device"):
        run(x, code, [constants[0].to("meta"), *constants[1:]], workspace)
    for other in (x[:, :2], x[:, :, :3], x[..., :1], torch.cat([x, x], 3), x.flatten(1), x.flatten(1, 2)):
        with pytest.raises((ValueError, RuntimeError), match="this program is for samples of 3x4x5 numbers"):
            run(other.contiguous(), code, constants, workspace)
    for wrong, message in (
        (torch.zeros(20, dtype=torch.int64), "does not begin"),
        (torch.cat([code, code[:1]]), "its header"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            run(x, wrong, constants, workspace)


def test_errors_of_kernels(backend_device):
    if backend_device[0] == "reference":
        pytest.skip("the reference reads every layout and needs no workspace")
    x, code, constants, workspace = arguments(backend_device[1])
    run = torch.ops.fastebm.run_program
    with pytest.raises((ValueError, RuntimeError), match="workspace"):
        run(x, code, constants, workspace[:100])
    program = decode(code)
    other = 1 if backend_device[0] == "triton" else 0
    foreign = encode(replace(program, header=replace(program.header, layout=other, panel=16)))
    with pytest.raises((ValueError, RuntimeError), match="the weights of this program"):
        run(x, foreign, constants, workspace)
    with pytest.raises((ValueError, RuntimeError), match="first constant must be the numbers"):
        run(x, code, [], workspace)


def test_errors_of_triton(backend_device):
    if backend_device[0] != "triton":
        pytest.skip("the C++ backend divides batches among its workers")
    x, code, constants, workspace = arguments(backend_device[1])
    run = torch.ops.fastebm.run_program
    with pytest.raises(ValueError, match="at most 2 images at a time, got a batch of 4"):
        run(torch.cat([x, x]), code, constants, workspace)
    with pytest.raises(ValueError, match=r"must be a weight \(taps, in, out\)"):
        run(x, code, [constants[0], constants[1][:, :-1].contiguous(), *constants[2:]], workspace)
    with pytest.raises(ValueError, match="contiguous"):
        run(
            x,
            code,
            [constants[0], constants[1].transpose(1, 2).contiguous().transpose(1, 2), *constants[2:]],
            workspace,
        )


def changed(code: Tensor, at: int, number: int) -> Tensor:
    code = code.clone()
    code[at] = number
    return code


def first_of(code: Tensor, table: str) -> int:
    """Where the rows of a table begin in a code."""
    counts, widths = code[1:4].tolist(), (BUFFER_FIELDS, INSTRUCTION_FIELDS, EPILOGUE_FIELDS)
    skipped = ("buffers", "instructions", "epilogues", "segments").index(table)
    return HEADER + sum(n * w for n, w in zip(counts[:skipped], widths[:skipped], strict=True))


WRONG: dict[str, Callable[[Tensor, list[Tensor], Tensor], tuple[Tensor, list[Tensor], Tensor]]] = {
    "too few constants": lambda code, constants, ws: (code, constants[:1], ws),
    "short constants": lambda code, constants, ws: (
        code,
        [constants[0], *(c.flatten()[:1] for c in constants[1:])],
        ws,
    ),
    "empty constants": lambda code, constants, ws: (code, [torch.zeros(0) for _ in constants], ws),
    "another dtype": lambda code, constants, ws: (code, [constants[0], *(c.to(torch.int8) for c in constants[1:])], ws),
    "a short workspace": lambda code, constants, ws: (code, constants, ws[:100]),
    "an expanded workspace": lambda code, constants, ws: (code, constants, ws[:1].expand(len(ws))),
    "a workspace between two lines": lambda code, constants, ws: (code, constants, torch.cat([ws, ws])[1:]),
    "a workspace of floats": lambda code, constants, ws: (code, constants, torch.zeros(len(ws))),
    "a far buffer": lambda code, constants, ws: (changed(code, HEADER + 6, 2**40), constants, ws),
    "a buffer over another": lambda code, constants, ws: (
        changed(code, HEADER + BUFFER_FIELDS + 6, int(code[HEADER + 6])),
        constants,
        ws,
    ),
    "a source that is none": lambda code, constants, ws: (
        changed(code, first_of(code, "instructions") + INSTRUCTION_FIELDS + 1, 2**40),
        constants,
        ws,
    ),
    "a source that comes later": lambda code, constants, ws: (
        changed(code, first_of(code, "instructions") + INSTRUCTION_FIELDS + 1, 1),
        constants,
        ws,
    ),
    "a large kernel": lambda code, constants, ws: (
        changed(code, first_of(code, "instructions") + INSTRUCTION_FIELDS + 11, 2**30),
        constants,
        ws,
    ),
    "a segment beyond": lambda code, constants, ws: (changed(code, len(code) - 3, 2**40), constants, ws),
    "a segment of no images": lambda code, constants, ws: (changed(code, len(code) - 1, 0), constants, ws),
    "more epilogues than there are": lambda code, constants, ws: (changed(code, 3, 2**62), constants, ws),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_internal_arguments_are_refused(backend_device, name):
    """They ended the process, wrote over foreign memory, or never came back."""
    backend, device = backend_device
    if backend == "reference" and "workspace" in name:
        pytest.skip("the reference needs no workspace")
    x, code, constants, workspace = arguments(device)
    wrong = WRONG[name](code, list(constants), workspace.clone())
    with pytest.raises((ValueError, RuntimeError)) as raised:
        torch.ops.fastebm.run_program(x, wrong[0], [c.to(device) for c in wrong[1]], wrong[2])
    assert len(str(raised.value).strip().splitlines()) == 1


def test_a_code_that_changes_is_checked_again(backend_device):
    x, code, constants, workspace = arguments(backend_device[1])
    code, run = code.clone(), torch.ops.fastebm.run_program
    expected = run(x, code, constants, workspace)
    at = first_of(code, "instructions") + INSTRUCTION_FIELDS + 1
    before, code[at] = int(code[at]), 2**40
    with pytest.raises((ValueError, RuntimeError), match="instruction 1"):
        run(x, code, constants, workspace)
    code[at] = before
    for found, wanted in zip(run(x, code, constants, workspace), expected, strict=True):
        assert torch.equal(found, wanted)


def test_what_a_program_does_not_write_is_zero(backend_device):
    x, code, constants, workspace = arguments(backend_device[1])
    whole = decode(code)
    bare = encode(replace(whole, instructions=tuple(replace(i, count=0) for i in whole.instructions[:1]), segments=()))
    bare = encode(replace(decode(bare), segments=(replace(whole.segments[0], count=1),)))
    for _ in range(3):
        torch.full((4096,), float("nan"), device=x.device)  # what new tensors may find in memory
        energies, gradient = torch.ops.fastebm.run_program(x, bare, constants, workspace)
        assert not energies.any()
        assert not gradient.any()


def test_results_of_raw_kernels_must_fit():
    if _C is None:
        pytest.skip("fastebm's C++ operators are not built")
    x, code, constants, workspace = arguments("cpu")
    run, energies, gradient = torch.ops.fastebm_cpp.run_program, torch.zeros(2), torch.zeros_like(x)
    for bad in (energies[:1], energies.double(), gradient.flatten()[:2], energies[:1].expand(2)):
        with pytest.raises(RuntimeError):
            run(bad, gradient, x, code, constants, workspace)
    for bad in (x, gradient[:1], gradient.transpose(2, 3), gradient.double(), gradient[:1].expand(x.shape)):
        with pytest.raises(RuntimeError):
            run(energies, bad, x, code, constants, workspace)
