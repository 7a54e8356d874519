"""Pieces of an update: batches in parts, blocks computed again, both variants of the net, chains, health."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastebm
from fastebm.data import Images, neighbour_mean, random_hole_masks
from fastebm.data.masks import HOLE_NOISE
from fastebm.models import CoarseToFineEnergy
from fastebm.ops import normal, uniform
from fastebm.ops.backends import _extension
from fastebm.rng import Stream
from fastebm.runs.folder import RunFolder
from fastebm.sampling import Cascade, ExpandingCascade
from fastebm.sampling.data_term import data_term_weight, implicit_step
from fastebm.training import CoarseToFineConfig, CoarseToFineRun, train
from fastebm.training.coarse_to_fine.config import Stage
from fastebm.training.coarse_to_fine.trainer import CoarseToFineTrainer, recompute_blocks
from fastebm.training.images import image_levels
from fastebm.training.trainer.entry import ImageInput
from fastebm.training.trainer.parts import Part
from tests.training.resumed_runs import (
    Stop,
    assert_resumes_to_the_same_bits,
    log,
    stopping,
    trainer_at,
    uninterrupted,
)


def trained(config: CoarseToFineConfig, images: ImageInput, path: Path, stop_at: int | None = None) -> CoarseToFineRun:
    return train(config, images, path, progress=False, save_pictures=False, on_log=stopping(stop_at))


def whole(stage: Stage, first: int) -> Part:
    """All images of an update, the first of which has number `first`."""
    return Part(0, stage.batch_size, stage.batch_size, first)


def fakes(trainer: CoarseToFineTrainer, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The ends of chains with ids from 48 on, and metrics of their motion."""
    stage, part = trainer.stage, whole(trainer.stage, 48)
    return trainer._fake_images(stage, 1.0, part, real, trainer._start_images(stage, part, real, torch.arange(0)))


def gradients(
    trainer: CoarseToFineTrainer, changes: dict[str, int]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients and buffers of the update that `trainer` stands before, under a changed config."""
    trainer.config = dataclasses.replace(trainer.config, **changes)
    stage, beta = trainer.stage, trainer.config.beta_at(trainer.iteration)
    draws = torch.Generator().manual_seed(3)
    shape = (stage.batch_size, trainer.config.channels, stage.size, stage.size)
    real, fake = (torch.rand(shape, generator=draws) * 2 - 1 for _ in range(2))
    trainer.optimizer.zero_grad()
    loss, _, _ = trainer._part_gradient(stage, whole(stage, 0), real, fake, beta)
    assert trainer.net.training
    got = {name: p.grad.clone() for name, p in trainer.net.named_parameters() if p.grad is not None}
    return loss, got, {name: buffer.clone() for name, buffer in trainer.net.named_buffers()}


@pytest.mark.parametrize(
    "changes",
    [
        {"max_batch": 1},
        {"max_batch": 4},
        {"max_batch": 6},
        {"recompute_from": 8},
        {"max_batch": 2, "recompute_from": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("iteration", [5, 7, 10])  # at 5 and 7 the second stage's block fades in
def test_an_update_in_pieces_has_the_gradient_of_the_whole(
    tiny: CoarseToFineConfig, images: Tensor, iteration: int, changes: dict[str, int]
) -> None:
    config = dataclasses.replace(tiny, energy_l2=0.1)
    loss, at_once, norms = gradients(trainer_at(CoarseToFineTrainer, config, images, iteration), {})
    again, pieces, norms_again = gradients(trainer_at(CoarseToFineTrainer, config, images, iteration), changes)
    torch.testing.assert_close(again, loss)
    assert pieces.keys() == at_once.keys()
    for name in at_once:
        torch.testing.assert_close(pieces[name], at_once[name])
    for name in norms:  # one power iteration, however many pieces
        torch.testing.assert_close(norms_again[name], norms[name])


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_a_block_that_has_not_begun_to_fade_in_is_left_alone(
    tiny: CoarseToFineConfig, images: Tensor, engine: Any
) -> None:
    trainer = trainer_at(CoarseToFineTrainer, dataclasses.replace(tiny, engine=engine), images, 5)
    assert tiny.beta_at(5) == 0
    block = trainer.net.blocks[str(trainer.stage.size)]
    before = [buffer.clone() for buffer in block.buffers()]
    assert before
    _, got, _ = gradients(trainer, {})
    assert got
    assert all(p.grad is None for p in block.parameters())
    assert all(map(torch.equal, before, block.buffers()))


def test_blocks_computed_again_keep_less_and_give_the_same_bits() -> None:
    net = CoarseToFineEnergy(32, 1, base_width=2).eval()
    x = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))

    def gradient(again: bool) -> tuple[int, list[Tensor]]:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        net.zero_grad()
        with recompute_blocks(net, again):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                energies = net(x, 0.5)
            energies.sum().backward()
        return sum(kept.values()), [p.grad.clone() for p in net.parameters() if p.grad is not None]

    kept, gradients = gradient(False)
    kept_again, gradients_again = gradient(True)
    assert kept_again < kept / 3
    assert all(torch.equal(one, other) for one, other in zip(gradients, gradients_again, strict=True))
    assert "forward" not in vars(net.blocks["32"])


def test_blocks_are_not_computed_again_in_train_mode() -> None:
    net = CoarseToFineEnergy(8, 1, base_width=1)
    with pytest.raises(ValueError, match="in train mode"), recompute_blocks(net):
        pass
    with recompute_blocks(net, enabled=False):
        pass


def test_a_run_in_pieces_may_be_taken_up_in_others(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        trained(dataclasses.replace(tiny, max_batch=3), images, tmp_path, stop_at=7)
    changes: dict[str, Any] = {"recompute_from": 8, "log_every": 2, "checkpoint_every": 4, "keep_checkpoints": 1}
    assert trained(dataclasses.replace(tiny, max_batch=4, **changes), images, tmp_path).finished
    assert RunFolder.existing(tmp_path).checkpoints.iterations() == [13]


@pytest.mark.parametrize("stop_at", [4, 7, 8, 12])
def test_the_expanding_variant_resumes_to_the_last_bit(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, stop_at: int
) -> None:
    config = dataclasses.replace(tiny, variant="expanding", noise_start=0.03, noise_end=5e-4, ema=0.5, engine="auto")
    whole = uninterrupted(trained, config, images, tmp_path)
    with pytest.raises(Stop):
        trained(config, images, tmp_path / "stopped", stop_at)
    part = CoarseToFineRun.load(tmp_path / "stopped")
    sampler = part.cascade()
    assert isinstance(sampler, ExpandingCascade)
    assert sampler.beta == config.beta_at(part.iteration) or part.iteration in (3, 5)
    assert part.sample(2).shape[3] == (4 if part.iteration <= 5 else 8)
    resumed = trained(config, images, tmp_path / "stopped")
    assert torch.equal(whole.sample(5), resumed.sample(5))


def test_the_variants_start_their_chains_where_they_should(tiny: CoarseToFineConfig, images: Tensor) -> None:
    for variant, iteration, levels in (
        ("cascade", 10, [(4, 3), (8, 3)]),
        ("cascade", 2, [(4, 3)]),
        ("expanding", 2, [(4, 3)]),
        ("expanding", 7, [(4, 2), (8, 3)]),  # beta is 1/2 there, and half of 3 steps rounds to 2
        ("expanding", 10, [(8, 3)]),
    ):
        config = dataclasses.replace(tiny, variant=variant)
        trainer = trainer_at(CoarseToFineTrainer, config, images, iteration)
        sampler = trainer._sampler(trainer.stage, config.beta_at(iteration))
        assert [(level.size, level.num_steps) for level in sampler.levels] == levels
        assert isinstance(sampler, Cascade if variant == "cascade" else ExpandingCascade)


def chain_ends(config: CoarseToFineConfig, images: Tensor, max_batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    trainer = trainer_at(CoarseToFineTrainer, config, images, 7)
    trainer.config = dataclasses.replace(trainer.config, max_batch=max_batch)
    return trainer._sample_chains(trainer.stage, 0.5, 100, 6)


@pytest.mark.skipif(_extension is None, reason="the C++ operators are not built: library convolutions run")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["cascade", "expanding"])
def test_chains_in_batches_are_those_of_one_batch(
    tiny: CoarseToFineConfig, images: Tensor, variant: Any, dtype: Any
) -> None:
    """To the last bit, by fused gradients at the same weights; the sums over pieces that updates make are not."""
    config = dataclasses.replace(tiny, variant=variant, dtype=dtype, engine="fused")
    whole, motion = chain_ends(config, images, max_batch=0)
    for max_batch in (1, 4):  # 6 chains: a batch and half a one
        ends, moved = chain_ends(config, images, max_batch)
        assert torch.equal(ends, whole)
        assert moved == motion


def test_chains_in_batches_see_the_noise_of_one_batch(tiny: CoarseToFineConfig, images: Tensor) -> None:
    config = dataclasses.replace(tiny, engine="autograd")
    (whole, _), (ends, _) = (chain_ends(config, images, max_batch) for max_batch in (0, 4))
    # To the rounding of library convolutions, which may depend on the batch; other noise would be 1e-2 away.
    torch.testing.assert_close(ends, whole, atol=1e-5, rtol=0)


def test_chains_in_bfloat16_end_elsewhere(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    lines = {}
    for dtype in ("float32", "bfloat16"):
        # By autograd: nets of few channels compute in float32 where there are no matrix units, as lane programs.
        config = dataclasses.replace(tiny, dtype=dtype, engine="autograd")
        run = trained(config, images, tmp_path / dtype)
        assert run.sample(2).dtype == torch.float32
        lines[dtype] = log(tmp_path / dtype)
    first = [log[0]["energy_samples"] for log in lines.values()]
    assert first[0] != first[1]
    assert first[0] == pytest.approx(first[1], rel=0.1, abs=0.05)


@pytest.mark.parametrize("variant", ["cascade", "expanding"])
def test_displacement_and_clamped_are_what_they_say(tiny: CoarseToFineConfig, images: Tensor, variant: str) -> None:
    config = dataclasses.replace(tiny, variant=variant, step_size=1e-9, noise_start=0.0, noise_end=0.0)
    trainer = trainer_at(CoarseToFineTrainer, config, images, 0)
    _, motion = trainer._sample_chains(trainer.stage, 1.0, 0, trainer.stage.batch_size)
    # Chains that stand still: the start is uniform in (-1, 1].
    assert float(motion["displacement"]) < 1e-6
    assert float(motion["clamped"]) < 0.02

    class Slope(torch.nn.Module):
        def forward(self, x: Tensor, beta: float | Tensor = 1.0) -> Tensor:
            return x.sum((1, 2, 3))

    # Down a slope of 1 by 3 steps of 0.25; what starts below -0.25 ends at -1 or beyond.
    def level() -> Callable[[Tensor], Tensor]:
        return functools.partial(Slope(), beta=1.0)

    trainer._grown = Cascade({4: level()}, num_steps=3, step_size=0.25, noise_std=0.0)
    trainer._expanding = ExpandingCascade(Slope(), size=4, num_steps=3, step_size=0.25, noise_std=0.0)
    _, motion = trainer._sample_chains(trainer.stage, 1.0, 0, trainer.stage.batch_size)
    assert float(motion["displacement"]) == pytest.approx(0.75, abs=1e-5)
    start = uniform((8, 16), seed=config.seed, stream=Stream.INITIAL) * 2 - 1
    assert float(motion["clamped"]) == pytest.approx(float((start <= -0.25).float().mean()), abs=1e-6)


def test_an_update_sees_what_will_be_shown_where_ends_are_clamped(tiny: CoarseToFineConfig, images: Tensor) -> None:
    free = dataclasses.replace(tiny, data_noise=0.5, step_size=5.0)
    clamped = dataclasses.replace(free, clamp_ends=True)
    trainers = [trainer_at(CoarseToFineTrainer, config, images, 0) for config in (free, clamped)]
    stage = trainers[0].stage
    (free_ends, free_motion), (ends, motion) = (
        trainer._fake_images(stage, 1.0, whole(stage, 0), images, images[:0]) for trainer in trainers
    )
    assert free_ends.abs().max() > 1
    assert torch.equal(ends, free_ends.clamp(-1, 1))
    assert {name: float(value) for name, value in motion.items()} == {n: float(v) for n, v in free_motion.items()}
    noisy, real = (trainer._real_images(stage, whole(stage, 0), next(trainer._order)) for trainer in trainers)
    assert noisy.abs().max() > 1
    assert torch.equal(real, noisy.clamp(-1, 1))


@pytest.mark.parametrize("variant", ["cascade", "expanding"])
def test_some_chains_start_at_noisy_images(tiny: CoarseToFineConfig, images: Tensor, variant: Any) -> None:
    config = dataclasses.replace(tiny, variant=variant, noisy_starts=0.5, start_noise=0.3, step_size=1e-9)
    config = dataclasses.replace(config, noise_start=0.0, noise_end=0.0)
    trainer, without = (
        trainer_at(CoarseToFineTrainer, c, images, 7) for c in (config, dataclasses.replace(config, noisy_starts=0.0))
    )
    stage = trainer.stage
    assert (stage.size, stage.batch_size, config.chains_by_start(stage)) == (8, 6, (3, 0, 0, 3))
    real = images[:6]
    ends, _ = fakes(trainer, real)
    from_noise, _ = fakes(without, real)
    assert len(ends) == 6
    # Chains from noise are those of a run without others, one by one. Nothing moves here: the rest are their starts.
    assert torch.equal(ends[:3], from_noise[:3])
    std = uniform((3, 1), seed=config.seed, stream=Stream.NOISY_START, chain_ids=51) * 0.3
    noise = normal((3, 1, 8, 8), seed=config.seed, step=1, stream=Stream.NOISY_START, chain_ids=51)
    expected = (real[3:] + std[:, :, None, None] * noise).clamp(-1, 1)
    torch.testing.assert_close(ends[3:], expected, rtol=0, atol=1e-6)
    assert 0.01 < float((ends[3:] - real[3:]).std()) < 0.3


def test_a_data_term_pulls_chains_back_to_their_noisy_images(tiny: CoarseToFineConfig, images: Tensor) -> None:
    config = dataclasses.replace(
        tiny, noisy_starts=0.5, start_noise=20.0, start_temperature=0.05, num_steps=4, clamp_ends=True
    )
    trainer = trainer_at(CoarseToFineTrainer, config, images, 7)
    stage, real = trainer.stage, images[:6]
    first = 51  # of the chains that start at images
    ends, _ = fakes(trainer, real)
    # One noise level for all, and each update as it stands in the book of denoising.
    std = float(config.start_noise * uniform((1, 1), seed=config.seed, stream=Stream.NOISY_START, chain_ids=first))
    noisy = real[3:] + std * normal((3, 1, 8, 8), seed=config.seed, step=1, stream=Stream.NOISY_START, chain_ids=first)
    pull = config.start_temperature / std**2
    schedule = trainer._sampler(stage, 1.0).schedule
    x, net = noisy.clamp(-1, 1), copy.deepcopy(trainer.net).eval()
    for k in range(4, 8):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(net(x, 1.0).sum(), x)
        noise = normal(x.shape, seed=config.seed, step=k, chain_ids=first)
        # The pull as it is at the end of the update.
        x = (x - schedule[k, 0] * (gradient - pull * noisy)) / (1 + schedule[k, 0] * pull) + schedule[k, 1] * noise
    torch.testing.assert_close(ends[3:], x.detach().clamp(-1, 1), rtol=0, atol=1e-5)
    trainer.config = dataclasses.replace(config, start_temperature=0.0)
    away, _ = fakes(trainer, real)
    assert torch.equal(away[:3], ends[:3])
    assert not torch.equal(away[3:], ends[3:])


@pytest.mark.parametrize("std", [0.01, 0.05, 0.4])
def test_the_curvature_that_a_data_term_asks_for(std: float) -> None:
    """Where images differ by noise alone, chains end spread as images are at the curvature of docs/training.md."""
    temperature, data_noise, step_size = 0.0015, 0.05, 4.0
    curvature = temperature / std**2 * (math.sqrt(1 + std**2 / data_noise**2) - 1)
    assert 0 < curvature < temperature / (2 * data_noise**2)
    noise = torch.randn((2, 4000, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    noisy = data_noise * noise[0] + std * noise[1]
    weight = torch.tensor(data_term_weight(temperature, std))

    def spread(steepness: float) -> float:
        step = implicit_step(step_size, float(weight))
        sampler = fastebm.Langevin(lambda x: 0.5 * steepness * x.square().flatten(1).sum(1), step, 0.0)
        return float(sampler.sample(noisy, 2000, data_term=(noisy, weight)).std())

    assert spread(curvature) == pytest.approx(data_noise, rel=0.01)
    assert spread(0.5 * curvature) > spread(curvature) > spread(2 * curvature)


@pytest.mark.parametrize("variant", ["cascade", "expanding"])
def test_some_chains_fill_holes_in(tiny: CoarseToFineConfig, images: Tensor, variant: Any) -> None:
    config = dataclasses.replace(tiny, variant=variant, noisy_starts=0.2, hole_starts=0.4)
    trainer = trainer_at(CoarseToFineTrainer, config, images, 7)
    stage = trainer.stage
    assert config.chains_by_start(stage) == (3, 0, 2, 1)
    real = images[:6]
    ends, _ = fakes(trainer, real)
    assert len(ends) == 6
    holes = random_hole_masks(2, 8, seed=config.seed, positions=51)
    assert 0 < float(holes.float().mean()) < 1
    assert torch.equal(ends[3:5][~holes], real[3:5][~holes])
    assert not torch.equal(ends[3:5], real[3:5])
    # Nothing of an image that lies in its hole is seen.
    erased = torch.cat((real[:3], torch.where(holes, 0.5, real[3:5]), real[5:]))
    again, _ = fakes(trainer, erased)
    assert torch.equal(again, ends)
    # They are the chains that inpainting would run from there.
    fill = neighbour_mean(real[3:5], holes)
    draws = uniform((2, 1, 8, 8), seed=config.seed, step=2, stream=Stream.HOLE, chain_ids=51)
    start = torch.where(holes, fill + HOLE_NOISE * (2 * draws - 1), real[3:5])
    sampler = trainer._sampler(stage, 1.0)
    alone = sampler.sample(None, config.seed, 51, x0=start, mask=~holes, known=real[3:5])
    assert torch.equal(alone, ends[3:5])


@pytest.mark.parametrize("variant", ["cascade", "expanding"])
def test_some_chains_go_on_from_earlier_ends(tiny: CoarseToFineConfig, images: Tensor, variant: Any) -> None:
    config = dataclasses.replace(tiny, variant=variant, continued_starts=0.4, noisy_starts=0.2, restart=0.0)
    trainer = trainer_at(CoarseToFineTrainer, config, images, 7)
    stage = trainer.stage
    assert config.chains_by_start(stage) == (3, 2, 0, 1)
    trainer._ends = None  # as in the first update of a stage, where they start from noise
    ends, _ = fakes(trainer, images[:6])
    alone, _ = trainer._sample_chains(stage, 1.0, 48, 5)
    assert torch.equal(ends[:5], alone)
    trainer._keep_ends(stage, ends)
    again, _ = fakes(trainer, images[:6])
    assert torch.equal(again[:3], ends[:3])
    expected = trainer._sampler(stage, 1.0).sample(None, config.seed, 51, x0=ends[3:5])
    assert torch.equal(again[3:5], expected)
    assert not torch.equal(again[3:5], ends[3:5])
    # Showing the weights to the guard keeps nothing.
    kept = trainer._ends.clone()
    trainer.update()
    assert not torch.equal(trainer._ends, kept)
    kept = trainer._ends.clone()
    trainer.check_before_save()
    assert torch.equal(trainer._ends, kept)


def test_continued_chains_start_anew_with_their_probability(tiny: CoarseToFineConfig, images: Tensor) -> None:
    config = dataclasses.replace(tiny, continued_starts=0.75, restart=1.0, batch_sizes=(8, 8))
    trainer = trainer_at(CoarseToFineTrainer, config, images, 7)
    stage = trainer.stage
    ends = torch.arange(8.0)[:, None, None, None].expand(8, 1, 8, 8)
    trainer._keep_ends(stage, ends)
    assert trainer._ends[:, 0, 0, 0].tolist() == [0, 1, 0, 1, 0, 1]
    trainer.config = dataclasses.replace(config, restart=0.5)
    anew = 0
    for iteration in range(7, 107):
        trainer.iteration = iteration
        trainer._keep_ends(stage, ends)
        found = trainer._ends[:, 0, 0, 0].tolist()
        assert all(value in (j % 2, 2 + j) for j, value in enumerate(found))
        anew += sum(value < 2 for value in found)
    assert 240 < anew < 360


@pytest.mark.parametrize("variant", ["cascade", "expanding"])
@pytest.mark.parametrize(
    "more", [{}, {"start_temperature": 0.005, "hole_starts": 0.2}, {"continued_starts": 0.4, "restart": 0.3}]
)
def test_chains_at_images_stop_and_go_on_to_the_last_bit(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, variant: Any, more: dict[str, Any]
) -> None:
    config = dataclasses.replace(tiny, variant=variant, noisy_starts=0.4, ema=0.5, **more)
    assert_resumes_to_the_same_bits(trained, config, images, tmp_path, stop_at=9)


def labelled(count: int = 40) -> Images:
    """Dark images have label 0, and bright ones label 1."""
    labels = torch.arange(count) % 2
    return Images((labels * 200 + torch.arange(count)).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8), labels)


def test_one_domain_is_learned_and_chains_start_at_the_others(tiny: CoarseToFineConfig) -> None:
    config = dataclasses.replace(tiny, domain=1, noisy_starts=0.5, start_noise=0.0, data_noise=0.0, flip=True)
    levels = image_levels(labelled(), config.sizes, config.channels)
    trainer = CoarseToFineTrainer(config, levels, torch.device("cpu"))
    seen, starts = [], []
    for step in range(8):  # each image comes twice in 10 batches of 4 from 20
        part = whole(trainer.stage, 8 * step)
        real = trainer._real_images(trainer.stage, part, next(trainer._order))
        seen.append(real)
        starts.append(trainer._start_images(trainer.stage, part, real, next(trainer._source_order)))
    assert all(part.shape == (4, 1, 4, 4) for part in starts)
    assert (torch.cat(seen) > 0.5).all()
    assert (torch.cat(starts) < -0.5).all()
    assert len(torch.cat(starts)[:20].unique()) == 20
    trainer.update()
    assert trainer.images.digest == levels.digest


def test_a_run_of_one_domain_stops_and_goes_on_to_the_last_bit(tiny: CoarseToFineConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny, domain=0, noisy_starts=0.4, ema=0.5, flip=True)
    assert_resumes_to_the_same_bits(trained, config, labelled(), tmp_path, stop_at=8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (labelled(2).pixels.float() * 0, "these images have none"),
        (Images(labelled(4).pixels, torch.tensor([2, 2, 2, 2])), r"there are \[0, 0, 4\]"),
        (Images(labelled(4).pixels, torch.tensor([0, 0, 1, 1])), r"with label 2 and others; .* there are \[2, 2\]"),
    ],
)
def test_domains_need_labels_of_both_kinds(tiny: CoarseToFineConfig, images: Any, message: str) -> None:
    config = dataclasses.replace(tiny, domain=2)
    with pytest.raises(ValueError, match=message):
        CoarseToFineTrainer(config, image_levels(images, config.sizes, config.channels), torch.device("cpu"))


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_chains_from_noise_are_needed(tiny: CoarseToFineConfig, share: float) -> None:
    with pytest.raises(ValueError, match="noisy_starts must lie in"):
        dataclasses.replace(tiny, noisy_starts=share)
    with pytest.raises(ValueError, match=r"noisy_starts 0\.5 and hole_starts 0\.5 make a sum that is not below"):
        dataclasses.replace(tiny, noisy_starts=0.5, hole_starts=0.5)
    for noise in (0.0, 1e-25):
        with pytest.raises(ValueError, match=r"start_noise must be at least 1e-06 where .* start_temperature, got"):
            dataclasses.replace(tiny, noisy_starts=0.5, start_temperature=0.01, start_noise=noise)


def test_every_line_has_the_health_of_its_updates(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    trained(tiny, images, tmp_path)
    for line in log(tmp_path):
        assert {"energy_data", "energy_samples", "gap", "gradient_norm", "loss", "attempt"} <= line.keys()
        assert line["displacement"] > 0
        assert 0 <= line["clamped"] < 1


def test_pictures_at_intervals(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny, pictures_every=4)
    train(config, images, tmp_path, progress=False)
    assert {"samples.png", "strip.png", "curves.png"} <= {path.name for path in tmp_path.iterdir()}
    names = [path.name for path in sorted((tmp_path / "pictures").iterdir())]
    assert names == [f"iteration-{iteration:09d}.png" for iteration in (4, 5, 8, 12, 13)]
