"""What users launch on a GPU: chains and trainings of the benchmarks' nets, and every operator, by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fastebm
from benchmarks.harness import nets
from fastebm import ops, rng
from fastebm.compiler.candidates import ProgramKey, candidates
from fastebm.compiler.capture import capture
from fastebm.compiler.cost_model import Machine
from fastebm.compiler.executor import CompiledExecutor
from fastebm.compiler.frozen_weights import differentiable_weights, frozen_weights
from fastebm.compiler.weight_program import WeightProgram
from fastebm.models import CoarseToFineEnergy
from fastebm.ops import CompiledProgram
from fastebm.ops.instructions import Layout, encode
from fastebm.ops.options import StepOptions
from fastebm.ops.program import plan_batch

BATCHES = (64, 256, 3, 1)
DTYPES = (torch.float32, torch.bfloat16)
NETS = {
    "CF-EBM": (3, 32, 32),
    "IGEBM-like residual": (3, 32, 32),
    "UvA tutorial": (1, 28, 28),
    "wide residual 28-2": (3, 32, 32),
    "EC-VAE multi-scale": (3, 32, 32),
}

Launching = Callable[[int], None]
"""Launches all there is for so many samples."""


def everything() -> Iterator[tuple[str, Callable[[], Launching]]]:
    """(name, what makes the launches) of all that is launched. They are to be made within `fake_gpu`."""
    for dtype in DTYPES:
        for name, shape in NETS.items():
            yield (
                f"{name} {dtype}",
                lambda name=name, shape=shape, dtype=dtype: chain_launches(
                    nets.build(name, shape, "cpu"), shape, dtype
                ),
            )
        yield (
            f"training of CF-EBM {dtype}",
            lambda dtype=dtype: training_launches(nets.build("CF-EBM", (3, 32, 32), "cpu"), (3, 32, 32), dtype),
        )
        for size in (4, 8):
            yield (
                f"chain of CF-EBM at {size}x{size} {dtype}",
                lambda size=size, dtype=dtype: whole_chain_launches(
                    CoarseToFineEnergy(size, lowest=size, base_width=32).eval(), (3, size, size), dtype
                ),
            )
    for shape in ((3, 4, 4), (3, 32, 32), (1, 5, 7)):
        yield f"samplers of {shape}", lambda shape=shape: sampler_launches(shape)
    yield "parts of nets", lambda: tail_launches


def machine_of_a_gpu() -> mock._patch[Callable[..., Machine]]:
    """A patch by which programs for the CPU are those for a GPU."""
    of = Machine.of
    return mock.patch.object(Machine, "of", lambda device, dtype: of(torch.device("cuda"), dtype))


def gpu_program(net: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> CompiledProgram:
    """The fused program of a net's energies and gradient as `energy_gradient` makes it for a GPU, on the CPU.

    To be called within `fake_gpu`, because weights lie as the backend reads them.
    """
    key = ProgramKey(torch.Size(shape), torch.float32, torch.device("cpu"), dtype)
    with machine_of_a_gpu():
        made = next(iter(candidates(net, net, key, torch.zeros(3, *shape))))
    if isinstance(made, Exception):
        raise made
    if not isinstance(made.executor, CompiledExecutor):
        raise TypeError(f"the program is none of the fused ones: {made.fallback_reason}")
    made.executor.refresh()
    return made.executor.compiled


def code_and_workspace(program: CompiledProgram, batch: int) -> tuple[Tensor, Tensor]:
    """Of a call for so many samples. The workspace is memory that nothing is written to."""
    code = encode(plan_batch(program.lowered, Layout.PLAIN, 0, batch, 1, "cuda"))
    return code, torch.empty(int(code[9] * code[10]), dtype=torch.uint8)


def chain_launches(net: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> Launching:
    """Those of one update of Langevin chains."""
    program = gpu_program(net, shape, dtype)

    def launch(batch: int) -> None:
        x = torch.zeros(batch, *shape)
        code, workspace = code_and_workspace(program, batch)
        gradient = torch.ops.fastebm.run_program(x, code, program.constants, workspace)[1]
        torch.ops.fastebm.langevin_step_(x, gradient, *step_options(batch))

    return launch


def step_options(batch: int) -> StepOptions:
    """Of an update with plain numbers, clamped."""
    off = dict.fromkeys(StepOptions._fields)
    return StepOptions(
        **off
        | {
            "schedule": torch.ones(1, 2),
            "key": rng.make_key(0, 0),
            "chain_ids": rng.make_chain_ids(0, batch),
            "clamp_min": -1.0,
            "clamp_max": 1.0,
            "data_term_hinge": 0.0,
        }
    )


def whole_chain_launches(net: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> Launching:
    """That of a whole chain of small images."""
    program = gpu_program(net, shape, dtype)

    def launch(batch: int) -> None:
        code, workspace = code_and_workspace(program, batch)
        x = torch.zeros(batch, *shape)
        torch.ops.fastebm.run_chain(x, code, program.constants, workspace, 10, *step_options(batch))

    return launch


def training_launches(net: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> Launching:
    """Those of the gradients of all weights."""
    with machine_of_a_gpu():
        with frozen_weights(net):
            captured = capture(net, net, torch.zeros(3, *shape))
        with differentiable_weights(net):
            program = WeightProgram.of(captured, torch.zeros(3, *shape), dtype)
            program.evaluated()

    def launch(batch: int) -> None:
        program.run(torch.zeros(batch, *shape), lambda energies, rows: torch.ones(rows.stop - rows.start))

    return launch


def sampler_launches(shape: tuple[int, ...]) -> Launching:
    """Those of noise and of a step of every sampler, with options of many kinds."""

    def launch(batch: int) -> None:
        x, energy, each = torch.zeros(batch, *shape), torch.zeros(batch), torch.full((batch,), 0.1)
        ops.normal(x.shape, seed=0)
        ops.uniform(x.shape, seed=0)
        step: dict[str, Any] = {"step_size": 0.1, "noise_std": 0.1, "seed": 0}
        fastebm.langevin_step(x, x, **step, grad_clip=0.1)
        fastebm.langevin_step(x, x.bfloat16(), **step | {"step_size": each, "noise_std": each}, clamp=(-1, 1))
        fastebm.langevin_step(x, x, **step, mask=torch.ones(shape[1:]), known=torch.zeros(shape))
        fastebm.langevin_step(x, x, **step, grad_norm_clip=1.0, data_term=(x, 0.5, 0.1))
        address: dict[str, Any] = {"key": rng.make_key(0, 1), "chain_ids": rng.make_chain_ids(0, batch)}
        state, proposal = (x.clone(), energy.clone(), x.clone()), (x.clone(), energy.clone(), x.clone())
        for walls in ({}, {"low": -1.0, "high": 1.0}):
            ops.mala_step_(*state, *proposal, schedule=torch.ones(1, 2), **address, **walls)
            ops.baoab_step_(*state[::2], x.clone(), schedule=torch.ones(1, 3), **address, **walls)
        work = torch.zeros(batch, dtype=torch.float64)
        ops.obabo_step_(*state[::2], x.clone(), schedule=torch.ones(1, 3), **address, work=work)
        ops.leapfrog_(*state[::2], x.clone(), schedule=torch.ones(1, 3), key=address["key"], work=work, close=False)
        ops.kinetic_energy(x)
        works = torch.zeros(batch, 2, dtype=torch.float64)
        ops.mclmc_step_(*state[::2], works, x.clone(), closing=0.1, refresh=0.1, opening=0.1, drift=0.1)

    return launch


def tail_launches(batch: int) -> None:
    """Those of the block tail and of the Expand blend, with their derivatives."""
    for dtype, layout in ((torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)):
        main = torch.zeros(batch, 32, 16, 16, dtype=dtype).to(memory_format=layout).requires_grad_()
        skip, fade = main.detach().clone().requires_grad_(), main.detach()[..., ::2, ::2].clone(memory_format=layout)
        tail = ops.block_tail(main, skip, fade=fade, beta=0.5)
        (gradient,) = torch.autograd.grad(tail.sum(), main, create_graph=True)
        torch.autograd.grad(gradient.sum(), main)
        primal = main.detach().clone().requires_grad_()
        torch.autograd.grad(ops.expand_blend(primal, main.detach(), 0.5).sum(), primal)
