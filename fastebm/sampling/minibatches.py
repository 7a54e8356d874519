"""Minibatches of data for chains whose energy is a sum over data: which rows a step takes is a function of its address.

Source: Welling and Teh, "Bayesian learning via stochastic gradient Langevin dynamics", ICML 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastebm import rng
from fastebm.ops.memory import check_dense
from fastebm.sampling.starts import scaled, words_of
from fastebm.sampling.state import SamplerState
from fastebm.scalars import as_count, shown

__all__ = ["Minibatches"]


class Minibatches:
    """Rows of data that a chain's energy is estimated from, drawn afresh for each step.

    The sampler calls the energy as `energy(x, *conditions, *rows)`, with `size` rows of each tensor for each chain, so
    `(B, size, ...)`. An unbiased estimate of a sum over N rows is N / size times the sum over these.

    Rows are drawn with replacement, and each is as likely as the others. They depend on the seed, the step and the
    chain's id alone: chains that share nothing stay independent, and a chain takes the same rows in any batch and after
    a resume.

    Args:
        data: tensors with the same N rows, such as inputs and targets, of any dtype, on the chains' device; not copied.
        size: the number of rows of a minibatch, at least 1.
        shared: all chains of a step take the same rows, as one net's copies would. It reads less memory, but then the
            rows' noise is the same in all chains and does not average out over them.

    Raises ValueError or TypeError for no data, tensors of different lengths, and a size below 1.

    Example:
        >>> import torch, fastebm
        >>> y = torch.randn(1000, generator=torch.Generator().manual_seed(0)) + 3
        >>> def energy(mean, rows):  # a flat prior, and normal data of known width
        ...     return 0.5 * (rows - mean).square().mean(1) * 1000
        >>> batches = fastebm.Minibatches(y, size=50)
        >>> chains = fastebm.Langevin(energy, 5e-6, 1e-5**0.5, minibatches=batches)
        >>> x = chains.sample(torch.zeros(500, 1), num_steps=1500, seed=0)
        >>> bool((x.mean() - y.mean()).abs() < 0.01), 0.032 < float(x.std()) < 0.036  # 0.0316, and the rows' noise
        (True, True)
    """

    def __init__(self, *data: Tensor, size: int, shared: bool = False) -> None:
        if not data:
            raise ValueError("minibatches need data: one tensor or several")
        for each in data:
            if not isinstance(each, Tensor):
                raise TypeError(f"data are tensors, got {shown(each)}")
            check_dense("data", each)
            if each.requires_grad:
                raise ValueError("data must not require a gradient: give data.detach()")
            if each.ndim == 0 or len(each) != len(data[0]) or each.device != data[0].device:
                raise ValueError(
                    f"data have a row for each observation on one device, got {', '.join(map(shown, data))}"
                )
        self.count = as_count("the number of rows of data", len(data[0]), 1)
        if self.count >= 2**31:
            raise ValueError(f"minibatches draw from fewer than 2^31 rows, got {self.count}")
        self.data = data
        self.size = as_count("size", size, 1)
        if not isinstance(shared, bool):
            raise TypeError(f"shared is True or False, got {shown(shared)}")
        self.shared = shared

    def __repr__(self) -> str:
        return f"Minibatches(size={self.size} of {self.count}{', shared' if self.shared else ''})"

    def indices(self, state: SamplerState, draws: int = 1) -> Tensor:
        """int64 `(B, draws * size)`: the rows that the step at the state's key takes; `(1, ...)` where they are shared.

        The first minibatch of several is the one of a single draw.
        """
        count = 1 if self.shared else len(state.x)
        ids = torch.zeros_like(state.chain_ids[:1]) if self.shared else state.chain_ids
        shape = (count, 2 * draws * self.size)
        u = torch.ops.fastebm.uniform(shape, state.key, ids, int(rng.Stream.MINIBATCH), torch.float32)
        return scaled(words_of(u), self.count)

    def draw(self, state: SamplerState, draws: int = 1) -> list[tuple[Tensor, ...]]:
        """`draws` minibatches for the step at the state's key, each a tuple of `(B, size, ...)`."""
        found = []
        for rows in self.indices(state, draws).split(self.size, dim=1):
            taken = (each.index_select(0, rows.reshape(-1)).unflatten(0, rows.shape) for each in self.data)
            found.append(tuple(each.expand(len(state.x), *each.shape[1:]) for each in taken))
        return found

    def check(self, x: Tensor) -> None:
        """Raises ValueError where the data are on another device than x."""
        if self.data[0].device != x.device:
            raise ValueError(f"the data of minibatches are on {self.data[0].device}, x0 on {x.device}")
