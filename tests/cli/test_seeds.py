"""`fastebm train --seeds`: runs one after another, judged and summarised, and taken up again after a kill."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastebm.cli import main
from fastebm.cli.seeds import summary, table
from fastebm.runs.folder import RunFolder
from fastebm.runs.names import SEEDS
from fastebm.training import DivergedError
from fastebm.training.coarse_to_fine.trainer import CoarseToFineTrainer
from tests.cli.tiny_runs import TRAIN, start

COMMAND = [*TRAIN, "--iterations", "3", "4", "--seeds", "2", "--judge-count", "0"]


def content(folder: Path) -> Any:
    return json.loads((folder / SEEDS).read_text())


def test_runs_are_trained_once_and_summarised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs"
    assert main([*COMMAND, "--seed", "5", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "seed 5: 7 iterations, 0 rollbacks" in printed
    assert "largest energy" in printed
    first = content(out)
    assert [(run["seed"], run["run"], run["finished"]) for run in first["runs"]] == [
        (5, "seed-5", True),
        (6, "seed-6", True),
    ]
    gaps = [RunFolder.existing(out / f"seed-{seed}").log.lines()[-1]["gap"] for seed in (5, 6)]
    assert [run["gap_end"] for run in first["runs"]] == pytest.approx(gaps)
    assert first["summary"]["gap_end"]["mean"] == pytest.approx(sum(gaps) / 2)
    assert first["summary"]["gap_end"]["spread"] == pytest.approx(abs(gaps[0] - gaps[1]) / 2**0.5)
    written = (out / "seed-5" / "checkpoints" / "iteration-000000007.json").stat().st_mtime_ns
    assert main([*COMMAND, "--seeds", "3", "--seed", "5", "--out", str(out)]) == 0
    assert (out / "seed-5" / "checkpoints" / "iteration-000000007.json").stat().st_mtime_ns == written
    assert content(out)["runs"][:2] == first["runs"]
    assert len(content(out)["runs"]) == 3
    # Each is the run that a single command trains.
    assert main([*TRAIN, "--iterations", "3", "4", "--seed", "6", "--out", str(tmp_path / "single")]) == 0
    one, other = (RunFolder(path).checkpoints.load_newest() for path in (tmp_path / "single", out / "seed-6"))
    assert one is not None
    assert other is not None
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_a_killed_command_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    command = [*TRAIN, "--iterations", "6", "12", "--checkpoint-every", "4", "--seeds", "2", "--judge-count", "0"]
    process = start(*command, "--out", "killed", cwd=tmp_path)
    checkpoints = RunFolder(tmp_path / "killed" / "seed-1").checkpoints
    while process.poll() is None and max(checkpoints.iterations(), default=0) < 6:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert [run["seed"] for run in content(tmp_path / "killed")["runs"]] == [0]
    assert main([*command, "--out", str(tmp_path / "killed")]) == 0
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    for seed in (0, 1):
        found = [RunFolder(tmp_path / name / f"seed-{seed}").checkpoints.load_newest() for name in ("killed", "whole")]
        assert found[0] is not None
        assert found[1] is not None
        assert all(torch.equal(found[0].tensors[name], found[1].tensors[name]) for name in found[0].tensors)


def test_runs_are_judged_by_one_classifier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastebm.evaluation.metrics.features.IMAGES_SEEN", 1000)
    out = tmp_path / "runs"
    command = [*TRAIN, "--iterations", "3", "4", "--seeds", "2", "--judge-count", "1000", "--out", str(out)]
    assert main(command) == 0
    first = content(out)
    for run in first["runs"]:
        distances = json.loads((out / run["run"] / "judged.json").read_text())["in_features"]["distances"]
        assert run["frechet"] == distances["samples"]["frechet"]
        beside = distances["samples_at_reference_count"]  # of fewer samples, as there are not 1,000 held-out images
        assert beside["count"] == distances["reference"]["count"] < distances["samples"]["count"] == 1000
        assert run["ratio"] == pytest.approx(beside["frechet"] / distances["reference"]["frechet"])
    written = (out / "seed-0" / "judged.json").stat().st_mtime_ns
    assert "over the reference" in capsys.readouterr().out
    assert main(command) == 0
    assert (out / "seed-0" / "judged.json").stat().st_mtime_ns == written
    assert content(out) == first


def test_a_run_that_the_guard_gives_up_is_counted_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fastebm.cli.seeds as seeds

    trained, asked = seeds.train, []

    def exploding(config: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(config.seed)
        if config.seed == 0:
            trained(config, *arguments, **options)
            raise DivergedError(5, "for the test")
        return trained(config, *arguments, **options)

    monkeypatch.setattr(seeds, "train", exploding)
    monkeypatch.setattr(seeds, "facts", lambda path, iterations: {"finished": path.name == "seed-1", **FACTS})
    out = str(tmp_path / "runs")
    assert main([*COMMAND, "--out", out]) == 1
    assert "seed 0: training stopped at iteration 5: for the test" in capsys.readouterr().out
    assert main([*COMMAND, "--out", out]) == 1
    assert asked == [0, 1, 1]
    assert "Mean and spread are of the 1 runs of 2" in capsys.readouterr().out
    assert main([*COMMAND, "--retries", "9", "--out", out]) == 1
    assert asked == [0, 1, 1, 0, 1]


FACTS = {"iteration": 7, "rollbacks": 0, "minutes": 0.1, "gap_end": 0.5, "largest_energy": 2.0, "diagnoses": []}


def test_summary_and_table() -> None:
    runs = [{"seed": seed, "finished": True, "stopped": None, "gap_end": gap} for seed, gap in ((0, 1.0), (1, 3.0))]
    runs.append({"seed": 2, "finished": False, "stopped": "why", "gap_end": 100.0})
    found = summary(runs)
    assert (found["runs"], found["finished"]) == (3, 2)
    assert found["gap_end"] == {"mean": 2.0, "spread": pytest.approx(2**0.5), "count": 2}
    assert summary(runs[:1])["gap_end"]["spread"] is None
    lines = table(runs).splitlines()
    assert lines[3].split() == ["2", "(stopped)", "100"]
    assert lines[4].split() == ["mean", "2"]


def judged(seed: int, count: int | None, ratio: float | None) -> dict[str, Any]:
    return {"seed": seed, "finished": True, "stopped": None, "judged_count": count, "ratio": ratio}


def test_distances_of_different_numbers_of_samples_are_not_averaged() -> None:
    found = summary([judged(0, 1000, 2.0), judged(1, 1000, 4.0), judged(2, 20, 90.0), judged(3, None, None)])
    assert found["ratio"] == {"mean": 3.0, "spread": pytest.approx(2**0.5), "count": 2}


def test_a_judgement_stays_where_none_is_asked_for(tmp_path: Path) -> None:
    command = [*TRAIN, "--iterations", "3", "4", "--seeds", "2", "--out", str(tmp_path / "runs"), "--judge-count"]
    assert main([*command, "0"]) == 0
    stored = content(tmp_path / "runs")
    stored["runs"][0] |= {"judged_count": 20, "judged_iteration": 7, "frechet": 3.0, "reference": 1.0, "ratio": 3.0}
    stored["runs"][1] |= {"judged_count": 20, "judged_iteration": 5, "frechet": 9.0, "reference": 1.0, "ratio": 9.0}
    (tmp_path / "runs" / SEEDS).write_text(json.dumps(stored))
    (tmp_path / "runs" / "seed-0" / "judged.json").write_text("{}")
    assert main([*command, "0"]) == 0
    first, second = content(tmp_path / "runs")["runs"]
    assert (first["judged_count"], first["ratio"]) == (20, 3.0)
    assert "ratio" not in second  # of other weights


@pytest.mark.parametrize("first_checkpoint", [4, 99])
def test_rollbacks_of_a_run_that_was_given_up_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_checkpoint: int
) -> None:
    """Its log is rewound to before the last one: the checkpoint knows them, or else the flight records do."""
    update = CoarseToFineTrainer.update

    def exploding(self: CoarseToFineTrainer) -> dict[str, float]:
        if self.iteration == 6:
            raise DivergedError(7, "for the test")
        return update(self)

    monkeypatch.setattr(CoarseToFineTrainer, "update", exploding)
    stages = ["--iterations", "8", "4", "--checkpoint-every", str(first_checkpoint)]
    assert main([*COMMAND, *stages, "--retries", "2", "--out", str(tmp_path / "runs")]) == 1
    assert [run["rollbacks"] for run in content(tmp_path / "runs")["runs"]] == [2, 2]


def test_the_largest_energy_does_not_depend_on_the_log(tmp_path: Path) -> None:
    found = []
    for every in ("1", "3"):
        out = tmp_path / every
        assert main([*COMMAND, "--log-every", every, "--out", str(out)]) == 0
        found.append([run["largest_energy"] for run in content(out)["runs"]])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "runs", ["[5]", "[{}]", '[{"seed": 7}]', '{"a": 1}', '[{"seed": [1], "run": "a", "finished": true, "retries": 0}]']
)
def test_a_damaged_entry_is_said_in_one_line(tmp_path: Path, runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / SEEDS).write_text(f'{{"config": {{}}, "runs": {runs}}}')
    assert main([*COMMAND, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / SEEDS} is damaged: " in said
    assert said.count("\n") == 1


def test_seeds_beyond_the_largest_are_refused_before_any_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, "--seed", str(2**64 - 1), "--out", str(tmp_path / "runs")]) == 2
    assert "seed must be in [-2^63, 2^64), got 18446744073709551616" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda out: (out / "config.json").write_text("{}"), "is a single run"),
        (lambda out: (out / "mine.txt").write_text("mine"), "holds no runs of --seeds"),
        (lambda out: (out / SEEDS).write_text("{}"), "is damaged"),
        (lambda out: (out / SEEDS).write_text('{"config": {"num_steps": 9}, "runs": []}'), "another config"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, make: Any, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main([*COMMAND, "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_number_of_seeds_out_of_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--seeds", "0"]) == 2
    assert "--seeds must be at least 1" in capsys.readouterr().err
