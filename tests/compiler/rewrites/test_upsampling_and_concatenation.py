"""The mirror image of pooling: enlargement after what works on every pixel alike, and inside of convolutions."""

import pytest
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastebm.compiler.autodiff import differentiate
from fastebm.compiler.cost_model import cost
from fastebm.compiler.operations import (
    Activation,
    Affine,
    Concatenate,
    Convolution,
    LinearCombination,
    Pad,
    Slice,
    Upsample,
)
from fastebm.compiler.rewrites import build_gradient_program, simplify
from fastebm.compiler.rewrites.concatenation_matching import match_concatenations
from fastebm.compiler.rewrites.upsampling_sinking import sink_upsampling
from tests.compiler.small_programs import Small, assert_close, assert_computes, run, tensor, value

sizes = st.integers(1, 6)
factors = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None, max_examples=40)
@given(
    height=sizes,
    width=sizes,
    factor=factors,
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 3)),
    bias=st.booleans(),
)
def test_a_convolution_of_an_enlarged_image_is_a_transposed_one(height, width, factor, kernel, padding, bias):
    assume(all(p < k for p, k in zip(padding, kernel, strict=True)))
    assume(all(n * f + 2 * p >= k for n, f, p, k in zip((height, width), factor, padding, kernel, strict=True)))
    x = tensor(2, 3, height, width)
    weight, offset = tensor(5, 3, *kernel, seed=1), tensor(5, seed=2) if bias else None
    small = Small(3, height, width)
    small.then(Upsample(factor))
    small.then(Convolution(value(weight), value(offset), padding=padding))

    def features(x):
        return F.conv2d(F.interpolate(x, scale_factor=factor), weight, offset, padding=padding)

    assert assert_computes(sink_upsampling(small.energy()), features, x) == 1


def test_3x3_after_a_doubling_has_less_than_half_of_the_flops():
    small = Small(16, 8, 8)
    small.then(Upsample((2, 2)))
    small.then(Convolution(value(tensor(16, 16, 3, 3)), padding=(1, 1)))
    program = small.energy()
    better = simplify(program, passes=[sink_upsampling])
    (conv,) = [node.operation for node in better if isinstance(node.operation, Convolution)]
    assert (conv.kernel, conv.stride, conv.padding, conv.transposed) == ((4, 4), (2, 2), (1, 1), True)
    assert cost(better).flops < 0.45 * cost(program).flops


POINTWISE = {
    "activation": (Activation("silu"), F.silu),
    "affine": (Affine(value(tensor(4, 1, 1)), value(tensor(1))), lambda h: h * tensor(4, 1, 1) + tensor(1)),
    "pointwise": (Convolution(value(tensor(4, 4, 1, 1))), lambda h: F.conv2d(h, tensor(4, 4, 1, 1))),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_what_works_on_every_pixel_alike_comes_first(name):
    operation, function = POINTWISE[name]
    x = tensor(2, 4, 3, 5)
    small = Small(4, 3, 5)
    small.then(Upsample((2, 3)))
    small.then(operation)
    program = small.energy()
    assert assert_computes(sink_upsampling(program), lambda x: function(F.interpolate(x, scale_factor=(2, 3))), x) == 1
    assert cost(simplify(program, passes=[sink_upsampling])).flops < cost(program).flops


@pytest.mark.parametrize(
    "operation",
    [
        Convolution(value(tensor(4, 4, 3, 3)), stride=(2, 2)),
        Convolution(value(tensor(4, 4, 3, 3)), dilation=(2, 2)),
        Convolution(value(tensor(4, 2, 3, 3)), groups=2),
        Convolution(value(tensor(4, 4, 3, 3)), transposed=True),
        Convolution(value(tensor(4, 4, 1, 1)), padding=(1, 0)),
        Affine(value(tensor(4, 6, 6))),
        LinearCombination((2.0, 1.0)),
    ],
    ids=["stride", "dilation", "groups", "transposed", "padding beyond the kernel", "by pixel", "sum"],
)
def test_others_stay_behind_the_enlargement(operation):
    small = Small(4, 3, 3)
    small.then(Upsample((2, 2)))
    if isinstance(operation, LinearCombination):
        small.then(operation, small.nodes[-1].name, small.nodes[-1].name)
    else:
        small.then(operation)
    assert not list(sink_upsampling(small.energy()))


# ---- parts


def test_the_gradient_of_a_gate_is_a_concatenation():
    x = tensor(2, 6, 3, 3)
    small = Small(6, 3, 3)
    a, b = small.then(Slice(0, 0, 2), "x"), small.then(Slice(0, 2, 6), "x")
    small.then(Concatenate(0), small.then(Activation("silu"), b), small.then(Activation("tanh"), a))
    plain = differentiate(small.energy())
    (proposal,) = match_concatenations(plain)
    assert any(isinstance(node.operation, Concatenate) and node.name.startswith("d_") for node in proposal)
    assert not any(isinstance(node.operation, Pad) for node in build_gradient_program(small.energy()))
    for found, wanted in zip(run(proposal, x), run(plain, x), strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize(
    ("first", "second", "joint"),
    [
        (Pad((0, 0), (3, 0)), Pad((2, 0), (0, 0)), True),
        (Pad((2, 0), (0, 0)), Pad((0, 0), (3, 0)), True),
        (Pad((0, 0), (3, 0), 1.0), Pad((2, 0), (0, 0)), False),
        (Pad((0, 0), (3, 0)), Pad((0, 0), (2, 0)), False),
        (Pad((1, 0), (2, 0)), Pad((2, 0), (0, 0)), False),
        (Pad((0, 0), (2, 0)), Pad((2, 0), (0, 0)), False),
    ],
    ids=["in order", "the other way round", "ones", "the same side", "both sides", "overlap"],
)
def test_only_parts_that_make_up_the_whole_are_joined(first, second, joint):
    small = Small(5, 4)
    parts = []
    for pad, kind in ((first, "tanh"), (second, "silu")):
        length = 5 - pad.before[0] - pad.after[0]
        parts.append(small.then(pad, small.then(Slice(0, 0, length), small.then(Activation(kind), "x"))))
    small.then(LinearCombination((1.0, 2.0, 1.0)), parts[0], "x", parts[1])
    program, x = small.energy(), tensor(3, 5, 4)
    proposals = list(match_concatenations(program))
    assert len(proposals) == joint
    for proposal in proposals:
        assert_close(run(proposal, x)[0], run(program, x)[0])
