"""CUDA graphs of chains: a graph of 8 updates and one of 1, captured once and replayed for chains of any length.

On small images an update is a few dozen launches of a few microseconds each, so that the time is the host's. A replayed
block is one launch. Graphs stay valid because addresses stay the same: new constants of a compiled program overwrite
the old ones, and seed, step and row of the schedule are in a tensor on the device.

Compiled for sm_80 and sm_90, not yet run on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastebm.compiler import EnergyGradient
from fastebm.ops import CompiledProgram
from fastebm.sampling.observers import Observer
from fastebm.sampling.state import ChainState

__all__ = ["ChainGraphs", "Update", "blocks"]

Update = Callable[[ChainState], Tensor]
"""One update of a state in place; returns the energies before it."""

BLOCKS = (8, 1)
# Captured chains that are kept, each with its own copy of a state: enough for 8 levels of a cascade at 2 batch sizes.
KEPT = 16


def blocks(num_steps: int) -> Iterator[int]:
    """The lengths of the blocks that add up to `num_steps` updates, long ones first."""
    for length in BLOCKS:
        yield from [length] * (num_steps // length)
        num_steps %= length


@dataclass
class _Captured:
    """A state in tensors of fixed address, and the graphs that advance it, by length, with the energies they write.

    The graphs read `program` and `workspace`, and are invalid for any others. These references, and the one to
    `update`, keep that memory from being reused as long as the graphs exist.
    """

    state: ChainState
    update: Update
    program: CompiledProgram
    workspace: Tensor
    graphs: dict[int, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = field(default_factory=dict)

    def serves(self, program: CompiledProgram) -> bool:
        return self.program is program and self.workspace is program.workspace


class ChainGraphs(threading.local):
    """The captured chains of one sampler, whose options never change; each thread has its own."""

    def __init__(self) -> None:
        self._captured: dict[Any, _Captured] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """For copies, which start without: a graph belongs to one process and to one set of tensors."""
        return ChainGraphs, ()

    def advance_(
        self,
        gradient: EnergyGradient,
        update: Update,
        state: ChainState,
        num_steps: int,
        observers: Sequence[Observer],
        done: int,
    ) -> int:
        """Advances `state` by `num_steps` updates, after `done` earlier ones in the same `gradient.chain()`.

        Returns how many updates it did: all, or none if the gradient has no compiled program.
        """
        program = gradient.compiled_program(state.x, state.conditions)
        if not isinstance(program, CompiledProgram):
            return 0
        with torch.cuda.device(state.x.device):
            captured = self._for(program, update, state)
            _copy(state, captured.state)
            for length in blocks(num_steps):
                if length not in captured.graphs:
                    captured.graphs[length] = _capture(captured.update, captured.state, length)
                graph, energies = captured.graphs[length]
                graph.replay()
                for i, of_update in enumerate(energies):
                    for observe in observers:
                        observe(done + i + 1, state.x, of_update)
                done += length
            state.x.copy_(captured.state.x)
            state.key.copy_(captured.state.key)
        return num_steps

    def _for(self, program: CompiledProgram, update: Update, state: ChainState) -> _Captured:
        """The captured chain for states like this one; captured anew if there is none for the current program."""
        kind = _kind(state)
        captured = self._captured.pop(kind, None)
        if captured is None or not captured.serves(program):
            own = ChainState(**state.state_dict() | {name: _own(tensor) for name, tensor in _tensors(state).items()})
            _warm_up(update, own)
            captured = _Captured(own, update, program, program.workspace)
            while len(self._captured) >= KEPT:
                del self._captured[next(iter(self._captured))]
        self._captured[kind] = captured  # last in order: the first one is the least recently used
        return captured


def _tensors(state: ChainState) -> dict[str, Tensor]:
    return {name: value for name, value in state.state_dict().items() if isinstance(value, Tensor)}


def _kind(state: ChainState) -> Any:
    """A key that is equal for states that can share graphs."""
    shapes = ((name, t.shape, t.stride(), t.dtype, t.device) for name, t in _tensors(state).items())
    return (*shapes, state.data_term_hinge)


def _own(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.preserve_format).copy_(tensor)


def _copy(source: ChainState, target: ChainState) -> None:
    for name, tensor in _tensors(source).items():
        getattr(target, name).copy_(tensor)


def _warm_up(update: Update, state: ChainState) -> None:
    """One update in a side stream, which compiles and loads kernels and gives the workspace its size."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        update(state)
    torch.cuda.current_stream().wait_stream(stream)


def _capture(update: Update, state: ChainState, length: int) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of `length` updates, and the tensors that hold the energies of each update after a replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        energies = [update(state) for _ in range(length)]
    return graph, energies
