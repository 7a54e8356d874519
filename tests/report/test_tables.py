"""JSON objects as tables: pairs, matrices, deviations, notes, and objects within objects."""

from __future__ import annotations

from fastebm.report.page import finalized, size_in_words
from fastebm.report.tables import Spread, Table, tables
from tests.docstrings import run_examples


def test_numbers_of_real_images_stand_beside_those_of_samples() -> None:
    (table,) = tables({"count": 5, "median": 1.5, "median_real": 2.5, "passed": True, "lonely_real": None}, "A title")
    assert table.columns == ("", "samples", "real images")
    rows = [["number of samples", 5, ""], ["median distance", 1.5, 2.5], ["all requirements are met", True, ""]]
    assert table == Table("A title", table.columns, [*rows, ["lonely real", None, ""]])


def test_objects_alike_are_a_matrix_with_deviations() -> None:
    row = {"count": 3, "kernel": 0.5, "kernel_std": 0.1}
    content = {
        "note": "a note",
        "distances": {
            "samples": row,
            "samples_at_reference_count": row,
            "noise": row | {"kernel_std": 1e-15},
            "reference_kind": "test images",
        },
    }
    (table,) = tables(content)
    assert table.columns == ("", "number of samples", "kernel distance")
    assert table.rows == [["samples", 3, Spread(0.5, 0.1)], ["uniform noise", 3, 0.5]]
    assert table.note == "the reference is of test images"
    with_other = tables({"distances": {"samples": row, "samples_at_reference_count": row | {"count": 2}}})
    assert [cells[0] for cells in with_other[0].rows] == ["samples", "samples, as many as the reference"]


def test_an_object_that_says_the_same_again_is_shown_once() -> None:
    nearest = {"median": 1.0}
    assert len(tables({"nearest": nearest, "in_features": {"nearest": nearest}})) == 1


def test_deep_objects_end_as_text() -> None:
    deep: dict = {"a": 1}
    for _ in range(30):
        deep = {"b": deep}
    (table,) = tables(deep)
    assert table.rows[0][1].count("{") == 26


def test_how_values_are_shown() -> None:
    assert finalized(0.123456) == '<data value="0.123456">0.1235</data>'
    assert finalized(1438) == '<data value="1438">1,438</data>'
    assert finalized(Spread(1.0, 0.5)) == '<data value="1.0">1</data> ± <data value="0.5">0.5</data>'
    assert finalized(float("inf")) == '<data value="inf">inf</data>'
    assert "1e+400" not in finalized(10**400)
    assert (finalized(None), finalized(True), finalized(False), finalized([1, 2])) == ("none", "yes", "no", "1, 2")
    assert finalized("a\x00\ud800\u202e") == "a\\x00\\ud800\\u202e"
    assert len(finalized("x" * 10**6)) < 5000
    assert [size_in_words(count) for count in (0, 999, 1000, 5 * 2**20)] == [
        "0 bytes",
        "999 bytes",
        "1.0 KiB",
        "5.0 MiB",
    ]


def test_examples_in_docstrings() -> None:
    failed, attempted = run_examples("fastebm.report.page")
    assert failed == 0
    assert attempted == 5
