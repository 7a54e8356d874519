"""Launches of the Triton kernels of the Metropolis test, and what their machine code must show."""

from __future__ import annotations

from fastebm.ops.triton.mala import metropolis_kernel, ratio_kernel
from fastebm.ops.triton.philox import QUADS_A_THREAD, ROWS, WARPS
from fastebm.ops.triton.underdamped import SUM_QUADS

from . import LaunchExample, typed

_STATES = typed("*fp32", "x energy grad proposal proposal_energy proposal_grad") | typed("*fp64", "log_ratio")
_TABLES = typed("*i64", "key chain_ids") | typed("i32", "batch elements")
_TEST = _STATES | _TABLES | typed("*i1", "accepted")
_RATIO = _STATES | _TABLES | typed("*fp32", "schedule") | typed("i32", "schedule_rows")


def launch_examples() -> list[LaunchExample]:
    """The test copies two tensors, a vector at a time, and takes the logarithm of one uniform: 10 fused multiply-adds.

    Where the quads of a thread may be of several chains, each takes it.

    A thread sums two quads of the ratio at a time, with two fused multiply-adds in float64 for an element.
    """
    plain = {"LISTED": False, "WHOLE": True, "QUADS": ROWS, "NUM_CHAINS": 1}
    ratio = {"PER_CHAIN": False, "LISTED": False, "WHOLE": True, "QUADS": SUM_QUADS}
    everything = typed("fp32", "grad_clip low high") | typed("*bf16", "grad proposal_grad")
    wide = typed("*fp64", "energy proposal_energy")
    summed = {"fused_double": 16, "shared": True}
    copies = {"fused": 10, "vector_loads": 2 * QUADS_A_THREAD, "vector_stores": 2 * QUADS_A_THREAD}
    return [
        LaunchExample("metropolis", metropolis_kernel, _TEST, plain, WARPS, **copies),
        LaunchExample("metropolis with float64 energies", metropolis_kernel, _TEST | wide, plain, WARPS, **copies),
        LaunchExample(
            "metropolis of 4x4 images",
            metropolis_kernel,
            _TEST,
            plain | {"QUADS": 4, "NUM_CHAINS": ROWS // 4, "LISTED": True},
            WARPS,
            **copies | {"fused": 10 * QUADS_A_THREAD},
        ),
        LaunchExample(
            "metropolis of odd sizes",
            metropolis_kernel,
            _TEST | typed("i64", "elements"),
            plain | {"WHOLE": False},
            WARPS,
            vector_loads=0,
            vector_stores=0,
            shared=True,
        ),
        LaunchExample("mala_step ratio", ratio_kernel, _RATIO, ratio, WARPS, **summed),
        LaunchExample(
            "mala_step ratio with everything",
            ratio_kernel,
            _RATIO | everything,
            ratio | {"PER_CHAIN": True, "LISTED": True},
            WARPS,
            approximate=True,
            **summed,
        ),
    ]
