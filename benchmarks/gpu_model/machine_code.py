"""What a compiled kernel's machine code does before, in and behind its loop: instructions, products, shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache

from benchmarks.gpu_model.instructions import tool

# Bytes that one instruction of a warp reads from or writes to shared memory, by its width.
_WIDTHS = {"128": 512, "64": 256}


@dataclass(frozen=True)
class Section:
    """A run of machine code, as one warp carries it out once.

    Attributes:
        instructions: how many.
        special: those of the unit for exponentials, reciprocals and roots (MUFU).
        flops: of products on the tensor cores, for one warp.
        warpgroup: whether the products are those of a warpgroup (wgmma).
        shared: bytes of shared memory for one warp, but those that asynchronous copies write.
        cached: whether some asynchronous copies come through the L1 cache.
    """

    instructions: int = 0
    special: int = 0
    flops: int = 0
    warpgroup: bool = False
    shared: float = 0.0
    cached: bool = False


@dataclass(frozen=True)
class MachineCode:
    """The parts of a kernel. Without a loop all is `after`, with `unrolled` instructions until its last product."""

    before: Section
    loop: Section
    after: Section
    unrolled: int = 0


@cache
def read_machine_code(cubin: bytes) -> MachineCode:
    """The parts of Triton's kernel: its one loop is the longest run that a branch leads back over.

    Subroutines behind the last EXIT, which ordinary values never reach, are left out.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool("nvdisasm"), "-c", file.name], check=True, capture_output=True, text=True)
    lines = re.findall(
        r"^(\.L_x_\d+):|^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", listing.stdout, flags=re.M
    )
    labels: dict[str, int] = {}
    code: list[tuple[str, str]] = []
    loop = (0, 0)
    for label, opcode, operands in lines:
        if label:
            labels[label] = len(code)
            continue
        code.append((opcode, operands))
        target = re.search(r"\.L_x_\d+", operands)
        if opcode == "BRA" and target is not None and target[0] in labels:
            loop = max(loop, (labels[target[0]], len(code)), key=lambda found: found[1] - found[0])
    last = max(number for number, (opcode, _) in enumerate(code) if opcode == "EXIT") + 1
    begin, end = loop if loop[1] - loop[0] > 2 else (0, 0)
    products = [number for number, (opcode, _) in enumerate(code[:last]) if opcode.startswith(("HGMMA", "HMMA"))]
    unrolled = 0 if end or not products else products[-1] + 1
    return MachineCode(*(_section(part) for part in (code[:begin], code[begin:end], code[end:last])), unrolled)


def _section(code: list[tuple[str, str]]) -> Section:
    flops, shared, warpgroup = 0, 0.0, False
    for opcode, operands in code:
        if opcode.startswith(("LDS", "STS")) and "RZ, [RZ]" not in operands:
            width = re.search(r"\.(128|64)\b", opcode)
            shared += 512 if opcode.startswith("LDSM") else _WIDTHS[width[1]] if width else 128
        elif product := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
            rows, columns, inner = map(int, product.groups())
            size = 4 if "TF32" in opcode else 2
            warpgroup = True
            flops += 2 * rows * columns * inner // 4
            # Of the operands, B is always read from shared memory, A unless it is in registers.
            shared += (columns + rows * (re.match(r"\s*R\d+, gdesc", operands) is not None)) * inner * size / 4
        elif product := re.match(r"HMMA\.168(\d+)", opcode):
            flops += 2 * 16 * 8 * int(product[1])
    special = sum(opcode.startswith("MUFU") for opcode, _ in code)
    cached = any(opcode.startswith("LDGSTS") and "BYPASS" not in opcode for opcode, _ in code)
    return Section(len(code), special, flops, warpgroup, shared, cached)
