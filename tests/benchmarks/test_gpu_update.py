"""The model of an update on a GPU: caches and shares that can be counted by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks.gpu_model import machine_code, update
from fastebm.ops.instructions import Buffer, Header, Instruction, Kind, Layout, PlannedProgram

NOTHING = machine_code.Section()


def convolution(size: int, rows: int, **window: int) -> tuple[Instruction, PlannedProgram, SimpleNamespace]:
    """A convolution of 64 channels of a square map to one as large, and a call with blocks of so many rows."""
    taps = window["kernel_y"]
    window |= {"kernel_x": taps, "pad_y": (taps - 1) // 2, "pad_x": (taps - 1) // 2}
    i = Instruction(Kind.CONVOLUTION, 0, source_channels=64, channels=64, height=size, width=size, **window)
    program = PlannedProgram(Header(Layout.PLAIN, 0, 2, 1, 0, 1), (Buffer(64, size, size, 2),), (i,), (), ())
    return i, program, SimpleNamespace(shape=SimpleNamespace(rows=rows, depth=64))


def work(**counts: int) -> update.Work:
    given = {"blocks": 1, "warps": 4, "registers": 32, "shared": 0, "stack": 0, **counts}
    return update.Work("a launch", code=machine_code.MachineCode(NOTHING, NOTHING, NOTHING), **given)


def test_taps_inside_leave_the_margin_out():
    i, program, _ = convolution(4, 16, kernel_y=3)
    assert update.taps_inside(i, program) == (3 * 4 - 2) ** 2


@pytest.mark.parametrize(("rows", "pixels"), [(16, 16), (8, 2 * 12), (32, 16)])
def test_a_large_cache_misses_each_pixel_of_a_block_once(rows, pixels):
    i, program, call = convolution(4, rows, kernel_y=3)
    assert update.missed_pixels(i, program, call, 1 << 20) == pixels


def test_a_cache_of_one_pixel_misses_all():
    i, program, call = convolution(4, 16, kernel_y=3)
    assert update.missed_pixels(i, program, call, 1) == update.taps_inside(i, program)


def test_memory_moves_what_the_cache_does_not_keep():
    """Three pages go round. A cache of three keeps them; one of two reads all anew, and writes one back."""
    page = 1 << 16
    touched = [[("workspace", n * page, (n + 1) * page, n == 0)] for n in range(3)]
    assert update.hbm_bytes(touched, 3 * page) == [0, 0, 0]
    assert update.hbm_bytes(touched, 2 * page) == [0, page, page + page]


def test_blocks_at_a_time():
    assert update.blocks_at_a_time(work(), update.H200) == 16  # 2,048 threads
    assert update.blocks_at_a_time(work(warps=8, registers=129), update.H200) == 1
    assert update.blocks_at_a_time(work(warps=8, registers=128, shared=98304), update.H200) == 2


def test_a_launch_takes_what_the_slowest_part_does():
    found = work(blocks=264, pointwise=11_000_000)
    assert update.times(found).longest == "l2"
    assert update.seconds(found) == pytest.approx(2e-6 + update.H200.launch)
    assert update.without([found], "l2") < 1e-6 + update.H200.launch


def test_sections_count_products_and_shared_memory():
    code = [
        ("HGMMA.64x128x16.F32.BF16", " R24, gdesc[UR4].tnspB, R24 "),
        ("HMMA.16816.F32.BF16", " R16, R24, R8, R16 "),
        ("LDSM.16.M88.4", " R24, [R3] "),
        ("LDS", " RZ, [RZ] "),
        ("MUFU.RCP", " R2, R2 "),
        ("LDGSTS.E.128", " [R61], desc[UR16][R28.64] "),
    ]
    found = machine_code._section(code)
    assert (found.instructions, found.special, found.warpgroup, found.cached) == (6, 1, True, True)
    assert found.flops == 2 * 64 * 128 * 16 // 4 + 2 * 16 * 8 * 16
    assert found.shared == (64 + 128) * 16 * 2 / 4 + 512
