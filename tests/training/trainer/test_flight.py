"""The flight recorder: what it keeps, that it changes no bit, what it writes, and what each diagnosis needs."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from fastebm.runs.folder import RunFolder
from fastebm.training import CoarseToFineConfig, DivergedError, ECFlowConfig, ECVAEConfig, train
from fastebm.training.coarse_to_fine.trainer import CoarseToFineTrainer
from fastebm.training.trainer.flight import (
    ChainRecord,
    FlightRecord,
    FlightRecorder,
    diagnose,
    read_record,
    read_summary,
    records,
    sentence,
    write_record,
)
from tests.training.resumed_runs import differing, trainer_at

UPDATES, BATCH, STEPS = 100, 16, 10


def healthy(updates: int = UPDATES) -> FlightRecord:
    """A record of a run in which nothing happens: energies near 1, the gap near 0, falling energies along chains."""
    draw = np.random.default_rng(0)

    def near(value: float, spread: float, *shape: int) -> Any:
        return (value + spread * draw.standard_normal(shape)).astype(np.float32)

    data, samples = near(1, 0.3, updates, BATCH), near(1, 0.3, updates, BATCH)
    numbers = {
        "gap": samples.mean(1) - data.mean(1),
        "largest_energy_data": np.abs(data).max(1),
        "largest_energy_samples": np.abs(samples).max(1),
        "clamped": near(0.3, 0.01, updates),
        "clamped_data": near(0.3, 0.01, updates),
        "learning_rate": np.full(updates, 1e-3, np.float32),
    }
    falling = np.linspace(2, 1, STEPS, dtype=np.float32)[None, :, None]
    chains = ChainRecord(
        falling + near(0, 1e-3, updates, STEPS, BATCH),
        np.abs(near(1, 0.1, updates, 4, BATCH)),
        near(0.3, 0.1, updates, 2, BATCH),
        np.full((updates, 2, BATCH), 0.5, np.float32),
    )
    norms = {"weight": np.linspace(10, 10.1, updates, dtype=np.float32)}
    return FlightRecord(np.arange(1, updates + 1), numbers, data, samples, norms, {"noise": chains})


def causes(record: FlightRecord) -> list[str]:
    return [finding.cause for finding in diagnose(record)]


def changed(values: Any, last: int, value: Any) -> Any:
    values = values.copy()
    values[-last:] = value
    return values


def with_numbers(record: FlightRecord, **numbers: Any) -> FlightRecord:
    return dataclasses.replace(record, numbers=record.numbers | numbers)


def with_chains(record: FlightRecord, kind: str = "noise", **arrays: Any) -> FlightRecord:
    chains = dataclasses.replace(record.chains["noise"], **arrays)
    return dataclasses.replace(record, chains={kind: chains})


def test_a_healthy_record_has_no_known_cause() -> None:
    assert causes(healthy()) == []
    assert sentence([], UPDATES) == "The cause is not recognised: none of the known ones shows in these numbers."
    assert sentence([], 3) == "Only 3 updates are recorded: too few for a diagnosis."


def test_numbers_that_are_not_finite_are_named_where_they_come_first() -> None:
    record = healthy()
    energies = record.chains["noise"].energies.copy()
    energies[97, 4:, 3] = math.inf
    samples = changed(record.samples, 2, math.inf)
    (finding,) = diagnose(dataclasses.replace(with_chains(record, energies=energies), samples=samples))[:1]
    assert finding.cause == "not finite"
    assert "an energy before step 5 of chains from noise in update 98" in finding.sentence
    assert "an energy of chain ends in update 99" in sentence(diagnose(dataclasses.replace(record, samples=samples)))
    gradient = np.ones(UPDATES, np.float32)
    gradient[-1] = math.inf
    assert "gradient_norm in update 100" in sentence(diagnose(with_numbers(record, gradient_norm=gradient)))
    few = healthy(3)
    assert causes(dataclasses.replace(few, data=changed(few.data, 1, math.inf))) == ["not finite"]


def test_chains_that_are_too_coarse() -> None:
    record = healthy()
    curvatures = record.chains["noise"].step_curvatures.copy()
    curvatures[:, :, :] = np.nan
    curvatures[::5] = 0.4
    curvatures[-20::5, 1, :10] = 3.5  # at the ends of chains alone
    energies = changed(record.chains["noise"].energies, 20, np.arange(STEPS, dtype=np.float32)[:, None] % 2)
    (finding,) = diagnose(with_chains(record, step_curvatures=curvatures, energies=energies))
    assert finding.cause == "coarse"
    assert "in 62% of them (median 3.5, 0.4 before), and 56% of their steps raise the energy" in finding.sentence
    assert "More data_noise, or a smaller step_size with more steps" in finding.sentence
    (noisy,) = diagnose(with_chains(record, kind="noisy images", step_curvatures=curvatures, energies=energies))
    assert "Chains from noisy images are too coarse" in noisy.sentence
    assert "More data_noise, a smaller start_temperature, or a smaller step_size with more steps" in noisy.sentence
    curvatures[-20::5, 1, 3:10] = 1.9
    assert causes(with_chains(record, step_curvatures=curvatures)) == []


def test_an_explosion_within_two_updates_is_seen() -> None:
    """As CIFAR-10's were: chains swing across valleys in the last updates, of which few or none were read in detail."""
    record = healthy()
    swinging = changed(record.chains["noise"].energies, 2, np.arange(STEPS, dtype=np.float32)[:, None] % 2)
    curvatures = record.chains["noise"].step_curvatures.copy()
    curvatures[:] = np.nan
    curvatures[2::5] = 0.4
    (finding,) = diagnose(with_chains(record, energies=swinging, step_curvatures=curvatures))
    assert finding.cause == "coarse"
    assert "from noise began to overshoot: 56% of their steps raise the energy, 0% did before" in finding.sentence
    curvatures[-2] = 0.4
    curvatures[-2, 1, :10] = 2.5
    (finding,) = diagnose(with_chains(record, energies=swinging, step_curvatures=curvatures))
    assert "in 62% of them (median 2.5, 0.4 before), and 56% of their steps raise the energy" in finding.sentence
    always = np.broadcast_to(swinging[-1:], swinging.shape)  # as a data term makes it
    assert causes(with_chains(record, energies=always)) == []


@pytest.mark.parametrize(("gap", "cause"), [(-60.0, "falling gap"), (60.0, "rising gap")])
def test_a_gap_that_opens_in_one_update(gap: float, cause: str) -> None:
    record = healthy()
    (finding,) = diagnose(with_numbers(record, gap=changed(record.numbers["gap"], 1, gap)))
    assert finding.cause == cause
    assert f"(gap {gap:+.3g}, a" in finding.sentence


def test_samples_that_stick_at_the_clamp() -> None:
    record = healthy()
    stuck = changed(record.numbers["clamped"], 30, 0.8)
    assert causes(with_numbers(record, clamped=stuck)) == ["stuck"]
    assert causes(with_numbers(record, clamped=stuck, clamped_data=np.full(UPDATES, 0.8, np.float32))) == []


def test_a_gap_that_rises_or_falls() -> None:
    record = healthy()
    found = diagnose(with_numbers(record, gap=changed(record.numbers["gap"], 20, 0.6)))
    assert [finding.cause for finding in found] == ["rising gap"]
    assert "(gap +0.6, after ±" in found[0].sentence
    assert causes(with_numbers(record, gap=changed(record.numbers["gap"], 20, -4.0))) == ["falling gap"]
    mixed = np.where(np.arange(20) % 2, 0.6, -0.6)
    assert causes(with_numbers(record, gap=changed(record.numbers["gap"], 20, mixed))) == []
    assert causes(with_numbers(record, gap=changed(record.numbers["gap"], 20, -0.9))) == []


def test_a_small_or_falling_gap_of_a_short_record_is_no_rising_one() -> None:
    """As after a resume, where there is nothing older to compare with."""
    spread = np.float32(0.3)
    for gap in (np.full(20, 1e-4), np.linspace(5, 0.1, 10), np.linspace(1e-5, 3e-5, 25), np.full(12, 0.6 * spread)):
        assert causes(with_numbers(healthy(len(gap)), gap=gap.astype(np.float32))) == []
    assert causes(with_numbers(healthy(12), gap=np.linspace(0, 0.6, 12, dtype=np.float32))) == ["rising gap"]
    assert causes(with_numbers(healthy(12), gap=np.linspace(-50, -2, 12, dtype=np.float32))) == []
    assert causes(with_numbers(healthy(12), gap=np.linspace(0, -9, 12, dtype=np.float32))) == ["falling gap"]


def test_weights_that_grow() -> None:
    record = healthy()
    norms = changed(record.weight_norms["weight"], 10, 10.1 * 1.05 ** np.arange(1, 11))
    (finding,) = diagnose(dataclasses.replace(record, weight_norms={"weight": norms}))
    assert finding.cause == "weights grow"
    assert "the learning rate 0.001 is too large" in finding.sentence


def test_weights_that_grow_are_seen_in_the_first_updates() -> None:
    """A rate far too large needs less than the updates that other causes do."""
    record = dataclasses.replace(healthy(4), weight_norms={"weight": np.array([10, np.nan, 14, np.nan], np.float32)})
    (finding,) = diagnose(record)
    assert finding.cause == "weights grow"
    assert "(norm 10 to 14 in 2)" in finding.sentence
    assert causes(healthy(4)) == []


def test_energies_that_drift_together() -> None:
    record = healthy()
    drift = np.linspace(0, 9, UPDATES, dtype=np.float32)[:, None]
    (finding,) = diagnose(dataclasses.replace(record, data=record.data + drift, samples=record.samples + drift))
    assert finding.cause == "drift"
    assert causes(dataclasses.replace(record, data=record.data + drift)) == []


def test_an_energy_that_is_flat() -> None:
    record = healthy()
    flat = with_chains(record, gradient_norms=1e-5 * record.chains["noise"].gradient_norms)
    assert causes(flat) == []
    (finding,) = diagnose(dataclasses.replace(flat, data=1e-5 * record.data, samples=1e-5 * record.samples))
    assert finding.cause == "flat"


def test_energies_that_jump_and_chains_that_are_few() -> None:
    record = healthy()
    jump = changed(record.numbers["largest_energy_samples"], 1, 80.0)
    assert causes(with_numbers(record, largest_energy_samples=jump)) == ["jump"]
    samples = record.samples.copy()
    samples[-1, 5] = -70.0
    (finding,) = diagnose(dataclasses.replace(record, samples=samples))
    assert finding.cause == "few chains"
    assert "Of 16 chains 1 end far from the others, at an energy of up to -70" in finding.sentence


# The recorder ---------------------------------------------------------------------------------------------------------


def all_starts(tiny: CoarseToFineConfig, **changes: Any) -> CoarseToFineConfig:
    starts = {"noisy_starts": 0.25, "hole_starts": 0.25, "start_temperature": 0.01}
    return dataclasses.replace(tiny, **(starts | changes))


def recorded(trainer: CoarseToFineTrainer, updates: int) -> FlightRecord:
    for _ in range(updates):
        trainer.recorder.begin({"iteration": trainer.iteration + 1, **trainer.log_fields()})
        trainer.update()
    return trainer.recorder.record()


def test_it_keeps_every_energy_and_reads_gradients_now_and_then(tiny: CoarseToFineConfig, images: Tensor) -> None:
    config = all_starts(tiny, flight_updates=4, num_steps=6, iterations=(20, 1), batch_sizes=(8, 8))
    record = recorded(trainer_at(CoarseToFineTrainer, config, images, 0), 7)
    assert record.iterations.tolist() == [4, 5, 6, 7]
    assert set(record.chains) == {"noise", "holes", "noisy images"}
    noise = record.chains["noise"]
    assert noise.energies.shape == (4, 6, 4)
    assert np.isfinite(noise.energies).all()
    assert (noise.gradient_norms.shape, noise.step_curvatures.shape) == ((4, 4, 4), (4, 2, 4))
    assert np.isfinite(noise.gradient_norms).any((1, 2)).tolist() == [False, True, False, False]
    assert np.isfinite(noise.acceptance[1]).all()
    assert ((noise.acceptance[1] >= 0) & (noise.acceptance[1] <= 1)).all()
    assert record.data.shape == record.samples.shape == (4, 8)
    np.testing.assert_allclose(record.numbers["gap"], record.samples.mean(1) - record.data.mean(1), atol=1e-6)
    assert (record.weight_norm > 0).all()
    lines = record.lines()
    assert "noise_step_curvature" in lines[1]
    assert "noise_step_curvature" not in lines[0]
    copy = FlightRecord.from_arrays(record.arrays())
    assert copy.lines() == lines


@pytest.mark.parametrize("engine", ["autograd", "fused"])
def test_training_has_the_same_bits_with_and_without(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, engine: str
) -> None:
    config = all_starts(tiny, engine=engine, num_steps=6)
    for length in (200, 0):
        changed = dataclasses.replace(config, flight_updates=length)
        train(changed, images, tmp_path / str(length), progress=False, save_pictures=False)
    assert differing(tmp_path / "200", tmp_path / "0") == []
    assert not (tmp_path / "200" / "flight").exists()


@pytest.mark.parametrize("kind", [ECVAEConfig, ECFlowConfig])
def test_so_has_that_of_a_calibrated_generator(kind: Any, images: Tensor, tmp_path: Path) -> None:
    widths = {"latent": 4, "width": 4} if kind is ECVAEConfig else {"width": 4, "levels": 1, "flow_steps": 1}
    config = kind(
        size=8, channels=1, iterations=7, batch_size=4, energy_width=4, warmup=0, num_steps=5, engine="autograd",
        data_term_weight=0.1, data_term_hinge=1e-3, checkpoint_every=3, log_every=1, **widths,
    )  # fmt: skip
    for length in (200, 0):
        changed = dataclasses.replace(config, flight_updates=length)
        train(changed, images, tmp_path / str(length), progress=False, save_pictures=False)
    assert differing(tmp_path / "200", tmp_path / "0") == []


def test_after_going_back_only_the_history_of_the_weights_is_left() -> None:
    recorder = FlightRecorder(5)
    for iteration in range(1, 9):
        recorder.begin({"iteration": iteration})
        recorder.finish({"gap": float(iteration), "loss": math.nan})
    assert recorder.record().iterations.tolist() == [4, 5, 6, 7, 8]
    assert np.isinf(recorder.record().numbers["loss"]).all()
    recorder.go_back(6)
    assert recorder.record().numbers["gap"].tolist() == [3, 4, 5, 6]
    recorder.clear("resumed")
    assert (len(recorder.record()), recorder.record().note) == (0, "resumed")
    assert len(FlightRecorder(0).record()) == 0


# Explosions -----------------------------------------------------------------------------------------------------------


def exploding(tiny: CoarseToFineConfig, **changes: Any) -> CoarseToFineConfig:
    """Stable at 4x4, and with a rate at 8x8 at which no net stays as it is."""
    settings = {"iterations": (20, 20), "learning_rates": (1e-3, 1.0), "max_energy": 30.0, "retries": 1}
    return all_starts(tiny, base_width=4, **(settings | changes))


def test_an_explosion_is_written_and_explained(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning) as said, pytest.raises(DivergedError, match="weights grow by") as error:
        train(exploding(tiny), images, tmp_path, progress=False, save_pictures=False)
    went_back, gave_up = records(tmp_path)
    (warning,) = [str(each.message) for each in said if "Back to iteration" in str(each.message)]
    assert "The weights grow by" in warning
    assert str(went_back.with_suffix(".png")) in warning
    assert str(gave_up.with_suffix(".png")) in str(error.value)
    content, record = read_record(went_back)
    assert content["event"] == "the guard went back"
    assert content["diagnosis"] in warning
    assert {"weights grow", "jump"} <= {finding["cause"] for finding in content["findings"]}
    assert content["updates"][-1]["iteration"] == record.iterations[-1] > 20
    assert len(content["updates"]) == len(record)
    assert min(Image.open(went_back.with_suffix(".png")).size) > 500
    content, _ = read_record(gave_up)
    assert content["event"] == "the guard gave the run up"
    assert not [path for path in (tmp_path / "flight").iterdir() if path.name.startswith(".")]


def test_a_run_that_was_saved_says_why_in_its_log(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = CoarseToFineTrainer.update

    def once(self: CoarseToFineTrainer) -> dict[str, float]:
        if self.iteration == 9 and self.guard.attempt == 0:
            raise DivergedError(10, "for the test")
        return update(self)

    monkeypatch.setattr(CoarseToFineTrainer, "update", once)
    with pytest.warns(RuntimeWarning, match="for the test"):
        train(dataclasses.replace(tiny, tensorboard=True), images, tmp_path, progress=False, save_pictures=False)
    lines = RunFolder.existing(tmp_path).log.lines()
    noted = [line for line in lines if "note" in line]
    assert len(noted) == 1
    assert noted[0]["iteration"] == 10
    assert noted[0]["note"].startswith("The guard went back from iteration 10 to 9: for the test. The cause is not")


def test_a_resumed_run_says_that_its_record_begins_afresh(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.training.resumed_runs import Stop, stopping

    with pytest.raises(Stop):
        train(tiny, images, tmp_path, progress=False, save_pictures=False, on_log=stopping(7))
    update = CoarseToFineTrainer.update

    def always(self: CoarseToFineTrainer) -> dict[str, float]:
        if self.iteration == 8:
            raise FloatingPointError("a chain is not finite")
        return update(self)

    monkeypatch.setattr(CoarseToFineTrainer, "update", always)
    with pytest.raises(FloatingPointError):
        train(tiny, images, tmp_path, progress=False, save_pictures=False)
    (path,) = records(tmp_path)
    content = json.loads(path.read_text())
    assert content["event"] == "the run crashed"
    assert content["note"] == "the run was resumed at iteration 6, and nothing before is recorded"
    assert [line["iteration"] for line in content["updates"]] == [7, 8, 9]
    path.with_suffix(".npz").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged"):
        read_record(path)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"event": 1}', '{"event": "", "reason": "", "diagnosis": "", "note": "", "updates": [{}]}']
    + [f'{{"event": "", "reason": "", "diagnosis": "", "note": "", "updates": {updates}}}' for updates in ("7", "[5]")],
)
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "iteration-000000003-1.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path} is no flight record, or a damaged one: ."):
        read_summary(path)


def test_a_record_that_cannot_be_written_ends_no_run(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does what has the name of the file that asks for one."""
    update = CoarseToFineTrainer.update

    def once(self: CoarseToFineTrainer) -> dict[str, float]:
        if self.iteration == 9 and self.guard.attempt == 0:
            (tmp_path / "flight").write_text("mine")
            (tmp_path / ".flight").mkdir()
            raise DivergedError(10, "for the test")
        return update(self)

    monkeypatch.setattr(CoarseToFineTrainer, "update", once)
    with pytest.warns(RuntimeWarning) as said:
        train(tiny, images, tmp_path, progress=False, save_pictures=False)
    assert any(f"the flight record can't be written to {tmp_path}" in str(each.message) for each in said)
    assert any("for the test. Back to iteration" in str(each.message) for each in said)
    assert RunFolder.existing(tmp_path).log.lines()[-1]["iteration"] == tiny.total_iterations


def test_a_run_that_ends_flat_warns(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(tiny, iterations=(9, 1), spectral_norm=False)
    update = CoarseToFineTrainer.update

    def collapsing(self: CoarseToFineTrainer) -> dict[str, float]:
        for weights in self.net.parameters():
            weights.data.zero_()
        return update(self)

    monkeypatch.setattr(CoarseToFineTrainer, "update", collapsing)
    with pytest.warns(RuntimeWarning, match="the run came to its end, but: The energy is flat"):
        train(config, images, tmp_path, progress=False, save_pictures=False)


def test_a_kill_after_a_rollback_keeps_its_note(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.training.resumed_runs import Stop

    update = CoarseToFineTrainer.update

    def killed(self: CoarseToFineTrainer) -> dict[str, float]:
        if self.guard.attempt:
            raise Stop
        if self.iteration == 9:
            raise DivergedError(10, "for the test")
        return update(self)

    monkeypatch.setattr(CoarseToFineTrainer, "update", killed)
    with pytest.warns(RuntimeWarning, match="for the test"), pytest.raises(Stop):
        train(tiny, images, tmp_path, progress=False, save_pictures=False)
    monkeypatch.setattr(CoarseToFineTrainer, "update", update)
    train(tiny, images, tmp_path, progress=False, save_pictures=False)
    (noted,) = [line for line in RunFolder.existing(tmp_path).log.lines() if "note" in line]
    assert noted["note"].startswith("The guard went back from iteration 10 to 9: for the test.")


def test_records_of_little_are_written_too(tmp_path: Path) -> None:
    nothing = FlightRecorder(9).record()
    stem, diagnosis = write_record(tmp_path, nothing, "the guard went back", "for the test")
    assert diagnosis == "Only 0 updates are recorded: too few for a diagnosis."
    assert read_record(stem.with_suffix(".json"))[0]["updates"] == []
    record = healthy()
    lost = {"energies": np.full_like(record.chains["noise"].energies, math.inf)}
    lost |= {"step_curvatures": np.full_like(record.chains["noise"].step_curvatures, math.nan)}
    lost |= {"gradient_norms": np.full_like(record.chains["noise"].gradient_norms, math.inf)}
    every = dataclasses.replace(with_chains(record, **lost), samples=np.full_like(record.samples, math.inf))
    stem, diagnosis = write_record(tmp_path, every, "the guard went back", "for the test")
    assert diagnosis.startswith("The first number that is not finite is an energy before step 1")
    first = read_record(stem.with_suffix(".json"))[0]["updates"][0]
    assert "noise_rising" not in first
    assert first["noise_energy_end"] is None  # as JSON has no infinite numbers
