"""Kills, a polite stop, a full disk, a folder that is read only, two runs in one folder: nothing is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastebm.runs.folder import RunFolder
from fastebm.training import CoarseToFineConfig, CoarseToFineRun, RunError, StoppedError, load, resume, train
from fastebm.training.coarse_to_fine.trainer import CoarseToFineTrainer
from tests.training.resumed_runs import Stop, differing, log, stopping

ROOT = Path(__file__).resolve().parents[3]


class Runner:
    """Trains in children of `runner.py`: `order`, then `next` for what the child says."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("runner.py"))],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def order(self, config: CoarseToFineConfig, path: Path, limit: int | None = None) -> int:
        """Begins a child and returns its process id."""
        assert self.process.stdin is not None
        line = {"path": str(path), "config": dataclasses.asdict(config), "limit": limit}
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        return int(self.next()["pid"])

    def next(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def until(self, key: str) -> dict[str, Any]:
        while key not in (said := self.next()):
            pass
        return said


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    runner = Runner()
    yield runner
    assert runner.process.stdin is not None
    runner.process.stdin.close()
    runner.process.wait(timeout=60)


def assert_same_run(one: Path, other: Path) -> None:
    assert differing(one, other) == []
    runs = [CoarseToFineRun.load(path) for path in (one, other)]
    assert all(run.finished for run in runs)
    assert torch.equal(runs[0].sample(20), runs[1].sample(20))


def test_killed_a_dozen_times_at_random_it_ends_with_the_same_bits(
    tiny: CoarseToFineConfig, tmp_path: Path, runner: Runner
) -> None:
    config = dataclasses.replace(tiny, iterations=(60, 120), checkpoint_every=2, ema=0.9, energy_l2=0.01)
    runner.order(config, tmp_path / "whole")
    assert runner.until("ended") == {"ended": "finished"}
    runner.until("status")

    moments = random.Random(4)
    kills = 0
    while True:
        child = runner.order(config, tmp_path / "killed")
        said: dict[str, Any] = {}
        # At most 13 iterations a time, so that 180 of them take more than a dozen kills.
        for _ in range(moments.randint(1, 12)):
            said = runner.next()
            if "ended" in said:
                break
        if "ended" in said:
            break
        time.sleep(moments.uniform(0, 0.008))  # amid an iteration, or its checkpoint
        os.kill(child, signal.SIGKILL)
        killed = os.WTERMSIG(runner.until("status")["status"]) == signal.SIGKILL
        kills += killed
        if not killed:
            break
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # no kill damages a checkpoint
            RunFolder(tmp_path / "killed").newest_checkpoint()
    assert kills >= 10
    if "ended" in said:
        assert said == {"ended": "finished"}
        runner.until("status")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    logs = [log(tmp_path / name) for name in ("whole", "killed")]
    for one, other in zip(*logs, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}
    assert not list((tmp_path / "killed").rglob(".*.part"))


def test_sigterm_saves_the_last_update_and_stops(tiny: CoarseToFineConfig, tmp_path: Path, runner: Runner) -> None:
    config = dataclasses.replace(tiny, iterations=(40, 60), checkpoint_every=1000)
    runner.order(config, tmp_path / "whole")
    runner.until("status")
    child = runner.order(config, tmp_path / "stopped")
    while runner.until("iteration")["iteration"] < 10:
        pass
    os.kill(child, signal.SIGTERM)
    ended = runner.until("ended")
    assert ended["ended"] == "StoppedError"
    assert runner.until("status") == {"status": 0}
    (saved,) = RunFolder.existing(tmp_path / "stopped").checkpoints.iterations()
    assert saved >= 10
    assert f"iteration {saved} is saved" in ended["message"]
    runner.order(config, tmp_path / "stopped")
    assert runner.until("ended") == {"ended": "finished"}
    runner.until("status")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_sigterm_in_this_process_is_given_back(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def terminate(line: dict[str, Any]) -> None:
        if line["iteration"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError, match="iteration 5 "):
        train(tiny, images, tmp_path, progress=False, save_pictures=False, on_log=terminate)
    assert signal.getsignal(signal.SIGTERM) is before
    assert CoarseToFineRun.load(tmp_path).iteration == 5


def test_two_runs_in_one_folder(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, runner: Runner) -> None:
    config = dataclasses.replace(tiny, iterations=(400, 4000))
    child = runner.order(config, tmp_path / "run")
    runner.until("iteration")
    with pytest.raises(RunError, match="another process is training in"):
        train(config, images, tmp_path / "run", progress=False, save_pictures=False)
    # A kill leaves no lock behind.
    os.kill(child, signal.SIGKILL)
    runner.until("status")
    with RunFolder.locked(tmp_path / "run"):
        pass


def test_a_full_disk_leaves_the_older_checkpoints(tiny: CoarseToFineConfig, tmp_path: Path, runner: Runner) -> None:
    runner.order(tiny, tmp_path / "whole")
    runner.until("status")
    size = max(path.stat().st_size for path in (tmp_path / "whole" / "checkpoints").iterdir())
    # Checkpoints grow when the first stage has ended: those of it fit, none after it does.
    runner.order(tiny, tmp_path / "full", limit=size - 1000)
    ended = runner.until("ended")
    runner.until("status")
    assert ended["ended"] == "RunError"
    saved = RunFolder.existing(tmp_path / "full").checkpoints.iterations()
    assert saved
    assert "the checkpoint of iteration" in ended["message"]
    assert "could not be written" in ended["message"]
    assert f"The checkpoint of iteration {saved[-1]} is whole" in ended["message"]
    assert not list((tmp_path / "full").rglob(".*.part"))
    assert CoarseToFineRun.load(tmp_path / "full").iteration == saved[-1]
    runner.order(tiny, tmp_path / "full")
    assert runner.until("ended") == {"ended": "finished"}
    runner.until("status")
    assert_same_run(tmp_path / "whole", tmp_path / "full")


def test_a_full_disk_while_logging(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastebm.runs.folder.RunLog.append", full)
    with pytest.raises(RunError, match=r"the log could not be written .*No space left.*has no checkpoint yet"):
        train(tiny, images, tmp_path, progress=False)


def test_a_folder_that_is_read_only(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "parent" / "run"
    path.parent.mkdir()
    path.parent.chmod(0o555)
    if os.access(path.parent, os.W_OK):  # root may write anywhere: then let the system say what it says to others

        def refused(self: Path, *_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "mkdir", refused)
    try:
        with pytest.raises(RunError, match=r"run can't be written to: Permission denied"):
            train(tiny, images, path, progress=False)
    finally:
        path.parent.chmod(0o755)
    assert not path.exists()


def test_a_swallowed_ctrl_c_still_stops_the_run(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where it comes while Python runs a destructor or a callback of PyTorch."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    updated = CoarseToFineTrainer.update

    def swallowing(self: CoarseToFineTrainer) -> dict[str, float]:
        metrics = updated(self)
        if self.iteration == 5:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        return metrics

    with monkeypatch.context() as patch:
        patch.setattr(CoarseToFineTrainer, "update", swallowing)
        with pytest.raises(KeyboardInterrupt):
            train(tiny, images, tmp_path / "stopped", progress=False, save_pictures=False)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert CoarseToFineRun.load(tmp_path / "stopped").iteration == 3
    train(tiny, images, tmp_path / "stopped", progress=False, save_pictures=False)
    train(tiny, images, tmp_path / "whole", progress=False, save_pictures=False)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_process_that_ignores_ctrl_c_still_does(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run = train(
            tiny,
            images,
            tmp_path,
            progress=False,
            save_pictures=False,
            on_log=lambda line: os.kill(os.getpid(), signal.SIGINT),
        )
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.finished


@pytest.mark.parametrize("stop_at", [6, 10])
def test_the_log_of_a_resumed_run_has_means_over_all_its_iterations(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, stop_at: int
) -> None:
    config = dataclasses.replace(tiny, log_every=5, checkpoint_every=1)

    def train_quietly(path: Path) -> None:
        train(config, images, path, progress=False, save_pictures=False)

    class Killed(BaseException):
        pass

    train_quietly(tmp_path / "whole")
    updated = CoarseToFineTrainer.update

    def dying(self: CoarseToFineTrainer) -> dict[str, float]:
        if self.iteration == stop_at:
            raise Killed
        return updated(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CoarseToFineTrainer, "update", dying)
        with pytest.raises(Killed):
            train_quietly(tmp_path / "killed")
    train_quietly(tmp_path / "killed")
    whole, killed = log(tmp_path / "whole"), log(tmp_path / "killed")
    assert [line["iteration"] for line in whole] == [5, 10, 13]
    assert [line | {"seconds": 0} for line in whole] == [line | {"seconds": 0} for line in killed]


def test_weights_that_are_not_finite_are_never_used_in_silence(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path
) -> None:
    train(dataclasses.replace(tiny, keep_checkpoints=2), images, tmp_path, progress=False, save_pictures=False)
    checkpoints = RunFolder.existing(tmp_path).checkpoints
    good, newest = checkpoints.iterations()
    for iteration in (newest, good):
        found = checkpoints._load(iteration)
        spoiled = {name: tensor * float("nan") for name, tensor in found.tensors.items() if tensor.is_floating_point()}
        checkpoints.save(iteration, found.tensors | spoiled, found.state)
        if iteration == newest:
            # A run goes back to the one before, and on from there to the same end.
            with pytest.warns(RuntimeWarning, match=r"the numbers of its tensor .* are not finite\); the one before"):
                assert resume(tmp_path, images, progress=False, save_pictures=False).finished
            found = checkpoints._load(newest)
            checkpoints.save(newest, found.tensors | spoiled, found.state)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for act in (lambda: resume(tmp_path), lambda: load(tmp_path), lambda: resume(tmp_path, images, progress=False)):
        with pytest.raises(
            RunError, match=r"all 2 checkpoints in .* are damaged; the newest, .*000013\.safetensors: the"
        ):
            act()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_checkpoint_that_cannot_be_read_is_never_trained_over(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        train(tiny, images, tmp_path, progress=False, save_pictures=False, on_log=stopping(11))
    weights = tmp_path / "checkpoints" / "iteration-000000009.safetensors"
    kept = weights.rename(tmp_path / "kept")
    weights.mkdir()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for act in (lambda: train(tiny, images, tmp_path, progress=False), lambda: load(tmp_path)):
        with pytest.raises(RunError, match=r"000009\.safetensors can't be read: Is a directory\. It may be whole"):
            act()
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    weights.rmdir()
    kept.rename(weights)
    assert train(tiny, images, tmp_path, progress=False, save_pictures=False).finished


def test_a_changed_config_is_noticed_before_anything_is_allocated(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny, images, tmp_path, progress=False, save_pictures=False)
    content = json.loads((tmp_path / "config.json").read_text())
    content["config"]["base_width"] = 2000
    (tmp_path / "config.json").write_text(json.dumps(content))

    def allocated(*_: object, **__: object) -> None:
        raise AssertionError("the net was made")

    monkeypatch.setattr(CoarseToFineTrainer, "reset", allocated)
    monkeypatch.setattr(torch.nn.Module, "to_empty", allocated)
    for act in (lambda: load(tmp_path), lambda: resume(tmp_path, images, progress=False)):
        with pytest.raises(RunError, match=r"another config than that of config.json: base_width is 1 there and 2000"):
            act()
    # Checkpoints of older versions do not name their config, but their tensors have shapes.
    checkpoints = RunFolder.existing(tmp_path).checkpoints
    for iteration in checkpoints.iterations():
        found = checkpoints._load(iteration)
        state = {name: value for name, value in found.state.items() if name != "config"}
        checkpoints.save(iteration, found.tensors, state)
    for act in (lambda: load(tmp_path), lambda: resume(tmp_path, images, progress=False)):
        with pytest.raises(RunError, match=r"its tensor .* is float32 .*, and the config's float32 .*8000"):
            act()


def test_a_net_larger_than_the_memory_is_refused_before_the_folder_is_made(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError,
        match=r"the net that the config makes would need [\d.,]+ [GTPE]iB of memory, and [\d.,]+ GiB are free",
    ):
        train(dataclasses.replace(tiny, base_width=2**16), images, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_no_memory_is_one_line(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: CoarseToFineTrainer) -> dict[str, float]:
        torch.empty(2**58)
        return {}

    monkeypatch.setattr(CoarseToFineTrainer, "update", full)
    with pytest.raises(RunError, match="the memory is too small for this training: smaller batches"):
        train(tiny, images, tmp_path, progress=False)


def test_a_run_that_is_moved_while_it_trains_says_so(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    def move(line: dict[str, Any]) -> None:
        if line["iteration"] == 7:
            (tmp_path / "run").rename(tmp_path / "moved")

    with pytest.raises(RunError, match=r"could not be written to .*run: .*The folder was moved or removed"):
        train(tiny, images, tmp_path / "run", progress=False, save_pictures=False, on_log=move)
    assert not (tmp_path / "run").exists()
    assert resume(tmp_path / "moved", images, progress=False, save_pictures=False).finished


def test_a_finished_run_takes_no_unknown_option(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    train(tiny, images, tmp_path, progress=False, save_pictures=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        resume(tmp_path, foo=1)  # type: ignore[call-arg]
