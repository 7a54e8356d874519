"""The judge passes real digits and nothing cheap."""

import json

import pytest
import torch
from torch import Tensor

from fastebm.data import digits
from fastebm.evaluation import DigitsEvaluation, evaluate_digits


@pytest.fixture(scope="module")
def real() -> Tensor:
    return digits("test")[0]


def test_held_out_digits_pass(real: Tensor) -> None:
    verdict = evaluate_digits(real)
    assert verdict.accuracy >= 0.97
    assert verdict.classes_found == 10
    assert verdict.confident_share == verdict.confident_share_real > 0.9
    assert verdict.passed
    assert sum(verdict.class_counts) == verdict.samples == len(real)
    assert json.loads(json.dumps(verdict.to_json()))["passed"] is True
    assert "was reached" in verdict.explain()


def test_noise_does_not_look_like_digits() -> None:
    noise = torch.rand(500, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    verdict = evaluate_digits(noise)
    assert not verdict.lifelike
    assert not verdict.passed
    assert verdict.confident_share < 0.05
    assert "NOT reached" in verdict.explain()


def test_copies_of_training_digits_are_not_original() -> None:
    verdict = evaluate_digits(digits("train")[0][:300])
    assert not verdict.original
    assert not verdict.passed


def test_one_class_is_not_varied(real: Tensor) -> None:
    _, labels = digits("test")
    verdict = evaluate_digits(real[labels == 3])
    assert verdict.classes_found <= 3
    assert verdict.largest_share > 0.9
    assert not verdict.varied


def test_a_class_is_found_with_a_hundredth_of_the_samples() -> None:
    counts = (991, 9, 0, 0, 0, 0, 0, 0, 0, 0)
    numbers = {"accuracy": 0.98, "confident_share": 0.5, "confident_share_real": 0.9, "distance_median": 2.0}
    distances = {"distance_first_percentile": 1.0, "distance_median_real": 2.0, "distance_first_percentile_real": 1.0}
    assert DigitsEvaluation(samples=1000, class_counts=counts, **numbers, **distances).classes_found == 1
    counts = (990, 10, 0, 0, 0, 0, 0, 0, 0, 0)
    assert DigitsEvaluation(samples=1000, class_counts=counts, **numbers, **distances).classes_found == 2


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (5, 8, 8), (5, 1, 4, 4), (5, 3, 8, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="samples must be finite"):
        evaluate_digits(torch.zeros(shape))


def test_samples_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="samples must be finite"):
        evaluate_digits(torch.full((2, 1, 8, 8), torch.nan))
