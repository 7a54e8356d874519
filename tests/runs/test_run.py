"""Every kind of run is trained, loaded and resumed by one call, and has samples, an energy and settings."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import functools
import importlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastebm
from fastebm.data import digits
from fastebm.runs.folder import RunFolder
from fastebm.runs.nets import picklable
from fastebm.runs.registry import METHODS
from fastebm.runs.run import Run
from fastebm.training import (
    CoarseToFineRun,
    ECFlowConfig,
    ECVAEConfig,
    StoppedError,
)
from tests.runs.small_configs import SILENT, small_configs

CONFIGS = small_configs(checkpoint_every=2, log_every=1)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return digits("train")[0][:50]


@pytest.fixture(scope="module")
def trained(images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A trained run of each kind, made once."""
    runs: dict[str, Run] = {}

    def run(kind: str) -> Run:
        if kind not in runs:
            runs[kind] = fastebm.train(CONFIGS[kind], images, tmp_path_factory.mktemp(kind) / "run", **SILENT)
        return runs[kind]

    return run


def test_every_kind_is_here() -> None:
    assert CONFIGS.keys() == METHODS.keys()
    assert all(config.kind == kind for kind, config in CONFIGS.items())


@pytest.mark.parametrize("kind", CONFIGS)
def test_train_and_load_give_the_same_run(kind: str, trained: Callable[[str], Run]) -> None:
    run = trained(kind)
    loaded = fastebm.load(run.path)
    for each in (run, loaded):
        assert isinstance(each, Run)
        assert (each.path, each.config, each.iteration) == (run.path, CONFIGS[kind], 3)
        assert each.finished
        assert each.size == 8
    assert type(loaded) is type(run)
    assert torch.equal(run.sample(3), loaded.sample(3))


@pytest.mark.parametrize("kind", CONFIGS)
def test_samples_are_images_of_the_seed_in_any_batches(kind: str, trained: Callable[[str], Run]) -> None:
    run = trained(kind)
    samples = run.sample(5, seed=7)
    assert samples.shape == (5, 1, 8, 8)
    assert samples.dtype == torch.float32
    assert samples.abs().max() <= 1
    torch.testing.assert_close(run.sample(5, 7, batch_size=2), samples, rtol=1e-4, atol=1e-4)
    assert not torch.equal(run.sample(5, seed=8), samples)
    assert torch.equal(run.sample(5), run.sample(5))


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_energy_is_that_of_the_highest_resolution(kind: str, trained: Callable[[str], Run]) -> None:
    run = trained(kind)
    if kind == "ec_posterior":
        assert run.energy is None
        return
    assert run.energy is not None
    energies = run.energy(run.sample(5))
    assert energies.shape == (5,)
    assert energies.isfinite().all()
    assert not energies.requires_grad
    assert fastebm.Langevin(run.energy, 0.1, 0.01, engine="autograd").sample(run.sample(2), 2, seed=0).isfinite().all()


@pytest.mark.parametrize("kind", ["ec_vae", "ec_flow"])
def test_a_plain_generator_has_no_energy(kind: str, images: Tensor, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIGS[kind], lambda_start=0.0)  # type: ignore[arg-type, call-arg]
    assert fastebm.train(config, images, tmp_path / "run", **SILENT).energy is None


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_stopped_run_is_loaded_and_resumed(
    kind: str, trained: Callable[[str], Run], images: Tensor, tmp_path: Path
) -> None:
    def stop(line: dict[str, Any]) -> None:
        if line["iteration"] == 3:
            raise StoppedError

    path = tmp_path / "run"
    with pytest.raises(StoppedError):
        fastebm.train(CONFIGS[kind], images, path, on_log=stop, **SILENT)
    stopped = fastebm.load(path)
    assert stopped.iteration == 2
    assert not stopped.finished
    assert stopped.sample(2).shape == (2, 1, 8, 8)
    resumed = fastebm.resume(path, images, **SILENT)
    assert resumed.finished
    assert torch.equal(resumed.sample(3), trained(kind).sample(3))
    assert fastebm.resume(path).iteration == 3  # a finished run needs no images


@pytest.mark.parametrize("module", ["fastebm.runs.registry", "fastebm.training.trainer.entry", *METHODS.values()])
def test_examples_run(module: str) -> None:
    results = doctest.testmod(importlib.import_module(module if module not in METHODS.values() else f"{module}.run"))
    assert results.failed == 0
    assert results.attempted > 3


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_run_is_pickled_with_its_nets(kind: str, trained: Callable[[str], Run]) -> None:
    run = fastebm.load(trained(kind).path)
    for again in (pickle.loads(pickle.dumps(run)), copy.deepcopy(run)):
        assert type(again) is type(run)
        assert (again.path, again.config, again.iteration) == (run.path, run.config, run.iteration)
        assert torch.equal(again.sample(3, seed=1), run.sample(3, seed=1))
        assert (again.energy is None) == (run.energy is None)
    if kind == "coarse_to_fine":
        assert isinstance(again, CoarseToFineRun)
        assert again.energy is again.levels[8]  # one net, not two


def test_a_run_in_progress_is_pickled_with_how_far_it_has_faded_in(images: Tensor, tmp_path: Path) -> None:
    def stop(line: dict[str, Any]) -> None:
        if line["iteration"] == 4:
            raise StoppedError

    config = dataclasses.replace(CONFIGS["coarse_to_fine"], iterations=(1, 8), checkpoint_every=1)  # type: ignore[type-var]
    with pytest.raises(StoppedError):
        fastebm.train(config, images, tmp_path / "run", on_log=stop, **SILENT)
    run = fastebm.load(tmp_path / "run")
    assert isinstance(run.energy, functools.partial)
    again = pickle.loads(pickle.dumps(run))
    assert again.energy.keywords == run.energy.keywords
    assert torch.equal(again.sample(3, seed=1), run.sample(3, seed=1))


def test_a_net_without_a_config_is_not_pickled() -> None:
    with pytest.raises(TypeError, match="a Linear can't be pickled: it has no `config`"):
        picklable(torch.nn.Linear(1, 1), {})


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_checkpoint_has_the_layout_of_its_run(kind: str, trained: Callable[[str], Run]) -> None:
    run = trained(kind)
    checkpoints = RunFolder.existing(run.path).checkpoints
    for iteration in checkpoints.iterations():
        saved = checkpoints._load(iteration)
        layout = type(run).layout(run.config, iteration)
        layout.check(saved.tensors)
        assert all(tensor.is_meta for tensor in layout.tensors.values())
        without = dict(saved.tensors)
        del without[next(iter(layout.tensors))]
        with pytest.raises(ValueError, match="it lacks the tensor"):
            layout.check(without)


def test_train_takes_a_path_and_refuses_what_are_no_images(tmp_path: Path) -> None:
    config = ECVAEConfig(size=8, channels=1, iterations=1, batch_size=4, latent=4, width=4, energy_width=4)
    np.savez(tmp_path / "images.npz", np.zeros((9, 8, 8), np.uint8))
    run = fastebm.train(config, tmp_path / "images.npz", tmp_path / "run", progress=False, save_pictures=False)
    assert run.finished
    assert repr(run) == f"ECVAERun({str(tmp_path / 'run')!r}, iteration 1 of 1)"
    with pytest.raises(TypeError, match="images must be a tensor, Images, an ImageSource or a path, got ndarray"):
        fastebm.train(config, np.zeros((9, 8, 8)), tmp_path / "other")
    with pytest.raises(TypeError, match="config must be the configuration of a method, got str"):
        fastebm.train("run", torch.zeros(9, 1, 8, 8), tmp_path / "other")


def test_a_flow_draws_no_images_and_refuses_batches_of_none(tmp_path: Path) -> None:
    config = ECFlowConfig(
        size=8, channels=1, iterations=1, batch_size=4, levels=1, flow_steps=1, width=4, energy_width=4
    )
    run = fastebm.train(config, torch.zeros(9, 1, 8, 8), tmp_path, progress=False, save_pictures=False)
    assert run.sample(0).shape == (0, 1, 8, 8)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        run.sample(3, batch_size=0)
