"""Rewrites 3 and 4: convolutions in a row, and convolutions side by side, that are one."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastebm.compiler.cost_model import cost
from fastebm.compiler.operations import Activation, AppendOnes, AveragePool, Convolution, LinearCombination
from fastebm.compiler.rewrites import simplify
from fastebm.compiler.rewrites.branch_merging import merge_branches
from fastebm.compiler.rewrites.convolution_composition import compose_convolutions
from tests.compiler.small_programs import Small, assert_computes, tensor, value

sizes = st.integers(5, 11)
kernels = st.tuples(st.integers(1, 4), st.integers(1, 3))
paddings = st.tuples(st.integers(0, 2), st.integers(0, 2))
strides = st.tuples(st.integers(1, 2), st.integers(1, 2))


def offsets(count: int, wanted: bool, seed: int) -> torch.Tensor | None:
    return tensor(count, seed=seed) if wanted else None


@settings(deadline=None, max_examples=40)
@given(
    height=sizes,
    width=sizes,
    kernel=kernels,
    padding=paddings,
    stride=strides,
    biases=st.tuples(st.booleans(), st.booleans()),
)
def test_a_convolution_after_a_pointwise_one_contains_it(height, width, kernel, padding, stride, biases):
    x = tensor(2, 3, height, width)
    inner, outer = tensor(8, 3, 1, 1, seed=1), tensor(5, 8, *kernel, seed=2)
    inner_bias, outer_bias = offsets(8, biases[0], 3), offsets(5, biases[1], 4)
    small = Small(3, height, width)
    small.then(Convolution(value(inner), value(inner_bias)))
    small.then(Convolution(value(outer), value(outer_bias), stride, padding))

    def features(x):
        return F.conv2d(F.conv2d(x, inner, inner_bias), outer, outer_bias, stride, padding)

    programs = list(compose_convolutions(small.energy()))
    assert assert_computes(programs, features, x) == 1
    (conv,) = [node for node in programs[0] if isinstance(node.operation, Convolution)]
    ones = any(isinstance(node.operation, AppendOnes) for node in programs[0])
    assert ones == (biases[0] and padding != (0, 0))
    assert conv.operation.weight.shape[1] == 3 + ones


@settings(deadline=None, max_examples=25)
@given(height=sizes, width=sizes, kernel=kernels, padding=paddings, stride=strides, bias=st.booleans())
def test_a_pointwise_convolution_after_another_is_part_of_it(height, width, kernel, padding, stride, bias):
    x = tensor(2, 3, height, width)
    inner, outer = tensor(4, 3, *kernel, seed=1), tensor(5, 4, 1, 1, seed=2)
    inner_bias, outer_bias = offsets(4, bias, 3), offsets(5, not bias, 4)
    small = Small(3, height, width)
    small.then(Convolution(value(inner), value(inner_bias), stride, padding))
    small.then(Convolution(value(outer), value(outer_bias)))

    def features(x):
        return F.conv2d(F.conv2d(x, inner, inner_bias, stride, padding), outer, outer_bias)

    assert assert_computes(compose_convolutions(small.energy()), features, x) == 1


def test_three_in_a_row_share_one_channel_of_ones():
    x = tensor(2, 3, 7, 6)
    a, b, c = tensor(6, 3, 1, 1, seed=1), tensor(5, 6, 1, 1, seed=2), tensor(4, 5, 3, 3, seed=3)
    biases = [tensor(n, seed=n) for n in (6, 5, 4)]
    small = Small(3, 7, 6)
    for weight, bias in zip((a, b), biases, strict=False):
        small.then(Convolution(value(weight), value(bias)))
    small.then(Convolution(value(c), value(biases[2]), padding=(1, 1)))

    def features(x):
        return F.conv2d(F.conv2d(F.conv2d(x, a, biases[0]), b, biases[1]), c, biases[2], padding=1)

    assert assert_computes(compose_convolutions(small.energy()), features, x) == 2
    program = simplify(small.energy(), passes=[compose_convolutions])
    assert assert_computes([program], features, x)
    assert sum(isinstance(node.operation, Convolution) for node in program) == 1


def test_a_first_layer_that_two_branches_read_is_composed_with_each():
    small = Small(3, 8, 8)
    rgb = small.then(Convolution(value(tensor(32, 3, 1, 1)), value(tensor(32))))
    main = small.then(Activation("silu"), small.then(Convolution(value(tensor(32, 32, 3, 3)), padding=(1, 1)), rgb))
    small.then(
        LinearCombination((1.0, 1.0)),
        main,
        small.then(Convolution(value(tensor(32, 32, 1, 1)), value(tensor(32))), rgb),
    )
    program = small.energy()
    better = simplify(program, passes=[compose_convolutions])
    assert cost(better).flops < 0.25 * cost(program).flops
    convs = [node for node in better if isinstance(node.operation, Convolution)]
    assert sorted(conv.operation.weight.shape[1] for conv in convs) == [3, 4]


@pytest.mark.parametrize("between", ["activation", "pool", "nothing, but grouped", "nothing, but dilated"])
def test_convolutions_that_are_not_in_a_row_are_declined(between):
    small = Small(4, 9, 9)
    groups = 2 if "grouped" in between else 1
    dilation = (2, 2) if "dilated" in between else (1, 1)
    small.then(Convolution(value(tensor(4, 4, 1, 1))))
    if between == "activation":
        small.then(Activation("relu"))
    if between == "pool":
        small.then(AveragePool((2, 2), (2, 2)))
    small.then(Convolution(value(tensor(4, 4 // groups, 3, 3)), padding=(1, 1), dilation=dilation, groups=groups))
    assert not list(compose_convolutions(small.energy()))


def test_a_bottleneck_stays_two_convolutions():
    """64 -> 2 -> 64 channels: composed it would be 64 -> 64, with many times the FLOPs."""
    small = Small(64, 8, 8)
    small.then(Convolution(value(tensor(2, 64, 1, 1))))
    small.then(Convolution(value(tensor(64, 2, 3, 3)), padding=(1, 1)))
    program = small.energy()
    assert len(list(compose_convolutions(program))) == 1
    assert simplify(program, passes=[compose_convolutions]) is program


# ---- side by side


@settings(deadline=None, max_examples=30)
@given(
    height=sizes,
    width=sizes,
    kernel=st.sampled_from([(1, 1), (3, 3), (3, 1), (2, 4)]),
    growth=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    padding=paddings,
    stride=strides,
    biases=st.tuples(st.booleans(), st.booleans()),
    third=st.booleans(),
)
def test_two_convolutions_of_one_input_are_one(height, width, kernel, growth, padding, stride, biases, third):
    x = tensor(2, 3, height, width)
    large = (kernel[0] + 2 * growth[0], kernel[1] + 2 * growth[1])
    wide = (padding[0] + growth[0], padding[1] + growth[1])
    if any(n + 2 * p < k for n, p, k in zip((height, width), padding, kernel, strict=True)):
        return
    a, b = tensor(4, 3, *kernel, seed=1), tensor(4, 3, *large, seed=2)
    a_bias, b_bias = offsets(4, biases[0], 3), offsets(4, biases[1], 4)
    factor = torch.tensor(0.3, dtype=torch.float64)
    small = Small(3, height, width)
    first = small.then(Convolution(value(a), value(a_bias), stride, padding), "x")
    second = small.then(Convolution(value(b), value(b_bias), stride, wide), "x")
    if third:
        small.then(LinearCombination((2.0, 1.5, value(factor))), first, small.then(Activation("silu"), second), second)
    else:
        small.then(LinearCombination((2.0, value(factor))), first, second)

    def features(x):
        one, two = F.conv2d(x, a, a_bias, stride, padding), F.conv2d(x, b, b_bias, stride, wide)
        return 2 * one + (1.5 * F.silu(two) if third else 0) + factor * two

    # Where an activation reads the second as well, it can't be merged.
    assert assert_computes(merge_branches(small.energy()), features, x) == (0 if third else 1)


@pytest.mark.parametrize("difference", ["input", "stride", "padding", "dilation", "groups", "even kernel"])
def test_branches_that_differ_are_declined(difference):
    small = Small(4, 8, 8)
    other = small.then(Activation("silu"))
    options = {
        "stride": {"stride": (1, 2)},
        "padding": {"padding": (1, 0)},
        "dilation": {"dilation": (2, 1)},
        "groups": {"groups": 2},
    }.get(difference, {})
    size = {"even kernel": 4}.get(difference, 3)
    first = small.then(Convolution(value(tensor(4, 4, 3, 3)), stride=(2, 2), padding=(1, 1)), "x")
    options = {"stride": (2, 2), "padding": (1, 1)} | options
    weight = tensor(4, 4 // options.get("groups", 1), size, size)
    second = small.then(Convolution(value(weight), **options), other if difference == "input" else "x")
    if small.shape(first) != small.shape(second):
        small.then(LinearCombination((1.0,)), first)
    else:
        small.then(LinearCombination((1.0, 1.0)), first, second)
    assert not list(merge_branches(small.energy()))
