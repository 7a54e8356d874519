"""What is kept of running chains: moments, moments of blocks in time, products at a distance; all float64, per chain.

Every operation acts on single numbers, or adds them up in a fixed order. So what is kept of a chain has the same bits
in any batch and on any number of threads, and batches are joined by concatenation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fastebm.ops.langevin import SUM_LANES

MAX_BLOCKS = 32


@dataclass(frozen=True, eq=False)
class Moments:
    """The number of values, their mean, and the sum of squares of their distances from it."""

    count: Tensor | float
    mean: Tensor
    squares: Tensor

    @property
    def variance(self) -> Tensor:
        """The unbiased variance; NaN of a single value."""
        return self.squares / (self.count - 1 if isinstance(self.count, Tensor) else max(self.count - 1, 0))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of the values of both (Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for
    computing sample variances", 1979)."""
    count = a.count + b.count
    apart = b.mean - a.mean
    squares = a.squares + b.squares + apart * apart * (a.count * b.count / count)
    return Moments(count, a.mean + apart * (b.count / count), squares)


def merge_chains(count: int, mean: Tensor, squares: Tensor) -> Moments:
    """The moments over all chains `(...)` of those of each `(B, ...)` over `count` values: neighbours are merged first,
    then pairs of them, and so on. Raises ValueError where there is no chain."""
    if not len(mean):
        raise ValueError("there are no chains to be judged")
    counts = torch.full((len(mean), *[1] * (mean.dim() - 1)), count, dtype=torch.float64, device=mean.device)
    parts: list[Any] = [counts, mean, squares]
    while len(parts[1]) > 1:
        paired = len(parts[1]) // 2 * 2
        both = merge(*(Moments(*(part[at:paired:2] for part in parts)) for at in (0, 1)))
        merged: list[Any] = [both.count, both.mean, both.squares]
        parts = [torch.cat((new, old[paired:])) for new, old in zip(merged, parts, strict=True)]
    return Moments(*(part[0] for part in parts))


def mean_of_chains(values: Tensor) -> Tensor:
    """The mean of `(B, ...)` over B, added up as `merge_chains` does: neighbours first."""
    total = values
    while len(total) > 1:
        paired = len(total) // 2 * 2
        total = torch.cat((total[:paired:2] + total[1:paired:2], total[paired:]))
    return total[0] / len(values)


def variance_of_chains(values: Tensor) -> Tensor:
    """The unbiased variance of `(B, ...)` over B; NaN for B = 1."""
    apart = values - mean_of_chains(values)
    return mean_of_chains(apart * apart) * len(values) / (len(values) - 1 or torch.nan)


def in_turn(rows: Tensor) -> Tensor:
    """The sum of `(K, ...)` over K, K >= 1, one row after the other."""
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total


def ordered_dot(a: Tensor, b: Tensor | None = None) -> Tensor:
    """The sums of a * b, or of a, over the elements of each chain, float64 `(B,)`; a is `(B, ...)`, b `(B | 1, ...)`.

    In the order of the operators: element e to lane e % 1024, in turn, then the lanes fold in halves.
    """
    elements = math.prod(a.shape[1:])
    a, b = a.reshape(len(a), elements), None if b is None else b.reshape(len(b), elements)
    width = min(SUM_LANES, 1 << max(elements - 1, 0).bit_length())  # lanes that stay 0 add nothing
    lanes = torch.zeros(len(a), width, dtype=torch.float64, device=a.device)
    for first in range(0, elements, width):
        part = a[:, first : first + width].double()
        if b is not None:
            part = part * b[:, first : first + width].double()
        lanes[:, : part.shape[1]] += part
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


@dataclass(eq=False)
class Accumulator:
    """Tensors with a place for each chain, and whole numbers that are the same for all chains."""

    chain_dim: ClassVar[int] = 0

    def state_dict(self) -> dict[str, Any]:
        """The fields by name: tensors, not copied, and ints."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device | str | None = None) -> Self:
        """The inverse of `state_dict`, with copies of its tensors. Raises ValueError for anything else."""
        names = {each.name for each in fields(cls)}
        if not isinstance(state, Mapping) or set(state) != names:
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"not the state of diagnostics: {cls.__name__} has {sorted(names)}, got {found}")
        values = {}
        for each in fields(cls):
            value = state[each.name]
            kind = int if each.type == "int" else Tensor
            if not isinstance(value, kind) or (isinstance(value, Tensor) and value.dim() <= cls.chain_dim):
                raise ValueError(
                    f"not the state of diagnostics: {each.name} of {cls.__name__} is {type(value).__name__}"
                )
            values[each.name] = value.detach().to(device, copy=True) if isinstance(value, Tensor) else value
        return cls(**values)

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """What this would be if the chains of all parts had run in one batch. The ints of the parts are equal."""
        first = parts[0].state_dict()
        joined = {
            name: torch.cat([getattr(part, name) for part in parts], cls.chain_dim)
            if isinstance(value, Tensor)
            else value
            for name, value in first.items()
        }
        return cls(**joined)


@dataclass(eq=False)
class Tally(Accumulator):
    """How often something happened to each chain: int64 `(B,)` of `count` updates."""

    number: Tensor
    count: int = 0

    @classmethod
    def like(cls, happened: Tensor) -> Self:
        return cls(torch.zeros(happened.shape, dtype=torch.int64, device=happened.device))

    def add(self, happened: Tensor) -> None:
        self.number += happened.to(torch.int64)
        self.count += 1

    @property
    def rate(self) -> Tensor:
        return self.number.double() / self.count


@dataclass(eq=False)
class RunningMoments(Accumulator):
    """Welford's running mean and sum of squares of values `(B, ...)`, for each entry on its own."""

    mean: Tensor
    squares: Tensor
    count: int = 0

    @classmethod
    def like(cls, values: Tensor) -> Self:
        zeros = torch.zeros(values.shape, dtype=torch.float64, device=values.device)
        return cls(zeros, zeros.clone())

    def add(self, values: Tensor) -> None:
        # No `add(alpha=...)` or `addcmul`: those may fuse in whole vectors but not in the rest.
        self.count += 1
        apart = values - self.mean
        self.mean += apart / self.count
        self.squares += apart * (values - self.mean)

    @property
    def moments(self) -> Moments:
        return Moments(self.count, self.mean, self.squares)


@dataclass(eq=False)
class RunningCovariance(Accumulator):
    """The sum over the elements of the covariances of x and g `(B, ...)` in time: `products` `(B,)` is `count` times
    it."""

    x_mean: Tensor
    g_mean: Tensor
    products: Tensor
    count: int = 0

    @classmethod
    def like(cls, x: Tensor) -> Self:
        zeros = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
        return cls(zeros, zeros.clone(), zeros.new_zeros(len(x)))

    def add(self, x: Tensor, g: Tensor) -> None:
        self.count += 1
        apart = x - self.x_mean
        self.x_mean += apart / self.count
        self.g_mean += (g - self.g_mean) / self.count
        self.products += ordered_dot(apart, g - self.g_mean)

    def pooled(self) -> Tensor:
        """The unbiased covariance over all chains and updates, summed over the elements."""
        x, g = (means - mean_of_chains(means) for means in (self.x_mean, self.g_mean))
        chains = len(x)
        products = mean_of_chains(self.products + self.count * ordered_dot(x, g)) * chains
        return products / (chains * self.count - 1 or torch.nan)


@dataclass(eq=False)
class Blocks(Accumulator):
    """Moments of scalars `(B, S)` in 16 to 31 blocks of equal length in time, and in the block that is not full yet.

    Blocks have one value at first. Where there are 32, neighbours are merged, so that any length of chain takes the
    same memory.
    """

    chain_dim: ClassVar[int] = 1

    means: Tensor
    squares: Tensor
    length: int = 1
    full: int = 0
    filled: int = 0

    @classmethod
    def like(cls, values: Tensor) -> Self:
        zeros = torch.zeros((MAX_BLOCKS, *values.shape), dtype=torch.float64, device=values.device)
        return cls(zeros, zeros.clone())

    def add(self, values: Tensor) -> None:
        mean, squares = self.means[self.full], self.squares[self.full]
        self.filled += 1
        apart = values - mean
        mean += apart / self.filled
        squares += apart * (values - mean)
        if self.filled < self.length:
            return
        self.full, self.filled = self.full + 1, 0
        if self.full == MAX_BLOCKS:
            left, right = (Moments(self.length, self.means[at::2], self.squares[at::2]) for at in (0, 1))
            self.full, self.length = MAX_BLOCKS // 2, 2 * self.length
            both = merge(left, right)
            for old, merged in ((self.means, both.mean), (self.squares, both.squares)):
                old[: self.full] = merged
                old[self.full :] = 0

    @property
    def count(self) -> int:
        return self.full * self.length + self.filled

    def between(self, first: int, last: int) -> Moments:
        """The moments of each chain in the full blocks `first` to `last - 1`, of which there is at least one."""
        total = Moments(self.length, self.means[first], self.squares[first])
        for block in range(first + 1, last):
            total = merge(total, Moments(self.length, self.means[block], self.squares[block]))
        return total

    def whole(self) -> Moments:
        """The moments of each chain over all its values, of which there is at least one."""
        rest = Moments(self.filled, self.means[self.full], self.squares[self.full])
        if not self.full:
            return rest
        total = self.between(0, self.full)
        return merge(total, rest) if self.filled else total

    def halves(self) -> tuple[Moments, Moments] | None:
        """The moments of each chain in the first and the last half of its full blocks; None for fewer than two blocks.

        A block in the middle, and the one that is not full, are left out: below 32 values none but the middle one of an
        odd number, and never more than an eighth.
        """
        half = self.full // 2
        if not half:
            return None
        return self.between(0, half), self.between(self.full - half, self.full)


@dataclass(eq=False)
class LaggedProducts(Accumulator):
    """Sums of products of scalars `(B, S)` at the distances 1 to L in time, from which autocovariances follow.

    Values are counted from the first one of their chain, so that a mean far from 0 costs no digits. `products[L - t]`
    belongs to distance t. `ring` has the last L values, and `head` the first L ones: their sums make up for the ends.
    """

    chain_dim: ClassVar[int] = 1

    origin: Tensor
    products: Tensor
    ring: Tensor
    head: Tensor
    count: int = 0

    @classmethod
    def like(cls, values: Tensor, lags: int) -> Self:
        zeros = torch.zeros((lags, *values.shape), dtype=torch.float64, device=values.device)
        return cls(zeros[:1].clone(), zeros, zeros.clone(), zeros.clone())

    def add(self, values: Tensor) -> None:
        lags = len(self.ring)
        if self.count == 0:
            self.origin[0] = values
        value = values - self.origin[0]
        oldest = self.count % lags
        self.products[: lags - oldest] += self.ring[oldest:] * value
        if oldest:
            self.products[lags - oldest :] += self.ring[:oldest] * value
        self.ring[oldest] = value
        if self.count < lags:
            self.head[self.count] = value
        self.count += 1

    def autocovariances(self, whole: Moments) -> Tensor:
        """The autocovariances of each chain about its own mean, `(1 + K, B, S)`, for the distances 0 to K, which is L
        or the number of values less one: sums of n - t products over n, as is usual."""
        lags, n = len(self.ring), self.count
        mean = whole.mean - self.origin[0]
        oldest = n % lags
        last = torch.cat((self.ring[oldest:], self.ring[:oldest])).flip(0)  # the newest first
        found = [whole.squares / n]
        heads, tails = torch.zeros_like(mean), torch.zeros_like(mean)
        for lag in range(1, min(lags, n - 1) + 1):
            heads, tails = heads + self.head[lag - 1], tails + last[lag - 1]
            ends = 2 * n * mean - heads - tails
            found.append((self.products[lags - lag] - mean * ends + (n - lag) * mean * mean) / n)
        return torch.stack(found)
