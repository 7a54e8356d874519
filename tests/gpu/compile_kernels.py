"""Compiles Triton kernels for GPUs that aren't there, and prints what their code shows, one line of JSON for each.

A program, run without Triton's interpreter, with the version of Triton that comes first in PYTHONPATH:

python -m tests.gpu.compile_kernels --share 0 6 80 90 120

compiles for sm_80 all launch examples, and of all that `launches` launches the kernels 0, 6, 12, ...; for sm_90 those
from the next one on, and so forth. With another offset for each version, all versions and GPUs together compile every
kernel. `--share 0 1` compiles all of them on each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton

from tests.gpu.fake_driver import MOST_SHARED, FakeDriver, Launch, fake_gpu
from tests.gpu.launches import BATCHES, Launching, everything
from tests.ops.compile_launch_examples import shown
from tests.ops.launch_examples import all_launch_examples

Line = dict[str, Any]


def examples(capability: int) -> Iterator[Line]:
    """What each launch example's code shows."""
    for example in all_launch_examples():
        yield {"kind": "example", "name": example.name} | tried(lambda: shown(example, capability))  # noqa: B023


def launches(made: Sequence[tuple[str, Launching]], capability: int, first: int, stride: int) -> Iterator[Line]:
    """Each kernel of a share of what is launched, and the numbers of kernels that each batch asks for."""
    with fake_gpu(capability, compiles=lambda asked: False) as gpu:
        for name, launch in made:
            before = len(gpu.asked)
            asked: Line = {}
            for batch in BATCHES:
                asked |= tried(lambda: launch(batch), on_success={})  # noqa: B023
                asked[str(batch)] = len(gpu.asked) - before
            yield {"kind": "asked", "name": name, **asked}
        share = set(list(gpu.asked)[first % stride :: stride])
    with fake_gpu(capability, compiles=share.__contains__) as gpu:
        for name, launch in made:
            yield from launched(gpu, name, launch)


def launched(gpu: FakeDriver, name: str, launch: Launching) -> Iterator[Line]:
    """Each kernel that is compiled for some launches. What many samples and one ask for is all there is."""
    before = len(gpu.kernels)
    failed = tried(lambda: [launch(batch) for batch in (BATCHES[0], BATCHES[-1])], on_success={})
    for each in gpu.kernels[before:]:
        yield {"kind": "launch", "name": name, "kernel": each.name, **resources(each)}
    if failed:
        yield {"kind": "launch", "name": name, **failed}


def resources(launch: Launch) -> Line:
    metadata, kernel = launch.kernel.metadata, launch.kernel
    return {
        "registers": kernel.n_regs,
        "stack": kernel.n_spills,
        "shared": metadata.shared,
        "warps": metadata.num_warps,
    }


def tried(run: Callable[[], Any], on_success: Line | None = None) -> Line:
    """What `run` returns, or `on_success`; the last lines of its error where it fails."""
    try:
        found = run()
    except Exception:
        return {"error": traceback.format_exc()[-2000:]}
    return found if on_success is None else on_success


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1))
    parser.add_argument("capabilities", type=int, nargs="+", choices=[*MOST_SHARED])
    given = parser.parse_args()
    torch.set_num_threads(1)
    with fake_gpu(given.capabilities[0]):
        made = [(name, make()) for name, make in everything()]
    for number, capability in enumerate(given.capabilities):
        share = (given.share[0] + number, given.share[1])
        for line in itertools.chain(examples(capability), launches(made, capability, *share)):
            print(json.dumps({"triton": triton.__version__, "capability": capability, **line}), flush=True)
