"""Images of a run: floats or bytes, from a file that is found again, mirrored, and recognised."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastebm.data import DataError, ImagePyramid, Images, flip, open_images, to_float
from fastebm.data.sources import source_from_json
from fastebm.runs.folder import RunFolder
from fastebm.training import (
    CoarseToFineConfig,
    CoarseToFineRun,
    DigitsSource,
    ImageSource,
    RunError,
    resume,
    train,
)
from fastebm.training.coarse_to_fine.trainer import CoarseToFineTrainer
from fastebm.training.images import image_levels
from fastebm.training.trainer.parts import Part
from tests.training.resumed_runs import Stop, stopping

SILENT: dict[str, Any] = {"progress": False, "save_pictures": False}


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randint(0, 256, (30, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def archive(pixels: Tensor, tmp_path: Path) -> Path:
    np.savez(tmp_path / "set.npz", x_train=pixels.numpy(), x_test=pixels[:2].numpy())
    return tmp_path / "set.npz"


def test_bytes_and_their_floats_are_the_same_images(pixels: Tensor) -> None:
    levels = image_levels(Images(pixels), (4, 8), 1)
    floats = image_levels(to_float(pixels), (4, 8), 1)
    indices = torch.tensor([3, 0, 29])
    for size in (4, 8):
        torch.testing.assert_close(levels.batch(size, indices), floats.batch(size, indices), atol=1e-6, rtol=0)
    assert len(levels) == len(floats) == 30
    assert torch.equal(levels.first(8, 3), ImagePyramid(Images(pixels), 4).batch(8, torch.arange(3)))
    assert len(levels.first(8, 100)) == 30
    assert levels.digest != floats.digest
    assert levels.digest == image_levels(Images(pixels.clone(), name="elsewhere"), (8,), 1).digest


def test_bytes_that_do_not_fit_are_refused(pixels: Tensor) -> None:
    with pytest.raises(ValueError, match="images have 1 channels, and the config 3"):
        image_levels(Images(pixels), (4, 8), 3)
    with pytest.raises(ValueError, match="too small to train up to 32"):
        image_levels(Images(pixels), (4, 8, 16, 32), 1)
    with pytest.raises(ValueError, match="can't be halved"):
        image_levels(Images(pixels), (5, 10), 1)


def test_a_run_from_a_file_is_taken_up_by_its_folder_alone(
    tiny: CoarseToFineConfig, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(tiny, flip=True)
    monkeypatch.chdir(tmp_path)
    source = ImageSource(Path("set.npz"), size=8, channels=1)
    whole = train(config, source, tmp_path / "whole", **SILENT)
    with pytest.raises(Stop):
        train(config, source, tmp_path / "stopped", on_log=stopping(7), **SILENT)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = resume(tmp_path / "stopped", **SILENT)
    assert resumed.finished
    assert torch.equal(whole.sample(5), resumed.sample(5))


def test_changed_images_are_refused(tiny: CoarseToFineConfig, archive: Path, pixels: Tensor, tmp_path: Path) -> None:
    source = ImageSource(archive, size=8, channels=1)
    with pytest.raises(Stop):
        train(tiny, source, tmp_path / "run", on_log=stopping(7), **SILENT)
    np.savez(archive, x_train=pixels.flip(0).numpy())
    with pytest.raises(RunError, match="other images"):
        resume(tmp_path / "run", **SILENT)
    archive.unlink()
    with pytest.raises(DataError, match=r"set\.npz: there is no such file"):
        resume(tmp_path / "run", **SILENT)
    # They may lie elsewhere, if they are the same.
    again = resume(tmp_path / "run", Images(open_pixels(pixels, tmp_path)), **SILENT)
    assert again.finished


def test_a_finished_run_needs_no_images(
    tiny: CoarseToFineConfig, archive: Path, images: Tensor, tmp_path: Path
) -> None:
    source = ImageSource(archive, size=8, channels=1)
    train(tiny, source, tmp_path / "file", **SILENT)
    train(tiny, images, tmp_path / "tensor", **SILENT)
    archive.unlink()
    for name in ("file", "tensor"):
        assert resume(tmp_path / name, **SILENT).finished
    # One whose last checkpoint is damaged is not finished.
    for name, error, message in (
        ("file", DataError, "there is no such file"),
        ("tensor", RunError, "doesn't say where its images come from"),
    ):
        (tmp_path / name / "checkpoints" / "iteration-000000013.safetensors").write_bytes(b"damaged")
        with pytest.raises(error, match=message), pytest.warns(RuntimeWarning, match="is damaged"):
            resume(tmp_path / name, **SILENT)


def open_pixels(pixels: Tensor, folder: Path) -> Tensor:
    np.savez(folder / "moved.npz", x_train=pixels.numpy())
    return open_images(folder / "moved.npz", size=8).pixels


def test_nobody_knows_the_images_of_a_run_from_a_tensor(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        train(tiny, images, tmp_path, on_log=stopping(7), **SILENT)
    with pytest.raises(RunError, match="doesn't say where its images come from"):
        resume(tmp_path, **SILENT)
    assert resume(tmp_path, images, **SILENT).finished


def test_digits_need_no_file(tiny: CoarseToFineConfig, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(tiny, DigitsSource(), tmp_path, on_log=stopping(7), **SILENT)
    assert resume(tmp_path, **SILENT).finished


def test_a_source_comes_back_from_json(tmp_path: Path) -> None:
    source = ImageSource(tmp_path / "a.npz", 8, 3, "test", "pad", 4, "faces")
    for stored in (source, DigitsSource()):
        assert source_from_json(json.loads(json.dumps(stored.to_json()))) == stored
    for wrong in ({}, {"path": "a", "colour": 1}, {"path": 3}):
        with pytest.raises(RunError, match="not a source of images"):
            source_from_json(wrong)


def test_images_are_mirrored_by_their_position(tiny: CoarseToFineConfig, pixels: Tensor) -> None:
    levels = image_levels(Images(pixels), tiny.sizes, 1)
    configs = [dataclasses.replace(tiny, data_noise=0.0, flip=on) for on in (False, True)]
    trainers = [CoarseToFineTrainer(config, levels, torch.device("cpu")) for config in configs]
    part, stage = Part(0, 8, 8, 40), tiny.stages[0]
    plain, mirrored = (trainer._real_images(stage, part, next(trainer._order)) for trainer in trainers)
    assert torch.equal(mirrored, flip(plain, seed=tiny.seed, positions=40))
    kept = (mirrored == plain).flatten(1).all(1)
    assert 0 < kept.sum() < len(kept)


def test_a_run_of_an_older_version_is_taken_up(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(tiny, images, tmp_path, on_log=stopping(7), **SILENT)
    old = ("variant", "dtype", "engine", "flip", "max_batch", "recompute_from", "max_gap", "max_loss", "retries")
    content = json.loads((tmp_path / "config.json").read_text())
    for name in (*old, "retry_lr_factor", "pictures_every", "tensorboard"):
        del content["config"][name]
    del content["images"], content["threads"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    for path in (tmp_path / "checkpoints").glob("*.json"):
        description = json.loads(path.read_text())
        for name in ("guard", "means", "config"):
            del description["state"][name]
        del description["description_sha256"]
        path.write_text(json.dumps(description))
    assert CoarseToFineRun.load(tmp_path).iteration == 6
    assert RunFolder.existing(tmp_path).threads() is None
    assert train(tiny, images, tmp_path, **SILENT).finished
