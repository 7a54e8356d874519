"""Every operator with noise or an update in it: CUDA, Triton and C++ give the same bits at random calls."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastebm
from benchmarks.gpu.step import BACKENDS, DEVICE, REHEARSAL, Rows
from fastebm import ops

CALLS = 3 if REHEARSAL else 40
SHAPES = ((1,), (5,), (2, 63), (3, 8), (4, 3, 7, 5), (2, 3, 16, 16), (37, 1, 4, 4)) + (
    () if REHEARSAL else ((64, 3, 32, 32), (3, 3, 128, 128), (2, 1, 1, 100003))
)

Call = Callable[[str], Tensor]


def run(rows: Rows) -> None:
    if reason := ops.backends.unavailable_reason("cpp", "cpu"):
        rows.add(ok=False, backend="cpp", reason=reason)
        return
    compared = [name for name in BACKENDS if rows.runs_here(name)]
    for name, calls in {"normal": normal, "langevin_step": langevin, "block_tail": block_tail}.items():
        counted = {backend: [0, 0] for backend in compared}
        for number, call in enumerate(calls(random.Random(0))):
            with ops.backend("cpp"):
                expected = call("cpu")
            for backend, counts in counted.items():
                with rows.trying(operator=name, backend=backend, call=number):
                    with ops.backend(backend):
                        found = call(DEVICE).cpu()
                    counts[0] += 1
                    counts[1] += _same(found, expected, backend)
        for backend, (calls_made, equal) in counted.items():
            rows.add(ok=0 < equal == calls_made, operator=name, backend=backend, calls=calls_made, equal=equal)


def _same(found: Tensor, expected: Tensor, backend: str) -> bool:
    if REHEARSAL and backend == "triton":  # whose interpreter rounds a fused multiply-add twice, and cuts bfloat16 off
        return bool(torch.allclose(found.float(), expected.float(), rtol=2**-6, atol=1e-5))
    return bool(torch.equal(found, expected))


def _numbers(choose: random.Random, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(choose.getrandbits(31))
    return torch.randn(shape, generator=generator).to(dtype)


def _on(device: str, options: dict[str, Any]) -> dict[str, Any]:
    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return tuple(map(move, value)) if isinstance(value, tuple) else value

    return {name: move(value) for name, value in options.items()}


def normal(choose: random.Random) -> Iterator[Call]:
    for _ in range(CALLS):
        shape = choose.choice(SHAPES)
        dtype = choose.choice((torch.float32, torch.bfloat16, torch.float16))
        address = {
            "seed": choose.getrandbits(62),
            "step": choose.getrandbits(32),
            "chain_ids": choose.choice((7, 2**40)),
        }
        for draw in (fastebm.ops.normal, fastebm.ops.uniform):
            yield lambda device, draw=draw, shape=shape, dtype=dtype, address=address: draw(
                shape, device=device, dtype=dtype, **address
            )


def langevin(choose: random.Random) -> Iterator[Call]:
    for _ in range(CALLS):
        shape = choose.choice(SHAPES)
        x = _numbers(choose, shape)
        gradient = _numbers(choose, shape, choose.choice((torch.float32, torch.bfloat16, torch.float16)))
        options: dict[str, Any] = {
            "step_size": 0.3,
            "noise_std": choose.choice((0.0, 0.1)),
            "seed": choose.getrandbits(62),
            "step": choose.getrandbits(31),
            "chain_ids": choose.choice((7, 2**40)),
        }
        if choose.random() < 0.3:
            options["step_size"] = _numbers(choose, shape[:1]).abs() + 0.1
            options["chain_ids"] = torch.arange(shape[0]) * 3 + 2**33
        if choose.random() < 0.5:
            options["clamp"] = choose.choice(((-1, 1), (None, 0.5), (-0.5, None)))
        if choose.random() < 0.4:
            options[choose.choice(("grad_clip", "grad_norm_clip"))] = 0.6
        if choose.random() < 0.3:
            options["mask"], options["known"] = _numbers(choose, shape) > 0, _numbers(choose, shape)
        if choose.random() < 0.3:
            options["data_term"] = (_numbers(choose, shape), 0.4)
        yield lambda device, x=x, gradient=gradient, options=options: fastebm.langevin_step(
            x.to(device), gradient.to(device), **_on(device, options)
        )


def block_tail(choose: random.Random) -> Iterator[Call]:
    for _ in range(CALLS):
        shape = choose.choice([shape for shape in SHAPES if len(shape) == 4 and shape[2] > 1])
        dtype = choose.choice((torch.float32, torch.bfloat16))
        main, skip = _numbers(choose, shape, dtype), _numbers(choose, shape, dtype)
        activation = choose.choice(("scaled_swish", "gelu", "elu", "leaky_relu", "relu"))
        yield lambda device, main=main, skip=skip, activation=activation: ops.block_tail(
            main.to(device), skip.to(device), activation=activation
        )
