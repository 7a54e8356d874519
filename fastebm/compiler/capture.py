"""Captures an energy as a program: `torch.export`, and then the import of its ATen graph.

The export runs in eval mode with frozen weights (`frozen_weights.py`) and a dynamic batch size, and without
decompositions. It runs the energy's own code, so that convolution subclasses and branches such as `if beta < 1` do what
they do when the energy runs. The part of the graph that does not depend on x becomes `LazyTensor`s. They start from the
module's tensors, which every chain looks up by name, and from other tensors of the energy, which are kept by reference.
One thread exports at a time, and none evaluates an energy meanwhile (`process_state.py`).
"""

from __future__ import annotations

import io
import logging
import operator
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as _modules

from fastebm.compiler.faults import described
from fastebm.compiler.import_aten import RULES, AtenImporter, SampleTensor, UnsupportedError
from fastebm.compiler.lazy_tensors import LazyTensor
from fastebm.compiler.operations import Input, Operation
from fastebm.compiler.process_state import exporting
from fastebm.compiler.program import INPUT, Builder, Node, Program, eliminate_dead_code
from fastebm.compiler.view_sinking import sink_views

__all__ = ["UnsupportedError", "capture"]

Energy = Callable[[Tensor], Tensor]

# Code that asks for `len(x)` makes a number of the batch. It is captured at two lengths then, and has to be the same.
SPECIALIZED = "your code specialized it to be a constant"
LENGTHS = (11, 13)

_LAST_RESORT = [] if logging.lastResort is None else [logging.lastResort]

# Operations that only check their arguments.
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size", "sym_constrain_range")


class _ExportedModule(nn.Module):
    """A module whose forward is the energy, so that export finds the module's weights under their names."""

    def __init__(self, energy: Energy, inner: nn.Module | None):
        super().__init__()
        self.inner = inner
        # Not a normal attribute, which would register a module a second time.
        vars(self)["energy"] = energy

    def forward(self, x: Tensor) -> Tensor:
        return vars(self)["energy"](x)


def capture(energy: Energy, module: nn.Module | None, x: Tensor) -> Program:
    """The program of `energy` for samples like those of x. Its output is the energies, of shape () per sample.

    Args:
        energy: maps (B, ...) to one number per sample.
        module: the one whose weights the energy reads, in eval mode with frozen weights; None if it is unknown.
        x: samples; only their shape, dtype and device matter, not the batch size.

    Raises:
        UnsupportedError: with the node and the reason, if the energy uses an operation that no rule imports.
    """
    try:
        return _captured(energy, module, x)
    except UnsupportedError as error:
        if SPECIALIZED not in str(error.__cause__):
            raise
        first, second = (_captured(energy, module, x, batch) for batch in LENGTHS)
        if not same_program(first, second):
            raise
        return first


def _captured(energy: Energy, module: nn.Module | None, x: Tensor, batch: int | None = None) -> Program:
    """The program for any batch, or as it is for one of `batch` samples."""
    exported = _export(_ExportedModule(energy, module), x, batch)
    weights = _named_weights(exported, module)
    importer = AtenImporter(Builder(), x.dtype)
    results: dict[fx.Node, Any] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in weights:
            results[node] = weights[node.name]
        elif node.op == "placeholder":
            importer.batch, *sample = node.meta["val"].shape
            results[node] = SampleTensor(importer.builder.add_exact(Input(tuple(sample)), name=INPUT))
        elif node.op == "call_function":
            results[node] = _call(importer, node, results)
        elif node.op == "output":
            return _program(importer, results, node.args[0])
        else:
            raise UnsupportedError(node.name, f"nodes of kind {node.op} are not supported")
    raise UnsupportedError("output", "the graph has none")


def _export(holder: nn.Module, x: Tensor, batch: int | None) -> torch.export.ExportedProgram:
    # Two samples, because export takes a batch of one for a constant.
    example = torch.zeros(batch or 2, *x.shape[1:], dtype=x.dtype, device=x.device)
    dynamic = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    try:
        with tracing(holder):
            exported = torch.export.export(holder, (example,), dynamic_shapes=dynamic, strict=False)
            if any(_mutates(node) for node in exported.graph.nodes):
                exported = exported.run_decompositions({})
    except Exception as error:  # whatever the energy or the exporter raises, autograd may still work
        raise UnsupportedError("torch.export", described(error)) from error
    signature = exported.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        raise UnsupportedError(changed[0], "the energy writes to it")
    return exported


@contextmanager
def tracing(module: nn.Module | None) -> Iterator[None]:
    """Inside, one thread traces an energy without a trace of that: no prints, no graphs, no hooks called.

    Forward hooks of users would get fake tensors. A hook that changes a result is found when the program is compared
    with the energy's own code. PyTorch's own hooks, such as an older spectral norm, are part of the energy.
    """
    with (
        exporting(),
        _leaving_no_graph(),
        _without_hooks(module),
        _silent(),
        _leaving_no_transforms(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        yield


@contextmanager
def _leaving_no_transforms() -> Iterator[None]:
    """Without this, a trace that fails within `torch.vmap` or `torch.func.grad` leaves them open, autograd broken."""
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        if torch._C._functorch.get_dynamic_layer_stack_depth() > depth:
            torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


@contextmanager
def _silent() -> Iterator[None]:
    """Without what PyTorch logs, warns of and prints in this thread: that no capture is possible is no one's error."""
    thread = threading.get_ident()

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    names = [name for name in list(logging.root.manager.loggerDict) if name.partition(".")[0] == "torch"]
    loggers = [logging.getLogger(name) for name in names]
    handlers = [*(handler for logger in [*loggers, logging.root] for handler in logger.handlers), *_LAST_RESORT]
    errors = sys.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for handler in handlers:
            handler.addFilter(of_others)
        sys.stderr = _OfOtherThreads(errors, thread)
        try:
            yield
        finally:
            sys.stderr = errors
            for handler in handlers:
                handler.removeFilter(of_others)


class _OfOtherThreads(io.TextIOBase):
    """A stream to which one thread writes nothing."""

    def __init__(self, stream: Any, silenced: int) -> None:
        self._stream = stream
        self._silenced = silenced

    def write(self, text: str) -> int:
        if self._stream is None or threading.get_ident() == self._silenced:
            return len(text)
        return self._stream.write(text)

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()


@contextmanager
def _without_hooks(module: nn.Module | None) -> Iterator[None]:
    """Without forward hooks, other than PyTorch's own, of `module` and of all modules."""
    tables: list[dict[int, Any]] = [_modules._global_forward_hooks, _modules._global_forward_pre_hooks]
    for part in () if module is None else module.modules():
        tables += [part._forward_hooks, part._forward_pre_hooks]
    kept = [dict(table) for table in tables]
    try:
        for table, hooks in zip(tables, kept, strict=True):
            for number, hook in hooks.items():
                if not (getattr(hook, "__module__", None) or type(hook).__module__).startswith("torch."):
                    del table[number]
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.clear()
            table.update(hooks)


@contextmanager
def _leaving_no_graph() -> Iterator[None]:
    """Without this, the exporter keeps a node of every fake tensor, and with it every graph, for the whole process."""
    from torch.fx.experimental import proxy_tensor

    nodes: dict[int, fx.Node] = getattr(proxy_tensor, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {})
    found = dict(nodes)
    try:
        yield
    finally:
        nodes.clear()
        nodes.update(found)


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _named_weights(exported: torch.export.ExportedProgram, module: nn.Module | None) -> dict[str, LazyTensor]:
    """The lazy tensors of the graph's placeholders other than x, by name."""
    weights = {}
    for spec in exported.graph_signature.input_specs:
        if spec.target is None:
            continue
        path = spec.target.removeprefix("inner.")
        if module is not None and path != spec.target and isinstance(_find(module, path), Tensor):
            weights[spec.arg.name] = LazyTensor(_find, (module, path), tuple(_find(module, path).shape))
        else:
            tensor = exported.constants.get(spec.target, exported.state_dict.get(spec.target))
            if not isinstance(tensor, Tensor):
                raise UnsupportedError(spec.target, f"it is a {type(tensor).__name__} instead of a tensor")
            weights[spec.arg.name] = LazyTensor(_Reference.get, (_Reference(tensor),), tuple(tensor.shape))
    return weights


class _Reference:
    """Wraps a tensor that is kept by reference, so that shape inference does not compute with it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def get(self) -> Tensor:
        return self.tensor


def referenced_tensors(wanted: Iterable[LazyTensor]) -> list[Tensor]:
    """The tensors kept by reference that some lazy tensors depend on, each once."""
    references = (part for part in _parts(wanted) if isinstance(part, _Reference))
    return list({id(each.tensor): each.tensor for each in references}.values())


def leaf_tensors(wanted: Iterable[LazyTensor]) -> list[Tensor]:
    """The tensors of the energy that some lazy tensors are evaluated from, as they are now, each once."""
    lazy = (part for part in _parts(wanted) if isinstance(part, LazyTensor))
    values = [part.function(*part.arguments) for part in lazy if part.function in (_find, _Reference.get)]
    return list({id(value): value for value in values if isinstance(value, Tensor)}.values())


def _parts(wanted: Iterable[LazyTensor]) -> Iterator[LazyTensor | _Reference]:
    """The lazy tensors and references that some lazy tensors are made of, these among them; each lazy tensor once."""
    seen: set[int] = set()
    waiting: list[Any] = list(wanted)
    while waiting:
        argument = waiting.pop()
        if isinstance(argument, list | tuple):
            waiting += argument
        elif isinstance(argument, _Reference):
            yield argument
        elif isinstance(argument, LazyTensor) and id(argument) not in seen:
            seen.add(id(argument))
            waiting += [*argument.arguments, *argument.keywords.values()]
            yield argument


def _find(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path, or None."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _call(importer: AtenImporter, node: fx.Node, results: dict[fx.Node, Any]) -> Any:
    """The result of `node`: one or several sample tensors, a lazy tensor, or the batch size."""
    arguments: Any
    keywords: Any
    arguments, keywords = fx.node.map_arg((node.args, node.kwargs), results.__getitem__)
    used = list(_flatten(results[other] for other in node.all_input_nodes))
    if node.target is operator.getitem and not isinstance(used[0], LazyTensor):
        return arguments[0][arguments[1]]
    target = node.target
    name = str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
    if name == "aten.sym_size.int":
        return node.meta["val"] if node.args[1] == 0 or isinstance(node.meta["val"], int) else None
    if any(check in name for check in _CHECKS):
        return None
    if any(isinstance(argument, SampleTensor) for argument in used):
        rule = RULES.get(name)
        if rule is None:
            raise UnsupportedError(node.name, f"no rule imports {name}")
        return importer.apply(rule, node, arguments, keywords)
    if any(isinstance(argument, torch.SymInt) for argument in used):
        raise UnsupportedError(node.name, f"the result of {name} depends on the batch size")
    if isinstance(target, torch._ops.OpOverload):
        if torch.Tag.nondeterministic_seeded in target.tags:
            raise UnsupportedError(node.name, f"{name} is random")
    elif target is not operator.getitem:
        raise UnsupportedError(node.name, f"no rule imports {name}")
    result = node.meta.get("val")
    shape = tuple(result.shape) if isinstance(result, Tensor) else ()
    return LazyTensor(target, tuple(arguments), shape, **keywords)


def same_program(a: Program, b: Program) -> bool:
    """Whether two captures of one energy compute the same: the same operations, of the same expressions of weights."""
    known: set[tuple[int, int]] = set()  # lazy tensors that are

    def same(p: Any, q: Any) -> bool:
        if type(p) is not type(q):
            return False
        if isinstance(p, LazyTensor):
            if (id(p), id(q)) not in known:
                if p.function is not q.function or p.shape != q.shape:
                    return False
                if not (same(p.arguments, q.arguments) and same(p.keywords, q.keywords)):
                    return False
                known.add((id(p), id(q)))
            return True
        if isinstance(p, _Reference):
            return p.tensor is q.tensor or torch.equal(p.tensor, q.tensor)
        if isinstance(p, list | tuple):
            return len(p) == len(q) and all(map(same, p, q))
        if isinstance(p, dict):
            return p.keys() == q.keys() and all(same(p[name], q[name]) for name in p)
        if isinstance(p, Node):
            return (p.name, p.inputs, p.shape) == (q.name, q.inputs, q.shape) and same(p.operation, q.operation)
        if isinstance(p, Operation):
            return same(vars(p), vars(q))
        return bool(p is q or p == q)

    return a.outputs == b.outputs and same(a.nodes, b.nodes)


def _flatten(results: Iterable[Any]) -> Iterable[Any]:
    for result in results:
        yield from result if isinstance(result, list | tuple) else [result]


def _program(importer: AtenImporter, results: dict[fx.Node, Any], outputs: Any) -> Program:
    """The program whose output is the energies, with shape () per sample."""
    energies = results[outputs[0]] if len(outputs) == 1 and isinstance(outputs[0], fx.Node) else None
    if not isinstance(energies, SampleTensor):
        raise UnsupportedError("output", "the energies don't depend on x")
    shape = importer.shape(energies)
    if any(length != 1 for length in shape):
        raise UnsupportedError("output", f"shape {shape} per sample is not one number")
    last = importer.reshape(energies, ())
    return sink_views(eliminate_dead_code(Program(tuple(importer.builder.nodes), (last.name,))))
