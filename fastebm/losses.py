"""Losses that train an energy `E(x) -> (B,)`, low meaning real: `p(x) ~ exp(-E(x))`.

Where a paper writes `f = -E`, the formula here is negated. A loss is a tensor without dimensions. An energy is any
module or function of PyTorch that gives one number for each sample, and whose gradient is differentiable once more
where the docstring says so.

>>> import torch, fastebm
>>> net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.SiLU(), torch.nn.Linear(16, 1), torch.nn.Flatten(0))
>>> data, samples = net(torch.randn(8, 2)), net(torch.randn(8, 2))
>>> loss = fastebm.losses.contrastive_divergence(data, samples) + 0.1 * fastebm.losses.energy_l2(data, samples)
>>> loss.backward()
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastebm.scalars import as_count, as_real, in_float32, shown

__all__ = [
    "contrastive_divergence",
    "denoising_score_matching",
    "energy_l2",
    "improved_cd_kl",
    "last_step",
    "nearest_distance",
    "recovery_energy",
    "recovery_likelihood",
    "sliced_score_matching",
]

Energy = Callable[[Tensor], Tensor]


def contrastive_divergence(data: Tensor, samples: Tensor) -> Tensor:
    """`mean E(data) - mean E(samples)`, whose gradient is that of the negative log-likelihood for exact samples.

    The loss is the same for chains that start at the data (contrastive divergence), go on from a replay buffer
    (persistent CD) or start from noise (short-run); gradients do not flow into the samples, which have none.

    Args:
        data, samples: the energies of images and of the ends of chains, `(B,)` and `(B',)`.

    Raises ValueError or TypeError for others.

    Source: Hinton 2002; Tieleman 2008 (persistent).

    Example:
        >>> import torch, fastebm
        >>> fastebm.losses.contrastive_divergence(torch.tensor([1.0, 2.0]), torch.tensor([4.0]))
        tensor(-2.5000)
    """
    return _energies("data", data).mean() - _energies("samples", samples).mean()


def energy_l2(*energies: Tensor) -> Tensor:
    """The sum over its arguments of `mean E**2`, which holds energies near 0.

    IGEBM and improved CD add `energy_l2(data, samples)`, the UvA tutorial a tenth of it, and CLEL the whole.

    Args:
        energies: one or more tensors `(B,)`.

    Raises ValueError or TypeError for others.

    Source: Du & Mordatch, "Implicit Generation and Modeling with EBMs", 2019.

    Example:
        >>> import torch, fastebm
        >>> fastebm.losses.energy_l2(torch.tensor([1.0, 3.0]), torch.tensor([2.0]))
        tensor(9.)
    """
    if not energies:
        raise ValueError("energy_l2 needs the energies of one batch at least, got none")
    total = _energies("energies", energies[0]).square().mean()
    for each in energies[1:]:
        total = total + _energies("energies", each).square().mean()
    return total


def denoising_score_matching(
    energy: Energy, x: Tensor, sigma: float | Tensor, *, noise: Tensor | None = None
) -> Tensor:
    """`mean 1/2 ||noise - sigma grad E(x + sigma noise)||**2`: `-grad E` learns the score of the data after noise.

    The weight of each level is `sigma**2`, so that levels count alike; for one level it is Vincent's loss times
    `sigma**2`. The gradient of the energy is differentiated once more.

    Args:
        energy: gives `(B,)`.
        x: images `(B, ...)`.
        sigma: the standard deviation of the noise, a number > 0 or one for each image, `(B,)`.
        noise: standard normal, like x; None draws it from torch's generator.

    Raises ValueError or TypeError for others.

    Source: Vincent 2011; the weight is that of Song & Ermon 2019.

    Example:
        >>> import torch, fastebm
        >>> bowl = lambda x: x.square().sum(1)
        >>> fastebm.losses.denoising_score_matching(bowl, torch.zeros(1, 2), 0.5, noise=torch.ones(1, 2)).item()
        0.25
    """
    _check_images("x", x)
    sigma = _levels("sigma", sigma, x)
    if isinstance(sigma, Tensor) and not bool(((sigma > 0) & sigma.isfinite()).all()):
        raise ValueError(f"sigma must be finite and > 0, got {sigma.min():g} to {sigma.max():g}")
    noise = torch.randn_like(x) if noise is None else _like("noise", noise, x)
    gradient = _gradient(energy, x + sigma * noise)
    return 0.5 * _norms(noise - sigma * gradient).mean()


def sliced_score_matching(
    energy: Energy,
    x: Tensor,
    *,
    num_directions: int = 1,
    directions: Tensor | None = None,
    reduce_variance: bool = True,
) -> Tensor:
    """`mean of -v.H v + 1/2 ||grad E||**2` over random directions v, where H is the Hessian of E: score matching
    without the trace of H.

    The gradient of the energy is differentiated twice more.

    Args:
        energy: gives `(B,)`.
        x: images `(B, ...)`.
        num_directions: the number of directions for each image, if they are drawn: standard normal, from torch's
            generator.
        directions: `(M, B, ...)` in their place, of mean 0 and covariance 1.
        reduce_variance: False puts `1/2 (v.grad E)**2` in the place of `1/2 ||grad E||**2`, of the same mean.

    Raises ValueError or TypeError for others.

    Source: Song et al., "Sliced Score Matching", UAI 2019: SSM-VR, and SSM without `reduce_variance`.

    Example:
        >>> import torch, fastebm
        >>> bowl = lambda x: x.square().sum(1)
        >>> fastebm.losses.sliced_score_matching(bowl, torch.ones(1, 2), directions=torch.ones(1, 1, 2)).item()
        0.0
    """
    _check_images("x", x)
    if directions is None:
        directions = torch.randn(
            as_count("num_directions", num_directions, 1), *x.shape, dtype=x.dtype, device=x.device
        )
    elif not isinstance(directions, Tensor) or directions.dim() != x.dim() + 1 or directions.shape[1:] != x.shape:
        raise ValueError(f"directions must have shape (M, {', '.join(map(str, x.shape))}), got {shown(directions)}")
    grad_enabled = torch.is_grad_enabled()
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        gradient = _gradient_at(energy, at)
        curvatures, slopes = [], []
        for v in directions.unbind():
            slope = _inner(v, gradient)
            product = torch.zeros_like(at)
            if slope.requires_grad:
                (product,) = torch.autograd.grad(
                    slope.sum(), at, create_graph=grad_enabled, retain_graph=True, materialize_grads=True
                )
            curvatures.append(_inner(v, product))
            slopes.append(slope.square())
        squares = _norms(gradient) if reduce_variance else torch.stack(slopes).mean(0)
        loss = (0.5 * squares - torch.stack(curvatures).mean(0)).mean()
    return loss if grad_enabled else loss.detach()


def last_step(
    energy: Energy, x: Tensor, step_size: float, *, clamp: tuple[float | None, float | None] = (None, None)
) -> Tensor:
    """One more Langevin step, `x' = clamp(x - step_size grad E(x))`, differentiable in the weights of E.

    The gradient of the energy is differentiated once more.

    Args:
        energy: gives `(B,)`.
        x: the states before the step, `(B, ...)`, with its noise on them already; fixed.
        step_size: a number > 0 (100 in improved CD).
        clamp: bounds (low, high) of `x'`, each a number or None ((0, 1) in improved CD).

    Raises ValueError or TypeError for others.

    Example:
        >>> import torch, fastebm
        >>> fastebm.losses.last_step(lambda x: x.square().sum(1), torch.ones(1, 2), 0.25).tolist()
        [[0.5, 0.5]]
    """
    _check_images("x", x)
    step_size = as_real("step_size", step_size)
    if not 0 < step_size < math.inf:
        raise ValueError(f"step_size must be finite and > 0, got {step_size}")
    if not isinstance(clamp, tuple | list) or len(clamp) != 2:
        raise TypeError(f"clamp is a pair (low, high), got {shown(clamp)}")
    low, high = (None if bound is None else as_real("a bound of clamp", bound) for bound in clamp)
    if (low is not None and not math.isfinite(low)) or (high is not None and not math.isfinite(high)):
        raise ValueError(f"the bounds of clamp must be finite, got {low} and {high}")
    if low is not None and high is not None and low > high:
        raise ValueError(f"clamp needs low <= high, got {low} and {high}")
    moved = x.detach() - step_size * _gradient(energy, x)
    return moved if low is None and high is None else moved.clamp(low, high)


def improved_cd_kl(energy: Energy, ends: Tensor) -> Tensor:
    """`mean E'(x')` of the ends x' of a differentiable `last_step`: the term that contrastive divergence leaves out.

    The gradient flows through the ends into the weights of E, while those of the outer E' stay fixed. The whole loss of
    improved CD is `contrastive_divergence + energy_l2 + improved_cd_kl - 0.3 nearest_distance(ends, ...).log().mean()`.

    Args:
        energy: gives `(B,)`.
        ends: what `last_step` of the same energy returned, `(B, ...)`.

    Raises ValueError or TypeError for others, such as ends without a graph, whose gradient would be 0.

    Source: Du, Li, Tenenbaum & Mordatch, "Improved Contrastive Divergence Training of EBMs", ICML 2021 (`train.py`).

    Example:
        >>> import torch, fastebm
        >>> scale = torch.ones(2, requires_grad=True)
        >>> energy = lambda x: (scale * x.square()).sum(1)
        >>> loss = fastebm.losses.improved_cd_kl(energy, fastebm.losses.last_step(energy, torch.ones(1, 2), 0.25))
        >>> loss.item(), *torch.autograd.grad(loss, scale)
        (0.5, tensor([-0.5000, -0.5000]))
    """
    _check_images("ends", ends)
    if torch.is_grad_enabled() and not ends.requires_grad:
        raise ValueError("improved_cd_kl needs ends that are differentiable, as last_step returns, got ends without")
    with torch.enable_grad():
        at = ends.detach().requires_grad_()
        energies = _checked_energies(energy(at), at)
        outer = torch.zeros_like(at)
        if energies.requires_grad:
            (outer,) = torch.autograd.grad(energies.sum(), at, materialize_grads=True)
    # ends - at is 0: the value is the mean energy, and the gradient that of the energy in its states alone.
    return energies.detach().mean() + _inner(outer, ends - at.detach()).sum() / len(ends)


def nearest_distance(x: Tensor, others: Tensor) -> Tensor:
    """The distance from each of `x` to the nearest of `others`, `(B,)`, differentiable in x.

    The mean of its logarithm estimates the entropy of samples up to constants. Improved CD raises it, with a weight of
    0.3 and 100 draws of the replay buffer as the others. A state that is one of the others has the least positive
    distance and no gradient, so that the logarithm is finite.

    Args:
        x: `(B, ...)`.
        others: `(N, ...)`, N >= 1.

    Raises ValueError or TypeError for others.

    Source: Kozachenko & Leonenko 1987; Du et al. 2021.

    Example:
        >>> import torch, fastebm
        >>> fastebm.losses.nearest_distance(torch.zeros(1, 2), torch.tensor([[3.0, 4.0], [6.0, 8.0]]))
        tensor([5.])
    """
    _check_images("x", x)
    _check_images("others", others)
    if others.shape[1:] != x.shape[1:]:
        raise ValueError(f"others must be states {tuple(x.shape[1:])} like x, got {tuple(others.shape[1:])}")
    flat, around = x.reshape(len(x), -1), others.detach().reshape(len(others), -1)
    with torch.no_grad():  # only the nearest one is in the graph, which is smaller by a factor of N
        nearest = torch.cdist(flat, around, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    squares = (flat - around[nearest]).square().sum(1)
    return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()


def recovery_energy(energy: Energy, x: Tensor, noisy: Tensor, sigma: float | Tensor) -> Tensor:
    """`E(x) + ||x - noisy||**2 / (2 sigma**2)`, `(B,)`: the energy of an image given its noisier version.

    Chains for recovery likelihood sample from it. It is less rugged than E, as it holds x near `noisy`.

    Args:
        energy: gives `(B,)`.
        x, noisy: `(B, ...)`.
        sigma: the standard deviation of the noise, a number > 0 or one for each image, `(B,)`; not read.

    Raises ValueError or TypeError for others, as far as they can be told without reading tensors, so that chains of
    this energy are compiled.

    Source: Gao et al., "Learning EBMs by Diffusion Recovery Likelihood", ICLR 2021, eq. 8.

    Example:
        >>> import torch, fastebm
        >>> def energy(x, noisy, sigma):
        ...     return fastebm.losses.recovery_energy(lambda x: x.square().sum(1), x, noisy, sigma)
        >>> noisy, sigma = torch.ones(1, 2), torch.tensor([0.5])
        >>> energy(torch.ones(1, 2), 0 * noisy, sigma)
        tensor([6.])
        >>> fastebm.Langevin(energy, 0.1, 0.0).sample(noisy, 50, conditions=(noisy, sigma))  # 1 / (1 + 2 sigma^2)
        tensor([[0.6667, 0.6667]])
    """
    _check_images("x", x)
    sigma = _levels("sigma", sigma, x)
    pull = _norms((x - _like("noisy", noisy, x)) / sigma)
    return _checked_energies(energy(x), x) + 0.5 * pull


def recovery_likelihood(data: Tensor, samples: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """`mean of weight * (E(data) - E(samples))`: the negative log-likelihood of images given noisier versions of them.

    Its gradient is that of `-log p(x | noisy)`, as the pull towards `noisy` does not depend on the weights of E.

    Args:
        data: the energies of the images, `(B,)`.
        samples: the energies of the ends of chains of `recovery_energy`, which start at the noisier images in the same
            order, `(B,)`.
        weight: not negative, a number or one for each pair, `(B,)`. The source weighs a pair by the least sigma over
            its own.

    Raises ValueError or TypeError for others.

    Source: Gao et al., ICLR 2021, eq. 11 (`model.py`, `training_losses`).

    Example:
        >>> import torch, fastebm
        >>> fastebm.losses.recovery_likelihood(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]), 0.5)
        tensor(-0.7500)
    """
    if _energies("data", data).shape != _energies("samples", samples).shape:
        raise ValueError(f"data and samples come in pairs, got {len(data)} and {len(samples)} energies")
    if isinstance(weight, Tensor) and weight.dim():
        if weight.shape != data.shape or not weight.is_floating_point():
            raise ValueError(f"weight must be a number or float {tuple(data.shape)}, got {shown(weight)}")
        right = bool(((weight >= 0) & weight.isfinite()).all())
    else:
        weight = as_real("weight", weight)
        right = 0 <= weight < math.inf
    if not right:
        raise ValueError("weight must be finite and not negative, got other numbers")
    return (weight * (data - samples)).mean()


# Gradients and checks -------------------------------------------------------------------------------------------------


def _gradient(energy: Energy, x: Tensor) -> Tensor:
    """`grad E` at x, which is fixed; differentiable in the weights where gradients are enabled."""
    grad_enabled = torch.is_grad_enabled()
    with torch.enable_grad():
        gradient = _gradient_at(energy, x.detach().requires_grad_())
    return gradient if grad_enabled else gradient.detach()


def _gradient_at(energy: Energy, x: Tensor) -> Tensor:
    energies = _checked_energies(energy(x), x)
    if not energies.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(energies.sum(), x, create_graph=True, materialize_grads=True)
    return gradient


def _norms(x: Tensor) -> Tensor:
    """`||x||**2` of each sample, (B,)."""
    return x.reshape(len(x), -1).square().sum(1)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """The inner product of each pair of samples, (B,)."""
    return (x * y).reshape(len(x), -1).sum(1)


def _energies(name: str, energies: Tensor) -> Tensor:
    if not isinstance(energies, Tensor) or not energies.is_floating_point():
        raise TypeError(f"{name} must be a tensor of energies, got {shown(energies)}")
    if energies.dim() != 1 or len(energies) == 0:
        raise ValueError(f"{name} must be energies of shape (B,), B >= 1, got {tuple(energies.shape)}")
    return energies


def _checked_energies(energies: Tensor, x: Tensor) -> Tensor:
    if not isinstance(energies, Tensor) or energies.shape != x.shape[:1]:
        raise ValueError(f"the energy must return one number a sample, shape ({len(x)},), got {shown(energies)}")
    return energies


def _check_images(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a tensor of floating point numbers, got {shown(x)}")
    if x.dim() < 1 or x.numel() == 0:
        raise ValueError(f"{name} must have shape (B, ...), B >= 1, got {tuple(x.shape)}")


def _like(name: str, value: Tensor, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or (value.shape, value.dtype) != (x.shape, x.dtype):
        raise ValueError(f"{name} must be a tensor {tuple(x.shape)} of {x.dtype} like x, got {shown(value)}")
    return value


def _levels(name: str, sigma: float | Tensor, x: Tensor) -> float | Tensor:
    """A number, or a tensor that broadcasts to x, whose values are not read: a compiler can't, and a GPU would wait."""
    if isinstance(sigma, Tensor) and sigma.dim():
        if sigma.shape != x.shape[:1] or not sigma.is_floating_point():
            raise ValueError(f"{name} must be a number or float ({len(x)},), got {shown(sigma)}")
        return sigma.to(x).view(-1, *(1,) * (x.dim() - 1))
    sigma = as_real(name, sigma)
    if not 0 < in_float32(sigma) < math.inf:
        raise ValueError(f"{name} must be finite and > 0 in float32, got {sigma}")
    return sigma
