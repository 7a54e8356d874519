"""Holding a module still while its energy is differentiated many times over."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from fastebm.compiler.precision import without_autocast

# Evaluated parametrisations by their layer and name, for chains with the weights of the last one.
Evaluated = dict[tuple[nn.Module, str], Tensor]


@contextmanager
def frozen_weights(module: nn.Module, evaluated: Evaluated | None = None) -> Iterator[None]:
    """Inside, `module` is in eval mode, needs no weight gradients, and has each parametrised weight evaluated once.

    What `evaluated` holds is taken from there, and what it doesn't is added: clear it when weights may have changed.

    On leaving, also by an exception, every flag is as it was, of each sub-module and parameter by itself. The flags
    are set directly and not through `eval()`, so that nothing that a module's own `train()` may do is left behind.
    Weights that were created under `torch.inference_mode` are replaced by copies that autograd accepts.
    Parametrisations run in the weights' own precision, without autocast: a spectral norm in bfloat16 would scale the
    whole layer by its rounding error.

    Inside, weights must not be changed: parametrised ones (spectral norm, an equalised learning rate) would not
    follow; and the module must not be deep-copied, because its parametrisations are out of place (`state_dict()` is
    as always).
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
    """Put copies in the place of inference tensors, one for each, so that tied weights stay tied."""
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
    """Give `part` its class from before parametrisation, and the evaluated weights as plain attributes.

    Not `torch.nn.utils.parametrize.cached()`: that keeps values under the id of the module which was parametrised
    first, so that a deep copy (a frozen or averaged net) reads the original's weights; and inside of somebody's own
    `cached()` it would take weights from, and leave weights without gradients to, the training step around it.
    """
    parametrizations = cast(nn.ModuleDict, part.parametrizations)
    names = [name for name in parametrizations if name not in vars(part)]  # not those that an outer call holds
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
