"""Builds csrc/cuda with the C++ compiler, as operators that check each access of their threads (checker.h)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastebm import build_extension

HERE = Path(__file__).parent


def unavailable_reason() -> str | None:
    """Why there is no host build here, or None: it needs what the CPU's operators need, on Linux, and from GCC."""
    if reason := build_extension.unavailable_reason():
        return reason
    if not sys.platform.startswith("linux"):
        return "the checker knows Linux alone"
    said = subprocess.run([*(build_extension.cpp_compiler() or ()), "--version"], capture_output=True, text=True).stdout
    return None if "Free Software Foundation" in said else f"the checker needs GCC, not {said.splitlines()[0]}"


WHY_NOT = unavailable_reason()

_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror")
# As for the CPU's own operators, a fused multiply-add stands only where it is written. Without -march=native each is a
# call.
_KERNEL_FLAGS = (
    "-Wshadow",  # of a member by a parameter of another width, too
    "-ffp-contract=off",
    "-march=native",
    "-Wno-unknown-pragmas",
    "-D__CUDACC__",
    "-D__CUDA_ARCH__=900",
    "-include",
    "cuda_runtime.h",
    "-I",
    str(HERE / "include"),
    "-I",
    str(build_extension.source_folder() / "cuda"),
    # The calls before each access; `build` links no sanitizer, so that they end in checker.cpp.
    "-fsanitize=thread,alignment,bounds,shift,signed-integer-overflow",
    "--param=tsan-instrument-func-entry-exit=0",
)


def build(folder: Path, sources: Sequence[Path]) -> Path:
    """A shared library from sources: `.cu` as kernels to be checked, `.cpp` as they are. Two are compiled at a time.

    Raises:
        RuntimeError: with what the compiler says.
    """
    from torch.utils.cpp_extension import include_paths, library_paths

    target = f"-DTORCH_TARGET_VERSION={build_extension.TORCH_TARGET_VERSION}"
    torch_headers = [flag for path in include_paths() for flag in ("-isystem", path)]

    def compiled(source: Path) -> str:
        object_file = str(folder / f"{source.stem}.o")
        kind = ["-x", "c++", *_KERNEL_FLAGS] if source.suffix == ".cu" else [target, "-DUSE_CUDA", *torch_headers]
        _run([*_FLAGS, *kind, "-c", str(source), "-o", object_file])
        return object_file

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*sources, HERE / "checker.cpp"]))
    library = folder / "host_build.so"
    paths = [f"-L{path}" for path in library_paths()]
    _run(["-shared", "-Wl,-z,defs", *objects, "-o", str(library), *paths, "-ltorch_cpu", "-lc10"])
    return library


def operators() -> list[Path]:
    """The sources of the CUDA operators, as they ship."""
    return [build_extension.source_folder() / name for name in build_extension.CUDA_SOURCES]


def _run(arguments: Sequence[str]) -> None:
    done = subprocess.run([*(build_extension.cpp_compiler() or ()), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
