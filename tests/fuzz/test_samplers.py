"""Random arguments of updates, chains and cascades: the value of a plain loop in float64, or a refusal in one line."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastebm import Cascade, Langevin, langevin_step, ops, rng
from fastebm.compiler import energy_gradient
from fastebm.sampling import ChainState, linear

SEED = 15
REFUSALS = (ValueError, TypeError, RuntimeError, FloatingPointError)
Options = dict[str, Any]


def values(draw: random.Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    return torch.randn(shape, generator=generator).to(dtype)


def number(draw: random.Random, low: float, high: float) -> Any:
    """A real number, of any kind, that float32 holds exactly."""
    value = float(np.float32(draw.uniform(low, high)))
    kinds: list[Callable[[float], Any]] = [float, np.float32, np.float64, Fraction, torch.tensor, np.array]
    return draw.choice(kinds)(value)


def laid_out(draw: random.Random, x: Tensor) -> Tensor:
    """The same values somewhere else in memory."""
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t,
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    ]
    return draw.choice(layouts)(x)


def legal(draw: random.Random, x: Tensor) -> Options:
    """Options of an update or chain, each of which may be left out."""
    sample, options = tuple(x.shape[1:]), Options()
    side = draw.choice([sample, (1, *sample), tuple(x.shape), (1,) * x.dim()])
    channel = (sample[0], *(1,) * (len(sample) - 1)) if sample else None
    if draw.random() < 0.6:
        bounds = [
            draw.choice([None, number(draw, 0.0, 0.5), *(values(draw, *s).abs() for s in (channel, sample) if s)])
            for _ in range(2)
        ]
        options["clamp"] = (None if bounds[0] is None else -1 * bounds[0], bounds[1])
    if draw.random() < 0.6:
        options[draw.choice(["grad_clip", "grad_norm_clip"])] = number(draw, 0.1, 2.0)
    if draw.random() < 0.6:
        mask = values(draw, *side) > 0
        options["mask"] = draw.choice([mask, mask.float(), mask.int()])
        options["known"] = values(draw, *side)
    if draw.random() < 0.6:
        options["data_term"] = (values(draw, *side), number(draw, 0.0, 1.0), number(draw, 0.0, 4.0))
    return options


def illegal(draw: random.Random, x: Tensor, options: Options) -> Options:
    """Options of which one is wrong."""
    sample = tuple(x.shape[1:])
    odd = draw.choice([math.nan, -1.0, True, "1", None, [0.5], 1j, 10**400, torch.ones(2, 2), torch.tensor(True)])
    more = tuple(n + 1 for n in x.shape)
    wrong: list[Options] = [
        {"step_size": draw.choice([odd, 0.0, math.inf, 1e-60, 1e60])},
        {"noise_std": draw.choice([odd, math.inf, 1e60])},
        {"grad_clip": draw.choice([0.0, math.nan, -1.0, True, "1", 1e-60]), "grad_norm_clip": None},
        {"grad_clip": 1.0, "grad_norm_clip": 1.0},
        {"clamp": draw.choice([(1.0, -1.0), (math.nan, 1.0), 1.0, (1,), (math.inf, None), (None, "1"), (True, None)])},
        {
            "clamp": draw.choice(
                [(values(draw, *more), None), (None, values(draw, 1, *more)), (torch.ones(sample), 0.0)]
            )
        },
        {"clamp": (torch.full((1,) * len(sample), math.nan), None)} if sample else {"clamp": "clamp"},
        {"mask": torch.ones(more), "known": torch.zeros(x.shape)},
        {"mask": torch.ones(x.shape), "known": torch.zeros(more)},
        {"mask": torch.full(x.shape, 0.5), "known": torch.zeros(x.shape)},
        {"mask": torch.ones(x.shape), "known": torch.zeros(x.shape, dtype=torch.int64)},
        {"mask": torch.ones(x.shape), "known": None},
        {"mask": None, "known": torch.zeros(x.shape)},
        {"mask": [True], "known": torch.zeros(x.shape)},
        {"data_term": draw.choice([torch.zeros(x.shape), (torch.zeros(x.shape),), (0.0, 1.0), "pull"])},
        {"data_term": (torch.zeros(more), 1.0)},
        {"data_term": (torch.zeros(x.shape), draw.choice([math.nan, math.inf, True, "1", 1e60]))},
        {"data_term": (torch.zeros(x.shape), 1.0, draw.choice([math.nan, math.inf, -1.0, True, "1"]))},
        {"seed": draw.choice([2**64, -(2**63) - 1, 0.5, "0", True, 10**30])},
        {"chain_ids": draw.choice([-1, 2**56, 0.5, True, torch.arange(len(x) + 2), torch.zeros(len(x)), [0]])},
    ]
    return options | draw.choice(wrong)


def by_chain(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape(-1, *(1,) * (x.dim() - 1))


def plain_update(x: Tensor, grad: Tensor, noise: Tensor, step_size: Any, noise_std: Any, **options: Any) -> Tensor:
    """The update as docs/operators.md writes it, in float64."""
    g = grad.double()
    if options.get("grad_clip") is not None:
        g = g.clamp(-float(options["grad_clip"]), float(options["grad_clip"]))
    if options.get("grad_norm_clip") is not None:
        norm = g.reshape(len(x), -1).norm(dim=1)
        g = g * by_chain((float(options["grad_norm_clip"]) / norm).clamp(max=1), x)
    if options.get("data_term") is not None:
        target, weight, hinge = options["data_term"]
        pull = x - target.double()
        far = pull.reshape(len(x), -1).square().sum(1) > float(hinge)
        g = g + float(weight) * pull * by_chain(far | (float(hinge) == 0), x)
    step_size, noise_std = (
        by_chain(v.double(), x) if isinstance(v, Tensor) and v.dim() else float(v) for v in (step_size, noise_std)
    )
    x = x - step_size * g + noise_std * noise.double()
    for bound, limited in zip(options.get("clamp") or (None, None), (torch.maximum, torch.minimum), strict=True):
        if bound is not None:
            x = limited(x, torch.as_tensor(bound if isinstance(bound, Tensor) else float(bound), dtype=torch.float64))
    mask = options.get("mask")
    return x if mask is None else torch.where(mask != 0, options["known"].double(), x)


def shapes(draw: random.Random) -> tuple[int, ...]:
    batch = draw.choice([1, 2, 3, 5])
    return draw.choice([(batch, 7), (batch, 3, 4, 4), (batch, 2, 3, 5), (batch, 1, 33, 32), (batch, 3, 1, 2)])


def judged(failures: list[str], what: str, found: Callable[[], Tensor], wanted: Tensor | None, near: float) -> None:
    """Notes a value that is not `wanted`, an error where there is one, and anything but a line where there is none."""
    try:
        value = found()
    except Exception as error:
        if wanted is not None:
            failures.append(f"{what}: {type(error).__name__}: {error}")
        elif not isinstance(error, REFUSALS) or len(str(error).splitlines()) != 1:
            failures.append(f"{what}: no line but {type(error).__name__}: {error}")
        return
    if wanted is None:
        failures.append(f"{what}: taken")
    elif value.shape != wanted.shape or not torch.allclose(
        value.double(), wanted, rtol=near, atol=near, equal_nan=True
    ):
        failures.append(f"{what}: wrong by {float((value - wanted).abs().max())}")


def test_updates(tries: int) -> None:
    failures: list[str] = []
    for k in range(tries):
        draw = random.Random(SEED * 10**6 + k)
        shape = shapes(draw)
        dtype = draw.choice([torch.float32, torch.float32, torch.float64])
        x, grad = values(draw, *shape, dtype=dtype), values(draw, *shape)
        options = {
            "step_size": draw.choice([number(draw, 0.01, 0.5), values(draw, shape[0]).abs() + 0.01]),
            "noise_std": draw.choice([0, number(draw, 0.0, 0.5), values(draw, shape[0]).abs()]),
            "seed": draw.choice([0, -1, 2**64 - 1, np.int64(7), torch.tensor(3)]),
            "step": draw.choice([0, 2**32 - 1, np.uint32(5)]),
            "chain_ids": draw.choice([0, 2**56 - shape[0], torch.randperm(shape[0]) * 2**40]),
            **legal(draw, x),
        }
        wrong = draw.random() < 0.4
        if wrong:
            options = illegal(draw, x, options)
            wanted = None
        else:
            noise = ops.normal(shape, **{name: options[name] for name in ("seed", "step", "chain_ids")})
            wanted = plain_update(x.double(), grad, noise, **{n: v for n, v in options.items() if n != "seed"})
        for in_place in (False, True):
            state = laid_out(draw, x.clone())
            gradient = laid_out(draw, grad)

            def update(state=state, gradient=gradient, in_place=in_place, options=options) -> Tensor:
                return langevin_step(state, gradient, **options, inplace=in_place)

            judged(failures, f"try {k}, in place {in_place}, {options}", update, wanted, 1e-5)
            if wrong and not torch.equal(state, x):
                failures.append(f"try {k}: refused, but the state has changed")
    assert not failures, "\n".join(failures[:10])


def quartic(x: Tensor) -> Tensor:
    return (0.1 * x**4 - 0.5 * x.square()).reshape(len(x), -1).sum(1)


def run_chains(
    gradient: Any, draw: random.Random, x0: Tensor, num_steps: int, rates: Options, settings: Options
) -> Tensor:
    """The ends of chains, by one of the ways to get there."""
    sampler = Langevin(gradient, **rates)
    way = draw.choice(["whole", "batches", "trajectory", "states"])
    if way == "states":
        state = sampler.init(x0, **settings, num_steps=num_steps)
        half = draw.randint(0, num_steps)
        state = ChainState.from_state_dict(sampler.advance(state, half).state_dict())
        return sampler.advance(state, num_steps - half).x
    if way == "trajectory":
        return sampler.sample(x0, num_steps, **settings, keep="trajectory")[-1]
    return sampler.sample(x0, num_steps, **settings, batch_size=2 if way == "batches" else None)


def test_chains(tries: int) -> None:
    """Chains by steps of any split, with a schedule, against a loop in float64."""
    failures: list[str] = []
    gradient = energy_gradient(quartic)
    for k in range(max(tries // 4, 10)):
        draw = random.Random(SEED * 10**7 + k)
        shape = shapes(draw)
        x0, num_steps = values(draw, *shape), draw.randint(0, 4)
        start, end = (float(np.float32(draw.uniform(0.01, 0.3))) for _ in range(2))
        options = legal(draw, x0)
        limits = {name: options.pop(name) for name in ("clamp", "grad_clip", "grad_norm_clip") if name in options}
        first_id, start_step = draw.choice([0, 5, 2**40]), draw.choice([0, 3, 2**32 - 10])
        wanted: Tensor | None = x0.double()
        if draw.random() < 0.4:
            bad = illegal(draw, x0, limits | options)
            step_size, noise_std = bad.pop("step_size", linear(start, end)), bad.pop("noise_std", 0.1)
            limits = {name: bad.pop(name) for name in ("clamp", "grad_clip", "grad_norm_clip") if name in bad}
            options, wanted = bad, None
        else:
            step_size, noise_std = linear(start, end), number(draw, 0.0, 0.3)
            if "mask" in options:
                wanted = torch.where(options["mask"] != 0, options["known"].double(), wanted)
            for i in range(num_steps):
                time = i / (num_steps - 1) if num_steps > 1 else 0.0
                ids = torch.arange(shape[0]) + first_id
                noise = ops.normal(shape, seed=1, step=start_step + i, chain_ids=ids)
                grad = 0.4 * wanted**3 - wanted
                eta = start * (1 - time) + end * time
                wanted = plain_update(wanted, grad, noise, eta, noise_std, **options, **limits)

        settings = {"seed": 1, "chain_ids": first_id, "start_step": start_step, **options}
        rates = {"step_size": step_size, "noise_std": noise_std, **limits}
        sample = functools.partial(run_chains, gradient, draw, x0, num_steps, rates, settings)
        judged(failures, f"try {k}, {num_steps} steps of {shape}, {limits}, {options}", sample, wanted, 1e-4)
    assert not failures, "\n".join(failures[:10])


def test_cascades(tries: int) -> None:
    """Counts, sizes and constraints of cascades: ends that hold what was asked, or a line."""
    failures: list[str] = []
    cascade = Cascade({2: quartic, 4: quartic}, num_steps=2, step_size=0.1, noise_std=0.1)
    for k in range(max(tries // 4, 10)):
        draw = random.Random(SEED * 10**8 + k)
        count, channels = draw.choice([0, 1, 3, np.int64(2)]), draw.choice([1, 2, np.int64(3)])
        options: Options = {"count": count, "channels": channels, "seed": 0}
        wrong = draw.random() < 0.5
        if wrong:
            one = torch.ones(4, 4)
            options |= draw.choice(
                [
                    {"count": draw.choice([2.5, -1, 2**63, 10**30, True, "2", None])},
                    {"channels": draw.choice([0, -1, 1.5, 10**30, True, "2"])},
                    {"start_size": draw.choice([3, 8, 0, -2, 2.0, 10**30, True])},
                    {"thin": draw.choice([0, 1.5, True])},
                    {"batch_size": draw.choice([0, -1, 1.5, True])},
                    {"start_step": draw.choice([-1, 2**32, 0.5])},
                    {"chain_ids": draw.choice([-1, 2**56, torch.arange(7)])},
                    {"x0": torch.zeros(5, int(channels), 4, 4)},
                    {"x0": torch.zeros(int(count), int(channels) + 1, 4, 4)},
                    {"x0": torch.zeros(int(count), int(channels), 4, 4).double()},
                    {"mask": one, "known": torch.zeros(7, int(channels), 4, 4)},
                    {"mask": {3: one}, "known": {3: one}},
                    {"mask": one},
                    {"data_term": draw.choice([one, (one,), (0.0, 1.0), (torch.zeros(5), 1.0)])},
                    {"data_term": (torch.zeros(1), draw.choice([-1.0, math.nan, "1", True, torch.ones(3)]))},
                ]
            )
        else:
            if draw.random() < 0.5:
                options["mask"], options["known"] = values(draw, 4, 4) > 0, values(draw, int(channels), 4, 4)
            if draw.random() < 0.5:
                weight = draw.choice([number(draw, 0.0, 100.0), linear(0.0, 50.0)])
                options["data_term"] = (values(draw, int(channels), 4, 4), weight)
            if draw.random() < 0.5:
                options["start_size"] = draw.choice([2, 4])
            if draw.random() < 0.5 and count > 0:
                options["x0"] = values(draw, draw.choice([1, int(count)]), int(channels), 4, 4)
        try:
            ends = cascade.sample(**options)
        except Exception as error:
            if not wrong or not isinstance(error, REFUSALS) or len(str(error).splitlines()) != 1:
                failures.append(f"try {k}, {options}: {type(error).__name__}: {error}")
            continue
        if wrong:
            failures.append(f"try {k}, {options}: taken")
        elif ends.shape != (count, channels, 4, 4) or not ends.isfinite().all():
            failures.append(f"try {k}, {options}: {tuple(ends.shape)}")
        elif "mask" in options and not torch.equal(
            ends[:, :, options["mask"]], options["known"][:, options["mask"]].expand_as(ends[:, :, options["mask"]])
        ):
            failures.append(f"try {k}, {options}: known pixels are lost")
        elif not torch.equal(cascade.sample(**options, batch_size=2), ends):
            failures.append(f"try {k}, {options}: batches give other bits")
    assert not failures, "\n".join(failures[:10])


def test_states(tries: int) -> None:
    """A saved state of which something was changed: refused in one line, or a state from which chains run."""
    failures: list[str] = []
    sampler = Langevin(quartic, linear(0.2, 0.1), 0.1, clamp=(-2, 2))
    x0 = values(random.Random(0), 3, 2, 4, 4)
    options = {"mask": x0 > 1, "known": x0, "data_term": (0.5 * x0, linear(1.0, 0.5), 0.1)}
    good = sampler.init(x0, 1, num_steps=3, **options).state_dict()
    for k in range(tries):
        draw = random.Random(SEED * 10**9 + k)
        state = dict(good)
        name = draw.choice([*good])
        value = state[name]
        if isinstance(value, Tensor):
            changes: list[Callable[[Tensor], Any]] = [
                lambda t: t.double(),
                lambda t: t.int(),
                lambda t: t[:1],
                lambda t: t[:0],
                lambda t: t[None],
                lambda t: t.flatten()[0],
                lambda t: t.tolist(),
                lambda t: -t if t.dtype != torch.bool else ~t,
                lambda t: t.float() * math.nan,
                lambda t: t.to("meta"),
                lambda t: t.to_sparse(),
                lambda t: None,
                lambda t: t.flip(0),
            ]
            state[name] = draw.choice(changes)(value)
        else:
            state[name] = draw.choice([-1, 1, 2**40, 0.5, math.nan, math.inf, None, "0", True, [0], torch.zeros(2)])
        try:
            loaded = ChainState.from_state_dict(state)
        except ValueError as error:
            if len(str(error).splitlines()) != 1:
                failures.append(f"try {k}, {name}: {error}")
            continue
        except Exception as error:
            failures.append(f"try {k}, {name} {state[name]}: no line but {type(error).__name__}: {error}")
            continue
        try:
            sampler.advance(loaded, 2, check=False)
        except Exception as error:
            failures.append(f"try {k}, {name}: loaded, but {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures[:10])


def test_addresses_never_repeat(tries: int) -> None:
    """Different seeds, steps, streams or ids never give the same noise."""
    draw, seen = random.Random(SEED), {}
    for k in range(tries):
        address = {
            "seed": draw.randrange(-(2**63), 2**64),
            "step": draw.randrange(2**32),
            "stream": draw.randrange(256),
            "chain_ids": draw.randrange(2**56),
        }
        if seen and draw.random() < 0.8:  # near one that was
            address = dict(draw.choice([*seen.values()]))
            name, limit = draw.choice([("step", rng.MAX_STEP), ("stream", 256), ("chain_ids", rng.MAX_CHAIN)])
            address[name] = (address[name] ^ 1 << draw.randrange(limit.bit_length() - 1)) % limit
        # Seeds of equal 64 bits are one seed.
        known = {**address, "seed": address["seed"] % 2**64}
        noise = tuple(ops.normal((1, 8), **address)[0].tolist())
        assert seen.setdefault(noise, known) == known, f"try {k}: {known} and {seen[noise]}"
