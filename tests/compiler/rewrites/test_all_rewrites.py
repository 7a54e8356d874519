"""All rewrites at once, on programs that nobody thought of, and the pass that tidies up after them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastebm.compiler.autodiff import differentiate
from fastebm.compiler.cost_model import Machine
from fastebm.compiler.operations import (
    Activation,
    Affine,
    AveragePool,
    Broadcast,
    Concatenate,
    Convolution,
    LinearCombination,
    Multiply,
    Pad,
    Reshape,
    Slice,
    Sum,
    Upsample,
)
from fastebm.compiler.program import Program, Rewriter, eliminate_dead_code
from fastebm.compiler.rewrites import PASSES, build_gradient_program
from tests.compiler.small_programs import Small, assert_close, run, tensor, value

MACHINES = (
    Machine(),
    Machine(flops_per_byte=0.01),
    Machine(flops_per_byte=1e4, lanes=1),
    Machine(strided_adjoint=20.0, lanes=1),
)
KINDS = [
    "activation", "affine", "combine", "concatenate", "convolution", "factor", "gate", "image", "kernel", "multiply",
    "norm", "pointwise", "pool", "slice", "strided", "sum", "transposed", "upsample",
]  # fmt: skip


def grow(small: Small, draw, seed: int) -> None:
    """One more operation, on results that were drawn."""
    images = [node.name for node in small.nodes if len(node.shape) == 3]
    source = draw(st.sampled_from(images[-4:]))
    channels, height, width = small.shape(source)
    alike = [name for name in images if small.shape(name) == (channels, height, width)]
    other = draw(st.sampled_from(alike))
    kind = draw(st.sampled_from(KINDS))
    number = torch.tensor(0.5 + 0.1 * seed, dtype=torch.float64)
    bias = value(tensor(4, seed=seed)) if draw(st.booleans()) else None

    def weight(outputs: int, inputs: int, *kernel: int):
        return value(tensor(outputs, inputs, *kernel, seed=seed) / (inputs * kernel[0]))

    if kind == "activation":
        name = draw(st.sampled_from(["silu", "gelu", "tanh", "softplus"]))
        small.then(Activation(name, (1.0, 20.0) if name == "softplus" else ()), source)
    elif kind == "affine":
        small.then(Affine(value(tensor(channels, 1, 1, seed=seed)), value(number)), source)
    elif kind == "norm":
        small.then(Affine(value(number), value(tensor(channels, 1, 1, seed=seed))), source)
    elif kind == "image":
        small.then(Affine(None, value(tensor(1, height, width, seed=seed))), source)
    elif kind == "factor":
        small.then(LinearCombination((draw(st.sampled_from([0.3, -2.0, value(number)])),)), source)
    elif kind == "combine":
        small.then(LinearCombination((1.0, draw(st.sampled_from([1.0, -0.5, value(number)])))), source, other)
    elif kind == "multiply":
        small.then(Multiply(), source, other)
    elif kind == "gate":
        small.then(Multiply(), small.then(Activation("sigmoid"), source), other)
    elif kind == "sum":
        summed = small.then(Sum((1, 2)), source)
        small.then(Multiply(), source, small.then(Broadcast((channels, height, width)), summed))
    elif kind == "concatenate":
        small.then(Concatenate(0), source, other)
    elif kind == "slice":
        small.then(Slice(0, 0, max(1, channels - 1)), source)
        small.then(Pad((0, 1, 0), (0, 0, 1)))
    elif kind == "pool" and min(height, width) >= 2:
        small.then(AveragePool((2, 2), (2, 2)), source)
    elif kind == "upsample" and height * width < 200:
        small.then(Upsample((2, 1)), source)
    elif kind == "strided" and min(height, width) >= 3:
        small.then(Convolution(weight(4, channels, 3, 3), bias, (2, 2), (1, 1)), source)
    elif kind == "transposed" and height * width < 100:
        small.then(Convolution(weight(channels, 4, 4, 4), bias, (2, 2), (1, 1), transposed=True), source)
    elif kind == "convolution":
        small.then(Convolution(weight(4, channels, 3, 3), bias, padding=(1, 1)), source)
    elif kind == "kernel" and min(height, width) >= 2:
        small.then(Convolution(weight(4, channels, 2, 1), bias), source)
    elif kind == "pointwise":
        small.then(Convolution(weight(4, channels, 1, 1), bias), source)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_random_programs_are_the_same_after_all_rewrites(data):
    small = Small(data.draw(st.integers(1, 3)), data.draw(st.integers(3, 7)), data.draw(st.integers(3, 7)))
    for seed in range(data.draw(st.integers(1, 9))):
        grow(small, data.draw, seed)
    captured = small.energy()
    plain = differentiate(captured)
    machine = data.draw(st.sampled_from(MACHINES))
    rewritten = build_gradient_program(captured, machine)
    x = tensor(2, *small.nodes[0].shape, seed=5)
    expected = run(plain, x)
    for found, wanted in zip(run(rewritten, x), expected, strict=True):
        assert_close(found, wanted, 1e-9)
    for found, wanted in zip(run(plain, x[1:]), expected, strict=True):
        assert_close(found, wanted[1:], 1e-9)  # a sample's result does not depend on the rest of the batch


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_every_proposal_of_every_pass_is_the_same_program(data):
    small = Small(2, 5, 6)
    for seed in range(data.draw(st.integers(1, 7))):
        grow(small, data.draw, seed)
    plain = differentiate(small.energy())
    x = tensor(2, 2, 5, 6, seed=5)
    expected = run(plain, x)
    for propose in PASSES:
        for proposal in propose(plain):
            for found, wanted in zip(run(proposal, x), expected, strict=True):
                assert_close(found, wanted, 1e-9)


def test_tidying_drops_repetitions_idle_sums_and_what_nothing_reads():
    small = Small(4)
    first, second = small.then(Activation("tanh"), "x"), small.then(Activation("tanh"), "x")
    idle = small.then(LinearCombination((1.0,)), second)
    small.then(Activation("silu"), "x")
    small.then(LinearCombination((1.0, 1.0)), first, idle)
    program = eliminate_dead_code(small.features())
    assert [type(node.operation).__name__ for node in program] == ["Input", "Activation", "LinearCombination"]
    assert program.nodes[-1].inputs == (first, first)
    assert eliminate_dead_code(Program(program.nodes, (first,))).nodes[-1].name == first


def test_a_rewrite_that_changes_a_shape_is_an_error():
    small = Small(4, 2)
    small.then(Activation("tanh"))
    program = small.features()
    with pytest.raises(ValueError, match=r"gives shape \(8,\)"):
        Rewriter(program, program.nodes[-1]).finish(Reshape((8,)), "x")
