"""The build list of the compiled operators: one for `setup.py` and for `fastebm build`.

This file imports neither the package nor torch at its top, because `setup.py` loads it by its path before either may
exist.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from setuptools import Extension

PACKAGE = Path(__file__).resolve().parent

# Extensions use torch's stable headers only, so that one build serves this version of torch and every later one.
TORCH_MINIMUM = "2.11"
TORCH_TARGET_VERSION = "0x020b000000000000"

CPP_SOURCES = (
    "module.cpp",
    "cpu/variants.cpp",
    "cpu/normal.cpp",
    "cpu/uniform.cpp",
    "cpu/langevin.cpp",
    "cpu/underdamped.cpp",
    "cpu/mala.cpp",
    "cpu/mclmc.cpp",
    "cpu/block_tail.cpp",
    "cpu/expand_blend.cpp",
    "cpu/program.cpp",
    "cpu/program_check.cpp",
    "cpu/chain.cpp",
    "cpu/program_baseline.cpp",
    "cpu/program_avx2.cpp",
    "cpu/program_avx512.cpp",
    "cpu/program_avx512_bf16.cpp",
    "cpu/program_amx.cpp",
    "cpu/weight_gradients.cpp",
    "cpu/weight_gradients_baseline.cpp",
    "cpu/weight_gradients_avx2.cpp",
    "cpu/weight_gradients_avx512.cpp",
    "cpu/weight_gradients_amx.cpp",
    "cpu/lanes.cpp",
    "cpu/lane_samplers.cpp",
    "cpu/lanes_check.cpp",
    "cpu/lanes_baseline.cpp",
    "cpu/lanes_avx2.cpp",
    "cpu/lanes_avx512.cpp",
)
CUDA_SOURCES = (
    "cuda/register.cpp",
    "cuda/normal.cu",
    "cuda/uniform.cu",
    "cuda/langevin.cu",
    "cuda/block_tail.cu",
    "cuda/expand_blend.cu",
)

# -ffp-contract=off: a fused multiply-add stands only where it is written, which bit-identity across compilers rests on.
# The next two let the compiler vectorise square roots and selections; neither changes a result.
# No -march: wide instructions are chosen at run time, function by function, so that a build runs on older CPUs.
CPP_FLAGS = (
    "-std=c++20",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",  # Python's own default flags ask for debug information, which makes a library of 1 MB one of 7
    "-Wno-uninitialized",  # GCC 12 warns about its own AVX-512 header
    "-Wno-maybe-uninitialized",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    f'-DFASTEBM_TORCH_TARGET="{TORCH_MINIMUM}"',
)
# FASTEBM_SANITIZE=1, which `make sanitize` sets: errors in memory and undefined behaviour end the process, and matrix
# units are emulated, so that the kernels for them run on any CPU with AVX512-BF16.
SANITIZE_FLAGS = (
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize=alignment,vptr",  # kernels read vectors that begin anywhere; pybind11 has no type information
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-DFASTEBM_EMULATE_TILES",
)
NVCC_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fmad=false",
    "-prec-sqrt=true",
    "-prec-div=true",
    "-ftz=false",
    "--expt-relaxed-constexpr",
)
# 7.5 is the oldest that CUDA 13 compiles for; the PTX serves GPUs that are newer than this list.
CUDA_ARCHITECTURES = "7.5;8.0;9.0+PTX"


def source_folder() -> Path:
    """The folder of the C++ and CUDA sources: inside an installed package, or beside it in a checkout."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "module.cpp").is_file():
            return folder
    raise RuntimeError(f"fastebm's C++ sources were not found in {PACKAGE / 'csrc'} or {PACKAGE.parent / 'csrc'}")


def cpp_compiler() -> list[str] | None:
    """The words of the C++ compiler that is used, or None where there is none.

    They are those of `CXX` as a shell splits them ("ccache g++"), else c++ or g++.

    Raises:
        ValueError: for a `CXX` that can't be split.
    """
    asked = shlex.split(os.environ.get("CXX") or "")
    candidates = [asked] if asked else [["c++"], ["g++"]]
    return next((words for words in candidates if shutil.which(words[0])), None)


def _compiler_missing() -> str | None:
    """Why there is no C++ compiler that runs, or None."""
    asked = os.environ.get("CXX") or ""
    try:
        words = cpp_compiler()
    except ValueError as error:
        return f"CXX={asked} can't be split into words: {error}"
    if words is None:
        looked = f"CXX={asked}" if asked.strip() else "looked for c++ and g++; CXX=clang++ takes another"
        return f"no C++ compiler was found ({looked})"
    try:
        # A wrapper's first word may be there and the compiler behind it not.
        subprocess.run([*words, "-dumpversion"], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"the C++ compiler {shlex.join(words)} does not run: {error}"
    return None


def unavailable_reason() -> str | None:
    """Why the compiled operators can't be built here, or None when they can."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a torch whose libraries are broken
        return f"torch can't be imported by the Python that builds ({sys.executable}): {error}"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < tuple(int(part) for part in TORCH_MINIMUM.split(".")):
        return f"torch {torch.__version__} is older than {TORCH_MINIMUM}"
    return _compiler_missing()


def cuda_unavailable_reason() -> str | None:
    """Why the CUDA operators can't be built here, or None when they can."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    nvcc = Path(CUDA_HOME or "") / "bin" / "nvcc"
    if CUDA_HOME is None or not nvcc.is_file():
        return "no CUDA toolkit (nvcc) was found"
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", said)
    if release is None or release.group(1) != torch.version.cuda.split(".")[0]:
        found = release.group(1) if release else "unknown"
        return f"the CUDA toolkit's major version is {found}, torch {torch.__version__} wants {torch.version.cuda}"
    return None


def extensions() -> list[Extension]:
    """The extension modules that can be built here. Needs torch; see `unavailable_reason`."""
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    # torch and setuptools look for a compiler in ways of their own; this says the one that was found.
    os.environ["CXX"] = shlex.join(cpp_compiler() or ["c++"])
    # Paths of the machine that builds have no place in a library, nor in the messages of its checks.
    torch_folder = Path(torch.__file__).parent
    prefixes = (f"-ffile-prefix-map={source_folder()}=csrc", f"-ffile-prefix-map={torch_folder}=torch")
    # setuptools wants paths relative to the project when it builds a distribution; `fastebm build` has only absolute
    # ones.
    folder = source_folder()
    if folder.parent == Path.cwd():
        folder = Path(folder.name)
    checks = SANITIZE_FLAGS if os.environ.get("FASTEBM_SANITIZE") == "1" else ()
    built = [
        CppExtension(
            "fastebm._C",
            [str(folder / name) for name in CPP_SOURCES],
            include_dirs=[str(source_folder())],
            extra_compile_args={"cxx": [*CPP_FLAGS, *prefixes, *checks]},
            extra_link_args=[flag for flag in checks if flag.startswith("-fsanitize")],
        )
    ]
    if cuda_unavailable_reason() is None:
        # The library says what it was built for, which fastebm/ops/backends.py compares with the GPU.
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
        images = os.environ["TORCH_CUDA_ARCH_LIST"] = " ".join(asked or CUDA_ARCHITECTURES.split(";"))
        built.append(
            CUDAExtension(
                "fastebm._cuda",
                [str(folder / name) for name in CUDA_SOURCES],
                include_dirs=[str(source_folder())],
                extra_compile_args={
                    "cxx": [*CPP_FLAGS, *prefixes, "-DUSE_CUDA", f'-DFASTEBM_CUDA_IMAGES="{images}"'],
                    "nvcc": list(NVCC_FLAGS),
                },
            )
        )
    return built


def command_class() -> dict[str, Any]:
    """setuptools' `cmdclass` that compiles `extensions()`."""
    from torch.utils.cpp_extension import BuildExtension

    # torch hands ninja a compiler of several words as one; setuptools alone splits it, and compiles file by file.
    use_ninja = shutil.which("ninja") is not None and len(cpp_compiler() or ()) == 1
    return {"build_ext": BuildExtension.with_options(use_ninja=use_ninja)}


def build(verbose: bool = False) -> list[Path]:
    """Compile the operators and put them into this installation of the package; returns the files written.

    The libraries are built in a temporary folder and renamed into place, so that a failed build leaves what was there.

    What compilers print is shown where `verbose`, and where they fail.

    Raises:
        RuntimeError: where `unavailable_reason()` gives a reason, the compiler fails, or the folder can't be written.
    """
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"the compiled operators can't be built: {reason}")
    if not os.access(PACKAGE, os.W_OK):
        raise RuntimeError(f"the compiled operators can't be put into {PACKAGE}: the folder is not writable")
    from setuptools import Distribution

    with tempfile.TemporaryDirectory(prefix="fastebm-build-") as scratch:
        distribution = Distribution({"name": "fastebm", "ext_modules": extensions(), "cmdclass": command_class()})
        distribution.verbose = verbose  # type: ignore[attr-defined]
        command = distribution.get_command_obj("build_ext")
        command.build_lib = str(Path(scratch) / "lib")  # type: ignore[attr-defined]
        command.build_temp = str(Path(scratch) / "temp")  # type: ignore[attr-defined]
        log = Path(scratch) / "log"
        try:
            command.ensure_finalized()
            with contextlib.nullcontext() if verbose else _output_in(log):
                command.run()
        except Exception as error:
            if log.is_file():
                print(log.read_text(errors="replace")[-10000:], file=sys.stderr)
            raise RuntimeError(f"compiling fastebm's operators failed: {error}") from error
        try:
            return [_put_in_place(library) for library in sorted((Path(scratch) / "lib" / "fastebm").iterdir())]
        except OSError as error:
            raise RuntimeError(f"the compiled operators can't be put into {PACKAGE}: {error}") from error


@contextlib.contextmanager
def _output_in(log: Path) -> Iterator[None]:
    """What this process and those that it starts print goes into a file: commands of the build are many and long."""
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    kept = [os.dup(number) for number in (1, 2)]
    try:
        with open(log, "wb") as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
        yield
    finally:
        for stream in streams:
            stream.flush()
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)


def _put_in_place(library: Path) -> Path:
    """The library's new place in the package.

    The copy crosses file systems; the rename then is atomic, and a process that has the old library open keeps it.
    """
    target = PACKAGE / library.name
    waiting = target.with_name(target.name + f".{os.getpid()}.new")
    try:
        shutil.copy2(library, waiting)
        os.replace(waiting, target)
    finally:
        waiting.unlink(missing_ok=True)
    return target
