"""The recipe of VAEBM: chains in the latents of a VAE and in the noise of its images together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from fastebm.losses import contrastive_divergence
from fastebm.recipes.recipe import Negatives, Optimizer, Overrides, Recipe, address, check_real, energies, make_sampler
from fastebm.sampling import ReplayBuffer
from fastebm.sampling.starts import normal

__all__ = ["VAEBM", "VAEBMLoss", "spectral_norms", "vaebm"]

Decoder = Callable[[list[Tensor], Tensor], tuple[Tensor, Tensor]]


def spectral_norms(module: nn.Module) -> Tensor:
    """The sum of the largest singular values of the weights of linear and convolutional layers, as matrices `(out,
    -1)`.

    The authors estimate them by power iterations; here they are exact.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    norms = [torch.linalg.matrix_norm(m.weight.flatten(1), 2) for m in module.modules() if isinstance(m, kinds)]
    return torch.stack(norms).sum() if norms else torch.zeros((), device="cpu")


@dataclass(frozen=True)
class VAEBMLoss:
    """`mean E(real) - mean E(ends) + spectral times the sum of spectral norms` of a module's weights."""

    spectral: float = 0.2

    def __call__(
        self, energy: Callable[..., Tensor], real: Tensor, negatives: Negatives, labels: Tensor | None = None
    ) -> Tensor:
        loss = contrastive_divergence(energies(energy, real), energies(energy, negatives.x))
        return loss + self.spectral * spectral_norms(energy) if isinstance(energy, nn.Module) else loss


class _Joint(nn.Module):
    """`E(x) - log p(z) - log p(x | z)`, `(B,)`, of latents and noise as rows of one tensor."""

    def __init__(self, energy: Callable[..., Tensor], decoder: Decoder, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.energy, self.decoder, self.shapes = energy, decoder, tuple(shapes)

    def decoded(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        sizes = [math.prod(shape) for shape in self.shapes]
        parts = [part.unflatten(1, s) for part, s in zip(flat.split(sizes, 1), self.shapes, strict=True)]
        return self.decoder(parts[:-1], parts[-1])

    def forward(self, flat: Tensor) -> Tensor:
        x, log_prob = self.decoded(flat)
        return energies(self.energy, x) - log_prob


@dataclass(frozen=True, eq=False, kw_only=True)
class VAEBM(Recipe):
    """The recipe `vaebm`; `joint` is the energy of latents and noise as one tensor `(B, D)`."""

    joint: _Joint

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
        """The images at the ends of chains of latents and noise; `start` is the images at their starts."""
        check_real(real)
        if buffer is not None or labels is not None:
            raise ValueError("vaebm has no replay buffer and no labels")
        if tuple(real.shape[1:]) != self.joint.shapes[-1]:
            raise ValueError(f"vaebm was made for images {self.joint.shapes[-1]}, got {tuple(real.shape[1:])}")
        seed, ids = address(real, seed, chain_ids)
        flat = real.new_empty((len(real), sum(math.prod(shape) for shape in self.joint.shapes)))
        start = self._start(flat, seed, ids)
        ends = self._run(start, seed, ids, start_step, (), check)
        return Negatives(self.joint.decoded(ends)[0], real, self.joint.decoded(start)[0])


def vaebm(
    energy: Callable[..., Tensor],
    decoder: Decoder,
    latent_shapes: Sequence[Sequence[int]],
    image_shape: Sequence[int],
    **overrides: Unpack[Overrides],
) -> VAEBM:
    """VAEBM on CIFAR-10: Langevin dynamics of a VAE's latents and of the noise of its images, at temperature 1.

    Both move by `-½ η ∇ + √η ξ` of `E(x) - log p(z) - log p(x | z)` with η = 8e-5, 10 times from N(0, I); 16 steps
    generate. For CelebA at 64x64 the authors give η = 5e-6 with 10 and 20 steps: `vaebm(..., step_size=2.5e-6,
    noise_std=5e-6**0.5)`. The loss is `E⁺ - E⁻` and 0.2 times the spectral norms of the energy's weights; the VAE is
    fixed. This is the default without a buffer (`--use_buffer` is off) and with samples, not means, in the loss.

    Adam has the rates of decay (0.99, 0.999), a learning rate of 4e-5 and a weight decay of 3e-5.

    Args:
        energy: gives `(B,)` for images; low means real.
        decoder: called as `decoder(latents, noise)` with latents `(B, *shape)` each and noise `(B, *image_shape)`,
            standard normal a priori; returns the images `(B, *image_shape)` and `log p(z) + log p(x | z)`, `(B,)`.
        latent_shapes: the shape of each group of latents.
        image_shape: the shape of an image.
        overrides: `num_steps`, `step_size` (½ η), `noise_std` (√η) and options of `Langevin`.

    Source: Xiao, Kreis, Kautz & Vahdat, "VAEBM: A Symbiosis between Variational Autoencoders and Energy-based Models",
    ICLR 2021; NVlabs/VAEBM `train_VAEBM.py`.

    Example:
        >>> import torch, fastebm
        >>> def decoder(latents, noise):
        ...     x = latents[0][:, :, None, None].tanh() + 0.1 * noise
        ...     return x, -0.5 * latents[0].square().sum(1) - 0.5 * noise.square().sum((1, 2, 3))
        >>> energy = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 1))
        >>> recipe = fastebm.recipes.vaebm(energy, decoder, [(3,)], (3, 4, 4), engine="autograd")
        >>> recipe.negatives(torch.rand(8, 3, 4, 4)).x.shape
        torch.Size([8, 3, 4, 4])
    """
    shapes = [tuple(int(size) for size in shape) for shape in (*latent_shapes, image_shape)]
    joint = _Joint(energy, decoder, shapes)
    constants: dict[str, Any] = {"num_steps": 10, "step_size": 4e-5, "noise_std": 8e-5**0.5}
    sampler, num_steps = make_sampler("vaebm", joint, constants, overrides)
    return VAEBM(
        name="vaebm",
        source="Xiao et al., ICLR 2021; NVlabs/VAEBM train_VAEBM.py",
        sampler=sampler,
        num_steps=num_steps,
        start=normal(),
        loss=VAEBMLoss(),
        optimizer=Optimizer(learning_rate=4e-5, betas=(0.99, 0.999), weight_decay=3e-5, batch_size=32),
        generation_steps=16,
        joint=joint,
    )
