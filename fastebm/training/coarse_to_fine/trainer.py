"""`CoarseToFineTrainer`: one update of the weights, and the transition from one stage (resolution) to the next."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from fastebm.compiler import weight_gradient
from fastebm.data import add_noise, batches, flip, neighbour_mean, random_hole_masks
from fastebm.data.masks import HOLE_NOISE
from fastebm.models import CoarseToFineEnergy
from fastebm.ops import normal, uniform
from fastebm.plotting import GRID
from fastebm.rng import Stream
from fastebm.runs.checkpoints import Checkpoint
from fastebm.runs.folder import RunFolder
from fastebm.runs.nets import initialized
from fastebm.sampling import data_term_weight
from fastebm.sampling.cascade import Level, LevelSampler
from fastebm.sampling.diagnostics import ChainReadings
from fastebm.sampling.state import ChainState
from fastebm.training.coarse_to_fine.config import CoarseToFineConfig, Stage
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
from fastebm.training.trainer.energy_loss import EnergyLoss, beyond_hinge, brake
from fastebm.training.trainer.loop import Trainer
from fastebm.training.trainer.metrics import Metrics, energy_update_metrics, to_floats
from fastebm.training.trainer.parts import Part
from fastebm.training.trainer.weights import (
    adam,
    collect_moments,
    load_optimizer,
    optimizer_tensors,
    select_prefix,
    step,
    update_ema,
    with_prefix,
)


class CoarseToFineTrainer(Trainer):
    """Trains the energy of one resolution after the other: the net, its moving average, and the frozen lower nets."""

    run_type = CoarseToFineRun
    hint = "a smaller learning rate or a larger energy_l2"
    config: CoarseToFineConfig
    _ends: Tensor | None
    """The starts of the next update's continued chains, (n, C, size, size); None in the first update of a stage."""

    def __init__(self, config: CoarseToFineConfig, images: ImageLevels, device: torch.device) -> None:
        self.sources: ImageLevels | None = None
        if config.domain >= 0:
            images, self.sources = split_by_label(images, config.domain)
        super().__init__(config, images, device)

    def reset(self) -> None:
        self.iteration = 0
        self.net = initialized(lambda: new_net(self.config), self.device)
        self.ema_net = self._new_ema_net()
        self.frozen: dict[int, CoarseToFineEnergy] = {}
        self._begin_stage()

    @property
    def stage(self) -> Stage:
        return self.config.stage_at(self.iteration)

    @property
    def last_stage(self) -> Stage:
        """The stage of the last update, also where that was the last one of the stage."""
        return self.config.stage_at(self.iteration - 1)

    @property
    def learning_rate(self) -> float:
        return self.config.learning_rate_at(self.iteration) * self.guard.lr_factor

    def log_fields(self) -> dict[str, Any]:
        beta = self.config.beta_at(self.iteration)
        return {"size": self.stage.size, "beta": beta, "learning_rate": self.learning_rate}

    def progress_metrics(self, metrics: Mapping[str, float]) -> tuple[str, dict[str, float]]:
        size = self.last_stage.size
        return f"{size}x{size}", {"gap": metrics["gap"], "energy": metrics["energy_data"]}

    def stage_ended(self) -> bool:
        stage = self.last_stage
        return self.iteration == stage.first_iteration + stage.iterations

    def update(self) -> dict[str, float]:
        stage, beta = self.stage, self.config.beta_at(self.iteration)
        indices, sources = next(self._order), next(self._source_order)
        drawn = []
        for part in self.parts.of(stage.batch_size, self._first_image(stage)):
            real = self._real_images(stage, part, indices)
            fake, motion = self._fake_images(stage, beta, part, real, self._start_images(stage, part, real, sources))
            drawn.append((part, real, fake, motion))

        def gradients(contrast: float) -> tuple[Tensor, Tensor, Tensor]:
            def gradient(drawn: tuple[Part, Tensor, Tensor, Metrics]) -> tuple[Tensor, Tensor, Tensor]:
                part, real, fake, _ = drawn
                return self._part_gradient(stage, part, real, fake, beta, contrast)

            found = self.parts.gradients(self.net, self.optimizer, gradient, drawn)
            return self.parts.loss_and_energies(found, stage.batch_size)

        loss, data, samples = gradients(1.0)
        if beyond_hinge(self.config, data, samples):
            loss, _, _ = gradients(0.0)
        metrics = energy_update_metrics(self.net, loss, data, samples)
        started = [len(self._from_noise(stage, part)) for part, *_ in drawn]
        numbers = to_floats(metrics | self.parts.means([motion for *_, motion in drawn], started))
        self.recorder.finish(numbers, data, samples, self.net)
        self.guard.check(self.iteration + 1, numbers)
        step(self.optimizer, self.learning_rate * brake(self.config, numbers["gap"]))
        if self.config.chains_by_start(stage).continued:
            self._keep_ends(stage, self.parts.rows_of_batch([fake for _, _, fake, _ in drawn], stage.batch_size))
        if self.config.ema:
            update_ema(self.ema_net, self.net, self.config.ema)
        self.iteration += 1
        return numbers

    def check_before_save(self) -> None:
        stage, beta = self.last_stage, self.config.beta_at(self.iteration - 1)
        found, parts = [], self.parts.of(stage.batch_size, self._first_image(stage))
        with torch.no_grad():
            for part in parts:
                real = self.images.at(stage.size, part.rows(), self.device)
                noisy = self._from_noisy(stage, part)
                starts = real[noisy.rows(part.start)]
                if self.sources is not None:
                    starts = self.sources.at(stage.size, noisy.rows(self._first_noisy(stage)), self.device)
                fake, _ = self._fake_images(stage, beta, part, real, starts)
                self.net.eval()
                found.append(tuple(self.net(images, beta) for images in (real, fake)))
                self.net.train()
        self._check_energies(self.net, parts, found)

    @property
    def images_seen(self) -> int:
        return self._first_image(self.stage)

    def _first_image(self, stage: Stage) -> int:
        """The number of images, and of chains, before the next update, which belongs to `stage` or follows it."""
        return stage.first_image + (self.iteration - stage.first_iteration) * stage.batch_size

    def _from_noise(self, stage: Stage, part: Part) -> Part:
        """The chains of a part that start from noise, which come first in a batch."""
        counts = self.config.chains_by_start(stage)
        return part.overlap(0, counts.noise + (counts.continued if self._ends is None else 0))

    def _continued(self, stage: Stage, part: Part) -> Part:
        """The chains of a part that go on from earlier ends; in the first update of a stage they start from noise."""
        counts = self.config.chains_by_start(stage)
        return part.overlap(counts.noise, counts.noise + (0 if self._ends is None else counts.continued))

    def _from_holes(self, stage: Stage, part: Part) -> Part:
        """The chains of a part that fill holes in their own images."""
        counts = self.config.chains_by_start(stage)
        return part.overlap(counts.noise + counts.continued, self._first_noisy(stage))

    def _from_noisy(self, stage: Stage, part: Part) -> Part:
        """The chains of a part that start at noisy images, the last ones of a batch."""
        return part.overlap(self._first_noisy(stage), stage.batch_size)

    def _first_noisy(self, stage: Stage) -> int:
        return stage.batch_size - self.config.chains_by_start(stage).noisy

    def _keep_ends(self, stage: Stage, fake: Tensor) -> None:
        """Keeps the ends that chains of the next update go on from, of those of all chains of an update."""
        counts = self.config.chains_by_start(stage)
        first = self._first_image(stage) + counts.noise
        ends = fake[counts.noise : counts.noise + counts.continued]
        coins = uniform((len(ends), 1), seed=self.seed, stream=Stream.BUFFER_DRAW, chain_ids=first, device=self.device)
        anew = fake[torch.arange(len(ends), device=self.device) % counts.noise]
        self._ends = torch.where((coins < self.config.restart)[:, :, None, None], anew, ends).contiguous()

    def _real_images(self, stage: Stage, part: Part, indices: Tensor) -> Tensor:
        real = self.images.batch(stage.size, indices[part.rows()], self.device)
        if self.config.flip:
            real = flip(real, seed=self.seed, positions=part.number)
        if self.config.data_noise:
            real = add_noise(real, self.config.data_noise, seed=self.seed, positions=part.number)
        return real.clamp(-1, 1) if self.config.clamp_ends else real

    def _start_images(self, stage: Stage, part: Part, real: Tensor, sources: Tensor) -> Tensor:
        """The images, (B, C, size, size), that the last chains of a part start at after noise is added."""
        noisy = self._from_noisy(stage, part)
        if self.sources is None:
            return real[noisy.rows(part.start)]
        images = self.sources.batch(stage.size, sources[noisy.rows(self._first_noisy(stage))], self.device)
        return flip(images, seed=self.seed, positions=noisy.number) if self.config.flip else images

    def _fake_images(
        self, stage: Stage, beta: float, part: Part, real: Tensor, starts: Tensor
    ) -> tuple[Tensor, Metrics]:
        """The ends of a part's chains, and metrics of those that started from noise.

        Chains from noise come first, then those that go on, those that fill holes in their images of `real`, and those
        from `starts`.
        """
        starting = (self._from_noise, self._continued, self._from_holes, self._from_noisy)
        free, continued, filling, noisy = (of(stage, part) for of in starting)
        motion: Metrics = dict.fromkeys(("displacement", "clamped"), torch.zeros((), device=self.device))
        at_clamp = (real.abs() >= 1).float().mean()
        ends = []
        if len(free):
            fake, motion = self._sample_chains(stage, beta, free.number, len(free))
            ends.append(fake)
        if len(continued) and self._ends is not None:
            start = self._ends[continued.rows(self.config.chains_by_start(stage).noise)]
            ends.append(self._sample_from(stage, beta, continued.number, start, "continued chains"))
        if len(filling):
            ends.append(self._sample_inpainting(stage, beta, filling.number, real[filling.rows(part.start)]))
        if len(noisy):
            first = part.first + self._first_noisy(stage)
            ends.append(self._sample_denoising(stage, beta, noisy.number, starts, first))
        fake = torch.cat(ends)
        return (fake.clamp(-1, 1) if self.config.clamp_ends else fake), motion | {"clamped_data": at_clamp}

    def _sample_inpainting(self, stage: Stage, beta: float, first: int, images: Tensor) -> Tensor:
        """The ends of chains, with ids from `first` on, that fill in a hole in each of `images`."""
        holes = random_hole_masks(len(images), stage.size, seed=self.seed, positions=first, device=self.device)
        holes = holes.expand_as(images)
        where: dict[str, Any] = {"seed": self.seed, "stream": Stream.HOLE, "chain_ids": first}
        noise = HOLE_NOISE * (2 * uniform(images.shape, step=2, device=self.device, **where) - 1)
        start = neighbour_mean(images, holes) + noise
        return self._sample_from(stage, beta, first, start, "holes", mask=~holes, known=images)

    def _sample_denoising(self, stage: Stage, beta: float, first: int, images: Tensor, first_of_all: int) -> Tensor:
        """The ends of chains, with ids from `first` on, that start at `images` after noise is added.

        Those of all parts have ids from `first_of_all` on.
        """
        config = self.config
        where: dict[str, Any] = {"seed": self.seed, "stream": Stream.NOISY_START}
        # With a data term all chains share one noise level, as a data term has one weight.
        draws, number = (1, first_of_all) if config.start_temperature else (len(images), first)
        std = config.start_noise * uniform((draws, 1), step=0, device=self.device, chain_ids=number, **where)
        noise = normal(images.shape, step=1, device=self.device, chain_ids=first, **where)
        noisy = images + std[:, :, None, None] * noise
        start = noisy.clamp(-1, 1)
        if not config.start_temperature:
            return self._sample_from(stage, beta, first, start, "noisy images")
        temperature = config.start_temperature / config.step_growth ** config.sizes.index(stage.size)
        weight = torch.tensor(data_term_weight(temperature, std.item()), device="cpu")  # float32, as the schedule is
        return self._sample_from(stage, beta, first, start, "noisy images", data_term=(noisy, weight))

    def _sample_from(
        self, stage: Stage, beta: float, first: int, start: Tensor, kind: str, **constraints: Any
    ) -> Tensor:
        """The ends of chains at the stage's resolution; `constraints` are arguments of `LevelSampler.sample`."""
        options: dict[str, Any] = {
            "batch_size": self.config.max_batch or None,
            "check": False,
            "readings": self._readings(stage, kind),
        }
        return self._sampler(stage, beta).sample(None, self.seed, first, x0=start, **options, **constraints)

    def _readings(self, stage: Stage, kind: str) -> Callable[[Level, ChainState], ChainReadings | None] | None:
        """What the flight recorder reads of chains that have this kind of start, at the stage's resolution."""
        read = self.recorder.readings(kind)
        if read is None:
            return None
        return lambda level, state: read(level.sampler, state, level.num_steps) if level.size == stage.size else None

    def _sample_chains(self, stage: Stage, beta: float, first: int, count: int) -> tuple[Tensor, Metrics]:
        """The ends of `count` chains from noise, with ids from `first` on, and metrics of their last level."""
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
            check=False,  # energies that are not finite are left to the guard
            on_level_start=keep,
            readings=self._readings(stage, "noise"),
        )
        motion = {
            "displacement": (fake - torch.cat(starts)).abs().mean(),
            "clamped": (fake.abs() >= 1).float().mean(),
        }
        return fake, motion

    def _part_gradient(
        self, stage: Stage, part: Part, real: Tensor, fake: Tensor, beta: float, contrast: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Adds the gradient of a part's share of the loss to those that are there.

        Returns that share and the energies of data and samples (B,), all detached.
        """
        self._blend.fill_(beta)
        weights = self._weights.get(beta, self._fading_weights)
        with self._recomputing(stage, real[:1], beta, enabled=weights.engine == "autograd"):
            loss = EnergyLoss.of(self.config, self.config.step_size_at(stage.size), contrast=contrast)
            return loss.backward(weights, part, real, fake, self.config.max_batch)

    @contextmanager
    def _recomputing(self, stage: Stage, image: Tensor, beta: float, *, enabled: bool) -> Iterator[None]:
        """A block whose backward passes recompute the net's blocks, from the size on that the config asks for that.

        The net is in eval mode there, after a power iteration of the spectral norm. A program takes little memory as
        it is, and recomputes nothing.
        """
        if not (enabled and 0 < self.config.recompute_from <= stage.size):
            yield
            return
        with torch.no_grad():
            self.net(image, beta)
        self.net.eval()
        try:
            with recompute_blocks(self.net):
                yield
        finally:
            self.net.train()

    def _begin_stage(self) -> None:
        """Makes what a stage needs: the optimizer, the order of the images, and the samplers.

        Samplers are made once, as an energy gradient analyses its energy at the first use.
        """
        stage, config = self.stage, self.config
        self._ends = None
        self._blend = torch.ones((), device=self.device)
        dtype = getattr(torch, config.update_dtype)
        fading = functools.partial(self.net, beta=self._blend)
        self._fading_weights = weight_gradient(fading, dtype=dtype, engine=config.engine)
        # As numbers: at 0 the newest block then has no gradient, and no power iterations, and at 1 the fade path.
        self._weights = {
            beta: weight_gradient(functools.partial(self.net, beta=beta), dtype=dtype, engine=config.engine)
            for beta in (0.0, 1.0)
        }
        parameters = self.net.parameters_at(stage.size)
        self.optimizer = adam(parameters, stage.learning_rate, config.adam_betas, shard=config.shard_optimizer)
        self._order = batches(self.images, stage.batch_size, config.seed, self.iteration)
        self._source_order: Iterator[Tensor] = itertools.repeat(torch.arange(0, device="cpu"))
        if self.sources is not None and (noisy := config.chains_by_start(stage).noisy):
            self._source_order = batches(self.sources, noisy, config.seed, self.iteration)
        if config.variant == "expanding":
            self._expanding = expanding_cascade(config, self.net, stage.size)
            return
        lower = {size: net for size, net in self.frozen.items() if size < stage.size}
        self._grown = cascade(config, {**lower, stage.size: self.net})
        self._fading = cascade(config, {**lower, stage.size: fading})

    def _sampler(self, stage: Stage, beta: float) -> LevelSampler:
        if self.config.variant == "expanding":
            self._expanding.beta = beta
            return self._expanding
        self._blend.fill_(beta)
        return self._grown if beta == 1 else self._fading

    def next_stage(self) -> None:
        size = self.last_stage.size
        self.frozen[size] = self.ema_net.frozen(size)
        self.ema_net = self._new_ema_net()
        self._begin_stage()

    def _new_ema_net(self) -> CoarseToFineEnergy:
        """The net that samples are drawn from: a copy that follows the trained net, or without averaging that net."""
        return self.net.frozen(self.net.image_size) if self.config.ema else self.net

    def save_pictures(self, folder: RunFolder, board: TensorBoardWriter) -> None:
        levels = reached_levels(self.config, self.iteration, self.frozen, self.ema_net)
        run = CoarseToFineRun(folder.path, self.config, self.iteration, levels)
        save_pictures(run, self.images.first(self.last_stage.size, GRID**2), folder, board)

    def collect(self) -> None:
        collect_moments(self.optimizer)

    def tensors(self) -> dict[str, Tensor]:
        named = with_prefix(self.net.state_dict(), "net.")
        if self.config.ema:
            named |= with_prefix(self.ema_net.state_dict(), "average.")
        for size, net in self.frozen.items():
            named |= with_prefix(net.state_dict(), f"frozen.{size}.")
        if self._ends is not None:
            named["continued"] = self._ends
        return named | optimizer_tensors(self.optimizer, "optimizer.")

    def load_state(self, checkpoint: Checkpoint) -> None:
        self.net.load_state_dict(select_prefix(checkpoint.tensors, "net."))
        if self.config.ema:
            self.ema_net.load_state_dict(select_prefix(checkpoint.tensors, "average."))
        self.frozen = frozen_levels(self.net, checkpoint)
        self._begin_stage()
        load_optimizer(self.optimizer, checkpoint.tensors, "optimizer.")
        if (ends := checkpoint.tensors.get("continued")) is not None:
            self._ends = ends.to(self.device)


@contextmanager
def recompute_blocks(net: CoarseToFineEnergy, enabled: bool = True) -> Iterator[None]:
    """Within the block, `net` keeps only the inputs of its blocks for the backward pass, and recomputes the rest there.

    Gradients are the same to the last bit, at the cost of a second forward pass. The maps between a block's two
    convolutions, the largest of all, exist for one block at a time. The net must be in eval mode (ValueError), as a
    spectral norm in train mode would change between the two passes.
    """
    if not enabled:
        yield
        return
    if net.training:
        raise ValueError("a net in train mode can't be recomputed: its spectral norms change with every pass")
    blocks = list(net.blocks.values())
    for block in blocks:
        block.forward = functools.partial(activation_checkpoint, block.forward, use_reentrant=False)  # type: ignore[assignment]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
