"""Training of a VAE on refined posteriors: the "calibrated posterior" of EC-VAE.

Luo, Qiu, Tao, Cai and Tang, "Energy-Calibrated VAE with Test Time Free Lunch", arXiv 2311.04071, say that what
calibrates samples can calibrate the posterior too, and publish no code for it. The energy of latent vectors is here
known, minus `log p(x | z) + log p(z)`, so that nothing but the VAE is trained: short Langevin chains go from the
encoder's draws towards the posterior, the decoder learns from where they end, and the encoder learns to draw there. The
decoder then nearly follows the gradient of `log p(x)` instead of that of a bound that gives way to the encoder's lacks.

At test time a sample is one pass of the decoder, and images are encoded with or without a chain. Everything an
iteration draws is a pure function of the seed and of how many images came before, so that a resumed run ends with the
weights of an uninterrupted one, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastebm.training.ec_posterior_config import FREE, EcPosteriorConfig
from fastebm.training.ec_posterior_run import KIND, EcPosteriorRun, load_ec_posterior
from fastebm.training.ec_posterior_trainer import EcPosteriorTrainer
from fastebm.training.loop import Given, OnLog, chosen_device, resume_folder, train_folder


def train_ec_posterior(
    config: EcPosteriorConfig,
    images: Given,
    run_dir: str | Path,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    save_pictures: bool = True,
    on_log: OnLog | None = None,
) -> EcPosteriorRun:
    """Trains on `images` in the folder `run_dir`, or takes up the unfinished run that is there.

    Arguments, pictures and errors as of `train_ec_vae`; reconstructions.png shows images decoded from the encoder's
    means, from there moved towards the mode, and from refined draws.

    Example:
        >>> import torch, tempfile
        >>> from fastebm.training import EcPosteriorConfig, train_ec_posterior
        >>> config = EcPosteriorConfig(
        ...     size=8, channels=1, iterations=2, batch_size=4, latent=4, width=4, warmup=1, steps=2, engine="autograd"
        ... )
        >>> run = train_ec_posterior(config, torch.zeros(9, 1, 8, 8), tempfile.mkdtemp() + "/run", progress=False)
        >>> run.sample(3, seed=1).shape
        torch.Size([3, 1, 8, 8])
    """
    device = chosen_device(device)
    given: dict[str, Any] = {"progress": progress, "save_pictures": save_pictures, "on_log": on_log}
    train_folder(EcPosteriorTrainer, config, images, run_dir, KIND, FREE, device=device, **given)
    return load_ec_posterior(run_dir, device)


def resume_ec_posterior(
    run_dir: str | Path, images: Given | None = None, *, retries: int | None = None, **options: Any
) -> EcPosteriorRun:
    """Takes up the unfinished run in `run_dir` with its own config; arguments and errors as of `resume_ec_vae`."""
    return resume_folder(
        run_dir, KIND, EcPosteriorConfig, load_ec_posterior, train_ec_posterior, images, retries, options
    )
