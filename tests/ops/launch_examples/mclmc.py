"""Launches of the Triton kernel of the microcanonical Langevin step, and what their machine code must show."""

from __future__ import annotations

from typing import Any

from fastebm.ops.triton.mclmc import _NUMBERS, mclmc_kernel, tile_of_chains

from . import LaunchExample, typed
from .normal import FUSED_OF_NORMALS


def _example(name: str, elements: int, types: dict[str, Any], options: dict[str, Any], **shows: Any) -> LaunchExample:
    chains, lanes, warps = tile_of_chains(10**6, elements)
    signature = typed("*fp32", "x momentum grad") | typed("*fp64", "work coefficients") | typed("*i64", "key chain_ids")
    signature |= typed("i32", " ".join(_NUMBERS))
    plain = dict.fromkeys(("MASS_OF_ELEMENT", "PER_CHAIN", "LISTED"), False) | {"WHOLE": elements % 4 == 0}
    constexprs = {**plain, "CHAINS": chains, "LANES": lanes, "FOLDS": lanes.bit_length() - 1, **options}
    # Triton 3.6 folds 1024 lanes of float64 at once.
    shows = {
        "fused": 2 * FUSED_OF_NORMALS + 4,
        "fused_double": 100,
        "approximate": True,
        "shared": True,
        "most_shared": 8192,
        **shows,
    }
    return LaunchExample(f"mclmc_step {name}", mclmc_kernel, signature | types, constexprs, warps, **shows)


def launch_examples() -> list[LaunchExample]:
    """A quad: noise twice, and a fused multiply-add of each element. In float64, 8 of each element, 31 for
    each of 2 kicks, and those of a refresh; with many small chains, a thread has several of them. On sm_80, Triton 3.6
    spills eight registers of a mass of each element."""
    mass, images = typed("*fp32", "inverse_mass"), {"vector_loads": 5, "vector_stores": 2}
    many, several = {"PER_CHAIN": True, "LISTED": True}, (100, 304)
    return [
        _example("of images", 3072, {}, {}, **images),
        _example("of two dimensions", 2, {}, many, vector_loads=0, vector_stores=0, fused_double=several),
        _example("of ten dimensions", 10, {}, many, vector_loads=0, vector_stores=0, fused_double=several),
        _example("with bfloat16 gradient", 3072, typed("*bf16", "grad"), {}, vector_loads=3, vector_stores=2),
        _example("with a mass of each element", 3072, mass, {"MASS_OF_ELEMENT": True}, most_spilled=32, **images),
        _example("with a mass of each chain", 100, mass, {}, **images),
    ]
