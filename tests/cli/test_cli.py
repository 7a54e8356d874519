"""The command line, mostly in this process; what only a process has (exit codes, a kill) in one of its own."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image

from fastebm.cli import main
from fastebm.runs.folder import RunFolder
from fastebm.training import CoarseToFineRun
from fastebm.training.coarse_to_fine.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--base-width", "1", "--num-steps", "2", "--batch-sizes", "8", "8", "--log-every", "1"]
TRAIN = ["train", "coarse-to-fine", "--preset", "digits", *TINY]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fastebm.cli", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert main([*TRAIN, "--iterations", "3", "4", "--out", str(out)]) == 0
    return out


def test_help_names_the_commands(tmp_path: Path) -> None:
    process = start("--help", cwd=tmp_path)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    commands = {"demo", "train", "resume", "sample", "generate", "denoise", "inpaint", "translate", "interpolate"}
    commands |= {"detect", "restore", "evaluate", "bench", "info", "build"}
    listed = re.search(r"{([\w,]+)}", "".join(printed.split()))  # the usage may be wrapped
    assert listed is not None
    assert set(listed[1].split(",")) == commands


def test_help_needs_neither_matplotlib_nor_scikit_learn() -> None:
    program = "import sys, fastebm.cli; print([m for m in ('matplotlib', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_user_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    process = start("sample", "nowhere", cwd=tmp_path)
    printed, errors = process.communicate(timeout=300)
    assert (process.returncode, printed) == (2, "")
    assert errors == "fastebm: nowhere is not a run of fastebm: it has no config.json\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "RUN", "--count", "0"], "--count must be at least 1"),
        (["sample", "RUN", "--out", "x.jpg"], "must end in .npz or .png"),
        (["sample", "RUN", "--out", "missing/x.png"], "does not exist"),
        (["sample", "RUN", "--dtype", "bfloat16"], "--dtype is of a VAE's decoder, and"),
        (["sample", "RUN", "--device", "banana"], "'banana' is not a device"),
        (["sample", "RUN", "--seed", str(2**70)], "seed must be in"),
        (["demo", "--count", "0"], "--count must be at least 1"),
        (["demo", "--threads", "0"], "--threads must be at least 1"),
        (["demo", "--iterations", "3"], "entry in sizes, iterations"),
        (["info", "missing"], "no config.json"),
        ([*TRAIN, "--iterations", "3", "5", "--out", "RUN"], "iterations is [3, 4] there"),
        ([*TRAIN, "--sizes", "8", "16", "--out", "new"], "too small to train up to 16"),
        ([*TRAIN, "--channels", "3", "--out", "new"], "images must be float32"),
        (["train", "coarse-to-fine", "--preset", "mnist"], "--preset mnist needs --data"),
        (["train", "coarse-to-fine", "--data", "nowhere.npz"], "nowhere.npz: there is no such file"),
        (["resume", "missing"], "no config.json"),
        (["resume", "RUN", "--data", "x.npz"], "learns scikit-learn's digits"),
    ],
)
def test_wrong_arguments(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(trained) if argument == "RUN" else argument for argument in arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.startswith("fastebm: ")
    assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["paint"], ["train"], ["train", "fine-to-coarse"], ["sample", "x", "--count", "q"]]
)
def test_what_does_not_parse_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_train_writes_a_run_and_says_when_it_is_finished(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = CoarseToFineRun.load(trained)
    assert run.finished
    assert (run.config.iterations, run.config.base_width, run.config.data_noise) == ((3, 4), 1, 0.03)
    assert {"samples.png", "strip.png", "curves.png", "log.jsonl"} <= {path.name for path in trained.iterdir()}
    assert main([*TRAIN, "--iterations", "3", "4", "--out", str(trained)]) == 0
    assert "was finished before" in capsys.readouterr().out


def test_sample_writes_arrays_and_pictures(trained: Path, tmp_path: Path) -> None:
    assert main(["sample", str(trained), "--count", "7"]) == 0
    images = np.load(trained / "samples-7.npz")["images"]
    assert (images.shape, images.dtype) == ((7, 1, 8, 8), np.float32)
    np.testing.assert_array_equal(images, CoarseToFineRun.load(trained).sample(7).numpy())

    out = tmp_path / "a.npz"
    assert main(["sample", str(trained), "--count", "7", "--seed", "3", "--out", str(out)]) == 0
    seeded = np.load(out)["images"]
    assert not np.array_equal(seeded, images)
    assert main(["sample", str(trained), "--count", "7", "--seed", "3", "--out", str(out)]) == 0
    np.testing.assert_array_equal(np.load(out)["images"], seeded)

    assert main(["sample", str(trained), "--count", "7", "--out", str(tmp_path / "a.png")]) == 0
    assert imread(tmp_path / "a.png").shape[:2] == (10 * 4, (7 * 9 + 1) * 4)


def test_chains_that_are_not_finite_are_one_line_and_exit_code_1(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = CoarseToFineRun.load(trained)
    steep = {size: lambda x: 1e30 * x.square().sum((1, 2, 3)) for size in run.levels}
    config = dataclasses.replace(run.config, engine="autograd")
    broken = dataclasses.replace(run, levels=steep, config=config)
    monkeypatch.setattr("fastebm.cli.sample.load", lambda *_: broken)
    assert main(["sample", str(trained), "--count", "3", "--out", str(tmp_path / "a.npz")]) == 1
    errors = capsys.readouterr().err
    assert "3 of 3 chains are not finite" in errors
    assert errors.splitlines()[-1].startswith("fastebm: ")
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_info_says_what_runs_and_tests_the_random_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "known answer given" in printed
    assert "operators on the CPU" in printed


def test_info_describes_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(trained)]) == 0
    printed = capsys.readouterr().out
    assert "7 of 7 iterations" in printed
    assert "(4, 8)" in printed


def test_build_that_can_not_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    assert main(["build"]) == 1
    assert "no C++ compiler was found" in capsys.readouterr().err


def test_a_diverged_run_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--max-energy", "0.001", "--out", str(tmp_path / "run")]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fastebm: training stopped at iteration 1: ")


def test_the_demo_from_digits_to_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs" / "demo"
    demo = ["demo", "--iterations", "2", "2", "--count", "30", "--out", str(out)]
    assert main(demo) == 0
    printed = capsys.readouterr().out
    assert str(out) in printed
    assert "The requirements are" in printed
    expected = {
        ".lock",
        "samples.png",
        "strip.png",
        "curves.png",
        "samples.npz",
        "verdict.json",
        "config.json",
        "log.jsonl",
    }
    assert {path.name for path in out.iterdir()} == expected | {"checkpoints"}
    verdict = json.loads((out / "verdict.json").read_text())
    assert sum(verdict["classes"]["counts"]) == 30
    assert np.load(out / "samples.npz")["images"].shape == (30, 1, 8, 8)

    # Finished, it stays as it is, and the next goes to a folder of its own.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (tmp_path / "runs" / "demo-2").mkdir()
    (tmp_path / "runs" / "demo-2" / "letter.txt").write_text("")
    assert main(demo) == 0
    assert f"goes to {out}-3" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert (tmp_path / "runs" / "demo-3" / "verdict.json").is_file()

    # Unfinished, it is taken up.
    (out / "verdict.json").unlink()
    assert main(demo) == 0
    assert (out / "verdict.json").is_file()


def test_killed_and_taken_up_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    command = [*TRAIN, "--iterations", "20", "80", "--checkpoint-every", "7"]
    process = start(*command, "--out", "killed", cwd=tmp_path)
    checkpoints = RunFolder(tmp_path / "killed").checkpoints
    # Amid the second stage, and then at whatever it is doing.
    while process.poll() is None and max(checkpoints.iterations(), default=0) < 30:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    assert 30 <= checkpoints.iterations()[-1] < 100

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # no checkpoint is damaged by a kill
        assert main([*command, "--out", str(tmp_path / "killed")]) == 0
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    resumed, whole = (RunFolder(tmp_path / name).checkpoints.load_newest() for name in ("killed", "whole"))
    assert resumed is not None
    assert whole is not None
    assert resumed.iteration == whole.iteration == 100
    assert [name for name in whole.tensors if not torch.equal(whole.tensors[name], resumed.tensors[name])] == []


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
    assert (run.config.flip, run.config.energy_l2) == (True, 1e-3)  # of the preset for colour images
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
    update = Trainer.update

    def watched(self: Trainer) -> dict[str, float]:
        seen.append(torch.get_num_threads())
        return update(self)

    monkeypatch.setattr(Trainer, "update", watched)
    torch.set_num_threads(2)
    assert main(train if command == "train" else ["resume", str(out)]) == 0
    assert seen == [1, 1]


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
        assert f"(try {attempt} of 2)\n" in errors
    assert "RuntimeWarning" not in errors
    assert "The guard went back 2 times in vain" in errors.splitlines()[-1]


def test_sigterm_is_exit_code_143_and_resume_ends_with_the_same_bits(tmp_path: Path) -> None:
    command = [*TRAIN, "--iterations", "20", "120", "--checkpoint-every", "1000"]
    process = start(*command, "--out", "stopped", cwd=tmp_path)
    log = tmp_path / "stopped" / "log.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_text().count("\n") >= 25):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "fastebm: stopped as asked" in errors
    assert main(["resume", str(tmp_path / "stopped")]) == 0
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    runs = [CoarseToFineRun.load(tmp_path / name) for name in ("stopped", "whole")]
    assert torch.equal(runs[0].sample(9), runs[1].sample(9))
