"""Pages of runs whose files are damaged in all ways: a page without faults, or one line where there is no run."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastebm.report import write_report
from fastebm.runs.files import write_json
from fastebm.runs.folder import RunError
from fastebm.training import DigitsSource, train
from fastebm.training.trainer.flight import FlightRecorder, write_record
from tests.report.conftest import CONFIGS, SMALL, STAGES
from tests.report.html_check import Page

VALUES: list[Any] = [
    *(None, True, 0, -1, 3, 10**400, -(10**30), 1e308, 0.5, "", "x" * 10_000, "<script>", "\ud800", "a\nb\x00"),
    *([], [1, "a", None], [[[[[]]]]], {}, {"": {"": {"": {"": {"": 1}}}}}, {"a": {"b": 1}, "c": {"b": 2}}, "nan"),
]
WITH_CURVES = 8
"""One page in so many has curves, which take most of its time."""


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of seeds, each with everything that a page can show."""
    out = tmp_path_factory.mktemp("runs") / "seeds"
    configs = [STAGES, CONFIGS["ec_flow"]]
    for seed, config in enumerate(configs):
        run = out / f"seed-{seed}"
        train(config, DigitsSource(), run, progress=False)
        recorder = FlightRecorder(3)
        recorder.begin({"iteration": 3})
        recorder.finish({"gap": 0.1})
        write_record(run, recorder.record(), "the guard went back", "a reason")
        rows = {name: {"count": 3, "kernel": 0.5, "kernel_std": 0.1} for name in ("samples", "reference", "noise")}
        nearest = {"median": 1.5, "median_real": 2.5}
        write_json(run / "evaluation.json", {"samples": "3 of x, iteration 5", "distances": rows, "nearest": nearest})
        write_json(
            run / "verdict.json", {"classes": {"names": ["a"], "counts": [3]}, "nearest": nearest, "passed": True}
        )
        level = {"verdict": ["a sentence"], "table": "a table"}
        write_json(run / "diagnose.json", {"iteration": 5, "chains": 3, "levels": {"4x4": level, "8x8": level}})
    entries = [{"seed": seed, "run": f"seed-{seed}", "finished": True, "gap_end": 0.5} for seed in range(2)]
    summary = {"runs": 2, "finished": 2, "gap_end": {"mean": 0.5, "spread": 0.0, "count": 2}}
    write_json(out / "seeds.json", {"config": SMALL, "runs": entries, "summary": summary})
    return out


def damaged_json(draw: random.Random, text: str) -> str:
    """The text of a JSON object with one value, or one name, that is another."""
    content = json.loads(text)
    place: Any = content
    while True:
        names = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not names:
            return json.dumps(content)
        name = draw.choice(names)
        if isinstance(place[name], dict | list) and draw.random() < 0.7:
            place = place[name]
            continue
        if draw.random() < 0.2:
            del place[name]
        elif draw.random() < 0.2 and isinstance(place, dict):
            place[str(draw.choice(VALUES))] = place.pop(name)
        else:
            place[name] = draw.choice(VALUES)
        return json.dumps(content)


def damage(draw: random.Random, path: Path) -> str:
    """Damages a file, and says how."""
    way = draw.choice(["value", "value", "value", "bytes", "cut", "gone", "folder", "loop", "empty"])
    data = path.read_bytes()
    if way == "value" and path.suffix == ".jsonl":
        lines = data.decode().splitlines()
        chosen = draw.randrange(len(lines))
        lines[chosen] = damaged_json(draw, lines[chosen])
        path.write_text("\n".join(lines) + "\n")
    elif way == "value" and path.suffix == ".json":
        path.write_text(damaged_json(draw, data.decode()))
    elif way in ("bytes", "value"):
        changed = bytearray(data)
        for _ in range(draw.choice([1, 3, 30])):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        path.write_bytes(changed)
    elif way == "cut":
        path.write_bytes(data[: draw.randrange(len(data))])
    else:
        path.unlink()
        if way == "folder":
            path.mkdir()
        elif way == "loop":
            path.symlink_to(path.name)
        elif way == "empty":
            path.touch()
    return f"{path.name}: {way}"


def test_damaged_runs(tries: int, seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for number in range(tries):
        draw = random.Random(number)
        folder = Path(shutil.copytree(seeds, tmp_path / "try"))
        run = draw.choice([folder, folder / "seed-0", folder / "seed-1"])
        files = sorted(p for p in run.rglob("*") if p.suffix in (".json", ".jsonl", ".png") and p.stat().st_size)
        said = [damage(draw, path) for path in draw.sample(files, draw.choice([1, 1, 2, 5]))]
        with monkeypatch.context() as patch:
            if number % WITH_CURVES:
                patch.setattr("fastebm.report.run.draw_curves", lambda log, pictures: ())
            try:
                faults = Page(write_report(run, tmp_path / "page.html", overwrite=True).read_text("utf-8")).faults
            except (RunError, ValueError) as error:
                gone = not (run / "config.json").is_file() and not (run / "seeds.json").is_file()
                faults = [] if gone and "\n" not in str(error) else [repr(error)]
            except Exception as error:
                faults = [repr(error)]
        if faults:
            found[number] = said, faults
        shutil.rmtree(folder)
    assert found == {}
