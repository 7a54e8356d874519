"""What the first chain of an energy costs beside its updates, paid beforehand: programs, kernels, captured graphs."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastebm.compiler import EnergyGradient
from fastebm.ops.compilation import watch_compilation
from fastebm.sampling.cascade import LevelSampler, device_of
from fastebm.sampling.graphs import BLOCKS
from fastebm.sampling.langevin import Langevin
from fastebm.sampling.sampler import Gradient, Sampler
from fastebm.sampling.tempering import ParallelTempering
from fastebm.scalars import shown

__all__ = ["Precompiled", "precompile"]

# Updates of a first chain that may be made alone, because its program is compared with the energy.
_COMPARED = 2


@dataclass(frozen=True)
class Precompiled:
    """What `precompile` did; `str` and `print` say it in one line.

    Attributes:
        gradients: how each energy's gradient runs, as "fused, bfloat16", or why it is autograd's.
        kernels: names of the Triton kernels that were compiled, one for each.
        loaded: how many more were found in Triton's cache on disk.
        graphs: CUDA graphs that were captured.
        seconds: all of it, the few updates included.
    """

    gradients: tuple[str, ...]
    kernels: tuple[str, ...]
    loaded: int
    graphs: int
    seconds: float

    def __str__(self) -> str:
        counted = ", ".join(f"{count} {name}" for name, count in Counter(self.kernels).items())
        kernels = f"{len(self.kernels)} kernels compiled" + (f" ({counted})" if counted else "")
        parts = [kernels, f"{self.loaded} from the cache", f"{self.graphs} CUDA graphs captured"]
        return f"{'; '.join(dict.fromkeys(self.gradients))}: {', '.join(parts)}, {self.seconds:.1f} s"


def precompile(
    sampler: Sampler[Any] | ParallelTempering | LevelSampler,
    x0: Tensor | None = None,
    num_steps: int | None = None,
    **options: Any,
) -> Precompiled:
    """Makes what chains of a sampler need at their first use, and says what that was. The chains give the same bits.

    It advances chains from x0 by 11 updates and drops them: the energy is captured, its program is made and
    compared with the energy's own code, the weights are folded, the kernels of a program are compiled in several
    threads, and on a GPU graphs of 8 updates and of 1 are captured. A chain asks for no more where its states are of
    the same shape, dtype, device and layout, its options are of the same kind, and its weights are the same; changed
    weights are folded again. The smaller batch at the end of a list is another shape. Kernels stay in Triton's cache on
    disk, and serve later processes too. Random generators are left as they are.

    Args:
        sampler: any sampler, or a cascade, which runs once through all its updates.
        x0: starts (B, ...), as `sample` takes them; not changed. A cascade needs none where `count` is given.
        num_steps: the length of the chains, where a schedule is not constant. Not for cascades.
        options: others of `sampler.init`, such as `mask`, `known`, `conditions`, `num_chains`; for a cascade those of
            `sample`.

    Raises:
        TypeError, ValueError: for what is no sampler, and as `init` or `sample` do.

    Example:
        >>> import torch, fastebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1))
        >>> sampler = fastebm.Langevin(net, step_size=0.1, noise_std=0.05)
        >>> done = fastebm.precompile(sampler, torch.zeros(16, 2))
        >>> done.gradients, done.graphs
        (('fused, dtype follows autocast',), 0)
    """
    begun = time.perf_counter()
    samplers, device = _samplers_and_device(sampler, x0, num_steps, options.get("device"))
    captured = sum(map(_graphs, samplers))
    with watch_compilation(device) as compilation:
        if isinstance(sampler, LevelSampler):
            sampler.sample(x0=x0, seed=0, check=False, **options)
        elif x0 is not None:
            state: Any = sampler.init(x0, 0, num_steps=num_steps, **options)
            sampler.advance(state, _COMPARED + sum(BLOCKS), check=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return Precompiled(
        tuple(_variant(each.gradient) for each in samplers),
        tuple(compilation.compiled),
        len(compilation.loaded),
        sum(map(_graphs, samplers)) - captured,
        time.perf_counter() - begun,
    )


def _samplers_and_device(
    sampler: Any, x0: Any, num_steps: int | None, device: torch.device | str | None
) -> tuple[list[Any], torch.device]:
    """The samplers that run, and where. Raises TypeError or ValueError for what `precompile` doesn't take."""
    if isinstance(sampler, LevelSampler):
        if num_steps is not None:
            raise ValueError("num_steps is not for a cascade, whose levels have their own")
        samplers = [level.sampler for level in sampler.levels]
        own = device_of(samplers[0].gradient) if x0 is None else x0.device
        return samplers, own if device is None else torch.device(device)
    if not isinstance(sampler, Sampler | ParallelTempering):
        raise TypeError(f"precompile takes a sampler or a cascade, got {shown(sampler)}")
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0 must be a tensor of starts (B, ...), got {shown(x0)}")
    return [sampler], x0.device


def _variant(gradient: Gradient) -> str:
    return gradient.variant if isinstance(gradient, EnergyGradient) else repr(gradient)


def _graphs(sampler: Any) -> int:
    """How many graphs this thread has of a sampler's chains."""
    return sampler._graphs.count() if isinstance(sampler, Langevin) else 0
