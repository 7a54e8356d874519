"""Launches of the Triton kernels of BAOAB, OBABO and leapfrog, and what their machine code must show."""

from __future__ import annotations

from typing import Any

from fastebm.ops.langevin import SUM_LANES
from fastebm.ops.triton.philox import QUADS_A_THREAD, ROWS, WARPS
from fastebm.ops.triton.underdamped import SUM_QUADS, energy_kernel, kinetic_kernel, kinetic_work_kernel
from fastebm.ops.underdamped import BAOAB, LEAPFROG, OBABO

from . import LaunchExample, typed
from .normal import FUSED_OF_NORMALS

_SIGNATURE = (
    typed("*fp32", "x velocity grad schedule")
    | typed("*i64", "key chain_ids")
    | typed("i32", "batch elements schedule_rows")
)
_OFF = dict.fromkeys(("PER_CHAIN", "LISTED", "MASS_BY_CHAIN", "MASS_EACH"), False)
_PLAIN = _OFF | {"CLOSE": True, "OPEN": True, "WHOLE": True, "SCHEME": BAOAB}


def _step_example(
    name: str,
    types: dict[str, Any],
    options: dict[str, Any],
    noises: int,
    parts: int,
    loads: int = 3,
    stores: int = 2,
    **shows: Any,
) -> LaunchExample:
    """What a quad shows: noises, other parts of a fused multiply-add for each element, loads and stores."""
    constexprs = {**_PLAIN, "QUADS": ROWS, "NUM_CHAINS": 1, **options}
    of_thread = {"vector_loads": loads, "vector_stores": stores, "fused": noises * FUSED_OF_NORMALS + 4 * parts}
    shows |= {name: QUADS_A_THREAD * count for name, count in of_thread.items()}
    shows["approximate"] = noises > 0
    return LaunchExample(f"kinetic_step {name}", kinetic_kernel, _SIGNATURE | types, constexprs, WARPS, **shows)


def launch_examples() -> list[LaunchExample]:
    """An O step, a kick and a drift are a fused multiply-add of each element; an O step takes noise too.

    BAOAB's code has a drift of the whole step too, for where there is no friction.
    """
    mass, walls = typed("*fp32", "mass"), typed("fp32", "low high")
    each = {"MASS_EACH": True, "MASS_BY_CHAIN": True}
    everything = mass | walls
    per_chain = {"PER_CHAIN": True, "LISTED": True}
    work = typed("*fp64", "work")
    summed = {**_PLAIN, "QUADS": SUM_QUADS}
    energy = typed("*fp32", "velocity") | typed("*fp64", "out") | typed("i32", "elements")
    return [
        _step_example("of BAOAB", {}, {}, 1, 6),
        _step_example("of BAOAB that opens", {}, {"CLOSE": False}, 1, 5),
        _step_example("of BAOAB that closes", {}, {"OPEN": False}, 0, 1, loads=2, stores=1),
        _step_example("of OBABO", {}, {"SCHEME": OBABO}, 2, 5),
        _step_example("of leapfrog", {}, {"SCHEME": LEAPFROG}, 0, 3),
        _step_example("with bfloat16 gradient", typed("*bf16", "grad"), {}, 1, 6, loads=2),
        _step_example("of 4x4 images", {}, {"QUADS": 4, "NUM_CHAINS": ROWS // 4}, 1, 6),
        _step_example("with a schedule for each chain", {}, per_chain, 1, 6),
        _step_example("with everything", everything, each | per_chain | {"SCHEME": OBABO}, 2, 5, loads=4),
        _step_example("of odd sizes", typed("i64", "elements"), {"WHOLE": False}, 1, 6, loads=0, stores=0, shared=True),
        LaunchExample(
            "kinetic_step with work",
            kinetic_work_kernel,
            _SIGNATURE | work,
            summed | {"SCHEME": OBABO},
            WARPS,
            shared=True,
            approximate=True,
        ),
        LaunchExample(
            "kinetic_step with work and everything",
            kinetic_work_kernel,
            _SIGNATURE | work | everything,
            summed | each | per_chain | {"SCHEME": OBABO},
            WARPS,
            shared=True,
            approximate=True,
        ),
        LaunchExample(
            "kinetic_energy",
            energy_kernel,
            energy,
            {"MASS_BY_CHAIN": False, "MASS_EACH": False, "LANES": SUM_LANES},
            WARPS,
            shared=True,
        ),
        LaunchExample(
            "kinetic_energy with masses", energy_kernel, energy | mass, each | {"LANES": SUM_LANES}, WARPS, shared=True
        ),
    ]
