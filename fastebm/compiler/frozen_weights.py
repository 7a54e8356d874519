"""A context in which a module's weights are frozen: eval mode, no weight gradients, parametrisations evaluated once."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from fastebm.compiler.precision import without_autocast

# Evaluated parametrised weights, by their layer and name.
Evaluated = dict[tuple[nn.Module, str], Tensor]


@contextmanager
def frozen_weights(module: nn.Module, evaluated: Evaluated | None = None) -> Iterator[None]:
    """Inside, `module` is in eval mode, its weights need no gradient, and parametrised weights are evaluated once.

    Weights found in `evaluated` are taken from there; the others are added to it. Clear it when weights may have
    changed.

    On exit, also after an exception, every flag of every submodule and parameter is restored. The flags are set
    directly, not by `eval()`, so that a module's own `train()` method has no side effects. Weights that were created
    under `torch.inference_mode` are replaced by copies that autograd accepts. Parametrisations run in the weights' own
    dtype, without autocast: the rounding error of a spectral norm in bfloat16 would scale the whole layer.

    Inside, weights must not be changed, because parametrised weights (spectral norm, equalised learning rate) would not
    follow, and the module must not be deep-copied, because its parametrisations are detached (`state_dict()` works).
    """
    with ExitStack() as undo:
        _set_flags(module, undo)
        with ExitStack() as full_precision, torch.inference_mode(False), torch.no_grad():
            for device in {parameter.device.type for parameter in module.parameters()}:
                full_precision.enter_context(without_autocast(device))
            _replace_inference_tensors(module, undo)
            for part in module.modules():
                if is_parametrized(part):
                    _evaluate_parametrizations(part, undo, {} if evaluated is None else evaluated)
        yield


def _set_flags(module: nn.Module, undo: ExitStack) -> None:
    for part in module.modules():
        undo.callback(setattr, part, "training", part.training)
        part.training = False
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.is_leaf and not parameter.is_inference():
            undo.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)


def _replace_inference_tensors(module: nn.Module, undo: ExitStack) -> None:
    """Replace each inference tensor by one copy, so that tied weights stay tied."""
    copies: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_inference():
                    if id(tensor) not in copies:
                        copy = tensor.clone()
                        parameter = isinstance(tensor, nn.Parameter)
                        copies[id(tensor)] = nn.Parameter(copy, requires_grad=False) if parameter else copy
                    undo.callback(setattr, part, name, tensor)
                    setattr(part, name, copies[id(tensor)])


def _evaluate_parametrizations(part: nn.Module, undo: ExitStack, evaluated: Evaluated) -> None:
    """Give `part` its class from before parametrisation, and its evaluated weights as plain attributes.

    This does not use `torch.nn.utils.parametrize.cached()`, for two reasons. Its cache is keyed by the id of the module
    that was parametrised first, so a deep copy, such as an averaged net, would read the original's weights. And inside
    a caller's own `cached()` block, it would share weights with the training step around it.
    """
    parametrizations = cast(nn.ModuleDict, part.parametrizations)
    names = [name for name in parametrizations if name not in vars(part)]  # an outer call has evaluated the others
    if not names:
        return
    for name in names:
        if (part, name) not in evaluated:
            evaluated[part, name] = parametrizations[name]()
    values = {name: evaluated[part, name] for name in names}
    undo.callback(setattr, part, "__class__", type(part))
    part.__class__ = type_before_parametrizations(part)
    for name, value in values.items():
        undo.callback(vars(part).pop, name)
        vars(part)[name] = value
