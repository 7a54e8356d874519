"""Where chains start: distributions whose draws depend only on the seed and the id of a chain.

A start is any function `start(shape, *, seed, chain_ids, labels=None)` that returns states of `shape`, `(B, ...)`,
float, on the device of `chain_ids`. Those of this file draw from the stream `BUFFER_RESTART`, so a chain starts at the
same state in a batch of one or of a thousand, on any rank and after a resume.

>>> import torch, fastebm
>>> start = fastebm.starts.uniform(-1, 1)
>>> x = start((4, 3, 8, 8), seed=0, chain_ids=10)
>>> torch.equal(start((1, 3, 8, 8), seed=0, chain_ids=12), x[2:3])
True
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastebm import ops
from fastebm.rng import Stream
from fastebm.scalars import as_real, shown

__all__ = ["Start", "class_normal", "images", "normal", "uniform"]


class Start(Protocol):
    """What gives chains their first states; see the file's first lines."""

    def __call__(self, shape: Sequence[int], *, seed: int, chain_ids: Any, labels: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Uniform:
    """Uniform in [low, high]. Build it with `uniform`."""

    low: float
    high: float

    def __call__(self, shape: Sequence[int], *, seed: int, chain_ids: Any, labels: Tensor | None = None) -> Tensor:
        u = ops.uniform(shape, seed=seed, stream=Stream.BUFFER_RESTART, chain_ids=chain_ids)
        return u.mul_(self.high - self.low).add_(self.low)


@dataclass(frozen=True)
class Normal:
    """Independent normal numbers. Build it with `normal`."""

    mean: float
    std: float

    def __call__(self, shape: Sequence[int], *, seed: int, chain_ids: Any, labels: Tensor | None = None) -> Tensor:
        z = ops.normal(shape, seed=seed, stream=Stream.BUFFER_RESTART, chain_ids=chain_ids)
        return z.mul_(self.std).add_(self.mean)


@dataclass(frozen=True, eq=False)
class Images:
    """States drawn from a set, for labels from those of the class. Build it with `images`."""

    states: Tensor
    order: Tensor
    first: Tensor
    count: Tensor

    def __call__(self, shape: Sequence[int], *, seed: int, chain_ids: Any, labels: Tensor | None = None) -> Tensor:
        _check_sample_shape("the start's states", self.states.shape[1:], shape)
        words = random_words(shape[0], 1, seed=seed, stream=Stream.BUFFER_RESTART, chain_ids=chain_ids)[:, 0]
        if labels is None or len(self.count) == 1:
            index = scaled(words, len(self.states))
        else:
            group = _checked_labels(labels, shape[0], len(self.count))
            index = self.order[scaled(words, self.count[group]) + self.first[group]]
        device = chain_ids.device if isinstance(chain_ids, Tensor) else self.states.device
        return self.states[index.to(self.states.device)].to(device)


@dataclass(frozen=True, eq=False)
class ClassNormal:
    """A normal distribution for each class. Build it with `class_normal`."""

    means: Tensor
    factors: Tensor
    clamp: tuple[float, float] | None

    def __call__(self, shape: Sequence[int], *, seed: int, chain_ids: Any, labels: Tensor | None = None) -> Tensor:
        _check_sample_shape("the start's means", self.means.shape[1:], shape)
        where: dict[str, Any] = {"seed": seed, "stream": Stream.BUFFER_RESTART, "chain_ids": chain_ids}
        z = ops.normal(shape, **where)
        means, factors = self.means.to(z.device), self.factors.to(z.device)
        if labels is None:
            classes = scaled(random_words(shape[0], 1, step=1, **where)[:, 0], len(means))
        else:
            classes = _checked_labels(labels, shape[0], len(means))
        # One product a chain: the bits of a product of matrices would depend on the other chains.
        for row, label in zip(z, classes.tolist(), strict=True):
            row.copy_(means[label] + (factors[label] @ row.flatten()).view(row.shape))
        return z if self.clamp is None else z.clamp_(*self.clamp)


def uniform(low: float = -1.0, high: float = 1.0) -> Uniform:
    """Independent uniform numbers between `low` and `high`, float32. Raises ValueError unless both are finite and in
    order."""
    return Uniform(*checked_range("a uniform start", (low, high)))


def normal(mean: float = 0.0, std: float = 1.0) -> Normal:
    """Independent normal numbers, float32. Raises ValueError for a mean that isn't finite and a std that isn't > 0."""
    mean, std = as_real("mean", mean), as_real("std", std)
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(f"a normal start needs a finite mean and a finite std > 0, got {mean} and {std}")
    return Normal(mean, std)


def images(states: Tensor, labels: Tensor | None = None) -> Images:
    """A state of a set, each as likely as the others.

    Args:
        states: `(N, ...)`, float and finite, on any device; not copied.
        labels: int64 `(N,)`, the classes from 0 on, of each of which there is one state at least. Then a chain with a
            label starts at a state of its class, and one without at any.

    Raises ValueError or TypeError for others.

    Example:
        >>> import torch, fastebm
        >>> start = fastebm.starts.images(torch.eye(3))
        >>> start((2, 3), seed=0, chain_ids=0)
        tensor([[0., 1., 0.],
                [0., 0., 1.]])
    """
    _check_states("states", states)
    if len(states) == 0:
        raise ValueError("a start needs one state at least, got none")
    if labels is None:
        labels = torch.zeros(len(states), dtype=torch.int64, device="cpu")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (len(states),):
        raise ValueError(f"labels are one int64 a state, shape ({len(states)},), got {shown(labels)}")
    labels = labels.cpu()
    if int(labels.min()) < 0:
        raise ValueError(f"labels must not be negative, got {int(labels.min())}")
    count = labels.clamp(max=len(states)).bincount()  # a label of N or more leaves a class without states
    if not bool(count.all()):
        raise ValueError(f"each class needs one state at least, class {int((count == 0).nonzero()[0])} has none")
    return Images(states, labels.argsort(stable=True), count.cumsum(0) - count, count)


def class_normal(means: Tensor, covariances: Tensor, *, clamp: tuple[float, float] | None = None) -> ClassNormal:
    """A normal distribution for each class, as JEM++ starts its chains: of the class of a label, or of any class.

    Args:
        means: `(C, ...)`, float.
        covariances: `(C, D, D)`, symmetric and positive definite, of the D elements of a state in row-major order.
            JEM++ adds 1e-4 to the diagonals of those of the training images.
        clamp: bounds (low, high) of the states; (-1, 1) in JEM++.

    Raises ValueError or TypeError for others.

    Source: Yang & Ji, "JEM++: Improved Techniques for Training JEM", ICCV 2021 (`train_jempp.py`).

    Example:
        >>> import torch, fastebm
        >>> start = fastebm.starts.class_normal(torch.tensor([[0.0, 0.0], [9.0, 9.0]]), torch.eye(2).expand(2, 2, 2))
        >>> start((2, 2), seed=0, chain_ids=0, labels=torch.tensor([0, 1])).round()
        tensor([[ 0., -1.],
                [ 9.,  9.]])
    """
    _check_states("means", means)
    _check_states("covariances", covariances)
    size = math.prod(means.shape[1:])
    if covariances.shape != (len(means), size, size):
        raise ValueError(
            f"means {tuple(means.shape)} need covariances ({len(means)}, {size}, {size}), got "
            f"{tuple(covariances.shape)}"
        )
    factors, failed = torch.linalg.cholesky_ex(covariances.double())
    if bool(failed.any()):
        raise ValueError(f"the covariance of class {int(failed.nonzero()[0])} is not positive definite")
    bounds = None if clamp is None else checked_range("clamp", clamp)
    return ClassNormal(means.detach().float(), factors.float(), bounds)


# Shared with the replay buffer ----------------------------------------------------------------------------------------


def random_words(rows: int, columns: int, *, seed: int, stream: int, chain_ids: int | Tensor, step: int = 0) -> Tensor:
    """Whole numbers in [0, 2^32), int64 `(rows, columns)` on the CPU: word `k` from the uniform elements 2k and 2k + 1.

    With the 24 bits of one float32, some of 10^6 slots would have 17 of its values and others 16.
    """
    ids = chain_ids.cpu() if isinstance(chain_ids, Tensor) else chain_ids
    return words_of(ops.uniform((rows, 2 * columns), seed=seed, step=step, stream=stream, chain_ids=ids, device="cpu"))


def words_of(u: Tensor) -> Tensor:
    """Uniform numbers in (0, 1], float32 `(rows, 2 * columns)`, as those words."""
    halves = (u * 65536).long().clamp_(max=65535)
    return halves[:, 0::2] * 65536 + halves[:, 1::2]


def scaled(words: Tensor, sizes: int | Tensor) -> Tensor:
    """Words as numbers below `sizes`, each as likely as the others: `floor(word / 2^32 * size)`."""
    return (words.double() * sizes / 2**32).long()


def checked_range(name: str, pair: tuple[float, float]) -> tuple[float, float]:
    """The two as floats. Raises TypeError or ValueError unless they are finite and in order."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"{name} needs a pair (low, high), got {shown(pair)}")
    low, high = as_real(f"low of {name}", pair[0]), as_real(f"high of {name}", pair[1])
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"{name} needs finite low < high, got {low} and {high}")
    return low, high


def _checked_labels(labels: Tensor, count: int, classes: int) -> Tensor:
    """`labels` on the CPU. Raises ValueError for those out of range."""
    if labels.shape != (count,) or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"this start needs {count} labels in [0, {classes}), got {shown(labels)}")
    return labels.cpu()


def _check_sample_shape(name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    """Raises ValueError where states of one shape are asked for and others are there."""
    if tuple(found) != tuple(wanted[1:]):
        raise ValueError(f"{name} have shape {tuple(found)}, but states of {tuple(wanted[1:])} are asked for")


def _check_states(name: str, states: Tensor) -> None:
    """Raises TypeError or ValueError for what are no finite states (N, ...)."""
    if not isinstance(states, Tensor) or not states.is_floating_point():
        raise TypeError(f"{name} must be a tensor of floating point numbers, got {shown(states)}")
    if states.dim() < 1:
        raise ValueError(f"{name} must have shape (N, ...), got a tensor without dimensions")
    if not bool(states.isfinite().all()):
        raise ValueError(f"{name} must be finite, got others")
