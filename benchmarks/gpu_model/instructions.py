"""Counts the machine instructions of the CUDA and Triton kernels, by kind, and how many there are for a quad of noise.

    python -m benchmarks.gpu_model.instructions --architecture 75 80 90 120
    python -m benchmarks.gpu_model.instructions --entry 'two quads a thread'            adds a column to the page
    python -m benchmarks.gpu_model.instructions --triton --architecture 80 90 120       those of Triton

nvcc compiles a source for one architecture, and nvdisasm (of the CUDA toolkit, or of Triton's wheel) lists its
instructions. A kernel is counted from its first instruction to its last EXIT, without the subroutines behind it that
ordinary values never reach. Each instruction counts once, whether or not it runs: the noise kernels have no loops.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import pages
from fastebm import build_extension

# The kernels that instructions may bound, by source: a name that a reader knows, and part of the mangled one.
KERNELS = {
    "cuda/langevin.cu": {
        "langevin_step, float32 gradient": r"plain_kernelIf",
        "langevin_step, bfloat16 gradient": r"plain_kernelI13__nv_bfloat16",
    },
    "cuda/normal.cu": {"normal, float32": r"fill_kernel.*NormalNoiseEfLb1"},
    "cuda/uniform.cu": {"uniform, float32": r"fill_kernel.*UniformNoiseEfLb1"},
}

# The same kernels in Triton, by the launch example that is compiled (tests/ops/launch_examples).
TRITON_KERNELS = {
    "langevin_step, float32 gradient": "langevin_step clamped",
    "langevin_step, bfloat16 gradient": "langevin_step with bfloat16 gradient",
    "normal, float32": "normal",
    "uniform, float32": "uniform",
}

# The first kind whose pattern an opcode begins with is its own.
KINDS = {
    "integer multiply": r"IMAD(\.WIDE|\.HI|$|\.U32$|\.SHL)",
    "move": r"MOV|IMAD\.MOV|IMAD\.IADD|IMAD\.X|HFMA2\.MMA|CS2R|UMOV|S2R|S2UR|R2UR|LDC|ULDC|PRMT",
    "float": r"FFMA|FADD|FMUL",
    "select": r"FSEL|SEL|FSETP|ISETP|FMNMX|IMNMX|VIMNMX|PLOP3|P2R|R2P",
    "conversion": r"I2F|F2I|F2F|I2I",
    "special": r"MUFU",
    "memory": r"LDG|STG|LDS|STS",
    "control": r"BRA|EXIT|BSSY|BSYNC|CALL|RET|WARPSYNC|NOP",
    "integer": r"",
}


@dataclass(frozen=True)
class Count:
    """Instructions of one thread of a kernel.

    Attributes:
        quads: how many quads the thread makes, as the source says (`kQuads`).
        kinds: instructions by kind.
    """

    kernel: str
    architecture: int
    quads: int
    kinds: dict[str, int]

    @property
    def instructions(self) -> int:
        return sum(self.kinds.values())

    def row(self) -> dict[str, object]:
        """What is written down of it."""
        a_quad = round(self.instructions / self.quads, 1)
        return {
            "kernel": self.kernel,
            "architecture": f"sm_{self.architecture}",
            "instructions a thread": self.instructions,
            "quads a thread": self.quads,
            "instructions a quad": a_quad,
            **self.kinds,
        }


def tool(name: str) -> str:
    """The path of one of NVIDIA's tools: from CUDA_HOME, the PATH, or the copy in Triton's wheel.

    Raises:
        FileNotFoundError: where it is in none of them.
    """
    found = shutil.which(name, path=os.path.join(os.environ.get("CUDA_HOME", os.devnull), "bin")) or shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which(name, path=str(Path(spec.origin).parent / "backends/nvidia/bin"))
    if found is None:
        raise FileNotFoundError(f"{name} was not found in CUDA_HOME, in the PATH or in Triton's wheel")
    return found


def disassembled(source: Path, architecture: int) -> dict[str, list[str]]:
    """Opcodes of each kernel of a CUDA source, by its mangled name."""
    flags = [*build_extension.NVCC_FLAGS, f"-arch=sm_{architecture}", "-I", str(build_extension.source_folder())]
    with tempfile.TemporaryDirectory() as folder:
        binary = f"{folder}/{source.stem}.cubin"
        subprocess.run([tool("nvcc"), *flags, "-cubin", str(source), "-o", binary], check=True, cwd=folder)
        return opcodes_of(Path(binary).read_bytes())


def opcodes_of(cubin: bytes) -> dict[str, list[str]]:
    """Opcodes of each kernel in machine code, by its mangled name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool("nvdisasm"), "-c", file.name], check=True, capture_output=True, text=True)
    return dict(_kernels(said.stdout))


def _kernels(listing: str) -> Iterator[tuple[str, list[str]]]:
    for section in re.split(r"^\.text\.", listing, flags=re.MULTILINE)[1:]:
        name, _, body = section.partition(":")
        body = re.split(r"^\$__internal", body, flags=re.MULTILINE)[0].split(".weak")[0]
        opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z][\w.]*)", body, flags=re.MULTILINE)
        last = max(i for i, opcode in enumerate(opcodes) if opcode == "EXIT")
        yield name, opcodes[: last + 1]


def nvcc_version() -> str:
    return subprocess.run([tool("nvcc"), "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[
        -1
    ]


def triton_version() -> str:
    return f"Triton {importlib.metadata.version('triton')}"


def kind_of(opcode: str) -> str:
    """The kind of one opcode."""
    return next(kind for kind, pattern in KINDS.items() if re.match(pattern, opcode))


def quads_of_a_thread() -> int:
    """`kQuads` of csrc/cuda/quads.h."""
    text = (build_extension.source_folder() / "cuda/quads.h").read_text()
    found = re.search(r"constexpr unsigned kQuads = (\d+);", text)
    return 1 if found is None else int(found[1])


def counts(architecture: int) -> list[Count]:
    """The counts of all `KERNELS` as their sources stand."""
    result = []
    for source, kernels in KERNELS.items():
        found = disassembled(build_extension.source_folder() / source, architecture)
        for kernel, pattern in kernels.items():
            for name in sorted(name for name in found if re.search(pattern, name)):
                kinds = Counter(map(kind_of, found[name]))
                result.append(Count(kernel, architecture, quads_of_a_thread(), {kind: kinds[kind] for kind in KINDS}))
    return result


def triton_counts(architecture: int) -> list[Count]:
    """The counts of all `TRITON_KERNELS`."""
    from fastebm.ops.triton.philox import ROWS, WARPS
    from tests.ops.compile_launch_examples import compiled
    from tests.ops.launch_examples import all_launch_examples

    examples = {example.name: example for example in all_launch_examples()}
    result = []
    for kernel, name in TRITON_KERNELS.items():
        (opcodes,) = opcodes_of(compiled(examples[name], architecture).asm["cubin"]).values()
        kinds = Counter(map(kind_of, opcodes))
        result.append(Count(kernel, architecture, ROWS // (32 * WARPS), {kind: kinds[kind] for kind in KINDS}))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the counts as a table, and writes them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", type=int, nargs="+", default=[90], help="compute capabilities, such as 90")
    parser.add_argument("--triton", action="store_true", help="count Triton's kernels in the place of CUDA's")
    parser.add_argument("--entry", default=None, help="a name for the rows in docs/results/gpu-model")
    given = parser.parse_args(arguments)
    counting = triton_counts if given.triton else counts
    rows = [count.row() for architecture in given.architecture for count in counting(architecture)]
    for row in rows:
        print("; ".join(f"{name} {value}" for name, value in row.items()))
    if given.entry is not None:
        entry = {"compiler": triton_version() if given.triton else nvcc_version(), "rows": rows}
        pages.add_entry(pages.RESULTS / "gpu-model", given.entry, entry, pages.PAGES["gpu-model"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
