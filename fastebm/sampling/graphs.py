"""CUDA graphs of chains: a graph of 8 updates and one of 1, captured once and replayed for chains of any length.

On small images an update is a few dozen launches of a few microseconds each, so that the time is the host's. A replayed
block is one launch. Graphs stay valid because addresses stay the same: new constants of a compiled program overwrite
the old ones, and seed, step and row of the schedule are in a tensor on the device.

`FASTEBM_GRAPHS=0` turns graphs off. Their logic is tested against a recorder on the CPU; they have not run on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastebm.compiler import EnergyGradient
from fastebm.compiler.device_graphs import capture, graphs_wanted, warm_up
from fastebm.compiler.faults import described, warn_of_fault
from fastebm.ops import CompiledProgram
from fastebm.sampling.observers import Observer, observe_block
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
    graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = field(default_factory=dict)

    def capture(self, length: int) -> None:
        """The graph of `length` updates, if there is none."""
        if length not in self.graphs:
            self.graphs[length] = capture(lambda: torch.stack([self.update(self.state) for _ in range(length)]))


class ChainGraphs(threading.local):
    """The captured chains of one sampler, whose options never change; each thread has its own.

    A capture that fails is not tried again for states of that kind, whose chains run without graphs; a `FaultWarning`
    says why.
    """

    def __init__(self) -> None:
        graphs_wanted()  # another FASTEBM_GRAPHS than 0 and 1 is an error here, before any work
        self._captured: dict[Any, _Captured] = {}
        self._failed: set[Any] = set()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """For copies, which start without: a graph belongs to one process and to one set of tensors."""
        return ChainGraphs, ()

    def count(self) -> int:
        """How many graphs this thread has."""
        return sum(len(captured.graphs) for captured in self._captured.values())

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

        Returns how many updates it did: all, or none if the gradient has no compiled program, or graphs are off or
        can't be captured.
        """
        program = gradient.compiled_program(state.x, state.conditions)
        kind = _kind(state)
        if not isinstance(program, CompiledProgram) or kind in self._failed or not graphs_wanted():
            return 0
        with torch.cuda.device(state.x.device):
            try:
                # What is captured serves later chains too, in inference mode or not.
                with torch.inference_mode(False), torch.no_grad():
                    captured = self._for(kind, gradient, program, update, state)
                    for length in {*blocks(num_steps)}:
                        captured.capture(length)
            except Exception as error:  # an error of the update itself is raised by the plain loop
                self._captured.pop(kind, None)
                warn_of_fault(
                    f"chains of {gradient.name} run without CUDA graphs, which is slower for small images, because a "
                    f"capture failed: {described(error)} (FASTEBM_GRAPHS=0 asks for that without this warning)"
                )
                self._failed.add(kind)  # not where the warning was an error: the next chain must not be silent
                return 0
            _copy(state, captured.state)
            for length in blocks(num_steps):
                graph, energies = captured.graphs[length]
                graph.replay()
                for observe in observers:
                    observe_block(observe, done, state.x, energies)
                done += length
            state.x.copy_(captured.state.x)
            state.key.copy_(captured.state.key)
        return num_steps

    def _for(
        self, kind: Any, gradient: EnergyGradient, program: CompiledProgram, update: Update, state: ChainState
    ) -> _Captured:
        """The captured chain for states of this kind; captured anew if there is none for the current program."""
        program.code(len(state.x))  # before graphs are looked at, because it may replace the workspace
        self._drop_stale(gradient)
        captured = self._captured.pop(kind, None)
        if captured is None or captured.program is not program:
            captured = None  # freed before the next one takes memory
            own = ChainState(**state.state_dict() | {name: _own(tensor) for name, tensor in _tensors(state).items()})
            warm_up(lambda: update(own))
            captured = _Captured(own, update, program, program.workspace)
            while len(self._captured) >= KEPT:
                del self._captured[next(iter(self._captured))]
        self._captured[kind] = captured  # last in order: the first one is the least recently used
        return captured

    def _drop_stale(self, gradient: EnergyGradient) -> None:
        """Frees captured chains whose program is not the gradient's any more, or has another workspace."""
        self._captured = {
            kind: captured
            for kind, captured in self._captured.items()
            if captured.workspace is captured.program.workspace and gradient.keeps(captured.program)
        }


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
