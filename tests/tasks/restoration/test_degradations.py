"""Degradations: that a pseudo-inverse is one, by the four equations of Penrose on random images."""

import doctest
import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastebm.tasks.restoration import (
    Colorization,
    Composition,
    CompressedSensing,
    Degradation,
    Dense,
    Inpainting,
    SeparableBlur,
    SuperResolution,
    box_mask,
    compose,
    gaussian_kernel,
    random_mask,
)

SHAPE = (3, 16, 16)
GENTLE = 1e-12


def images(shape: tuple[int, ...] = SHAPE, count: int = 2, *, seed: int = 0) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def dots(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).flatten(1).sum(1)


def assert_is_pseudo_inverse(operator: Degradation, shape: tuple[int, ...] = SHAPE, *, seed: int = 0) -> None:
    x, other = images(shape, seed=seed), images(shape, seed=seed + 1)
    y = operator.A(x)
    seen, other_seen = operator.pinv(y), operator.pinv(operator.A(other))
    assert (operator.A(seen) - y).abs().max() < GENTLE
    assert (operator.pinv(operator.A(seen)) - seen).abs().max() < GENTLE * 50
    assert (dots(seen, other) - dots(x, other_seen)).abs().max() < 1e-10
    anything, more = images(tuple(y.shape[1:]), seed=seed + 2), images(tuple(y.shape[1:]), seed=seed + 3)
    near, more_near = operator.A(operator.pinv(anything)), operator.A(operator.pinv(more))
    assert (dots(near, more) - dots(anything, more_near)).abs().max() < 1e-10
    again = operator.pinv(near)
    assert (again - operator.pinv(anything)).abs().max() <= GENTLE * 50 * max(1.0, float(again.abs().max()))
    assert (operator.null(x) - (x - seen)).abs().max() < GENTLE * 50
    assert operator.A(operator.null(x)).abs().max() < GENTLE


def matrix_of(operator: Degradation, shape: tuple[int, ...]) -> Tensor:
    unit = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).unflatten(1, shape)
    return operator.A(unit).flatten(1).mT


def single_operators() -> st.SearchStrategy[Degradation]:
    seeds = st.integers(0, 10**6)
    return st.one_of(
        st.sampled_from([1, 2, 4, 8]).map(SuperResolution),
        st.just(Colorization()),
        st.builds(lambda share, seed: Inpainting(random_mask(16, 16, share, seed=seed)), st.floats(0.01, 1.0), seeds),
        st.builds(
            lambda share, block, seed: CompressedSensing(share, block, seed=seed),
            st.floats(0.01, 1.0),
            st.sampled_from([1, 2, 4, 8, 16]),
            seeds,
        ),
        st.builds(
            lambda std, threshold: SeparableBlur(gaussian_kernel(std), 16, 16, threshold=threshold),
            st.floats(0.3, 6.0),
            st.floats(0.005, 0.5),
        ),
    )


@settings(max_examples=60, deadline=None)
@given(operator=single_operators(), seed=st.integers(0, 10**6))
def test_each_pseudo_inverse_is_one(operator: Degradation, seed: int) -> None:
    assert_is_pseudo_inverse(operator, seed=seed)


@settings(max_examples=30, deadline=None)
@given(
    first=st.sampled_from([SuperResolution(2), Colorization(), CompressedSensing(0.5, 2, seed=3)]),
    name=st.sampled_from(["small", "gray", "holes", "sensed", "blurred"]),
    seed=st.integers(0, 10**6),
)
def test_whatever_follows_orthogonal_rows_has_the_product_as_its_pseudo_inverse(
    first: Degradation, name: str, seed: int
) -> None:
    channels, height, width = first.A(images()).shape[1:]
    second = {
        "small": SuperResolution(2),
        "gray": Colorization(channels),
        "holes": Inpainting(random_mask(height, width, 0.4, seed=seed)),
        "sensed": CompressedSensing(0.25, 4, seed=seed),
        "blurred": SeparableBlur(gaussian_kernel(1.0), height, width),
    }[name]
    operator = compose(first, second, SHAPE)
    assert isinstance(operator, Composition)
    assert_is_pseudo_inverse(operator, seed=seed)


def test_a_mask_of_whole_blocks_composes_and_another_is_solved_densely() -> None:
    shape = (1, 8, 8)
    blocks = random_mask(4, 4, 0.5, seed=1).repeat_interleave(2, 0).repeat_interleave(2, 1)
    aligned = compose(Inpainting(blocks), SuperResolution(2), shape)
    assert isinstance(aligned, Composition)
    assert_is_pseudo_inverse(aligned, shape)

    ragged = compose(Inpainting(random_mask(8, 8, 0.5, seed=1)), SuperResolution(2), shape)
    assert isinstance(ragged, Dense)
    assert_is_pseudo_inverse(ragged, shape)


def test_the_product_is_no_pseudo_inverse_where_it_is_refused() -> None:
    ragged = Composition(Inpainting(random_mask(8, 8, 0.5, seed=1)), SuperResolution(2))
    blurred = Composition(SeparableBlur(gaussian_kernel(1.0), 8, 8), SuperResolution(2))
    for operator in (ragged, blurred):
        with pytest.raises(AssertionError):
            assert_is_pseudo_inverse(operator, (1, 8, 8))


@pytest.mark.parametrize("threshold", [1e-3, 0.2])
def test_a_dense_pseudo_inverse_is_that_of_numpy(threshold: float) -> None:
    matrix = images((6, 12), 1)[0]
    operator = Dense(matrix, (1, 3, 4), (6,), threshold=threshold)
    rough = torch.linalg.pinv(matrix, rtol=threshold)
    y = images((6,))
    torch.testing.assert_close(operator.pinv(y).flatten(1), y @ rough.mT)
    assert_is_pseudo_inverse(operator, (1, 3, 4))


def test_blurred_then_small_is_dense_and_too_large_images_are_refused() -> None:
    blur = SeparableBlur(gaussian_kernel(1.0), 8, 8)
    operator = compose(blur, SuperResolution(2), (1, 8, 8))
    assert isinstance(operator, Dense)
    assert_is_pseudo_inverse(operator, (1, 8, 8))
    with pytest.raises(ValueError, match="too large to find it by singular values"):
        compose(blur, SuperResolution(2), (1, 8, 8), most=63)


@pytest.mark.parametrize(
    "operator",
    [
        SuperResolution(2),
        Colorization(),
        Inpainting(box_mask(8, 8)),
        Inpainting(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.3),
        CompressedSensing(0.25, 4, seed=1),
        SeparableBlur(gaussian_kernel(1.0), 8, 8),
        compose(Colorization(), SuperResolution(2), (3, 8, 8)),
        compose(Inpainting(box_mask(8, 8)), SuperResolution(2), (3, 8, 8)),
        compose(Inpainting(random_mask(8, 8, 0.5, seed=0)), Colorization(), (3, 8, 8)),
        compose(Inpainting(random_mask(8, 8, 0.5, seed=0)), SuperResolution(4), (3, 8, 8)),
    ],
    ids=lambda operator: str(operator).split("\n")[0],
)
def test_rank_and_orthogonality_are_those_of_the_matrix(operator: Degradation) -> None:
    matrix = matrix_of(operator, (3, 8, 8))
    assert operator.rank((3, 8, 8)) == int(torch.linalg.matrix_rank(matrix))
    square = matrix @ matrix.mT
    orthogonal = bool((square - square[0, 0] * torch.eye(len(square), dtype=torch.float64)).abs().max() < 1e-12)
    assert orthogonal == operator.orthogonal_rows
    measured = operator.A(images((3, 8, 8))).shape[1:]
    seen = operator.pinv(matrix.mT.unflatten(1, measured)).flatten(1)
    torch.testing.assert_close(seen, (torch.linalg.pinv(matrix) @ matrix).mT, atol=1e-10, rtol=0)


def test_blur_is_the_plain_one_but_for_what_the_threshold_drops() -> None:
    x = images()
    kernel, threshold = gaussian_kernel(0.8, 3), 0.01
    plain = F.pad(x.flatten(0, 1)[:, None], (3, 3, 3, 3), mode="replicate")
    # Replicated edges are not a mirror's: compare where the kernel stays inside.
    plain = F.conv2d(plain, torch.outer(kernel, kernel)[None, None]).reshape(x.shape)
    exact = SeparableBlur(kernel, 16, 16, threshold=1e-9).A(x)
    torch.testing.assert_close(exact[..., 3:-3, 3:-3], plain[..., 3:-3, 3:-3])
    dropped = SeparableBlur(kernel, 16, 16, threshold=threshold).A(x) - exact
    assert 0 < dropped.flatten(1).norm(dim=1).max() <= threshold * x.flatten(1).norm(dim=1).max()
    torch.testing.assert_close(SeparableBlur(kernel, 16, 16).A(torch.ones(1, 1, 16, 16)), torch.ones(1, 1, 16, 16))


def test_sensing_is_a_function_of_its_seed_and_keeps_the_mean() -> None:
    x = images()
    y = CompressedSensing(seed=5).A(x)
    assert y.shape == (2, 3 * 16, 2, 2)
    assert torch.equal(y, CompressedSensing(seed=5).A(x))
    assert not torch.equal(y, CompressedSensing(seed=6).A(x))
    back = CompressedSensing(seed=5).pinv(y)
    torch.testing.assert_close(F.avg_pool2d(back, 8), F.avg_pool2d(x, 8))


def test_holes_of_a_measurement_are_not_read() -> None:
    mask = box_mask(16, 16)
    x = torch.where(mask, images(), torch.nan)
    assert Inpainting(mask).pinv(x).isfinite().all()
    assert torch.equal(Inpainting(mask).pinv(x)[..., mask], x[..., mask])


@pytest.mark.parametrize(
    "operator",
    [
        SuperResolution(4),
        SuperResolution(1),
        Colorization(),
        Inpainting(box_mask(16, 16)),
        Inpainting(random_mask(16, 16, 0.8, seed=2)),
        compose(Colorization(), SuperResolution(4), SHAPE),
        compose(SuperResolution(4), Colorization(), SHAPE),
        compose(SuperResolution(2), SeparableBlur(gaussian_kernel(1.0), 8, 8), SHAPE),
    ],
    ids=lambda operator: str(operator).split("\n")[0],
)
def test_what_is_known_of_the_half_size_is_true(operator: Degradation) -> None:
    x = images()
    half = operator.coarsen(operator.A(x))
    assert half is not None
    torch.testing.assert_close(half.degradation.A(F.avg_pool2d(x, 2)), half.y)
    assert_is_pseudo_inverse(half.degradation, (3, 8, 8))
    noise = torch.randn(400, *operator.A(x).shape[1:], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    of_noise = operator.coarsen(noise)
    assert of_noise is not None
    seen = of_noise.degradation.A(of_noise.degradation.pinv(of_noise.y))
    variance = float(dots(seen, seen).mean()) / of_noise.degradation.rank((3, 8, 8))
    assert variance**0.5 == pytest.approx(half.noise_scale, rel=0.03)


def test_nothing_is_known_of_the_half_size_where_nothing_is() -> None:
    x = images()
    scattered = torch.zeros(16, 16, dtype=torch.bool)
    scattered[::2] = True
    blur = SeparableBlur(gaussian_kernel(1.0), 16, 16)
    for operator in (SuperResolution(1), Inpainting(scattered), CompressedSensing(), blur, Composition(blur, blur)):
        odd = operator.A(x)[..., :15, :15] if isinstance(operator, SuperResolution) else operator.A(x)
        assert operator.coarsen(odd) is None


def test_constants_follow_the_dtype_of_images_and_the_module() -> None:
    for operator in (CompressedSensing(), SeparableBlur(gaussian_kernel(1.0), 16, 16), Inpainting(box_mask(16, 16))):
        y = operator.A(images().float())
        assert operator.pinv(y).dtype == operator.null(images().float()).dtype == torch.float32
        assert (operator.A(operator.pinv(y)) - y).abs().max() < 1e-5
        assert not operator.state_dict()


def test_impossible_operators_and_images_are_refused() -> None:
    for build, message in (
        (lambda: SuperResolution(0), "at least 1, got 0"),
        (lambda: SuperResolution(3).A(images()), "multiples of it, got 16x16"),
        (lambda: Colorization(0), "at least 1, got 0"),
        (lambda: Colorization(1).A(images()), "1 channels, got 3"),
        (lambda: Inpainting(torch.zeros(4, 4, dtype=torch.bool)), "know a pixel"),
        (lambda: Inpainting(box_mask(8, 8)).A(images()), "does not fit"),
        (lambda: CompressedSensing(0.0), "got 0.0"),
        (lambda: CompressedSensing(block=3), "power of two, got 3"),
        (lambda: CompressedSensing(block=32).A(images()), "32 divides, got 16x16"),
        (lambda: SeparableBlur(torch.ones(2), 8, 8), "odd number"),
        (lambda: SeparableBlur(torch.ones(3), 8, 8, threshold=0.0), "threshold"),
        (lambda: SeparableBlur(torch.ones(3), 8, 8).A(images()), "of 8x8, got 16x16"),
        (lambda: gaussian_kernel(0.0), "positive, got 0.0"),
        (lambda: random_mask(4, 4, 1.5, seed=0), "got 1.5"),
        (lambda: Dense(torch.eye(4), (1, 2, 2), (4,)).A(images()), "images \\(1, 2, 2\\)"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    with pytest.raises(TypeError, match="must be a bool tensor"):
        Inpainting(torch.ones(4, 4))


@pytest.mark.parametrize(("module", "count"), [("degradations", 4), ("composition", 6)])
def test_docstring_examples(module: str, count: int) -> None:
    assert doctest.testmod(importlib.import_module(f"fastebm.tasks.restoration.{module}")) == (0, count)
