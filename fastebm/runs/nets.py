"""Nets that are made in two steps: their outline, which takes no memory, and then their weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastebm.memory import check_memory
from fastebm.scalars import as_device

Net = TypeVar("Net", bound=nn.Module)
MaybeNet = TypeVar("MaybeNet", bound=nn.Module | None)


def outline(make: Callable[[], MaybeNet]) -> MaybeNet:
    """The net that `make` makes on the meta device, where tensors have a shape and no memory.

    Raises ValueError where its weights would not fit into the memory of this machine.
    """
    with torch.device("meta"):
        try:
            net = make()
        except RuntimeError as error:  # a number of elements beyond 64 bits
            raise ValueError(f"the config makes a net that is too large: {str(error).splitlines()[0]}") from error
    if net is None:
        return net
    size = sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers()))
    check_memory("the net that the config makes", size)
    return net


def initialized(make: Callable[[], MaybeNet], device: torch.device | str | None) -> MaybeNet:
    """The net that `make` makes, on `device`; its first weights are drawn on the CPU, whatever the default device."""
    with torch.device("cpu"):
        net = make()
    return net if net is None else net.to(device)


def with_weights(net: Net, tensors: Mapping[str, Tensor], device: torch.device | str | None = None) -> Net:
    """The net with an `outline`'s shape, on `device` with these weights: in eval mode, without gradients."""
    net = net.to_empty(device=as_device("cpu" if device is None else device))
    net.load_state_dict(dict(tensors))
    return net.eval().requires_grad_(False)


class PickledNet:
    """Stands for a net in a pickle, which then gives that net back, on the CPU, in eval mode and without gradients.

    PyTorch pickles no net whose layers have a spectral norm or another parametrization. This keeps the arguments of the
    net's constructor, its `config`, and its weights.
    """

    def __init__(self, net: nn.Module) -> None:
        if not hasattr(net, "config"):
            raise TypeError(f"a {type(net).__name__} can't be pickled: it has no `config`")
        self.net = net

    def __call__(self, *arguments: Any) -> Any:  # as functools.partial takes only what can be called
        return self.net(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        tensors = {name: tensor.detach().cpu() for name, tensor in self.net.state_dict().items()}
        return _unpickled, (type(self.net), self.net.config, tensors)


def picklable(value: Any, seen: dict[int, PickledNet]) -> Any:
    """The value with each net in it, also in a dict or a functools.partial, as one `PickledNet`, which `seen` keeps."""
    if isinstance(value, nn.Module):
        return seen.setdefault(id(value), PickledNet(value))
    if isinstance(value, functools.partial):
        return functools.partial(picklable(value.func, seen), *value.args, **value.keywords)
    if isinstance(value, dict):
        return {key: picklable(entry, seen) for key, entry in value.items()}
    return value


def _unpickled(kind: Callable[..., nn.Module], config: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    return with_weights(outline(lambda: kind(**config)), tensors)
