"""`train` and `resume`: the public functions that start or continue a training run of any method."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from fastebm.data import Images
from fastebm.data.sources import DigitsSource, ImageSource, source_from_json
from fastebm.distributed import Ranks, launched, placed
from fastebm.runs.folder import RunError, RunFolder
from fastebm.runs.registry import config_of, load, method
from fastebm.runs.run import Run, belongs_to
from fastebm.scalars import as_device
from fastebm.training.images import image_levels
from fastebm.training.trainer.config import TrainerConfig
from fastebm.training.trainer.loop import OnLog, Trainer

ImageInput = Tensor | Images | ImageSource | DigitsSource


def train(
    config: TrainerConfig,
    images: ImageInput,
    run_dir: str | Path,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    save_pictures: bool = True,
    on_log: OnLog | None = None,
) -> Run:
    """Trains on `images` in the folder `run_dir`, or resumes the unfinished run of the same config that is there.

    Processes that torchrun started train it together (docs/scaling.md). All of them call this with the same arguments,
    and see the same folder, which the first one writes.

    Args:
        config: a `CoarseToFineConfig`, `ECVAEConfig`, `ECPosteriorConfig` or `ECFlowConfig`; it selects the method.
        images: as read by `fastebm.data.open_images`, or float32 `(N, channels, S, S)` in [-1, 1], with S the config's
            largest size or a power of two above it; or an `ImageSource`, which is opened and stored with the run, so
            that `resume` finds it.
        device: where nets and chains are; the images stay where they are. By default a GPU if there is one, of several
            processes on a machine one for each.
        progress: show a bar with a few metrics of the method, for instance the energy gap
            `mean E(samples) - mean E(data)`.
        save_pictures: at the end (of every stage), and at the config's intervals, write samples.png (beside real
            images), curves.png, and other pictures of the method.
        on_log: called with every line of the log, by the first process.

    Returns the run, as `fastebm.load(run_dir)` does.

    Raises:
        ValueError: for images that don't fit the config, and a config that does not fit the number of processes.
        RunError: where `run_dir` holds something else (another config, other images), where another process trains in
            it, and where it can't be written to; checkpoints that were made before are complete.
        DivergedError: where energies explode or are not finite, and `config.retries` rollbacks did not help; the
            folder's newest checkpoint is from before that.
        StoppedError: after SIGTERM (in the main thread, of any process), with the last update saved.
        LostRankError: in the other processes, where one has ended or hangs.

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
    if not isinstance(config, TrainerConfig):
        raise TypeError(f"config must be the configuration of a method, got {type(config).__name__}")
    if isinstance(images, str | Path):
        images = ImageSource(Path(images), config.sizes[-1], config.channels)
    if not isinstance(images, Tensor | Images | ImageSource | DigitsSource):
        raise TypeError(f"images must be a tensor, Images, an ImageSource or a path, got {type(images).__name__}")
    with launched() as ranks:
        return _train(
            config, images, Path(run_dir), _resolve_device(device, ranks), progress, save_pictures, on_log, ranks
        )


def _train(
    config: TrainerConfig,
    images: ImageInput,
    run_dir: Path,
    device: torch.device,
    progress: bool,
    save_pictures: bool,
    on_log: OnLog | None,
    ranks: Ranks,
) -> Run:
    # Whatever can be refused is refused before images are read and anything is computed.
    if ranks.first:
        RunFolder.check_place(run_dir)
    parts = method(config.kind, run_dir)
    parts.Run.layout(config, 0)  # a config that makes no net, or one larger than the memory
    source, opened = (None, images) if isinstance(images, Tensor | Images) else (images.to_json(), images.open())
    if progress and ranks.first and isinstance(opened, Images):
        print(opened, file=sys.stderr, flush=True)  # which format the file or folder was read as
    levels = image_levels(opened, config.sizes, config.channels)
    with _one_line_out_of_memory():
        # A new run's trainer comes first: what it refuses must not leave a folder that then holds "another config".
        started = ranks.broadcast(RunFolder.is_run(run_dir) if ranks.first else None)
        trainer: Trainer | None = None if started else parts.Trainer(config, levels, device)
        with RunFolder.locked(run_dir) if ranks.first else nullcontext():
            folder, checkpoint = RunFolder(run_dir), None
            if ranks.first:
                fields = dataclasses.fields(config)
                folder = RunFolder.open(
                    run_dir,
                    config.kind,
                    dataclasses.asdict(config),
                    images=source,
                    defaults={
                        field.name: field.default for field in fields if field.default is not dataclasses.MISSING
                    },
                    mutable_fields=config.mutable_fields,
                    keep_checkpoints=config.keep_checkpoints,
                )
                # The nets of a run that is there are made once its checkpoint is known to have tensors of their shapes.
                checkpoint = folder.newest_checkpoint(check=belongs_to(config, parts.Run))
            checkpoint = ranks.broadcast(checkpoint)
            trainer = trainer or parts.Trainer(config, levels, device)
            trainer.train(folder, checkpoint, progress=progress, save_pictures=save_pictures, on_log=on_log)
            del trainer, checkpoint
            ranks.barrier()  # everything is written
        return load(run_dir, device)


def resume(
    run_dir: str | Path,
    images: ImageInput | None = None,
    *,
    retries: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    save_pictures: bool = True,
    on_log: OnLog | None = None,
) -> Run:
    """Resumes the unfinished run in `run_dir` with its own config, on the images that it was started with.

    A finished run is only loaded: nothing is left to train, and its images are not needed any more.

    Args:
        images: the same images, where the run doesn't know where they are or they were moved.
        retries: lets the guard roll the run back more often than the config does.
        device, progress, save_pictures, on_log: as of `train`.

    Raises as `train`; also RunError where there is no run, or its images are not known.
    """
    folder = RunFolder.existing(run_dir)
    config = config_of(folder)
    if retries is not None:
        config = dataclasses.replace(config, retries=retries)
    if images is None:
        if folder.checkpoints.iterations()[-1:] == [config.total_iterations]:
            run = load(run_dir, _resolve_device(device, placed()))
            if run.finished:  # which it isn't where that checkpoint is damaged
                return run
        stored = folder.images()
        if stored is None:
            raise RunError(f"{folder.path} doesn't say where its images come from: give them")
        images = source_from_json(stored)
    return train(config, images, run_dir, device=device, progress=progress, save_pictures=save_pictures, on_log=on_log)


@contextmanager
def _one_line_out_of_memory() -> Iterator[None]:
    """Turns what PyTorch and Python raise where memory is short into RunError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            advice = "smaller batches or widths, or max_batch where the method has it, need less"
            raise RunError(f"the memory is too small for this training: {advice}") from error
        raise


def _resolve_device(device: torch.device | str | None, ranks: Ranks) -> torch.device:
    """The given one, or else a GPU if there is one; of several GPUs each rank on a machine takes its own."""
    found = as_device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if found.type == "cuda" and ":" not in str(found) and ranks.size > 1:
        return torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
    return found
