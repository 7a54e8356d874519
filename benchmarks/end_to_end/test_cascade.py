"""The full cascade of CF-EBM, 8 -> 16 -> 32 with 15 updates at each: from uniform noise to images."""

from __future__ import annotations

from benchmarks.harness.cascade_baselines import LevelTruths, baseline_cascades
from benchmarks.harness.workloads import Workload, cascade_of, levels
from fastebm.compiler.cost_model import Cost
from fastebm.evaluation.speed import Candidate, Plan, Row, compare
from fastebm.evaluation.speed.energies import program_cost

SHAPE = (3, 32, 32)


def workloads(device: str, full: bool) -> list[Workload]:
    dtypes = ("bfloat16", "float32") if full else ("bfloat16",)
    batches = (16, 64, 256) if full else (64, 256) if device == "cuda" else (16, 64)
    return [Workload("cascade", "CF-EBM", SHAPE, batch, dtype, num_steps=15) for batch in batches for dtype in dtypes]


def compared(work: Workload, plan: Plan) -> list[Row]:
    energies = levels(work)
    truths = LevelTruths.of(work, energies)
    cascade = cascade_of(energies, work)
    gradients = {level.size: level.sampler.gradient for level in cascade.levels}
    error = truths.error(gradients)
    engines = ", ".join(sorted({gradient.engine for gradient in gradients.values()}))
    ours = Candidate(
        f"{engines}, {work.dtype}",
        lambda: cascade.sample(work.batch, seed=0, channels=work.shape[0], device=work.device),
        lambda: error,
    )

    def cost() -> Cost | None:
        total = Cost(0, 0)
        for size, gradient in gradients.items():
            one = program_cost(gradient, truths.samples[size])
            if one is None:
                return None
            total += Cost(work.num_steps * one.flops, work.num_steps * one.bytes)
        return total

    baselines = {
        name: [lambda make=make: truths.candidate(make()) for make in variants]
        for name, variants in baseline_cascades(work, energies).items()
    }
    return compare(plan, ours, baselines, unit="cascade", cost=cost)


def test_cascade(measure, work):
    measure(work, compared)
