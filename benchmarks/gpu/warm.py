"""Compiles Triton's kernels in several processes, as the launches of the following steps will ask for them.

One after the other they take minutes. Here a driver takes the place of the GPU's: it compiles what is launched, and
launches nothing. The kernels stay in Triton's cache, where the other steps find them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.gpu.step import REHEARSAL, Rows

PROCESSES = 2 if REHEARSAL else min(16, os.cpu_count() or 1)


def run(rows: Rows) -> None:
    capability = 90 if REHEARSAL else 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    # Without the interpreter, which a rehearsal has in the compiler's place.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    begun = time.perf_counter()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.warm", str(number), str(capability)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        for number in range(PROCESSES)
    ]
    for process in running:
        said, _ = process.communicate()
        for line in said.splitlines():
            rows.add(**_row(line))
        if process.returncode:
            rows.add(ok=False, process=process.args[-2], exit=process.returncode)
    rows.add(processes=PROCESSES, seconds=time.perf_counter() - begun)


def _row(line: str) -> dict[str, Any]:
    """What a process tells of a launch; anything else that libraries print, as it is."""
    with contextlib.suppress(json.JSONDecodeError):
        row = json.loads(line)
        if isinstance(row, dict):
            return row
    return {"said": line}


def compile_share(number: int, capability: int) -> None:
    """Every `PROCESSES`-th of what is launched, from `number` on, at the batch that has all kernels."""
    from tests.gpu.fake_driver import fake_gpu
    from tests.gpu.launches import BATCHES, everything, sampler_launches

    torch.set_num_threads(1)
    with fake_gpu(capability) as gpu:
        small = [("samplers", lambda: sampler_launches((3, 4, 4)))]
        for place, (name, make) in enumerate(small if REHEARSAL else everything()):
            if place % PROCESSES == number:
                before, begun = len(gpu.kernels), time.perf_counter()
                make()(BATCHES[0])
                line = {"launched": name, "kernels": len(gpu.kernels) - before, "seconds": time.perf_counter() - begun}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    compile_share(int(sys.argv[1]), int(sys.argv[2]))
