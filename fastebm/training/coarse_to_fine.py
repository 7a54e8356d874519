"""Training of CF-EBM, coarse to fine: one energy per resolution, each grown out of the one below.

Zhao, Xie and Li, "Learning Energy-Based Generative Models via Coarse-to-Fine Expanding and Sampling", ICLR 2021, in the
variant that keeps each resolution's net as it stood when its stage ended. A stage trains the sub-net of one size:

- chains run from uniform noise through the frozen nets of the lower sizes and then through the net in training;
- the loss is `mean E(data) - mean E(chain ends)`, optionally with an L2 term on the energies;
- the newest block fades in: `beta` rises from 0 to 1 over the first part of a stage.

Everything an iteration draws (images, their noise, the chains' noise) is a pure function of the seed and of how many
images and chains came before, so that a resumed run ends with the weights of an uninterrupted one, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from fastebm import rng
from fastebm.data import batches, pyramid
from fastebm.models import CoarseToFineEnergy
from fastebm.ops import normal
from fastebm.sampling import Cascade, linear
from fastebm.training import pictures
from fastebm.training.checkpoints import Checkpoint
from fastebm.training.coarse_to_fine_config import CoarseToFineConfig, Stage
from fastebm.training.run import DivergedError, Guard, Progress, RunError, RunFolder

KIND = "coarse_to_fine"


@dataclass(frozen=True)
class CoarseToFineRun:
    """What a run has learned up to `iteration`: an energy for each resolution that it reached.

    Attributes:
        path: the run's folder.
        levels: energies `(B, channels, s, s) -> (B,)` by size s, low meaning real.
    """

    path: Path
    config: CoarseToFineConfig
    iteration: int
    levels: dict[int, Callable[[Tensor], Tensor]]

    @property
    def finished(self) -> bool:
        return self.iteration == self.config.total_iterations

    @property
    def size(self) -> int:
        """The highest resolution so far."""
        return max(self.levels)

    def cascade(self) -> Cascade:
        """The sampler with the run's own settings."""
        return _cascade(self.config, self.levels)

    def sample(self, count: int, seed: int | None = None, *, batch_size: int = 1000, progress: bool = False) -> Tensor:
        """Images `(count, channels, size, size)` in [-1, 1].

        Without a `seed`, chains continue the numbering of those of training, with its seed: always the same images,
        from noise that training has not seen.
        """
        images = self.cascade().sample(
            count,
            self.config.seed if seed is None else seed,
            self.config.total_chains if seed is None else 0,
            channels=self.config.channels,
            batch_size=batch_size,
            progress=progress,
        )
        return images.clamp(-1, 1)


def train_coarse_to_fine(
    config: CoarseToFineConfig,
    images: Tensor,
    run_dir: str | Path,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    save_pictures: bool = True,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> CoarseToFineRun:
    """Trains on `images` in the folder `run_dir`, or takes up the unfinished run that is there.

    Args:
        images: float32 `(N, channels, S, S)` in [-1, 1], with S the last of `config.sizes` or a power of two above.
        device: of net and chains; the images stay where they are. By default a GPU if there is one.
        progress: shows a bar with the energy gap, `mean E(samples) - mean E(data)`, and the mean energy.
        save_pictures: at the end of every stage writes samples.png (beside real images), strip.png and curves.png.
        on_log: called with every line of the log.

    Raises:
        ValueError: for images that don't fit the config.
        RunError: where `run_dir` holds something else: another config, other images.
        DivergedError: where energies explode or are not finite; the folder's newest checkpoint is from before that.
    """
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    images = images.detach()
    # The trainer first: a config that makes no net must not leave a folder that then holds "another config".
    trainer = _Trainer(config, _image_levels(config, images), device)
    folder = RunFolder.open(run_dir, KIND, dataclasses.asdict(config), keep_checkpoints=config.keep_checkpoints)
    checkpoint = folder.newest_checkpoint()
    if checkpoint is not None:
        trainer.restore(checkpoint)
    folder.log.rewind(trainer.iteration)
    with Progress.over(config.total_iterations, trainer.iteration, progress) as bar:
        for line in trainer.run(folder, bar, save_pictures):
            folder.log.append(line)
            if on_log is not None:
                on_log(line)
    return load_coarse_to_fine(run_dir, device)


def load_coarse_to_fine(run_dir: str | Path, device: torch.device | str | None = None) -> CoarseToFineRun:
    """The run in a folder, finished or not, as its newest good checkpoint has it, for sampling.

    Raises RunError where there is no such run or it has no checkpoint yet.
    """
    folder = RunFolder.existing(run_dir)
    config = CoarseToFineConfig.from_json(folder.config(KIND))
    checkpoint = folder.newest_checkpoint()
    if checkpoint is None:
        raise RunError(f"{run_dir} has no checkpoint yet: train it for at least {config.checkpoint_every} iterations")
    net = _new_net(config).to(device)
    levels: dict[int, Callable[[Tensor], Tensor]] = dict(_frozen_levels(net, checkpoint))
    stage = config.stage_at(checkpoint.iteration)
    if stage.first_iteration < checkpoint.iteration < stage.first_iteration + stage.iterations:
        net.load_state_dict(_part(checkpoint.tensors, "average." if config.ema else "net."))
        top, beta = net.frozen(stage.size), config.beta_at(checkpoint.iteration)
        levels[stage.size] = top if beta == 1 else functools.partial(top, beta=beta)
    return CoarseToFineRun(Path(run_dir), config, checkpoint.iteration, levels)


class _Trainer:
    """A run in memory: `iteration` updates done, the nets, and the optimizer of the current stage."""

    def __init__(self, config: CoarseToFineConfig, images: dict[int, Tensor], device: torch.device) -> None:
        self.config = config
        self.images = images
        self.images_digest = _digest(images[max(images)])
        self.device = device
        self.guard = Guard(config.max_energy)
        self.iteration = 0
        self.seconds = 0.0
        self.net = _new_net(config).to(device)
        self.average = self._copy_to_average()
        self.frozen: dict[int, CoarseToFineEnergy] = {}
        self._begin_stage()

    @property
    def stage(self) -> Stage:
        return self.config.stage_at(self.iteration)

    def run(self, folder: RunFolder, bar: Progress, save_pictures: bool) -> Iterator[dict[str, Any]]:
        """Trains to the end with a checkpoint now and then; yields lines for the log."""
        config = self.config
        began = time.monotonic() - self.seconds
        means = _Means()
        while self.iteration < config.total_iterations:
            stage = self.stage
            line = {"iteration": self.iteration + 1, "size": stage.size, "beta": config.beta_at(self.iteration)}
            line["learning_rate"] = config.learning_rate_at(self.iteration)
            with _advising(folder):
                health = self.update()
            self.seconds = time.monotonic() - began
            means.add(health)
            bar.advance(f"{stage.size}x{stage.size}", gap=health["gap"], energy=health["energy_data"])
            ended = self.iteration == stage.first_iteration + stage.iterations
            saving = ended or self.iteration % config.checkpoint_every == 0
            if saving:
                self._examine(stage, folder)
            if ended or self.iteration % config.log_every == 0:
                yield {**line, **means.take(), "seconds": round(self.seconds, 3)}
            if ended:
                self._end_stage()
                if save_pictures:  # before the checkpoint, so that no kill leaves a finished run without them
                    run = CoarseToFineRun(folder.path, config, self.iteration, dict(self.frozen))
                    _save_pictures(run, self.images[stage.size], folder)
            if saving:
                folder.checkpoints.save(self.iteration, self.tensors(), self.state())

    def update(self) -> dict[str, float]:
        """One update of the weights, and the health of the energies that it came from."""
        stage, beta = self.stage, self.config.beta_at(self.iteration)
        count = stage.batch_size
        first = stage.first_image + (self.iteration - stage.first_iteration) * count
        real = self._real_images(stage.size, count, first)
        fake = self._chain_ends(beta, count, first)
        # One pass for both, so that one power iteration of the spectral norm serves both.
        energies = self.net(torch.cat((real, fake)), beta)
        data, samples = energies[:count], energies[count:]
        loss = data.mean() - samples.mean() + self.config.energy_l2 * energies.square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        health = self._health(loss.detach(), data.detach(), samples.detach())
        self.guard.check(self.iteration + 1, health)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.iteration)
        self.optimizer.step()
        if self.config.ema:
            _average(self.average, self.net, self.config.ema)
        self.iteration += 1
        return health

    def _examine(self, stage: Stage, folder: RunFolder) -> None:
        """Lets the guard see energies under the weights that are about to be saved, which no update has come from yet.

        The chains are those that the next update would start, and leave no trace.
        """
        count = stage.batch_size
        first = stage.first_image + (self.iteration - stage.first_iteration) * count
        beta = self.config.beta_at(self.iteration - 1)
        real = self.images[stage.size][:count].to(self.device)
        with torch.no_grad(), _advising(folder):
            fake = self._chain_ends(beta, count, first)
            self.net.eval()
            data, samples = (self.net(images, beta).abs().max().item() for images in (real, fake))
            self.net.train()
            largest = {"largest_energy_data": data, "largest_energy_samples": samples, "gradient_norm": 0.0}
            self.guard.check(self.iteration, largest)

    def _real_images(self, size: int, count: int, first: int) -> Tensor:
        images = self.images[size]
        real = images[next(self._order).to(images.device)].to(self.device)
        if not self.config.data_noise:
            return real
        noise = normal(
            real.shape, seed=self.config.seed, stream=rng.Stream.DATA_NOISE, chains=first, device=self.device
        )
        return real + self.config.data_noise * noise

    def _chain_ends(self, beta: float, count: int, first: int) -> Tensor:
        self._blend.fill_(beta)
        cascade = self._grown if beta == 1 else self._fading
        # Energies that are not finite are the guard's to report.
        return cascade.sample(count, self.config.seed, first, channels=self.config.channels, check=False)

    def _health(self, loss: Tensor, data: Tensor, samples: Tensor) -> dict[str, float]:
        numbers = {
            "loss": loss,
            "energy_data": data.mean(),
            "energy_samples": samples.mean(),
            "gap": samples.mean() - data.mean(),
            "largest_energy_data": data.abs().max(),
            "largest_energy_samples": samples.abs().max(),
            "gradient_norm": get_total_norm([p.grad for p in self.net.parameters() if p.grad is not None]),
        }
        # One copy to the host for all of them.
        return dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))

    def _begin_stage(self) -> None:
        """What lives as long as a stage: optimizer, order of the images, and the two cascades through the net.

        The cascades are made once, because an energy gradient examines its energy before first use.
        """
        stage, config = self.stage, self.config
        self.optimizer = torch.optim.Adam(self.net.parameters_at(stage.size), stage.learning_rate, config.adam_betas)
        self._order = batches(self.images[stage.size], stage.batch_size, config.seed, self.iteration)
        self._blend = torch.ones((), device=self.device)
        lower = {size: net for size, net in self.frozen.items() if size < stage.size}
        self._grown = _cascade(config, {**lower, stage.size: self.net})
        self._fading = _cascade(config, {**lower, stage.size: functools.partial(self.net, beta=self._blend)})

    def _end_stage(self) -> None:
        size = self.config.stage_at(self.iteration - 1).size
        self.frozen[size] = self.average.frozen(size)
        self.average = self._copy_to_average()
        self._begin_stage()

    def _copy_to_average(self) -> CoarseToFineEnergy:
        """The net whose weights are sampled from: one that follows the trained one, or without averaging that one."""
        return self.net.frozen(self.net.image_size) if self.config.ema else self.net

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the next iteration depends on, by name."""
        named = {f"net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        if self.config.ema:
            named |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for size, net in self.frozen.items():
            named |= {f"frozen.{size}.{name}": tensor for name, tensor in net.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            named |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        return named

    def state(self) -> dict[str, Any]:
        stage = self.stage
        images = stage.first_image + (self.iteration - stage.first_iteration) * stage.batch_size
        return {"images_seen": images, "chains_started": images, "images": self.images_digest, "seconds": self.seconds}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes up where `tensors` and `state` were saved. Raises RunError if that was with other images."""
        if checkpoint.state["images"] != self.images_digest:
            raise RunError("the run in this folder was trained on other images: choose another folder")
        self.iteration = checkpoint.iteration
        self.seconds = float(checkpoint.state["seconds"])
        self.net.load_state_dict(_part(checkpoint.tensors, "net."))
        if self.config.ema:
            self.average.load_state_dict(_part(checkpoint.tensors, "average."))
        self.frozen = _frozen_levels(self.net, checkpoint)
        self._begin_stage()
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _part(checkpoint.tensors, "optimizer.").items():
            index, _, moment = name.partition(".")
            moments.setdefault(int(index), {})[moment] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


class _Means:
    """Running means of numbers by name."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, numbers: Mapping[str, float]) -> None:
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in numbers.items()}
        self._count += 1

    def take(self) -> dict[str, float]:
        means = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means


def _cascade(config: CoarseToFineConfig, levels: Mapping[int, Callable[[Tensor], Tensor]]) -> Cascade:
    noise = linear(config.noise_start, config.noise_end)
    return Cascade(levels, steps=config.steps, step_size=config.step_size, noise_std=noise)


def _new_net(config: CoarseToFineConfig) -> CoarseToFineEnergy:
    """A net for all stages, with weights drawn from the config's seed and torch's own generator left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return CoarseToFineEnergy(
            config.sizes[-1],
            config.channels,
            base_width=config.base_width,
            lowest=config.sizes[0],
            activation=config.activation,
            spectral_norm=config.spectral_norm,
        )


def _frozen_levels(net: CoarseToFineEnergy, checkpoint: Checkpoint) -> dict[int, CoarseToFineEnergy]:
    """The nets of ended stages, by size, from a checkpoint."""
    frozen = {}
    for size in net.sizes:
        if state := _part(checkpoint.tensors, f"frozen.{size}."):
            frozen[size] = net.frozen(size)
            frozen[size].load_state_dict(state)
    return frozen


def _average(average: CoarseToFineEnergy, net: CoarseToFineEnergy, decay: float) -> None:
    """Moves the averaged weights; buffers (the spectral norm's vectors) are taken as they are."""
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)
        for mean, current in zip(average.buffers(), net.buffers(), strict=True):
            mean.copy_(current)


def _image_levels(config: CoarseToFineConfig, images: Tensor) -> dict[int, Tensor]:
    """The images at each of the config's sizes, after a look at whether they can be trained on."""
    if images.dtype != torch.float32 or images.ndim != 4 or images.shape[1] != config.channels or not len(images):
        raise ValueError(
            f"images must be float32 (N, {config.channels}, S, S) with N >= 1, got {images.dtype} {tuple(images.shape)}"
        )
    low, high = images.aminmax()
    if not (low >= -1 and high <= 1):
        raise ValueError(f"images must lie in [-1, 1], got values from {float(low):g} to {float(high):g}")
    levels = pyramid(images, config.sizes[0])
    if config.sizes[-1] not in levels:
        raise ValueError(f"images of size {images.shape[3]} are too small to train up to {config.sizes[-1]}")
    return {size: levels[size] for size in config.sizes}


def _digest(images: Tensor) -> str:
    return hashlib.sha256(images.detach().cpu().numpy().tobytes()).hexdigest()


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@contextmanager
def _advising(folder: RunFolder) -> Iterator[None]:
    """Adds to the guard's word what is left of the run and what may help."""
    try:
        yield
    except DivergedError as error:
        raise DivergedError(f"{error}. {_advice(folder)}") from None


def _advice(folder: RunFolder) -> str:
    saved = folder.checkpoints.iterations()
    if not saved:
        return "There is no checkpoint yet. A smaller learning rate or a larger energy_l2 may hold the energies"
    return (
        f"The checkpoint of iteration {saved[-1]} in {folder.path} is from before that and can be sampled from. "
        "A new run with a smaller learning rate or a larger energy_l2 may hold the energies"
    )


def _save_pictures(run: CoarseToFineRun, real: Tensor, folder: RunFolder) -> None:
    """samples.png, strip.png and curves.png of the run so far."""
    count = pictures.GRID**2
    pictures.save_samples(folder.path / "samples.png", run.sample(count), real[:count])
    moments: list[Tensor] = []

    def keep(k: int, x: Tensor, info: Any) -> None:
        if k == 1:
            moments.append(info.before)
        moments.append(x)

    config = run.config
    run.cascade().sample(pictures.STRIP_ROWS, config.seed, config.total_chains, channels=config.channels, keep=keep)
    pictures.save_strip(folder.path / "strip.png", moments)
    pictures.save_curves(folder.path / "curves.png", folder.log.lines())
