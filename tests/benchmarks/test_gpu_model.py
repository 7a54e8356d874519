"""What is counted of GPU kernels: the reading of a listing, and the bounds that the sources must keep."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from benchmarks.gpu_model import instructions
from benchmarks.harness import pages

LISTING = """
\t.section\t.text._Z4moveIfE,"ax",@progbits
.text._Z4moveIfE:
.type           _Z4moveIfE,@function
_Z4moveIfE:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   IMAD.WIDE.U32 R4, R5, -0x2daee0ad, RZ ;
        /*0020*/               @P0 EXIT ;
        /*0030*/                   IMAD.MOV.U32 R2, RZ, RZ, 0x3e36a34f ;
.L_x_1:
        /*0040*/              @!P1 LDG.E.128 R4, desc[UR8][R6.64] ;
        /*0050*/                   FFMA R6, R24, R20, 1.5 ;
        /*0060*/                   EXIT ;
.weak           $__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath
$__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath:
        /*0070*/                   MUFU.RSQ R11, R8 ;
        /*0080*/                   RET.REL.NODEC R12 `(_Z4moveIfE) ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
"""


def test_a_kernel_ends_at_its_last_exit():
    ((name, opcodes),) = instructions._kernels(LISTING)
    assert name == "_Z4moveIfE"
    assert opcodes == ["LDC", "IMAD.WIDE.U32", "EXIT", "IMAD.MOV.U32", "LDG.E.128", "FFMA", "EXIT"]


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("IMAD", "integer multiply"),
        ("IMAD.WIDE.U32", "integer multiply"),
        ("IMAD.MOV.U32", "move"),
        ("IADD3.X", "integer"),
        ("LOP3.LUT", "integer"),
        ("FFMA", "float"),
        ("FSETP.GEU.AND", "select"),
        ("I2FP.F32.U32", "conversion"),
        ("MUFU.RSQ", "special"),
        ("STG.E.128", "memory"),
        ("BSYNC", "control"),
    ],
)
def test_kinds(opcode, kind):
    assert instructions.kind_of(opcode) == kind


def missing_tools() -> str | None:
    try:
        instructions.tool("nvcc"), instructions.tool("nvdisasm")
    except FileNotFoundError as error:
        return str(error)
    return None


@pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))
def test_noise_takes_no_more_instructions_than_it_did():
    """An H200 issues 331 while it moves the bytes of an update; docs/results/gpu-model has the counts."""
    a_quad = {count.kernel: count.instructions / count.quads for count in instructions.counts(90)}
    assert set(a_quad) == {name for kernels in instructions.KERNELS.values() for name in kernels}
    assert a_quad["langevin_step, float32 gradient"] <= 260
    assert a_quad["langevin_step, bfloat16 gradient"] <= 260
    assert a_quad["normal, float32"] <= 200
    assert a_quad["uniform, float32"] <= 100


triton_compiles = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"),
    reason="Triton is not installed, or its interpreter runs here, which compiles nothing",
)


@triton_compiles
def test_launches_are_those_of_the_page():
    from benchmarks.gpu_model import launches

    (entry,) = pages.read_entries(pages.RESULTS / launches.PAGE).values()
    net = "CF-EBM"
    assert launches.launches_of(net) == entry["nets"][net]
    assert [found["launches"] for found in entry["nets"][net].values()] == [38, 29, 29]


@triton_compiles
def test_noise_takes_no_more_instructions_in_triton():
    a_quad = {count.kernel: count.instructions / count.quads for count in instructions.triton_counts(90)}
    assert a_quad["langevin_step, float32 gradient"] <= 280
    assert a_quad["langevin_step, bfloat16 gradient"] <= 285
    assert a_quad["normal, float32"] <= 245
    assert a_quad["uniform, float32"] <= 150


@triton_compiles
def test_a_cascade_waits_for_the_compiler_once_a_program():
    """In a process of its own: what other tests asked for isn't compiled again."""
    command = [sys.executable, "-m", "benchmarks.gpu_model.compilation"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout.splitlines()
    rows = [dict(part.split() for part in line.split("; ")) for line in printed]
    assert [row["level"] for row in rows] == ["8", "16", "32"]
    # the program, and its size of the update
    assert all(int(row["waits"]) <= 2 < int(row["kernels"]) for row in rows)


def test_auto_takes_the_shorter_kernels():
    """`auto` takes CUDA before Triton; on the page, CUDA's newest state is the shorter one of every kernel."""
    entries = pages.read_entries(pages.RESULTS / "gpu-model")
    newest = {}
    for name, entry in entries.items():
        if "compiler" in entry and "not taken" not in name:
            language = "Triton" if entry["compiler"].startswith("Triton") else "CUDA"
            for row in entry["rows"]:
                newest[language, row["kernel"], row["architecture"]] = row
    compared = 0
    for (language, *kernel), row in newest.items():
        if language == "Triton":
            compared += 1
            assert newest["CUDA", *kernel]["instructions a quad"] < row["instructions a quad"]
    assert compared == 12
