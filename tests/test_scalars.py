"""Numbers that callers hand over: the same ones are taken by every argument, and the same ones refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastebm
from fastebm import Cascade, Langevin, langevin_step, ops, rng
from fastebm.sampling import ExpandingCascade, constant, cosine, linear, polynomial
from fastebm.sampling.schedules import evaluate
from fastebm.scalars import as_count, as_device, as_int, as_real, in_float32

X = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)
ADDRESS: dict[str, Any] = {"step_size": 0.25, "noise_std": 0.5, "seed": 0}


def bowl(x: Tensor) -> Tensor:
    return 0.5 * x.square().sum((1, 2, 3))


SAMPLER = Langevin(bowl, 0.25, 0.5)
CASCADE = Cascade({2: bowl, 4: bowl}, step_size=0.25, num_steps=2)

REAL: dict[str, Callable[[Any], Tensor]] = {
    "step size of an update": lambda v: langevin_step(X, X, **{**ADDRESS, "step_size": v}),
    "noise of an update": lambda v: langevin_step(X, X, **{**ADDRESS, "noise_std": v}),
    "clamp of an update": lambda v: langevin_step(X, X, clamp=(None, v), **ADDRESS),
    "lower clamp of an update": lambda v: langevin_step(X, X, clamp=(v, 5), **ADDRESS),
    "clip of an update": lambda v: langevin_step(X, X, grad_clip=v, **ADDRESS),
    "norm clip of an update": lambda v: langevin_step(X, X, grad_norm_clip=v, **ADDRESS),
    "weight of an update": lambda v: langevin_step(X, X, data_term=(X.flip(0), v), **ADDRESS),
    "hinge of an update": lambda v: langevin_step(X, X, data_term=(X.flip(0), 1.0, v), **ADDRESS),
    "step size": lambda v: Langevin(bowl, v, 0.5).sample(X, 2, 0),
    "noise": lambda v: Langevin(bowl, 0.25, v).sample(X, 2, 0),
    "clamp": lambda v: Langevin(bowl, 0.25, 0.5, clamp=(None, v)).sample(X, 2, 0),
    "clip": lambda v: Langevin(bowl, 0.25, 0.5, grad_clip=v).sample(X, 2, 0),
    "norm clip": lambda v: Langevin(bowl, 0.25, 0.5, grad_norm_clip=v).sample(X, 2, 0),
    "weight": lambda v: SAMPLER.sample(X, 2, 0, data_term=(X.flip(0), v)),
    "hinge": lambda v: SAMPLER.sample(X, 2, 0, data_term=(X.flip(0), 1.0, v)),
    "weight in a cascade": lambda v: CASCADE.sample(x0=X, seed=0, data_term=(X.flip(0), v)),
    "constant": lambda v: evaluate(constant(v), 3),
    "linear": lambda v: evaluate(linear(v, 1), 3),
    "power": lambda v: evaluate(polynomial(1, 0, v), 3),
    "cosine": lambda v: evaluate(cosine(0, v), 3),
    "epsilon": lambda v: torch.tensor(list(fastebm.schedules.from_epsilon(v).values())),
    "beta of a blend": lambda v: ops.expand_blend(X, X.flip(0), v),
    "beta of a tail": lambda v: ops.block_tail(X, X.flip(0), fade=X[:, :, :2, :2], beta=v),
    "slope": lambda v: ops.block_tail(X, X, activation="leaky_relu", negative_slope=v),
    "beta of a cascade": lambda v: ExpandingCascade(
        lambda x, beta=1.0: bowl(x) * (1 + beta), size=4, beta=v, num_steps=4
    ).sample(2, 0, channels=1),
}
WHOLE: dict[str, Callable[[Any], Tensor]] = {
    "seed of an update": lambda v: langevin_step(X, X, **{**ADDRESS, "seed": v}),
    "step of an update": lambda v: langevin_step(X, X, step=v, **ADDRESS),
    "id of an update": lambda v: langevin_step(X, X, chain_ids=v, **ADDRESS),
    "seed of noise": lambda v: ops.normal((2, 3), seed=v),
    "stream of noise": lambda v: ops.uniform((2, 3), seed=0, stream=v),
    "shape of noise": lambda v: ops.normal((2, v), seed=0),
    "index": lambda v: rng.make_key(0, 0, v),
    "folded": lambda v: torch.tensor(rng.fold_in_seed(0, v) % 2**63),
    "num_steps": lambda v: SAMPLER.sample(X, v, 0),
    "seed": lambda v: SAMPLER.sample(X, 2, v),
    "id": lambda v: SAMPLER.sample(X, 2, 0, v),
    "start step": lambda v: SAMPLER.sample(X, 2, 0, start_step=v),
    "thin": lambda v: SAMPLER.sample(X, 4, 0, thin=v, keep="trajectory"),
    "num_chains": lambda v: SAMPLER.sample(X[:1], 2, 0, num_chains=v),
    "batch size": lambda v: SAMPLER.sample(X, 2, 0, batch_size=v),
    "updates": lambda v: SAMPLER.advance(SAMPLER.init(X, 0), v).x,
    "steps with a callback": lambda v: SAMPLER.sample(X, v, 0, keep=lambda k, x, info: None),
    "count": lambda v: CASCADE.sample(v, 0, channels=3),
    "channels": lambda v: CASCADE.sample(2, 0, channels=v),
    "start size": lambda v: CASCADE.sample(2, 0, channels=3, start_size=v),
    "seed of a cascade": lambda v: CASCADE.sample(2, v, channels=3),
    "steps of a level": lambda v: Cascade({4: bowl}, num_steps=v).sample(2, 0, channels=3),
    "size of a level": lambda v: Cascade({v: bowl}, num_steps=1).sample(2, 0, channels=3),
    "size of a growing net": lambda v: ExpandingCascade(lambda x, beta=1.0: bowl(x), size=v).sample(2, 0, channels=1),
    "steps of a schedule": lambda v: evaluate(linear(1, 0), v),
    "temperatures": lambda v: SAMPLER.temperature(v),
}
NO_NUMBERS = {
    "True": True,
    "numpy's True": np.bool_(True),
    "a tensor of True": torch.tensor(True),
    "a text": "2",
    "complex": 2j,
    "a complex tensor": torch.tensor(2j),
    "a list": [2],
    "an array of one": np.array([2]),
    "on no device": torch.tensor(2, device="meta"),
}


@pytest.mark.parametrize("argument", REAL)
def test_real_numbers_of_every_kind_are_one_number(argument: str) -> None:
    use, expected = REAL[argument], REAL[argument](0.5)
    half: list[Any] = [np.float32(0.5), np.float64(0.5), np.float16(0.5), np.array(0.5), Fraction(1, 2)]
    for number in (*half, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.5).bfloat16()):
        torch.testing.assert_close(use(number), expected, rtol=0, atol=0 if "cascade" not in argument else 1e-3)
    expected = use(1.0)
    for one in (1, np.int64(1), np.uint8(1), Fraction(1), torch.tensor(1)):
        assert torch.equal(use(one), expected)


@pytest.mark.parametrize("argument", WHOLE)
def test_whole_numbers_of_every_kind_are_one_number(argument: str) -> None:
    use, expected = WHOLE[argument], WHOLE[argument](2)
    for number in (np.int64(2), np.int32(2), np.uint8(2), np.array(2), torch.tensor(2), torch.tensor(2).int()):
        if argument == "size of a level" and isinstance(number, np.ndarray):
            continue  # arrays are no keys of a dictionary
        assert torch.equal(use(number), expected)


@pytest.mark.parametrize("wrong", NO_NUMBERS)
@pytest.mark.parametrize("argument", [*REAL, *WHOLE])
def test_what_is_no_number_is_refused(argument: str, wrong: str) -> None:
    with pytest.raises((TypeError, ValueError)) as refused:
        (REAL | WHOLE)[argument](NO_NUMBERS[wrong])
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("wrong", [2.5, 2.0, np.float32(2), Fraction(2), torch.tensor(2.0), math.nan, "2.5"], ids=str)
@pytest.mark.parametrize("argument", WHOLE)
def test_counts_are_never_rounded(argument: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"must be an integer.* got"):
        WHOLE[argument](wrong)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, -1.0, 10**400, 1e60, -1e60], ids=str)
@pytest.mark.parametrize("argument", REAL)
def test_numbers_out_of_range_are_refused_in_one_line(argument: str, wrong: Any) -> None:
    allowed = {
        "clamp": (math.inf, -1.0, 1e60),
        "lower clamp": (-math.inf, -1.0, -1e60),
        "clip": (math.inf, 1e60),
        "norm clip": (math.inf, 1e60),
        "weight of an update": (-1.0,),
        "hinge": (1e60,),
        "slope": (math.nan, math.inf, -math.inf, -1.0, 1e60, -1e60),
        **dict.fromkeys(("constant", "linear", "cosine"), (-1.0, 1e60, -1e60)),
        "power": (1e60,),
        "epsilon": (1e60,),
    }
    if wrong in allowed.get(argument, allowed.get(argument.removesuffix(" of an update"), ())) or (
        argument == "slope" and wrong != 10**400
    ):
        REAL[argument](wrong)  # a limit that is never reached, or a number that stands for itself
        return
    with pytest.raises(ValueError) as refused:
        REAL[argument](wrong)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("wrong", [-1, 2**63, 2**64, 10**30])
@pytest.mark.parametrize("argument", WHOLE)
def test_counts_out_of_range_are_refused_in_one_line(argument: str, wrong: int) -> None:
    fits = {"batch size", "thin"} if wrong > 0 else set()
    if (argument in fits) or ("seed" in argument and wrong <= 2**63):
        WHOLE[argument](wrong)
        return
    with pytest.raises((ValueError, RuntimeError)) as refused:
        WHOLE[argument](wrong)
    assert len(str(refused.value).splitlines()) == 1


def test_conversions() -> None:
    assert as_int("n", torch.tensor(7)) == 7
    assert type(as_int("n", np.int32(7))) is int
    assert type(as_real("r", np.float32(0.1))) is float
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        as_count("n", 0, 1)
    with pytest.raises(ValueError, match="n must not be negative, got -1"):
        as_count("n", -1)
    for value in (1e-46, 8e-46, 3.40282346e38, 3.4028236e38, -1e39, 0.1, 0.0):
        rounded = float(torch.tensor(value, dtype=torch.float32))
        assert (in_float32(value) == 0, math.isinf(in_float32(value))) == (rounded == 0, math.isinf(rounded)), value


def test_a_gpu_of_a_torch_without_cuda_is_refused(monkeypatch):
    """By torch, it is an assertion somewhere within."""
    assert as_device("cpu") == as_device(torch.device("cpu")) == torch.device("cpu")
    assert as_device("meta").type == "meta"
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    assert as_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    for refused in (lambda: as_device("cuda:0"), lambda: fastebm.ops.normal((1, 2), seed=0, device="cuda:0")):
        with pytest.raises(RuntimeError, match=r"^device 'cuda:0' was given, but torch .* is built without CUDA$"):
            refused()
