"""Data terms (Gaussian likelihoods): the weight that samples the posterior of a noisy image, and implicit updates."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Number = TypeVar("Number", float, Tensor)


def data_term_weight(temperature: float, std: float) -> float:
    """The weight of the data term with which chains sample the posterior of x, given `y = x + std * N(0, I)`.

    For a prior `exp(-E(x) / T)` the posterior is `exp(-(E(x) + T / (2 std^2) ||x - y||^2) / T)`, so that the weight is
    `T / std^2`; at the temperature 0 it is 0. Training on such chains is recovery likelihood (Gao, Song, Poole, Wu,
    Kingma, "Learning Energy-Based Models by Diffusion Recovery Likelihood", ICLR 2021).

    Example:
        >>> round(data_term_weight(0.01, 0.2), 3)
        0.25
    """
    if not temperature:
        return 0.0
    if not std > 0:
        raise ValueError(f"the posterior of a noisy image needs noise of a std > 0, got {std}")
    return temperature / std**2


def implicit_step(step_size: Number, weight: Number | float) -> Number:
    """The step size `h' = h / (1 + h w)` that makes an update implicit in a data term of weight w.

    `x' = x - h' (grad E(x) + w (x - y))` is the solution of `x' = x - h grad E(x) - h w (x' - y)`, in which the data
    term is evaluated at the end of the update. So a data term of any weight leaves a stable chain stable. With steps of
    `h`, the chain is unstable if `h w` plus `h` times the curvature of the energy exceeds 2.

    Example:
        >>> implicit_step(1.0, 1.0), implicit_step(1.0, 0.0)
        (0.5, 1.0)
    """
    return step_size / (1 + step_size * weight)
