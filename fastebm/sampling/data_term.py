"""The pull of a chain to what was measured: an energy as the prior of an image that is known under noise."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Number = TypeVar("Number", float, Tensor)


def data_term_weight(temperature: float, std: float) -> float:
    """The weight of a data term at `y = x + std * N(0, I)` with which chains sample the posterior of x.

    For a prior `exp(-E(x) / T)` that posterior is `exp(-(E(x) + T / (2 std^2) ||x - y||^2) / T)`: the weight is
    `T / std^2`, and 0 at the temperature 0. Training on such chains is recovery likelihood (Gao, Song, Poole, Wu,
    Kingma, "Learning Energy-Based Models by Diffusion Recovery Likelihood", ICLR 2021).

    Example:
        >>> round(data_term_weight(0.01, 0.2), 3)
        0.25
    """
    return temperature / std**2 if temperature else 0.0


def implicit_step(step_size: Number, weight: float) -> Number:
    """The step size `h' = h / (1 + h w)` at which an update with a data term of weight w takes the pull at its end.

    `x' = x - h' (grad E(x) + w (x - y))` is `x' = x - h grad E(x) - h w (x' - y)`, solved for x'. So a pull may be of
    any weight, and never makes a chain unstable that is stable without: with steps of `h` it does where `h w` and `h`
    times the energy's curvature are above 2 together.

    Example:
        >>> implicit_step(1.0, 1.0), implicit_step(1.0, 0.0)
        (0.5, 1.0)
    """
    return step_size / (1 + step_size * weight)
