"""Comparisons from end to end on tiny nets, and what becomes of baselines that are wrong, slow or broken."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from fastebm.build_extension import cpp_compiler
from fastebm.compiler import energy_gradient
from fastebm.evaluation.speed import (
    Candidate,
    Plan,
    Row,
    Updates,
    compare,
    compare_chains,
    compare_gradients,
    comparison,
)
from fastebm.evaluation.speed.baselines import RESEARCH, TORCH_COMPILE, TORCHEBM, TUNED
from fastebm.evaluation.speed.energies import program_cost
from fastebm.models import CoarseToFineEnergy
from tests.evaluation.speed.networks import SHAPE, convolutional, samples

PLAN = Plan("chains", "a net", SHAPE, 3, torch.float32, rounds=2, budget_seconds=1.0)


def by_baseline(rows: list[Row]) -> dict[str, Row]:
    return {row.baseline: row for row in rows}


def test_chains_of_a_foreign_net_against_all_baselines() -> None:
    net = convolutional().train()
    rows = compare_chains(net, PLAN, Updates.constant(2, 0.1, 0.01))
    assert [row.baseline for row in rows] == ["fastebm", RESEARCH, TUNED, TORCH_COMPILE, TORCHEBM]
    found = by_baseline(rows)
    measured = {"fastebm", RESEARCH, TUNED} | ({TORCH_COMPILE} if cpp_compiler() else set())
    for baseline in measured:
        assert found[baseline].gradient_error < 1e-4
        assert len(found[baseline].values) == 2
        assert found[baseline].ratio > 0
    assert found["fastebm"].ratio == 1.0
    assert {row.unit for row in rows} == {"step"}
    assert net.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_our_own_net_with_the_cost_of_its_program(dtype: torch.dtype) -> None:
    net = CoarseToFineEnergy(8, 2, base_width=2)
    plan = dataclasses.replace(PLAN, dtype=dtype, engine="fused")
    ours, *others = compare_gradients(net, plan)
    assert ours.variant.startswith("fused")
    assert ours.achieved is not None
    assert ours.achieved.flops_per_second > 0
    assert ours.achieved.roofline_share > 0
    assert [row.baseline for row in others] == [RESEARCH, TUNED, TORCH_COMPILE]
    assert {row.unit for row in (ours, *others)} == {"gradient"}
    assert all(row.achieved is None for row in others)


def test_the_cost_is_that_of_the_program_that_is_described() -> None:
    gradient = energy_gradient(CoarseToFineEnergy(8, 2, base_width=2), dtype=torch.float32, engine="fused")
    x = samples()
    gradient(x)
    cost = program_cost(gradient, x)
    assert cost is not None
    assert f"{cost.flops / 1e6:.2f} MFLOP, {cost.bytes / 1e3:.1f} kB" in gradient.describe()
    by_autograd = energy_gradient(convolutional(), engine="autograd")
    by_autograd(x)
    assert program_cost(by_autograd, x) is None


def candidate(name: str, error: float | None = None, run: Callable[[], object] = lambda: None) -> Candidate:
    return Candidate(name, run, None if error is None else lambda: error)


def compared(variants: list[Callable[[], Candidate]], fallback: Callable[[], Candidate] | None = None) -> Row:
    ours = candidate("ours", 1e-6)
    fallbacks = {} if fallback is None else {"baseline": fallback}
    _, row = compare(PLAN, ours, {"baseline": variants}, unit="call", fallback=fallbacks)
    return row


def test_wrong_gradients_are_reported_and_not_timed() -> None:
    runs = []
    row = compared([lambda: candidate("zero", 1.0, lambda: runs.append(1)), lambda: candidate("nan", float("nan"))])
    assert (row.median, row.ratio, row.gradient_error) == (None, None, None)
    assert "zero: wrong gradients, error 1, not timed" in row.note
    assert "nan: wrong gradients" in row.note
    assert not runs


def test_a_fallback_takes_part_only_where_no_variant_is_right() -> None:
    def never() -> Candidate:
        raise AssertionError("a right variant was there")

    assert compared([lambda: candidate("right", 1e-6)], fallback=never).variant == "right"
    row = compared([lambda: candidate("zero", 1.0)], fallback=lambda: candidate("fallback", 1e-6))
    assert (row.variant, row.gradient_error) == ("fallback", 1e-6)
    assert "zero: wrong gradients" in row.note
    assert row.ratio is not None


def test_a_baseline_that_fails_is_a_row_with_the_reason() -> None:
    def broken() -> Candidate:
        raise RuntimeError("backend='inductor' raised:\n\nCppCompileError: no luck\nand much more")

    row = compared([broken, broken])
    assert row.note == "RuntimeError: backend='inductor' raised: CppCompileError: no luck"
    assert row.median is None

    def fails_when_run() -> None:
        raise MemoryError

    row = compared([lambda: candidate("heavy", 1e-6, fails_when_run), lambda: candidate("light", 1e-6)])
    assert (row.variant, row.note) == ("light", "MemoryError:")


def test_the_fastest_variant_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(cases, rounds, device, **options):
        return {name: [float(2 + int(name))] * rounds if name in "01" else [1.0] * rounds for name in cases}

    monkeypatch.setattr(comparison, "interleaved", pretend)
    row = compared([lambda: candidate("first", 1e-6), lambda: candidate("second", 2e-6)])
    assert (row.variant, row.gradient_error, row.note) == ("first", 1e-6, "second: 1.50 of its time")


def test_wrong_gradients_of_ours_stop_the_comparison() -> None:
    with pytest.raises(ValueError, match=r"gradient of fastebm \(ours\) differs from float64 autograd by 0.5"):
        compare(PLAN, candidate("ours", 0.5), {}, unit="call")


def test_chains_are_compared_at_one_step_size() -> None:
    with pytest.raises(ValueError, match="one step size"):
        compare_chains(convolutional(), PLAN, Updates(((0.1, 0.1), (0.2, 0.1))))


def test_progress_is_logged() -> None:
    lines: list[str] = []
    plan = dataclasses.replace(PLAN, log=lines.append)
    compare(plan, candidate("ours"), {"baseline": [lambda: candidate("it")]}, unit="call")
    assert lines == ["chains: a net, batch 3, float32", "  baseline: preparing a variant", "  measuring"]
