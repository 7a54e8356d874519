"""The command `fastebm info`."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS = (
    "squared_error kl elbo calibration noise_floor lambda energy_data bits_per_dimension refined_error nll refinement "
    "energy_samples gap gradient_norm displacement clamped"
)
"""Metrics of the last line of a run's log that are shown, where the line has them."""

SETTINGS = ("FASTEBM_BACKEND", "FASTEBM_CPU", "FASTEBM_GRAPHS", "TRITON_INTERPRET")
"""Variables of the environment that choose what runs, shown where they are set."""


@dataclass(frozen=True)
class Info:
    """Show versions, devices and backends, and test the random numbers; or describe a run."""

    run: Path | None = None
    """folder of a run that is described"""

    def __call__(self) -> int:
        facts = _facts() if self.run is None else _run_facts(self.run)
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name:{width}}  {value}")
        return 0


def _facts() -> dict[str, Any]:
    import torch

    import fastebm
    from fastebm.build_extension import cuda_unavailable_reason
    from fastebm.ops import backends

    report = backends.report()
    if report["cuda_extension"] is None:
        kept = backends.unavailable_reason("cuda", "cuda")
        report["cuda_extension"] = f"none: {cuda_unavailable_reason() or kept}"
    gpus = [
        f"{torch.cuda.get_device_name(index)} ({'.'.join(map(str, torch.cuda.get_device_capability(index)))})"
        for index in range(torch.cuda.device_count())
    ]
    facts = {
        "fastebm": fastebm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "CPU": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "GPU": ", ".join(gpus) or "none",
        "operators on the CPU": report.pop("cpu"),
        "operators on a GPU": report.pop("cuda"),
        "random numbers": _known_answer(),
        "settings": ", ".join(f"{name}={os.environ[name]}" for name in SETTINGS if os.environ.get(name)) or "none",
    }
    return facts | {name.replace("_", " "): "none" if value is None else value for name, value in report.items()}


def _known_answer() -> str:
    """Whether the chosen backend gives Random123's answer for Philox4x32-10 with a counter and key of zeros."""
    import torch

    from fastebm.ops import uniform

    words = torch.tensor([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8], dtype=torch.float64, device="cpu")
    expected = (words.float().double() * 2**-32 + 2**-33).float()  # u = fma(float(r), 2^-32, 2^-33)
    try:
        given = uniform((1, 4), seed=0)
    except RuntimeError as error:
        return f"not tested: {error}"
    right = torch.equal(given[0], expected)
    return "known answer given" if right else f"WRONG: {given.tolist()}, not {expected.tolist()}"


def _run_facts(path: Path) -> dict[str, Any]:
    from fastebm.runs.folder import RunFolder
    from fastebm.runs.registry import config_of
    from fastebm.training.trainer.flight import records

    folder = RunFolder.existing(path)
    config = config_of(folder)
    facts: dict[str, Any] = {"run": path, "kind": folder.kind(), **vars(config)}
    facts["images"] = folder.images() or "unknown"
    facts["checkpoints"] = ", ".join(map(str, folder.checkpoints.iterations())) or "none"
    if lines := folder.log.lines():
        last = lines[-1]
        facts["state"] = f"{last['iteration']} of {config.total_iterations} iterations, {last['seconds']:.0f} s"
        facts |= {name: f"{last[name]:.4g}" for name in METRICS.split() if name in last}
    if found := records(path):
        facts["guard"] = f"{_event(max(found, key=os.path.getmtime))}: fastebm flight {path} shows {len(found)} records"
    return facts


def _event(record: Path) -> str:
    """What happened when a flight record was written."""
    from fastebm.runs.files import read_json

    try:
        return str(read_json(record)["event"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{record.name} is damaged"
