"""Every CUDA kernel compiles where nvcc is installed (no GPU is needed), without spills or unwritten contractions."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastebm import build_extension as build

SOURCES = build.source_folder()
KERNELS = [name for name in build.CUDA_SOURCES if name.endswith(".cu")]
NVCC = shutil.which(
    "nvcc",
    path=os.pathsep.join(filter(None, [os.path.join(os.environ.get("CUDA_HOME", ""), "bin"), os.environ.get("PATH")])),
)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
# Kernels in CUDA are the same whatever Triton does.
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"), reason="done without it")
CAPABILITIES = (75, 80, 90)


@dataclass(frozen=True)
class Compiled:
    """What the compiler said of one file, and its PTX by kernel (mangled name) and capability."""

    said: str
    ptx: dict[tuple[int, str], str]


def compiled(name: str, folder: Path) -> Compiled:
    folder.mkdir()
    code = [f"-gencode=arch=compute_{c},code=sm_{c}" for c in CAPABILITIES]
    command = [
        str(NVCC),
        *build.NVCC_FLAGS,
        *code,
        "-Xptxas",
        "-v",
        "-I",
        str(SOURCES),
        "--keep",
        "--keep-dir",
        str(folder),
    ]
    done = subprocess.run(
        [*command, "-c", str(SOURCES / name), "-o", str(folder / "object.o")],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    kernels = {}
    for capability in CAPABILITIES:
        (file,) = folder.glob(f"*compute_{capability}*.ptx")
        for body in file.read_text().split(".entry ")[1:]:
            kernels[capability, body.split("(")[0]] = body
    return Compiled(done.stderr, kernels)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    """Every file, two at a time."""
    folder = tmp_path_factory.mktemp("cuda")
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda name: compiled(name, folder / Path(name).stem), KERNELS)
        return dict(zip(KERNELS, done, strict=True))


@needs_nvcc
@pytest.mark.parametrize("name", KERNELS)
def test_nothing_spills(results, name):
    said = results[name].said
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert spills
    assert set(spills) == {("0", "0")}, said
    assert "warning" not in said, said


@needs_nvcc
@pytest.mark.parametrize("name", KERNELS)
def test_nothing_is_approximate_or_contracted(results, name):
    for kernel, ptx in results[name].ptx.items():
        ptx = ptx.replace(
            "rsqrt.approx.ftz.f32", ""
        )  # where a rounded root begins; test_code_is_as_written counts them
        assert not re.findall(r"\.approx|\.ftz|\bdiv\.full", ptx), kernel
        assert not re.findall(r"\bmad\.(?:rn|rz|f32)", ptx), kernel


# (file, part of the kernel's name, fused multiply-adds, roots, 16-byte loads, 16-byte stores). A thread makes two
# quads. A quad of normals is 46 fused multiply-adds: 4 numbers from words of one, 2 logarithms of 9, 2 pairs of sine
# and cosine of 7, 2 roots of 5. Its update is 8 more.
WRITTEN = [
    ("cuda/normal.cu", r"fill_kernel.*NormalNoiseEfLb1", 2 * 46, 4, 0, 2),
    ("cuda/uniform.cu", r"fill_kernel.*UniformNoiseEfLb1", 2 * 4, 0, 0, 2),
    ("cuda/langevin.cu", r"plain_kernelIf", 2 * 54, 4, 4, 2),
    ("cuda/langevin.cu", r"plain_kernelI13__nv_bfloat16", 2 * 54, 4, 2, 2),
    ("cuda/expand_blend.cu", r"\dblend_kernelIfLi4", 4, 0, 2, 1),
    ("cuda/expand_blend.cu", r"\dblend_kernelI13__nv_bfloat16Li8", 8, 0, 2, 1),
]


@needs_nvcc
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("name", "kernel", "fused", "roots", "loads", "stores"), WRITTEN)
def test_code_is_as_written(results, capability, name, kernel, fused, roots, loads, stores):
    (ptx,) = [
        body for (c, mangled), body in results[name].ptx.items() if c == capability and re.search(kernel, mangled)
    ]
    assert len(re.findall(r"\bfma\.rn\.f32\b", ptx)) == fused
    assert len(re.findall(r"\brsqrt\.approx\.ftz\.f32\b", ptx)) == roots
    assert "sqrt.rn" not in ptx
    assert len(re.findall(r"\bld\.global(?:\.\w+)*\.v4\.[bfu]32\b", ptx)) == loads
    assert len(re.findall(r"\bst\.global(?:\.\w+)*\.v4\.[bfu]32\b", ptx)) == stores
    assert ".shared" not in ptx


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


LAUNCH = """
#include "cuda/normal.cu"
extern "C" const char* launched() {
  fastebm::cuda::FillArguments fill{};
  fill.batch = 1, fill.elements = 4;
  return fastebm::cuda::launch_normal(fill, nullptr);
}
"""


@needs_nvcc
@pytest.mark.skipif(has_driver(), reason="there is a driver, which would launch it")
def test_a_launch_that_fails_says_why(tmp_path):
    """The compiled launcher and CUDA's own runtime, on a machine without a GPU."""
    source, library = tmp_path / "launch.cu", tmp_path / "launch.so"
    source.write_text(LAUNCH)
    flags = [*build.NVCC_FLAGS, "-arch=sm_90", "-shared", "-Xcompiler", "-fPIC", "-I", str(SOURCES)]
    subprocess.run([str(NVCC), *flags, str(source), "-o", str(library)], check=True, cwd=tmp_path)
    launched = ctypes.CDLL(str(library)).launched
    launched.restype = ctypes.c_char_p
    assert b"CUDA" in launched()


@pytest.mark.skipif(build.cpp_compiler() is None, reason="no C++ compiler is installed")
def test_registration_compiles(tmp_path):
    """The file that knows torch needs no CUDA header, so that any C++ compiler shows whether it is right."""
    from torch.utils.cpp_extension import include_paths

    includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    command = [
        *(build.cpp_compiler() or ()),
        *build.CPP_FLAGS,
        "-DUSE_CUDA",
        *includes,
        "-I",
        str(SOURCES),
        "-fsyntax-only",
        "-Wall",
        "-Wextra",
    ]
    done = subprocess.run([*command, str(SOURCES / "cuda/register.cpp")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr


def test_torch_has_what_registration_asks_of_it():
    """The stable calls that register.cpp makes exist in the headers of this torch."""
    headers = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    text = (headers / "inductor" / "aoti_torch" / "c" / "shim.h").read_text() + (
        headers / "stable" / "accelerator.h"
    ).read_text()
    for name in ("aoti_torch_get_current_cuda_stream", "class DeviceGuard"):
        assert name in text
