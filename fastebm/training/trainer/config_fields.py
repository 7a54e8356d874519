"""What the configs of all methods share: the ranges of fields, and the way back from JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from fastebm import rng
from fastebm.runs.folder import RunError

Config = TypeVar("Config")
Ranges = Mapping[str, tuple[float, float]]

COMMON_RANGES: Ranges = {
    "adam_betas": (0, 1 - 1e-9),
    "lr_decay": (0, 1),
    "num_steps": (1, 10**6),
    "step_size": (1e-12, 1e12),
    "data_noise": (0, 1e6),
    "energy_l2": (0, 1e6),
    "ema": (0, 1 - 1e-9),
    "max_energy": (1e-12, 1e30),
    "max_gap": (1e-12, 1e30),
    "max_loss": (1e-12, 1e30),
    "retries": (0, 10**6),
    "retry_lr_factor": (1e-6, 1),
    "log_every": (1, 10**9),
    "checkpoint_every": (1, 10**9),
    "keep_checkpoints": (1, 10**9),
    "pictures_every": (0, 10**9),
}
COMMON_CHOICES: Mapping[str, tuple[str, ...]] = {
    "dtype": ("float32", "bfloat16"),
    "update_dtype": ("float32", "bfloat16"),
    "engine": ("auto", "fused", "autograd"),
}
COMMON_FREE = frozenset(
    {"engine", "retries", "log_every", "checkpoint_every", "keep_checkpoints", "pictures_every", "tensorboard"}
)
"""Fields that a run may be taken up with other values of: they change what is kept and shown, and numbers by their
rounding at most (engine, which must stay for a resume to the last bit)."""


def check_fields(config: Any, ranges: Ranges, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Raises ValueError where a field, or an entry of a tuple, is out of its range or none of its choices.

    Those fields of `COMMON_RANGES` and `COMMON_CHOICES` that the config has are checked too, and the seed.
    """
    fields = vars(config)
    common = {name: bounds for name, bounds in COMMON_RANGES.items() if name in fields}
    for name, (low, high) in {**common, **ranges}.items():
        for value in values if isinstance(values := getattr(config, name), tuple) else (values,):
            if not low <= value <= high:
                raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value}")
    common_choices = {name: allowed for name, allowed in COMMON_CHOICES.items() if name in fields}
    for name, allowed in {**common_choices, **choices}.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")
    rng.make_key(config.seed)


def config_from_json(kind: type[Config], stored: Mapping[str, Any], name: str) -> Config:
    """The config that was stored as JSON, of what errors call `name`. Raises RunError if its fields are not ours."""
    try:
        return kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in stored.items()})
    except (TypeError, ValueError) as error:
        raise RunError(f"not the config of {name}: {error}") from error
