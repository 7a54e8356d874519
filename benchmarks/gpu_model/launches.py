"""Counts the launches of an update's program, their blocks and what they read, with and without what joins them.

    python -m benchmarks.gpu_model.launches            prints the counts
    python -m benchmarks.gpu_model.launches --write    fills the page with them

A launch that computes several phases, and one that multiplies taps side by side, are compared with what the same
sources launch where neither is done (`STATES`). Times are those of the model in `update.py`; nothing was timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import triton

from benchmarks.gpu_model.update import BATCHES, H200, issued, row, seconds, works_of_an_update
from benchmarks.harness import nets, pages
from fastebm.ops.triton import program as launcher
from tests.gpu.fake_driver import fake_gpu
from tests.gpu.launches import NETS, code_and_workspace, gpu_program

PAGE = "gpu-model/launches"
# What each state sets in `fastebm.ops.triton.program`.
STATES: dict[str, dict[str, int]] = {
    "each phase and each tap on its own": {"PHASES": 1, "PAIRS": 0},
    "phases together": {"PAIRS": 0},
    "phases together, taps side by side": {},
}


@contextlib.contextmanager
def state(name: str) -> Iterator[None]:
    """The launcher as it would be in that state."""
    with mock.patch.multiple(launcher, **STATES[name]) if STATES[name] else contextlib.nullcontext():
        launcher.calls_of.cache_clear()
        try:
            yield
        finally:
            launcher.calls_of.cache_clear()


def launches_of(net: str, batch: int = BATCHES[0]) -> dict[str, dict[str, int]]:
    """Launches of a net's program in bfloat16 in each state, and how many have fewer blocks than multiprocessors."""
    found = {}
    with fake_gpu(90, compiles=lambda asked: False):
        program = gpu_program(nets.build(net, NETS[net], "cpu"), NETS[net], torch.bfloat16)
        code = code_and_workspace(program, batch)[0].numpy().tobytes()
    facts = launcher.facts_of(torch.empty(batch, *NETS[net], device="meta"), program.constants)
    for name in STATES:
        with state(name):
            blocks = [call.programs(batch) for call in launcher.calls_of(code, facts)[1]]
        found[name] = {"launches": len(blocks), "small": sum(count < H200.multiprocessors for count in blocks)}
    return found


def rows_of(batch: int) -> dict[str, list[dict[str, Any]]]:
    """The launches of CF-EBM's update in each state: phases, and the convolution to the samples' channels."""
    found = {}
    for name in STATES:
        with state(name):
            works = works_of_an_update(batch)
        kept = [work for work in works if "taps 2x2" in work.name or "128 to 3, 32x32" in work.name]
        found[name] = [
            {
                **row(work),
                "map": work.name.split(", ")[1],
                "phases": "taps 2x2" in work.name,
                "million instructions": round(32 * issued(work) / 1e6),
            }
            for work in kept
        ]
        found[name].append({"whole": round(1e3 * sum(map(seconds, works)), 4), "launches": len(works)})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the counts, and writes them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"fill docs/results/{PAGE}")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    entry = {
        "triton": triton.__version__,
        "nets": {net: launches_of(net) for net in NETS},
        "batches": {str(batch): rows_of(batch) for batch in BATCHES},
    }
    print(json.dumps(entry, indent=1))
    if given.write:
        pages.add_entry(pages.RESULTS / PAGE, "bfloat16, sm_90", entry, pages.PAGES[PAGE])
    return 0


if __name__ == "__main__":
    sys.exit(main())
