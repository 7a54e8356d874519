"""A run of whatever method: loaded, taken up, and described by its folder alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastebm.training import coarse_to_fine_run, ec_flow_run, ec_posterior_run, ec_vae_run
from fastebm.training.coarse_to_fine import resume_coarse_to_fine
from fastebm.training.coarse_to_fine_config import CoarseToFineConfig
from fastebm.training.coarse_to_fine_run import CoarseToFineRun, load_coarse_to_fine
from fastebm.training.ec_flow import resume_ec_flow
from fastebm.training.ec_flow_config import EcFlowConfig
from fastebm.training.ec_flow_run import EcFlowRun, load_ec_flow
from fastebm.training.ec_posterior import resume_ec_posterior
from fastebm.training.ec_posterior_config import EcPosteriorConfig
from fastebm.training.ec_posterior_run import EcPosteriorRun, load_ec_posterior
from fastebm.training.ec_vae import resume_ec_vae
from fastebm.training.ec_vae_config import EcVaeConfig
from fastebm.training.ec_vae_run import EcVaeRun, load_ec_vae
from fastebm.training.loop import Given
from fastebm.training.run import RunError, RunFolder

Run = CoarseToFineRun | EcVaeRun | EcPosteriorRun | EcFlowRun
Config = CoarseToFineConfig | EcVaeConfig | EcPosteriorConfig | EcFlowConfig


@dataclass(frozen=True)
class _Method:
    """What a kind of run is read and taken up by."""

    config: type[Config]
    load: Callable[..., Run]
    resume: Callable[..., Run]


_METHODS = {
    coarse_to_fine_run.KIND: _Method(CoarseToFineConfig, load_coarse_to_fine, resume_coarse_to_fine),
    ec_vae_run.KIND: _Method(EcVaeConfig, load_ec_vae, resume_ec_vae),
    ec_posterior_run.KIND: _Method(EcPosteriorConfig, load_ec_posterior, resume_ec_posterior),
    ec_flow_run.KIND: _Method(EcFlowConfig, load_ec_flow, resume_ec_flow),
}


def load_run(run_dir: str | Path, device: torch.device | str | None = None) -> Run:
    """The run in a folder, finished or not, for sampling. Raises RunError where there is none, or none of ours."""
    return _METHODS[_kind(RunFolder.existing(run_dir))].load(run_dir, device)


def resume_run(run_dir: str | Path, images: Given | None = None, **options: Any) -> Run:
    """Takes up the unfinished run in a folder; arguments and errors as of `resume_coarse_to_fine`."""
    return _METHODS[_kind(RunFolder.existing(run_dir))].resume(run_dir, images, **options)


def config_of(folder: RunFolder) -> Config:
    """The config of a run. Raises RunError where it is none of ours, or damaged."""
    kind = _kind(folder)
    return _METHODS[kind].config.from_json(folder.config(kind))


def _kind(folder: RunFolder) -> str:
    kind = folder.kind()
    if kind not in _METHODS:
        raise RunError(f"{folder.path} holds a run of kind {kind!r}; known are {', '.join(_METHODS)}")
    return kind
