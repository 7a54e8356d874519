"""Memory of each process of a training: weights, averages, gradients and Adam's moments, spread over the ranks or not.

    python -m benchmarks.studies.rank_memory               measures all presets below and fills docs/scaling.md

Bytes are counted from the real tensors of N processes that work together by gloo, after one step of Adam. Activations
are left out: they go with a rank's share of the batch (docs/results/stages).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness.pages import ROOT, fill_section
from fastebm.distributed import launched
from fastebm.evaluation.speed.table import markdown_table
from fastebm.training import PRESETS, CoarseToFineConfig, ECVAEConfig
from fastebm.training.calibration.energy import new_energy
from fastebm.training.calibration.vae_run import new_vae
from fastebm.training.coarse_to_fine.run import new_net
from fastebm.training.ec_vae.presets import EC_VAE_PRESETS
from fastebm.training.trainer.weights import adam, step

CONFIGS: dict[str, CoarseToFineConfig | ECVAEConfig] = {
    "CF-EBM, celebahq256": PRESETS["celebahq256"],
    "CF-EBM, celebahq512": PRESETS["celebahq512"],
    "EC-VAE, celebahq256": EC_VAE_PRESETS["celebahq256"],
    "EC-VAE, imagenet32": EC_VAE_PRESETS["imagenet32"],
}
SIZES = (1, 2, 4)
COLUMNS = ("weights", "averages", "gradients", "moments")
PAGE = ROOT / "docs" / "scaling.md"


@dataclass(frozen=True)
class Nets:
    """The nets that a run trains, with the parameters that it updates, and those that it keeps beside them."""

    trained: list[tuple[nn.Module, list[nn.Parameter]]]
    kept: list[nn.Module]

    @classmethod
    def of(cls, config: CoarseToFineConfig | ECVAEConfig) -> Nets:
        if isinstance(config, CoarseToFineConfig):  # in its last stage
            net, sizes = new_net(config), config.sizes
            frozen = [net.frozen(size) for size in sizes[:-1]]
            return cls([(net, list(net.parameters_at(sizes[-1])))], [*frozen, net.frozen(sizes[-1])])
        vae, energy = new_vae(config), new_energy(config)
        assert energy is not None
        return cls([(vae, list(vae.parameters())), (energy, list(energy.parameters()))], [new_vae(config)])


def measure(config: CoarseToFineConfig | ECVAEConfig, shard: bool) -> dict[str, int]:
    """The bytes of this process by column, after a step."""
    nets = Nets.of(config)
    found = dict.fromkeys(COLUMNS, 0)
    for net, parameters in nets.trained:
        optimizer = adam(parameters, 1e-3, (0.0, 0.9), shard=shard)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        step(optimizer, 1e-3)
        own = getattr(optimizer, "optim", optimizer)
        found["weights"] += size_of((*net.parameters(), *net.buffers()))
        found["gradients"] += size_of(p.grad for p in parameters if p.grad is not None)
        found["moments"] += size_of(tensor for state in own.state.values() for tensor in state.values())
    found["averages"] = sum(size_of((*net.parameters(), *net.buffers())) for net in nets.kept)
    return found


def size_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _work(rank: int, size: int, port: int, name: str, shard: bool, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with launched():
        found = measure(CONFIGS[name], shard)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


def measure_ranks(name: str, size: int, shard: bool) -> list[dict[str, int]]:
    """What `measure` gives in each of `size` processes that work together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_work.__module__, "torch.distributed.optim", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_work, args=(rank, size, port, name, shard, folder)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"{name} on {size} processes: exit codes {[process.exitcode for process in processes]}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]


def row(name: str, size: int, shard: bool, ranks: Sequence[dict[str, int]]) -> tuple[str, ...]:
    """A row of the table, of the rank that needs most."""
    most = max(ranks, key=lambda rank: sum(rank.values()))
    columns = [f"{most[column] / 1e6:.1f}" for column in COLUMNS]
    return name, str(size), "spread" if shard else "whole", *columns, f"{sum(most.values()) / 1e6:.1f}"


def main() -> None:
    rows = []
    for name in CONFIGS:
        rows.append(row(name, 1, False, measure_ranks(name, 1, False)))
        rows += [
            row(name, size, shard, measure_ranks(name, size, shard)) for size in SIZES[1:] for shard in (False, True)
        ]
    head = ("preset", "ranks", "moments are", *COLUMNS, "sum")
    PAGE.write_text(fill_section(PAGE.read_text(), "rank memory", markdown_table(head, rows)))
    print(markdown_table(head, rows))


if __name__ == "__main__":
    main()
