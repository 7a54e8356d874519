"""`fastebm info` and `fastebm build`."""

from __future__ import annotations

import dataclasses
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

import fastebm
from fastebm.cli.arguments import print_error
from fastebm.ops import backends
from fastebm.runs.folder import RunFolder
from fastebm.runs.registry import config_of


@dataclass(frozen=True)
class Info:
    """Say which versions, devices and backends run here, and test the random numbers; or describe a run."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """folder of a run"""

    def __call__(self) -> int:
        facts = _facts() if self.run is None else _run_facts(self.run)
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name:{width}}  {value}")
        return 0


@dataclass(frozen=True)
class Build:
    """Compile the fused operators in place, where the package was installed without them."""

    verbose: bool = False
    """show the compiler's output"""

    def __call__(self) -> int:
        from fastebm.build_extension import build

        try:
            written = build(verbose=self.verbose)
        except RuntimeError as error:
            print_error(error)
            return 1
        for path in written:
            print(f"built {path}")
        return 0


def _facts() -> dict[str, Any]:
    """Versions, devices and backends; with the known-answer test of the random numbers that operators use here."""
    report = backends.report()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts = {
        "fastebm": fastebm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "CPU": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "GPU": ", ".join(gpus) or "none",
        "operators on the CPU": report.pop("cpu"),
        "operators on a GPU": report.pop("cuda"),
        "random numbers": _known_answer(),
    }
    return facts | {name.replace("_", " "): "none" if value is None else value for name, value in report.items()}


def _known_answer() -> str:
    """Whether the chosen backend gives Random123's answer for Philox4x32-10 with a counter and key of zeros."""
    words = torch.tensor([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8], dtype=torch.float64)
    expected = (words.float().double() * 2**-32 + 2**-33).float()  # u = fma(float(r), 2^-32, 2^-33)
    try:
        given = fastebm.ops.uniform((1, 4), seed=0)
    except RuntimeError as error:
        return f"not tested: {error}"
    return (
        "known answer given" if torch.equal(given[0], expected) else f"WRONG: {given.tolist()}, not {expected.tolist()}"
    )


def _run_facts(path: Path) -> dict[str, Any]:
    folder = RunFolder.existing(path)
    config = config_of(folder)
    facts: dict[str, Any] = {"run": path, "kind": folder.kind()}
    facts |= dataclasses.asdict(config)
    facts["images"] = folder.images() or "unknown"
    facts["checkpoints"] = ", ".join(map(str, folder.checkpoints.iterations())) or "none"
    lines = folder.log.lines()
    if lines:
        facts["state"] = (
            f"{lines[-1]['iteration']} of {config.total_iterations} iterations, {lines[-1]['seconds']:.0f} s"
        )
        health: tuple[str, ...] = ("squared_error", "kl", "elbo", "calibration", "noise_floor", "lambda", "energy_data")
        health += (
            "bits_per_dimension",
            "refined_error",
            "nll",
            "refinement",
            "energy_samples",
            "gap",
            "gradient_norm",
            "displacement",
            "clamped",
        )
        facts |= {name: f"{lines[-1][name]:.4g}" for name in health if name in lines[-1]}
    return facts
