"""`train` and `resume`: the two ways into a training run, for every method."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from fastebm.runs.folder import RunFolder
from fastebm.runs.registry import config_of, load, method
from fastebm.training.images import image_levels
from fastebm.training.trainer.loop import (
    ImageInput,
    OnLog,
    defaults_of,
    opened,
    resolve_device,
    stored_images,
    train_in,
)


def train(
    config: Any,
    images: ImageInput,
    run_dir: str | Path,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    save_pictures: bool = True,
    on_log: OnLog | None = None,
) -> Any:
    """Trains on `images` in the folder `run_dir`, or resumes the unfinished run of the same config that is there.

    Args:
        config: a `CoarseToFineConfig`, `ECVAEConfig`, `ECPosteriorConfig` or `ECFlowConfig`, which names the method.
        images: as read by `fastebm.data.open_images`, or float32 `(N, channels, S, S)` in [-1, 1], with S the config's
            largest size or a power of two above it; or an `ImageSource`, which is opened and stored with the run, so
            that `resume` finds it.
        device: of nets and chains; the images stay where they are. By default a GPU if there is one.
        progress: shows a bar with a few numbers of the method, for instance the energy gap
            `mean E(samples) - mean E(data)`.
        save_pictures: at the end (of every stage), and at the config's intervals, writes samples.png (beside real
            images), curves.png, and what else the method draws.
        on_log: called with every line of the log.

    Returns the run, as `fastebm.load(run_dir)` does.

    Raises:
        ValueError: for images that don't fit the config.
        RunError: where `run_dir` holds something else (another config, other images), where another process trains in
            it, and where it can't be written to: the checkpoints before that are whole.
        DivergedError: where energies explode or are not finite, and going back `config.retries` times did not help; the
            folder's newest checkpoint is from before that.
        StoppedError: after SIGTERM (in the main thread), with the last update saved.

    Example:
        >>> import torch, tempfile
        >>> import fastebm
        >>> config = fastebm.training.ECVAEConfig(
        ...     size=8, channels=1, iterations=2, batch_size=4, latent=4, width=4, energy_width=4
        ... )
        >>> run = fastebm.train(config, torch.zeros(9, 1, 8, 8), tempfile.mkdtemp() + "/run", progress=False)
        >>> run.sample(3, seed=1).shape
        torch.Size([3, 1, 8, 8])
    """
    device = resolve_device(device)
    module = method(config.kind, Path(run_dir))
    source, found = opened(images, progress)
    # The trainer first: a config that makes no net must not leave a folder that then holds "another config".
    loop = module.Trainer(config, image_levels(found, config.sizes, config.channels), device)
    with RunFolder.locked(run_dir):
        folder = RunFolder.open(
            run_dir,
            config.kind,
            dataclasses.asdict(config),
            images=source,
            defaults=defaults_of(type(config)),
            free=module.FREE,
            keep_checkpoints=config.keep_checkpoints,
        )
        train_in(loop, folder, progress, save_pictures, on_log)
    return load(run_dir, device)


def resume(run_dir: str | Path, images: ImageInput | None = None, *, retries: int | None = None, **options: Any) -> Any:
    """Resumes the unfinished run in `run_dir` with its own config, on the images that it was begun with.

    A finished one is only loaded: nothing is left to train, so that its images need not be there any more.

    Args:
        images: the same images, where the run doesn't know where they lie or they were moved.
        retries: lets the guard go back more often than the config does.
        options: device, progress, save_pictures and on_log of `train`.

    Raises as `train`; also RunError where there is no run, or nobody knows its images.
    """
    folder = RunFolder.existing(run_dir)
    config = config_of(folder)
    if retries is not None:
        config = dataclasses.replace(config, retries=retries)
    if images is None:
        if folder.checkpoints.iterations()[-1:] == [config.total_iterations]:
            run = load(run_dir, resolve_device(options.get("device")))
            if run.finished:  # which it isn't where that checkpoint is damaged
                return run
        images = stored_images(folder)
    return train(config, images, run_dir, **options)
