"""How many kernels the first chain of a cascade compiles, and how many times it waits for the compiler.

    python -m benchmarks.gpu_model.compilation              prints the rows
    python -m benchmarks.gpu_model.compilation --write      and puts them on the page docs/results/gpu-model

Nothing is compiled: a driver for a GPU that isn't there counts what launches ask for. The kernels of a program are
compiled side by side at its first call, so that each program is one wait.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_model.command import count
from benchmarks.harness import nets
from fastebm.ops.triton import compiling
from tests.gpu.fake_driver import fake_gpu
from tests.gpu.launches import chain_launches

LEVELS = (8, 16, 32)


def rows(dtype: torch.dtype = torch.bfloat16) -> list[dict[str, Any]]:
    """A row for each level of CF-EBM's cascade, in the order of chains."""
    found = []
    with fake_gpu(90, compiles=lambda asked: False) as gpu:
        for size in LEVELS:
            together: list[int] = []
            launch_all = compiling._only_compiled

            def counted(*launch: Any, before: Any = launch_all, seen: list[int] = together, **options: Any) -> None:
                known = len(gpu.asked)
                before(*launch, **options)
                seen.append(len(gpu.asked) - known)

            launches = chain_launches(nets.build("CF-EBM", (3, size, size), "cpu"), (3, size, size), dtype)
            known = len(gpu.asked)
            with mock.patch.object(compiling, "_only_compiled", counted):
                launches(64)
            kernels = len(gpu.asked) - known
            alone = kernels - sum(together)
            found.append({"level": size, "kernels": kernels, "waits": alone + bool(sum(together))})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    return count("compilation", __doc__, rows, arguments)


if __name__ == "__main__":
    sys.exit(main())
