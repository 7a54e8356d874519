"""Compile every Triton specimen for one GPU and print what its code shows, as JSON by name.

A program, run without the interpreter:

python -m tests.ops.compile_specimens 90
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastebm.ops.triton.specimens import Specimen, all_specimens

ALIGNED = [["tt.divisibility", 16]]


def compiled(specimen: Specimen, capability: int) -> Any:
    """The compiled kernel; `ptx` and `cubin` are in its `asm`."""
    names = specimen.kernel.arg_names
    signature = {name: specimen.signature.get(name, "constexpr") for name in names}
    constexprs = {
        (position,): specimen.constexprs.get(name)
        for position, name in enumerate(names)
        if name not in specimen.signature
    }
    attributes = {(position,): ALIGNED for position, name in enumerate(names) if str(signature[name]).startswith("*")}
    source = ASTSource(specimen.kernel, signature, constexprs, attributes)
    options = {"enable_fp_fusion": False, "num_warps": specimen.num_warps}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def registers(ptx: str) -> tuple[int | None, int | None]:
    """(registers, bytes spilled) by the assembler that comes with Triton, or by the one installed; None without one."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    architecture = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(bundled) if bundled.is_file() else "ptxas", "-v", f"-arch={architecture and architecture[1]}"]
        try:
            said = subprocess.run(
                [*command, file.name, "-o", "/dev/null"], capture_output=True, text=True, check=True
            ).stderr
        except (OSError, subprocess.CalledProcessError):
            return None, None
    used, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    return (int(used[1]), int(spilled[1])) if used and spilled else (None, None)


def shown(specimen: Specimen, capability: int) -> dict[str, Any]:
    """Counts in the PTX of one specimen."""
    kernel = compiled(specimen, capability)
    ptx = kernel.asm["ptx"]
    used, spilled = registers(ptx)
    patterns = {
        "fma": r"\bfma\.rn\.f32\b",
        "other_contractions": r"\b(?:mad|fma)\.(?!rn\.f32\b|(?:lo|hi|wide)\.)[\w.]*f(?:16|32|64)",
        "sqrt_rn": r"\bsqrt\.rn\.f32\b",
        "approximate": r"\.approx|\bdiv\.full|\.ftz",
        "divisions": r"\bdiv\.rn\.f32\b",
        "vector_loads": r"\bld\.global(?:\.\w+)*\.v4\.b32\b",
        "vector_stores": r"\bst\.global(?:\.\w+)*\.v4\.b32\b",
        "shared_accesses": r"\b(?:ld|st)\.shared\b",
    }
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in patterns.items()}
    return {**counts, "shared": kernel.metadata.shared, "registers": used, "spilled": spilled}


if __name__ == "__main__":
    print(json.dumps({specimen.name: shown(specimen, int(sys.argv[1])) for specimen in all_specimens()}))
