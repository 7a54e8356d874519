"""Careless arguments of the Python functions of tasks: the right result, or one line of ValueError or TypeError.

In each try of a task every argument is a good one, or now and then one that people give by mistake: another dtype,
shape, range or type, numbers that are huge, negative or none. A result has to keep what its task promises.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastebm
from fastebm import tasks
from fastebm.runs.folder import RunError
from fastebm.tasks import restoration
from fastebm.tasks.restoration import ImageSearch, LatentSearch, Refinement

SEED = 15
HOSTILE = 0.1
"""How often an argument is a careless one."""
NUMBERS: list[Any] = [
    0, -1, 1, 2, 10**20, -(10**20), 2**63, 2**64, 10**9, 1.5, 0.0, -0.5, math.nan, math.inf, -math.inf, 1e300,
    "3", None, True, [1], (2, 3), b"4", np.int64(2), np.float32(0.5), torch.tensor(2), torch.tensor([1.0, 2.0]),
]  # fmt: skip


def smooth(x: Tensor) -> Tensor:
    """A convex energy of images, small enough for any step size of a good try."""
    return 0.05 * (x.square() + (x - x.roll(1, 2)).square() + (x - x.roll(1, 3)).square()).sum((1, 2, 3))


def outwards(x: Tensor) -> Tensor:
    return -1e8 * x.square().square().sum((1, 2, 3))


ENERGY = fastebm.energy_gradient(smooth, engine="autograd")  # as an EnergyGradient it is made ready once
WRONG_ENERGIES: list[Any] = [
    None, 3, "nowhere", nn.Identity(), nn.Linear, torch.zeros(2), lambda x: x.sum(), lambda x: x.flatten(1),
    lambda x: torch.zeros(len(x)), lambda x: None, outwards, lambda x: x.sum((1, 2, 3)) * math.nan,
]  # fmt: skip


class Draws:
    """The arguments of one try, and whether one of them is a careless one."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(f"{SEED} {number}")
        self.careless: list[str] = []
        self.given: list[tuple[Tensor, Tensor]] = []  # each tensor with a copy, to see that it stays

    def one_of(self, name: str, good: Any, wrong: list[Any]) -> Any:
        if self.random.random() < HOSTILE:
            self.careless.append(name)
            return self.random.choice(wrong)
        return good

    def number(self, name: str, *good: Any) -> Any:
        return self.one_of(name, self.random.choice(good), NUMBERS)

    def options(self, kind: Any, **good: tuple[Any, ...]) -> Any:
        return kind(**{name: self.number(name, *values) for name, values in good.items()})

    def energy(self) -> Any:
        return self.one_of("energy", ENERGY, WRONG_ENERGIES)

    def form(self, *, least: int = 2) -> tuple[int, int, int, int]:
        draw = self.random.randint
        return draw(1, 3), self.random.choice((1, 1, 3)), draw(least, 6), draw(least, 6)

    def images(self, form: tuple[int, ...], name: str = "images") -> Any:
        x = 2 * torch.rand(form, generator=torch.Generator().manual_seed(self.random.getrandbits(32))) - 1
        if self.random.random() < 0.2:  # as good, but not contiguous
            x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        x = self.one_of(name, x, self._wrong_images(x))
        if isinstance(x, Tensor) and x.device.type == "cpu" and x.layout == torch.strided:
            self.given.append((x, x.detach().clone()))
        return x

    def _wrong_images(self, x: Tensor) -> list[Any]:
        at = torch.zeros(x.shape, dtype=torch.bool)
        at.view(-1)[self.random.randrange(at.numel())] = True
        return [
            x.double(), x.half(), x.bfloat16(), ((x + 1) * 127.5).to(torch.uint8), x.long(), x > 0, x.numpy(),
            x.tolist(), None, "images", x[0], x[None], x[:0], x[:, :0], x[..., :0], torch.where(at, math.nan, x),
            x.to_sparse(), torch.where(at, math.inf, x), torch.where(at, -math.inf, x), 255 * x, x + 1e-3,
            x[..., :1], x[:, :, :-1],
            torch.cat((x, x)), x.repeat(1, 3, 1, 1), x[:, :1], x.repeat(1, 1, 2, 2), x.to("meta"), x + 0j,
            torch.tensor(0.5),
        ]  # fmt: skip


def expect(holds: Any, what: str) -> None:
    if not bool(holds):
        raise AssertionError(what)


def finite_images(x: Tensor, form: Any, *, bounded: bool = True) -> None:
    expect(tuple(x.shape) == tuple(form), f"shape {tuple(x.shape)} for {tuple(form)}")
    expect(x.dtype == torch.float32 and x.isfinite().all(), "not finite float32")
    expect(not bounded or (x.abs() <= 1).all(), "outside of [-1, 1]")


def close(a: Any, b: Any) -> bool:
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-4, atol=1e-5)


def denoising(draws: Draws) -> None:
    form = draws.form()
    noisy, energy, noise = draws.images(form), draws.energy(), draws.number("noise", 0.1, 0.5)
    clean = draws.random.choice((None, draws.images(form, "clean"))) if min(form[2:]) >= 4 else None
    options = draws.options(
        tasks.DenoiseOptions,
        num_steps=(1, 2),
        step_size=(0.5, 1.0),
        temperature=(0.0, 0.01),
        noise_std=(0.0, 0.1),
        num_chains=(1, 2),
        start_size=(None,),
    )
    seed, batch_size = draws.number("seed", 0, -3, 2**64 - 1), draws.number("batch_size", None, 1, 2)
    result = tasks.denoise(energy, noisy, noise, options, clean=clean, seed=seed, batch_size=batch_size)
    finite_images(result.restored, noisy.shape)
    expect(torch.equal(result.noisy, noisy), "the noisy images are others")
    expect(clean is None or result.quality["restored"].psnr.shape == noisy.shape[:1], "no quality for each image")
    again = tasks.denoise(energy, noisy, noise, options, seed=seed, batch_size=1)
    expect(close(again.restored, result.restored), "the result depends on the batch")


def inpainting(draws: Draws) -> None:
    form = draws.form()
    images, energy = draws.images(form), draws.energy()
    n, c, h, w = form
    wanted = draws.random.choice(((h, w), (1, 1, h, w), (n, 1, h, w), (n, c, h, w), (1, c, h, w)))
    hole = torch.zeros(wanted, dtype=torch.bool)
    hole[..., : h // 2, :] = True
    others: list[Any] = [
        hole.float(), hole.numpy(), None, hole[..., :1, :1], hole[..., :-1], torch.zeros_like(hole),
        ~torch.zeros_like(hole),
        torch.ones(n + 1, c, h, w, dtype=torch.bool), torch.ones(n, h, w, dtype=torch.bool),
        hole.expand(n, c, h, w).repeat(1, 2, 1, 1),
        hole.flatten(), hole[..., :1],
    ]  # fmt: skip
    hole = draws.one_of("hole", hole, others)
    options = draws.options(
        tasks.InpaintOptions,
        num_steps=(1, 2),
        step_size=(0.5, 1.0),
        noise_start=(0.0, 0.1),
        noise_end=(0.0,),
        restarts=(1, 3),
        coarse=(False,),
    )
    seed, batch_size = draws.number("seed", 0, -3, 2**64 - 1), draws.number("batch_size", None, 1, 2)
    result = tasks.inpaint(energy, images, hole, options, seed=seed, batch_size=batch_size)
    finite_images(result.filled, (len(images), options.restarts, *images.shape[1:]))
    expect(torch.equal(result.images, images), "the images are others")
    known = ~hole.expand(images.shape)
    for chain in range(options.restarts):
        expect(torch.equal(result.filled[:, chain][known], images[known]), "a known pixel changed")
    expect((result.energy.diff(dim=1) >= 0).all(), "energies do not ascend")
    expect(all(values.isfinite().all() for values in result.errors().values()), "an error is not finite")
    again = tasks.inpaint(energy, images, hole, options, seed=seed, batch_size=1)
    expect(close(again.energy, result.energy), "the result depends on the batch")


def translation(draws: Draws) -> None:
    form = draws.form()
    source, energy = draws.images(form), draws.energy()
    options = draws.options(
        tasks.TranslateOptions,
        num_steps=(2, 3),
        step_size=(0.5, 1.0),
        noise_std=(0.0, 0.1),
        start_noise=(0.0, 0.1),
        snapshots=(1, 2),
        start_size=(None,),
        data_weight=(0.0, 0.1),
    )
    seed, batch_size = draws.number("seed", 0, -3, 2**64 - 1), draws.number("batch_size", None, 1, 2)
    result = tasks.translate(energy, source, options, seed=seed, batch_size=batch_size)
    finite_images(result.snapshots, (options.snapshots + 1, *source.shape))
    expect(result.energy.shape == result.snapshots.shape[:2], "not an energy for each snapshot")
    again = tasks.translate(energy, source, options, seed=seed, batch_size=1)
    expect(close(again.images, result.images), "the result depends on the batch")


def interpolation(draws: Draws) -> None:
    form = draws.form()
    first, second, energy = draws.images(form, "first"), draws.images(form, "second"), draws.energy()
    options = draws.options(tasks.PathOptions, points=(3, 5), iterations=(0, 2), step_size=(0.1, 0.5))
    path = tasks.interpolate_images(energy, first, second, options, batch_size=draws.number("batch_size", None, 1, 2))
    for images in (path.straight, path.relaxed):
        finite_images(images, (len(first), options.points, *first.shape[1:]))
        expect(torch.equal(images[:, 0], first) and torch.equal(images[:, -1], second), "the ends moved")
    expect((path.energy_relaxed.amax(1) <= path.energy_straight.amax(1)).all(), "a path became higher")


def degradation_for(draws: Draws, form: tuple[int, ...]) -> Any:
    _, channels, height, width = form
    known = torch.rand(height, width, generator=torch.Generator().manual_seed(1)) > 0.4
    known[0, 0] = True
    made: list[Callable[[], Any]] = [
        lambda: restoration.SuperResolution(draws.number("factor", 1, 2)),
        lambda: restoration.Colorization(draws.number("channels", channels)),
        lambda: restoration.Inpainting(draws.one_of("known", known, [known.float(), known[:1], None, ~known | known])),
        lambda: restoration.CompressedSensing(draws.number("share", 0.5), draws.number("block", 2), seed=1),
        lambda: restoration.SeparableBlur(
            restoration.gaussian_kernel(draws.number("std", 0.7)), draws.number("height", height), width
        ),
        lambda: restoration.compose(
            restoration.Colorization(channels), restoration.SuperResolution(2), (channels, height, width)
        ),
    ]
    return draws.random.choice(made)()


def restoring(draws: Draws) -> None:
    n, c, h, w = draws.form()
    form = (n, c, 2 * ((h + 1) // 2), 2 * ((w + 1) // 2))
    degradation = degradation_for(draws, form)
    x, energy = draws.images(form), draws.energy()
    y = degradation.A(x)
    shapes = [
        y[:, :1],
        y.repeat(1, 3, 1, 1),
        y[..., :-1],
        y[:1].squeeze(0),
        y[:0],
        y.repeat(1, 1, 2, 2),
        y[None],
        y.flatten(1),
    ]
    wrong = [*shapes, y.double(), y.half(), (100 * y).to(torch.uint8), None, y.numpy(), y * math.nan, y.to("meta")]
    y = draws.one_of("y", y, wrong)
    options: dict[str, Any] = {"seed": draws.number("seed", 0, 5), "batch_size": draws.number("batch_size", None, 1, 2)}
    options["noise"] = noise = draws.number("noise", 0.0, 0.0, 0.05)
    options["first_chain_id"] = draws.number("first_chain_id", 0, 7)
    if draws.random.random() < 0.3:
        options["refinement"] = draws.options(Refinement, num_steps=(0, 2), step_size=(0.1,), noise_std=(0.0, 0.01))
    if draws.random.random() < 0.3:
        made = draws.one_of("images of the decoder", form[1:], [(1, *form[2:]), (c, 1, 1), (3, *form[2:]), form[2:]])
        torch.manual_seed(draws.random.getrandbits(32))
        net = nn.Sequential(nn.Linear(3, math.prod(made)), nn.Tanh(), nn.Unflatten(1, made))
        energy = draws.one_of("energy", smooth, WRONG_ENERGIES)
        options |= {"decoder": net, "latent": draws.number("latent", 3), "engine": "autograd"}
        kind = {"num_steps": (0, 2), "restarts": (1, 2), "learning_rate": (0.1,), "energy_weight": (1.0,)}
        options["search"] = draws.options(LatentSearch, **kind)
    else:
        kind = {"num_steps": (1, 2), "restarts": (1, 2), "step_size": (0.5,), "noise_std": (0.0, 0.1)}
        options["search"] = draws.options(ImageSearch, **kind, coarse=(None, False))
    result = restoration.restore(y, degradation, energy=energy, **options)
    shape = degradation.pinv(y).shape
    finite_images(result.images, shape, bounded=False)
    finite_images(result.mean, shape, bounded=False)
    expect(len(y) == len(result.energies) == len(result.residual_rms), "not a result for each measurement")
    expect(degradation.A(result.images).shape == y.shape, "images of another measurement")
    scale = max(1.0, float(y.abs().max()), float(result.images.abs().max()))  # huge steps have huge rounding
    if noise == 0:
        misfit = (degradation.A(result.images) - degradation.A(degradation.pinv(y))).abs().max()
        expect(misfit <= 1e-4 * scale, f"the measurement is missed by {float(misfit):g}")
    else:
        expect(
            (result.residual_rms <= float(noise) * 1.01 + 1e-5 * scale).all(),
            "the measurement is missed by more than noise",
        )


def detection(draws: Draws) -> None:
    form = draws.form()
    images, energy = draws.images(form), draws.energy()
    given = draws.random.choice((images, [images, images]))
    options = {"training_mean": draws.number("training_mean", None, 0.5), "engine": "autograd"}
    scores = tasks.outlier_scores(energy, given, batch_size=draws.number("batch_size", 1, 2, 256), **options)
    alone = tasks.outlier_scores(energy, images, batch_size=1, **options)
    for name, values in scores.items():
        expect(values.dtype == np.float32 and np.isfinite(values).all(), f"{name} is not finite float32")
        parts = np.split(values, 1 if given is images else 2)
        expect(
            all(np.allclose(part, alone[name], rtol=1e-4, atol=1e-5) for part in parts), f"{name} depends on the batch"
        )


def metrics(draws: Draws) -> None:
    sets = []
    for name in ("in_scores", "out_scores"):
        good = [draws.random.gauss(0, 1) for _ in range(draws.random.randint(1, 9))]
        wrong = [[], [good], [math.nan], [math.inf, 1.0], "abc", None, 3.0, ["a"]]
        sets.append(draws.one_of(name, good, wrong))
    found = tasks.detection_metrics(*sets)
    expect(all(0 <= value <= 1 for value in vars(found).values()), "a metric outside of [0, 1]")


def comparison(draws: Draws) -> None:
    form = draws.form(least=4)
    images, truth = draws.images(form), draws.images(form, "truth")
    found = tasks.quality(images, truth)
    expect(found.psnr.shape == found.ssim.shape == truth.shape[:1], "not a number for each image")
    expect(found.ssim.isfinite().all() and not found.psnr.isnan().any(), "not a number")
    expect(tasks.psnr(truth, truth).isinf().all(), "equal images have a finite PSNR")


def neighbours(draws: Draws) -> None:
    form = draws.form()
    images, reference = draws.images(form), draws.images((5, *form[1:]), "reference")
    count, batch_size = draws.number("count", 1, 3), draws.number("batch_size", 2, 4096)
    near = tasks.nearest_images(images, reference, count, batch_size=batch_size)
    expect(near.images.shape == (len(images), count, *images.shape[1:]), "not so many images")
    distances = (images[:, None] - reference[None]).flatten(2).norm(dim=2).sort(1).values[:, :count]
    expect(close(near.distances, distances), "other distances")


def made_images(draws: Draws) -> None:
    form = draws.form()
    images, seed, first = draws.images(form), draws.number("seed", 0, 7), draws.number("first", 0, 3)
    noise = draws.number("noise", 0.1, 0.4)
    noisy = tasks.add_noise(images, noise, seed, first)
    finite_images(noisy, images.shape, bounded=False)
    expect(torch.equal(noisy[-1:], tasks.add_noise(images[-1:], noise, seed, first + len(images) - 1)), "other noise")
    expect((tasks.total_variation(images) >= 0).all(), "a negative variation")
    count, size, channels = draws.number("count", 1, 4), draws.number("size", 4, 5), draws.number("channels", 1, 3)
    for make in (tasks.uniform_noise, tasks.constant_colours):
        expect(make(count, channels, size, seed=seed).pixels.shape == (count, channels, size, size), "another shape")
    pattern = draws.one_of("pattern", draws.random.choice(("square", "half", "pixels")), ["round", None, 3])
    expect(tasks.hole_mask(pattern, count, size, seed).shape == (count, 1, size, size), "another shape")


TASKS = (
    denoising, inpainting, translation, interpolation, restoring, restoring, detection, metrics, comparison, neighbours,
    made_images,
)  # fmt: skip


def verdict(number: int) -> str | None:
    """What is wrong in one try, or None."""
    draws = Draws(number)
    task = TASKS[number % len(TASKS)]
    name = f"try {number}, {task.__name__}"
    wrong = None
    try:
        task(draws)
    except AssertionError as error:
        wrong = f"{error}"
    except (ValueError, TypeError, FloatingPointError, RunError) as error:
        if not draws.careless:
            wrong = f"good arguments are refused: {error!r}"
        elif "\n" in str(error) or not str(error):
            wrong = f"not one line: {str(error)[:200]!r}"
    except Exception as error:
        # What a function that was given as an energy does wrong, the engine says.
        if "energy" not in draws.careless or not str(error).startswith("the energies that"):
            wrong = f"{error!r}"[:300]
    if wrong is None and not all(torch.equal(x, copy) or x.isnan().any() for x, copy in draws.given):
        wrong = "images that were given have changed"
    return None if wrong is None else f"{name}, careless {draws.careless}: {wrong}"


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For every test here."""


@pytest.mark.filterwarnings("ignore")
def test_careless_arguments_are_refused_or_served(tries: int) -> None:
    found = [wrong for number in range(tries) if (wrong := verdict(number)) is not None]
    assert not found, "\n".join([f"{len(found)} of {tries} tries:", *found])
