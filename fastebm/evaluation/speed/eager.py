"""Any energy as eager PyTorch runs it: copies with their weights folded, frozen and laid out for the device.

Baselines read these copies, so that the user's own energy is never changed. Our coarse-to-fine net is replaced by
`EagerCoarseToFine`, which runs no operator of fastebm: `torch.compile` can see and fuse all of it.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm
from torch.nn.utils.spectral_norm import SpectralNorm

from fastebm.models import CoarseToFineEnergy

Energy = Callable[[Tensor], Tensor]


class EagerCoarseToFine(nn.Module):
    """A copy of a `CoarseToFineEnergy` at `beta = 1`, out of PyTorch's own operators: (B, C, s, s) to (B,).

    Its state dict has the names of the net's. Raises ValueError for another activation than the scaled swish, which is
    that of the authors (Zhao, Xie and Li, ICLR 2021).
    """

    def __init__(self, net: CoarseToFineEnergy):
        super().__init__()
        if net.activation != "scaled_swish":
            raise ValueError(f"EagerCoarseToFine knows scaled_swish, not {net.activation}")
        copied = copy.deepcopy(net)
        self.head, self.blocks, self.from_rgb = copied.head, copied.blocks, copied.from_rgb
        self.train(net.training)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[3]
        h = self.from_rgb[str(size)](x)
        while size > 4:
            block = cast(Any, self.blocks[str(size)])
            main = _swish(F.avg_pool2d(block.conv2(_swish(block.conv1(h))), 2))
            h = (main + F.avg_pool2d(block.skip(h), 2)) / math.sqrt(2)
            size //= 2
        h = _swish(self.head.conv2(_swish(self.head.conv1(h))))
        return self.head.linear(h.flatten(1)).squeeze(1)


def _swish(h: Tensor) -> Tensor:
    return F.silu(h) / 1.1


def eager_twin(energy: Energy) -> Energy:
    """The energy that baselines are given: `energy` itself, or for our own net an `EagerCoarseToFine` copy of it."""
    return EagerCoarseToFine(energy) if isinstance(energy, CoarseToFineEnergy) else energy


def module_of(energy: Energy) -> nn.Module | None:
    """The module whose weights an energy reads: itself, the owner of a bound method, what a `partial` calls."""
    function: Any = energy
    while isinstance(function, functools.partial):
        function = function.func
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def copy_energy(energy: Energy) -> Energy:
    """A copy with weights of its own, where `module_of` finds them."""
    module = module_of(energy)
    parts = [] if module is None else module.modules()
    # A hook's result of the last forward pass, such as the older spectral norm's weight, is no leaf: not copyable.
    computed = (value for part in parts for value in vars(part).values() if isinstance(value, Tensor))
    return copy.deepcopy(energy, {id(value): value.detach().clone() for value in computed if not value.is_leaf})


def research_copy(energy: Energy) -> Energy:
    """A copy as research code has it: in eval mode, weights require gradients, parametrisations stay."""
    copied = copy_energy(energy)
    module = module_of(copied)
    if module is not None:
        module.eval().requires_grad_(True)
    return copied


def tuned_copy(energy: Energy, weights: torch.dtype | None = None) -> Energy:
    """A copy with frozen weights, spectral norms and other parametrisations folded, images channels-last.

    `weights` is the dtype that they are cast to, None leaves them. Raises ValueError for a cast of an energy whose
    module is not known.
    """
    copied = copy_energy(energy)
    module = module_of(copied)
    if module is None:
        if weights is not None:
            raise ValueError("its weights are not known, because it is no module, nor a method or partial of one")
        return copied
    module.eval()
    fold(module)
    module.requires_grad_(False)
    # Only images have a channels-last layout; five-dimensional weights refuse it.
    if not any(parameter.ndim == 5 for parameter in module.parameters()):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if weights is not None:
        module.to(weights)
    return copied


@torch.no_grad()
def fold(module: nn.Module) -> None:
    """Replaces every parametrised weight, spectral norms of the older kind included, by a plain one."""
    for part in module.modules():
        if parametrize.is_parametrized(part):
            # Not `remove_parametrizations`: it takes properties out of a class that a copy shares with its original.
            weights = {name: _evaluate(part, name) for name in cast(nn.ModuleDict, part.parametrizations)}
            part.__class__ = parametrize.type_before_parametrizations(part)
            del part.parametrizations
            for name, value in weights.items():
                part.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))
        for hook in list(part._forward_pre_hooks.values()):
            if isinstance(hook, SpectralNorm):
                remove_spectral_norm(part, hook.name)


@torch.no_grad()
def refold(folded: nn.Module, module: nn.Module) -> None:
    """Writes the present weights of `module` into a `tuned_copy` of it, in place, without power iterations."""
    parts = dict(module.named_modules())
    for path, part in folded.named_modules():
        for name, weight in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            weight.copy_(_evaluate(parts[path], name))


def _evaluate(part: nn.Module, name: str) -> Tensor:
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


def prepare_input(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x as a tuned copy reads it: in its dtype, images channels-last."""
    layout = torch.channels_last if x.ndim == 4 else torch.preserve_format
    return x.to(dtype=x.dtype if dtype is None else dtype, memory_format=layout)
