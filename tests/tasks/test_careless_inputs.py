"""What would be broadcast, ignored or misread in silence is refused in one line that says what is needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fastebm
from fastebm import tasks
from fastebm.data import Images
from fastebm.memory import size_in_words
from fastebm.tasks import (
    ClassicalDenoiser,
    DenoiseOptions,
    InpaintOptions,
    PathOptions,
    TranslateOptions,
    hole_mask,
    inpaint,
)
from fastebm.tasks.arguments import check_memory
from fastebm.tasks.restoration import (
    Colorization,
    CompressedSensing,
    DataConsistency,
    Dense,
    ImageSearch,
    Inpainting,
    LatentSearch,
    Refinement,
    SuperResolution,
    box_mask,
    restore,
)
from fastebm.training import CoarseToFineRun

GOOD = torch.zeros(2, 1, 8, 8)
HALF = SuperResolution(2)
ONE = {"search": LatentSearch(num_steps=2, restarts=1), "engine": "autograd"}


def smooth(x: Tensor) -> Tensor:
    return 0.1 * ((x - x.roll(1, 2)).square() + (x - x.roll(1, 3)).square()).sum((1, 2, 3))


def decoder(*shape: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, math.prod(shape)), nn.Tanh(), nn.Unflatten(1, shape))


@pytest.mark.parametrize(
    ("y", "degradation", "message"),
    [
        # Each of these was broadcast once, or gave images of another form.
        (torch.rand(2, 1, 4, 4), HALF, r"decoder makes images of the shape \(3, 8, 8\), but y measures .*\(1, 8, 8\)"),
        (torch.rand(2, 3, 8, 8), HALF, r"decoder makes images of the shape \(3, 8, 8\), but y .*\(3, 16, 16\)"),
        (torch.rand(2, 3, 8, 8), Colorization(), "a measurement of colorization has 1 channel, got 3"),
        (torch.rand(2, 1, 8, 8), Inpainting(box_mask(8, 8)), r"shape \(3, 8, 8\), but y measures .*\(1, 8, 8\)"),
        (torch.rand(2, 7, 2, 2), CompressedSensing(0.25, 4), "has 4 numbers for each channel, got 7"),
        (torch.rand(2, 4, 2, 2), CompressedSensing(0.25, 4), r"shape \(3, 8, 8\), but y measures .*\(1, 8, 8\)"),
        (torch.rand(2, 9), Dense(torch.rand(8, 192), (3, 8, 8), (8,)), r"are \(8,\), got \(9,\)"),
        (torch.rand(3, 4, 4), HALF, r"measurements must be \(B, C, H, W\), no side of them 0, got \(3, 4, 4\)"),
        (torch.rand(0, 3, 4, 4), HALF, "y must hold at least one measurement"),
        (torch.full((2, 3, 4, 4), math.nan), HALF, "measurement 0 of y has values that are infinite or not a number"),
    ],
)
def test_a_measurement_of_other_images_is_refused(y: Tensor, degradation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        restore(y, degradation, energy=smooth, decoder=decoder(3, 8, 8), latent=4, **ONE)


def test_types_of_measurements_name_the_remedy() -> None:
    for y in (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 3, 4, 4).half(), np.zeros((2, 3, 4, 4)), None):
        with pytest.raises(TypeError, match=r"y must be a tensor in float32 as degradation\.A gives it, got"):
            restore(y, HALF, energy=smooth)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"chains need measurements in float32, got torch.float64"):
        restore(torch.zeros(2, 3, 4, 4).double(), HALF, energy=smooth)
    with pytest.raises(TypeError, match=r"images must be a float tensor, got torch\.uint8"):
        HALF.A(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_hidden_values_of_a_measurement_may_be_anything() -> None:
    known = box_mask(8, 8)
    y = torch.where(known, torch.rand(2, 1, 8, 8), torch.nan)
    assert torch.equal(restore(y, Inpainting(known), energy=smooth).images[..., known], y[..., known])


def test_images_of_a_bare_energy_need_not_be_square() -> None:
    x = torch.rand(2, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    y = HALF.A(x)
    restored = restore(y, HALF, energy=smooth, search=ImageSearch(restarts=2, step_size=0.1), seed=1)
    assert restored.images.shape == x.shape
    torch.testing.assert_close(HALF.A(restored.images), y)
    with pytest.raises(ValueError, match="ends at 10x10, but y measures images of 6x10"):
        tasks.restoration.restore_by_cascade(y, HALF, cascade=fastebm.Cascade({10: smooth}))


def test_a_projection_does_not_broadcast() -> None:
    consistent = DataConsistency(HALF, (1, 8, 8))
    for call in (consistent, consistent.residual_rms):
        with pytest.raises(ValueError, match=r"images are \(3, 8, 8\), and the measurement is of images \(1, 8, 8\)"):
            call(torch.zeros(2, 3, 8, 8), GOOD)


def test_energies_and_decoders_of_another_form_are_refused() -> None:
    y = HALF.A(torch.zeros(2, 3, 8, 8))
    for energy, message in (
        (lambda x: x.flatten(1), r"one number per image, \(B,\), got shape \(\d+, 192\)"),
        (lambda x: x.sum(), "one number per image"),
    ):
        with pytest.raises(ValueError, match=message):
            restore(y, HALF, energy=energy, decoder=decoder(3, 8, 8), latent=4, **ONE)
    with pytest.raises(ValueError, match=r"the decoder can't take torch.float32 latent vectors of length 5 on cpu"):
        restore(y, HALF, energy=smooth, decoder=decoder(3, 8, 8), latent=5, **ONE)


def test_settings_of_restoration_without_effect_are_refused(run: CoarseToFineRun) -> None:
    y = HALF.A(GOOD)
    with pytest.raises(ValueError, match="num_steps, step_size: the chains of a run have the settings of its training"):
        restore(y, HALF, energy=run, search=ImageSearch(num_steps=3, step_size=1.0))
    with pytest.raises(ValueError, match="coarse=True needs a coarse-to-fine run"):
        restore(y, HALF, energy=smooth, search=ImageSearch(coarse=True))
    with pytest.raises(ValueError, match="engine='fused' is of energy_gradient"):
        restore(y, HALF, energy=fastebm.energy_gradient(smooth, engine="autograd"), engine="fused")
    by_default = restore(y, HALF, energy=smooth)
    settings = ImageSearch(num_steps=15, step_size=1.0, noise_std=0.015)
    assert torch.equal(by_default.images, restore(y, HALF, energy=smooth, search=settings).images)


@pytest.mark.parametrize("form", [(8, 8), (1, 1, 8, 8), (3, 1, 8, 8), (1, 3, 8, 8), (3, 3, 8, 8)])
def test_holes_of_all_documented_forms_mean_the_same(form: tuple[int, ...]) -> None:
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    hole = torch.zeros(form, dtype=torch.bool)
    hole[..., 2:5, 3:] = True
    options = InpaintOptions(num_steps=1, restarts=1)
    whole = inpaint(smooth, images, hole[..., :, :].expand(3, 3, 8, 8), options).filled
    assert torch.equal(inpaint(smooth, images, hole, options).filled, whole)


def test_a_hole_of_three_dimensions_is_not_guessed() -> None:
    """(N, H, W) for three images in colour would be taken for (C, H, W)."""
    hole = hole_mask("pixels", 3, 8)[:, 0]
    with pytest.raises(ValueError, match=r"the hole must be \(8, 8\), or \(3 or 1, 3 or 1, 8, 8\).*got \(3, 8, 8\)"):
        inpaint(smooth, torch.zeros(3, 3, 8, 8), hole)


BYTES = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    "call",
    [
        lambda: tasks.denoise(smooth, BYTES, 0.1),
        lambda: tasks.inpaint(smooth, BYTES, hole_mask("half", 2, 8)),
        lambda: tasks.translate(smooth, BYTES),
        lambda: tasks.interpolate_images(smooth, BYTES, BYTES),
        lambda: tasks.outlier_scores(smooth, BYTES),
        lambda: tasks.add_noise(BYTES, 0.1, 0),
        lambda: tasks.quality(BYTES, BYTES),
        lambda: tasks.psnr(GOOD, BYTES),
        lambda: tasks.total_variation(BYTES),
        lambda: tasks.nearest_images(GOOD, BYTES),
        lambda: tasks.tune_denoisers(BYTES, GOOD, 0.1),
        lambda: ClassicalDenoiser("total variation", {"weight": 0.1})(BYTES),
    ],
)
def test_bytes_are_refused_with_the_remedy(call: Callable[[], object]) -> None:
    with pytest.raises(
        TypeError, match=r"must be a float32 tensor, got torch.uint8: fastebm\.data\.to_float makes one"
    ):
        call()


def test_values_just_outside_name_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"from 0 to 1\.00\d+, the first of them in image 1: clamp\(-1, 1\) cuts them"):
        tasks.translate(smooth, torch.cat((GOOD[:1], GOOD[:1] + 1.003)))


@pytest.mark.parametrize("model", [None, 3, torch.zeros(2), nn.Linear, [smooth]])
def test_what_is_no_model_is_named(model: Any) -> None:
    for call in (lambda: tasks.translate(model, GOOD), lambda: tasks.outlier_scores(model, GOOD)):
        with pytest.raises(TypeError, match="a model is a run, the folder of one, or an energy of images, got"):
            call()
    with pytest.raises(TypeError, match="images_for needs a run"):
        tasks.images_for(model)


def test_images_where_a_set_is_needed_are_named() -> None:
    images = Images(BYTES)
    for training, given in ((GOOD, images), (images, GOOD)):
        with pytest.raises(TypeError, match=r"Images are needed, as fastebm.data.open_images gives them, got Tensor"):
            tasks.detect_outliers(smooth, training, given)  # type: ignore[arg-type]


def test_batches_to_score_have_one_shape() -> None:
    with pytest.raises(ValueError, match=r"images must have one shape, got \(1, 8, 8\) and then \(1, 4, 4\)"):
        tasks.outlier_scores(smooth, [GOOD, GOOD[:, :, :4, :4]], engine="autograd")
    with pytest.raises(TypeError, match="images must be a float32 tensor, got str"):
        tasks.outlier_scores(smooth, "pictures")  # type: ignore[arg-type]


def test_a_split_without_effect_is_refused(run: CoarseToFineRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="digits have no split 'val'"):
        tasks.images_for(run, split="val")
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(ValueError, match=r"split 'train' is of a set, and .*one\.png is a single picture"):
        tasks.images_for(run, tmp_path / "one.png", split="train")


NUMBERS = {
    DenoiseOptions: ("num_steps", "step_size", "temperature", "noise_std", "start_size", "num_chains"),
    InpaintOptions: ("num_steps", "step_size", "noise_start", "noise_end", "restarts"),
    TranslateOptions: ("num_steps", "step_size", "noise_std", "start_noise", "snapshots", "start_size", "data_weight"),
    PathOptions: ("points", "iterations", "step_size"),
    ImageSearch: ("restarts", "num_steps", "step_size", "noise_std"),
    LatentSearch: ("num_steps", "restarts", "learning_rate", "step_size", "noise_std", "energy_weight"),
    Refinement: ("num_steps", "step_size", "noise_std"),
}
NEEDED = {Refinement: {"num_steps": 1, "step_size": 0.1}, TranslateOptions: {"step_size": 0.1}}
WHOLE = ("num_steps", "num_chains", "restarts", "start_size", "snapshots", "points", "iterations")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NUMBERS.items() for name in names])
def test_numbers_of_options(kind: Any, name: str) -> None:
    def build(value: Any) -> Any:
        return kind(**NEEDED.get(kind, {}) | {name: value})

    whole = name in WHOLE
    wrong = [-1, math.nan, math.inf, 10**400, 1e300, "3", [1], torch.zeros(2), *([10**20, True, 1.5] if whole else [])]
    for value in wrong:
        with pytest.raises((ValueError, TypeError), match=name) as caught:
            build(value)
        assert "\n" not in str(caught.value)
    for scalar in (np.int64(7), torch.tensor(7), *([] if whole else [np.float32(7), torch.tensor(7.0)])):
        assert asdict(build(scalar)) == asdict(build(7))
        assert type(getattr(build(scalar), name)) is (int if whole else float)  # so that it can be written as JSON


@pytest.mark.parametrize("seed", [None, 1.5, "3", 2**64, -(2**63) - 1, True])
def test_seeds_out_of_range_are_found_before_chains_run(seed: Any) -> None:
    def energy(x: Tensor) -> Tensor:
        raise AssertionError("a chain runs")

    for call in (
        lambda: tasks.denoise(energy, GOOD, 0.1, seed=seed),
        lambda: tasks.inpaint(energy, GOOD, hole_mask("half", 2, 8), seed=seed),
        lambda: tasks.translate(energy, GOOD, seed=seed),
        lambda: restore(HALF.A(GOOD), HALF, energy=energy, seed=seed),
        lambda: tasks.add_noise(GOOD, 0.1, seed),
        lambda: hole_mask("pixels", 2, 8, seed),
        lambda: tasks.uniform_noise(2, 1, 8, seed=seed),
        lambda: tasks.tune_denoising(energy, GOOD, 0.1, seed=seed),
    ):
        with pytest.raises((ValueError, TypeError), match="seed must be"):
            call()


def test_what_does_not_fit_into_memory_is_refused() -> None:
    cpu = torch.device("cpu")
    check_memory("little", 10, cpu)
    with pytest.raises(ValueError, match=r"much would need 14\.55 TiB of memory, and .*B are free"):
        check_memory("much", 10**12, cpu)
    assert [size_in_words(number) for number in (0, 1023, 1536, 2**40, 2**90)] == (
        ["0 bytes", "1,023 bytes", "1.5 KiB", "1 TiB", "1.074e+09 EiB"]
    )


def test_a_precision_is_at_most_one() -> None:
    """The sum of scikit-learn rounds to more."""
    inside, outside = [-1.0], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert all(tasks.detection_metrics(inside, outside[:count]).aupr <= 1 for count in range(1, 8))


def test_bars_of_detection_have_the_names_of_their_sets(
    run: CoarseToFineRun, capsys: pytest.CaptureFixture[str]
) -> None:
    images = Images(torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    tasks.detect_outliers(run, images, images, count=4, engine="autograd", progress=True)
    drawn = capsys.readouterr().err
    for name in ("training:", "training, untrained:", "in distribution:", "uniform noise:", "rotated:"):
        assert name in drawn


def test_a_run_of_another_engine_restores_with_the_one_that_is_asked_for(run: CoarseToFineRun) -> None:
    y = HALF.A(GOOD)
    by_run, asked = restore(y, HALF, energy=run), restore(y, HALF, energy=run, engine="fused")
    torch.testing.assert_close(asked.images, by_run.images, atol=1e-3, rtol=1e-3)
