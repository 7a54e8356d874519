"""Weights of nets and their optimizers: initial values, updates, moving averages, and their names in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastebm.distributed import ranks
from fastebm.runs.checkpoints import Layout


@contextmanager
def fork_rng(seed: int) -> Iterator[None]:
    """Within the block nets draw their weights from `seed`; torch's own generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def adam(
    parameters: Iterable[Tensor], learning_rate: float, betas: tuple[float, float], *, shard: bool = False
) -> torch.optim.Optimizer:
    """Adam, in one pass over memory. With `shard` each rank keeps and updates the moments of its share (ZeRO, stage 1).

    The weights are the same to the last bit, whatever the number of ranks and threads.
    """
    if not shard or ranks().size == 1:
        return torch.optim.Adam(parameters, learning_rate, betas, fused=True)
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which needs a torch with torch.distributed

    sharded: torch.optim.Optimizer = ZeroRedundancyOptimizer(
        parameters, torch.optim.Adam, lr=learning_rate, betas=betas, fused=True
    )
    return sharded


def collect_moments(optimizer: torch.optim.Optimizer) -> None:
    """Brings the moments of all ranks to rank 0, whose `optimizer_tensors` then has them; to be called on all ranks."""
    if (collect := getattr(optimizer, "consolidate_state_dict", None)) is not None:
        collect(0)


def step(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """An optimizer step with the gradients that are there."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()


def update_ema(mean: nn.Module, net: nn.Module, decay: float) -> None:
    """Moves the parameters of `mean` towards those of `net`, and copies the buffers (the spectral norm's vectors)."""
    with torch.no_grad():
        torch._foreach_lerp_(list(mean.parameters()), list(net.parameters()), 1 - decay)
        for averaged, current in zip(mean.buffers(), net.buffers(), strict=True):
            averaged.copy_(current)


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors with `prefix` in front of their names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def select_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """The moments of each parameter by name, with `prefix` in front."""
    named: dict[str, Tensor] = {}
    for index, moments in optimizer.state_dict()["state"].items():
        named |= with_prefix(moments, f"{prefix}{index}.")
    return named


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Loads what `optimizer_tensors` returned."""
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in select_prefix(tensors, prefix).items():
        index, _, moment = name.partition(".")
        moments.setdefault(int(index), {})[moment] = tensor
    # The groups alone, as a sharded optimizer has no other state of all parameters.
    groups = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    if (own := getattr(optimizer, "optim", None)) is not None:
        # A sharded optimizer keeps what it loads twice, and the counts of steps on the CPU, where a fused Adam of a GPU
        # does not take them.
        optimizer.state.clear()
        for parameter, loaded in own.state.items():
            loaded["step"] = loaded["step"].to(parameter.device)


def checkpoint_layout(nets: Mapping[str, nn.Module], optimizers: Mapping[str, Iterable[Tensor]]) -> Layout:
    """The tensors of a checkpoint that has these nets, and Adam's moments of these parameters, by their prefixes.

    A parameter that had no gradient yet has no moments.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, net in nets.items():
        tensors |= with_prefix(net.state_dict(), prefix)
    count = torch.empty((), device="meta")
    groups = [
        {f"{prefix}{index}.step": count, f"{prefix}{index}.exp_avg": moment, f"{prefix}{index}.exp_avg_sq": moment}
        for prefix, parameters in optimizers.items()
        for index, moment in enumerate(parameters)
    ]
    return Layout(tensors, groups)
