"""Training of the calibrated posterior: an update of the VAE at refined latent vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastebm.models.vae import kl_to_prior, squared_error
from fastebm.plotting import GRID
from fastebm.runs.folder import RunFolder
from fastebm.training.calibration.calibrate import mean_square_distance
from fastebm.training.calibration.vae_run import save_vae_pictures
from fastebm.training.calibration.vae_trainer import VAETrainer
from fastebm.training.ec_posterior.config import ECPosteriorConfig
from fastebm.training.ec_posterior.posterior import PosteriorSampler, gaussian_nll
from fastebm.training.ec_posterior.run import CURVES, ECPosteriorRun
from fastebm.training.tensorboard import TensorBoardWriter
from fastebm.training.trainer.guard import DivergedError
from fastebm.training.trainer.metrics import Metrics, to_floats
from fastebm.training.trainer.parts import Part


class ECPosteriorTrainer(VAETrainer):
    """Trains a VAE on latent vectors that a short chain refines.

    An update draws `z ~ q(z | x)`, refines it by a short chain to `z'`, and takes one step on two losses, which are in
    units of the squared error (v is the variance of a pixel):

    - the decoder's loss is `||x - G(z')||^2`, or `-2 v log p(x | z')` where v is learned;
    - the encoder's loss is `2 v (elbo_weight * -ELBO + nll_weight * -log q(z' | x))`, with the ELBO at its own draw
      through a decoder that is held fixed. The second term fits the encoder's Gaussian to the ends of chains.

    A loss `||z' - z||^2`, as in EC-VAE's calibration, would not train the variance: it is smallest where the draw has
    no noise, while `-log q` is smallest at the mean and the variance of the chain ends.
    """

    run_type = ECPosteriorRun
    hint = "a smaller step_size or learning_rate"
    progress_keys: ClassVar[Mapping[str, str]] = {
        "error": "squared_error", "refined": "refined_error", "kl": "kl", "way": "refinement",
    }  # fmt: skip
    config: ECPosteriorConfig

    def reset(self) -> None:
        super().reset()
        config = self.config
        dtype = getattr(torch, config.dtype)
        self.sampler = PosteriorSampler(
            self.vae, config.step_size, temperature=config.temperature, dtype=dtype, engine=config.engine
        )

    @property
    def refining(self) -> bool:
        """Whether the next update runs chains."""
        return self.config.num_steps > 0 and self.iteration >= self.config.warmup

    def log_fields(self) -> dict[str, Any]:
        return super().log_fields() | ({"noise_floor": self.config.noise_floor} if self.config.num_steps else {})

    def update(self) -> dict[str, float]:
        lr_factor, parts = self.lr_factor, self._parts()
        part_gradient = self._refined_gradient if self.refining else self._plain_gradient
        drawn = zip(parts, self._next_images(parts), strict=True)
        terms = self.parts.gradients(self.vae, self.optimizer, lambda each: part_gradient(*each), drawn)
        metrics = to_floats(self.parts.means(terms, [len(part) for part in parts]) | self._vae_metrics())
        self._check(metrics)
        self._step_generator(lr_factor)
        self.iteration += 1
        return metrics

    def _plain_gradient(self, part: Part, real: Tensor) -> Metrics:
        """Adds the gradient of a part's share of the negative ELBO, for both nets; returns its terms."""
        _, _, _, terms = self._elbo(real, part.number)
        loss = -self._unit * terms["elbo"]
        (loss * part.share).backward()
        return {"vae_loss": loss, **terms}

    def _refined_gradient(self, part: Part, real: Tensor) -> Metrics:
        """Adds the gradients of the decoder at a part's refined latent vectors and of the encoder towards them."""
        config, pixels, first = self.config, self.config.dimension, part.number
        with self._decoder_fixed():
            z, mean, log_variance, terms = self._elbo(real, first)
        ends = self.sampler.refine(real, z, config.num_steps, self.seed, first, check=False)
        nll = gaussian_nll(ends, mean, log_variance).mean()
        with self._autocast():
            images = self.vae.decode(ends)
        error = squared_error(real, images.float())
        likelihood = self.vae.bound(error, torch.zeros_like(error), pixels).log_likelihood.mean()
        encoder = config.nll_weight * nll - config.elbo_weight * terms["elbo"]
        loss = self._unit * (encoder - likelihood)
        (loss * part.share).backward()
        distance = mean_square_distance(z, ends)
        return {"vae_loss": loss, **terms, "refined_error": error.mean(), "nll": nll, "refinement": distance}

    def _elbo(self, real: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor, Metrics]:
        """The encoder's draws with their means and log-variances, and the terms of the ELBO there."""
        with self._autocast():
            z, mean, log_variance = self.vae.posterior(real, self.seed, first)
            images = self.vae.decode(z)
        mean, log_variance = mean.float(), log_variance.float()
        error, kl = squared_error(real, images.float()), kl_to_prior(mean, log_variance)
        bound = self.vae.bound(error, kl, self.config.dimension)
        terms = {"elbo": bound.elbo.mean(), "squared_error": error.mean(), "kl": kl.mean()}
        return z.float(), mean, log_variance, terms

    @property
    def _unit(self) -> Tensor:
        """The factor from nats to squared errors, without a gradient."""
        return 2 * self.vae.log_variance.detach().exp()

    @contextmanager
    def _decoder_fixed(self) -> Iterator[None]:
        """Within the block the decoder's weights and the variance get no gradient, but pass it on to their input."""
        frozen = [p for p in (*self.vae.decoder.parameters(), self.vae.log_variance) if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def _check(self, metrics: Mapping[str, float]) -> None:
        self._check_finite(self.iteration + 1, metrics)
        if abs(loss := metrics["vae_loss"]) > self.config.max_loss:
            reason = f"vae_loss is {loss:.4g}, beyond max_loss = {self.config.max_loss:g}"
            raise DivergedError(self.iteration + 1, reason)

    def check_before_save(self) -> None:
        # In eval mode: batch norm has its running statistics here, where the next update will have the batch's.
        parts, errors = self._parts(), []
        self.vae.eval()
        try:
            for part in parts:
                real = self.images.at(self.config.size, part.rows(), self.device)
                with torch.no_grad():
                    z, _, _ = self.vae.posterior(real, self.seed, part.number)
                    ends = self.sampler.refine(real, z, self.config.num_steps, self.seed, part.number, check=False)
                    errors.append({"error": squared_error(real, self.vae.decode(ends)).mean()})
        finally:
            self.vae.train()
        error = self.parts.means(errors, [len(part) for part in parts])["error"]
        if not error.isfinite():
            raise DivergedError(self.iteration, f"the squared error at refined latent vectors is {error.item()}")

    def save_pictures(self, folder: RunFolder, board: TensorBoardWriter) -> None:
        run = ECPosteriorRun(folder.path, self.config, self.iteration, self._ema_for_sampling())
        real = self.images.first(self.config.size, GRID**2)
        shown = real.to(self.device)
        reconstructions = [
            ("decoded means of the encoder", run.reconstruct(shown, 0)),
            ("moved towards the mode", run.reconstruct(shown)),
            ("decoded posterior draws", run.reconstruct(shown, temperature=1.0)),
        ]
        save_vae_pictures(run, self.vae, real, reconstructions, CURVES, folder, board)
