"""The reverse-mode derivative of single operations, against autograd."""

import pytest

from fastebm.compiler.operations import Broadcast, Multiply, Sum
from tests.compiler.small_programs import Small, assert_computes, tensor


def test_a_broadcast_to_its_own_shape_keeps_samples_apart():
    """Its derivative was a sum over no dimensions, which PyTorch reads as a sum over all, the batch included."""
    small = Small(4, 1, 1)
    small.then(Multiply(), "x", small.then(Broadcast((4, 1, 1)), small.then(Sum((1, 2)), "x")))
    assert assert_computes([small.energy()], lambda x: x * x, tensor(2, 4, 1, 1)) == 1


def test_a_sum_over_no_dimensions_is_an_error():
    with pytest.raises(ValueError, match="at least one dimension"):
        Sum(())
