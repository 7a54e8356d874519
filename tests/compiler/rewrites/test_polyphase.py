"""Rewrite 6: adjoints of strided convolutions as plain convolutions whose outputs are interleaved."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastebm.compiler.autodiff import differentiate
from fastebm.compiler.cost_model import Machine, cost
from fastebm.compiler.operations import Activation, Convolution, Interleave
from fastebm.compiler.rewrites import simplify
from fastebm.compiler.rewrites.polyphase import split_polyphase
from tests.compiler.small_programs import Small, assert_close, by_autograd, energy_of, run, tensor, value

SLOW_ADJOINTS = Machine(strided_adjoint=10.0)


def strided(x, weight, bias, **options) -> Small:
    small = Small(*x.shape[1:])
    small.then(Activation("tanh"))
    small.then(Convolution(value(weight), value(bias), **options))
    return small


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(5, 12),
    width=st.integers(5, 12),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(2, 3)),
)
def test_the_backward_part_of_a_strided_convolution(height, width, kernel, padding, stride):
    x, weight, bias = tensor(2, 3, height, width), tensor(4, 3, *kernel, seed=1), tensor(4, seed=2)
    program = differentiate(strided(x, weight, bias, stride=stride, padding=padding).energy())
    proposals = list(split_polyphase(program))
    assert len(proposals) == 1
    assert not any(node.operation.transposed for node in proposals[0] if isinstance(node.operation, Convolution))

    def energy(x):
        return energy_of(F.conv2d(torch.tanh(x), weight, bias, stride, padding))

    for found, wanted in zip(run(proposals[0], x), by_autograd(energy, x), strict=True):
        assert_close(found, wanted)


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(2, 6),
    width=st.integers(2, 6),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    stride=st.tuples(st.integers(2, 3), st.integers(2, 3)),
    rest=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    with_bias=st.booleans(),
)
def test_a_transposed_convolution_of_a_decoder(height, width, kernel, padding, stride, rest, with_bias):
    """With a bias, which also covers the rows and columns that no pixel of the input reaches."""
    x, weight = tensor(2, 3, height, width), tensor(3, 4, *kernel, seed=1)
    bias = tensor(4, seed=2) if with_bias else None
    size = [
        (n - 1) * s - 2 * p + k + r
        for n, s, p, k, r in zip((height, width), stride, padding, kernel, rest, strict=True)
    ]
    assume(min(size) > 0)
    small = strided(x, weight, bias, stride=stride, padding=padding, transposed=True, output_padding=rest)
    (proposal,) = split_polyphase(small.features())
    expected = F.conv_transpose2d(torch.tanh(x), weight, bias, stride, padding, rest)
    assert_close(run(proposal, x)[0], expected)


def test_4x4_with_stride_2_has_the_same_flops_but_for_the_border():
    x = tensor(1, 8, 32, 32)
    program = differentiate(strided(x, tensor(8, 8, 4, 4), None, stride=(2, 2), padding=(1, 1)).energy())
    better = simplify(program, SLOW_ADJOINTS, passes=[split_polyphase])
    assert any(isinstance(node.operation, Interleave) for node in better)
    assert cost(better).flops < 1.15 * cost(program).flops


@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": (2, 2)}, {"stride": (1, 1)}])
def test_others_are_declined(options):
    x = tensor(1, 4, 12, 12)
    weight = tensor(4, 4 // options.get("groups", 1), 3, 3)
    program = differentiate(strided(x, weight, None, **({"stride": (2, 2)} | options)).energy())
    assert not list(split_polyphase(program))


def test_it_is_not_taken_where_strided_adjoints_run_well():
    x = tensor(1, 32, 32, 32)
    program = differentiate(strided(x, tensor(32, 32, 3, 3), None, stride=(2, 2), padding=(1, 1)).energy())
    assert simplify(program, Machine(strided_adjoint=1.0), passes=[split_polyphase]) is program
    assert simplify(program, SLOW_ADJOINTS, passes=[split_polyphase]) is not program


def test_it_is_taken_where_the_outputs_are_few():
    """The gradient of a grey image: 4 outputs, a parity each, take as long as 1, and the kernel is 3x3, not 5x5."""
    x = tensor(1, 1, 28, 28)
    program = differentiate(strided(x, tensor(16, 1, 5, 5), None, stride=(2, 2), padding=(4, 4)).energy())
    assert simplify(program, Machine(strided_adjoint=1.0), passes=[split_polyphase]) is not program
