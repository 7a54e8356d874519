"""Stages are measured, estimated and put together."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.studies import stages
from fastebm.evaluation.speed import Run, machine_facts, write_runs


def test_stages_are_measured_computed_and_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(setting: stages.Setting, size: int, part: str) -> dict[str, list[float] | int]:
        return {"seconds": [0.01 * size, 0.03 * size, 0.02 * size], "bytes": 2**20 * size}

    def work(setting: stages.Setting, size: int) -> stages.Work:
        return stages.Work(program_flops=2 * size, update_flops=3 * size, numbers=size)

    monkeypatch.setattr(stages, "measure", measure)
    monkeypatch.setattr(stages.Work, "of", work)
    rows = stages.all_rows(stages.Setting(4, 2, "bfloat16", 3), 64, log=lambda line: None)
    found = {(row.shape[-1], row.unit, row.quantity): row for row in rows}
    assert found[64, "step", "seconds"].note == found[8, "update", "bytes"].note == "measured"
    assert found[128, "step", "bytes"].note == "computed: 2 times 64x64"
    assert found[512, "update", "seconds"].median == pytest.approx(0.02 * 512)
    chain = stages.STEPS * 0.02 * (8 + 16 + 32)
    assert found[32, "sample", "seconds"].median == pytest.approx(chain / 2)
    assert found[32, "iteration, recomputed", "seconds"].median == pytest.approx(chain + 0.02 * 32)

    write_runs(tmp_path / "cpu-any" / "stages.json", [Run(machine_facts("cpu"), tuple(rows))])
    text = stages.page(tmp_path)
    assert text.count("**m**") == 1 + 4 * 6
    assert text.count("**c**") == 1 + 3 * 6 + 7 * 3
    assert "step, seconds: 1.00" in text  # the rule, which is exact here


def test_a_part_of_a_stage_is_measured() -> None:
    setting = stages.Setting(4, 1, "bfloat16", 1)
    for part in stages.PARTS:
        figures = stages.measure_here(setting, 8, part)
        assert figures["bytes"] >= 0
        assert figures["seconds"][0] > 0
    low, high = (stages.Work.of(setting, size) for size in (8, 16))
    assert high.ratio(low, "step", "seconds") > 1
    assert high.ratio(low, "update", "bytes") == pytest.approx((16 * 16 + 8 * 8 + 4 * 4) / (8 * 8 + 4 * 4))
