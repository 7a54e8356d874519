"""`fastebm resume`: after a stop, with moved images, with the threads of the start."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastebm.cli import main
from fastebm.training import CoarseToFineRun
from fastebm.training.coarse_to_fine.trainer import CoarseToFineTrainer
from tests.cli.tiny_runs import TRAIN, start


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A folder of pictures of several sizes."""
    draws = np.random.default_rng(1)
    for number in range(12):
        path = tmp_path / "pets" / ("cats" if number % 2 else "dogs") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pets"


SMALL = ["--base-width", "1", "--num-steps", "2", "--sizes", "4", "8", "--batch-sizes", "4", "4"]
SMALL += ["--iterations", "2", "3", "--learning-rates", "1e-3", "1e-3", "--log-every", "1"]


def test_a_folder_of_pictures_trains_with_one_command_and_resumes(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "coarse-to-fine", "--data", "pets", *SMALL]) == 0
    run = CoarseToFineRun.load("runs/pets")
    assert run.finished
    assert run.sample(2).shape == (2, 3, 8, 8)
    assert (run.config.data_noise, run.config.clamp_ends) == (0.05, True)  # of the preset for pictures
    assert json.loads(Path("runs/pets/config.json").read_text())["images"]["path"] == str(pets)
    capsys.readouterr()
    assert main(["resume", "runs/pets"]) == 0
    assert "was finished before" in capsys.readouterr().out

    # Nothing is left to train, so that its pictures may be gone.
    pets.rename(tmp_path / "moved")
    assert main(["resume", "runs/pets"]) == 0
    assert "was finished before: 5 iterations" in capsys.readouterr().out

    # Without its last checkpoints it is unfinished; moved, its pictures have to be named, and others are refused.
    for path in Path("runs/pets/checkpoints").glob("iteration-000000005.*"):
        path.unlink()
    assert main(["resume", "runs/pets"]) == 2
    assert "there is no such file or folder" in capsys.readouterr().err
    next(iter((tmp_path / "moved").rglob("*.png"))).rename(tmp_path / "lost.png")
    assert main(["resume", "runs/pets", "--data", "moved"]) == 2
    assert "was trained on other images" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "resume"])
def test_a_run_is_taken_up_with_the_threads_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    out = tmp_path / "run"
    train = [*TRAIN, "--iterations", "1", "2", "--out", str(out)]
    assert main(train) == 0  # with one thread
    for path in (out / "checkpoints").glob("iteration-000000003.*"):
        path.unlink()
    seen: list[int] = []
    update = CoarseToFineTrainer.update

    def watched(self: CoarseToFineTrainer) -> dict[str, float]:
        seen.append(torch.get_num_threads())
        return update(self)

    monkeypatch.setattr(CoarseToFineTrainer, "update", watched)
    torch.set_num_threads(2)
    assert main(train if command == "train" else ["resume", str(out)]) == 0
    assert seen == [1, 1]


def test_sigterm_is_exit_code_143_and_resume_ends_with_the_same_bits(tmp_path: Path) -> None:
    command = [*TRAIN, "--iterations", "10", "50", "--checkpoint-every", "1000"]
    process = start(*command, "--out", "stopped", cwd=tmp_path)
    log = tmp_path / "stopped" / "log.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_text().count("\n") >= 15):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "fastebm: stopped as asked" in errors
    assert main(["resume", str(tmp_path / "stopped")]) == 0
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    runs = [CoarseToFineRun.load(tmp_path / name) for name in ("stopped", "whole")]
    assert torch.equal(runs[0].sample(9), runs[1].sample(9))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resume", "missing"], "no config.json"),
        (["resume", "RUN", "--data", "x.npz"], "learns scikit-learn's digits"),
    ],
)
def test_wrong_arguments(refusal: Callable[[list[str]], str], arguments: list[str], message: str) -> None:
    assert message in refusal(arguments)
