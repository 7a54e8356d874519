"""What follows from a configuration for each iteration, and what is refused."""

import dataclasses
import inspect
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastebm.training import PRESETS, CoarseToFineConfig, RunError
from fastebm.training.coarse_to_fine import presets
from fastebm.training.coarse_to_fine.run import new_net

CONFIG = CoarseToFineConfig(
    sizes=(8, 16, 32),
    iterations=(10, 20, 40),
    batch_sizes=(256, 128, 64),
    learning_rates=(1e-3, 2e-3, 4e-3),
    fade=0.5,
    lr_decay=0.25,
)


def test_stages_know_what_came_before() -> None:
    first, second, third = CONFIG.stages
    assert (first.size, first.first_iteration, first.first_image) == (8, 0, 0)
    assert (second.size, second.first_iteration, second.first_image) == (16, 10, 2560)
    assert (third.size, third.first_iteration, third.first_image) == (32, 30, 5120)
    assert (CONFIG.total_iterations, CONFIG.total_chains) == (70, 7680)
    assert [CONFIG.stage_at(k).size for k in (0, 9, 10, 29, 30, 69, 70)] == [8, 8, 16, 16, 32, 32, 32]


def test_beta_rises_over_the_first_part_of_each_later_stage() -> None:
    assert [CONFIG.beta_at(k) for k in (0, 5, 9)] == [1.0, 1.0, 1.0]
    assert [CONFIG.beta_at(k) for k in (10, 15, 19, 20, 29)] == [0.0, 0.5, 0.9, 1.0, 1.0]
    assert [CONFIG.beta_at(k) for k in (30, 40, 50, 69)] == [0.0, 0.5, 1.0, 1.0]
    assert dataclasses.replace(CONFIG, fade=0.0).beta_at(10) == 1.0


def test_the_learning_rate_falls_to_a_tenth_at_the_end_of_a_stage() -> None:
    rates = [CONFIG.learning_rate_at(k) for k in range(30, 70)]
    assert rates[:30] == [4e-3] * 30
    assert rates[30] == pytest.approx(4e-3)
    assert all(low < high for high, low in itertools.pairwise(rates[30:]))
    assert rates[-1] == pytest.approx(4e-3 * (0.1 + 0.9 / 10))
    assert dataclasses.replace(CONFIG, lr_decay=0.0).learning_rate_at(69) == 4e-3


def test_json_gives_the_config_back() -> None:
    assert CoarseToFineConfig.from_json(json.loads(json.dumps(dataclasses.asdict(CONFIG)))) == CONFIG
    for stored in (
        {},
        {**dataclasses.asdict(CONFIG), "colour": 3},
        {**dataclasses.asdict(CONFIG), "num_steps": "many"},
    ):
        with pytest.raises(RunError, match="not the config"):
            CoarseToFineConfig.from_json(stored)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": (10, 20)}, "entry of its own in sizes, iterations"),
        ({"sizes": (), "iterations": (), "batch_sizes": (), "learning_rates": ()}, "entry of its own in sizes"),
        ({"sizes": (8, 16, 64)}, "twice the one before"),
        ({"iterations": (10, 0, 5)}, "iterations must lie in .* got 0"),
        ({"learning_rates": (1e-3, 1e-3, float("nan"))}, "learning_rates must lie in"),
        ({"fade": 1.5}, "fade must lie in"),
        ({"adam_betas": (0.5, 1.0)}, "adam_betas must lie in"),
        ({"noise_start": -1.0}, "noise_start must lie in"),
        ({"seed": 2**64}, "seed must be in"),
        ({"variant": "growing"}, "variant must be one of cascade, expanding, got 'growing'"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"engine": "magic"}, "engine must be one of"),
        ({"retry_lr_factor": 0.0}, "retry_lr_factor must lie in"),
        ({"max_batch": -1}, "max_batch must lie in"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


RUN = ("digits", "mnist", "pictures")
RESULTS = Path(__file__).parents[3] / "docs" / "results"


def test_presets_make_nets_and_say_whether_they_were_run() -> None:
    lines = inspect.getsource(presets).splitlines()
    for name, preset in PRESETS.items():
        assert isinstance(preset, CoarseToFineConfig)
        with torch.device("meta"):  # spectral norms change no shape, and their first iterations take seconds there
            new_net(dataclasses.replace(preset, spectral_norm=False))
        said = lines[next(k for k, line in enumerate(lines) if line.startswith(f"{name.upper()} = ")) :]
        ending = f'Run: docs/results/{name} has the result."""' if name in RUN else 'Not run."""'
        assert next(line for line in said if line.startswith('"""')).endswith(ending)
        assert ending.startswith("Not") or (RESULTS / name / "README.md").is_file()


def test_mutable_fields_exist() -> None:
    assert {field.name for field in dataclasses.fields(CoarseToFineConfig)} > CoarseToFineConfig.mutable_fields
