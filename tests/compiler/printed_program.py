"""The tables of docs/how-it-works/compiler.md, from the energy that the page defines.

python -m tests.compiler.printed_program     fills them again
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.harness.pages import fill_section
from fastebm.compiler.autodiff import differentiate
from fastebm.compiler.capture import capture
from fastebm.compiler.cost_model import Machine, cost
from fastebm.compiler.lowering import lower
from fastebm.compiler.operations import Input, Reshape
from fastebm.compiler.program import Program
from fastebm.compiler.report import cells
from fastebm.compiler.rewrites import FORWARD, WITHOUT_POLYPHASE, rewritten
from fastebm.evaluation.speed.table import markdown_table
from fastebm.ops.activations import ACTIVATION_TABLE
from fastebm.ops.instructions import Epilogue, EpilogueOp, Instruction, Kind
from fastebm.ops.program import LoweredProgram

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-it-works" / "compiler.md"
BFLOAT16 = 2  # bytes


def energy_of(page: str) -> torch.nn.Module:
    """The energy that the page's program defines."""
    code = re.findall(r"^```py\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    made: dict[str, Callable[[], torch.nn.Module]] = {}
    exec("\n".join(code), made)
    return made["Energy"]().eval()


def sections(page: str) -> dict[str, str]:
    """The tables by the names of their marks."""
    energy = energy_of(page)
    machine = Machine(itemsize=BFLOAT16)
    program = capture(energy, energy, torch.zeros(2, 3, 32, 32))
    captured, steps = differentiate(program), [("captured", program)]
    steps += [(f"`{made.__module__.rpartition('.')[2]}`", p) for made, p in rewritten(program, machine, FORWARD)]
    steps.append(("differentiated", differentiate(steps[-1][1])))
    after = rewritten(steps[-1][1], machine, WITHOUT_POLYPHASE)
    steps += [(f"`{made.__module__.rpartition('.')[2]}`", p) for made, p in after]
    lowered = lower(steps[-1][1], BFLOAT16).program
    rows = [(name, str(len(p.nodes)), *spent(p)) for name, p in [*steps, ("as captured, differentiated", captured)]]
    return {
        "captured": operations(captured),
        "rewrites": markdown_table(("after", "operations", "MFLOP", "kB"), rows),
        "rewritten": operations(steps[-1][1]),
        "instructions": instructions(lowered),
    }


def spent(program: Program) -> tuple[str, str]:
    found = cost(program, BFLOAT16)
    return f"{found.flops / 1e6:.2f}", f"{found.bytes / 1e3:.0f}"


def operations(program: Program) -> str:
    """A row for each operation but the reshapes, whose results go by the names of their inputs."""
    behind: dict[str, str] = {}
    rows = []
    for node in program:
        if isinstance(node.operation, Reshape):
            behind[node.name] = behind.get(node.inputs[0], node.inputs[0])
        elif not isinstance(node.operation, Input):
            name, shape, operation, _, *numbers = cells(program, node, BFLOAT16)
            reads = ", ".join(f"`{behind.get(each, each)}`" for each in node.inputs)
            rows.append((f"`{name}`", shape, operation, reads, *numbers))
    return markdown_table(("result", "shape", "operation", "reads", "MFLOP", "kB"), rows, words=4)


def instructions(program: LoweredProgram) -> str:
    """A row for each instruction with its epilogue in words."""
    rows = [
        (str(at), computed(each), grid(each), "; ".join(words(program, program.epilogue(each))))
        for at, each in enumerate(program.instructions, 1)
    ]
    return markdown_table(("", "instruction", "channels x rows x columns", "epilogue"), rows, words=4)


def grid(found: Instruction) -> str:
    return f"{found.channels}x{found.height}x{found.width}"


def computed(found: Instruction) -> str:
    """What an instruction computes, of which buffer."""
    source = f" of buffer {found.source}" if found.source >= 0 else ""
    kernel = f"{found.kernel_y}x{found.kernel_x}"
    stride = f", stride {found.stride_y}" if found.stride_y > 1 else ""
    phase = f", pixels ({found.start_y}, {found.start_x}) of each 2x2" if found.step_y == 2 else ""
    name = {
        Kind.LOAD: "the samples" if found.source_channels else "a one",
        Kind.GATHER: f"copy{source}, each pixel {kernel} times",
        Kind.CONVOLUTION: f"convolution {kernel}{stride}{source}{phase}",
        Kind.POOL: f"sum over {kernel}{stride}{source}",
    }
    return name[Kind(found.kind)]


def words(program: LoweredProgram, epilogue: Sequence[Epilogue]) -> Iterator[str]:
    for step in epilogue:
        factor = f", each pixel {step.factor_y}x{step.factor_x} times" if step.factor_y > 1 else ""
        buffer, kind = f"buffer {step.buffer}", ACTIVATION_TABLE[step.activation].name
        yield {
            EpilogueOp.ADD_CONSTANT: "v + bias",
            EpilogueOp.MULTIPLY_CONSTANT: "v * constant",
            EpilogueOp.SCALE: "v * number",
            EpilogueOp.ADD: f"v + {'number * ' if step.number >= 0 else ''}{buffer}{factor}",
            EpilogueOp.MULTIPLY: f"v * {buffer}{factor}",
            EpilogueOp.ACTIVATE: f"{kind}(v)",
            EpilogueOp.ACTIVATE_KEEPING: f"{kind}(v), its derivative to {buffer}",
            EpilogueOp.SLOPE: f"v * {kind}'({buffer})",
            EpilogueOp.STORE: f"v to {buffer}",
            EpilogueOp.STORE_GRADIENT: "v to the gradient",
            EpilogueOp.STORE_ENERGIES: "v to the energies",
        }[EpilogueOp(step.op)]


def filled(page: str) -> str:
    """The page with its tables as the code has them."""
    for name, content in sections(page).items():
        page = fill_section(page, name, content)
    return page


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(filled(PAGE.read_text()))
