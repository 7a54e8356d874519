"""What the code of a launch example shows that Triton compiles for a GPU that isn't there."""

from __future__ import annotations

import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.gpu.fake_driver import resources_of
from tests.ops.launch_examples import LaunchExample

ALIGNED = [["tt.divisibility", 16]]


def compiled(example: LaunchExample, capability: int) -> Any:
    """The compiled kernel; `ptx` and `cubin` are in its `asm`."""
    names = example.kernel.arg_names
    signature = {name: example.signature.get(name, "constexpr") for name in names}
    constexprs = {
        (position,): example.constexprs.get(name)
        for position, name in enumerate(names)
        if name not in example.signature
    }
    attributes = {key: ALIGNED for position, name in enumerate(names) for key in aligned((position,), signature[name])}
    source = ASTSource(example.kernel, {name: plain(kind) for name, kind in signature.items()}, constexprs, attributes)
    options = {"enable_fp_fusion": False, "num_warps": example.num_warps}
    if example.num_stages is not None:
        options["num_stages"] = example.num_stages
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def aligned(path: tuple[int, ...], kind: Any) -> list[tuple[int, ...]]:
    """The paths of pointers and of numbers marked as multiples of 16 ("i32:16"), also those within tuples."""
    if isinstance(kind, tuple):
        return [inner for i, part in enumerate(kind) for inner in aligned((*path, i), part)]
    return [path] if str(kind).startswith("*") or str(kind).endswith(":16") else []


def plain(kind: Any) -> Any:
    """A type without the mark."""
    return tuple(map(plain, kind)) if isinstance(kind, tuple) else kind.removesuffix(":16")


def shown(example: LaunchExample, capability: int) -> dict[str, Any]:
    """Counts in the PTX of one example."""
    kernel = compiled(example, capability)
    ptx = kernel.asm["ptx"]
    taken = resources_of(kernel.asm["cubin"])
    patterns = {
        "fma": r"\bfma\.rn\.f32\b",
        "fma_double": r"\bfma\.rn\.f64\b",
        "fma_pairs": r"\bfma\.rn\.f32x2\b",
        "other_contractions": r"\b(?:mad|fma)\.(?!rn\.f(?:32|64|32x2)\b|(?:lo|hi|wide)\.)[\w.]*f(?:16|32|64)",
        "sqrt_rn": r"\bsqrt\.rn\.f32\b",
        "approximate": r"\.approx|\bdiv\.full|\.ftz",
        "divisions": r"\bdiv\.rn\.f32\b",
        "vector_loads": r"\bld\.global(?:\.\w+)*\.v4\.b32\b",
        "vector_stores": r"\bst\.global(?:\.\w+)*\.v4\.b32\b",
        "shared_accesses": r"\b(?:ld|st)\.shared\b",
        "bf16": r"\b(?:wg)?mma\.[\w.:]*\.f32\.bf16\.bf16",
        "tf32": r"\b(?:wg)?mma\.[\w.:]*\.f32\.tf32\.tf32",
    }
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in patterns.items()}
    counts["fma"] += 2 * counts.pop("fma_pairs")  # from sm_100 on, an instruction may do two
    return {**counts, "shared": kernel.metadata.shared, "registers": taken.registers, "stack": taken.stack}
