"""How many kernels the first chain of a cascade compiles, and how many times it waits for the compiler.

    python -m benchmarks.gpu_model.compilation              prints the rows
    python -m benchmarks.gpu_model.compilation --write      and puts them on the page docs/results/gpu-model

Nothing is compiled: a driver for a GPU that isn't there counts what launches ask for. The kernels of a program are
compiled side by side at its first call, so that each program is one wait.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_model.instructions import triton_version
from benchmarks.harness import nets, pages
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the rows on docs/results/gpu-model")
    given = parser.parse_args(arguments)
    entry = {"counted with": triton_version(), "rows": rows()}
    for row in entry["rows"]:
        print("; ".join(f"{name} {value}" for name, value in row.items()))
    if given.write:
        pages.add_entry(pages.RESULTS / "gpu-model", "compilation", entry, pages.PAGES["gpu-model"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
