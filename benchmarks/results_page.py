"""Keeps a finished run as a page of results: `python benchmarks/results_page.py RUN docs/results/NAME --command "..."`.

Copies config, log, pictures and `evaluation.json`, writes machine, commit, command and times to `run.json`, and fills
the table of the README of the page between two marks. Words around it are written by a person, and stay. Of where the
images lie only the name of the file is kept.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

from fastebm.evaluation.speed.machine import machine_facts
from fastebm.training.files import write_json
from fastebm.training.run import RunFolder

BEGIN, END = "<!-- run: made by benchmarks/results_page.py -->", "<!-- run: end -->"
PICTURES = ("samples.png", "strip.png", "curves.png", "grid.png")


def run_facts(run: Path, command: str) -> dict[str, Any]:
    """What the page's table says, from the run's own files and from this machine, which it was trained on."""
    folder = RunFolder.existing(run)
    lines = folder.log.lines()
    stages: dict[int, dict[str, float]] = {}
    for line in lines:
        size = line.get("size", 0)
        stage = stages.setdefault(size, {"iterations": 0, "seconds": 0.0, "largest_energy": 0.0, "end_gap": 0.0})
        stage["iterations"], stage["seconds"] = line["iteration"], line["seconds"]
        largest = max(line.get("largest_energy_data", 0.0), line.get("largest_energy_samples", 0.0))
        stage["largest_energy"] = max(stage["largest_energy"], largest)
        stage["end_gap"] = line.get("gap", 0.0)
    newest = max((run / "checkpoints").glob("iteration-*.json"))
    guard = json.loads(newest.read_text()).get("state", {}).get("guard", {})
    machine = machine_facts("cpu")
    machine["threads"] = folder.threads()
    return {
        "command": command,
        "finished_iteration": lines[-1]["iteration"],
        "training_seconds": lines[-1]["seconds"],
        "rollbacks": guard.get("rollbacks", []),
        "stages_cumulative": {str(size): stage for size, stage in stages.items()},
        "machine": machine,
    }


def table(facts: dict[str, Any]) -> str:
    """Stages as rows: iterations, minutes, and how large energies were."""
    machine = facts["machine"]
    head = [
        f"`{facts['command']}`",
        "",
        f"{machine['cpu']} ({', '.join(machine['cpu_features'])}), {machine['cores']} cores, {machine['threads']} "
        f"threads, torch {machine['torch']}, commit {str(machine['commit'])[:7]}; "
        f"{facts['training_seconds'] / 60:.1f} minutes; "
        f"the guard went back {len(facts['rollbacks'])} times.",
        "",
        "| stage | iterations | minutes | largest energy | gap at the end |",
        "|---|---:|---:|---:|---:|",
    ]
    before = {"iterations": 0, "seconds": 0.0}
    for size, stage in facts["stages_cumulative"].items():
        minutes = (stage["seconds"] - before["seconds"]) / 60
        head.append(
            f"| {size}² | {stage['iterations'] - before['iterations']} | {minutes:.1f} | "
            f"{stage['largest_energy']:.1f} | {stage['end_gap']:+.3f} |"
        )
        before = stage
    return "\n".join(head)


def keep(run: Path, page: Path, command: str) -> None:
    """Writes or renews the page."""
    page.mkdir(parents=True, exist_ok=True)
    config = json.loads((run / "config.json").read_text())
    if isinstance(config.get("images"), dict) and "path" in config["images"]:
        config["images"]["path"] = Path(config["images"]["path"]).name
    write_json(page / "config.json", config)
    for name in (*PICTURES, "log.jsonl", "evaluation.json"):
        if (run / name).exists():
            shutil.copyfile(run / name, page / name)
    facts = run_facts(run, command)
    write_json(page / "run.json", facts)
    readme = page / "README.md"
    text = readme.read_text() if readme.exists() else f"# {page.name}\n\n{BEGIN}\n{END}\n"
    if BEGIN not in text:
        raise SystemExit(f"{readme} lacks the line {BEGIN}: put it, and {END}, where the table belongs")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    readme.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n{table(facts)}\n\n{END}", text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--command", required=True, help="what the run was made by, as a user would type it")
    given = parser.parse_args()
    keep(given.run, given.page, given.command)


if __name__ == "__main__":
    main()
