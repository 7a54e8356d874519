"""Recipes that train a classifier as an energy: JEM and JEM++."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastebm.losses import contrastive_divergence
from fastebm.recipes.recipe import Negatives, Optimizer, Overrides, Recipe, make_sampler
from fastebm.sampling import ReplayBuffer
from fastebm.sampling.starts import class_normal, uniform
from fastebm.scalars import as_count, as_real

__all__ = ["ClassifierEnergy", "JEMLoss", "JEMPlusPlus", "jem", "jem_pp"]


class ClassifierEnergy(nn.Module):
    """The energy of a classifier: `E(x) = -logsumexp(logits)`, and `E(x | y) = -logits[y]` for labels y.

    Args:
        classifier: gives logits `(B, C)`.
    """

    def __init__(self, classifier: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.classifier(x)
        return -logits.logsumexp(1) if labels is None else -logits.gather(1, labels[:, None])[:, 0]


@dataclass(frozen=True)
class JEMLoss:
    """`mean E(real) - mean E(ends)` with `E = -logsumexp(logits)`, and the cross-entropy of `labels` where given.

    It is called with the classifier in the place of the energy.
    """

    cross_entropy: float = 1.0

    def __call__(
        self,
        energy: Callable[..., Tensor],
        real: Tensor,
        negatives: Negatives,
        labels: Tensor | None = None,
    ) -> Tensor:
        logits = energy(real)
        loss = contrastive_divergence(-logits.logsumexp(1), -energy(negatives.x).logsumexp(1))
        return loss if labels is None else loss + self.cross_entropy * F.cross_entropy(logits, labels)


_JEM: dict[str, Any] = {"num_steps": 20, "step_size": 1.0, "noise_std": 0.01}


def jem(classifier: Callable[[Tensor], Tensor], *, num_classes: int = 0, **overrides: Unpack[Overrides]) -> Recipe:
    """JEM on CIFAR-10: a classifier whose `E(x) = -logsumexp(logits)` is trained as an energy beside it.

    `x' = x - ∇E(x) + 0.01 ξ`, 20 times, without a clamp or clip, with the classifier in eval mode. Chains start at
    U(-1, 1). The buffer has 10,000 places; a chain starts anew with probability 0.05, and its end goes back to the
    place it was drawn from. The loss is `E⁺ - E⁻` and the cross-entropy of the labels, `recipe.loss(classifier, real,
    negatives, labels)`. The authors take other images for the second term than for the first.

    Adam has a learning rate of 1e-4, which grows over 1,000 iterations and falls to 0.3 of itself at epochs 160 and
    180. Real images get noise of 0.03 (`recipe.noisy`).

    Args:
        classifier: gives logits `(B, C)` for images `(B, C', H, W)` in [-1, 1].
        num_classes: 0 for chains of p(x), as published; the number of classes for chains of p(x | y), with a share of
            the buffer for each class (`--class_cond_p_x_sample`).
        overrides: `num_steps`, `step_size` and options of `Langevin`, in place of the published ones.

    Source: Grathwohl et al., "Your classifier is secretly an energy based model and you should treat it like one", ICLR
    2020; wgrathwohl/JEM `train_wrn_ebm.py`.

    Example:
        >>> import torch, fastebm
        >>> classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10))
        >>> recipe = fastebm.recipes.jem(classifier, num_classes=10, num_steps=5, engine="autograd")
        >>> buffer, real = recipe.buffer((3, 4, 4), seed=0), torch.rand(8, 3, 4, 4) * 2 - 1
        >>> negatives = recipe.negatives(real, buffer, labels=torch.arange(8))
        >>> recipe.loss(classifier, real, negatives, labels=torch.arange(8)).requires_grad
        True
    """
    num_classes = as_count("num_classes", num_classes)
    sampler, num_steps = make_sampler("jem", ClassifierEnergy(classifier), _JEM, overrides)
    start = uniform(-1.0, 1.0)
    return Recipe(
        name="jem",
        source="Grathwohl et al., ICLR 2020; wgrathwohl/JEM train_wrn_ebm.py",
        sampler=sampler,
        num_steps=num_steps,
        start=start,
        buffer=functools.partial(ReplayBuffer, capacity=10_000, restart=0.05, start=start, num_classes=num_classes),
        loss=JEMLoss(),
        optimizer=Optimizer(learning_rate=1e-4, batch_size=64, warmup=1000, decay=0.3, decay_epochs=(160, 180)),
        data_noise=0.03,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class JEMPlusPlus(Recipe):
    """The recipe `jem_pp`: chains with an inner loop through the first layer alone.

    Attributes (besides those of `Recipe`):
        first: the first layer.
        rest: from its output to logits `(B, C)`.
        inner_steps: the number of steps for each gradient of the whole classifier; `num_steps` counts the latter.
        step_size: of a step of the inner loop.
        outer_step: the size of a step along the whole gradient before the inner loop; 0 for none.
        grad_clip: the largest magnitude of an entry of the inner loop's gradient.
        clamp: bounds of the states in the inner loop.
    """

    first: Callable[[Tensor], Tensor]
    rest: Callable[[Tensor], Tensor]
    inner_steps: int
    step_size: float
    outer_step: float
    grad_clip: float
    clamp: tuple[float, float]

    def _run(
        self, start: Tensor, seed: int, chain_ids: Tensor, start_step: int, conditions: tuple[Tensor, ...], check: bool
    ) -> Tensor:
        """The ends of chains, which have no noise. The modules stay in the mode that they are in, as the authors do."""
        x = start
        for _ in range(self.num_steps):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                inside = self.first(x)
                logits = self.rest(inside)
                energy = -logits.logsumexp(1) if not conditions else -logits.gather(1, conditions[0][:, None])[:, 0]
                gradient, adjoint = torch.autograd.grad(energy.sum(), (x, inside))
            x = x.detach() - self.outer_step * gradient if self.outer_step else x.detach()
            for _ in range(self.inner_steps):
                with torch.enable_grad():
                    x = x.detach().requires_grad_()
                    (gradient,) = torch.autograd.grad((self.first(x) * adjoint).sum(), x)
                x = x.detach() - self.step_size * gradient.clamp(-self.grad_clip, self.grad_clip)
                x = x.clamp(*self.clamp)
        if check and not bool(x.isfinite().all()):
            raise FloatingPointError("the ends of jem_pp's chains are not finite")
        return x


def jem_pp(
    first: Callable[[Tensor], Tensor],
    rest: Callable[[Tensor], Tensor],
    *,
    means: Tensor,
    covariances: Tensor,
    num_classes: int = 0,
    num_steps: int = 10,
    inner_steps: int = 5,
    step_size: float = 0.2,
    outer_step: float = 1.0,
) -> JEMPlusPlus:
    """JEM++ on CIFAR-10: JEM with chains that evaluate the whole classifier once for several steps of its first layer.

    For each of 10 gradients of the whole classifier, `x ← x - ∇E(x)`; then the adjoint p of the first layer's output
    stays as it was, and 5 steps follow: `x ← clamp(x - 0.2 clip(∇ p·first(x), 1), -1, 1)`. There is no noise. A batch
    norm is in train mode, so that a chain depends on its batch. The loss is JEM's, and the logits are
    `rest(first(x))`: `classifier = torch.nn.Sequential(first, rest)`.

    Chains start at a normal distribution of each class, with the mean and covariance of its training images and 1e-4 on
    the diagonal. The buffer is JEM's. SGD has a learning rate of 0.1, which grows over 1,000 iterations and falls to
    0.2 of itself at epochs 50, 100 and 125, a momentum of 0.9 and a weight decay of 4e-4.

    Args:
        first: the first layer.
        rest: from its output to logits `(B, C)`.
        means: of the classes, `(C, ...)`.
        covariances: of their images as rows of D elements, `(C, D, D)`, without the 1e-4.
        num_classes: as for `jem`.
        num_steps, inner_steps: of the two loops; the authors' script has 5 and 5, their code 10 and 5.
        step_size: of the inner loop (`pyld_lr`).
        outer_step: of the step along the whole gradient (`sgld_lr`, 1.0 unless the script changes it); 0 for none.

    Source: Yang & Ji, "JEM++: Improved Techniques for Training JEM", ICCV 2021; sndnyang/JEMPP `train_jempp.py`,
    `scripts/jempp_cifar10.sh`.

    Example:
        >>> import torch, fastebm
        >>> first, rest = torch.nn.Conv2d(1, 4, 3), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
        >>> means, covariances = torch.zeros(2, 1, 4, 4), torch.eye(16).expand(2, 16, 16)
        >>> recipe = fastebm.recipes.jem_pp(first, rest, means=means, covariances=covariances)
        >>> buffer, real = recipe.buffer((1, 4, 4), seed=0), torch.rand(8, 1, 4, 4)
        >>> recipe.negatives(real, buffer).x.shape
        torch.Size([8, 1, 4, 4])
    """
    ridge = 1e-4 * torch.eye(covariances.shape[-1], dtype=covariances.dtype, device=covariances.device)
    start = class_normal(means, covariances + ridge, clamp=(-1, 1))
    return JEMPlusPlus(
        name="jem_pp",
        source="Yang & Ji, ICCV 2021; sndnyang/JEMPP train_jempp.py",
        sampler=None,
        num_steps=as_count("num_steps", num_steps, 1),
        start=start,
        buffer=functools.partial(
            ReplayBuffer, capacity=10_000, restart=0.05, start=start, num_classes=as_count("num_classes", num_classes)
        ),
        loss=JEMLoss(),
        optimizer=Optimizer(
            method="SGD",
            learning_rate=0.1,
            momentum=0.9,
            weight_decay=4e-4,
            batch_size=64,
            warmup=1000,
            decay=0.2,
            decay_epochs=(50, 100, 125),
        ),
        data_noise=0.03,
        first=first,
        rest=rest,
        inner_steps=as_count("inner_steps", inner_steps, 1),
        step_size=as_real("step_size", step_size),
        outer_step=as_real("outer_step", outer_step),
        grad_clip=1.0,
        clamp=(-1.0, 1.0),
    )
