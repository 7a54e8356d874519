"""Training of EC-VAE: a variational autoencoder whose samples are calibrated by an energy while it is trained.

Luo, Qiu, Tao, Cai and Tang, "Energy-Calibrated VAE with Test Time Free Lunch", arXiv 2311.04071. A VAE is never
trained on what it generates, so that its samples blur; an energy samples well but needs a chain. So, in an update:

- the VAE minimises `||x - G(z_q)||^2 + kl_weight * KL + lambda * ||chain end - G(z)||^2`, where the chain starts at the
  decoder's own sample `G(z)`, `z ~ N(0, I)`, and runs a few Langevin steps down the energy, without a gradient;
- the energy minimises `mean E(data) - mean E(chain ends)`;
- `lambda` is fixed, or follows the distance that chains go (`DualUpdate`).

At test time a sample is one pass of the decoder. Everything an iteration draws is a pure function of the seed and of
how many images came before, so that a resumed run ends with the weights of an uninterrupted one, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastebm.training.ec_vae_config import FREE, EcVaeConfig
from fastebm.training.ec_vae_run import KIND, EcVaeRun, load_ec_vae
from fastebm.training.ec_vae_trainer import EcVaeTrainer
from fastebm.training.loop import Given, OnLog, chosen_device, resume_folder, train_folder


def train_ec_vae(
    config: EcVaeConfig,
    images: Given,
    run_dir: str | Path,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    save_pictures: bool = True,
    on_log: OnLog | None = None,
) -> EcVaeRun:
    """Trains on `images` in the folder `run_dir`, or takes up the unfinished run that is there.

    Args:
        images: as read by `fastebm.data.open_images`, or float32 `(N, channels, S, S)` in [-1, 1], with S the config's
            size or a power of two above; or an `ImageSource`, which is opened and kept with the run, so that
            `resume_ec_vae` finds it.
        device: of nets and chains; the images stay where they are. By default a GPU if there is one.
        progress: shows a bar with squared error, KL, the distance that chains go, and the energy gap.
        save_pictures: at the end, and at the config's intervals, writes samples.png (beside real images), weights.png
            (trained and averaged weights, each with batch norm's statistics of training and of the batch),
            reconstructions.png and curves.png.
        on_log: called with every line of the log.

    Raises as `train_coarse_to_fine`.

    Example:
        >>> import torch, tempfile
        >>> from fastebm.training import EcVaeConfig, train_ec_vae
        >>> config = EcVaeConfig(size=8, channels=1, iterations=2, batch_size=4, latent=4, width=4, energy_width=4)
        >>> run = train_ec_vae(config, torch.zeros(9, 1, 8, 8), tempfile.mkdtemp() + "/run", progress=False)
        >>> run.sample(3, seed=1).shape
        torch.Size([3, 1, 8, 8])
    """
    device = chosen_device(device)
    given: dict[str, Any] = {"progress": progress, "save_pictures": save_pictures, "on_log": on_log}
    train_folder(EcVaeTrainer, config, images, run_dir, KIND, FREE, device=device, **given)
    return load_ec_vae(run_dir, device)


def resume_ec_vae(
    run_dir: str | Path, images: Given | None = None, *, retries: int | None = None, **options: Any
) -> EcVaeRun:
    """Takes up the unfinished run in `run_dir` with its own config, on the images that it was begun with.

    A finished one is only loaded: nothing is left to train, so that its images need not be there any more.

    Args:
        images: the same, where the run doesn't know where they lie or they were moved.
        retries: lets the guard go back more often than the config does.
        options: device, progress, save_pictures and on_log of `train_ec_vae`.

    Raises as `train_ec_vae`; also RunError where there is no run, or nobody knows its images.
    """
    return resume_folder(run_dir, KIND, EcVaeConfig, load_ec_vae, train_ec_vae, images, retries, options)
