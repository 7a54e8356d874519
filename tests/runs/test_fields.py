"""Values are checked against type hints, and every setting of every method refuses what is not of its kind."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from fastebm.data.sources import ImageSource, source_from_json
from fastebm.runs.fields import checked, shown
from fastebm.training import CoarseToFineConfig, ECFlowConfig, ECPosteriorConfig, ECVAEConfig, RunError
from fastebm.training.trainer.config import TrainerConfig, ranges_of

CONFIGS: list[TrainerConfig] = [
    CoarseToFineConfig(sizes=(4, 8), iterations=(1, 2), batch_sizes=(4, 4), learning_rates=(1e-3, 1e-3)),
    ECVAEConfig(),
    ECPosteriorConfig(),
    ECFlowConfig(),
]
FIELDS = [(config, field.name) for config in CONFIGS for field in dataclasses.fields(config)]
"""Every field of every config, so that new ones are covered too."""
NEVER: list[Any] = [
    None,
    {},
    {1},
    object(),
    b"8",
    1j,
    math.nan,
    math.inf,
    -math.inf,
    10**31,
    "a text",
    [[8]],
    torch.ones(2),
]
"""Values that no field takes, but for a text."""


def hint_of(config: TrainerConfig, name: str) -> Any:
    return typing.get_type_hints(type(config))[name]


def wrong_values(hint: Any) -> list[Any]:
    wrong = [value for value in NEVER if not (hint is str and isinstance(value, str))]
    if hint is int:
        wrong += ["8", 2.5, 2.0, True, np.float64(2), torch.tensor(2.5), torch.tensor(True), Fraction(2), (8,)]
    elif hint is float or hint == float | None:
        wrong = [value for value in wrong if value is not None or hint is float]
        wrong += ["0.5", True, np.bool_(True), (0.5,), 10**400]
    elif hint is bool:
        wrong += ["True", 1, 0, 1.0]
    elif typing.get_origin(hint) is Literal:
        wrong += ["", True, 2.5, 99, ("auto",)]
    elif typing.get_origin(hint) is tuple:
        wrong += ["8", 8, (None,), ("8",), (True, True), (math.nan, math.nan), (), "48", {4: 8}]
    elif hint is str:
        wrong += [8, 2.5, True, ("a",)]
    else:
        raise AssertionError(f"a field of type {hint} needs wrong values here")
    return wrong


@pytest.mark.parametrize(("config", "name"), FIELDS, ids=[f"{type(config).__name__}-{name}" for config, name in FIELDS])
def test_every_field_refuses_what_is_not_of_its_type_in_one_line(config: TrainerConfig, name: str) -> None:
    for value in wrong_values(hint_of(config, name)):
        with pytest.raises((TypeError, ValueError)) as refusal:
            dataclasses.replace(config, **{name: value})
        said = str(refusal.value)
        assert "\n" not in said
        assert len(said) < 300
        assert name in said
        with pytest.raises(RunError, match="not the config of a run"):
            type(config).from_json({**dataclasses.asdict(config), name: value})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_every_number_has_a_range_or_is_the_seed(config: TrainerConfig) -> None:
    numeric = {
        field.name
        for field in dataclasses.fields(config)
        if {int, float} & {hint_of(config, field.name), *typing.get_args(hint_of(config, field.name))}
    }
    assert numeric - {"seed"} == set(ranges_of(type(config)))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_real_scalars_are_numbers_and_become_those_of_python(config: TrainerConfig) -> None:
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hint_of(config, field.name)
        given: list[Any] = []
        if hint is int:
            given = [np.int64(value), torch.tensor(value), np.array(value)]
        elif hint is float:
            given = [np.float64(value), torch.tensor(value, dtype=torch.float64), np.array(value)]
        elif hint is bool:
            given = [np.bool_(value), torch.tensor(value)]
        elif isinstance(value, tuple):
            given = [list(value), tuple(np.asarray(value)), tuple(torch.tensor(value, dtype=torch.float64).numpy())]
            given = given if float in typing.get_args(hint) else given[:2]
        for scalar in given:
            made = dataclasses.replace(config, **{field.name: scalar})
            assert made == config
            assert type(getattr(made, field.name)) is type(value)
            json.dumps(dataclasses.asdict(made))
    assert dataclasses.replace(config, lr_decay=np.float32(0.25), max_loss=7).max_loss == 7.0


def test_sizes_are_powers_of_two_and_fit() -> None:
    for sizes in ((6, 12), (2, 4), (512, 1024)):
        with pytest.raises(ValueError, match="sizes must"):
            dataclasses.replace(CONFIGS[0], sizes=sizes)
    for config in CONFIGS[1:]:
        with pytest.raises(ValueError, match="size must be a power of two, got 12"):
            dataclasses.replace(config, size=12)


def test_stored_settings_that_are_unknown_or_missing_are_named() -> None:
    stored = dataclasses.asdict(CONFIGS[0])
    with pytest.raises(RunError, match="it has no field 'colour'"):
        CoarseToFineConfig.from_json({**stored, "colour": 3})
    del stored["sizes"]
    with pytest.raises(RunError, match="the field sizes is missing"):
        CoarseToFineConfig.from_json(stored)


@pytest.mark.parametrize(
    ("hint", "value", "result"),
    [
        (int | None, None, None),
        (int | None, np.int8(3), 3),
        (Path, "a/b", Path("a/b")),
        (Path | None, Path("a"), Path("a")),
        (dict[str, Any], {"a": [1]}, {"a": [1]}),
        (list[int], (1, 2), [1, 2]),
        (tuple[int, ...], [], ()),
        (tuple[float, float], [1, 0.5], (1.0, 0.5)),
        (Literal["a", 2], np.int64(2), 2),
        (float, Fraction(1, 4), 0.25),
        (Any, NEVER, NEVER),
    ],
)
def test_values_of_their_type_are_taken(hint: Any, value: Any, result: Any) -> None:
    assert checked("it", value, hint) == result


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (int, 2.5, "it must be a whole number, got 2.5"),
        (float, "x" * 999, "it must be a number, got 'xxx"),
        (dict[str, int], {"a": "b"}, r"it\['a'\] must be a whole number, got 'b'"),
        (dict[str, int], [1], r"it must be an object with named entries, got \[1\]"),
        (dict[str, int], {3: 1}, "a name in it must be a text, got 3"),
        (tuple[float, float], (1.0,), r"it must have 2 entries, got \(1.0,\)"),
        (Literal["a", 2], 2.0, "it must be one of a, 2, got 2.0"),
        (int | None, "1", "it must be a whole number, got '1'"),
        (Path, 3, "it must be a path, got 3"),
        (int, torch.tensor(3, device="meta"), "it must be a whole number, got tensor"),
    ],
)
def test_other_values_are_named(hint: Any, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        checked("it", value, hint)


def test_values_are_shown_on_one_short_line() -> None:
    assert shown("a\nb") == "'a\\nb'"
    assert shown(10**5000) == "a number of thousands of digits"
    assert len(shown(10**300)) < 70
    assert "\n" not in shown(torch.zeros(3, 3))


@pytest.mark.parametrize(
    "stored", [{}, {"path": 3}, {"path": "a", "size": "8"}, {"path": "a", "fit": "x"}, {"set": "x"}]
)
def test_a_stored_source_of_images_is_checked(stored: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="the stored fields are not a source of images"):
        source_from_json(stored)
    assert source_from_json({"path": "a", "size": 8}) == ImageSource(Path("a"), 8)
