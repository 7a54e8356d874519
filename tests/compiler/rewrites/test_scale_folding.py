"""Rewrite 5 and the activations that were written out: factors and shifts in weights, sums of sums."""

import pytest
import torch
import torch.nn.functional as F

from fastebm.compiler.autodiff import differentiate
from fastebm.compiler.cost_model import cost
from fastebm.compiler.operations import (
    Activation,
    Affine,
    AveragePool,
    Concatenate,
    Convolution,
    Linear,
    LinearCombination,
    Multiply,
    Permute,
    Reshape,
    Slice,
    Sum,
    Upsample,
)
from fastebm.compiler.rewrites import simplify
from fastebm.compiler.rewrites.activation_matching import match_activations
from fastebm.compiler.rewrites.scale_folding import fold_scales
from tests.compiler.small_programs import Small, assert_computes, tensor, value

WEIGHT, BIAS = tensor(6, 4, 3, 3, seed=1), tensor(6, seed=2)
NUMBER = torch.tensor(0.3, dtype=torch.float64)
BY_CHANNEL, SHIFT = tensor(6, 1, 1, seed=3), tensor(6, 1, 1, seed=4)


def convolved(bias: bool = True) -> Small:
    small = Small(4, 7, 8)
    small.then(Convolution(value(WEIGHT), value(BIAS) if bias else None, padding=(1, 1)))
    return small


def names(program) -> list[str]:
    return [type(node.operation).__name__ for node in program]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("factor", [-2.5, value(NUMBER)], ids=["number", "value"])
def test_a_factor_behind_a_convolution_is_in_its_weight(factor, bias):
    small = convolved(bias)
    small.then(LinearCombination((factor,)))
    number = factor if isinstance(factor, float) else NUMBER
    x = tensor(2, 4, 7, 8)

    def features(x):
        return number * F.conv2d(x, WEIGHT, BIAS if bias else None, padding=1)

    assert assert_computes(fold_scales(small.energy()), features, x) >= 1
    assert "LinearCombination" not in names(simplify(small.energy(), passes=[fold_scales]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [BY_CHANNEL, NUMBER, None], ids=["by channel", "number", "none"])
@pytest.mark.parametrize("shift", [SHIFT, NUMBER, None], ids=["by channel", "number", "none"])
def test_an_affine_map_behind_a_convolution_is_in_its_weight_and_bias(scale, shift, bias):
    if scale is None and shift is None:
        return
    small = convolved(bias)
    small.then(Affine(value(scale), value(shift)))

    def features(x):
        h = F.conv2d(x, WEIGHT, BIAS if bias else None, padding=1)
        return h * (1 if scale is None else scale) + (0 if shift is None else shift)

    assert assert_computes(fold_scales(small.energy()), features, tensor(2, 4, 7, 8)) == 1
    assert "Affine" not in names(simplify(small.energy(), passes=[fold_scales]))


@pytest.mark.parametrize("transposed", [True, False])
def test_an_affine_map_behind_a_transposed_or_linear_map(transposed):
    x = tensor(2, 4, 5, 5)
    small = Small(4, 5, 5)
    if transposed:
        weight = tensor(4, 6, 3, 3, seed=5)
        small.then(Convolution(value(weight), value(BIAS), stride=(2, 2), transposed=True))
        small.then(Affine(value(BY_CHANNEL), value(SHIFT)))

        def features(x):
            return F.conv_transpose2d(x, weight, BIAS, stride=2) * BY_CHANNEL + SHIFT

    else:
        weight = tensor(6, 5, seed=5)
        small.then(Linear(value(weight)))
        small.then(Affine(value(BIAS), value(BIAS)))

        def features(x):
            return F.linear(x, weight) * BIAS + BIAS

    assert assert_computes(fold_scales(small.energy()), features, x) == 1


@pytest.mark.parametrize("kind", ["by pixel", "read twice", "grouped and transposed"])
def test_an_affine_map_that_does_not_fit_is_declined(kind):
    if kind == "grouped and transposed":
        small = Small(4, 5, 5)
        small.then(Convolution(value(tensor(4, 3, 3, 3)), groups=2, transposed=True))
    else:
        small = convolved()
    conv = small.nodes[-1].name
    scaled = small.then(Affine(value(tensor(1, 7, 8) if kind == "by pixel" else BY_CHANNEL)))
    if kind == "read twice":
        small.then(LinearCombination((1.0, 1.0)), small.then(Activation("silu"), conv), scaled)
    assert not list(fold_scales(small.energy()))


BETWEEN = {
    "pool": (AveragePool((2, 2), (2, 2)), lambda h: F.avg_pool2d(h, 2)),
    "padded pool": (AveragePool((3, 3), (2, 2), (1, 1)), lambda h: F.avg_pool2d(h, 3, 2, 1)),
    "upsampling": (Upsample((2, 2)), lambda h: F.interpolate(h, scale_factor=2)),
    "sum": (Sum((1,)), lambda h: h.sum(2, keepdim=True)),
    "slice": (Slice(1, 2, 6), lambda h: h[:, :, 2:6]),
    "permutation": (Permute((0, 2, 1)), lambda h: h.transpose(2, 3)),
    "reshape": (Reshape((4, 8, 7)), lambda h: h.reshape(h.shape[0], 4, 8, 7)),
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("factor_first", [True, False])
def test_a_factor_goes_through_what_commutes_with_it(between, factor_first):
    """Into the convolution after it, or before it."""
    operation, function = BETWEEN[between]
    x = tensor(2, 4, 7, 8)
    small = Small(4, 7, 8)
    if factor_first:
        small.then(Activation("tanh"))
        small.then(LinearCombination((0.7,)))
        small.then(operation)
        weight = tensor(5, small.nodes[-1].shape[0], 1, 1, seed=6)
        small.then(Convolution(value(weight)))

        def features(x):
            return F.conv2d(function(0.7 * torch.tanh(x)), weight)

    else:
        weight = tensor(4, 4, 1, 1, seed=6)
        small.then(Convolution(value(weight)))
        small.then(operation)
        small.then(LinearCombination((0.7,)))
        small.then(Activation("tanh"))

        def features(x):
            return torch.tanh(0.7 * function(F.conv2d(x, weight)))

    program = small.energy()
    assert assert_computes(fold_scales(program), features, x) == 1
    assert "LinearCombination" not in names(simplify(program, passes=[fold_scales]))


def test_a_factor_that_an_activation_reads_stays():
    small = Small(4, 7, 8)
    small.then(Activation("tanh"))
    factor = small.then(LinearCombination((0.7,)))
    curved = small.then(Activation("silu"), factor)
    small.then(Concatenate(0), small.then(Convolution(value(WEIGHT), padding=(1, 1)), factor), curved)
    assert not list(fold_scales(small.energy()))


def test_a_factor_with_two_readers_goes_into_both():
    x = tensor(2, 4, 7, 8)
    small = Small(4, 7, 8)
    small.then(Activation("tanh"))
    factor = small.then(LinearCombination((value(NUMBER),)))
    conv = small.then(Convolution(value(WEIGHT), value(BIAS), padding=(1, 1)), factor)
    pointwise = small.then(Convolution(value(tensor(6, 4, 1, 1))), factor)
    small.then(LinearCombination((2.0, 1.0)), conv, pointwise)

    def features(x):
        h = NUMBER * torch.tanh(x)
        return 2 * F.conv2d(h, WEIGHT, BIAS, padding=1) + F.conv2d(h, tensor(6, 4, 1, 1))

    assert assert_computes(fold_scales(small.energy()), features, x) == 2
    better = simplify(small.energy(), passes=[fold_scales])
    assert assert_computes([better], features, x)
    assert sum(isinstance(node.operation, LinearCombination) for node in better) == 1


def test_sums_of_sums_are_one_sum():
    x = tensor(2, 4, 7, 8)
    small = Small(4, 7, 8)
    a, b = small.then(Activation("tanh"), "x"), small.then(Activation("silu"), "x")
    inner = small.then(LinearCombination((0.5, value(NUMBER))), a, b)
    small.then(LinearCombination((3.0, 1.0)), inner, "x")
    program = small.energy()

    def features(x):
        return 3 * (0.5 * torch.tanh(x) + NUMBER * F.silu(x)) + x

    assert assert_computes(fold_scales(program), features, x) == 1
    better = simplify(program, passes=[fold_scales])
    assert assert_computes([better], features, x)
    assert cost(better).bytes < cost(program).bytes


def test_factors_of_the_backward_part_fold_too():
    """1/1.1 behind a swish, 1/4 of a pool: slopes, adjoints and an enlargement are left of the backward part."""
    small = Small(4, 8, 8)
    small.then(Convolution(value(WEIGHT[:, :4]), padding=(1, 1)))
    small.then(Activation("silu"))
    small.then(LinearCombination((1 / 1.1,)))
    small.then(AveragePool((2, 2), (2, 2)))
    small.then(Convolution(value(tensor(5, 6, 1, 1))))
    program = differentiate(simplify(small.energy(), passes=[fold_scales]))
    assert "LinearCombination" in names(program)
    assert "LinearCombination" not in names(simplify(program, passes=[fold_scales]))


def test_products_that_are_activations_are_recognised():
    x = tensor(2, 4, 7, 8)
    small = Small(4, 7, 8)
    gate = small.then(Activation("sigmoid"))
    swish = small.then(Multiply(), gate, "x")
    square = small.then(Multiply(), "x", "x")
    small.then(LinearCombination((1.0, 1.0)), swish, square)

    def features(x):
        return F.silu(x) + x.square()

    assert assert_computes(match_activations(small.energy()), features, x) == 2
    assert "Multiply" not in names(simplify(small.energy(), passes=[match_activations]))
    other = Small(4, 7, 8)
    other.then(Multiply(), other.then(Activation("sigmoid")), other.then(Activation("tanh"), "x"))
    assert not list(match_activations(other.energy()))
