"""Running a program: its values once a chain, its operations one after the other, in buffers that are made once."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastebm.compiler.aten_kernels import TO_BUFFER, Kernel, kernel, overwritable
from fastebm.compiler.capture import referenced
from fastebm.compiler.lazy_tensors import LazyTensor, evaluate
from fastebm.compiler.lowering import LoweringResult
from fastebm.compiler.operations import Input
from fastebm.compiler.program import Node, Program
from fastebm.ops import CompiledProgram

# Plans that are kept, each for one length of the batch: a full one, and the rest at the end of a list.
PLANS = 2


@dataclass(frozen=True)
class Step:
    """One operation of a plan. Results are known by their number.

    Attributes:
        kernel: what runs.
        inputs: the results that it reads.
        result: the number of its own.
        buffer: where it writes to, if that was planned.
        over: the result that it takes the place of, or -1.
        released: results that nothing needs afterwards.
    """

    kernel: Kernel
    inputs: tuple[int, ...]
    result: int
    buffer: Tensor | None
    over: int
    released: tuple[int, ...]


class AtenExecutor:
    """A program that can be run, in one dtype.

    `refresh` evaluates the program's values: at the start of a chain, and once before the first run. They always stay
    in the same tensors. A run returns fresh tensors; all between lives in a workspace that is kept for the next run,
    and in the results of library convolutions, which PyTorch allocates itself. So one run at a time.
    """

    def __init__(self, program: Program, dtype: torch.dtype):
        self.program = program
        self.dtype = dtype
        self._number = {node.name: i for i, node in enumerate(program)}
        self._wanted = list(dict.fromkeys(value for node in program for value in node.operation.weights()))
        self._known: dict[LazyTensor, Tensor] = {}
        self._plans: dict[int, list[Step]] = {}

    @torch.no_grad()
    def refresh(self) -> None:
        """Evaluate all that the weights decide."""
        results = evaluate(self._wanted)
        for value in self._wanted:
            packed = _packed(results[value], self.dtype)
            if value in self._known:
                self._known[value].copy_(packed)
            else:
                # Not a weight of the module itself, which a later chain would write to.
                self._known[value] = packed.clone() if packed is results[value] else packed

    @torch.no_grad()
    def __call__(self, x: Tensor) -> list[Tensor]:
        """The outputs for a batch of samples, in the program's dtype."""
        count = x.shape[0]
        if count not in self._plans:
            while len(self._plans) >= PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[count] = _plan(self.program, self._known, count, self.dtype, x.device)
        nothing = torch.empty((count, 0), dtype=self.dtype, device=x.device)
        results = [nothing] * len(self._number)
        results[0] = _entering(x, self.dtype)
        for step in self._plans[count]:
            out = results[step.over] if step.over >= 0 else step.buffer
            results[step.result] = step.kernel([results[i] for i in step.inputs], out)
            for i in step.released:
                results[i] = nothing
        return [results[self._number[name]] for name in self.program.outputs]

    def workspace(self) -> int:
        """The bytes that the kept buffers take."""
        buffers = (step.buffer for plan in self._plans.values() for step in plan)
        storages = {buffer.untyped_storage().data_ptr(): buffer for buffer in buffers if buffer is not None}
        return sum(buffer.untyped_storage().nbytes() for buffer in storages.values())


class CompiledExecutor:
    """A lowered program that runs by `fastebm::run_program`: as `AtenExecutor`, for float32 samples.

    Its results are the same bits for any batch, split and number of threads. `fused` is the program as it runs.
    """

    def __init__(self, program: Program, lowered: LoweringResult, dtype: torch.dtype, device: torch.device):
        self.program = program
        self.lowered = lowered
        self.dtype = dtype
        self.referenced = referenced([*lowered.values, *(n for n in lowered.numbers if isinstance(n, LazyTensor))])
        self.fused = CompiledProgram(lowered.recipe, device)

    @torch.no_grad()
    def refresh(self) -> None:
        """Evaluate all that the weights decide."""
        self.fused.refresh(*self.lowered.constants())

    @torch.no_grad()
    def __call__(self, x: Tensor) -> list[Tensor]:
        """Energies and gradient of a batch of samples, fresh, in float32."""
        return list(self.fused(x.detach().contiguous()))

    def workspace(self) -> int:
        """The bytes that the kept buffers take."""
        return self.fused.workspace_bytes


def _packed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A value as kernels read it: four dimensions (a convolution's weight) channels-last.

    A single factor stays in full precision: it is rounded with what it multiplies.
    """
    if not tensor.shape:
        return tensor
    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    return tensor.to(dtype).contiguous(memory_format=layout)


def _entering(x: Tensor, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    return x.detach().to(dtype).contiguous(memory_format=layout)


# ---- planning


def _plan(
    program: Program, known: dict[LazyTensor, Tensor], count: int, dtype: torch.dtype, device: torch.device
) -> list[Step]:
    """The steps of a program for one length of the batch.

    A result is released at the last operation that reads it, or reads a view of it. A pointwise operation writes over
    an input that it is the last to read; otherwise it gets a buffer that no one needs any more, or a new one.
    """
    number = {node.name: i for i, node in enumerate(program)}
    roots = _roots(program)
    last = _last_reads(program, roots)
    free: list[Tensor] = []
    held: dict[str, Tensor] = {}
    steps = []
    lasting = {roots[name] for name in program.outputs}
    for node in program:
        if isinstance(node.operation, Input):
            continue
        dying = [name for name in last.get(node.name, ()) if name not in lasting]
        over, buffer = -1, None
        if isinstance(node.operation, TO_BUFFER) and node.name not in lasting:
            over_name = _overwritten(program, node, roots, dying)
            if over_name is not None:
                over = number[over_name]
                if over_name in held:
                    held[node.name] = held.pop(over_name)
            else:
                flat = _take(free, count * math.prod(node.shape), dtype, device)
                held[node.name] = flat
                buffer = _shaped(flat, count, node.shape)
        inputs = tuple(number[name] for name in node.inputs) or (0,)
        released = tuple(number[other] for other in roots if roots[other] in dying)
        steps.append(Step(kernel(node.operation, known), inputs, number[node.name], buffer, over, released))
        free += [held.pop(name) for name in dying if name in held]
    return steps


def _roots(program: Program) -> dict[str, str]:
    """For every result the one whose memory it may share: its own name, or what it is a view of."""
    roots: dict[str, str] = {}
    for node in program:
        view = node.operation.is_view and node.inputs
        roots[node.name] = roots[node.inputs[0]] if view else node.name
    return roots


def _last_reads(program: Program, roots: dict[str, str]) -> dict[str, list[str]]:
    """By node: the results (not views) that are read there for the last time, or are never read."""
    final = {roots[node.name]: node.name for node in program}
    for node in program:
        for name in node.inputs:
            final[roots[name]] = node.name
    dying: dict[str, list[str]] = {}
    for name, node_name in final.items():
        dying.setdefault(node_name, []).append(name)
    return dying


def _overwritten(program: Program, node: Node, roots: dict[str, str], dying: list[str]) -> str | None:
    """The input whose place the node's result may take."""
    for i in overwritable(node.operation):
        name = node.inputs[i]
        source = program[name]
        whole = roots[name] == name and source.shape == node.shape and not isinstance(source.operation, Input)
        # A view of it among the other inputs would be read while it is overwritten.
        alone = sum(roots[other] == name for other in node.inputs) == 1
        if whole and alone and name in dying:
            return name
    return None


def _take(free: list[Tensor], numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The smallest free buffer that is large enough, or a new one."""
    fitting = [buffer for buffer in free if buffer.numel() >= numel]
    if not fitting:
        return torch.empty(numel, dtype=dtype, device=device)
    best = min(fitting, key=Tensor.numel)
    free[:] = [buffer for buffer in free if buffer is not best]
    return best


def _shaped(buffer: Tensor, count: int, sample: tuple[int, ...]) -> Tensor:
    """The front of a buffer as a batch of samples, images channels-last."""
    front = buffer[: count * math.prod(sample)]
    if len(sample) != 3:
        return front.view(count, *sample)
    channels, height, width = sample
    return front.view(count, height, width, channels).permute(0, 3, 1, 2)
