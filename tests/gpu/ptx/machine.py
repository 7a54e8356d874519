"""The machine that runs PTX on the CPU: built once a session by g++, driven through ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .assembler import Kind, PtxError, assemble

SOURCES = ("instructions.cpp", "machine.cpp", "machine.h", "memory.h")
# Instructions of warps that a launch may take. More than any test needs: it stops what doesn't end.
BUDGET = 10**9


class _Instruction(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "guard", "negated", "first", "count")),
        ("numbers", ctypes.c_int64 * 3),
    )


class _Function(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int32) for name in ("first", "registers", "parameters"))


def missing() -> str | None:
    """Why the machine can't be built here, None where it can."""
    return None if shutil.which("g++") else "there is no g++"


@functools.cache
def _library() -> ctypes.CDLL:
    here = Path(__file__).parent
    command = ["g++", "-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-shared", "-fPIC"]
    content = b"".join((here / name).read_bytes() for name in SOURCES) + " ".join(command).encode()
    folder = Path(tempfile.gettempdir()) / f"fastebm-ptx-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    built = folder / f"{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not built.exists():
        made = built.with_suffix(f".{os.getpid()}")
        sources = [str(here / name) for name in SOURCES if name.endswith(".cpp")]
        subprocess.run([*command, *sources, "-o", str(made)], check=True)
        made.replace(built)
    library = ctypes.CDLL(str(built))
    library.ptx_knows.argtypes = [ctypes.c_char_p]
    library.ptx_program.restype = ctypes.c_void_p
    library.ptx_free.argtypes = [ctypes.c_void_p]
    return library


class Kernel:
    """A kernel of a PTX module, ready to run.

    Raises:
        PtxError: naming an instruction that the machine doesn't have.
    """

    def __init__(self, text: str) -> None:
        self.assembly, library = assemble(text), _library()
        instructions, operands = self.assembly.instructions, list[int]()
        rows = (_Instruction * len(instructions))()
        for row, decoded in zip(rows, instructions, strict=True):
            if decoded.kind == Kind.PLAIN and not library.ptx_knows(decoded.name.encode()):
                raise PtxError(f"unknown instruction {decoded.name} in `{decoded.text}`")
            row.kind, row.guard, row.negated = decoded.kind, decoded.guard, decoded.negated
            row.first, row.count = len(operands), len(decoded.operands)
            row.numbers[: len(decoded.numbers)] = decoded.numbers
            operands += decoded.operands
        names = (ctypes.c_char_p * len(rows))(*(decoded.name.encode() for decoded in instructions))
        functions = [_Function(f.first, f.registers, f.parameters) for f in self.assembly.functions]
        self._program = ctypes.c_void_p(
            library.ptx_program(
                *(rows, names, len(rows), (ctypes.c_int32 * len(operands))(*operands), len(operands)),
                *((_Function * len(functions))(*functions), len(functions), len(self.assembly.constants)),
            )
        )

    def __del__(self) -> None:
        if hasattr(self, "_program"):
            _library().ptx_free(self._program)

    def run(
        self,
        grid: Sequence[int],
        warps: int,
        arguments: Sequence[int],
        tensors: Sequence[tuple[int, int]],
        shared: int = 0,
        seed: int = 0,
        budget: int = BUDGET,
    ) -> None:
        """One launch.

        Args:
            grid: blocks, at most three numbers.
            warps: of a block.
            arguments: bits of the kernel's first parameters; those behind them are 0.
            tensors: (address, bytes) of what it may touch; they may overlap.
            shared: bytes of a block's shared memory, beside what the text declares.
            seed: of the order of blocks and warps.

        Raises:
            PtxError: with the instruction and the thread that did what it must not.
        """
        assembly = self.assembly
        if len(arguments) > len(assembly.parameters):
            raise PtxError(f"{len(arguments)} arguments for {len(assembly.parameters)} parameters")
        constants = (ctypes.c_uint64 * len(assembly.constants))(*assembly.constants)
        constants[: len(arguments)] = [argument & (2**64 - 1) for argument in arguments]
        flat = [number for stretch in _merged(tensors) for number in stretch]
        message, where = ctypes.create_string_buffer(400), (ctypes.c_int32 * 5)()
        failed = _library().ptx_run(
            *(self._program, constants, (ctypes.c_uint64 * len(flat))(*flat), len(flat) // 2),
            *((ctypes.c_uint32 * 3)(*grid, *[1] * (3 - len(grid))), warps, ctypes.c_uint64(assembly.shared + shared)),
            *(ctypes.c_int64(budget), seed, message, len(message), where),
        )
        if failed:
            at, thread, *block = where
            text = assembly.instructions[at].text
            raise PtxError(f"{message.value.decode()}: thread {thread} of block {tuple(block)} at `{text}`")


def _merged(tensors: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Stretches that overlap become one."""
    found: list[tuple[int, int]] = []
    for start, size in sorted(tensors):
        if found and start < sum(found[-1]):
            first = found[-1][0]
            found[-1] = (first, max(sum(found[-1]), start + size) - first)
        elif size:
            found.append((start, size))
    return found
