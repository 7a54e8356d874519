"""The launches of a net's chains: its fused program as a GPU gets it, and the update, by batch."""

from __future__ import annotations

from unittest import mock

import torch
from torch import nn

from fastebm.compiler.candidates import ProgramKey, candidates
from fastebm.compiler.cost_model import Machine
from fastebm.compiler.executor import CompiledExecutor
from fastebm.ops.instructions import Layout, encode
from fastebm.ops.program import plan_batch


def gpu_program(net: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> CompiledExecutor:
    """The fused program of a net's energies and gradient as `energy_gradient` makes it for a GPU, on the CPU.

    To be called within `fake_gpu`, because weights lie as the backend reads them.
    """
    of = Machine.of
    key = ProgramKey(torch.Size(shape), torch.float32, torch.device("cpu"), dtype)
    with mock.patch.object(Machine, "of", lambda device, dtype: of(torch.device("cuda"), dtype)):
        made = next(iter(candidates(net, net, key, torch.zeros(3, *shape))))
    if isinstance(made, Exception):
        raise made
    if not isinstance(made.executor, CompiledExecutor):
        raise TypeError(f"the program is none of the fused ones: {made.fallback_reason}")
    made.executor.refresh()
    return made.executor


def run_program(executor: CompiledExecutor, batch: int) -> None:
    """Every launch of one gradient. The workspace is memory that nothing is written to."""
    lowered = executor.compiled.lowered
    code = encode(plan_batch(lowered, Layout.PLAIN, 0, batch, 1, "cuda"))
    workspace = torch.empty(int(code[9] * code[10]), dtype=torch.uint8)
    torch.ops.fastebm.run_program(torch.zeros(batch, *lowered.sample), code, executor.compiled.constants, workspace)
