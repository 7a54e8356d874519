"""Executors: they run a program on PyTorch's operations in preallocated buffers, or on the fused kernels."""

import math
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from fastebm.compiler.aten_kernels import SUPPORTS_OUT, Kernel, inplace_inputs, kernel, memory_format
from fastebm.compiler.capture import leaf_tensors, referenced_tensors
from fastebm.compiler.device_graphs import RepeatedWork, places_of
from fastebm.compiler.lazy_tensors import LazyTensor, evaluate
from fastebm.compiler.lowering import LoweringResult
from fastebm.compiler.operations import Input
from fastebm.compiler.program import Node, Program
from fastebm.ops import CompiledProgram

# The number of batch sizes whose plans are kept: a full batch, and the remainder at the end of a list.
MAX_PLANS = 2


@dataclass(frozen=True)
class PlanStep:
    """One operation of a plan. Results are identified by their node's position in the program.

    Attributes:
        kernel: runs the operation.
        inputs: the results that it reads.
        result: the position of its own result.
        buffer: where it writes, if the plan has a buffer for it.
        inplace_of: the result that it overwrites, or -1.
        last_uses: the results that nothing reads afterwards.
    """

    kernel: Kernel
    inputs: tuple[int, ...]
    result: int
    buffer: Tensor | None
    inplace_of: int
    last_uses: tuple[int, ...]


class AtenExecutor:
    """Runs a program on PyTorch's operations, in one dtype.

    `refresh` evaluates the weights: before the first run, and at the start of every chain. Their tensors keep their
    memory. A run returns new tensors; intermediate results are in a workspace that the thread's next run uses again,
    except for the results of library convolutions, which PyTorch allocates. Threads may run at the same time.
    """

    def __init__(self, program: Program, dtype: torch.dtype):
        self.program = program
        self.dtype = dtype
        self._position = {node.name: i for i, node in enumerate(program)}
        self._wanted = list(dict.fromkeys(weight for node in program for weight in node.operation.weights()))
        self._weights: dict[LazyTensor, Tensor] = {}
        self._of_thread = _Plans()

    @torch.no_grad()
    def refresh(self) -> None:
        """Evaluate the program's weights."""
        results = evaluate(self._wanted)
        for weight in self._wanted:
            packed = _packed(results[weight], self.dtype)
            if weight in self._weights:
                self._weights[weight].copy_(packed)
            else:
                # A copy, because a later `refresh` writes to it: it must not be the module's own weight.
                self._weights[weight] = packed.clone() if packed is results[weight] else packed

    @torch.no_grad()
    def __call__(self, x: Tensor) -> list[Tensor]:
        """The outputs for a batch of samples, in the program's dtype."""
        batch = x.shape[0]
        plans = self._of_thread.plans
        if batch not in plans:
            while len(plans) >= MAX_PLANS:
                del plans[next(iter(plans))]
            plans[batch] = _plan(self.program, self._weights, batch, self.dtype, x.device)
        released = torch.empty((batch, 0), dtype=self.dtype, device=x.device)
        results = [released] * len(self._position)
        results[0] = x.detach().to(self.dtype).contiguous(memory_format=memory_format(x.ndim))
        for step in plans[batch]:
            out = results[step.inplace_of] if step.inplace_of >= 0 else step.buffer
            results[step.result] = step.kernel([results[i] for i in step.inputs], out)
            for i in step.last_uses:
                results[i] = released
        return [results[self._position[name]] for name in self.program.outputs]

    def workspace(self) -> int:
        """The bytes of the buffers that are kept for this thread's next run."""
        buffers = (step.buffer for plan in self._of_thread.plans.values() for step in plan)
        storages = {buffer.untyped_storage().data_ptr(): buffer for buffer in buffers if buffer is not None}
        return sum(buffer.untyped_storage().nbytes() for buffer in storages.values())

    def with_own_weights(self) -> "AtenExecutor":
        """Another executor of the same program, which has no weights yet."""
        return AtenExecutor(self.program, self.dtype)


class _Plans(threading.local):
    """The plans of one thread by batch size, with their buffers."""

    def __init__(self) -> None:
        self.plans: dict[int, list[PlanStep]] = {}


class CompiledExecutor:
    """Runs a lowered program by `fastebm::run_program`, for float32 samples.

    It has the interface of `AtenExecutor`; its results have the same bits for any batch, split and number of threads.
    `compiled` is what runs.
    """

    def __init__(self, program: Program, lowered: LoweringResult, dtype: torch.dtype, device: torch.device):
        self.program = program
        self.lowered = lowered
        self.dtype = dtype
        self.referenced = referenced_tensors(lowered.lazy_tensors())
        self.device = device
        self.compiled = CompiledProgram(lowered.program, device)
        self._folding = RepeatedWork("the folding of weights")

    @torch.no_grad()
    def refresh(self) -> None:
        """Evaluate the program's weights. On a GPU that is a graph where they lie where they lay before."""
        places = places_of(leaf_tensors(self.lowered.lazy_tensors()))
        if not self._folding.replay(places):
            self._fold()
            self._folding.capture(places, self.device, self._fold)

    def _fold(self) -> None:
        self.compiled.refresh(*self.lowered.constants())

    @torch.no_grad()
    def __call__(self, x: Tensor) -> list[Tensor]:
        """Energies and gradient of a batch of samples, as new float32 tensors."""
        return list(self.compiled(x.detach().contiguous()))

    def with_own_weights(self) -> "CompiledExecutor":
        """Another executor of the same program, which has no weights yet."""
        return CompiledExecutor(self.program, self.lowered, self.dtype, self.device)


def _packed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in the dtype and memory format of the kernels. A scalar factor keeps its own, more precise dtype."""
    if not tensor.shape:
        return tensor
    return tensor.to(dtype).contiguous(memory_format=memory_format(tensor.ndim))


# ---- planning


def _plan(
    program: Program, weights: dict[LazyTensor, Tensor], batch: int, dtype: torch.dtype, device: torch.device
) -> list[PlanStep]:
    """The steps of a program for one batch size.

    A result is released after the last operation that reads it or a view of it. A pointwise operation overwrites an
    input whose last use it is; any other operation gets a buffer that is no longer in use, or a new one.
    """
    position = {node.name: i for i, node in enumerate(program)}
    roots = _view_roots(program)
    last_uses = _last_uses(program, roots)
    outputs = {roots[name] for name in program.outputs}
    free: list[Tensor] = []
    live: dict[str, Tensor] = {}
    steps = []
    for node in program:
        if isinstance(node.operation, Input):
            continue
        ending = [name for name in last_uses.get(node.name, ()) if name not in outputs]
        inplace_of, buffer = -1, None
        if isinstance(node.operation, SUPPORTS_OUT) and node.name not in outputs:
            overwritten = _overwritten_input(program, node, roots, ending)
            if overwritten is not None:
                inplace_of = position[overwritten]
                if overwritten in live:
                    live[node.name] = live.pop(overwritten)
            else:
                live[node.name] = _take_buffer(free, batch * math.prod(node.shape), dtype, device)
                buffer = _as_samples(live[node.name], batch, node.shape)
        inputs = tuple(position[name] for name in node.inputs) or (0,)
        released = tuple(position[name] for name, root in roots.items() if root in ending)
        steps.append(
            PlanStep(kernel(node.operation, weights), inputs, position[node.name], buffer, inplace_of, released)
        )
        free += [live.pop(name) for name in ending if name in live]
    return steps


def _view_roots(program: Program) -> dict[str, str]:
    """For every result the one whose memory it uses: its own name, or the name of what it is a view of."""
    roots: dict[str, str] = {}
    for node in program:
        view = node.operation.is_view and node.inputs
        roots[node.name] = roots[node.inputs[0]] if view else node.name
    return roots


def _last_uses(program: Program, roots: dict[str, str]) -> dict[str, list[str]]:
    """By node: the results, without views, whose last use it is; a result that nothing reads ends where it is made."""
    last_user = {roots[node.name]: node.name for node in program}
    for node in program:
        for name in node.inputs:
            last_user[roots[name]] = node.name
    last_uses: dict[str, list[str]] = {}
    for name, user in last_user.items():
        last_uses.setdefault(user, []).append(name)
    return last_uses


def _overwritten_input(program: Program, node: Node, roots: dict[str, str], ending: list[str]) -> str | None:
    """The input that the node's result can overwrite, if there is one."""
    for i in inplace_inputs(node.operation):
        name = node.inputs[i]
        source = program[name]
        same_memory = roots[name] == name and source.shape == node.shape and not isinstance(source.operation, Input)
        # Another input that is a view of the same memory would be read while it is overwritten.
        no_alias = sum(roots[other] == name for other in node.inputs) == 1
        if same_memory and no_alias and name in ending:
            return name
    return None


def _take_buffer(free: list[Tensor], numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The smallest free buffer that is large enough, or a new one."""
    fitting = [buffer for buffer in free if buffer.numel() >= numel]
    if not fitting:
        return torch.empty(numel, dtype=dtype, device=device)
    best = min(fitting, key=Tensor.numel)
    free[:] = [buffer for buffer in free if buffer is not best]
    return best


def _as_samples(buffer: Tensor, batch: int, sample: tuple[int, ...]) -> Tensor:
    """The start of a buffer as a batch of samples; images are channels-last."""
    front = buffer[: batch * math.prod(sample)]
    if len(sample) != 3:
        return front.view(batch, *sample)
    channels, height, width = sample
    return front.view(batch, height, width, channels).permute(0, 3, 1, 2)
