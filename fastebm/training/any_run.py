"""A run of whatever method: loaded, taken up, and described by its folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastebm.training import coarse_to_fine_run, ec_vae_run
from fastebm.training.coarse_to_fine import resume_coarse_to_fine
from fastebm.training.coarse_to_fine_config import CoarseToFineConfig
from fastebm.training.coarse_to_fine_run import CoarseToFineRun, load_coarse_to_fine
from fastebm.training.ec_vae import resume_ec_vae
from fastebm.training.ec_vae_config import EcVaeConfig
from fastebm.training.ec_vae_run import EcVaeRun, load_ec_vae
from fastebm.training.loop import Given
from fastebm.training.run import RunError, RunFolder

Run = CoarseToFineRun | EcVaeRun


def load_run(run_dir: str | Path, device: torch.device | str | None = None) -> Run:
    """The run in a folder, finished or not, for sampling. Raises RunError where there is none, or none of ours."""
    if _kind(RunFolder.existing(run_dir)) == ec_vae_run.KIND:
        return load_ec_vae(run_dir, device)
    return load_coarse_to_fine(run_dir, device)


def resume_run(run_dir: str | Path, images: Given | None = None, **options: Any) -> Run:
    """Takes up the unfinished run in a folder; arguments and errors as of `resume_coarse_to_fine`."""
    if _kind(RunFolder.existing(run_dir)) == ec_vae_run.KIND:
        return resume_ec_vae(run_dir, images, **options)
    return resume_coarse_to_fine(run_dir, images, **options)


def config_of(folder: RunFolder) -> CoarseToFineConfig | EcVaeConfig:
    """The config of a run. Raises RunError where it is none of ours, or damaged."""
    kind = _kind(folder)
    if kind == ec_vae_run.KIND:
        return EcVaeConfig.from_json(folder.config(kind))
    return CoarseToFineConfig.from_json(folder.config(kind))


def _kind(folder: RunFolder) -> str:
    kind, known = folder.kind(), (coarse_to_fine_run.KIND, ec_vae_run.KIND)
    if kind not in known:
        raise RunError(f"{folder.path} holds a run of kind {kind!r}; known are {', '.join(known)}")
    return kind
