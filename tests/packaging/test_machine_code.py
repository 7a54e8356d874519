"""A library that was compiled on a new processor runs on an older one: its machine code is read."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.packaging.machine_code import disassembly, level, read, variant


@pytest.fixture
def objdump() -> str:
    found = shutil.which("objdump")
    if found is None:
        pytest.skip("objdump is not installed: the machine code can't be read")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{platform.machine()} has no AVX variants")
    return found


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        ("f3 0f 59 c8", "mulss  %xmm0,%xmm1", "baseline"),
        ("0f 00 e0", "verr   %ax", "baseline"),
        ("f3 0f bc c0", "tzcnt  %eax,%eax", "baseline"),
        ("f0 0f c1 02", "lock xadd %eax,(%rdx)", "baseline"),
        ("c5 fc 59 d0", "vmulps %ymm0,%ymm0,%ymm2", "avx2"),
        ("c5 f8 77", "vzeroupper", "avx2"),
        ("64 c5 fa 10 00", "vmovss %fs:(%rax),%xmm0", "avx2"),
        ("62 f1 7c 48 59 d0", "vmulps %zmm0,%zmm0,%zmm2", "avx512"),
        ("62 f1 7c 08 59 d0", "{evex} vmulps %xmm0,%xmm0,%xmm2", "avx512"),
        ("c5 f8 92 c8", "kmovw  %eax,%k1", "avx512"),
        ("62 f2 7e 48 52 c0", "vdpbf16ps %zmm0,%zmm0,%zmm0", "avx512_bf16"),
        ("c4 e2 78 49 c0", "tilerelease", "amx"),
        ("c4 e2 72 5c c2", "tdpbf16ps %tmm1,%tmm2,%tmm0", "amx"),
        ("c4 e2 f9 f7 d8", "shlx   %rax,%rax,%rbx", "shlx, which is of BMI"),
        ("f3 0f b8 c0", "popcnt %eax,%eax", "popcnt, which is later than SSE2"),
        ("66 0f 38 40 c1", "pmulld %xmm1,%xmm0", "pmulld, which is later than SSE2"),
        ("62 f2 7d 48 50 c0", "vpdpbusd %zmm0,%zmm0,%zmm0", "vpdpbusd, which no variant asks for"),
    ],
    ids=lambda value: value.split()[0] if " " in value else value,
)
def test_levels(code: str, text: str, expected: str) -> None:
    assert level(code, text) == expected


def test_variants_are_told_by_name() -> None:
    assert variant("fastebm::avx2::run(fastebm::LaneProgram const&, float*, long)") == "avx2"
    assert variant("void fastebm::(anonymous namespace)::scale_avx512<float>(float*) [clone .cold]") == "avx512"
    assert variant("fastebm::execute_avx512_bf16(fastebm::Worker const&)") == "avx512_bf16"
    assert variant("fastebm::weight_kernels_amx()") == "amx"
    assert variant("void std::sort<float*>(float*, float*)") == "baseline"
    assert variant("_GLOBAL__sub_I_program_avx512.cpp") == "baseline"
    assert variant("both(fastebm::avx2::Block const&, fastebm::amx::Block const&)") == "baseline"


def test_wide_instructions_stay_in_their_variants(objdump: str) -> None:
    """Read from the optimised extension that is installed here: what the optimiser inlines is the point."""
    found = importlib.util.find_spec("fastebm._C")
    if found is None or found.origin is None:
        pytest.skip("the compiled operators are not built here")
    count, faults = read(disassembly(objdump, Path(found.origin)).splitlines())
    assert {"baseline", "avx2", "avx512", "avx512_bf16", "amx"} <= count.keys(), f"a variant is missing: {count}"
    assert not faults, f"these would crash on an older processor: {faults}"


# What must not happen, in small: a static initialiser that calls a variant, and a template of the standard library that
# is read under the target, whose instances all other files would share.
HAZARDS = """
#include <cstdlib>
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include <algorithm>
namespace avx2 {
void add(float* x, int n) { for (int i = 0; i < n; ++i) x[i] += 1; }
void order(float* x, int n) { std::sort(x, x + n); }
static float table[64];
static const bool filled = [] { for (float& value : table) value = std::atoi("3"); return true; }();
float first() { return table[filled]; }
}
#pragma GCC pop_options
"""


def test_hazards_are_found(objdump: str, tmp_path: Path) -> None:
    compiler = next((path for name in ("g++", "c++") if (path := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no g++ on this machine")
    (tmp_path / "hazards.cpp").write_text(HAZARDS)
    command = [compiler, "-std=c++20", "-O3", "-fPIC", "-shared", "-o", "hazards.so", "hazards.cpp"]
    subprocess.run(command, cwd=tmp_path, check=True)
    count, faults = read(disassembly(objdump, tmp_path / "hazards.so").splitlines())
    assert count["avx2"] > 10
    assert any(symbol.startswith("_GLOBAL__sub_I_") for symbol in faults), "the static initialiser"
    assert any("std::" in symbol for symbol in faults), "instances of std::sort"
    assert not any(symbol.startswith("avx2::") for symbol in faults)
