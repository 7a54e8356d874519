"""The recipe of CF-EBM: chains through nets of growing resolution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Unpack

import torch
from torch import Tensor

from fastebm.recipes.recipe import ContrastiveLoss, Negatives, Optimizer, Overrides, Recipe, address, check_real, merged
from fastebm.sampling import Cascade, ReplayBuffer, linear
from fastebm.sampling.sampler import Energy
from fastebm.scalars import as_count
from fastebm.training import CoarseToFineConfig

__all__ = ["CoarseToFine", "cf_ebm"]

_PUBLISHED: dict[str, Any] = {f.name: f.default for f in fields(CoarseToFineConfig)}
"""The defaults of coarse-to-fine training, which are those of the authors' repository."""

_BATCH_SIZES = {8: 256, 16: 128, 32: 64, 64: 64, 128: 32}
_LEARNING_RATES = {64: 1.2e-3, 128: 1.5e-3}


@dataclass(frozen=True, eq=False, kw_only=True)
class CoarseToFine(Recipe):
    """The recipe `cf_ebm`, whose sampler is a `Cascade`, and whose chains start at its lowest level."""

    @torch.no_grad()
    def negatives(
        self,
        real: Tensor,
        buffer: ReplayBuffer | None = None,
        *,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        start_step: int = 0,
        labels: Tensor | None = None,
        check: bool = True,
    ) -> Negatives:
        """The ends of as many chains from noise as there are images; see `Recipe.negatives`.

        `real` are float32 images of the last level's size. `start` is the states with which that level began.
        """
        check_real(real)
        if buffer is not None or labels is not None:
            raise ValueError("cf_ebm has no replay buffer and no labels")
        if not isinstance(self.sampler, Cascade):
            raise TypeError(f"cf_ebm needs a cascade, got {self.sampler!r}")
        size = self.sampler.levels[-1].size
        if real.dim() != 4 or real.shape[2:] != (size, size) or real.dtype != torch.float32:
            raise ValueError(
                f"cf_ebm needs float32 images (B, C, {size}, {size}), got {real.dtype} {tuple(real.shape)}"
            )
        seed, ids = address(real, seed, chain_ids)
        starts: dict[int, Tensor] = {}
        ends = self.sampler.sample(
            len(real),
            seed,
            ids,
            channels=real.shape[1],
            start_step=start_step,
            device=real.device,
            check=check,
            on_level_start=lambda level, x: starts.update({level.size: x.clone()}) if level.size == size else None,
        )
        return Negatives(ends, real, starts[size])


def cf_ebm(levels: Mapping[int, Energy], **overrides: Unpack[Overrides]) -> CoarseToFine:
    """CF-EBM: chains start at U(-1, 1) at the lowest resolution and are enlarged from one level to the next.

    `x' = x - ∇E(x) + σ ξ`, 15 times at each level by the level's own net, with σ from 0.015 to 0 over all levels;
    images that are enlarged are clamped to [-1, 1]. There is no buffer. The loss `E⁺ - E⁻` is that of the last level's
    net; the lower ones stay as they were when their stage of training ended. The end of the last level is not clamped.

    Adam has the rates of decay (0.5, 0.999) and a learning rate of 1e-3 up to 32x32. This is one cycle of one stage:
    `fastebm.train` runs all of them, with the fading-in of new blocks, a guard and checkpoints.

    Args:
        levels: energies of images `(B, C, size, size)` by size, as `Cascade` takes them.
        overrides: `num_steps` of a level, `step_size`, `noise_std` and options of `Langevin`.

    Source: Zhao, Xie & Li, "Learning Energy-Based Generative Models via Coarse-to-Fine Expanding and Sampling", ICLR
    2021; YangNaruto/ProEBM `train_v1.py`.

    Example:
        >>> import torch, fastebm
        >>> def energy(x):
        ...     return 0.01 * x.square().sum((1, 2, 3))
        >>> recipe = fastebm.recipes.cf_ebm({4: energy, 8: energy}, num_steps=5)
        >>> recipe.negatives(torch.rand(2, 1, 8, 8)).x.shape
        torch.Size([2, 1, 8, 8])
    """
    constants: dict[str, Any] = {
        "num_steps": _PUBLISHED["num_steps"],
        "step_size": _PUBLISHED["step_size"],
        "noise_std": linear(_PUBLISHED["noise_start"], _PUBLISHED["noise_end"]),
    }
    options = merged("cf_ebm", constants, overrides)
    num_steps = as_count("num_steps", options.pop("num_steps"), 1)
    cascade = Cascade(levels, num_steps=num_steps, **options)
    size = cascade.levels[-1].size
    return CoarseToFine(
        name="cf_ebm",
        source="Zhao, Xie & Li, ICLR 2021; YangNaruto/ProEBM train_v1.py",
        sampler=cascade,
        num_steps=num_steps * len(cascade.levels),
        start=None,
        loss=ContrastiveLoss(),
        optimizer=Optimizer(
            learning_rate=_LEARNING_RATES.get(size, 1e-3 if size < 64 else 2e-3),
            betas=_PUBLISHED["adam_betas"],
            batch_size=_BATCH_SIZES.get(size, 256 if size < 8 else 16),
        ),
    )
