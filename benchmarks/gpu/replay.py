"""Chains by captured graphs have the bits of the plain loop, whose launches come one by one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastebm
from benchmarks.gpu.step import REHEARSAL, Rows, on_device, uniform
from fastebm.models import CoarseToFineEnergy


@contextlib.contextmanager
def without_graphs() -> Iterator[None]:
    before = os.environ.get("FASTEBM_GRAPHS")
    os.environ["FASTEBM_GRAPHS"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTEBM_GRAPHS"]
        else:
            os.environ["FASTEBM_GRAPHS"] = before


def run(rows: Rows) -> None:
    with stand_in():
        compare_all(rows)


def stand_in() -> contextlib.AbstractContextManager[object]:
    """In a rehearsal, what takes the place of CUDA graphs on the CPU."""
    if not REHEARSAL:
        return contextlib.nullcontext()
    from tests.gpu.graph_recorder import GraphRecorder

    return GraphRecorder().installed()


def compare_all(rows: Rows) -> None:
    torch.manual_seed(0)
    net = on_device(CoarseToFineEnergy(16, base_width=8 if REHEARSAL else 64))
    target = uniform(16, 3, 16, 16, seed=3)
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "plain": ({}, {}),
        "bfloat16": ({"dtype": torch.bfloat16}, {}),
        "clamp": ({"clamp": (-1, 1)}, {}),
        "norm clip": ({"grad_norm_clip": 0.5}, {}),
        "schedule": ({"noise_std": fastebm.schedules.linear(0.02, 0.0)}, {}),
        "mask": ({}, {"mask": target > 0, "known": target}),
        "data term": ({}, {"data_term": (target, 0.3)}),
    }
    for name, (options, of_chain) in cases.items():
        with rows.trying(case=name):
            compared(rows, name, net, options, of_chain)
    with rows.trying(case="new weights"):
        sampler = fastebm.Langevin(net, 0.5, 0.01, engine="fused")
        first = chain(sampler, 16, {})
        for _ in range(4):  # from the third change at last, weights are evaluated by graphs
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(1.01)
            second = chain(sampler, 16, {})
        with without_graphs():
            expected = chain(fastebm.Langevin(net, 0.5, 0.01, engine="fused"), 16, {})
        rows.add(ok=torch.equal(second, expected) and not torch.equal(first, second), case="new weights")


def chain(sampler: fastebm.Langevin, batch: int, options: dict[str, Any]) -> Tensor:
    start = uniform(batch, 3, 16, 16, seed=1)
    given = {name: _rows(value, batch) for name, value in options.items()}
    return sampler.sample(start, 19, seed=3, **given).clone()


def _rows(value: Any, batch: int) -> Any:
    if isinstance(value, Tensor):
        return value[:batch]
    return tuple(_rows(each, batch) for each in value) if isinstance(value, tuple) else value


def compared(rows: Rows, name: str, net: torch.nn.Module, options: dict[str, Any], of_chain: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"step_size": 0.5, "noise_std": 0.01, "engine": "fused"} | options
    sampler = fastebm.Langevin(net, **settings)
    for batch in (16, 3, 16):
        found = chain(sampler, batch, of_chain)
        with without_graphs():
            expected = chain(fastebm.Langevin(net, **settings), batch, of_chain)
        rows.add(ok=torch.equal(found, expected), case=name, batch=batch)
    graphs = len(sampler._graphs._captured)
    rows.add(ok=graphs > 0, case=name, captured=graphs)
