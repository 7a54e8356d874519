"""Every task takes a run, the folder of one, or a bare energy; each combination either works or says why not."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastebm import tasks, training
from fastebm.data import digits
from fastebm.runs.folder import RunError
from fastebm.tasks import (
    ClassicalDenoiser,
    DenoiseOptions,
    InpaintOptions,
    PathOptions,
    TranslateOptions,
    add_noise,
    hole_mask,
)
from fastebm.tasks.inputs import open_energy
from fastebm.tasks.restoration import ImageSearch, LatentSearch, SuperResolution, restore
from fastebm.training import CoarseToFineRun

HALF = SuperResolution(2)


def small(kind: str) -> Any:
    """The config of a run of a few updates on 8x8 digits that trains an energy, or for "vae" none."""
    common = {"size": 8, "channels": 1, "iterations": 2, "batch_size": 4, "width": 4, "engine": "autograd"}
    if kind == "ec_flow":
        return training.ECFlowConfig(**common, levels=1, flow_steps=2, energy_width=4, num_steps=1)
    if kind == "ec_posterior":
        return training.ECPosteriorConfig(**common, latent=4, num_steps=1)
    none = {"lambda_start": 0.0, "dual_rate": 0.0} if kind == "vae" else {}
    return training.ECVAEConfig(**common, latent=4, energy_width=4, num_steps=1, warmup=0, **none)


@pytest.fixture(scope="module")
def folders(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of runs of each kind."""
    made = {"coarse_to_fine": digits_run}
    for kind in ("ec_vae", "vae", "ec_flow", "ec_posterior"):
        made[kind] = tmp_path_factory.mktemp("runs") / kind
        training.train(small(kind), digits("train")[0][:40], made[kind], progress=False, save_pictures=False)
    return made


def smooth(x: Tensor) -> Tensor:
    return 0.1 * ((x - x.roll(1, 2)).square() + (x - x.roll(1, 3)).square()).sum((1, 2, 3))


IMAGES = digits("test")[0][:2]
SHORT = {"num_steps": 2, "step_size": 0.01}


def run_task(task: str, model: Any) -> Tensor:
    """The images that a task makes with a model, (2, 1, 8, 8)."""
    if task == "denoise":
        return tasks.denoise(model, add_noise(IMAGES, 0.1, seed=1), 0.1, DenoiseOptions(**SHORT)).restored
    if task == "inpaint":
        options = InpaintOptions(**SHORT, restarts=2)
        return tasks.inpaint(model, IMAGES, hole_mask("square", 2, 8), options).best
    if task == "translate":
        return tasks.translate(model, IMAGES, TranslateOptions(**SHORT, snapshots=1)).images
    if task == "interpolate":
        return tasks.interpolate_images(model, IMAGES, IMAGES.flip(0), PathOptions(3, 1, 0.01)).relaxed[:, 1]
    return restore(HALF.A(IMAGES), HALF, energy=model, engine="autograd").images


TASKS = ("denoise", "inpaint", "translate", "interpolate", "restore")


@pytest.mark.parametrize("kind", ["coarse_to_fine", "ec_vae", "ec_flow"])
@pytest.mark.parametrize("task", TASKS)
def test_a_run_and_its_folder_give_the_same(folders: dict[str, Path], task: str, kind: str) -> None:
    by_path, by_name = run_task(task, folders[kind]), run_task(task, str(folders[kind]))
    assert by_path.shape == IMAGES.shape
    assert torch.equal(by_path, by_name)
    assert torch.equal(by_path, run_task(task, training.load(folders[kind])))


@pytest.mark.parametrize("task", TASKS)
def test_a_bare_energy_is_enough(task: str) -> None:
    images = run_task(task, smooth)
    assert images.shape == IMAGES.shape
    assert images.isfinite().all()


@pytest.mark.parametrize("kind", ["vae", "ec_posterior"])
@pytest.mark.parametrize("task", TASKS)
def test_runs_without_an_energy_of_images_are_refused(folders: dict[str, Path], task: str, kind: str) -> None:
    with pytest.raises(ValueError, match=f"{kind} holds a run of kind 'ec_.*' without an energy of images"):
        run_task(task, folders[kind])


@pytest.mark.parametrize("task", TASKS)
def test_a_folder_without_a_run_is_refused(tmp_path: Path, task: str) -> None:
    with pytest.raises(RunError, match=str(tmp_path)):
        run_task(task, tmp_path)


def test_levels_need_a_run_that_has_them(folders: dict[str, Path]) -> None:
    noisy = add_noise(IMAGES, 0.1, seed=1)
    for model, message in ((smooth, "not a bare energy"), (folders["ec_vae"], "ec_vae holds one of kind 'ec_vae'")):
        for call in (
            lambda model: tasks.denoise(model, noisy, 0.1, DenoiseOptions(start_size=4)),
            lambda model: tasks.inpaint(model, IMAGES, hole_mask("half", 2, 8), InpaintOptions(coarse=True)),
            lambda model: tasks.translate(model, IMAGES, TranslateOptions(start_size=4)),
            lambda model: tasks.interpolate_chains(model, "noise"),
        ):
            with pytest.raises(ValueError, match=f"needs a run with an energy for each resolution, .*{message}"):
                call(model)
    path = tasks.interpolate_chains(folders["coarse_to_fine"], "noise", pairs=1, points=3)
    assert path.images.shape == (1, 3, 1, 8, 8)


def test_the_energy_of_a_run_is_that_of_its_highest_level(run: CoarseToFineRun) -> None:
    opened = open_energy(run)
    assert list(opened.gradients) == [4, 8]
    assert opened.gradient is opened.gradients[8]
    torch.testing.assert_close(opened.energies(IMAGES, batch_size=1), run.levels[8](IMAGES).detach())
    assert opened.shape == (1, 8, 8)
    assert open_energy(smooth).shape is None


def test_restoration_by_a_run_uses_its_decoder_or_its_cascade(folders: dict[str, Path]) -> None:
    y = HALF.A(IMAGES)
    by_decoder = restore(y, HALF, energy=folders["ec_vae"], search=LatentSearch(num_steps=2), engine="autograd")
    assert by_decoder.latents is not None
    by_levels = restore(y, HALF, energy=folders["coarse_to_fine"], search=ImageSearch(restarts=3, coarse=True))
    assert by_levels.latents is None
    assert by_levels.starts.shape == (2, 3)
    cascade = training.load(folders["coarse_to_fine"]).cascade()
    expected = tasks.restoration.restore_by_cascade(y, HALF, cascade=cascade, restarts=3, coarse=True)
    assert torch.equal(by_levels.images, expected.images)
    with pytest.raises(
        ValueError, match=r"y measures images of the shape \(1, 16, 16\), but the run's are \(1, 8, 8\)"
    ):
        restore(torch.zeros(2, 1, 8, 8), HALF, energy=folders["coarse_to_fine"])


def test_a_missing_package_is_reported_before_chains_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def energy(x: Tensor) -> Tensor:
        calls.append(len(x))
        return smooth(x)

    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    monkeypatch.setitem(sys.modules, "skimage.restoration", None)
    noisy = add_noise(IMAGES, 0.1, seed=1)
    for options in ({"clean": IMAGES}, {"baselines": [ClassicalDenoiser("total variation", {"weight": 0.1})]}):
        with pytest.raises(ModuleNotFoundError, match=r"fastebm\[tasks\]"):
            tasks.denoise(energy, noisy, 0.1, DenoiseOptions(**SHORT), **options)
    assert not calls
    assert tasks.denoise(energy, noisy, 0.1, DenoiseOptions(**SHORT)).restored.isfinite().all()
    assert calls


def test_restoration_without_a_decoder_has_the_settings_of_the_run(folders: dict[str, Path]) -> None:
    run = training.load(folders["ec_flow"])
    y, config = HALF.A(IMAGES), run.config
    own = ImageSearch(1, num_steps=config.num_steps, step_size=config.step_size, noise_std=config.noise_std)
    by_run = restore(y, HALF, energy=run, search=ImageSearch(restarts=1)).images
    torch.testing.assert_close(by_run, restore(y, HALF, energy=run.energy, search=own).images)
    assert not torch.equal(by_run, restore(y, HALF, energy=run.energy, search=ImageSearch(restarts=1)).images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0}, "step_size must be positive, got 0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
    ],
)
def test_options_of_translation_name_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TranslateOptions(**options)
