"""A stand-in for CUDA graphs on the CPU: it records the operators of a capture and carries them out in each replay.

`recorder.installed()` takes the place of `torch.cuda.CUDAGraph`, `torch.cuda.graph` and streams, and makes tensors say
that they are on a GPU, except for those that code makes with `device="cpu"` and what is computed from them alone.
Inside the block, operators are counted, and

- a capture changes no memory that was there before, as the capture of a real graph carries nothing out;
- a replay carries out the same operators on the same memory, with the host's numbers of the capture;
- what a capture allocated is poisoned (NaN) after the capture, before each replay and when the graph is freed;
- what makes the host wait is counted, and an error during a capture and between the replays of one call.

Operators of fastebm count as their kernels: their bodies, in Python, are looked into.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fastebm.compiler import candidates
from fastebm.compiler.compiled_gradient import CompiledGradient
from fastebm.ops import backends
from fastebm.sampling.graphs import ChainGraphs

# Operators that read from the device what the host needs to go on.
READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "_unique2", "is_nonzero")
# Methods and functions that read or write memory of the host without an operator that tells.
HOST_READS = ("tolist", "numpy", "cpu", "__array__")
HOST_WRITES = ("tensor", "as_tensor", "asarray")
_CPU_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class CaptureError(RuntimeError):
    """What a real capture would refuse."""


@dataclass
class Counts:
    """What was carried out one by one, outside of graphs: operators that run a kernel, and waits of the host."""

    operators: int = 0
    waits: int = 0
    replays: int = 0
    refreshes: int = 0  # replays outside of chains
    names: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        refreshes = f" and {self.refreshes} replay{'s' * (self.refreshes != 1)}" if self.refreshes else ""
        return f"{self.operators} operators and {self.waits} wait{'s' * (self.waits != 1)}{refreshes}"


class Graph:
    """Stands for `torch.cuda.CUDAGraph`."""

    recorder: GraphRecorder

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.allocated: list[Tensor] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.complete = False
        self.recorder.graphs += 1

    def replay(self) -> None:
        if not self.complete:
            raise CaptureError("a graph without a complete capture was replayed")
        with _disable_current_modes():
            self.poison()
            for call, arguments, options, outputs in self.calls:
                results = _tensors(call(*arguments, **options))
                for output, result in zip(outputs, results, strict=True):
                    if output.data_ptr() != result.data_ptr():
                        output.copy_(result)
        self.recorder.note_replay()

    def poison(self) -> None:
        for tensor in self.allocated:
            _poison(tensor)

    def owns(self, tensor: Tensor) -> bool:
        own = tensor.untyped_storage().data_ptr()
        return any(each.untyped_storage().data_ptr() == own for each in self.allocated)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            with _disable_current_modes():
                self.poison()


def _poison(tensor: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()):
        _fill(tensor)


def _fill(tensor: Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(float("nan"))
    elif tensor.dtype == torch.bool:
        tensor.fill_(True)
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class GraphRecorder(TorchDispatchMode):
    """The recorder. `failure` is raised by the next captures if it is set."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.first_replay: Counts | None = None
        self.capturing: Graph | None = None
        self.failure: Exception | None = None
        self.streams = ["default"]
        self.graphs = 0
        self.in_call = self.replayed_in_call = False
        self.is_paused = False
        self.illegal: list[str] = []
        self.on_host: dict[int, torch.UntypedStorage] = {}

    # What is installed ----------------------------------------------------------------------------------------------

    @contextmanager
    def installed(self) -> Iterator[GraphRecorder]:
        recorder = self

        class OwnGraph(Graph):
            pass

        OwnGraph.recorder = self
        cuda = torch.cuda
        with pytest.MonkeyPatch.context() as patch, _OnHost(self), self:
            patch.setattr(cuda, "CUDAGraph", OwnGraph)
            patch.setattr(cuda, "graph", lambda graph, **options: recorder.capture(graph, **options))
            patch.setattr(cuda, "Stream", lambda: _Stream("side"))
            patch.setattr(cuda, "current_stream", lambda: _Stream(recorder.streams[-1]))
            patch.setattr(cuda, "stream", self.within_stream)
            patch.setattr(cuda, "set_stream", lambda stream: recorder.streams.__setitem__(-1, stream.name))
            patch.setattr(cuda, "device", _nothing)
            patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: not recorder.is_on_host(tensor)))
            patch.setattr(torch.Tensor, "is_cpu", property(recorder.is_on_host))
            patch.setattr(candidates, "_lanes_take", lambda key: False)  # lane programs run on the CPU alone
            patch.setattr(backends, "_python_kernel", self.python_kernel)
            patch.setattr(ChainGraphs, "advance_", self.one_call(ChainGraphs.advance_))
            patch.setattr(CompiledGradient, "_compile", self.paused(CompiledGradient._compile))
            yield self
        assert self.streams == ["default"], f"work goes on in the stream {self.streams[-1]!r}"

    @contextmanager
    def capture(self, graph: Graph, capture_error_mode: str = "global") -> Iterator[None]:
        """Stands for `torch.cuda.graph`, which enters a stream of its own and leaves it after a good capture only."""
        assert capture_error_mode == "thread_local", "a capture must not be hurt by what other threads do"
        assert self.capturing is None
        self.capturing, refused = graph, len(self.illegal)
        before, self.streams[-1] = self.streams[-1], "capture"
        try:
            if self.failure is not None:
                raise self.failure
            try:
                yield
            finally:
                if len(self.illegal) > refused:  # whatever else happened: the end finds that the capture is invalid
                    raise RuntimeError("operation failed due to a previous error during capture")
            self.streams[-1] = before
            graph.complete = True
        finally:
            self.capturing = None
            with _disable_current_modes():
                for storage, content in graph.before.values():
                    storage.copy_(content)
                graph.before.clear()
                graph.poison()

    @contextmanager
    def within_stream(self, stream: _Stream) -> Iterator[None]:
        self.streams.append(stream.name)
        try:
            yield
        finally:
            self.streams.pop()

    def one_call(self, advance: Callable[..., int]) -> Callable[..., int]:
        """`ChainGraphs.advance_`, between whose replays the host must not wait."""

        def wrapped(*arguments: Any) -> int:
            self.in_call, self.replayed_in_call = True, False
            try:
                return advance(*arguments)
            finally:
                self.in_call = self.replayed_in_call = False

        return wrapped

    def paused(self, compile_: Callable[..., Any]) -> Callable[..., Any]:
        """The making of a program, which traces an energy and is neither counted nor recorded."""

        def wrapped(*arguments: Any) -> Any:
            assert self.capturing is None
            with self.pause():
                return compile_(*arguments)

        return wrapped

    def python_kernel(self, module: str, name: str) -> Callable[..., None]:
        """A kernel in Python as one operator."""
        kernel = getattr(sys.modules.get(module) or __import__(module, fromlist=["_"]), name)
        kind = name.removeprefix("reference_")
        schema = getattr(torch.ops.fastebm_cpp, kind).default._schema

        def bare(*arguments: Any) -> None:
            with self.pause():
                kernel(*arguments)

        def run(*arguments: Any) -> None:
            self.operator(bare, schema, kind, arguments, {})

        return run

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Inside, nothing is counted or recorded, and all tensors are on the CPU."""
        before, self.is_paused = self.is_paused, True
        try:
            with _disable_current_modes():
                yield
        finally:
            self.is_paused = before

    # What is recorded -----------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastebm":  # look into its body
            with self:
                return func.redispatch(_CPU_KERNEL, *args, **(kwargs or {}))
        return self.operator(func, func._schema, func.overloadpacket.__name__, args, kwargs or {})

    def operator(
        self, call: Callable[..., Any], schema: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Carries out, counts and records one operator."""
        inputs = _tensors((args, kwargs))
        host = bool(inputs) and all(self.is_on_host(tensor) for tensor in inputs)
        written = [
            tensor
            for argument, value in zip(schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(value)
        ]
        if not host and (name in READS or (name == "index" and any(t.dtype == torch.bool for t in inputs[1:]))):
            self.wait(f"{name} reads from the device")
        if name == "copy_" and not host and self.is_on_host(inputs[-1]) != self.is_on_host(inputs[0]):
            self.wait("copy_ between host and device")
        if self.capturing is not None and not host:
            self._keep(self.capturing, written)
        result = call(*args, **kwargs)
        outputs = _tensors(result)
        known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        fresh = [output for output in outputs if output.untyped_storage().data_ptr() not in known]
        if host:
            self.mark_on_host(*fresh)
            return result
        allocation = name.startswith("empty") or name == "new_empty"
        kernel = bool(written) or (bool(fresh) and not allocation)
        if self.capturing is None and kernel and name not in READS:
            self.counts.operators += 1
            self.counts.names.append(name)
        if self.capturing is not None:
            self.capturing.allocated += fresh
            if kernel:
                self.capturing.calls.append((call, args, kwargs, outputs))
        return result

    def _keep(self, graph: Graph, written: list[Tensor]) -> None:
        """A copy of memory from before the capture that an operator is about to write to."""
        for tensor in written:
            storage = tensor.untyped_storage()
            if not graph.owns(tensor) and storage.data_ptr() not in graph.before:
                with _disable_current_modes():
                    graph.before[storage.data_ptr()] = storage, storage.clone()

    def wait(self, why: str) -> None:
        """The host waits for the device, or the device for the host."""
        self.counts.waits += 1
        self.counts.names.append(f"({why})")
        if self.capturing is not None or self.replayed_in_call:
            when = "in a capture" if self.capturing is not None else "between replays"
            self.illegal.append(f"{why} {when}")
            raise CaptureError(self.illegal[-1])

    def note_replay(self) -> None:
        if not self.in_call:
            self.counts.refreshes += 1
            return
        if self.first_replay is None:
            self.first_replay = self.counts
            self.counts = Counts()
        self.counts.replays += 1
        self.replayed_in_call = self.in_call

    def start_counting(self) -> None:
        self.counts, self.first_replay = Counts(), None

    # What is on the host --------------------------------------------------------------------------------------------

    def is_on_host(self, tensor: Tensor) -> bool:
        return self.is_paused or tensor.untyped_storage()._cdata in self.on_host

    def mark_on_host(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.on_host[storage._cdata] = storage


class _OnHost(TorchFunctionMode):
    """Tells tensors of the host: those made with `device="cpu"`, in these letters; other devices are objects."""

    def __init__(self, recorder: GraphRecorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.recorder.is_paused:
            return func(*args, **kwargs)
        recorder, name = self.recorder, getattr(func, "__name__", "")
        first = args[0] if args else None
        device = kwargs.get("device")
        if isinstance(first, Tensor) and name == "to":
            device = next((each for each in (*args[1:], device) if isinstance(each, str | torch.device)), None)
        reads = name in HOST_READS or (name == "to" and isinstance(device, str) and device == "cpu")
        if reads and isinstance(first, Tensor) and not recorder.is_on_host(first):
            recorder.wait(f"{name} reads from the device")
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        if isinstance(first, Tensor) and name == "to":
            if isinstance(device, torch.device) and recorder.is_on_host(first):
                recorder.wait("to copies from the host")
                with _disable_current_modes():
                    result = result.clone()
            elif isinstance(device, str) and not recorder.is_on_host(first):
                with _disable_current_modes():
                    result = result.clone()
                recorder.mark_on_host(result)
        elif isinstance(device, str) and device == "cpu":
            recorder.mark_on_host(result)
        elif name in HOST_WRITES and isinstance(device, torch.device):
            recorder.wait(f"{name} copies from the host")
        return result


@dataclass(frozen=True)
class _Stream:
    name: str

    def wait_stream(self, other: _Stream) -> None:
        """Nothing runs at the same time here."""


@contextmanager
def _nothing(device: Any) -> Iterator[None]:
    yield
