"""The baselines: energy gradients and Langevin chains in eager PyTorch, under `torch.compile` and in torchebm.

Each runs as well as it can. Every baseline has a gradient and a chain; its gradient is compared with float64 autograd
before anything is timed, because a compiled one may silently be wrong: `torch.func.grad` over an opaque operator or an
`autograd.Function` can give zeros under `torch.compile` (pytorch#193279).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fastebm.build_extension import cpp_compiler
from fastebm.evaluation.speed.eager import Energy, prepare_input, research_copy, tuned_copy
from fastebm.evaluation.speed.rows import dtype_name

Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]

RESEARCH = "eager, research code"
TUNED = "eager, tuned"
TORCH_COMPILE = "torch.compile"
TORCHEBM = "torchebm"


class SkippedError(Exception):
    """A baseline can't run here, for a reason that lies with the machine and not with the baseline."""


@dataclass(frozen=True)
class Updates:
    """A chain's updates, `x <- clamp(x - step_size * grad E(x) + noise_std * noise)`.

    Attributes:
        schedule: (step size, noise std) of each update.
        clamp: imposed after every update, or None.
    """

    schedule: tuple[tuple[float, float], ...]
    clamp: tuple[float, float] | None = (-1.0, 1.0)

    @classmethod
    def constant(cls, num_steps: int, step_size: float, noise_std: float) -> Updates:
        return cls(((step_size, noise_std),) * num_steps)


Chain = Callable[[Tensor, Updates], Tensor]


@dataclass(frozen=True)
class Baseline:
    """One way to run an energy.

    Attributes:
        name, variant: of the implementation, and of the way it is run.
        gradient: x (B, ...) in float32 to energies and their gradient.
        chain: the state after all updates; the start is not changed. Where only the update is compiled, `gradient` is
            computed from how far one update moves x.
        net: the copy of the energy that it reads.
    """

    name: str
    variant: str
    gradient: Gradient
    chain: Chain
    net: Energy


# ---- eager


def research_eager(energy: Energy) -> Baseline:
    """Eager as repositories of energy-based models write it: float32, new tensors for noise and state in each step.

    Weights require gradients, so every step keeps all activations for them, and parametrised weights (spectral norm, in
    eval mode) are evaluated in every step.
    """
    net = research_copy(energy)

    def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        return _by_autograd(net, x.detach())

    def chain(x: Tensor, updates: Updates) -> Tensor:
        for step_size, noise_std in updates.schedule:
            _, slope = gradient(x)
            x = x - step_size * slope + noise_std * torch.randn_like(x)
            if updates.clamp is not None:
                x = x.clamp(*updates.clamp)
        return x

    return Baseline(RESEARCH, "float32, weights with gradients", gradient, chain, net)


def tuned_eager(energy: Energy, dtype: torch.dtype, precision: Literal["cast", "autocast"] = "cast") -> Baseline:
    """The best eager mode can do: frozen and folded weights, channels-last, updates and noise in place.

    A 16-bit `dtype` is reached by weights of that dtype ("cast") or by autocast.
    """
    cast, autocast = _reached_by(precision, dtype)
    net = tuned_copy(energy, cast)

    def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        return _by_autograd(net, prepare_input(x.detach(), cast), autocast(x))

    return Baseline(TUNED, _precision_name(dtype, precision), gradient, _updated_in_place(gradient), net)


def _by_autograd(net: Energy, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
    """Energies and their gradient at x, which is a new tensor or detached; the forward pass runs in `context`."""
    x = x.requires_grad_(True)
    with torch.enable_grad(), context or nullcontext():
        energies = net(x)
    (slope,) = torch.autograd.grad(energies.sum(), x)
    return energies.detach().float(), slope.float()


def _updated_in_place(gradient: Gradient) -> Chain:
    def chain(x: Tensor, updates: Updates) -> Tensor:
        x, noise = x.clone(), torch.empty_like(x)
        for step_size, noise_std in updates.schedule:
            _, slope = gradient(x)
            x.add_(slope, alpha=-step_size).add_(noise.normal_(), alpha=noise_std)
            if updates.clamp is not None:
                x.clamp_(*updates.clamp)
        return x

    return chain


def _reached_by(precision: str, dtype: torch.dtype) -> tuple[torch.dtype | None, Callable[[Tensor], Any]]:
    """The dtype that weights are cast to, if they are, and the context in which the energy of an x is evaluated."""
    if dtype is torch.float32:
        return None, lambda x: nullcontext()
    if precision == "cast":
        return dtype, lambda x: nullcontext()
    return None, lambda x: torch.autocast(x.device.type, dtype=dtype)


def _precision_name(dtype: torch.dtype, precision: str) -> str:
    reached = "autocast to " if precision == "autocast" else ""
    return f"{reached}{dtype_name(dtype)}, frozen"


# ---- torch.compile


def torch_compile_gradient(
    energy: Energy, dtype: torch.dtype, device: str, backward: Literal["functional", "autograd"] = "functional"
) -> Baseline:
    """Energy and gradient as one compiled function, or (`backward="autograd"`) a compiled energy under autograd.

    The first is the fastest. The second is for energies whose gradients it gets wrong.
    """
    cast = None if dtype is torch.float32 else dtype
    net = tuned_copy(energy, cast)
    functional = backward == "functional"
    compiled = _torch_compiled(_functional(net) if functional else lambda x: net(x), device, fullgraph=functional)

    def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        if not functional:
            return _by_autograd(compiled, prepare_input(x.detach(), cast))
        with torch.no_grad():
            energies, slope = compiled(prepare_input(x, cast))
        return energies.float(), slope.float()

    how = "func.grad" if functional else "energy compiled, autograd outside"
    return Baseline(TORCH_COMPILE, f"{dtype_name(dtype)}, {how}", gradient, _updated_in_place(gradient), net)


def torch_compile_chain(
    energy: Energy,
    dtype: torch.dtype,
    device: str,
    noise: Literal["inside", "outside"],
    clamp: tuple[float, float] | None,
    *,
    capture: bool = False,
) -> Baseline:
    """A whole update as one compiled function: cast, energy gradient, step, noise, clamp.

    Args:
        noise: whether it is drawn in the compiled function or before it, in place. On a CPU the second is often
            faster, because the compiler's own generator is slow there.
        clamp: as in `Updates`, which chains must then have as well.
        capture: on a GPU, record the compiled update as a CUDA graph by hand instead of by `torch.compile`'s own mode.
    """
    cast = None if dtype is torch.float32 else dtype
    net = tuned_copy(energy, cast)
    slope_of = _functional(net)

    def update(x: Tensor, pair: Tensor, drawn: Tensor | None) -> Tensor:
        _, slope = slope_of(prepare_input(x, cast))
        drawn = torch.randn_like(x) if drawn is None else drawn
        moved = x - pair[0] * slope.float() + pair[1] * drawn
        return moved if clamp is None else moved.clamp(*clamp)

    written = update if noise == "outside" else lambda x, pair: update(x, pair, None)
    compiled = _torch_compiled(written, device, fullgraph=True, own_graphs=not capture)
    stepper = (_graph_stepper if capture else _stepper)(compiled, noise)

    def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(x), device=x.device), _implied_gradient(stepper, x, clamp)

    def chain(x: Tensor, updates: Updates) -> Tensor:
        if updates.clamp != clamp:
            raise ValueError(f"the update was compiled with clamp {clamp}, not {updates.clamp}")
        return stepper(x, _table(updates.schedule, x.device))

    name = f"{dtype_name(dtype)}, noise drawn {noise}" + (", CUDA graph by hand" if capture else "")
    return Baseline(TORCH_COMPILE, name, gradient, chain, net)


def _functional(net: Energy) -> Gradient:
    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        energies = net(x)
        return energies.sum(), energies

    def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        slope, energies = torch.func.grad(total, has_aux=True)(x)
        return energies, slope

    return gradient


def _torch_compiled(
    function: Callable[..., Any], device: str, *, fullgraph: bool, own_graphs: bool = True
) -> Callable[..., Any]:
    """`function` under `torch.compile` at its best: static shapes; on a GPU max-autotune, with CUDA graphs if wanted.

    Raises SkippedError where there is no C++ compiler, which it needs even on a GPU.
    """
    if cpp_compiler() is None:
        raise SkippedError("torch.compile needs a C++ compiler, and none was found")

    def called(*arguments: Any) -> Any:
        return function(*arguments)

    # Dynamo caches by code object: with a shared one, each call would search the compiled code of all baselines.
    called.__code__ = called.__code__.replace()
    on_gpu = "max-autotune" if own_graphs else "max-autotune-no-cudagraphs"
    return torch.compile(called, dynamic=False, fullgraph=fullgraph, mode=on_gpu if device == "cuda" else "default")


def _table(schedule: Sequence[tuple[float, float]], device: torch.device) -> Tensor:
    """(step size, noise std) of each update, in rows of 16 bytes: a GPU's compiled code copies what is not aligned."""
    return torch.tensor([(*pair, 0.0, 0.0) for pair in schedule], device=device).reshape(-1, 4)


Stepper = Callable[[Tensor, Tensor], Tensor]
"""A chain: from a start, with (step size, noise std) of each update in a table."""


def _stepper(compiled: Callable[..., Tensor], noise: str) -> Stepper:
    """A chain of compiled updates."""

    @torch.no_grad()
    def run(start: Tensor, table: Tensor) -> Tensor:
        x, drawn = start.clone(), torch.empty_like(start)
        for pair in table:
            torch.compiler.cudagraph_mark_step_begin()
            x = compiled(x, pair) if noise == "inside" else compiled(x, pair, drawn.normal_())
            if x.is_cuda:  # the next replay of a CUDA graph writes into this memory
                x = x.clone()
        return x

    return run


def _graph_stepper(compiled: Callable[..., Tensor], noise: str) -> Stepper:
    """The same chain with every update a replay of one CUDA graph, which is recorded at the first call for a shape."""

    @functools.cache
    def recorded(shape: torch.Size, device: torch.device) -> tuple[Any, Tensor, Tensor]:
        x, drawn, pair = (torch.zeros(size, device=device) for size in (shape, shape, (4,)))

        def update() -> None:
            x.copy_(compiled(x, pair) if noise == "inside" else compiled(x, pair, drawn.normal_()))

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # PyTorch requires warm-ups on another stream than the one recorded
            for _ in range(3):
                update()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            update()
        return graph, x, pair

    @torch.no_grad()
    def run(start: Tensor, table: Tensor) -> Tensor:
        graph, x, pair = recorded(start.shape, start.device)
        x.copy_(start)
        for row in table:
            pair.copy_(row)
            graph.replay()
        return x.clone()

    return run


def _implied_gradient(stepper: Stepper, x: Tensor, clamp: tuple[float, float] | None) -> Tensor:
    """The gradient by which one update without noise moves x, at a step size without effects of clamp and rounding.

    x must lie within the clamp.
    """

    def moved(step_size: float) -> Tensor:
        return stepper(x, _table([(step_size, 0.0)], x.device))

    # An update moves x by about a tenth of its size, of which rounding is 1e-6.
    wanted, step_size = 0.1 * float(x.abs().max()), 1.0
    for _ in range(20):
        after = moved(step_size)
        free = clamp is None or bool(((after > clamp[0]) & (after < clamp[1])).all())
        largest = float((after - x).abs().max())
        if not free:
            step_size /= 10
        elif largest == 0 or 0.1 * wanted < largest <= 2 * wanted:
            break
        else:
            step_size *= wanted / largest
    return (x.double() - moved(step_size).double()).div(step_size).to(x.dtype)


# ---- other libraries


def torchebm_langevin(energy: Energy, dtype: torch.dtype, precision: Literal["cast", "autocast"] = "cast") -> Baseline:
    """`torchebm.samplers.LangevinDynamics` on a tuned copy of the energy.

    Its noise is `sqrt(2 * step_size) * noise_scale`. It has schedules of its own, so a chain takes the means of ours,
    which is as much work. Raises SkippedError where torchebm is not installed.
    """
    try:
        from torchebm.core import BaseModel
        from torchebm.samplers import LangevinDynamics
    except ImportError as error:
        raise SkippedError(f"torchebm can't be imported: {error}") from error

    cast, autocast = _reached_by(precision, dtype)
    net = tuned_copy(energy, cast)

    class Model(BaseModel):
        def forward(self, x: Tensor) -> Tensor:
            with autocast(x):
                energies = net(prepare_input(x, cast))
            return energies.reshape(len(x)).float()

    samplers: dict[Any, Any] = {}

    def sampler(updates: Updates, device: torch.device) -> Any:
        key = (updates, device)
        if key not in samplers:
            step_size, noise_std = (sum(column) / len(column) for column in zip(*updates.schedule, strict=True))
            options = {"step_size": step_size, "noise_scale": noise_std / (2 * step_size) ** 0.5}
            samplers[key] = LangevinDynamics(Model(device=device), clamp=updates.clamp, device=device, **options)
        return samplers[key]

    def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(x), device=x.device), Model(device=x.device).gradient(x)

    def chain(x: Tensor, updates: Updates) -> Tensor:
        return sampler(updates, x.device).sample(x=x.clone(), n_steps=len(updates.schedule))

    return Baseline(TORCHEBM, _precision_name(dtype, precision), gradient, chain, net)


# ---- the baselines of a comparison

Variants = Sequence[Callable[[], Baseline]]


def _precisions(dtype: torch.dtype) -> tuple[Literal["cast", "autocast"], ...]:
    return ("cast",) if dtype is torch.float32 else ("cast", "autocast")


def gradient_baselines(energy: Energy, dtype: torch.dtype, device: str) -> dict[str, Variants]:
    """The baselines of a gradient in `dtype`: the variants of each, of which the fastest right one counts."""
    return {
        RESEARCH: [partial(research_eager, energy)],
        TUNED: [partial(tuned_eager, energy, dtype, how) for how in _precisions(dtype)],
        TORCH_COMPILE: [partial(torch_compile_gradient, energy, dtype, device)],
    }


def chain_baselines(
    energy: Energy, dtype: torch.dtype, device: str, clamp: tuple[float, float] | None
) -> dict[str, Variants]:
    """The baselines of chains in `dtype`: the variants of each, of which the fastest right one counts."""
    compiled = partial(torch_compile_chain, energy, dtype, device, clamp=clamp)
    by_hand = [partial(compiled, noise="inside", capture=True)] if device == "cuda" else []
    return {
        RESEARCH: [partial(research_eager, energy)],
        TUNED: [partial(tuned_eager, energy, dtype, how) for how in _precisions(dtype)],
        TORCH_COMPILE: [partial(compiled, noise="outside"), partial(compiled, noise="inside"), *by_hand],
        TORCHEBM: [partial(torchebm_langevin, energy, dtype, how) for how in _precisions(dtype)],
    }
