"""Random buffers and hostile calls: a plain model of lists agrees, and wrong ones are refused in one line and change
nothing."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastebm import ReplayBuffer
from fastebm.sampling.replay_buffer import Draw

SEED = 1700
REFUSALS = (ValueError, TypeError)
ODD = [math.nan, math.inf, -1, 0.5, True, "1", None, [0], 1j, 10**30, torch.ones(2), np.float64(0.5)]


def made(draw: random.Random) -> dict[str, Any]:
    """Legal arguments of a buffer."""
    classes, world_size = draw.choice([0, 0, 1, 2, 3]), draw.choice([1, 1, 2])
    dtype = draw.choice([torch.uint8, torch.float16, torch.float32, torch.float64])
    arguments: dict[str, Any] = {
        "shape": draw.choice([(), (3,), (1, 2, 2), [2, 3]]),
        "capacity": max(classes, 1) * world_size * draw.randint(1, 6),
        "restart": draw.choice([0, 1, 0.3, np.float32(0.5), torch.tensor(0.1)]),
        "seed": draw.choice([0, -1, 2**64 - 1, np.int64(7), None]),
        "write": draw.choice(["drawn", "ring", "newest_first", "reservoir"]),
        "restart_law": draw.choice(["bernoulli", "binomial"]),
        "dtype": dtype,
        "num_classes": classes,
        "augment": draw.choice([None, None, lambda x, seed, chain_ids: x * 1]),
        "world_size": world_size,
        "rank": draw.randrange(world_size),
    }
    if dtype == torch.uint8:
        arguments["value_range"] = draw.choice([(-1, 1), (0, 1), (-2.5, np.float64(3))])
    return arguments


def snapshot(buffer: ReplayBuffer) -> dict[str, Any]:
    return {name: v.clone() if isinstance(v, Tensor) else v for name, v in buffer.state_dict().items()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(torch.equal(v, b[name]) if isinstance(v, Tensor) else v == b[name] for name, v in a.items())


def wrong_call(draw: random.Random, buffer: ReplayBuffer, drawn: Draw | None) -> Any:
    """A call of which something is wrong."""
    slots, odd = buffer.capacity // buffer.world_size, draw.choice(ODD)
    calls: list[Any] = [
        lambda: buffer.draw(draw.choice([0, -1, slots + 1, 0.5, True, "2", None, 10**30]), 1),
        lambda: buffer.draw(1, draw.choice([-1, 0.5, True, "2", None, 2**33, [1]])),
        lambda: buffer.draw(
            1, 1, slots=draw.choice([torch.tensor([slots]), torch.tensor([-1]), [0], 0, "0" if odd is None else odd])
        ),
        lambda: buffer.draw(1, 1, labels=draw.choice([buffer.num_classes, -1, 0.5, "0", [0], torch.zeros(1), 10**30])),
        lambda: buffer.draw(1, 1, labels=0, slots=torch.tensor([0])),
        lambda: buffer.put(odd, torch.zeros(1, *buffer.shape)),
        lambda: buffer.load_state_dict(odd),
        lambda: buffer.load_state_dict({**buffer.state_dict(), draw.choice([*buffer.state_dict()]): torch.ones(7, 7)}),
        lambda: buffer.load_state_dict({**buffer.state_dict(), draw.choice(["step", "draws", "seed", "rank"]): 0.5}),
        lambda: buffer.load_state_dict({k: v for k, v in buffer.state_dict().items() if k != "written"}),
        lambda: ReplayBuffer(**{**made(draw), draw.choice(["restart", "seed", "write", "augment"]): 1.5}),
        lambda: ReplayBuffer(**{**made(draw), draw.choice(["capacity", "num_classes", "world_size"]): -1}),
        lambda: ReplayBuffer(**{**made(draw), "dtype": draw.choice([torch.int64, "float32", None, torch.bfloat16])}),
        lambda: ReplayBuffer(**{**made(draw), "shape": draw.choice([3, None, "3", (0,), (2, -1), (1.5,), [[2]]])}),
        lambda: ReplayBuffer(**{**made(draw), draw.choice(["write", "restart_law", "dtype"]): odd}),
        lambda: ReplayBuffer(**{**made(draw), "start": draw.choice([3, "uniform", torch.ones(2).long()])}),
    ]
    if drawn is not None:
        n = len(drawn.slots)
        wrong = [(n + 1, *buffer.shape), (n, *buffer.shape, 2), (n, 9, *buffer.shape)]
        calls += [
            lambda: buffer.put(drawn, torch.zeros(draw.choice(wrong))),
            lambda: buffer.put(drawn, draw.choice([None, [0.0], torch.zeros(n, *buffer.shape).long()])),
            lambda: copy.copy(buffer).put(drawn, drawn.x),
        ]
    return draw.choice(calls)


def model_put(kept: dict[int, list[Any]], buffer: ReplayBuffer, draw: Draw, ends: list[Any]) -> None:
    """What the slots of each class hold after a put, by lists; not for reservoirs, whose places are drawn."""
    size = buffer.capacity // buffer.world_size // max(buffer.num_classes, 1)
    labels = [0] * len(ends) if draw.labels is None else draw.labels.tolist()
    if buffer.write == "drawn":
        for slot, end in zip(draw.slots.tolist(), ends, strict=True):
            kept[slot // size][slot % size] = end
        return
    for label in {*labels}:
        new = [end for end, of in zip(ends, labels, strict=True) if of == label]
        if buffer.write == "ring":
            new.reverse()
        kept[label] = (new + kept[label])[:size]


def check_draw(buffer: ReplayBuffer, draw: Draw, before: dict[str, Any], used: set[tuple[int, int]]) -> str | None:
    """What is wrong with a draw, if anything."""
    ids = draw.chain_ids.tolist()
    if len({*ids}) != len(ids):
        return "equal ids in one draw"
    pairs = {(i, draw.start_step + k) for i in ids for k in range(draw.num_steps)}
    if pairs & used:
        return "noise used twice"
    used |= pairs
    if not bool(draw.x.isfinite().all()):
        return "a state that is not finite"
    going_on = ~draw.restarted
    if not bool((before["chain_ids"][draw.slots[going_on]] >= 0).all()):
        return "an empty slot goes on"
    if buffer.dtype != torch.uint8 and not torch.equal(
        draw.x[going_on], before["x"][draw.slots[going_on]].to(draw.x.dtype)
    ):
        return "other states than those of the slots"
    if not torch.equal(draw.steps, torch.where(draw.restarted, 0, before["steps"][draw.slots])):
        return "other ages than those of the slots"
    new = draw.chain_ids[draw.restarted]
    if len(new) and not bool(((new >= before["next_chain"]) & (new < buffer.next_chain)).all()):
        return "ids of new chains that are not new"
    return None


def test_buffers(tries: int) -> None:
    failures: list[str] = []
    for k in range(tries):
        draw = random.Random(SEED * 10**6 + k)
        arguments = made(draw)
        buffer = ReplayBuffer(**arguments)
        slots = buffer.capacity // buffer.world_size
        classes, size = max(buffer.num_classes, 1), slots // max(buffer.num_classes, 1)
        kept: dict[int, list[Any]] = {c: [None] * size if buffer.write == "drawn" else [] for c in range(classes)}
        used: set[tuple[int, int]] = set()
        lost, drawn, count, value = 0, None, draw.randint(1, slots), 0
        for step in range(draw.randint(1, 8)):
            where = f"try {k}, round {step}, {arguments}"
            before = snapshot(buffer)
            if draw.random() < 0.5:
                try:
                    wrong_call(draw, buffer, drawn)()
                    failures.append(f"{where}: a wrong call is taken")
                except REFUSALS as error:
                    if len(str(error).splitlines()) != 1:
                        failures.append(f"{where}: no line but {error!r}")
                except Exception as error:
                    failures.append(f"{where}: {error!r}")
                if not same(before, buffer.state_dict()):
                    failures.append(f"{where}: a refused call changed the buffer")
                    break
            options: dict[str, Any] = {}
            if draw.random() < 0.3:
                options["slots"] = torch.tensor([draw.randrange(slots) for _ in range(count)])
            elif buffer.num_classes and draw.random() < 0.5:
                options["labels"] = torch.tensor([draw.randrange(classes) for _ in range(count)])
            drawn = buffer.draw(count, draw.randint(0, 3), **options)
            if said := check_draw(buffer, drawn, before, used):
                failures.append(f"{where}: {said}")
            values = [value + i + 1 for i in range(count)]
            value += count
            ends = torch.tensor(values, dtype=torch.float64).view(-1, *(1,) * len(buffer.shape)) / 512
            ends += 2  # starts are in [-1, 1]
            ends = ends.expand(count, *buffer.shape).to(draw.choice([torch.float32, torch.float64])).clone()
            bad = [i for i in range(count) if draw.random() < 0.1]
            for i in bad:
                ends[i].view(-1)[draw.randrange(ends[i].numel())] = draw.choice([math.nan, math.inf, -math.inf])
                values[i] = -int(drawn.spare_ids[i])
            if buffer.put(drawn, ends) != len(bad):
                failures.append(f"{where}: another number of lost chains than {len(bad)}")
            lost += len(bad)
            after = buffer.state_dict()
            if not bool(after["x"].isfinite().all()) or buffer.nonfinite != lost:
                failures.append(f"{where}: a chain that is not finite is kept, or not counted")
            if buffer.write == "reservoir":
                continue
            model_put(kept, buffer, drawn, values)
            for label in range(classes):
                ids = after["chain_ids"].view(classes, size)[label].tolist()
                x = after["x"].view(classes, size, -1)[label, :, 0].tolist()
                pairs = [pair for pair in zip(ids, x, strict=True) if pair[0] >= 0]
                found = sorted(round((v - 2) * 512) if v > 1 else -i for i, v in pairs)
                if buffer.dtype == torch.uint8:
                    found, wanted = [len(found)], [sum(v is not None for v in kept[label])]
                else:
                    wanted = sorted(v for v in kept[label] if v is not None)
                if found != wanted:
                    failures.append(f"{where}: class {label} holds {found} in place of {wanted}")
        resumed = ReplayBuffer(**arguments)
        resumed.load_state_dict(snapshot(buffer))
        if not torch.equal(resumed.draw(count, 1).x, buffer.draw(count, 1).x):
            failures.append(f"try {k}: a resume draws others, {arguments}")
    assert not failures, "\n".join(failures[:10])
