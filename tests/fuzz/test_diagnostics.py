"""Diagnostics of hostile chains: the same bits by any route, and a verdict whatever the numbers are."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from typing import Any

import torch

from fastebm.sampling.diagnostics import ChainSummary, Diagnostics


def trajectory(
    draw: random.Random, num_updates: int, shape: tuple[int, ...], generator: torch.Generator
) -> torch.Tensor:
    """States (n, B, ...): at rest, wandering, stuck, apart, beyond what a float holds, or not numbers at all."""
    kind = draw.choice(["rest", "walk", "stuck", "apart", "huge", "tiny", "hole", "mixed"])
    x = torch.randn(num_updates, *shape, generator=generator, dtype=draw.choice([torch.float32, torch.float64]))
    if kind == "walk":
        return x.cumsum(0)
    if kind == "stuck":
        return x[:1].expand(x.shape) if draw.random() < 0.5 else torch.full_like(x, draw.choice([0.0, -0.0, 3.5]))
    if kind == "apart":
        return x + 1e6 * torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    if kind in ("huge", "tiny"):
        return x * (1e37 if kind == "huge" else 1e-42)
    if kind in ("hole", "mixed"):
        x = x.clone()
        number = draw.choice([math.nan, math.inf, -math.inf])
        x[draw.randrange(num_updates), draw.randrange(shape[0])] = number
        if kind == "mixed":
            x[:, draw.randrange(shape[0])] = 1.0
    return x


def bits(summary: ChainSummary) -> list[Any]:
    """All values of a summary, in which NaN is like NaN."""
    found: list[Any] = []
    for value in vars(summary).values():
        parts = vars(value).values() if hasattr(value, "__dataclass_fields__") else [value]
        found += [
            part.nan_to_num(nan=7.25).tolist() if isinstance(part, torch.Tensor) else repr(part) for part in parts
        ]
    return found


def fed(diagnostics: Diagnostics, updates: list[dict[str, Any]], rows: slice, stops: set[int]) -> Diagnostics:
    """The updates of some chains, with a state saved and loaded at each of `stops`."""
    for number, update in enumerate(updates):
        if number in stops:
            loaded = diagnostics.fresh()
            loaded.load_state_dict(diagnostics.state_dict())
            diagnostics = loaded
        diagnostics.update(**{name: value[rows] for name, value in update.items()})
    return diagnostics


def test_any_route_gives_the_same_bits_and_a_verdict(tries: int) -> None:
    for number in range(tries):
        draw, generator = random.Random(number), torch.Generator().manual_seed(number)
        chains, num_updates = draw.choice([1, 2, 3, 5, 8, 70]), draw.choice([1, 2, 3, 5, 31, 32, 33, 64, 100])
        shape = (chains, *draw.choice([(1,), (2,), (3, 5), (1100,), (2, 1, 3)]))
        x = trajectory(draw, num_updates + 1, shape, generator)
        flat = x.flatten(2)
        given: dict[str, torch.Tensor] = {"x": x[1:], "before": x[:-1]}
        for name, values in {
            "energy": flat.sum(2)[:-1],
            "gradient": x[:-1] * draw.choice([0.0, 1.0, 1e30]),
            "accepted": flat[:-1, :, 0] > 0,
            "energy_error": 2000 * flat[:-1, :, 0],
        }.items():
            if draw.random() < 0.6:
                given[name] = values
        updates = [{name: value[k] for name, value in given.items()} for k in range(num_updates)]
        options: dict[str, Any] = {
            "lags": draw.choice([1, 2, 5, 63, 200]),
            "projections": draw.choice([0, 1, 3]),
            "moments": draw.random() < 0.7,
            "keep_scalars": draw.random() < 0.3,
            "temperature": draw.choice([None, 0.0, 1.0, (1.0, 0.0)]),
        }
        if draw.random() < 0.4:
            options["superchains"] = torch.arange(chains) // draw.choice(
                [each for each in (1, 2, 5) if not chains % each]
            )
        whole = fed(Diagnostics(**options), updates, slice(None), set())
        cuts = sorted({0, chains, *(draw.randrange(chains + 1) for _ in range(2))})
        parts = []
        for first, last in itertools.pairwise(cuts):
            stops = {draw.randrange(num_updates) for _ in range(2)}
            parts.append(fed(Diagnostics(**options).fresh(first, last), updates, slice(first, last), stops))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            summary = whole.summary()
            assert bits(summary) == bits(Diagnostics.concatenate(parts).summary()), number
            said, table = summary.verdict(), str(summary)
        assert said, number
        assert all(line.endswith(".") and "\n" not in line for line in said), (number, said)
        assert len(table.splitlines()) >= 2 + len(summary.names), number
        finite = bool(x.isfinite().all()) and float(x.abs().max()) < 1e6
        if finite and num_updates > 4:
            assert bool(summary.finite.all()), number
            largest = num_updates * chains * max(1.0, math.log10(num_updates * chains))
            assert bool((summary.ess.nan_to_num(nan=0.0) <= largest * (1 + 1e-9)).all()), number
