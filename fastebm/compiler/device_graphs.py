"""CUDA graphs: how they are captured, and work that is repeated on the same memory as a graph.

`FASTEBM_GRAPHS=0` turns graphs off. Their logic is tested against a recorder on the CPU; they have not run on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastebm.compiler.faults import described, warn_of_fault

__all__ = ["RepeatedWork", "capture", "graphs_wanted", "places_of", "warm_up"]

Result = TypeVar("Result")


def graphs_wanted() -> bool:
    """Whether graphs are on. Raises ValueError for another `FASTEBM_GRAPHS` than 0, 1 or nothing."""
    found = os.environ.get("FASTEBM_GRAPHS") or "1"
    if found not in ("0", "1"):
        raise ValueError(f"FASTEBM_GRAPHS must be 0 or 1, got {found!r}")
    return found == "1"


def warm_up(run: Callable[[], Any]) -> None:
    """Runs once in a side stream, which compiles and loads kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)


def capture(run: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of what `run` does, and what it gives, which holds numbers after a replay only."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    cause: BaseException | None = None
    try:
        # Other threads may go on working: only what this one does must be fit for a graph.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            try:
                result = run()
            except BaseException as error:  # Ctrl-C too, which the end of an invalid capture would hide
                cause = error
                raise
    except RuntimeError as error:  # the end of a capture that failed says no more than that
        raise cause or error from None
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails stays in its own stream
    return graph, result


def places_of(tensors: Sequence[Tensor]) -> Any:
    """Where tensors lie and of what kind they are; None where they don't all lie on one CUDA device."""
    if not tensors or not all(t.is_cuda for t in tensors) or len({t.device for t in tensors}) > 1:
        return None
    return tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors)


class RepeatedWork:
    """Work on a CUDA device that reads the same places again and again: from its second time on, it is a graph.

    Work that can't be captured is not tried again, and a `FaultWarning` says why. Copies start without a graph.

    Args:
        what: that is done, for the warning.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._seen: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._failed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return RepeatedWork, (self.what,)

    def replay(self, kind: Any) -> bool:
        """Whether there is a graph of this kind, which then is replayed."""
        if not self.holds(kind) or self._graph is None:
            return False
        self._graph.replay()
        return True

    def holds(self, kind: Any) -> bool:
        """Whether there is a graph for work of this kind; None is no kind."""
        return kind is not None and self._graph is not None and kind == self._seen and graphs_wanted()

    def capture(self, kind: Any, device: torch.device, run: Callable[[], Result]) -> Result | None:
        """To be called each time that `run` was done for want of a graph.

        At the second time in a row of one kind, captures and replays it, and returns what it gives; else None.
        """
        known, self._seen, self._graph = self._seen, kind, None
        if kind is None or kind != known or self._failed or not graphs_wanted():
            return None
        try:
            # What is captured serves later chains too, in inference mode or not.
            with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
                self._graph, result = capture(run)
                self._graph.replay()
        except Exception as error:
            self._graph = None
            warn_of_fault(
                f"{self.what} runs without a CUDA graph, which is slower at the start of a chain, because a capture "
                f"failed: {described(error)} (FASTEBM_GRAPHS=0 asks for that without this warning)"
            )
            self._failed = True  # not where the warning was an error: the next chain must not be silent
            return None
        return result
