"""`fastebm train`: runs from one command, presets, the guard, kills."""

import json
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastebm.cli import main
from fastebm.cli.train import parse_train
from fastebm.runs.folder import RunFolder
from fastebm.training import CoarseToFineRun
from tests.cli.tiny_runs import TRAIN, start


def test_train_writes_a_run_and_says_when_it_is_finished(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = CoarseToFineRun.load(trained)
    assert run.finished
    assert (run.config.iterations, run.config.base_width, run.config.data_noise) == ((3, 4), 1, 0.03)
    assert {"samples.png", "strip.png", "curves.png", "log.jsonl"} <= {path.name for path in trained.iterdir()}
    assert main([*TRAIN, "--iterations", "3", "4", "--out", str(trained)]) == 0
    assert "was finished before" in capsys.readouterr().out


def test_killed_and_taken_up_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    command = [*TRAIN, "--iterations", "10", "40", "--checkpoint-every", "4"]
    process = start(*command, "--out", "killed", cwd=tmp_path)
    checkpoints = RunFolder(tmp_path / "killed").checkpoints
    # Amid the second stage, and then at whatever it is doing.
    while process.poll() is None and max(checkpoints.iterations(), default=0) < 15:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    assert 15 <= checkpoints.iterations()[-1] < 50

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # no checkpoint is damaged by a kill
        assert main([*command, "--out", str(tmp_path / "killed")]) == 0
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    resumed, whole = (RunFolder(tmp_path / name).checkpoints.load_newest() for name in ("killed", "whole"))
    assert resumed is not None
    assert whole is not None
    assert resumed.iteration == whole.iteration == 50
    assert [name for name in whole.tensors if not torch.equal(whole.tensors[name], resumed.tensors[name])] == []


def test_a_preset_shapes_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("set.npz", x_train=np.zeros((9, 28, 28), np.uint8))
    width = ["--base-width", "1", "--num-steps", "1", "--iterations", "1", "1", "1", "--batch-sizes", "2", "2", "2"]
    assert main(["train", "coarse-to-fine", "--preset", "mnist", "--data", "set.npz", *width]) == 0
    content = json.loads(Path("runs/set/config.json").read_text())
    assert content["config"]["sizes"] == [8, 16, 32]
    assert content["images"] | {"path": ""} == {
        "path": "",
        "size": 32,
        "channels": 1,
        "split": None,
        "fit": "pad",
        "crop": None,
        "key": None,
    }


def test_the_guard_says_on_one_line_that_it_went_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--max-gap", "1e-9", "--retries", "2", "--out", str(tmp_path / "run")]) == 1
    errors = capsys.readouterr().err
    for attempt in (1, 2):
        (line,) = (line for line in errors.splitlines() if f"(try {attempt} of 2)" in line)
        assert ". Only 1 updates are recorded" in line or ". The " in line  # and why, in words
    assert "RuntimeWarning" not in errors
    assert "The guard went back 2 times in vain" in errors.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TRAIN, "--iterations", "3", "5", "--out", "RUN"], "iterations is [3, 4] there"),
        ([*TRAIN, "--sizes", "8", "16", "--out", "new"], "too small to train up to 16"),
        ([*TRAIN, "--channels", "3", "--out", "new"], "images must be float32"),
        (["train", "coarse-to-fine", "--preset", "mnist"], "--preset mnist needs --data"),
        (["train", "coarse-to-fine", "--data", "nowhere.npz"], "nowhere.npz: there is no such file"),
    ],
)
def test_wrong_arguments(refusal: Callable[[list[str]], str], arguments: list[str], message: str) -> None:
    assert message in refusal(arguments)


@pytest.mark.parametrize("method", ["coarse-to-fine", "ec-vae", "ec-posterior", "ec-flow"])
def test_a_method_without_arguments_trains_its_preset_of_digits(method: str) -> None:
    command = parse_train(method, [])
    assert command.preset == "digits"
    assert command._folder() == Path("runs") / ("digits" if method == "coarse-to-fine" else f"digits-{method}")
    of_data = parse_train(method, ["--data", "sets/mnist.npz", "--preset", "digits"])
    assert of_data._folder() == Path("runs") / ("mnist" if method == "coarse-to-fine" else f"mnist-{method}")
    hidden = parse_train(method, ["--data", "sets/.hidden", "--preset", "digits"])
    assert hidden._folder() == Path("runs") / ("hidden" if method == "coarse-to-fine" else f"hidden-{method}")


@pytest.mark.parametrize("method", ["coarse-to-fine", "ec-vae", "ec-posterior", "ec-flow"])
def test_images_alone_take_the_preset_of_pictures(method: str) -> None:
    for given in (["--data", "pictures/"], ["--data=pictures/"]):
        command = parse_train(method, given)
        assert command.preset == "pictures"
        assert (command.config.channels, command.config.log_every) == (3, 20)
    assert parse_train(method, ["--data", "pictures/", "--preset", "mnist"]).preset == "mnist"
