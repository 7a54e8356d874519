"""Result rows, their files, and tables of them."""

import dataclasses
import json
from pathlib import Path

import pytest

from fastebm.compiler.cost_model import Cost
from fastebm.compiler.roofline import Rates
from fastebm.evaluation.speed import (
    Row,
    Run,
    machine_facts,
    machine_name,
    markdown,
    printed,
    read_runs,
    record,
    write_runs,
)
from fastebm.evaluation.speed.rows import AchievedRates

OURS = [0.010, 0.011, 0.012]
FACTS = machine_facts("cpu")


def row(baseline: str = "fastebm", case: str = "a net", **fields) -> Row:
    plain = Row("chains", case, baseline, "bfloat16", (3, 8, 8), "bfloat16", 4, "step")
    return dataclasses.replace(plain, **fields)


def rows(case: str = "a net", factor: float = 2.0) -> tuple[Row, ...]:
    achieved = AchievedRates.of(Cost(10**9, 10**6), 4, 0.011, Rates(1e12, 1e10))
    return (
        row(case=case, gradient_error=0.01, achieved=achieved).with_values(OURS, OURS),
        row("torch.compile", case).with_values([factor * seconds for seconds in OURS], OURS),
        row("torchebm", case, note="skipped: torchebm can't be imported"),
    )


def test_ratios_of_a_row_are_those_of_its_rounds() -> None:
    ours, other, missing = rows()
    assert (ours.ratio, ours.median, ours.values) == (1.0, 0.011, tuple(OURS))
    assert (other.ratio, other.ratio_low, other.ratio_high) == pytest.approx((2.0, 2.0, 2.0))
    assert (missing.median, missing.ratio, missing.values) == (None, None, ())


def test_the_roofline_share_is_the_larger_of_two_times_over_the_median() -> None:
    by_flops = AchievedRates.of(Cost(10**9, 10**6), 4, 0.016, Rates(1e12, 1e10))  # 4 ms of products, 0.4 ms of copies
    assert by_flops.roofline_share == pytest.approx(0.25)
    assert by_flops.flops_per_second == pytest.approx(4e9 / 0.016)
    by_bytes = AchievedRates.of(Cost(0, 10**6), 4, 0.016, Rates(1e12, 1e9))
    assert by_bytes.roofline_share == pytest.approx(0.25)
    assert by_bytes.bytes_per_second == pytest.approx(4e6 / 0.016)


def test_rows_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cpu-any" / "chains.json"
    write_runs(path, [Run(FACTS, rows())])
    assert read_runs(path) == [Run(FACTS, rows())]
    stored = json.loads(path.read_text())
    assert stored["format"] == 2
    assert {"commit", "dirty", "torch", "threads", "cpu", "cpu_features", "date"} <= set(stored["runs"][0]["machine"])
    assert [file.name for file in path.parent.iterdir()] == ["chains.json"]


def test_recording_replaces_what_is_measured_anew_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "chains.json"
    other = FACTS | {"commit": "0" * 40, "date": "2030-01-01T00:00:00+00:00"}
    record(path, Run(FACTS, rows("a net")))
    record(path, Run(FACTS, rows("a second net")))
    (run,) = read_runs(path)
    assert [each.case for each in run.rows] == ["a net"] * 3 + ["a second net"] * 3

    record(path, Run(other, rows("a net", factor=5.0)))
    old, new = read_runs(path)
    assert ({each.case for each in old.rows}, old.machine) == ({"a second net"}, FACTS)
    assert ([each.case for each in new.rows], new.machine) == (["a net"] * 3, other)
    assert new.rows[1].ratio == pytest.approx(5.0)

    record(path, Run(other, rows("a second net")))
    (only,) = read_runs(path)
    assert len(only.rows) == 6


def test_a_figure_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "chains.json"
    record(path, Run(FACTS, rows()))
    before = path.read_text()
    with pytest.raises(ValueError, match="JSON"):
        record(path, Run(FACTS, (row(gradient_error=float("nan")),)))
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "no results of format 2"),
        ('{"machine": {}, "comparisons": []}', "no results of format 2"),
        ('{"format": 2, "runs": [{"machine": {}, "rows": [{"suite": "x"}]}]}', "not a result row"),
    ],
)
def test_files_that_hold_no_rows_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_runs(path)


def test_the_table_has_a_line_for_each_row_with_its_reason() -> None:
    text = printed([*rows("a net"), *rows("a second net", factor=3.0)])
    assert text.count("chains: a net, 4x3x8x8, bfloat16, time of one step") == 1
    assert text.count("chains: a second net") == 1
    assert "2.00" in text
    assert "3.00" in text
    assert text.count("torchebm: skipped: torchebm can't be imported") == 2
    assert "364 of 1000 GFLOP/s" in text
    lines = text.splitlines()
    titles = next(line for line in lines if "slowdown" in line)
    compiled = next(line for line in lines if "torch.compile" in line)
    # Columns are aligned at their right.
    assert compiled[: titles.index("slowdown") + len("slowdown")].endswith("2.00")


def test_markdown_names_the_machine_and_has_a_table_for_each_comparison() -> None:
    text = markdown([Run(FACTS, (*rows("a net"), *rows("a second net")))])
    assert text.count("| baseline | median |") == 2
    assert FACTS["torch"] in text
    assert FACTS["date"][:10] in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {7}


def test_bytes_are_shown_as_such() -> None:
    memory = row(quantity="bytes", unit="gradient").with_values([3.0 * 2**20], [3.0 * 2**20])
    text = printed([memory])
    assert "peak memory of one gradient" in text
    assert "memory ratio" in text
    assert "slowdown" not in text
    assert "3.0 MiB" in text


def test_the_machine_is_named_after_its_widest_instructions() -> None:
    assert FACTS["name"] == machine_name("cpu")
    assert machine_name("cpu").startswith("cpu-")
    features = FACTS["cpu_features"]
    assert machine_name("cpu") == f"cpu-{features[0]}" if features else True
    assert FACTS["cores"] >= 1
