"""Facts about the machine of a measurement: processor and instruction sets, versions, commit."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastebm
from fastebm.ops import backends

_CHECKOUT = Path(fastebm.__file__).resolve().parents[1]
# Benchmarks write these folders themselves: a change there does not make the checkout dirty.
_WRITTEN = (":!benchmarks/results", ":!docs/gallery", ":!docs/results")

# Our names of instruction sets and Linux's flags for them, the widest first; the widest names the machine.
_FEATURES = {"amx": "amx_tile", "avx512": "avx512f", "avx2": "avx2", "neon": "asimd", "sve": "sve"}


def machine_facts(device: str) -> dict[str, Any]:
    """Device, features, threads, versions, commit and date, as JSON has them.

    `commit` is None, and so is `dirty`, where the package is not part of a checkout.
    """
    on_gpu = device == "cuda"
    commit, dirty = _commit()
    return {
        "name": machine_name(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "device": device,
        "cpu": _processor(),
        "cpu_features": cpu_features(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "gpu_capability": list(torch.cuda.get_device_capability()) if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastebm": fastebm.__version__,
        "operators": {key: str(value) for key, value in backends.report().items() if "extension" not in key},
    }


def machine_name(device: str) -> str:
    """The name of the folder for results of this kind of machine: "cpu-amx", "cpu-avx512", "gpu-h100", ..."""
    if device == "cuda":
        words = re.sub(r"(?i)nvidia|geforce|tesla", " ", torch.cuda.get_device_name())
        return "-".join(["gpu", *re.findall(r"[a-z0-9]+", words.lower())])
    best = next(iter(cpu_features()), platform.machine().lower())
    return f"cpu-{best}"


def cpu_features() -> list[str]:
    """The instruction sets of this processor that matter for speed, the widest first."""
    flags = _cpu_information("flags") or _cpu_information("Features")
    if flags:
        present = set(flags.split())
        return [name for name, flag in _FEATURES.items() if flag in present]
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return [name for name in _FEATURES if name == capability]


def _processor() -> str:
    return _cpu_information("model name") or platform.processor() or platform.machine()


def _cpu_information(field: str) -> str | None:
    """The first value of a field of Linux's /proc/cpuinfo, None where there is none."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    parts = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in parts if name.strip() == field), None)


def _commit() -> tuple[str | None, bool | None]:
    if not (_CHECKOUT / ".git").exists():
        return None, None
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", *_WRITTEN)
    return commit or None, None if changes is None else bool(changes)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=_CHECKOUT, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None
