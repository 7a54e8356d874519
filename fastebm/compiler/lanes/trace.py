"""Traces the energy of one sample and its gradient as a graph of core ATen operations.

Autograd itself runs while the graph is recorded. So the gradient is what autograd gives, whatever the energy does:
`detach`, `no_grad`, custom backward functions, gradient hooks, checkpoints, gradients within the energy.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastebm.compiler.capture import tracing

from .recording import Depends, LaneError, Recorder

__all__ = ["JointGraph", "LaneError", "multiplies", "trace"]

aten = torch.ops.aten

# What multiplies, as ATen's operations and as layers.
PRODUCTS = (aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv)
LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)

OF_BATCH = " (what it reads with a row for each sample of a batch has to be handed over as conditions)"


@dataclass(frozen=True)
class JointGraph:
    """Energy and gradient of a batch of one sample.

    Attributes:
        graph: has a placeholder for the sample and for each of its conditions, and returns (energy, gradient).
        tensors: that the graph reads, by the names of its `get_attr` nodes.
        weights: for the name of each tensor that isn't a literal of the energy's own code, how it is found: a path in
            the module, or the tensor itself.
        written: the storages of the nodes' tensors that `copy_` writes to, and what these depend on in the end.
        assumed: Python numbers and truths that were taken from weights or integers, by the nodes. The graph holds as
            long as they are the same.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    weights: dict[str, str | Tensor]
    written: dict[int, Depends]
    assumed: dict[fx.Node, Any]


def trace(
    energy: Callable[..., Tensor], module: nn.Module | None, sample: Tensor, conditions: Sequence[Tensor] = ()
) -> JointGraph:
    """The graph of `energy` for one sample, (1, ...), and what it comes with, each (1, ...).

    Raises LaneError with the operation, and its line in the energy, for what depends on the sample in a way that no
    graph can have. What the energy itself raises is passed on.
    """

    def joint(x: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        value = energy(x, *given)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise LaneError(f"the energy of one sample has to be one number, got {shape}{OF_BATCH}")
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value.reshape(()), x, allow_unused=True)
        if gradient is None:
            raise LaneError("the energy does not depend on x in a way that autograd can differentiate")
        return value.detach(), gradient

    x = sample.detach().clone().requires_grad_()
    with _tracing(module):
        recorder = Recorder()
        recorder.record(joint, x, *(condition.detach().clone() for condition in conditions))
    graph = recorder.graph
    for node in reversed(graph.nodes):
        kept = node.op in ("placeholder", "output") or node.target is aten.copy_.default or node in recorder.assumed
        if not node.users and not kept:
            graph.erase_node(node)
    weights = _weights(recorder, module)
    return JointGraph(graph, recorder.tensors, weights, recorder.written, recorder.assumed)


class _Products(TorchDispatchMode):
    """Notes whether a convolution or a product of matrices ran."""

    found = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No, as for a `Recorder`."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.found |= func.overloadpacket in PRODUCTS
        return func(*args, **(kwargs or {}))


def multiplies(energy: Callable[..., Tensor], module: nn.Module | None, sample: Tensor) -> bool:
    """Whether the energy of a sample, (1, ...), has convolutions or products of matrices; True where it can't be run.

    Parts of a module tell that without a run.
    """
    if module is not None and any(isinstance(part, LAYERS) for part in module.modules()):
        return True
    try:
        with _tracing(module), torch.no_grad(), _Products() as products:
            energy(sample.detach().clone())
        return products.found
    except Exception:
        return True


@contextmanager
def _tracing(module: nn.Module | None) -> Iterator[None]:
    """Distributions don't check their arguments, attention and recurrent layers are written as products.

    Generators end as they were, and Python's and numpy's must not be used.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    validated = torch.distributions.Distribution._validate_args
    # The generator that `np.random.normal` and the like draw from.
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002
    fused = torch._C._get_mkldnn_enabled()
    torch.distributions.Distribution.set_default_validate_args(False)
    torch._C._set_mkldnn_enabled(False)  # the switch in `torch.backends` prints a warning
    try:
        with (
            tracing(module),
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
            _uncompiled(),
        ):
            yield
        if random.getstate() != states[0]:
            raise LaneError("the energy draws random numbers of Python's `random`")
        after = np.random.get_state()  # noqa: NPY002
        if not all(np.array_equal(a, b) for a, b in zip(after, states[1], strict=True)):
            raise LaneError("the energy draws random numbers of `numpy.random`")
    finally:
        torch._C._set_mkldnn_enabled(fused)
        torch.distributions.Distribution.set_default_validate_args(validated)
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.random.set_rng_state(states[2])


def _uncompiled() -> Any:
    """What `torch.compile` made runs as it was written. Where nothing was compiled, its compiler isn't even loaded."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else ExitStack()


def _weights(recorder: Recorder, module: nn.Module | None) -> dict[str, str | Tensor]:
    """How the tensors are found that the graph reads, but for literals."""
    paths = {} if module is None else _paths(module)
    used = dict.fromkeys(str(node.target) for node in recorder.graph.nodes if node.op == "get_attr")
    tensors = {name: recorder.tensors[name] for name in used if name not in recorder.literals}
    return {name: paths.get(id(tensor), tensor.detach()) for name, tensor in tensors.items()}


def _paths(module: nn.Module) -> dict[int, str]:
    """For the id of every tensor that a module has as an attribute, its path."""
    paths: dict[int, str] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        for values in (part._parameters, part._buffers, vars(part)):
            for name, value in values.items():
                if isinstance(value, Tensor):
                    paths.setdefault(id(value), f"{prefix}.{name}" if prefix else name)
    return paths
