"""The trainer of calibrated flows: its gradient, what calibration moves, health, the guard, resumes, the command."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastebm
from fastebm.cli import main
from fastebm.models import Flow, MultiScaleEnergy, dequantize, quantize
from fastebm.training import (
    DivergedError,
    ECFlowConfig,
    ECFlowRun,
    RunError,
    calibrate,
    calibration_loss,
    load,
    resume,
    train,
)
from fastebm.training.calibration.energy import new_energy
from fastebm.training.ec_flow.presets import EC_FLOW_PRESETS
from fastebm.training.ec_flow.run import new_flow
from fastebm.training.ec_flow.trainer import ECFlowTrainer
from fastebm.training.trainer.parts import Part
from tests.training.resumed_runs import (
    assert_resumes_after_going_back,
    assert_resumes_to_the_same_bits,
    differing,
    log,
    stopping,
    trainer_at,
)

TINY = ECFlowConfig(
    size=8,
    channels=1,
    brightnesses=17,
    iterations=7,
    batch_size=4,
    levels=2,
    flow_steps=1,
    width=4,
    energy_width=2,
    energy_depth=2,
    num_steps=2,
    warmup=2,
    lr_decay=0.5,
    ema=0.5,
    log_every=1,
    checkpoint_every=3,
    engine="autograd",  # a fused program is made for each trainer, which takes longer than these runs
)
PLAIN = dataclasses.replace(TINY, lambda_start=0.0)


def train_quietly(config: ECFlowConfig, images: Tensor, path: Path, stop_at: int | None = None) -> ECFlowRun:
    return train(config, images, path, progress=False, save_pictures=False, on_log=stopping(stop_at))


VARIANTS: dict[str, dict[str, Any]] = {
    "fixed weight": {},
    "dual update, data term": {"dual_rate": 0.5, "data_term_weight": 1.0, "flip": True, "data_noise": 0.1},
    "plain": {"lambda_start": 0.0},
    "trained weights, fused": {
        "ema": 0.0, "dtype": "bfloat16", "update_dtype": "bfloat16", "energy_l2": 0.1, "engine": "fused",
        "max_gradient_norm": 0.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stop_at", [2, 5])
def test_a_resumed_run_ends_with_the_same_bits(images: Tensor, tmp_path: Path, variant: str, stop_at: int) -> None:
    config = dataclasses.replace(TINY, **VARIANTS[variant])
    assert_resumes_to_the_same_bits(train_quietly, config, images, tmp_path, stop_at)


def test_all_depends_on_the_seed_and_on_nothing_else(images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(1)
    train_quietly(TINY, images, tmp_path / "a")
    torch.randn(3)
    train_quietly(TINY, images, tmp_path / "b")
    assert differing(tmp_path / "a", tmp_path / "b") == []
    train_quietly(dataclasses.replace(TINY, seed=1), images, tmp_path / "c")
    assert differing(tmp_path / "a", tmp_path / "c") != []


def test_the_gradient_is_that_of_likelihood_and_distance_written_out_in_float64(images: Tensor) -> None:
    config = dataclasses.replace(TINY, batch_size=2, warmup=0)
    trainer = trainer_at(ECFlowTrainer, config, images, 3)
    twin = Flow(**trainer.flow.config).double()
    twin.load_state_dict(trainer.flow.state_dict())
    real = trainer._dequantized(images[:2], 5, 0)
    trainer.weight = 300.0  # so that neither part hides the other
    trainer.optimizer.zero_grad()
    found, ends = trainer._part_gradient(Part(0, 2, 2, 6), real)
    bits = torch.zeros((), dtype=torch.float64)
    for image in real.double():
        # The log-determinant by autograd's Jacobian, not by the layers' own account.
        jacobian = torch.autograd.functional.jacobian(
            lambda x: twin.encode(x[None])[0][0], image, create_graph=True
        ).flatten(1)
        z = twin.encode(image[None])[0][0]
        log_density = torch.linalg.slogdet(jacobian).logabsdet - (z.square() + math.log(2 * math.pi)).sum() / 2
        bits = bits - (log_density / 64 + math.log(2 / 16)) / math.log(2) / 2
    z = trainer.flow.prior(2, config.seed, chain_ids=6).double()
    loss = bits + 300.0 * (twin.decode(z) - ends.double()).square().mean(0).sum() / 64
    loss.backward()
    assert found["bits_per_dimension"].item() == pytest.approx(bits.item(), rel=1e-5)
    assert found["flow_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for (name, ours), theirs in zip(trainer.flow.named_parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None, name
        assert theirs.grad is not None, name
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=2e-5, msg=name)


def test_distance_alone_reaches_every_parameter_through_the_inverse() -> None:
    torch.manual_seed(0)
    flow = Flow((1, 8, 8), levels=2, flow_steps=2, width=4)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    samples = flow.decode(flow.prior(8, seed=0))
    sampler = fastebm.Langevin(lambda x: 0.5 * x.square().flatten(1).sum(1), step_size=0.2, noise_std=0.0)
    calibration_loss(samples, calibrate(samples, sampler, 3, seed=0)).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in flow.parameters())


def test_a_quadratic_energy_draws_samples_to_its_minimum_and_a_plain_flow_stays_at_the_data(images: Tensor) -> None:
    def mean_after_training(config: ECFlowConfig) -> float:
        trainer = trainer_at(ECFlowTrainer, config, images, 0)
        if trainer.energy is not None:
            trainer.energy.sampler = fastebm.Langevin(
                lambda x: 0.5 * (x - 0.5).square().flatten(1).sum(1), step_size=0.2, noise_std=1e-3, engine="autograd"
            )
        for _ in range(120):
            trainer.update()
        return trainer.ema_generator.sample(500, seed=9).mean().item()

    quick = dataclasses.replace(PLAIN, batch_size=16, learning_rate=1e-2, iterations=120, ema=0.9, lr_decay=0.0)
    plain = mean_after_training(quick)
    pulled = mean_after_training(dataclasses.replace(quick, lambda_start=1e4, lambda_max=1e4, warmup=0, energy_depth=1))
    assert plain == pytest.approx(images.mean().item(), abs=0.25)
    assert pulled == pytest.approx(0.5, abs=0.25)
    assert pulled - plain > 0.5


def test_the_density_of_a_trained_calibrated_flow_integrates_to_one() -> None:
    torch.manual_seed(0)
    flow = Flow((2, 1, 1), levels=0, flow_steps=3, width=8).double()
    data = 0.7 * torch.randn(256, 2, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    flow.initialize(data)
    sampler = fastebm.Langevin(
        lambda x: 0.5 * (x - 1).square().flatten(1).sum(1), step_size=0.2, noise_std=1e-3, engine="autograd"
    )
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for step in range(80):
        samples = flow.decode(flow.prior(256, seed=0, step=step))
        ends = calibrate(samples, sampler, 5, seed=0, start_step=5 * step)
        loss = -flow.log_prob(data).mean() + 3 * calibration_loss(samples, ends)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    line = torch.linspace(-9, 9, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)[:, :, None, None]
    with torch.no_grad():
        density = flow.log_prob(grid).exp()
    cell = (18 / 600) ** 2
    assert float(density.sum()) * cell == pytest.approx(1.0, abs=1e-3)
    mean = (density[:, None] * grid.flatten(1)).sum(0) * cell
    assert mean.min() > 0.3  # between the data's 0 and the energy's 1


def test_a_plain_flow_has_no_energy_and_the_warm_up_is_its_training(images: Tensor, tmp_path: Path) -> None:
    calibrated, plain = (
        train_quietly(TINY, images, tmp_path / "calibrated"),
        train_quietly(PLAIN, images, tmp_path / "plain"),
    )
    ours, theirs = log(tmp_path / "calibrated"), log(tmp_path / "plain")
    assert [line["lambda"] for line in ours] == [0, 0] + [10.0] * 5
    assert [line["bits_per_dimension"] for line in ours[:3]] == [line["bits_per_dimension"] for line in theirs[:3]]
    assert ours[-1]["bits_per_dimension"] != theirs[-1]["bits_per_dimension"]
    assert plain.energy is None
    assert not {"energy_data", "calibration", "lambda"} & theirs[0].keys()
    assert isinstance(calibrated.energy, MultiScaleEnergy)


def test_every_line_has_the_health_of_its_updates(images: Tensor, tmp_path: Path) -> None:
    train_quietly(TINY, images, tmp_path)
    for line in log(tmp_path):
        assert line["gap"] == pytest.approx(line["energy_samples"] - line["energy_data"], abs=1e-5)
        assert line["noise_floor"] == pytest.approx(2 * 1e-6 * 64)
        assert line["calibration"] > line["noise_floor"] / 2
        distance = line["lambda"] * line["calibration"] / 64
        assert line["flow_loss"] == pytest.approx(line["bits_per_dimension"] + distance, rel=1e-5)
        assert {"gradient_norm", "gradient_norm_flow", "learning_rate", "largest_sample"} <= line.keys()


def test_norms_begin_from_the_first_batch_and_the_energy_sees_dequantised_images(images: Tensor) -> None:
    trainer = trainer_at(ECFlowTrainer, TINY, images, 0)
    seen: list[Tensor] = []
    energy = trainer.energy
    assert energy is not None
    run = energy.gradient

    def watched(parts: Sequence[Part], real: Sequence[Tensor], ends: Sequence[Tensor]) -> dict[str, Tensor]:
        seen.extend(real)
        return run(parts, real, ends)

    energy.gradient = watched  # type: ignore[method-assign]
    again = Flow(**trainer.flow.config)
    again.load_state_dict(trainer.flow.state_dict())
    trainer.update()
    (real,) = seen
    assert not torch.equal(real, quantize(real, 17))
    discrete = quantize(real, 17)
    assert torch.equal(real, dequantize(discrete, seed=0, step=1, brightnesses=17))
    before = {name: tensor.clone() for name, tensor in again.state_dict().items()}
    again.initialize(real)
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


def test_long_gradients_are_shortened(images: Tensor) -> None:
    trainer = trainer_at(ECFlowTrainer, dataclasses.replace(PLAIN, max_gradient_norm=1e-3), images, 0)
    assert trainer.update()["gradient_norm_flow"] > 0.01
    norms = [parameter.grad.norm() for parameter in trainer.flow.parameters() if parameter.grad is not None]
    assert torch.stack(norms).norm() == pytest.approx(1e-3, rel=1e-3)


def test_the_dual_update_moves_lambda(images: Tensor, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, lambda_start=1.0, dual_rate=1.0, dual_threshold=1.0)
    train_quietly(config, images, tmp_path / "down")
    assert [line["lambda"] for line in log(tmp_path / "down")] == [0, 0, 1.0, 0, 0, 0, 0]  # far below the threshold
    config = dataclasses.replace(TINY, lambda_start=1.0, lambda_max=1.5, dual_rate=1e6, dual_threshold=0.0)
    train_quietly(config, images, tmp_path / "up")
    assert log(tmp_path / "up")[-1]["lambda"] == 1.5


def test_the_guard_goes_back_and_a_run_that_did_resumes_to_the_last_bit(images: Tensor, tmp_path: Path) -> None:
    assert_resumes_after_going_back(ECFlowTrainer, train_quietly, TINY, images, tmp_path)


@pytest.mark.parametrize("weights", ["average", "trained"])
def test_a_trained_flow_is_inverted_to_rounding(images: Tensor, tmp_path: Path, weights: Any) -> None:
    config = dataclasses.replace(TINY, flow_steps=2, iterations=20, checkpoint_every=20)
    train_quietly(config, images, tmp_path)
    flow = ECFlowRun.load(tmp_path, weights=weights).flow
    x = torch.cat((images[:100], dequantize(images[:100], seed=0, brightnesses=17)))
    with torch.no_grad():
        latents = flow.encode(x)[0]
        assert (flow.decode(latents) - x).abs().max() < 1e-5
        assert (latents - new_flow(config).encode(x)[0]).abs().max() > 0.1  # it is not the one that training began with


def test_large_energies_stop_a_run_before_they_reach_the_weights(images: Tensor, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, retries=0, max_energy=1e-9)
    with pytest.raises(DivergedError, match=r"iteration 1: an energy of data has .* more than max_energy"):
        train_quietly(config, images, tmp_path)
    trainer = trainer_at(ECFlowTrainer, config, images, 0)
    before = {name: tensor.clone() for name, tensor in trainer.flow.state_dict().items()}
    with pytest.raises(DivergedError):
        trainer.update()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.flow.state_dict().items())


def test_a_likelihood_that_is_not_finite_is_seen_before_an_update_and_before_a_checkpoint(images: Tensor) -> None:
    trainer = trainer_at(ECFlowTrainer, TINY, images, 3)
    parameters = list(trainer.flow.parameters())
    with torch.no_grad():
        parameters[0].fill_(math.nan)
    before = [parameter.clone() for parameter in parameters[1:]]
    with pytest.raises(DivergedError, match="iteration 3: bits_per_dimension is nan"):
        trainer.check_before_save()
    with pytest.raises(DivergedError, match="iteration 4: flow_loss is nan"):
        trainer.update()
    assert all(torch.equal(*pair) for pair in zip(before, parameters[1:], strict=True))


def test_examining_leaves_no_trace(images: Tensor) -> None:
    trainer = trainer_at(ECFlowTrainer, TINY, images, 3)
    before = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    trainer.check_before_save()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.tensors().items())
    assert trainer.energy is not None
    assert trainer.energy.net.training


def test_samples_are_discrete_functions_of_seed_and_temperature(images: Tensor, tmp_path: Path) -> None:
    run = train_quietly(TINY, images, tmp_path)
    samples = run.sample(6, seed=2)
    assert samples.shape == (6, 1, 8, 8)
    assert torch.equal(quantize(samples, 17), samples)
    assert ((samples + 1) * 8).unique().tolist() == sorted(set(((samples + 1) * 8).round().unique().tolist()))
    assert torch.equal(ECFlowRun.load(tmp_path).sample(6, seed=2), samples)
    assert (run.sample(6, seed=2, batch_size=4) - samples).abs().max() <= 1 / 8  # rounding may turn a half
    assert not torch.equal(ECFlowRun.load(tmp_path, weights="trained").sample(6, seed=2), samples)
    cold = run.sample(6, seed=2, temperature=0.0)
    assert torch.equal(cold, cold[:1].expand_as(cold))
    with pytest.raises(ValueError, match="temperature must be finite and not negative, got -1"):
        run.sample(1, temperature=-1.0)
    assert run.bits_per_dimension(images[:5]).shape == (5,)
    assert isinstance(load(tmp_path), ECFlowRun)
    assert resume(tmp_path, images, progress=False).finished
    assert resume(tmp_path, progress=False).finished  # nothing is left to train, so no images are asked for


def test_another_config_and_other_images_are_refused(images: Tensor, tmp_path: Path) -> None:
    train_quietly(PLAIN, images, tmp_path)
    with pytest.raises(RunError, match="width is 4 there and 5 here"):
        train_quietly(dataclasses.replace(PLAIN, width=5), images, tmp_path)
    with pytest.raises(RunError, match="other images"):
        train_quietly(PLAIN, -images, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 12}, "power of two"),
        ({"levels": 4}, "size 8 can't be halved 4 times"),
        ({"brightnesses": 1}, "brightnesses must lie in"),
        ({"flow_betas": (0.9, 1.0)}, "flow_betas must lie in"),
        ({"max_gradient_norm": -1.0}, "max_gradient_norm must lie in"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"lambda_start": 2000.0}, "above lambda_max"),
    ],
)
def test_fields_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_presets_make_nets_and_go_through_json() -> None:
    for config in EC_FLOW_PRESETS.values():
        flow, energy = new_flow(dataclasses.replace(config, flow_steps=1)), new_energy(config)  # steps are alike
        images = torch.zeros(2, config.channels, config.size, config.size)
        with torch.no_grad():
            assert flow.decode(flow.encode(images)[0]).shape == images.shape
            assert energy is not None
            assert energy.to("meta")(images.to("meta")).shape == (2,)
        assert ECFlowConfig.from_json(json.loads(json.dumps(dataclasses.asdict(config)))) == config
        assert config.calibrated
    with pytest.raises(RunError, match="not the config of a run of a calibrated flow"):
        ECFlowConfig.from_json({"colour": "red"})


def test_the_command_trains_draws_describes_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--iterations", "3", "--batch-size", "4", "--flow-steps", "1", "--width", "2", "--energy-width", "2"]
    flags += ["--engine", "autograd", "--num-steps", "2", "--warmup", "1", "--pictures-every", "2", "--log-every", "1"]
    assert main(["train", "ec-flow", *flags]) == 0
    out = tmp_path / "runs" / "digits-ec-flow"
    assert {"samples.png", "temperatures.png", "curves.png"} <= {path.name for path in out.iterdir()}
    assert len(list((out / "pictures").iterdir())) == 2
    assert main(["sample", str(out), "--count", "5", "--temperature", "0.7", "--out", "five.png"]) == 0
    assert main(["sample", str(out), "--temperature", "-1", "--out", "five.png"]) == 2
    assert main(["info", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "ec_flow" in printed
    assert "bits_per_dimension" in printed
    assert "3 of 3 iterations" in printed
    for path in (out / "checkpoints").glob("iteration-000000003.*"):
        path.unlink()
    assert main(["resume", str(out)]) == 0
    assert "was finished before" not in capsys.readouterr().out
    assert ECFlowRun.load(out).finished
    assert main(["train", "ec-flow", "--preset", "cifar10"]) == 2
    assert "--preset cifar10 needs --data" in capsys.readouterr().err
