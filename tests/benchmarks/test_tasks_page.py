"""The page of the tasks' results says what the numbers beside it say, and no paths of the machine they come from."""

from pathlib import Path

import pytest

from benchmarks.studies.tasks_page import TABLES, filled, to_floats

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "tasks"


def test_tables_are_those_of_the_committed_numbers() -> None:
    text = (PAGE / "README.md").read_text()
    numbers = to_floats(PAGE)
    assert filled(text, numbers) == text
    numbers["interpolate"]["neighbours"]["samples"] += 1
    assert filled(text, numbers) != text


@pytest.mark.parametrize("name", TABLES)
def test_a_page_without_marks_is_refused(name: str) -> None:
    text = (PAGE / "README.md").read_text().replace(f"<!-- {name}: end -->", "")
    with pytest.raises(SystemExit, match=f"lacks the lines <!-- {name}"):
        filled(text, to_floats(PAGE))


def test_files_are_small_and_name_no_folders() -> None:
    for path in PAGE.iterdir():
        assert path.stat().st_size < 400_000
    assert not [name for name, numbers in to_floats(PAGE).items() if "/" in numbers["run"]]
