"""The benchmark of `generate`: it draws what the bare sampler draws, and fills its page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.studies import generate as benchmark
from fastebm.data import open_images, to_pixels
from fastebm.sampling.cascade import LevelSampler
from fastebm.tasks import GenerationResult
from fastebm.training import CoarseToFineRun


def test_all_ways_draw_the_same_samples(run: CoarseToFineRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = benchmark.cases(run, 7, 3, [1, 2], "cpu", tmp_path)
    assert list(ways) == [
        benchmark.BARE,
        "the same, the run loaded anew",
        "`generate` to a folder, 1 process",
        "`generate` to .npz, 1 process",
        "`generate` to a folder, 2 processes",
        "`generate` to .npz, 2 processes",
    ]
    sample = LevelSampler.sample
    chunks: list[torch.Tensor] = []

    def kept(*arguments: Any, **options: Any) -> torch.Tensor:
        chunks.append(sample(*arguments, **options))
        return chunks[-1]

    monkeypatch.setattr(LevelSampler, "sample", kept)
    expected = to_pixels(run.sample(7))
    for name, way in ways.items():
        if "2 processes" in name:  # starting them takes seconds; tests of generate do
            continue
        chunks.clear()
        made = way()
        assert [len(chunk) for chunk in chunks] == [3, 3, 1]
        assert torch.equal(to_pixels(torch.cat(chunks)), expected)
        if isinstance(made, GenerationResult):
            assert torch.equal(open_images(made.path).pixels, expected)
    places = {way().path for _ in range(2) for name, way in ways.items() if "1 process" in name}
    assert len(places) == 4  # a call never finds what an earlier one made


def test_the_script_writes_rows_and_its_table(digits_run: Path, tmp_path: Path) -> None:
    page, run = tmp_path / "page", shutil.copytree(digits_run, tmp_path / "tiny")
    arguments = [str(run), "--page", str(page), "--count", "6", "--chunk", "4", "--processes", "1", "--rounds", "3"]
    benchmark.main(arguments)
    found = json.loads((page / "results.json").read_text())["tiny"]
    assert (found["run"], found["iteration"], found["count"], found["levels"]) == ("tiny", 7, 6, 2)
    assert [len(row["seconds"]) for row in found["rows"]] == [3] * 4
    bare, *others = found["rows"]
    assert (bare["method"], bare["ratio"], bare["ratio_low"], bare["ratio_high"]) == (benchmark.BARE, 1, 1, 1)
    for row in others:
        ratios = sorted(value / base for value, base in zip(row["seconds"], bare["seconds"], strict=True))
        assert row["ratio"] == ratios[1]
        assert row["images_per_second"] == pytest.approx(6 / sorted(row["seconds"])[1])
    text = (page / "README.md").read_text()
    assert text.startswith("# page\n\n<!-- tiny: filled by benchmarks/harness/pages.py -->\n")
    for row in found["rows"]:
        assert f"| {row['method']} | {row['images_per_second']:.4g} (" in text

    # Words around the table stay.
    (page / "README.md").write_text(text + "\nof mine\n")
    benchmark.main(arguments)
    renewed = (page / "README.md").read_text()
    assert renewed.endswith("\nof mine\n")
    assert renewed.count("| method |") == 1
