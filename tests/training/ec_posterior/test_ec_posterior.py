"""The calibrated posterior: chains against the exact posterior of a linear decoder, its trainer, and the command."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastebm
from fastebm.cli import main
from fastebm.models import VAE
from fastebm.models.vae import squared_error
from fastebm.training import (
    DivergedError,
    ECPosteriorConfig,
    ECPosteriorRun,
    ECVAEConfig,
    PosteriorSampler,
    RunError,
    iwae_bound,
    load,
    refine_posterior,
    resume,
    train,
)
from fastebm.training.calibration.vae_run import new_vae
from fastebm.training.ec_posterior.posterior import PosteriorEnergy, gaussian_nll
from fastebm.training.ec_posterior.presets import EC_POSTERIOR_PRESETS
from fastebm.training.ec_posterior.trainer import ECPosteriorTrainer
from fastebm.training.trainer.parts import Part
from tests.training.resumed_runs import (
    assert_resumes_after_going_back,
    assert_resumes_to_the_same_bits,
    differing,
    log,
    stopping,
    trainer_at,
)

TINY = ECPosteriorConfig(
    size=8,
    channels=1,
    iterations=7,
    batch_size=4,
    latent=3,
    width=2,
    num_steps=2,
    step_size=0.01,
    warmup=2,
    lr_decay=0.5,
    ema=0.5,
    log_every=1,
    checkpoint_every=3,
    engine="autograd",  # a fused program is made for each trainer, which takes longer than these runs
)
LATENT, VARIANCE = 2, 0.5


class FixedEncoder(nn.Module):
    """Says the same of every image: mean 0.5 and standard deviation 2 for each latent number."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.new_full((len(x), LATENT), 0.5)
        return mean, torch.full_like(mean, 2 * math.log(2.0))


def linear_vae() -> tuple[VAE, Tensor, Tensor]:
    """A VAE whose decoder is `W z + b`, with W (16, 2) and b (16,): all about it is known exactly."""
    vae = VAE(4, 1, latent=LATENT, width=2, variance=VARIANCE).requires_grad_(False)
    linear = nn.Linear(LATENT, 16)
    weight = fastebm.ops.normal((16, LATENT), seed=3) * torch.tensor([0.4, 0.15])
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(fastebm.ops.normal((1, 16), seed=4)[0] * 0.1)
    vae.decoder = nn.Sequential(linear, nn.Unflatten(1, (1, 4, 4))).requires_grad_(False)  # type: ignore[assignment]
    vae.encoder = FixedEncoder()  # type: ignore[assignment]
    return vae, linear.weight.detach().double(), linear.bias.detach().double()


def exact_posterior(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (LATENT,) and precision of the latent vector of one image."""
    precision = weight.T @ weight / VARIANCE + torch.eye(LATENT, dtype=torch.float64)
    return torch.linalg.solve(precision, weight.T @ (x.double().flatten() - bias) / VARIANCE), precision


def kl(mean: Tensor, covariance: Tensor, target: Tensor, precision: Tensor) -> float:
    """Of one Gaussian from another, which has a precision."""
    away = mean - target
    value = (precision @ covariance).trace() + away @ precision @ away - len(mean) - (precision @ covariance).logdet()
    return 0.5 * float(value)


X = fastebm.ops.normal((1, 16), seed=5).reshape(1, 1, 4, 4)


@pytest.mark.parametrize("engine", ["autograd", "auto"])
def test_long_chains_have_the_exact_posterior_of_a_linear_decoder(engine: Any) -> None:
    vae, weight, bias = linear_vae()
    mean, precision = exact_posterior(X, weight, bias)
    count, step_size = 40_000, 0.1
    start = torch.full((count, LATENT), 2.0)
    images = X.expand(count, -1, -1, -1)
    ends = refine_posterior(vae, images, start, 60, step_size, seed=1, engine=engine).double()
    # The stationary covariance of the discretised chain, which goes to the posterior's with the step size.
    covariance = torch.linalg.inv(precision - step_size / 2 * precision @ precision)
    spread = covariance.diagonal().sqrt()
    assert ((ends.mean(0) - mean).abs() < 5 * spread / math.sqrt(count)).all()
    error = (ends.T.cov() - covariance).abs() / spread.outer(spread)
    assert error.max() < 5 * math.sqrt(2 / count)
    # The test can tell temperatures, and this bias from none.
    assert ((ends.T.cov() - precision.inverse()).abs() / spread.outer(spread)).max() > 5 * math.sqrt(2 / count)


def test_short_chains_come_nearer_to_the_exact_posterior_with_each_step() -> None:
    vae, weight, bias = linear_vae()
    mean, precision = exact_posterior(X, weight, bias)
    count, step_size = 20_000, 0.05
    images = X.expand(count, -1, -1, -1)
    start, _, _ = vae.posterior(images, seed=1)
    sampler = PosteriorSampler(vae, step_size, engine="autograd")
    moved_mean, moved = torch.full((LATENT,), 0.5).double(), 4 * torch.eye(LATENT).double()
    shrink = torch.eye(LATENT).double() - step_size * precision
    before = kl(moved_mean, moved, mean, precision)
    for num_steps in range(1, 6):
        # Chains from a Gaussian stay Gaussian: their moments after each step in closed form.
        moved_mean = mean + shrink @ (moved_mean - mean)
        moved = shrink @ moved @ shrink + 2 * step_size * torch.eye(LATENT).double()
        after = kl(moved_mean, moved, mean, precision)
        assert after < before
        before = after
        ends = sampler.refine(images, start, num_steps, seed=2).double()
        spread = moved.diagonal().sqrt()
        assert ((ends.mean(0) - moved_mean).abs() < 5 * spread / math.sqrt(count)).all()
        assert ((ends.T.cov() - moved).abs() / spread.outer(spread)).max() < 5 * math.sqrt(2 / count)


def test_without_noise_chains_walk_to_the_mode() -> None:
    vae, weight, bias = linear_vae()
    mean, _ = exact_posterior(X, weight, bias)
    start = torch.full((1, LATENT), 2.0)
    ends = refine_posterior(vae, X, start, 200, 0.1, seed=1, temperature=0.0, engine="autograd")
    torch.testing.assert_close(ends[0].double(), mean, atol=1e-5, rtol=0)


def test_the_gradient_is_that_of_the_joint_density() -> None:
    vae = VAE(8, 1, latent=3, width=2, variance=0.2).double().eval()
    images = fastebm.ops.normal((4, 1, 8, 8), seed=1).double().clamp(-1, 1)
    z = fastebm.ops.normal((4, 3), seed=2).double().requires_grad_()
    with torch.no_grad():
        vae.decode(z)
    joint = torch.distributions.Normal(vae.decode(z), math.sqrt(0.2)).log_prob(images).sum((1, 2, 3))
    joint = joint + torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    (wanted,) = torch.autograd.grad(-joint.sum(), z)
    sampler = PosteriorSampler(vae, 0.1, engine="autograd")
    energies, gradient = sampler.langevin.gradient(sampler.energy.pack(images, z.detach()))
    torch.testing.assert_close(
        sampler.energy.unpack(gradient), wanted, rtol=1e-6, atol=1e-6
    )  # the variance is kept in float32
    constant = 32 * math.log(2 * math.pi * 0.2) + 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(energies, -joint.detach() - constant, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sampler.energies(images, z.detach()), energies)
    assert isinstance(sampler.energy, PosteriorEnergy)


@pytest.mark.parametrize(("size", "channels", "latent"), [(8, 1, 3), (8, 3, 40), (16, 1, 16)])
def test_the_fused_engine_has_a_program_for_it(size: int, channels: int, latent: int) -> None:
    vae = VAE(size, channels, latent=latent, width=2).eval()
    images = fastebm.ops.normal((3, channels, size, size), seed=1).clamp(-1, 1)
    z = fastebm.ops.normal((3, latent), seed=2)
    samplers = [PosteriorSampler(vae, 0.1, engine=engine) for engine in ("fused", "autograd")]
    assert torch.equal(samplers[0].energy.unpack(samplers[0].energy.pack(images, z)), z)
    state = samplers[0].energy.pack(images, z)
    (energies, gradient), (wanted, right) = (sampler.langevin.gradient(state) for sampler in samplers)
    torch.testing.assert_close(energies, wanted)
    torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-4)
    fused = samplers[0].langevin.gradient
    with fused.chain():
        fused(state)
        assert fused.compiled_program(state) is not None  # our own kernels, not stock operations


@pytest.mark.parametrize("engine", ["autograd", "fused"])
def test_each_image_has_the_same_chain_in_any_split(images: Tensor, engine: Any) -> None:
    vae, x = VAE(8, 1, latent=3, width=2).train(), images[:6]
    z = fastebm.ops.normal((6, 3), seed=1)
    sampler = PosteriorSampler(vae, 0.01, engine=engine)
    whole = sampler.refine(x, z, 3, seed=4, chain_ids=10)
    assert whole.shape == z.shape
    # The fused engine sums in one order whatever the batch; library convolutions, which autograd runs on, may not.
    rounding = {"rtol": 0.0, "atol": 0.0} if engine == "fused" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(sampler.refine(x, z, 3, seed=4, chain_ids=10, batch_size=4), whole, **rounding)
    torch.testing.assert_close(sampler.refine(x[2:], z[2:], 3, seed=4, chain_ids=12), whole[2:], **rounding)
    halfway = sampler.refine(x, z, 2, seed=4, chain_ids=10)
    torch.testing.assert_close(sampler.refine(x, halfway, 1, seed=4, chain_ids=10, start_step=2), whole)
    assert not torch.equal(sampler.refine(x, z, 3, seed=5, chain_ids=10), whole)
    assert not torch.allclose(sampler.refine(x.flip(0), z, 3, seed=4, chain_ids=10), whole)  # images matter
    assert torch.equal(sampler.refine(x, z, 0), z)
    assert vae.training


def test_the_importance_bound_goes_to_the_exact_likelihood() -> None:
    vae, weight, bias = linear_vae()
    covariance = weight @ weight.T + VARIANCE * torch.eye(16, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(bias, covariance).log_prob(X.double().flatten())
    vae.train()
    bounds = [iwae_bound(vae, X.expand(200, -1, -1, -1), samples, seed=1).double().mean() for samples in (1, 16, 1000)]
    assert bounds[0] < bounds[1] < bounds[2] < exact + 0.02
    assert bounds[2] == pytest.approx(float(exact), abs=0.05)
    assert vae.training
    mean, log_variance = vae.encode(X)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    torch.testing.assert_close(gaussian_nll(mean + 1, mean, log_variance), -normal.log_prob(mean + 1).sum(1))
    split = iwae_bound(vae, X.expand(5, -1, -1, -1), 4, seed=1, batch_size=2)
    torch.testing.assert_close(split, iwae_bound(vae, X.expand(5, -1, -1, -1), 4, seed=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(2, 4)}, r"z has shape \(2, 4\); latent vectors of this VAE are \(batch, 3\)"),
        ({"images": torch.zeros(3, 1, 8, 8)}, "one for each of 2 z"),
        ({"step_size": 0.0}, "step_size must be positive"),
        ({"step_size": math.inf}, "step_size must be positive"),
        ({"temperature": -1.0}, "temperature must be finite and not negative"),
        ({"num_steps": -1}, "steps must not be negative"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    given = {"images": torch.zeros(2, 1, 8, 8), "z": torch.zeros(2, 3), "num_steps": 1, "step_size": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        refine_posterior(VAE(8, 1, latent=3, width=2), **given, engine="autograd")


def test_a_step_size_too_large_is_an_error() -> None:
    vae, _, _ = linear_vae()
    with pytest.raises(FloatingPointError):
        refine_posterior(vae, X, torch.ones(1, LATENT), 300, 10.0, seed=0, engine="autograd")
    with pytest.raises(ValueError, match="samples and batch_size must be at least 1"):
        iwae_bound(vae, X, 0)


def train_quietly(config: ECPosteriorConfig, images: Tensor, path: Path, stop_at: int | None = None) -> ECPosteriorRun:
    return train(config, images, path, progress=False, save_pictures=False, on_log=stopping(stop_at))


VARIANTS: dict[str, dict[str, Any]] = {
    "refined": {},
    "pull alone, learned variance": {"elbo_weight": 0.0, "learned_variance": True, "flip": True},
    "plain": {"num_steps": 0},
    "trained weights, bfloat16": {"ema": 0.0, "dtype": "bfloat16", "update_dtype": "bfloat16"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stop_at", [2, 5])
def test_a_resumed_run_ends_with_the_same_bits(images: Tensor, tmp_path: Path, variant: str, stop_at: int) -> None:
    config = dataclasses.replace(TINY, **VARIANTS[variant])
    assert_resumes_to_the_same_bits(train_quietly, config, images, tmp_path, stop_at)


def test_without_chains_it_is_the_plain_vae_of_the_other_method(images: Tensor, tmp_path: Path) -> None:
    train_quietly(dataclasses.replace(TINY, num_steps=0), images, tmp_path / "ours")
    shared = {field.name for field in dataclasses.fields(ECVAEConfig)} & {f.name for f in dataclasses.fields(TINY)}
    same = {name: getattr(TINY, name) for name in shared - {"num_steps", "max_loss"}}
    plain = ECVAEConfig(**same, energy_width=2, energy_depth=2, lambda_start=0.0)
    train(plain, images, tmp_path / "plain", progress=False, save_pictures=False)
    assert differing(tmp_path / "ours", tmp_path / "plain") == []


def test_every_line_has_the_health_of_its_updates(images: Tensor, tmp_path: Path) -> None:
    train_quietly(TINY, images, tmp_path)
    plain, refined = log(tmp_path)[:2], log(tmp_path)[2:]
    assert all("refinement" not in line for line in plain)
    variance = TINY.kl_weight / 2
    constant = 32 * math.log(2 * math.pi * variance)
    for line in (*plain, *refined):
        bound = -line["squared_error"] / (2 * variance) - constant - line["kl"]
        assert line["elbo"] == pytest.approx(bound, rel=1e-4)
    for line in refined:
        assert line["noise_floor"] == pytest.approx(2 * 2 * 0.01 * 3)
        assert line["refinement"] > 0
        likelihood = -line["refined_error"] / (2 * variance) - constant
        loss = 2 * variance * (line["nll"] - line["elbo"] - likelihood)
        assert line["vae_loss"] == pytest.approx(loss, rel=1e-3)
        assert {"gradient_norm_encoder", "gradient_norm_decoder", "learning_rate"} <= line.keys()


def test_the_decoder_learns_at_refined_draws_alone_and_the_encoder_does_not_move_them(images: Tensor) -> None:
    trainer = trainer_at(
        ECPosteriorTrainer, dataclasses.replace(TINY, elbo_weight=0.0, nll_weight=0.0, num_steps=0), images, 2
    )
    trainer.config = dataclasses.replace(TINY, nll_weight=1.0, elbo_weight=0.0)
    real = images[:4]
    norms = {}
    for name, weights in {"elbo": (1.0, 1e-9), "pull": (1e-9, 1.0)}.items():
        trainer.config = dataclasses.replace(TINY, elbo_weight=weights[0], nll_weight=weights[1])
        trainer.optimizer.zero_grad()
        trainer._refined_gradient(Part(0, 4, 4, 8), real)
        norms[name] = [p.grad.clone() for p in trainer.vae.decoder.parameters() if p.grad is not None]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.vae.encoder.linear.parameters())
        assert all(p.requires_grad for p in trainer.vae.decoder.parameters())
    # The encoder's losses have no part in it, but for the power iterations between the two.
    assert len(norms["elbo"]) == len(list(trainer.vae.decoder.parameters()))
    for one, other in zip(norms["elbo"], norms["pull"], strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.1 * float(one.abs().max()))


def test_refined_latent_vectors_reconstruct_better(images: Tensor, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, iterations=40, batch_size=16, width=4, latent=4, warmup=5, learning_rate=2e-3)
    run = train_quietly(config, images, tmp_path)
    x = images[:100]
    z, _, _ = run.vae.posterior(x, seed=3)
    before = squared_error(x, run.vae.decode(z)).mean()
    for temperature, num_steps in ((0.0, 5), (1.0, 30)):
        after = squared_error(x, run.vae.decode(run.refine(x, z, num_steps, temperature=temperature))).mean()
        assert after < before
    plain, moved = run.reconstruct(x, 0), run.reconstruct(x, 20)
    assert torch.equal(plain, run.vae.decode(run.vae.encode(x)[0]))
    assert squared_error(x, moved).mean() < squared_error(x, plain).mean()
    assert torch.equal(run.reconstruct(x), run.reconstruct(x, config.num_steps))


def test_the_guard_goes_back_and_a_run_that_did_resumes_to_the_last_bit(images: Tensor, tmp_path: Path) -> None:
    assert_resumes_after_going_back(ECPosteriorTrainer, train_quietly, TINY, images, tmp_path)


def test_the_guard_stops_what_is_not_finite_or_too_large(images: Tensor, tmp_path: Path) -> None:
    trainer = trainer_at(ECPosteriorTrainer, TINY, images, 3)
    before = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    trainer.check_before_save()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.tensors().items())
    assert trainer.vae.training
    with torch.no_grad():
        next(trainer.vae.decoder.to_image.parameters()).fill_(math.nan)
    with pytest.raises(DivergedError, match="iteration 4: vae_loss is nan"):
        trainer.update()
    assert all(torch.equal(p, before[f"vae.encoder.{name}"]) for name, p in trainer.vae.encoder.named_parameters())
    with pytest.raises(DivergedError, match="iteration 3: the squared error at refined latent vectors is nan"):
        trainer.check_before_save()
    with pytest.raises(DivergedError, match="beyond max_loss = 1e-09"):
        train_quietly(dataclasses.replace(TINY, retries=0, max_loss=1e-9), images, tmp_path / "large")
    # A chain that flies away: too large a step.
    with pytest.raises(DivergedError, match="smaller step_size"):
        train_quietly(dataclasses.replace(TINY, retries=0, num_steps=200, step_size=50.0), images, tmp_path / "far")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 12}, "power of two"),
        ({"num_steps": -1}, "steps must lie in"),
        ({"temperature": -1.0}, "temperature must lie in"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"elbo_weight": 0.0, "nll_weight": 0.0}, "nothing would train the encoder"),
        ({"ema": 1.0}, "ema must lie in"),
        ({"seed": 2**70}, "seed must be in"),
    ],
)
def test_fields_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_presets_make_nets_and_go_through_json() -> None:
    for config in EC_POSTERIOR_PRESETS.values():
        with torch.device("meta"):  # shapes without numbers
            vae = new_vae(dataclasses.replace(config, spectral_norm=False))  # which changes no shape
            images = torch.zeros(2, config.channels, config.size, config.size)
            assert vae.decode(vae.encode(images)[0]).shape == images.shape
        assert ECPosteriorConfig.from_json(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    with pytest.raises(RunError, match="not the config of a run of the calibrated posterior"):
        ECPosteriorConfig.from_json({"colour": "red"})


def test_the_command_trains_draws_describes_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--iterations", "3", "--batch-size", "4", "--latent", "3", "--width", "2", "--engine", "autograd"]
    flags += ["--num-steps", "2", "--warmup", "1", "--pictures-every", "2", "--log-every", "1"]
    assert main(["train", "ec-posterior", *flags]) == 0
    out = tmp_path / "runs" / "digits-ec-posterior"
    pictures = {"samples.png", "weights.png", "reconstructions.png", "curves.png"}
    assert pictures <= {path.name for path in out.iterdir()}
    assert main(["sample", str(out), "--count", "5", "--out", "five.png"]) == 0
    assert main(["info", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "ec_posterior" in printed
    assert "3 of 3 iterations" in printed
    assert "refinement" in printed
    for path in (out / "checkpoints").glob("iteration-000000003.*"):
        path.unlink()
    assert main(["resume", str(out)]) == 0
    assert "was finished before" not in capsys.readouterr().out
    run = load(out)
    assert isinstance(run, ECPosteriorRun)
    assert run.finished
    assert torch.equal(ECPosteriorRun.load(out).sample(3, seed=1), run.sample(3, seed=1))
    assert resume(out, progress=False).finished
    assert main(["train", "ec-posterior", "--preset", "cifar10"]) == 2
    assert "--preset cifar10 needs --data" in capsys.readouterr().err
