"""How near the products of a program come to the machine's peak: `python -m benchmarks.studies.breakdown`.

Measures gradients of nets at batch 64 in bfloat16: the whole program, the same with stores as its only epilogues
(matrix products alone, whose results mean nothing), and a square matrix product of SIDE, interleaved in one process.
The entry of this kind of machine in docs/results/speed/breakdown.json is replaced.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fastebm
from benchmarks.harness import nets
from benchmarks.harness.pages import RESULTS
from fastebm.compiler import energy_gradient
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.evaluation.speed.measurement import interleaved
from fastebm.ops.instructions import EpilogueOp, Kind, PlannedProgram, decode, encode
from fastebm.runs.files import write_json

NETS = {"CF-EBM": (3, 32, 32), "IGEBM-like residual": (3, 32, 32), "wide residual 28-2": (3, 32, 32)}
SIDE = 2048
STORES = (EpilogueOp.STORE, EpilogueOp.STORE_GRADIENT, EpilogueOp.STORE_ENERGIES)


def main(path: Path = RESULTS / "speed" / "breakdown.json", batch: int = 64, rounds: int = 15) -> None:
    machine = machine_facts("cpu")
    found = {name: measured(name, shape, batch, rounds) for name, shape in NETS.items()}
    known = json.loads(path.read_text()) if path.exists() else {}
    known[machine["name"]] = {"machine": machine, "batch": batch, "nets": found}
    write_json(path, known)
    print(json.dumps(found, indent=1))


def measured(name: str, shape: tuple[int, ...], batch: int, rounds: int) -> dict[str, Any]:
    """Seconds and rates of one net; rates are in floating-point operations a second."""
    torch.manual_seed(0)
    gradient = energy_gradient(nets.build(name, shape, "cpu"), dtype=torch.bfloat16, engine="fused")
    x = fastebm.ops.uniform((batch, *shape), seed=0) * 2 - 1
    a, b = (torch.randn(SIDE, SIDE, dtype=torch.bfloat16) for _ in range(2))
    with gradient.chain(), torch.no_grad():
        gradient(x)
        fused = gradient.compiled_program(x)
        assert fused is not None
        whole = decode(fused.code(batch))

        def run(program: PlannedProgram) -> Callable[[], object]:
            code = encode(program)
            return lambda: torch.ops.fastebm.run_program(x, code, fused.constants, fused.workspace)

        cases = {"program": run(whole), "products": run(stores_only(whole)), "matrix_product": lambda: a @ b}
        times = interleaved(cases, rounds, "cpu")
    medians = {case: statistics.median(values) for case, values in times.items()}
    flops = 2 * batch * sum(
        i.channels * i.height * i.width * i.kernel_y * i.kernel_x * i.source_channels
        for i in whole.instructions
        if i.kind == Kind.CONVOLUTION
    )  # fmt: skip
    return {
        "median_seconds": medians,
        "share_of_products": medians["products"] / medians["program"],
        "flops_of_products": flops,
        "rate_of_program": flops / medians["program"],
        "rate_of_products": flops / medians["products"],
        "rate_of_matrix_product": 2 * SIDE**3 / medians["matrix_product"],
    }


def stores_only(program: PlannedProgram) -> PlannedProgram:
    """The same products, stored as they are, also where a slope was kept: what is read must have been written."""
    instructions, epilogues = [], []
    for instruction in program.instructions:
        steps = program.epilogues[instruction.first : instruction.first + instruction.count]
        kept = [replace(s, op=EpilogueOp.STORE) if s.op == EpilogueOp.ACTIVATE_KEEPING else s for s in steps]
        kept = [step for step in kept if step.op in STORES]
        instructions.append(replace(instruction, first=len(epilogues), count=len(kept)))
        epilogues += kept
    return replace(program, instructions=tuple(instructions), epilogues=tuple(epilogues))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
