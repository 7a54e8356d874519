"""The options that several operators share, each listed once for schemas, references and all backends."""

from __future__ import annotations

from typing import NamedTuple, get_type_hints

from torch import Tensor

__all__ = ["StepOptions", "TailOptions", "schema_of"]


class StepOptions(NamedTuple):
    """The arguments of `langevin_step` behind x and the gradient, in the order of its schema.

    csrc/step_options.h is the same struct in C++.

    Attributes:
        schedule: float32 (S, 2) or (S, B, 2) of (step size, noise std); row min(key[2], S - 1) is used.
        key: int64 (seed, step, schedule index).
        chain_ids: int64, the id of the first chain (1,) or of every chain (B,).
        clamp_min, clamp_max: bounds of the new state that are one number.
        grad_clip, grad_norm_clip: bounds of the gradient, by entry or by a chain's norm.
        lower_bounds, upper_bounds: x's shape; bounds of each entry of the new state, which NaN leaves free.
        mask, known: x's shape; where mask is True, the new state is `known`.
        data_target, data_term_weight, data_term_hinge: the data term; x's shape, float32 (S,), and a number.
    """

    schedule: Tensor
    key: Tensor
    chain_ids: Tensor
    clamp_min: float | None
    clamp_max: float | None
    grad_clip: float | None
    grad_norm_clip: float | None
    lower_bounds: Tensor | None
    upper_bounds: Tensor | None
    mask: Tensor | None
    known: Tensor | None
    data_target: Tensor | None
    data_term_weight: Tensor | None
    data_term_hinge: float


class TailOptions(NamedTuple):
    """The last arguments of the block tail and its derivatives.

    Attributes:
        beta: one element, float64 for float64 images, else float32; None where nothing fades.
        activation, parameter: as `activations.activation_code` gives them.
    """

    beta: Tensor | None
    activation: int
    parameter: float


_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", float | None: "float?", int: "int"}


def schema_of(options: type[StepOptions | TailOptions], **types: str) -> str:
    """The options as a part of a schema; `types` has those that differ, such as a tensor that is written."""
    listed = {name: _SCHEMA_TYPES[hint] for name, hint in get_type_hints(options).items()} | types
    return ", ".join(f"{kind} {name}" for name, kind in listed.items())
