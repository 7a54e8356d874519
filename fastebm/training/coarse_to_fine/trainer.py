"""A coarse-to-fine run in memory: its nets, its optimizer, and what an update is."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastebm.data import add_noise, batches, flip, neighbour_mean, random_hole_masks
from fastebm.data.masks import HOLE_NOISE
from fastebm.models import CoarseToFineEnergy
from fastebm.ops import normal, uniform
from fastebm.plotting import GRID
from fastebm.rng import Stream
from fastebm.runs.checkpoints import Checkpoint
from fastebm.runs.folder import RunFolder
from fastebm.sampling import data_term_weight
from fastebm.sampling.cascade import Level, LevelSampler
from fastebm.training.coarse_to_fine.config import CoarseToFineConfig, Stage
from fastebm.training.coarse_to_fine.recomputation import recomputed_blocks
from fastebm.training.coarse_to_fine.run import (
    CoarseToFineRun,
    cascade,
    expanding_cascade,
    frozen_levels,
    new_net,
    reached_levels,
    save_pictures,
)
from fastebm.training.images import ImageLevels, split_by_label
from fastebm.training.tensorboard import TensorBoardWriter
from fastebm.training.trainer.loop import (
    Loop,
    average,
    optimizer_tensors,
    part,
    restore_optimizer,
    step,
    to_floats,
    update_metrics,
)


class Trainer(Loop):
    """The nets of a run and the optimizer of its current stage."""

    hint = "a smaller learning rate or a larger energy_l2"
    config: CoarseToFineConfig

    def __init__(self, config: CoarseToFineConfig, images: ImageLevels, device: torch.device) -> None:
        self.sources: ImageLevels | None = None
        if config.domain >= 0:
            images, self.sources = split_by_label(images, config.domain)
        super().__init__(config, images, device)

    def start(self) -> None:
        self.iteration = 0
        self.net = new_net(self.config).to(self.device)
        self.average = self._copy_to_average()
        self.frozen: dict[int, CoarseToFineEnergy] = {}
        self._begin_stage()

    @property
    def stage(self) -> Stage:
        return self.config.stage_at(self.iteration)

    @property
    def last_stage(self) -> Stage:
        """The stage of the last update, which may have been the last one of it."""
        return self.config.stage_at(self.iteration - 1)

    @property
    def learning_rate(self) -> float:
        return self.config.learning_rate_at(self.iteration) * self.guard.lr_factor

    def describe(self) -> dict[str, Any]:
        beta = self.config.beta_at(self.iteration)
        return {"size": self.stage.size, "beta": beta, "learning_rate": self.learning_rate}

    def progress_metrics(self, metrics: Mapping[str, float]) -> tuple[str, dict[str, float]]:
        size = self.last_stage.size
        return f"{size}x{size}", {"gap": metrics["gap"], "energy": metrics["energy_data"]}

    def stage_ended(self) -> bool:
        stage = self.last_stage
        return self.iteration == stage.first_iteration + stage.iterations

    def update(self) -> dict[str, float]:
        """One update of the weights, and the health of the energies that it came from."""
        stage, beta = self.stage, self.config.beta_at(self.iteration)
        first = self._first_image(stage)
        real = self._real_images(stage, first)
        fake, motion = self._fake_images(stage, beta, first, real, self._start_images(stage, first, real))
        loss, data, samples = self._accumulate_gradient(stage, real, fake, beta)
        metrics = to_floats(update_metrics(self.net, loss, data, samples) | motion)
        self.guard.check(self.iteration + 1, metrics)
        step(self.optimizer, self.learning_rate)
        if self.config.ema:
            average(self.average, self.net, self.config.ema)
        self.iteration += 1
        return metrics

    def check_before_save(self) -> None:
        """Lets the guard see energies under the weights that are about to be saved, which no update has come from yet.

        The chains are those that the next update would start, and leave no trace.
        """
        stage, beta = self.last_stage, self.config.beta_at(self.iteration - 1)
        real = self.images.first(stage.size, stage.batch_size, self.device)
        _, _, noisy = self.config.chains_by_start(stage)
        starts = real[:noisy] if self.sources is None else self.sources.first(stage.size, noisy, self.device)
        with torch.no_grad():
            fake, _ = self._fake_images(stage, beta, self._first_image(stage), real, starts)
            self.net.eval()
            data, samples = (self.net(images, beta).abs().max().item() for images in (real, fake))
            self.net.train()
            largest = {"largest_energy_data": data, "largest_energy_samples": samples, "gradient_norm": 0.0}
            self.guard.check(self.iteration, largest)

    @property
    def images_seen(self) -> int:
        return self._first_image(self.stage)

    def _first_image(self, stage: Stage) -> int:
        """How many images, and chains, came before the next update, which belongs to `stage` or follows it."""
        return stage.first_image + (self.iteration - stage.first_iteration) * stage.batch_size

    def _real_images(self, stage: Stage, first: int) -> Tensor:
        real = self.images.batch(stage.size, next(self._order), self.device)
        if self.config.flip:
            real = flip(real, seed=self.seed, positions=first)
        if self.config.data_noise:
            real = add_noise(real, self.config.data_noise, seed=self.seed, positions=first)
        return real.clamp(-1, 1) if self.config.clamp_ends else real

    def _start_images(self, stage: Stage, first: int, real: Tensor) -> Tensor:
        """The images at which an update's last chains start, (B, C, size, size), before their noise."""
        _, _, noisy = self.config.chains_by_start(stage)
        if self.sources is None or not noisy:
            return real[len(real) - noisy :]
        images = self.sources.batch(stage.size, next(self._source_order), self.device)
        number = first + stage.batch_size - noisy
        return flip(images, seed=self.seed, positions=number) if self.config.flip else images

    def _fake_images(
        self, stage: Stage, beta: float, first: int, real: Tensor, starts: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The ends of chains from number `first` on, and how those from noise alone moved at the highest resolution.

        Chains from noise come first, then those that fill holes in their part of `real`, then those from `starts`.
        """
        count, holes, noisy = self.config.chains_by_start(stage)
        fake, motion = self._chain_ends(stage, beta, first, count)
        ends = [fake]
        if holes:
            ends.append(self._filled(stage, beta, first + count, real[count : count + holes]))
        if noisy:
            ends.append(self._restored(stage, beta, first + count + holes, starts))
        fake = torch.cat(ends)
        return (fake.clamp(-1, 1) if self.config.clamp_ends else fake), motion

    def _filled(self, stage: Stage, beta: float, first: int, images: Tensor) -> Tensor:
        """The ends of chains, from number `first` on, that fill in a hole in each of `images`."""
        holes = random_hole_masks(len(images), stage.size, seed=self.seed, positions=first, device=self.device)
        holes = holes.expand_as(images)
        where: dict[str, Any] = {"seed": self.seed, "stream": Stream.HOLE, "chain_ids": first}
        noise = HOLE_NOISE * (2 * uniform(images.shape, step=2, device=self.device, **where) - 1)
        start = neighbour_mean(images, holes) + noise
        return self._refined(stage, beta, first, start, mask=~holes, known=images)

    def _restored(self, stage: Stage, beta: float, first: int, images: Tensor) -> Tensor:
        """The ends of chains, from number `first` on, that start at `images` under noise."""
        config = self.config
        where: dict[str, Any] = {"seed": self.seed, "stream": Stream.NOISY_START, "chain_ids": first}
        # With a data term one std for all, as a data term has one weight.
        draws = 1 if config.start_temperature else len(images)
        std = config.start_noise * uniform((draws, 1), step=0, device=self.device, **where)
        noise = normal(images.shape, step=1, device=self.device, **where)
        noisy = images + std[:, :, None, None] * noise
        start = noisy.clamp(-1, 1)
        if not config.start_temperature:
            return self._refined(stage, beta, first, start)
        pull = torch.tensor(data_term_weight(config.start_temperature, std.item()))  # float32, as the schedule is
        return self._refined(stage, beta, first, start, data_term=(noisy, pull))

    def _refined(self, stage: Stage, beta: float, first: int, start: Tensor, **held: Any) -> Tensor:
        """The ends of chains from number `first` on that start at images of the stage's size, held as in `sample`."""
        size = self.config.max_batch or None
        sampler = self._sampler(stage, beta)
        return sampler.sample(None, self.seed, first, x0=start, batch_size=size, check=False, **held)

    def _chain_ends(self, stage: Stage, beta: float, first: int, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The ends of `count` chains from noise, from number `first` on, and how they moved at the last level."""
        starts: list[Tensor] = []

        def keep(level: Level, x: Tensor) -> None:
            if level.size == stage.size:
                starts.append(x.clone())

        fake = self._sampler(stage, beta).sample(
            count,
            self.seed,
            first,
            channels=self.config.channels,
            batch_size=self.config.max_batch or None,
            check=False,  # energies that are not finite are the guard's to report
            on_start=keep,
        )
        motion = {
            "displacement": (fake - torch.cat(starts)).abs().mean(),
            "clamped": (fake.abs() >= 1).float().mean(),
        }
        return fake, motion

    def _accumulate_gradient(
        self, stage: Stage, real: Tensor, fake: Tensor, beta: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sets the gradient of the loss. Returns the loss and the energies of data and samples, all detached."""
        count = stage.batch_size
        size = self.config.max_batch or count
        losses, data, samples = [], [], []
        self.optimizer.zero_grad()
        with self._fixed_norms(stage, real[:1], beta, several=size < count):
            for first in range(0, count, size):
                shown = real[first : first + size]
                # One pass for both, so that one power iteration of the spectral norm serves both.
                energies = self._energies(torch.cat((shown, fake[first : first + size])), beta)
                low, high = energies[: len(shown)], energies[len(shown) :]
                loss = low.mean() - high.mean() + self.config.energy_l2 * energies.square().mean()
                loss = loss * (len(shown) / count)
                loss.backward()
                losses.append(loss.detach())
                data.append(low.detach())
                samples.append(high.detach())
        return torch.stack(losses).sum(), torch.cat(data), torch.cat(samples)

    def _energies(self, images: Tensor, beta: float) -> Tensor:
        """Energies (B,), float32, for an update."""
        # Channels-last by a copy, as the strides of gray images tell no layout. Other layouts took 3 to 12 times as
        # long on a CPU with matrix units.
        images = torch.empty_like(images, memory_format=torch.channels_last).copy_(images)
        low = self.config.update_dtype == "bfloat16"
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=low):
            return self.net(images, beta).float()

    @contextmanager
    def _fixed_norms(self, stage: Stage, image: Tensor, beta: float, *, several: bool) -> Iterator[None]:
        """A block for the passes of one update, which see the same weights: one power iteration before all of them.

        A single pass that nothing computes again does that itself.
        """
        again = 0 < self.config.recompute_from <= stage.size
        if not (several or again):
            yield
            return
        with torch.no_grad():
            self.net(image, beta)
        self.net.eval()
        try:
            with recomputed_blocks(self.net, again):
                yield
        finally:
            self.net.train()

    def _begin_stage(self) -> None:
        """What lives as long as a stage: optimizer, order of the images, and the samplers through the net.

        Samplers are made once, because an energy gradient examines its energy before first use.
        """
        stage, config = self.stage, self.config
        self.optimizer = torch.optim.Adam(self.net.parameters_at(stage.size), stage.learning_rate, config.adam_betas)
        self._order = batches(self.images, stage.batch_size, config.seed, self.iteration)
        if self.sources is not None and (noisy := config.chains_by_start(stage)[2]):
            self._source_order = batches(self.sources, noisy, config.seed, self.iteration)
        if config.variant == "expanding":
            self._expanding = expanding_cascade(config, self.net, stage.size)
            return
        self._blend = torch.ones((), device=self.device)
        lower = {size: net for size, net in self.frozen.items() if size < stage.size}
        self._grown = cascade(config, {**lower, stage.size: self.net})
        self._fading = cascade(config, {**lower, stage.size: functools.partial(self.net, beta=self._blend)})

    def _sampler(self, stage: Stage, beta: float) -> LevelSampler:
        if self.config.variant == "expanding":
            self._expanding.beta = beta
            return self._expanding
        self._blend.fill_(beta)
        return self._grown if beta == 1 else self._fading

    def next_stage(self) -> None:
        size = self.last_stage.size
        self.frozen[size] = self.average.frozen(size)
        self.average = self._copy_to_average()
        self._begin_stage()

    def _copy_to_average(self) -> CoarseToFineEnergy:
        """The net whose weights are sampled from: one that follows the trained one, or without averaging that one."""
        return self.net.frozen(self.net.image_size) if self.config.ema else self.net

    def save_pictures(self, folder: RunFolder, board: TensorBoardWriter) -> None:
        levels = reached_levels(self.config, self.iteration, self.frozen, self.average)
        run = CoarseToFineRun(folder.path, self.config, self.iteration, levels)
        save_pictures(run, self.images.first(self.last_stage.size, GRID**2), folder, board)

    def tensors(self) -> dict[str, Tensor]:
        named = {f"net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        if self.config.ema:
            named |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for size, net in self.frozen.items():
            named |= {f"frozen.{size}.{name}": tensor for name, tensor in net.state_dict().items()}
        return named | optimizer_tensors(self.optimizer, "optimizer.")

    def load_state(self, checkpoint: Checkpoint) -> None:
        self.net.load_state_dict(part(checkpoint.tensors, "net."))
        if self.config.ema:
            self.average.load_state_dict(part(checkpoint.tensors, "average."))
        self.frozen = frozen_levels(self.net, checkpoint)
        self._begin_stage()
        restore_optimizer(self.optimizer, checkpoint.tensors, "optimizer.")
