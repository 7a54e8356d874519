"""A run of the calibrated posterior in memory: what an update is."""

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
from fastebm.training.calibration.posterior import PosteriorSampler, gaussian_nll
from fastebm.training.calibration.vae_run import save_pictures
from fastebm.training.calibration.vae_trainer import VAELoop
from fastebm.training.ec_posterior.config import ECPosteriorConfig
from fastebm.training.ec_posterior.run import CURVES, ECPosteriorRun
from fastebm.training.images import ImageLevels
from fastebm.training.tensorboard import TensorBoardWriter
from fastebm.training.trainer.guard import DivergedError
from fastebm.training.trainer.loop import Metrics, gradient_norm, to_floats


class ECPosteriorTrainer(VAELoop):
    """VAE, averaged VAE, an optimizer, and the sampler of refined latent vectors.

    An update draws `z ~ q(z | x)`, refines it by a short chain to `z'`, and takes one step on, in units of the squared
    error (with v the variance of a pixel):

    - the decoder's loss `||x - G(z')||^2`, or minus `2 v log p(x | z')` where v is learned;
    - the encoder's loss `2 v (elbo_weight * -ELBO + nll_weight * -log q(z' | x))`, the ELBO at its own draw through a
      decoder that is held fixed. The second term fits the encoder's Gaussian to where chains end.

    A pull on the draw alone, `||z' - z||^2` as in EC-VAE's calibration, would know nothing of the variance: it is least
    where the draw's noise vanishes, while `-log q` is least at the mean and the variance of the ends.
    """

    hint = "a smaller step_size or learning_rate"
    shown: ClassVar[Mapping[str, str]] = {
        "error": "squared_error", "refined": "refined_error", "kl": "kl", "way": "refinement",
    }  # fmt: skip
    config: ECPosteriorConfig

    def __init__(self, config: ECPosteriorConfig, images: ImageLevels, device: torch.device) -> None:
        super().__init__(config, images, device)

    def start(self) -> None:
        super().start()
        config = self.config
        dtype = getattr(torch, config.dtype)
        self.sampler = PosteriorSampler(
            self.vae, config.step_size, temperature=config.temperature, dtype=dtype, engine=config.engine
        )

    @property
    def refining(self) -> bool:
        """Whether the next update runs chains."""
        return self.config.num_steps > 0 and self.iteration >= self.config.warmup

    def describe(self) -> dict[str, Any]:
        return super().describe() | ({"noise_floor": self.config.noise_floor} if self.config.num_steps else {})

    def update(self) -> dict[str, float]:
        first, rate = self.images_seen, self.rate
        real = self._real_images(first)
        self.optimizer.zero_grad()
        found = self._refined_gradient(real, first) if self.refining else self._plain_gradient(real, first)
        norms = {f"gradient_norm_{name}": gradient_norm(net) for name, net in self.vae.named_children()}
        if self.config.learned_variance:
            found["variance"] = self.vae.log_variance.exp()
        metrics = to_floats(found | norms)
        self._check(metrics)
        self._step_generator(rate)
        self.iteration += 1
        return metrics

    def _plain_gradient(self, real: Tensor, first: int) -> Metrics:
        """Sets the gradient of minus the ELBO, for both nets; returns its parts."""
        _, _, _, found = self._elbo(real, first)
        loss = -self._unit * found["elbo"]
        loss.backward()
        return {"vae_loss": loss, **found}

    def _refined_gradient(self, real: Tensor, first: int) -> Metrics:
        """Sets the gradient of the decoder at refined latent vectors and of the encoder towards them."""
        config, pixels = self.config, self.config.dimension
        with self._decoder_fixed():
            z, mean, log_variance, found = self._elbo(real, first)
        ends = self.sampler.refine(real, z, config.num_steps, self.seed, first, check=False)
        nll = gaussian_nll(ends, mean, log_variance).mean()
        with self._precision():
            images = self.vae.decode(ends)
        error = squared_error(real, images.float())
        likelihood = self.vae.bound(error, torch.zeros_like(error), pixels).likelihood.mean()
        encoder = config.nll_weight * nll - config.elbo_weight * found["elbo"]
        loss = self._unit * (encoder - likelihood)
        loss.backward()
        way = mean_square_distance(z, ends)
        return {"vae_loss": loss, **found, "refined_error": error.mean(), "nll": nll, "refinement": way}

    def _elbo(self, real: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor, Metrics]:
        """The encoder's draws with their means and log-variances, and the ELBO's parts there."""
        with self._precision():
            z, mean, log_variance = self.vae.posterior(real, self.seed, first)
            images = self.vae.decode(z)
        mean, log_variance = mean.float(), log_variance.float()
        error, kl = squared_error(real, images.float()), kl_to_prior(mean, log_variance)
        bound = self.vae.bound(error, kl, self.config.dimension)
        found = {"elbo": bound.elbo.mean(), "squared_error": error.mean(), "kl": kl.mean()}
        return z.float(), mean, log_variance, found

    @property
    def _unit(self) -> Tensor:
        """What makes squared errors of nats; it is no part of any gradient."""
        return 2 * self.vae.log_variance.detach().exp()

    @contextmanager
    def _decoder_fixed(self) -> Iterator[None]:
        """Within the block gradients pass the decoder, and stop at its weights and at the variance."""
        held = [p for p in (*self.vae.decoder.parameters(), self.vae.log_variance) if p.requires_grad]
        for parameter in held:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in held:
                parameter.requires_grad_(True)

    def _check(self, metrics: Mapping[str, float]) -> None:
        self._check_finite(self.iteration + 1, metrics)
        if abs(loss := metrics["vae_loss"]) > self.config.max_loss:
            reason = f"vae_loss is {loss:.4g}, beyond max_loss = {self.config.max_loss:g}"
            raise DivergedError(self.iteration + 1, reason)

    def check_before_save(self) -> None:
        """Lets the guard see chains under the weights that are about to be saved, which no update has come from yet.

        They are those that the next update would start, but for batch norm's statistics, and leave no trace.
        """
        real = self.images.first(self.config.size, self.config.batch_size, self.device)
        self.vae.eval()
        try:
            with torch.no_grad():
                z, _, _ = self.vae.posterior(real, self.seed, self.images_seen)
                ends = self.sampler.refine(real, z, self.config.num_steps, self.seed, self.images_seen, check=False)
                error = squared_error(real, self.vae.decode(ends)).mean()
        finally:
            self.vae.train()
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
        save_pictures(run, self.vae, real, reconstructions, CURVES, folder, board)
