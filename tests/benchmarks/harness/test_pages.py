"""Pages of results: their tables are those of the results.json beside them, and words around tables stay."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.harness.pages import PAGES, RESULTS, add_entry, collect, each, fill_page, fill_section, read_entries
from fastebm.cli.seeds import summary
from fastebm.runs.files import write_json


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_those_of_the_committed_numbers(name: str) -> None:
    text = (RESULTS / name / "README.md").read_text()
    entries = read_entries(RESULTS / name)
    sections = PAGES[name](entries)
    assert sections
    for section, content in sections.items():
        assert fill_section(text, section, content) == text
    assert re.findall(r"<!-- (\S+): end -->", text) == [
        section for section in re.findall(r"<!-- (\S+): filled by", text) if section in sections
    ]


def test_other_numbers_make_other_tables() -> None:
    text, entries = (RESULTS / "tasks" / "README.md").read_text(), read_entries(RESULTS / "tasks")
    entries["interpolate"]["neighbours"]["samples"] += 1
    assert fill_section(text, "interpolate", PAGES["tasks"](entries)["interpolate"]) != text


@pytest.mark.parametrize("name", PAGES["tasks"](read_entries(RESULTS / "tasks")))
def test_a_page_without_marks_is_refused(name: str) -> None:
    text = (RESULTS / "tasks" / "README.md").read_text().replace(f"<!-- {name}: end -->", "")
    with pytest.raises(SystemExit, match=f"lacks the lines <!-- {name}"):
        fill_section(text, name, "a table")


def test_files_are_small_and_name_no_folders() -> None:
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5 * 2**20
    for path in files:
        assert path.stat().st_size < 400_000
    assert not [name for name, entry in read_entries(RESULTS / "tasks").items() if "/" in entry["run"]]
    assert {path.name for path in files if path.suffix == ".json"} == {"results.json", "breakdown.json"}


@pytest.mark.parametrize("page", sorted(RESULTS.glob("*/README.md")), ids=lambda page: page.parent.name)
def test_every_picture_is_shown(page: Path) -> None:
    text = "".join(file.read_text() for file in page.parent.glob("*.md"))
    assert [path.name for path in page.parent.glob("*.png") if f"]({path.name})" not in text] == []


def test_a_page_gets_marks_for_another_table_once_and_keeps_its_words(tmp_path: Path) -> None:
    sections = each(lambda name, entry: entry["table"])
    add_entry(tmp_path, "a", {"table": "first"}, sections)
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text() + "of mine\n")
    for table_of_b in ("second", "third"):
        add_entry(tmp_path, "b", {"table": table_of_b}, sections)
    text = readme.read_text()
    assert text.startswith(f"# {tmp_path.name}")
    assert (text.count("first"), text.count("second"), text.count("third")) == (1, 0, 1)
    assert text.count("of mine") == 1
    fill_page(tmp_path, sections)
    assert readme.read_text() == text


def test_the_output_of_a_command_is_collected_without_paths_and_with_shown_pictures(
    tmp_path: Path,
) -> None:
    page, out = tmp_path / "page", tmp_path / "denoise-0.2"
    out.mkdir()
    numbers = {"run": "runs/mnist", "images": "/home/me/data/mnist.npz, test", "share": 0.5}
    (out / "numbers.json").write_text(json.dumps(numbers))
    for name in ("denoised", "other"):
        Image.new("RGB", (4, 4), "red").save(out / f"{name}.png")
    sections = each(lambda name, entry: f"{entry['share']:.1f}")
    page.mkdir()
    (page / "README.md").write_text("![a picture](denoise-0.2.png)\n")
    collect(page, out, "denoise-0.2", sections)
    assert read_entries(page) == {"denoise-0.2": {"run": "mnist", "images": "mnist.npz, test", "share": 0.5}}
    assert {path.name for path in page.iterdir()} == {"results.json", "README.md", "denoise-0.2.png"}


def test_a_finished_run_is_collected(tmp_path: Path, digits_run: Path) -> None:
    collect(tmp_path, digits_run, "run", PAGES["mnist"], command="fastebm train ...", commit="0123456789")
    entry = read_entries(tmp_path)["run"]
    assert (entry["finished_iteration"], entry["command"]) == (7, "fastebm train ...")
    assert entry["machine"]["commit"] == "0123456789"
    assert {size: stage["iterations"] for size, stage in entry["stages_cumulative"].items()} == {"4": 3, "8": 7}
    text = (tmp_path / "README.md").read_text()
    assert "| 4² | 3 |" in text
    assert "| 8² | 4 |" in text
    assert "commit 0123456" in text


def test_runs_of_several_seeds_are_collected(tmp_path: Path) -> None:
    ended = {"finished": True, "rollbacks": 0, "gap_end": 0.25, "minutes": 3.0}
    runs = [
        {"seed": 0, "ratio": 1.5, "frechet": 0.6} | ended,
        {"seed": 1, "ratio": 2.5, "frechet": 1.0} | ended,
        {"seed": 2, "finished": False, "rollbacks": 3, "gap_end": 9.0, "minutes": 1.0},
    ]
    folder = tmp_path / "runs"
    folder.mkdir()
    write_json(folder / "seeds.json", {"config": {"size": 8}, "runs": runs, "summary": summary(runs)})
    page = tmp_path / "page"
    collect(page, folder, "seeds", PAGES["mnist"], command="fastebm train ... --seeds 3", commit="0123456789")
    text = (page / "README.md").read_text()
    assert "`fastebm train ... --seeds 3`" in text
    assert "commit 0123456; 2 of 3 runs came to their end." in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[0][:3] == ["seed", "over the reference", "Fréchet distance"]
    assert [line[:3] for line in lines[2:]] == [
        ["0", "1.5", "0.6"],
        ["1", "2.5", "1"],
        ["2 (stopped)", "", ""],
        ["mean", "2", "0.8"],
        ["spread", "0.707", "0.283"],
    ]
