"""The pull of a chain to what was measured: an energy as the prior of an image that is known under noise."""

from __future__ import annotations


def data_term(temperature: float, std: float, step_size: float) -> float:
    """The weight of an anchor at `y = x + std * N(0, I)` with which chains sample the posterior of x.

    For a prior `exp(-E(x) / T)` that posterior is `exp(-(E(x) + T / (2 std^2) ||x - y||^2) / T)`: the weight is
    `T / std^2`, but at most `1 / step_size`, at which an update begins anew from y. Training on such chains is
    recovery likelihood (Gao, Song, Poole, Wu, Kingma, "Learning Energy-Based Models by Diffusion Recovery Likelihood",
    ICLR 2021), and 0 the temperature without a data term.

    Example:
        >>> data_term(0.01, 0.2, 1.0), data_term(0.01, 0.01, 1.0)
        (0.25, 1.0)
    """
    return min(temperature / std**2, 1 / step_size) if temperature else 0.0
