"""Rewrites 1 and 2: pools inside of convolutions, and pools before what works on every pixel alike."""

import pytest
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastebm.compiler.cost_model import Machine, cost
from fastebm.compiler.operations import Activation, Affine, AveragePool, Convolution, LinearCombination
from fastebm.compiler.rewrites import simplify
from fastebm.compiler.rewrites.pooling_fusion import fuse_pooling
from fastebm.compiler.rewrites.pooling_hoisting import hoist_pooling
from tests.compiler.small_programs import Small, assert_computes, tensor, value

POOL = AveragePool((2, 2), (2, 2))
sizes = st.integers(6, 13)


@settings(deadline=None, max_examples=40)
@given(
    height=sizes,
    width=sizes,
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 2)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
)
def test_a_pool_after_a_convolution_is_part_of_it(height, width, kernel, padding, stride, window, groups, bias):
    x = tensor(2, 4, height, width)
    weight, offset = tensor(6, 4 // groups, *kernel, seed=1), tensor(6, seed=2) if bias else None
    small = Small(4, height, width)
    small.then(Convolution(value(weight), value(offset), stride, padding, groups=groups))
    if any(n < k for n, k in zip(small.nodes[-1].shape[1:], window, strict=True)):
        return
    small.then(AveragePool(window, window))

    def features(x):
        return F.avg_pool2d(F.conv2d(x, weight, offset, stride, padding, groups=groups), window)

    assert assert_computes(fuse_pooling(small.energy()), features, x) == 1


def pooled(*, pool: AveragePool = POOL, channels: int = 16, **options) -> Small:
    small = Small(channels, 12, 12)
    kernel = options.pop("kernel", 3)
    shape = (channels, channels, kernel, kernel)
    small.then(Convolution(value(tensor(*shape)), **({"padding": (kernel // 2, kernel // 2)} | options)))
    small.then(pool)
    return small


def test_3x3_and_2x2_are_one_4x4_with_fewer_flops():
    program = pooled().energy()
    better = simplify(program, passes=[fuse_pooling])
    (conv,) = [node.operation for node in better if isinstance(node.operation, Convolution)]
    assert (conv.kernel, conv.stride, conv.padding) == ((4, 4), (2, 2), (1, 1))
    assert cost(better).flops < 0.45 * cost(program).flops


@pytest.mark.parametrize(
    "small",
    [
        pooled(pool=AveragePool((2, 2), (2, 2), padding=(1, 1))),
        pooled(pool=AveragePool((3, 3), (3, 3), ceil_mode=True)),
        pooled(pool=AveragePool((3, 3), (2, 2))),
        pooled(pool=AveragePool((2, 2), (2, 2), divisor=3)),
        pooled(dilation=(2, 2)),
        pooled(transposed=True),
    ],
    ids=["padded pool", "ceil mode", "overlapping windows", "divisor", "dilation", "transposed"],
)
def test_other_pools_and_convolutions_are_declined(small):
    assert not list(fuse_pooling(small.energy()))


def test_a_convolution_that_others_read_is_declined():
    small = pooled()
    conv = small.nodes[1].name
    pool = small.nodes[-1].name
    small.then(LinearCombination((1.0, 1.0)), small.then(POOL, small.then(Activation("silu"), conv)), pool)
    assert not list(fuse_pooling(small.energy()))


def test_an_enlarged_kernel_that_costs_more_is_not_taken():
    """3x3 with stride 3 has no overlap to share: pooled by 2 its kernel is 6x6, as many multiply-adds, and no fewer."""
    small = pooled(stride=(3, 3), padding=(0, 0), channels=64)
    program = small.energy()
    (proposal,) = fuse_pooling(program)
    assert cost(proposal).flops >= cost(program).flops - 64 * 4 * 4
    # Where bytes cost nothing, there is no gain beyond the pool's own additions.
    heavy = pooled(kernel=1, channels=64).energy()
    assert Machine().time(simplify(heavy, passes=[fuse_pooling])) <= Machine().time(heavy)


@settings(deadline=None, max_examples=25)
@given(height=sizes, width=sizes, window=st.tuples(st.integers(1, 3), st.integers(1, 3)), bias=st.booleans())
def test_a_pool_comes_before_a_pointwise_convolution(height, width, window, bias):
    x = tensor(2, 3, height, width)
    weight, offset = tensor(6, 3, 1, 1, seed=1), tensor(6, seed=2) if bias else None
    small = Small(3, height, width)
    small.then(Convolution(value(weight), value(offset)))
    small.then(AveragePool(window, window))

    def features(x):
        return F.avg_pool2d(F.conv2d(x, weight, offset), window)

    assert assert_computes(hoist_pooling(small.energy()), features, x) == 1
    assert simplify(small.features(), passes=[hoist_pooling]).nodes[1].name != small.nodes[1].name or window == (1, 1)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_pool_comes_before_a_sum_and_an_affine_map(stride):
    x = tensor(2, 4, 9, 7)
    scale, shift = tensor(4, 1, 1, seed=1), tensor(4, 1, 1, seed=2)
    small = Small(4, 9, 7)
    silu = small.then(Activation("silu"))
    small.then(LinearCombination((0.3, -2.0)), "x", silu)
    small.then(Affine(value(scale), value(shift)))
    small.then(AveragePool((3, 3), (stride, stride)))

    def features(x):
        return F.avg_pool2d((0.3 * x - 2 * F.silu(x)) * scale + shift, 3, stride)

    program = small.energy()
    assert assert_computes(hoist_pooling(program), features, x) == 1
    if stride == 2:
        assert cost(simplify(program, passes=[hoist_pooling])).bytes < cost(program).bytes


def test_a_residual_block_lets_the_pool_through_to_its_convolution():
    x = tensor(2, 8, 8, 8)
    weight = tensor(8, 8, 3, 3, seed=1)
    small = Small(8, 8, 8)
    conv = small.then(Convolution(value(weight), padding=(1, 1)))
    small.then(LinearCombination((1.0, 1.0)), conv, "x")
    small.then(POOL)
    program = simplify(small.energy(), passes=[hoist_pooling, fuse_pooling])
    assert assert_computes([program], lambda x: F.avg_pool2d(F.conv2d(x, weight, padding=1) + x, 2), x)
    (conv_node,) = [node for node in program if isinstance(node.operation, Convolution)]
    assert conv_node.operation.stride == (2, 2)


@pytest.mark.parametrize(
    ("operation", "pool"),
    [
        (Convolution(value(tensor(4, 4, 1, 1)), value(tensor(4))), AveragePool((2, 2), (2, 2), padding=(1, 1))),
        (Convolution(value(tensor(4, 4, 1, 1))), AveragePool((3, 3), (2, 2), ceil_mode=True)),
        (Convolution(value(tensor(4, 4, 3, 3)), padding=(1, 1)), POOL),
        (Convolution(value(tensor(4, 4, 1, 1)), padding=(1, 1)), POOL),
        (Activation("silu"), POOL),
        (Affine(value(tensor(4, 9, 9))), POOL),
    ],
    ids=["padded pool", "ceil mode", "3x3", "padded 1x1", "activation", "affine by pixel"],
)
def test_a_pool_stays_behind_what_it_does_not_commute_with(operation, pool):
    small = Small(4, 9, 9)
    small.then(operation)
    small.then(pool)
    assert not list(hoist_pooling(small.energy()))
