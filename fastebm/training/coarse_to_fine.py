"""Training of CF-EBM, coarse to fine: one energy per resolution, each grown out of the one below.

Zhao, Xie and Li, "Learning Energy-Based Generative Models via Coarse-to-Fine Expanding and Sampling", ICLR 2021, in the
variant that keeps each resolution's net as it stood when its stage ended ("cascade"), and in the one with a single
growing net ("expanding"). A stage trains the sub-net of one size:

- chains run from uniform noise through the frozen nets of the lower sizes and then through the net in training, or,
  expanding, through that net alone, from half the size while its newest block fades in;
- the loss is `mean E(data) - mean E(chain ends)`, optionally with an L2 term on the energies;
- the newest block fades in: `beta` rises from 0 to 1 over the first part of a stage.

Everything an iteration draws (images, their noise, the chains' noise) is a pure function of the seed and of how many
images and chains came before, so that a resumed run ends with the weights of an uninterrupted one, bit for bit. Where
energies explode, the guard goes back to a good checkpoint and on with fresh noise and a lower learning rate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastebm.training.coarse_to_fine_config import FREE, CoarseToFineConfig
from fastebm.training.coarse_to_fine_run import KIND, CoarseToFineRun, load_coarse_to_fine
from fastebm.training.coarse_to_fine_trainer import Trainer
from fastebm.training.loop import Given, OnLog, chosen_device, resume_folder, train_folder


def train_coarse_to_fine(
    config: CoarseToFineConfig,
    images: Given,
    run_dir: str | Path,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    save_pictures: bool = True,
    on_log: OnLog | None = None,
) -> CoarseToFineRun:
    """Trains on `images` in the folder `run_dir`, or takes up the unfinished run that is there.

    Args:
        images: as read by `fastebm.data.open_images`, or float32 `(N, channels, S, S)` in [-1, 1], with S the last of
            `config.sizes` or a power of two above; or an `ImageSource`, which is opened and kept with the run, so that
            `resume_coarse_to_fine` finds it.
        device: of net and chains; the images stay where they are. By default a GPU if there is one.
        progress: shows a bar with the energy gap, `mean E(samples) - mean E(data)`, and the mean energy.
        save_pictures: at the end of every stage, and at the config's intervals, writes samples.png (beside real
            images), strip.png and curves.png.
        on_log: called with every line of the log.

    Raises:
        ValueError: for images that don't fit the config.
        RunError: where `run_dir` holds something else (another config, other images), where another process trains in
            it, and where it can't be written to: the checkpoints before that are whole.
        DivergedError: where energies explode or are not finite, and going back `config.retries` times did not help; the
            folder's newest checkpoint is from before that.
        StoppedError: after SIGTERM (in the main thread), with the last update saved.
    """
    device = chosen_device(device)
    given: dict[str, Any] = {"progress": progress, "save_pictures": save_pictures, "on_log": on_log}
    train_folder(Trainer, config, images, run_dir, KIND, FREE, device=device, **given)
    return load_coarse_to_fine(run_dir, device)


def resume_coarse_to_fine(
    run_dir: str | Path, images: Given | None = None, *, retries: int | None = None, **options: Any
) -> CoarseToFineRun:
    """Takes up the unfinished run in `run_dir` with its own config, on the images that it was begun with.

    A finished one is only loaded: nothing is left to train, so that its images need not be there any more.

    Args:
        images: the same, where the run doesn't know where they lie or they were moved.
        retries: lets the guard go back more often than the config does.
        options: device, progress, save_pictures and on_log of `train_coarse_to_fine`.

    Raises as `train_coarse_to_fine`; also RunError where there is no run, or nobody knows its images.
    """
    return resume_folder(
        run_dir, KIND, CoarseToFineConfig, load_coarse_to_fine, train_coarse_to_fine, images, retries, options
    )
