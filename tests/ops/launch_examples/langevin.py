"""Launches of the Triton kernels of the Langevin step, and what their machine code must show."""

from __future__ import annotations

from typing import Any

from fastebm.ops.langevin import SUM_LANES
from fastebm.ops.triton.langevin import _NUMBERS, factors_kernel, step_kernel
from fastebm.ops.triton.philox import QUADS_A_THREAD, ROWS, WARPS

from . import LaunchExample, typed
from .normal import FUSED_OF_NORMALS


def _step_example(
    name: str,
    types: dict[str, Any],
    options: dict[str, Any],
    loads: int | None,
    stores: int | None,
    data_term: int = 0,
    **shows: Any,
) -> LaunchExample:
    """`step_kernel` with some types and options other than the plain ones; loads and stores of a quad."""
    signature = (
        typed("*fp32", "out x grad schedule") | typed("*i64", "key chain_ids") | typed("i32", " ".join(_NUMBERS))
    )
    plain = dict.fromkeys(("NORM_CLIP", "PER_CHAIN", "LISTED", "STRIDED"), False)
    constexprs = {**plain, "WHOLE": True, "QUADS": ROWS, "NUM_CHAINS": 1, **options}
    of_thread = {"vector_loads": loads, "vector_stores": stores, "fused": FUSED_OF_NORMALS + 8 + data_term}
    shows |= {name: count if count is None else QUADS_A_THREAD * count for name, count in of_thread.items()}
    shows["approximate"] = True
    return LaunchExample(f"langevin_step {name}", step_kernel, signature | types, constexprs, WARPS, **shows)


def launch_examples() -> list[LaunchExample]:
    """A quad of a step: fused multiply-adds for its noise, 8 for the update, 4 for a data term. A thread has two."""
    clamp, strides = typed("fp32", "clamp_min clamp_max"), ("i32", "i32", "i32")
    masked = typed("*i1", "mask") | typed("*fp32", "known")
    everything = clamp | masked | typed("*fp32", "data_target data_term_weight factors")
    broadcast = masked | typed(strides, "mask_strides known_strides")
    bounded = typed("*fp32", "lower_bounds upper_bounds")
    bounded_by_channel = bounded | typed(strides, "lower_strides upper_strides")
    lying = typed(strides, "out_strides x_strides grad_strides")
    summed = typed("*fp32", "factors x grad data_target data_term_weight") | typed("*i64", "key")
    summed |= typed("i32", "elements pixels weight_rows") | typed("fp32", "norm_clip hinge")
    return [
        _step_example("plain", {}, {}, 2, 1),
        _step_example("clamped", clamp, {}, 2, 1),
        _step_example("clipped", clamp | typed("fp32", "grad_clip"), {}, 2, 1),
        _step_example("with bfloat16 gradient", clamp | typed("*bf16", "grad"), {}, 1, 1),
        _step_example("with float16 gradient", typed("*fp16", "grad"), {}, 1, 1),
        _step_example("of 4x4 images", clamp, {"QUADS": 4, "NUM_CHAINS": ROWS // 4}, 2, 1),
        _step_example("with a schedule for each chain", {}, {"PER_CHAIN": True, "LISTED": True}, 2, 1),
        _step_example("with everything", everything, {"NORM_CLIP": True}, 4, 1, data_term=4),
        _step_example("with a broadcast mask", broadcast, {"STRIDED": True}, 2, 1),
        _step_example("with bounds of each entry", bounded, {}, 4, 1),
        _step_example("with bounds of each channel", bounded_by_channel, {"STRIDED": True}, 2, 1),
        _step_example("channels last", lying, {"STRIDED": True}, None, None, shared=True),
        _step_example("of odd sizes", typed("i64", "elements"), {"WHOLE": False}, 0, 0, shared=True),
        _step_example("of odd sizes, channels last", lying, {"WHOLE": False, "STRIDED": True}, 0, 0, shared=True),
        LaunchExample("langevin_step factors", factors_kernel, summed, {"LANES": SUM_LANES}, WARPS, shared=True),
    ]
