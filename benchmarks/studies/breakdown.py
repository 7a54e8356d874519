"""How the time of one gradient divides between matrix products and epilogues: `python -m benchmarks.studies.breakdown`.

Measures CF-EBM at 32x32, batch 64, bfloat16: the whole program, the same without its epilogues (matrix products alone,
whose results are thrown away), and a matrix product of 2048 x 2048, interleaved in one process.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import fastebm
from benchmarks.harness.pages import RESULTS
from fastebm.compiler import energy_gradient
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.evaluation.speed.measurement import interleaved
from fastebm.models import CoarseToFineEnergy
from fastebm.ops.instructions import Kind, decode, encode
from fastebm.runs.files import write_json

BATCH, SIZE, ROUNDS = 64, 32, 35


def main(path: Path = RESULTS / "speed" / "breakdown.json") -> None:
    torch.manual_seed(0)
    gradient = energy_gradient(CoarseToFineEnergy(SIZE), dtype=torch.bfloat16, engine="fused")
    x = fastebm.ops.uniform((BATCH, 3, SIZE, SIZE), seed=0) * 2 - 1
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    with gradient.chain(), torch.no_grad():
        gradient(x)
        fused = gradient.compiled_program(x)
        assert fused is not None
        whole = decode(fused.code(BATCH))
        bare = encode(replace(whole, instructions=tuple(replace(i, count=0) for i in whole.instructions)))

        def run(code: torch.Tensor) -> Callable[[], object]:
            return lambda: torch.ops.fastebm.run_program(x, code, fused.constants, fused.workspace)

        cases = {"program": run(encode(whole)), "products": run(bare), "matrix_product": lambda: a @ b}
        times = interleaved(cases, ROUNDS, "cpu")
    medians = {name: statistics.median(values) for name, values in times.items()}
    flops = 2 * BATCH * sum(
        i.channels * i.height * i.width * i.kernel_y * i.kernel_x * i.source_channels
        for i in whole.instructions
        if i.kind == Kind.CONVOLUTION
    )  # fmt: skip
    result = {
        "machine": machine_facts("cpu"),
        "median_seconds": medians,
        "share_of_products": medians["products"] / medians["program"],
        "flops_of_products": flops,
        "rate_of_products": flops / medians["products"],
        "rate_of_matrix_product": 2 * 2048**3 / medians["matrix_product"],
    }
    write_json(path, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
