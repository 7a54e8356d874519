"""From anyone's energy to a program: `torch.export`, and then the translation of its graph into our vocabulary.

Export runs in eval mode at fixed weights (see `frozen_weights`) with a dynamic batch, without decompositions: so a
convolution subclass, a shape check and an `if beta < 1` are what they are when the energy runs. The part of the graph
that doesn't depend on x becomes `LazyTensor`s. What they start from are the module's tensors, looked up by name at every
chain, and tensors that the energy holds in another way, by reference.
"""

import copyreg
import operator
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastebm.compiler.import_aten import RULES, AtenImporter, SampleTensor, UnsupportedError
from fastebm.compiler.lazy_tensors import LazyTensor
from fastebm.compiler.operations import Input
from fastebm.compiler.program import INPUT, Builder, Program, eliminate_dead_code

__all__ = ["UnsupportedError", "capture"]

Energy = Callable[[Tensor], Tensor]

# Operations that only check.
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size", "sym_constrain_range")


class _Holder(nn.Module):
    """A module whose forward is the energy, so that export finds the weights of `inner` under their names."""

    def __init__(self, energy: Energy, inner: nn.Module | None):
        super().__init__()
        self.inner = inner
        # Not an attribute set as usual: a module would be registered a second time.
        vars(self)["energy"] = energy

    def forward(self, x: Tensor) -> Tensor:
        return vars(self)["energy"](x)


def capture(energy: Energy, module: nn.Module | None, x: Tensor) -> Program:
    """The program of `energy` for samples like those of x: output 0 holds the energies, of shape () a sample.

    Args:
        energy: maps (B, ...) to one number a sample.
        module: the one whose weights the energy reads, in eval mode and at fixed weights; None if it is not known.
        x: some samples; only shape, dtype and device matter, and the length of the batch not at all.

    Raises:
        UnsupportedError: with the node and the reason, where something lies beyond the vocabulary.
    """
    exported = _export(_Holder(energy, module), x)
    leaves = _leaves(exported, module)
    builder = Builder()
    translator = AtenImporter(builder, x.dtype)
    known: dict[fx.Node, Any] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            if node.name in leaves:
                known[node] = leaves[node.name]
            else:
                translator.batch, *sample = node.meta["val"].shape
                known[node] = SampleTensor(builder.add_exact(Input(tuple(sample)), name=INPUT))
        elif node.op == "call_function":
            known[node] = _call(translator, node, known)
        elif node.op == "output":
            return _finished(translator, known, node.args[0])
        else:
            raise UnsupportedError(node.name, f"{node.op} is not understood")
    raise UnsupportedError("output", "the graph has none")


def _export(holder: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    # Two samples: a batch of one would be taken for a constant.
    example = torch.zeros(2, *x.shape[1:], dtype=x.dtype, device=x.device)
    batch = {0: torch.export.Dim("batch", min=1)}
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.filterwarnings("ignore", module=copyreg.__name__)  # PyTorch's own, about its own tree specs
            exported = torch.export.export(holder, (example,), dynamic_shapes=(batch,), strict=False)
            if any(_mutates(node) for node in exported.graph.nodes):
                exported = exported.run_decompositions({})
    except Exception as error:  # whatever the energy or the exporter raises, autograd may still do it
        raise UnsupportedError("torch.export", _first_line(error)) from error
    signature = exported.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        raise UnsupportedError(changed[0], "the energy writes to it")
    return exported


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def _leaves(exported: torch.export.ExportedProgram, module: nn.Module | None) -> dict[str, LazyTensor]:
    """The values of the graph's placeholders other than x, by their names."""
    leaves = {}
    for spec in exported.graph_signature.input_specs:
        if spec.target is None:
            continue
        path = spec.target.removeprefix("inner.")
        if module is not None and path != spec.target and isinstance(_find(module, path), Tensor):
            leaves[spec.arg.name] = LazyTensor(_find, (module, path), tuple(_find(module, path).shape))
        else:
            tensor = exported.constants.get(spec.target, exported.state_dict.get(spec.target))
            if not isinstance(tensor, Tensor):
                raise UnsupportedError(spec.target, f"a {type(tensor).__name__} is no tensor")
            leaves[spec.arg.name] = LazyTensor(_itself, (_Reference(tensor),), tuple(tensor.shape))
    return leaves


class _Reference:
    """A tensor held by reference, which is not an argument that is computed with when shapes are worked out."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def referenced(wanted: Iterable[LazyTensor]) -> list[Tensor]:
    """The tensors held by reference that some values are made of, each once."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    waiting: list[Any] = list(wanted)
    while waiting:
        argument = waiting.pop()
        if isinstance(argument, list | tuple):
            waiting += argument
        elif isinstance(argument, _Reference):
            found[id(argument.tensor)] = argument.tensor
        elif isinstance(argument, LazyTensor) and id(argument) not in seen:
            seen.add(id(argument))
            waiting += [*argument.arguments, *argument.keywords.values()]
    return list(found.values())


def _itself(reference: _Reference) -> Tensor:
    return reference.tensor


def _find(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path, None where there is none."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _call(translator: AtenImporter, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """What `node` gives: samples or several of them, a value, or the batch's length."""
    used = list(_known_arguments((node.args, node.kwargs), known))
    if node.target is operator.getitem and not isinstance(used[0], LazyTensor):
        return known[node.args[0]][node.args[1]]  # type: ignore[index]
    name = _target_name(node)
    if name == "aten.sym_size.int":
        return node.meta["val"] if node.args[1] == 0 or isinstance(node.meta["val"], int) else None
    if any(check in name for check in _CHECKS):
        return None
    if any(isinstance(argument, SampleTensor) for argument in used):
        rule = RULES.get(name)
        if rule is None:
            raise UnsupportedError(node.name, f"{name} is not in the vocabulary")
        return translator.translate(rule, node, fx.node.map_arg((node.args, node.kwargs), known.__getitem__))
    return _value(node, name, used, known)


def _value(node: fx.Node, name: str, used: list[Any], known: dict[fx.Node, Any]) -> LazyTensor:
    """A node that doesn't depend on x."""
    if any(isinstance(argument, torch.SymInt) for argument in used):
        raise UnsupportedError(node.name, f"{name} makes something that depends on the length of the batch")
    if isinstance(node.target, torch._ops.OpOverload):
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise UnsupportedError(node.name, f"{name} is random")
    elif node.target is not operator.getitem:
        raise UnsupportedError(node.name, f"{name} is not understood")
    arguments, keywords = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
    result = node.meta.get("val")
    shape = tuple(result.shape) if isinstance(result, Tensor) else ()
    return LazyTensor(node.target, tuple(arguments), shape, **keywords)


def _known_arguments(arguments: Any, known: dict[fx.Node, Any]) -> Iterable[Any]:
    found: list[Any] = []

    def collect(node: fx.Node) -> fx.Node:
        value = known[node]
        found.extend(value if isinstance(value, list | tuple) else [value])
        return node

    fx.node.map_arg(arguments, collect)
    return found


def _target_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return getattr(target, "__name__", str(target))


def _finished(translator: AtenImporter, known: dict[fx.Node, Any], results: Any) -> Program:
    """The program whose output are the energies, flattened."""
    energies = known[results[0]] if len(results) == 1 and isinstance(results[0], fx.Node) else None
    if not isinstance(energies, SampleTensor):
        raise UnsupportedError("output", "the energies don't depend on x")
    shape = translator.shape(energies)
    if any(length != 1 for length in shape):
        raise UnsupportedError("output", f"shape {shape} a sample is not one number")
    last = translator.reshaped(energies, ())
    return eliminate_dead_code(Program(tuple(translator.builder.nodes), (last.name,)))
