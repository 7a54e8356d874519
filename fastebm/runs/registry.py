"""The kinds of runs by name, and a run of any kind loaded from its folder.

Each method is a module with `Config`, `Run` and `Trainer`. It is imported only when a run of its kind is loaded or
trained, so that this package imports none of the methods.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastebm.runs.folder import RunError, RunFolder
from fastebm.runs.run import Run

METHODS = {
    "coarse_to_fine": "fastebm.training.coarse_to_fine",
    "ec_vae": "fastebm.training.ec_vae",
    "ec_posterior": "fastebm.training.ec_posterior",
    "ec_flow": "fastebm.training.ec_flow",
}
"""The module of each method, by the kind in a run's config.json."""


def load(run_dir: str | Path, device: torch.device | str | None = None) -> Run:
    """Loads the run in a folder, finished or not, for sampling.

    Args:
        run_dir: the folder that `fastebm.train` wrote.
        device: where its nets will be; by default the CPU.

    Returns a `CoarseToFineRun`, `ECVAERun`, `ECPosteriorRun` or `ECFlowRun`; `Run` documents what they share.
    Raises RunError where there is no run, one of an unknown kind, or one without a good checkpoint that can be read.

    Example:
        >>> import tempfile, torch, fastebm
        >>> config = fastebm.training.ECVAEConfig(size=8, channels=1, iterations=2, latent=4, width=4, energy_width=4)
        >>> folder = tempfile.mkdtemp() + "/run"
        >>> trained = fastebm.train(config, torch.zeros(9, 1, 8, 8), folder, progress=False)
        >>> run = fastebm.load(folder)
        >>> run.finished, run.sample(3).shape, run.energy(run.sample(3)).shape
        (True, torch.Size([3, 1, 8, 8]), torch.Size([3]))
    """
    folder = RunFolder.existing(run_dir)
    run: Run = method(folder.kind(), folder.path).Run.load(run_dir, device)
    return run


def config_of(folder: RunFolder) -> Any:
    """The config of a run. Raises RunError where its kind is unknown, or its file is damaged."""
    kind = folder.kind()
    return method(kind, folder.path).Config.from_json(folder.config(kind))


def method(kind: str, path: Path) -> ModuleType:
    """The module of a method by its kind. Raises RunError, which names the run at `path`, for an unknown one."""
    if kind not in METHODS:
        raise RunError(f"{path} holds a run of kind {kind!r}; known are {', '.join(METHODS)}")
    return importlib.import_module(METHODS[kind])
