"""The energy's own code, run by PyTorch: what programs are compared with, and what runs where there is none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastebm.compiler.precision import autocast_to, without_autocast
from fastebm.compiler.process_state import evaluating

Energy = Callable[..., Tensor]
Conditions = tuple[Tensor, ...]


class OwnCode:
    """An energy as its owner wrote it: `energy(x, *conditions)`, one number for each sample.

    Attributes:
        energy: what is called: of a net in `DistributedDataParallel` or `DataParallel`, the net inside.
        original: `energy` without `torch.compile`, for capture. With `compiled`, `energy` is compiled in any case.
        name: for messages.
        module: the one whose weights and flags the energy uses, if it can be found.

    Methods raise TypeError and ValueError if the energy is not one floating-point number per sample, and RuntimeError
    if it does not depend on x. Errors of the energy itself pass through.
    """

    def __init__(self, energy: Energy, *, compiled: bool = False) -> None:
        while isinstance(energy, nn.parallel.DistributedDataParallel | nn.DataParallel):
            energy = energy.module
        self.energy = energy
        self.original = getattr(energy, "_orig_mod", energy)
        self.name, self.module = _name_and_module(energy)
        if compiled:
            self.energy = torch.compile(self.original, dynamic=False)

    def energies(self, x: Tensor, conditions: Conditions, dtype: torch.dtype | None) -> Tensor:
        """The energies (B,), without a gradient, in the dtype that they have."""
        with evaluating(), torch.inference_mode(False):
            try:
                with torch.no_grad():
                    return self._flat_energies(x, conditions, dtype)
            except RuntimeError:  # an energy that differentiates inside, or else its own error, a second time
                with torch.enable_grad():
                    return self._flat_energies(_leaf(x), conditions, dtype).detach()

    def energies_with_graph(self, x: Tensor) -> Tensor:
        """The energies (B,), with their graph, in the module's own mode and the caller's autocast state."""
        return self._flat_energies(x, (), None)

    def by_autograd(self, x: Tensor, conditions: Conditions, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Energies (B,), float32 or float64, and the gradient like x; both detached."""
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self.by_autograd(x, conditions, dtype)
        # Not `torch.enable_grad()`: this is what each update of a chain without a program costs beside the energy.
        found = torch.is_grad_enabled()
        torch._C._set_grad_enabled(True)
        try:
            with evaluating():
                x = _leaf(x)
                energies = self._attached(x, conditions, dtype)
                gradient = self._differentiate(energies, x)
        finally:
            torch._C._set_grad_enabled(found)
        energies = energies.detach()
        wanted = energy_dtype(x)
        return energies if energies.dtype is wanted else energies.to(wanted), gradient

    def examined(self, x: Tensor, conditions: Conditions, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, str, str]:
        """`by_autograd`, and what makes its gradient another than that of the operations, where there is something.

        That is a hook, and an `autograd.Function`; each is a description, "" where there is none.
        """
        with evaluating(), torch.inference_mode(False), torch.enable_grad():
            x = _leaf(x)
            energies, hook, function = self._watched(lambda: self._attached(x, conditions, dtype))
            gradient = self._differentiate(energies, x)
        return energies.detach().to(energy_dtype(x)), gradient, hook, function

    def evaluated_again(self, x: Tensor) -> tuple[Tensor, str]:
        """The energies (B,), detached, in x's dtype, and what makes weight gradients others than the operations'."""
        with evaluating(), torch.inference_mode(False), torch.enable_grad():
            energies, hook, function = self._watched(lambda: self._flat_energies(x, (), torch.float32))
        return energies.detach(), hook or function

    def _watched(self, energies_of: Callable[[], Tensor]) -> tuple[Tensor, str, str]:
        """Energies with their graph, and descriptions of a hook and of an `autograd.Function` in it."""
        watch, hook = _HookWatch(), ""
        for name, part in [] if self.module is None else self.module.named_modules():
            if part._backward_hooks or part._backward_pre_hooks:
                hook = f"{name or self.name} has a backward hook"
        with watch:
            energies = energies_of()
        function = _custom_function(energies)
        hook = hook or ("a gradient hook (Tensor.register_hook) is set while it runs" if watch.found else "")
        return energies, hook, function and f"its backward pass is that of autograd.Function {function}"

    def check_independence(self, x: Tensor, conditions: Conditions, dtype: torch.dtype | None) -> None:
        """Raise RuntimeError if an energy has a gradient with respect to another sample of x.

        The energies of the samples at odd places must have none at even ones, and the other way round.
        """
        with evaluating(), torch.inference_mode(False), torch.enable_grad():
            batch = _leaf(x)
            energies = self._attached(batch, conditions, dtype)
            of_odd = self._differentiate(energies[1::2], batch, retain_graph=True)[::2]
            of_even = self._differentiate(energies[::2], batch)[1::2]
        # Not `!= 0`: for a sample outside the energy's domain, 0 * inf gives NaN in its own derivative.
        if any(bool((part.abs() > 0).any()) for part in (of_odd, of_even)):
            raise RuntimeError(
                f"the energy that {self.name} gives a sample changes with the other samples of its batch, so chains "
                "would influence each other. The likely cause is batch norm in train mode: either it has no running "
                "statistics, or a function has a net in train mode in its closure (call net.eval(), or pass the net)"
            )

    def _attached(self, x: Tensor, conditions: Conditions, dtype: torch.dtype | None) -> Tensor:
        energies = self._flat_energies(x, conditions, dtype)
        if not energies.requires_grad:
            raise self._no_dependence()
        return energies

    def _flat_energies(self, x: Tensor, conditions: Conditions, dtype: torch.dtype | None) -> Tensor:
        if dtype is None:
            energies = self.energy(x, *conditions)
        else:
            with autocast_to(dtype, x.device.type):
                energies = self.energy(x, *conditions)
        if not isinstance(energies, Tensor) or not energies.is_floating_point():
            kind = energies.dtype if isinstance(energies, Tensor) else type(energies).__name__
            raise TypeError(f"{self.name} returned {kind}; an energy must be a floating-point tensor")
        # `net(x).squeeze()` of a single sample has no dimensions.
        of_one = energies.ndim == 0 and x.shape[0] == 1
        if energies.numel() != x.shape[0] or not (of_one or (energies.ndim and energies.shape[0] == x.shape[0])):
            raise ValueError(
                f"{self.name} returned shape {tuple(energies.shape)} for x of shape {tuple(x.shape)}; "
                f"an energy must be one number per sample, ({x.shape[0]},)"
            )
        return energies if energies.ndim == 1 else energies.reshape(-1)

    def _differentiate(self, energies: Tensor, x: Tensor, retain_graph: bool = False) -> Tensor:
        """The gradient of the sum of `energies`; each backward operation runs in the dtype of its forward operation."""
        if torch.is_autocast_enabled(x.device.type):
            with without_autocast(x.device.type):
                return self._differentiate(energies, x, retain_graph)
        (gradient,) = torch.autograd.grad(energies.sum(), x, allow_unused=True, retain_graph=retain_graph)
        if gradient is None:
            raise self._no_dependence()
        return gradient

    def _no_dependence(self) -> RuntimeError:
        return RuntimeError(
            f"the energies that {self.name} returned don't depend on x: autograd finds no gradient. "
            "Does it detach x or run under no_grad?"
        )


def energy_dtype(x: Tensor) -> torch.dtype:
    """That of the energies of samples like x."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


class _HookWatch(TorchFunctionMode):
    """Notes whether a gradient hook is set inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= getattr(func, "__name__", "") == "register_hook"
        return func(*args, **(kwargs or {}))


def _custom_function(energies: Tensor) -> str:
    """The name of a user's `autograd.Function` in the graph of `energies`, "" if there is none."""
    waiting: list[Any] = [energies.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(node, "_forward_cls", None)
        if function is not None and not function.__module__.startswith("torch."):
            return function.__qualname__
        waiting += [following for following, _ in node.next_functions]
    return ""


def _name_and_module(energy: Energy) -> tuple[str, nn.Module | None]:
    while isinstance(energy, functools.partial):
        energy = energy.func
    owner = energy if isinstance(energy, nn.Module) else getattr(energy, "__self__", None)
    if isinstance(owner, nn.Module):
        return type(owner).__name__, owner
    return getattr(energy, "__name__", type(energy).__name__), None


def _leaf(x: Tensor) -> Tensor:
    """x as a new leaf that requires a gradient; an inference tensor must be copied for that."""
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()
