"""The trainer learns, resumes to the last bit, and stops in time."""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastebm.data import pyramid
from fastebm.models import CoarseToFineEnergy
from fastebm.runs.folder import RunFolder
from fastebm.training import (
    CoarseToFineConfig,
    CoarseToFineRun,
    DivergedError,
    RunError,
    train,
)
from tests.training.resumed_runs import (
    Stop,
    assert_resumes_to_the_same_bits,
    differing,
    differing_tensors,
    log,
    stopping,
)


def train_quietly(
    config: CoarseToFineConfig, images: Tensor, path: Path, stop_at: int | None = None
) -> CoarseToFineRun:
    """Trains silently; with `stop_at` only up to that iteration, which gets its line in the log but no checkpoint."""
    return train(config, images, path, progress=False, save_pictures=False, on_log=stopping(stop_at))


def test_energies_of_data_fall_below_those_of_noise(images: Tensor, tmp_path: Path) -> None:
    config = CoarseToFineConfig(
        sizes=(4, 8),
        iterations=(40, 60),
        batch_sizes=(32, 32),
        learning_rates=(2e-3, 2e-3),
        channels=1,
        base_width=2,
        num_steps=6,
        data_noise=0.03,
    )
    run = train_quietly(config, images, tmp_path / "run")
    assert run.finished
    assert sorted(run.levels) == [4, 8]
    data = pyramid(images, 4)
    for size, energy in run.levels.items():
        noise = torch.rand(500, 1, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with torch.no_grad():
            real, spoiled = energy(data[size]), energy(noise)
        # The share of pairs that the energy puts in the right order: 0.5 before training.
        assert (real[:, None] < spoiled[None]).float().mean() > 0.8
    samples = run.sample(200)
    assert samples.abs().max() <= 1
    with torch.no_grad():
        assert run.levels[8](samples).mean() < spoiled.mean()


@pytest.mark.parametrize("stop_at", [2, 4, 5, 6, 7, 12])
@pytest.mark.parametrize("changes", [{}, {"ema": 0.9, "energy_l2": 0.1, "data_noise": 0.0}], ids=["plain", "averaged"])
def test_a_resumed_run_ends_with_the_same_bits(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, stop_at: int, changes: dict[str, Any]
) -> None:
    config = dataclasses.replace(tiny, engine="auto", **changes)
    assert_resumes_to_the_same_bits(train_quietly, config, images, tmp_path, stop_at)


def test_a_damaged_newest_checkpoint_costs_only_its_iterations(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path
) -> None:
    train_quietly(tiny, images, tmp_path / "whole")
    with pytest.raises(Stop):
        train_quietly(tiny, images, tmp_path / "stopped", 11)
    (tmp_path / "stopped" / "checkpoints" / "iteration-000000009.safetensors").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="is damaged"):
        train_quietly(tiny, images, tmp_path / "stopped")
    assert differing(tmp_path / "whole", tmp_path / "stopped") == []


def test_all_depends_on_the_seed_and_on_nothing_else(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(1)
    train_quietly(tiny, images, tmp_path / "a")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    train_quietly(tiny, images, tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), state)
    assert differing(tmp_path / "a", tmp_path / "b") == []
    other = train_quietly(dataclasses.replace(tiny, seed=1), images, tmp_path / "c")
    assert not torch.equal(CoarseToFineRun.load(tmp_path / "a").sample(4), other.sample(4))


def test_lower_levels_stay_as_their_stage_left_them(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    train_quietly(dataclasses.replace(tiny, keep_checkpoints=100), images, tmp_path)
    checkpoints = RunFolder.existing(tmp_path).checkpoints
    ended, last = checkpoints._load(5).tensors, checkpoints._load(13).tensors
    frozen = [name for name in ended if name.startswith("frozen.4.")]
    assert frozen
    assert differing_tensors({name: ended[name] for name in frozen}, {name: last[name] for name in frozen}) == []
    # While the net itself went on: the head is trained in both stages.
    assert not torch.equal(ended["net.head.linear.bias"], last["net.head.linear.bias"])


def test_averaged_weights_are_the_running_mean(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny, sizes=(8,), iterations=(4,), batch_sizes=(8,), learning_rates=(1e-3,))
    config = dataclasses.replace(config, ema=0.5, checkpoint_every=1, keep_checkpoints=10)
    run = train_quietly(config, images, tmp_path)
    checkpoints = RunFolder.existing(tmp_path).checkpoints
    name = "from_rgb.8.bias"
    weights = [checkpoints._load(k).tensors[f"net.{name}"] for k in range(1, 5)]
    # The start of the run is an average too; a bias starts at zero.
    mean = torch.zeros_like(weights[0])
    for value in weights:
        mean = 0.5 * mean + 0.5 * value
    averaged = run.levels[8]
    assert isinstance(averaged, CoarseToFineEnergy)
    torch.testing.assert_close(averaged.state_dict()[name], mean)


def test_an_unfinished_run_can_be_sampled(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    sizes = {}
    for stop_at in (2, 4, 6, 8, 11):
        path = tmp_path / str(stop_at)
        with pytest.raises(Stop):
            train_quietly(tiny, images, path, stop_at)
        if stop_at == 2:
            with pytest.raises(RunError, match="no checkpoint yet"):
                CoarseToFineRun.load(path)
            continue
        run = CoarseToFineRun.load(path)
        assert not run.finished
        sizes[run.iteration] = run.sample(3).shape
    # At iteration 5 the second stage has not begun; at 6 its block is fading in; at 9 it has.
    assert sizes == {3: (3, 1, 4, 4), 5: (3, 1, 4, 4), 6: (3, 1, 8, 8), 9: (3, 1, 8, 8)}


def test_samples_repeat_and_differ_by_seed_and_not_by_batch(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path
) -> None:
    run = train_quietly(tiny, images, tmp_path)
    samples = run.sample(10)
    assert torch.equal(run.sample(10), samples)
    torch.testing.assert_close(run.sample(10, batch_size=3), samples)
    assert not torch.equal(run.sample(10, seed=tiny.seed), samples)
    assert len(samples.flatten(1).unique(dim=0)) == 10


def test_the_guard_stops_an_exploding_run_before_its_checkpoint(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path
) -> None:
    config = dataclasses.replace(
        tiny,
        sizes=(8,),
        iterations=(400,),
        batch_sizes=(8,),
        learning_rates=(0.1,),
        max_energy=20.0,
        retries=0,
        checkpoint_every=1,
    )
    with pytest.raises(DivergedError, match=r"more than max_energy = 20\. The checkpoint of iteration \d+ in"):
        train_quietly(config, images, tmp_path)
    run = CoarseToFineRun.load(tmp_path)
    assert 0 < run.iteration < 400
    with torch.no_grad():
        energy = run.levels[run.size]
        for seen in (images[:100], run.cascade().sample(100, 1, channels=1)):
            assert energy(seen).abs().max() <= 2 * config.max_energy
    assert all(abs(line["energy_data"]) <= 20 for line in log(tmp_path))


def test_a_config_that_makes_no_net_leaves_no_folder(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base_width"):
        train_quietly(dataclasses.replace(tiny, base_width=0), images, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_only_damaged_checkpoints_are_an_error_and_nothing_is_lost(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path
) -> None:
    train_quietly(tiny, images, tmp_path)
    for weights in (tmp_path / "checkpoints").glob("*.safetensors"):
        weights.write_bytes(b"damaged")
    lines = (tmp_path / "log.jsonl").read_text()
    for again in (lambda: train(tiny, images, tmp_path), lambda: CoarseToFineRun.load(tmp_path)):
        with pytest.raises(RunError, match=r"all 3 checkpoints in .* are damaged; the newest, iteration-000000013"):
            again()
    assert (tmp_path / "log.jsonl").read_text() == lines


def test_images_of_two_colours(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny, channels=2)
    run = train(config, images.repeat(1, 2, 1, 1), tmp_path, progress=False)
    assert run.sample(3).shape[:2] == (3, 2)
    assert (tmp_path / "samples.png").is_file()


def test_weights_never_take_in_what_is_not_finite(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    forward = CoarseToFineEnergy.forward

    def broken(self: CoarseToFineEnergy, x: Tensor, beta: float | Tensor = 1.0) -> Tensor:
        nonlocal calls
        energies = forward(self, x, beta)
        calls += torch.is_grad_enabled() and self.training
        return energies * math.nan if calls == 5 and self.training else energies

    monkeypatch.setattr(CoarseToFineEnergy, "forward", broken)
    with pytest.raises(DivergedError, match="iteration 5: an energy of data is nan"):
        train_quietly(dataclasses.replace(tiny, retries=0), images, tmp_path)
    monkeypatch.undo()
    # What was saved is good: the run goes on from there.
    assert train_quietly(tiny, images, tmp_path).finished


def test_a_finished_run_is_only_loaded(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    train_quietly(tiny, images, tmp_path)
    before = {path: (path.stat().st_mtime_ns, digest(path)) for path in sorted((tmp_path / "checkpoints").iterdir())}
    assert train_quietly(tiny, images, tmp_path).finished
    assert before == {path: (path.stat().st_mtime_ns, digest(path)) for path in before}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_another_config_and_other_images_are_refused(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    train_quietly(tiny, images, tmp_path)
    with pytest.raises(RunError, match="steps is 3 there and 4 here"):
        train_quietly(dataclasses.replace(tiny, num_steps=4), images, tmp_path)
    with pytest.raises(RunError, match="other images"):
        train_quietly(tiny, -images, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.double(), "must be float32"),
        (lambda x: x.expand(-1, 3, -1, -1), "must be float32 .N, 1, S, S."),
        (lambda x: x[:0], "N >= 1"),
        (lambda x: x * 16, "lie in"),
        (lambda x: x * math.nan, "lie in"),
        (lambda x: x[..., ::2, ::2], "too small to train up to 8"),
        (lambda x: x[..., :6, :6], "can't be halved"),
    ],
)
def test_images_that_do_not_fit_are_refused(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train_quietly(tiny, change(images), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pictures_and_log_of_a_run(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    train(dataclasses.replace(tiny, log_every=3), images, tmp_path, progress=False, on_log=lines.append)
    assert {"samples.png", "strip.png", "curves.png"} <= {path.name for path in tmp_path.iterdir()}
    assert [line["iteration"] for line in lines] == [3, 5, 6, 9, 12, 13]
    for line in lines:
        assert line["gap"] == pytest.approx(line["energy_samples"] - line["energy_data"], abs=1e-5)
        assert line["loss"] == pytest.approx(-line["gap"], abs=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_and_its_run_can_be_sampled_elsewhere(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path
) -> None:
    run = train(tiny, images, tmp_path, device="cuda", progress=False)
    assert run.sample(4).device.type == "cuda"
    assert CoarseToFineRun.load(tmp_path, "cpu").sample(4).device.type == "cpu"
