"""The kinds of runs, and a run of whatever kind loaded by its folder alone.

A method of training is a module with `Config`, `Run`, `Trainer` and `FREE`. It is imported when a run of its kind is
met, so that this file stands below all of them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastebm.runs.folder import RunError, RunFolder

METHODS = {
    "coarse_to_fine": "fastebm.training.coarse_to_fine",
    "ec_vae": "fastebm.training.ec_vae",
    "ec_posterior": "fastebm.training.ec_posterior",
    "ec_flow": "fastebm.training.ec_flow",
}
"""The module of each method, by the kind that a run's folder names."""


def load(run_dir: str | Path, device: torch.device | str | None = None) -> Any:
    """Loads the run in a folder, finished or not, for sampling.

    Args:
        run_dir: the folder that `fastebm.train` wrote.
        device: where its nets shall lie; by default the CPU.

    Returns a `CoarseToFineRun`, `ECVAERun`, `ECPosteriorRun` or `ECFlowRun`, all with `path`, `config`, `iteration`,
    `energy` and `sample(count, seed=None)`. Raises RunError where there is no run, or one of an unknown kind.
    """
    folder = RunFolder.existing(run_dir)
    return method(folder.kind(), folder.path).Run.load(run_dir, device)


def config_of(folder: RunFolder) -> Any:
    """The config of a run. Raises RunError where its kind is unknown, or its file is damaged."""
    kind = folder.kind()
    return method(kind, folder.path).Config.from_json(folder.config(kind))


def method(kind: str, path: Path) -> ModuleType:
    """The module of a method by its kind. Raises RunError, naming the run at `path`, for an unknown one."""
    if kind not in METHODS:
        raise RunError(f"{path} holds a run of kind {kind!r}; known are {', '.join(METHODS)}")
    return importlib.import_module(METHODS[kind])
