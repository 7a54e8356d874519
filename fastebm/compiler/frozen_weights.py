"""A context in which a module's weights are frozen: eval mode, no weight gradients, parametrisations evaluated once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastebm.compiler.precision import without_autocast
from fastebm.compiler.process_state import exclusive

# Evaluated parametrised weights, by their layer and name.
Place = tuple[nn.Module, str]
Evaluated = dict[Place, Tensor]
Evaluating = Callable[[Sequence[Place]], list[Tensor]]
"""Evaluates parametrised weights, in their order; called with flags set, without autograd and autocast."""


# Calls that restore what was found, the last one first.
Undo = list[tuple[Callable[..., Any], *tuple[Any, ...]]]


class _Frozen:
    """A submodule or parameter that `count` contexts hold frozen, in any thread, and what restores it.

    It keeps its owner alive, so that no other object can get the id under which it is found.
    """

    __slots__ = ("count", "owner", "undo")

    def __init__(self, owner: nn.Module | nn.Parameter):
        self.owner = owner
        self.count = 0
        self.undo: Undo = []


# All that is frozen now, by id. Read and changed under `exclusive()`.
_frozen: dict[int, _Frozen] = {}
_optimizer_hook = ExitStack()


@contextmanager
def frozen_weights(
    module: nn.Module, evaluated: Evaluated | None = None, evaluating: Evaluating | None = None
) -> Iterator[None]:
    """Inside, `module` is in eval mode, its weights need no gradient, and parametrised weights are evaluated once.

    Weights found in `evaluated` are taken from there; the others are added to it, by `evaluating` where that is given.
    Clear it when weights may have changed.

    Contexts may overlap, in one thread or several, and over modules that share submodules or weights. Each submodule
    and parameter counts the contexts that hold it: the first one freezes it, the last one restores every flag to what
    the first one found, also after an exception. The flags are set directly, not by `eval()`, so that a module's own
    `train()` method has no side effects. Weights that were created under `torch.inference_mode` are replaced by copies
    that autograd accepts. Parametrisations run in the weights' own dtype, without autocast: the rounding error of a
    spectral norm in bfloat16 would scale the whole layer.

    Inside, weights must not be changed, because parametrised weights (spectral norm, equalised learning rate) would not
    follow, and the module must not be deep-copied, because its parametrisations are detached (`state_dict()` works).

    Raises RuntimeError at the end if the module was put into train mode meanwhile; and in the step of an optimizer that
    has one of the weights, whichever thread takes it.
    """
    mine: list[_Frozen] = []
    try:
        with exclusive():
            _freeze(module, mine, {} if evaluated is None else evaluated, evaluating or evaluate_parametrised)
        yield
    except BaseException:
        with exclusive():
            _release(mine)
        raise
    with exclusive():
        trained = [part.owner for part in mine if isinstance(part.owner, nn.Module) and part.owner.training]
        _release(mine)
    if trained:
        raise RuntimeError(
            f"a {type(trained[0]).__name__} was put into train mode while a chain over it ran; end the chains before "
            "you train, or sample from a copy (copy.deepcopy)"
        )


def refuse_frozen(module: nn.Module) -> None:
    """Raises RuntimeError where a chain over the weights of `module` runs."""
    if any(id(part) in _frozen for part in (*module.modules(), *module.parameters())):
        raise RuntimeError(
            "the gradients of weights were asked for while a chain over them ran, maybe in another thread; end the "
            "chains before you train, or sample from a copy (copy.deepcopy)"
        )


class DifferentiableWeights:
    """Evaluated parametrised weights with their graph; `differentiable_weights` shows the module copies without it."""

    def __init__(self) -> None:
        self._with_graph: Evaluated = {}
        self._shown: Evaluated = {}
        # Buffers of parametrisations, such as the vectors of a spectral norm, and their values from before.
        self._buffers: dict[tuple[nn.Module, str], list[tuple[Tensor, Tensor]]] = {}

    def shown(self) -> list[Tensor]:
        """The copies that the module reads, leaves that require a gradient where their originals do."""
        return [weight for weight in self._shown.values() if weight.requires_grad]

    def through(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of `parameters`, from those of `[*parameters, *shown()]`, through the parametrisations.

        Parametrisations of weights that the energy does not read, of which there is no gradient, have their buffers of
        before then.
        """
        places = [place for place, weight in self._shown.items() if weight.requires_grad]
        of = [self._with_graph[place] for place in places]
        pairs = [pair for pair in zip(of, gradients[len(parameters) :], strict=True) if pair[1] is not None]
        more: Sequence[Tensor | None] = [None] * (len(parameters) + len(of))
        if pairs:
            weights, given = zip(*pairs, strict=True)
            more = torch.autograd.grad(weights, [*parameters, *of], given, allow_unused=True)
        with torch.no_grad():
            for place, gradient in zip(places, more[len(parameters) :], strict=True):
                for buffer, value in self._buffers[place] if gradient is None else ():
                    buffer.copy_(value)
        both = zip(gradients[: len(parameters)], more[: len(parameters)], strict=True)
        return [a if b is None else b if a is None else a + b for a, b in both]

    def _evaluate(self, module: nn.Module, undo: Undo) -> None:
        parts = [part for part in module.modules() if "parametrizations" in part._modules and is_parametrized(part)]
        for part in parts:
            for name, parametrization in cast(nn.ModuleDict, part.parametrizations).items():
                buffers = list(parametrization.buffers()) if part.training else []
                self._buffers[part, name] = [(buffer, buffer.clone()) for buffer in buffers]
        for part in parts:
            _evaluate_parametrizations(part, undo, self._with_graph)
        # Only now, as a parametrisation may read the weight of another layer, whose graph it then goes on.
        for (part, name), weight in self._with_graph.items():
            shown = self._shown[part, name] = weight.detach().requires_grad_(weight.requires_grad)
            vars(part)[name] = shown


@contextmanager
def differentiable_weights(module: nn.Module) -> Iterator[DifferentiableWeights]:
    """Inside, parametrised weights are plain attributes to differentiate, evaluated once, in the module's own mode.

    So a spectral norm in train mode does one power iteration. Flags stay as they are. Parametrisations run without
    autocast, as in `frozen_weights`.

    Raises RuntimeError where a chain over these weights runs, whose own values lie in their place.
    """
    undo: Undo = []
    with exclusive():
        refuse_frozen(module)
        evaluated = DifferentiableWeights()
        try:
            with ExitStack() as full_precision, torch.inference_mode(False), torch.enable_grad():
                for device in {parameter.device.type for parameter in module.parameters()}:
                    full_precision.enter_context(without_autocast(device))
                evaluated._evaluate(module, undo)
            yield evaluated
        finally:
            for restore, *arguments in reversed(undo):
                restore(*arguments)


def evaluate_parametrised(places: Sequence[Place]) -> list[Tensor]:
    """The values of parametrised weights."""
    values = [cast(nn.ModuleDict, part.parametrizations)[name]() for part, name in places]
    # One that is the parameter itself has two names, and a capture finds neither.
    return [value.view_as(value) if isinstance(value, nn.Parameter) else value for value in values]


def _freeze(module: nn.Module, mine: list[_Frozen], evaluated: Evaluated, evaluating: Evaluating) -> None:
    """Hold every submodule and parameter, and freeze those that nobody holds yet."""
    if not _frozen:
        _optimizer_hook.callback(register_optimizer_step_pre_hook(_refuse_step).remove)
    new = []
    owners: list[nn.Module | nn.Parameter] = [*module.modules(), *module.parameters()]
    for owner in owners:
        part = _frozen.get(id(owner))
        if part is None:
            part = _frozen[id(owner)] = _Frozen(owner)
            new.append(part)
        part.count += 1
        mine.append(part)
    for part in new:
        _set_flags(part)
    modules = [(part.owner, part.undo) for part in new if isinstance(part.owner, nn.Module)]
    with ExitStack() as full_precision, torch.inference_mode(False), torch.no_grad():
        for device in {parameter.device.type for parameter in module.parameters()}:
            full_precision.enter_context(without_autocast(device))
        copies: dict[int, Tensor] = {}
        for owner, undo in modules:
            _replace_inference_tensors(owner, undo, copies)
        parts = [(o, undo) for o, undo in modules if "parametrizations" in o._modules and is_parametrized(o)]
        for owner, _ in parts:
            _refuse_evaluated(owner)
        places = [(owner, name) for owner, _ in parts for name in cast(nn.ModuleDict, owner.parametrizations)]
        missing = [place for place in places if place not in evaluated]
        if missing:
            evaluated.update(zip(missing, evaluating(missing), strict=True))
        for owner, undo in parts:
            _show_evaluated(owner, undo, evaluated)


def _release(mine: list[_Frozen]) -> None:
    """Hold them no longer, and restore those that nobody else holds."""
    last = []
    for part in mine:
        part.count -= 1
        if part.count == 0:
            del _frozen[id(part.owner)]
            last.append(part)
    if not _frozen:
        _optimizer_hook.close()
    error = None
    for part in reversed(last):
        for restore, *arguments in reversed(part.undo):
            try:
                restore(*arguments)
            except Exception as failure:
                error = failure
    if error is not None:
        raise error


def _refuse_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if any(id(weight) in _frozen for group in optimizer.param_groups for weight in group["params"]):
        raise RuntimeError(
            "an optimizer was about to change weights while a chain over them ran, maybe in another thread; end the "
            "chains before you train, or sample from a copy (copy.deepcopy)"
        )


def _set_flags(part: _Frozen) -> None:
    owner = part.owner
    if isinstance(owner, nn.Module):
        # A compiled module has the flag of the one inside of it, a scripted one keeps it in C++.
        if "training" in vars(owner) or isinstance(owner, torch.jit.ScriptModule):
            part.undo.append((setattr, owner, "training", owner.training))
            owner.training = False
    elif owner.requires_grad and owner.is_leaf and not owner.is_inference():
        part.undo.append((owner.requires_grad_, True))
        owner.requires_grad_(False)


def _replace_inference_tensors(part: nn.Module, undo: Undo, copies: dict[int, Tensor]) -> None:
    """Replace each inference tensor by one copy, so that tied weights stay tied."""
    for tensors in (part._parameters, part._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and tensor.is_inference():
                if id(tensor) not in copies:
                    copy = tensor.clone()
                    parameter = isinstance(tensor, nn.Parameter)
                    copies[id(tensor)] = nn.Parameter(copy, requires_grad=False) if parameter else copy
                undo.append((setattr, part, name, tensor))
                setattr(part, name, copies[id(tensor)])


def _evaluate_parametrizations(part: nn.Module, undo: Undo, evaluated: Evaluated) -> None:
    """Give `part` its class from before parametrisation, and its evaluated weights as plain attributes.

    This does not use `torch.nn.utils.parametrize.cached()`, for two reasons. Its cache is keyed by the id of the module
    that was parametrised first, so a deep copy, such as an averaged net, would read the original's weights. And inside
    a caller's own `cached()` block, it would share weights with the training step around it.
    """
    _refuse_evaluated(part)
    missing = [(part, name) for name in cast(nn.ModuleDict, part.parametrizations) if (part, name) not in evaluated]
    evaluated.update(zip(missing, evaluate_parametrised(missing), strict=True))
    _show_evaluated(part, undo, evaluated)


def _refuse_evaluated(part: nn.Module) -> None:
    if any(name in vars(part) for name in cast(nn.ModuleDict, part.parametrizations)):  # by this thread: others wait
        raise RuntimeError(
            f"the weights of a {type(part).__name__} were asked for while their gradients are computed, by the energy "
            "or by the cotangent's function; compute what that needs beforehand"
        )


def _show_evaluated(part: nn.Module, undo: Undo, evaluated: Evaluated) -> None:
    values = {name: evaluated[part, name] for name in cast(nn.ModuleDict, part.parametrizations)}
    undo.append((setattr, part, "__class__", type(part)))
    part.__class__ = type_before_parametrizations(part)
    for name, value in values.items():
        undo.append((vars(part).pop, name))
        vars(part)[name] = value
