"""EC-VAE's trainer: what an update is, health, the guard, kills and resumes, plain VAEs, and the command."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastebm.cli import main
from fastebm.models import MultiScaleEnergy
from fastebm.training import (
    DivergedError,
    ECVAEConfig,
    ECVAERun,
    RunError,
    load,
    resume,
    train,
)
from fastebm.training.calibration.energy import new_energy
from fastebm.training.calibration.vae_run import new_vae, weight_variants
from fastebm.training.ec_vae.presets import EC_VAE_PRESETS
from fastebm.training.ec_vae.trainer import ECVAETrainer
from tests.training.resumed_runs import (
    assert_resumes_after_going_back,
    assert_resumes_to_the_same_bits,
    differing,
    log,
    stopping,
    trainer_at,
)

TINY = ECVAEConfig(
    size=8,
    channels=1,
    iterations=7,
    batch_size=4,
    latent=3,
    width=2,
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


def train_quietly(config: ECVAEConfig, images: Tensor, path: Path, stop_at: int | None = None) -> ECVAERun:
    return train(config, images, path, progress=False, save_pictures=False, on_log=stopping(stop_at))


VARIANTS: dict[str, dict[str, Any]] = {
    "two chains": {},
    "one chain, dual update, data term": {
        "num_chains": 1, "dual_rate": 0.5, "data_term_weight": 1.0, "flip": True, "data_noise": 0.1,
        "learned_variance": True,
    },
    "plain": {"lambda_start": 0.0},
    "trained weights, fused": {
        "ema": 0.0, "dtype": "bfloat16", "update_dtype": "bfloat16", "energy_l2": 0.1, "engine": "fused",
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
    torch.manual_seed(1)
    assert differing(tmp_path / "a", tmp_path / "b") == []
    third = train_quietly(dataclasses.replace(TINY, seed=1), images, tmp_path / "c")
    assert not torch.equal(ECVAERun.load(tmp_path / "a").sample(4), third.sample(4))


def test_the_warm_up_is_nearly_that_of_a_plain_vae_and_then_calibration_pulls(images: Tensor, tmp_path: Path) -> None:
    train_quietly(TINY, images, tmp_path / "calibrated")
    train_quietly(dataclasses.replace(TINY, lambda_start=0.0), images, tmp_path / "plain")
    ours, plain = log(tmp_path / "calibrated"), log(tmp_path / "plain")
    assert [line["lambda"] for line in ours] == [0, 0] + [30.0] * 5
    # Nearly: draws from the prior are decoded in the same batches, and share batch norm's statistics.
    for a, b in zip(ours[:3], plain[:3], strict=True):
        assert a["squared_error"] == pytest.approx(b["squared_error"], rel=0.1)
    assert ours[-1]["squared_error"] != plain[-1]["squared_error"]
    assert "energy_data" not in plain[0]
    assert ECVAERun.load(tmp_path / "plain").energy is None
    assert isinstance(ECVAERun.load(tmp_path / "calibrated").energy, MultiScaleEnergy)


def test_saved_averages_have_the_statistics_of_both_kinds_of_draws(images: Tensor, tmp_path: Path) -> None:
    run = train_quietly(TINY, images, tmp_path)
    vae = copy.deepcopy(run.vae)
    vae.update_bn(images, batch_size=TINY.batch_size, seed=TINY.seed)
    for name, buffer in vae.named_buffers():
        torch.testing.assert_close(buffer, run.vae.get_buffer(name))
    # The trained weights keep what training gave them.
    trained = ECVAERun.load(tmp_path, weights="trained").vae
    assert not torch.equal(trained.decoder.norm.running_mean, run.vae.decoder.norm.running_mean)


def test_pictures_show_both_weights_with_both_statistics(images: Tensor, tmp_path: Path) -> None:
    run = train_quietly(TINY, images, tmp_path)
    trained = ECVAERun.load(tmp_path, weights="trained").vae
    panels = dict(weight_variants(run, trained, 6))
    assert list(panels) == [
        f"{weights} weights, {statistics} statistics"
        for weights in ("trained", "averaged")
        for statistics in ("running", "batch")
    ]
    torch.testing.assert_close(panels["averaged weights, running statistics"], run.sample(6))
    torch.testing.assert_close(
        panels["trained weights, running statistics"], ECVAERun.load(tmp_path, weights="trained").sample(6)
    )
    shown = list(panels.values())
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(shown) for b in shown[:i])


@pytest.mark.parametrize(("weight", "hinge"), [(0.0, 0.0), (0.03, 0.0), (0.03, 0.1)])
def test_chains_of_training_are_held_by_the_anchor_of_the_config(images: Tensor, weight: float, hinge: float) -> None:
    """As a chain that is written down again: the hinge is by pixel, and the weight falls to zero over the chain."""
    config = dataclasses.replace(
        TINY, num_steps=5, step_size=20.0, noise_std=0.0, data_term_weight=weight, data_term_hinge=hinge, energy_width=4
    )
    side = trainer_at(ECVAETrainer, config, images, 3).energy
    assert side is not None
    samples = images[:4]
    net = copy.deepcopy(side.net).eval()
    x, held = samples.clone(), []
    for k in range(5):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(net(x).sum(), x)
        x = x.detach()
        far = (x - samples).square().flatten(1).sum(1) > hinge * 64
        pull = weight * (1 - k / 4) * far[:, None, None, None]
        held.append(bool(pull.any()))
        x = x - 20 * (gradient + pull * (x - samples))
    torch.testing.assert_close(side.chain_ends(samples, 0, 0), x, rtol=1e-4, atol=1e-4)
    assert sum(held) == (0 if not weight else 2 if hinge else 3), held  # an update's start is no distance away


def test_every_line_has_the_health_of_its_updates(images: Tensor, tmp_path: Path) -> None:
    train_quietly(TINY, images, tmp_path)
    for line in log(tmp_path):
        assert line["gap"] == pytest.approx(line["energy_samples"] - line["energy_data"], abs=1e-5)
        assert line["noise_floor"] == pytest.approx(2 * 1e-6 * 64)
        assert line["calibration"] > 0
        variance = TINY.kl_weight / 2
        constant = 32 * math.log(2 * math.pi * variance)
        bound = -line["squared_error"] / (2 * variance) - constant - line["kl"]
        assert line["elbo"] == pytest.approx(bound, rel=1e-4)
        distance = line["lambda"] * line["calibration"]
        assert line["vae_loss"] == pytest.approx(-2 * variance * bound + distance, rel=1e-3)
        assert {"gradient_norm", "gradient_norm_encoder", "gradient_norm_decoder", "learning_rate"} <= line.keys()


def test_chains_calibrate_the_decoder_alone_and_each_has_noise_of_its_own(images: Tensor) -> None:
    trainer = trainer_at(ECVAETrainer, TINY, images, 3)
    energy = trainer.energy
    assert energy is not None
    calls: list[tuple[Tensor, int, int, int, Tensor]] = []
    run = energy.chain_ends

    def watched(samples: Tensor, seed: int, first_chain_id: int, start_step: int = 0) -> Tensor:
        ends = run(samples, seed, first_chain_id, start_step)
        calls.append((samples.detach().clone(), seed, first_chain_id, start_step, ends))
        return ends

    energy.chain_ends = watched  # type: ignore[method-assign]
    trainer.update()
    # Two chains from the same latent vectors: the second from the updated decoder, with the noise of later steps.
    assert [(first, step) for _, _, first, step, _ in calls] == [(12, 0), (12, 2)]
    assert not torch.equal(calls[0][0], calls[1][0])
    assert not any(call[4].requires_grad for call in calls)
    calls.clear()
    trainer.config = dataclasses.replace(TINY, num_chains=1)
    trainer.update()
    assert [(first, step) for _, _, first, step, _ in calls] == [(16, 0)]


def test_the_dual_update_moves_lambda(images: Tensor, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, lambda_start=1.0, dual_rate=1.0, dual_threshold=1.0)
    train_quietly(config, images, tmp_path)
    values = [line["lambda"] for line in log(tmp_path)]
    assert config.threshold == pytest.approx(config.noise_floor + 64)
    assert values == [0, 0, 1.0, 0, 0, 0, 0]  # far below the threshold of 64: straight to zero
    config = dataclasses.replace(TINY, lambda_start=1.0, lambda_max=1.5, dual_rate=1e6, dual_threshold=0.0)
    train_quietly(config, images, tmp_path / "up")
    assert [line["lambda"] for line in log(tmp_path / "up")][-1] == 1.5


def test_the_guard_goes_back_and_a_run_that_did_resumes_to_the_last_bit(images: Tensor, tmp_path: Path) -> None:
    assert_resumes_after_going_back(ECVAETrainer, train_quietly, TINY, images, tmp_path)


def test_large_energies_stop_a_run(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"iteration 1: an energy of data has .* more than max_energy"):
        train_quietly(dataclasses.replace(TINY, retries=0, max_energy=1e-9), images, tmp_path)


def test_a_vae_that_is_not_finite_never_reaches_the_weights(images: Tensor) -> None:
    trainer = trainer_at(ECVAETrainer, TINY, images, 3)
    with torch.no_grad():
        next(trainer.vae.decoder.to_image.parameters()).fill_(math.nan)
    before = [parameter.clone() for parameter in trainer.vae.encoder.parameters()]
    with pytest.raises(DivergedError, match="iteration 4: vae_loss is nan"):
        trainer.update()
    assert all(torch.equal(*pair) for pair in zip(before, trainer.vae.encoder.parameters(), strict=True))


def test_examining_leaves_no_trace(images: Tensor) -> None:
    trainer = trainer_at(ECVAETrainer, TINY, images, 3)
    before = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    trainer.check_before_save()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.tensors().items())
    assert trainer.vae.training
    assert trainer.energy is not None
    assert trainer.energy.net.training


def test_averaged_weights_and_trained_ones_can_be_sampled(images: Tensor, tmp_path: Path) -> None:
    run = train_quietly(TINY, images, tmp_path)
    samples = run.sample(6, seed=2)
    assert samples.shape == (6, 1, 8, 8)
    assert samples.abs().max() <= 1
    assert torch.equal(ECVAERun.load(tmp_path).sample(6, seed=2), samples)
    torch.testing.assert_close(run.sample(6, seed=2, batch_size=4), samples)
    assert not torch.equal(ECVAERun.load(tmp_path, weights="trained").sample(6, seed=2), samples)
    assert run.reconstruct(images[:3]).shape == (3, 1, 8, 8)
    assert isinstance(load(tmp_path), ECVAERun)
    assert resume(tmp_path, images, progress=False).finished
    assert resume(tmp_path, progress=False).finished  # nothing is left to train, so images are not asked for


def test_another_config_other_images_and_another_kind_are_refused(images: Tensor, tmp_path: Path) -> None:
    train_quietly(TINY, images, tmp_path)
    with pytest.raises(RunError, match="latent is 3 there and 4 here"):
        train_quietly(dataclasses.replace(TINY, latent=4), images, tmp_path)
    with pytest.raises(RunError, match="other images"):
        train_quietly(TINY, -images, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"kind": "tea"}))
    with pytest.raises(RunError, match="of kind 'tea'; known are coarse_to_fine, ec_vae"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 12}, "power of two"),
        ({"num_steps": 0}, "num_steps must lie in"),
        ({"num_chains": 3}, "num_chains must be one of 1, 2, got 3"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"lambda_start": 200.0}, "above lambda_max"),
        ({"ema": 1.0}, "ema must lie in"),
        ({"seed": 2**70}, "seed must be in"),
    ],
)
def test_fields_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_presets_make_nets_and_go_through_json() -> None:
    for config in EC_VAE_PRESETS.values():
        # Shapes without numbers: some presets have tens of millions of them. Spectral norms change no shape, and their
        # first power iterations take seconds on the meta device.
        plain = dataclasses.replace(config, spectral_norm=False)
        with torch.device("meta"):
            vae, energy = new_vae(plain), new_energy(plain)
            images = torch.zeros(2, config.channels, config.size, config.size)
            assert vae.decode(vae.encode(images)[0]).shape == images.shape
        assert energy is not None
        assert energy(images).shape == (2,)
        assert ECVAEConfig.from_json(json.loads(json.dumps(dataclasses.asdict(config)))) == config
        assert config.calibrated
    with pytest.raises(RunError, match="not the config of a run of EC-VAE"):
        ECVAEConfig.from_json({"colour": "red"})


def test_numbers_and_samples_arrive_at_tensorboard(images: Tensor, tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    config = dataclasses.replace(TINY, tensorboard=True)
    train(config, images, tmp_path, progress=False)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = log(tmp_path)
    for name in ("elbo", "squared_error", "gap", "lambda", "calibration"):
        scalars = events.Scalars(name)
        assert [event.step for event in scalars] == [line["iteration"] for line in lines]
        assert [event.value for event in scalars] == pytest.approx([line[name] for line in lines])
    assert [event.step for event in events.Images("samples/8")] == [7]


def test_learning_rates_fall_at_the_end() -> None:
    config = dataclasses.replace(TINY, iterations=100, lr_decay=0.5)
    factors = [config.lr_factor_at(k) for k in (0, 50, 75, 99)]
    assert factors == pytest.approx([1, 1, 0.55, 0.118])
    assert dataclasses.replace(config, lr_decay=0.0).lr_factor_at(99) == 1


def test_the_command_trains_draws_describes_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--iterations", "3", "--batch-size", "4", "--latent", "3", "--width", "2", "--energy-width", "2"]
    flags += ["--engine", "autograd", "--num-steps", "2", "--warmup", "1", "--pictures-every", "2", "--log-every", "1"]
    assert main(["train", "ec-vae", *flags]) == 0
    out = tmp_path / "runs" / "digits-ec-vae"
    pictures = {"samples.png", "weights.png", "reconstructions.png", "curves.png"}
    assert pictures <= {path.name for path in out.iterdir()}
    assert len(list((out / "pictures").iterdir())) == 2
    assert main(["sample", str(out), "--count", "5", "--out", "five.png"]) == 0
    assert main(["sample", str(out), "--count", "5", "--dtype", "bfloat16", "--out", "low.npz"]) == 0
    with np.load("low.npz") as low:
        np.testing.assert_allclose(low["images"], ECVAERun.load(out).sample(5).numpy(), rtol=0, atol=0.1)
    assert main(["info", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "kind" in printed
    assert "ec_vae" in printed
    assert "3 of 3 iterations" in printed
    for path in (out / "checkpoints").glob("iteration-000000003.*"):
        path.unlink()
    assert main(["resume", str(out)]) == 0
    assert "was finished before" not in capsys.readouterr().out
    assert ECVAERun.load(out).finished
    assert main(["train", "ec-vae", "--preset", "cifar10"]) == 2
    assert "--preset cifar10 needs --data" in capsys.readouterr().err
