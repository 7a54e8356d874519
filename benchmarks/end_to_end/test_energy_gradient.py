"""One energy gradient, `x -> (E(x), dE/dx)`, at fixed weights, against eager PyTorch and `torch.compile`."""

from __future__ import annotations

from benchmarks.harness import nets
from benchmarks.harness.workloads import Workload
from fastebm.evaluation.speed import Plan, Row, compare_gradients

COLOUR = (3, 32, 32)
FOREIGN = {"UvA tutorial": (1, 28, 28), "IGEBM-like residual": COLOUR, "wide residual 28-2": COLOUR}


def workloads(device: str, full: bool) -> list[Workload]:
    def work(case: str, shape: tuple[int, ...], batch: int, dtype: str) -> Workload:
        return Workload("energy_gradient", case, shape, batch, dtype, num_steps=10)

    if full:
        shapes = {"CF-EBM": COLOUR, "EC-VAE multi-scale": COLOUR, **FOREIGN, "wide residual 28-10": COLOUR}
        return [
            work(case, shape, batch, dtype)
            for case, shape in shapes.items()
            for batch in (1, 16, 64, 256)
            for dtype in ("bfloat16", "float32")
        ]
    if device == "cuda":
        return [
            work("CF-EBM", COLOUR, 64, "bfloat16"),
            work("CF-EBM", COLOUR, 256, "bfloat16"),
            *(work(case, shape, 64, "bfloat16") for case, shape in FOREIGN.items()),
        ]
    return [
        work("CF-EBM", COLOUR, 64, "bfloat16"),
        work("CF-EBM", COLOUR, 64, "float32"),
        work("EC-VAE multi-scale", COLOUR, 16, "bfloat16"),
        *(work(case, shape, batch, "bfloat16") for case, shape in FOREIGN.items() for batch in (1, 16, 64)),
    ]


def compared(work: Workload, plan: Plan) -> list[Row]:
    return compare_gradients(nets.build(work.case, work.shape, work.device), plan)


def test_energy_gradient(measure, work):
    measure(work, compared)
