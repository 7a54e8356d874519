"""Anyone's energy as stock PyTorch runs it best: a copy with its weights folded, frozen and laid out for its device."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm
from torch.nn.utils.spectral_norm import SpectralNorm

from fastebm.evaluation.speed.eager_coarse_to_fine import EagerCoarseToFine
from fastebm.models import CoarseToFineEnergy

Energy = Callable[[Tensor], Tensor]


def stock(energy: Energy) -> Energy:
    """What peers are given: `energy` itself, or the stock twin of our own net, whose operators no compiler can fuse."""
    return EagerCoarseToFine(energy) if isinstance(energy, CoarseToFineEnergy) else energy


def module_of(energy: Energy) -> nn.Module | None:
    """The module whose weights an energy reads: itself, the owner of a bound method, what a `partial` calls."""
    function: Any = energy
    while isinstance(function, functools.partial):
        function = function.func
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def copied(energy: Energy) -> Energy:
    """A copy with weights of its own, as far as they are known."""
    module = module_of(energy)
    parts = [] if module is None else module.modules()
    # What a hook computed in the last forward pass, such as the older spectral norm's weight, can't be copied as it is.
    computed = (value for part in parts for value in vars(part).values() if isinstance(value, Tensor))
    return copy.deepcopy(energy, {id(value): value.detach().clone() for value in computed if not value.is_leaf})


def as_written(energy: Energy) -> Energy:
    """A copy in eval mode whose weights require gradients and whose parametrisations stay: research code's energy."""
    written = copied(energy)
    module = module_of(written)
    if module is not None:
        module.eval().requires_grad_(True)
    return written


def tuned(energy: Energy, weights: torch.dtype | None = None) -> Energy:
    """A copy with frozen weights, spectral norms and other parametrisations folded, images channels-last.

    `weights` is the dtype that they are cast to, None leaves them. Raises ValueError for a cast of an energy whose
    module is not known.
    """
    made = copied(energy)
    module = module_of(made)
    if module is None:
        if weights is not None:
            raise ValueError("its weights are not known, because it is no module, nor a method or partial of one")
        return made
    module.eval()
    fold(module)
    module.requires_grad_(False)
    _set_layout(module)
    if weights is not None:
        module.to(weights)
    return made


@torch.no_grad()
def fold(module: nn.Module) -> None:
    """Puts every parametrised weight, spectral norms of the older kind included, in place as a plain one."""
    for part in module.modules():
        if parametrize.is_parametrized(part):
            _fold_parametrizations(part)
        norms = [hook.name for hook in part._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
        for name in norms:
            remove_spectral_norm(part, name)


def _fold_parametrizations(part: nn.Module) -> None:
    # Not `remove_parametrizations`: it takes properties out of a class that a copy shares with its original.
    evaluated = {name: _evaluated(part, name) for name in cast(nn.ModuleDict, part.parametrizations)}
    part.__class__ = parametrize.type_before_parametrizations(part)
    del part.parametrizations
    for name, value in evaluated.items():
        part.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))


@torch.no_grad()
def refold(folded: nn.Module, module: nn.Module) -> None:
    """Writes the present weights of `module` into a copy of it that `tuned` made, in place: no power iterations."""
    parts = dict(module.named_modules())
    for path, part in folded.named_modules():
        for name, weight in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            weight.copy_(_evaluated(parts[path], name))


def _evaluated(part: nn.Module, name: str) -> Tensor:
    """A weight as it is used, without the power iterations that a spectral norm makes in train mode."""
    if not parametrize.is_parametrized(part, name):
        return getattr(part, name)
    parametrization = cast(nn.ModuleDict, part.parametrizations)[name]
    training = parametrization.training
    parametrization.eval()
    try:
        return parametrization()
    finally:
        parametrization.train(training)


def _set_layout(module: nn.Module) -> None:
    # Only images have a channels-last layout; five-dimensional weights refuse this one.
    if not any(parameter.ndim == 5 for parameter in module.parameters()):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def entering(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x as a tuned energy reads it: in its dtype, images channels-last."""
    layout = torch.channels_last if x.ndim == 4 else torch.preserve_format
    return x.to(dtype=x.dtype if dtype is None else dtype, memory_format=layout)
