"""Normal noise: known answers, agreement of backends, independence of how it is split, and its distribution."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import mpmath
import numpy as np
import pytest
import torch
from scipy import special, stats

import fastebm
from fastebm import rng
from fastebm.ops import backends
from fastebm.ops.normal import normals_from_words, philox
from tests.ops import philox_by_hand
from tests.ops.agreement import assert_agrees, assert_cast, compiled_or_reference, refuses, ulps

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
_C = backends._extension
needs_extension = pytest.mark.skipif(_C is None, reason="fastebm's C++ operators are not built")
once = pytest.mark.skipif(
    INTERPRETED, reason="the interpreter's noise is compared element by element; its statistics are the same"
)

SHAPES = [
    (1,),
    (2,),
    (3,),
    (5, 1),
    (2, 63),
    (2, 64),
    (2, 65),
    (1, 1023),
    (1, 1024),
    (3, 1025),
    (0,),
    (0, 3),
    (4, 0),
    (130, 1, 4, 4),
]


# Known answers ------------------------------------------------------------------------------------------------------


def test_the_oracle_itself():
    for counter, key, output in philox_by_hand.KNOWN_ANSWERS:
        assert philox_by_hand.philox(counter, key) == output


def test_random123_reference():
    counters, keys, outputs = (torch.tensor(part) for part in zip(*philox_by_hand.KNOWN_ANSWERS, strict=True))
    assert torch.equal(philox(counters.unbind(1), keys.unbind(1)), outputs)


@needs_extension
def test_random123_cpp(variant):
    # The self-test draws the known answers and compares normals with the scalar code, on the active instruction set.
    assert _C.self_test() == ""


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="Triton needs a GPU, or its interpreter")
def test_random123_triton():
    triton_philox = pytest.importorskip("tests.ops.triton_philox", reason="Triton is not installed")
    device = "cpu" if INTERPRETED else "cuda"
    words = torch.tensor([[*counter, *key] for counter, key, _ in philox_by_hand.KNOWN_ANSWERS], device=device)
    outputs = torch.tensor([output for _, _, output in philox_by_hand.KNOWN_ANSWERS])
    assert torch.equal(triton_philox.words(words).cpu(), outputs)


def test_torch_stateless_philox():
    random = pytest.importorskip("torch.func._random", reason="this torch has no stateless Philox")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seed = 0x0123456789ABCDEF
    try:
        theirs = random.uniform(random.key(seed, device=device), (1, 4096))
    except NotImplementedError:
        pytest.skip(f"this torch has no stateless Philox on {device}")
    # The same integers; their map to [0, 1) differs from ours in the last bits.
    torch.testing.assert_close(theirs, fastebm.ops.uniform((1, 4096), seed=seed, device=device), rtol=0, atol=2.0**-22)


# Agreement ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backends_agree(backend_device, shape):
    _, device = backend_device
    arguments = {"seed": -12345, "step": 2**31 + 1, "stream": 3, "chain_ids": 2**32 - 1}
    drawn = fastebm.ops.normal(shape, device=device, **arguments)
    with fastebm.ops.backend(compiled_or_reference()):
        expected = fastebm.ops.normal(shape, **arguments)
    assert drawn.is_contiguous()
    assert_agrees(drawn, expected, backend_device)


def test_backends_agree_on_many(backend_device):
    _, device = backend_device
    drawn = fastebm.ops.normal((16, 1 << 14), seed=99, device=device)
    with fastebm.ops.backend(compiled_or_reference()):
        expected = fastebm.ops.normal((16, 1 << 14), seed=99)
    assert_agrees(drawn, expected, backend_device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_cast_from_float32(backend_device, dtype):
    name, device = backend_device
    if dtype == torch.float64 and name in ("triton", "cuda"):
        with pytest.raises(RuntimeError, match="float64"):
            fastebm.ops.normal((2, 3), seed=0, device=device, dtype=dtype)
        return
    for shape in ((3, 37), (2, 64)):
        drawn = fastebm.ops.normal(shape, seed=4, device=device, dtype=dtype)
        assert_cast(drawn, fastebm.ops.normal(shape, seed=4, device=device).to(dtype), backend_device)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each C++ instruction set in turn, the one before restored."""
    before = _C.active_variant()
    try:
        _C.set_variant(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    _C.set_variant(before)


@needs_extension
@pytest.mark.parametrize("draw", [fastebm.ops.normal, fastebm.ops.uniform])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_cpp_variants_are_bit_equal(variant, dtype, draw):
    with fastebm.ops.backend("cpp"):
        for shape in ((3, 4099), (2, 3), (1, 16), (5, 1024)):
            drawn = draw(shape, seed=8, step=2, chain_ids=2**33, dtype=dtype)
            _C.set_variant("baseline")
            expected = draw(shape, seed=8, step=2, chain_ids=2**33, dtype=dtype)
            _C.set_variant(variant)
            assert torch.equal(drawn, expected)


# Where noise falls --------------------------------------------------------------------------------------------------


def test_batch_can_be_split_anyhow(backend_device):
    _, device = backend_device
    whole = fastebm.ops.normal((7, 3, 5, 5), seed=1, step=4, chain_ids=2**32 - 3, device=device)
    parts = [
        fastebm.ops.normal((b - a, 3, 5, 5), seed=1, step=4, chain_ids=2**32 - 3 + a, device=device)
        for a, b in ((0, 1), (1, 4), (4, 7))
    ]
    assert torch.equal(torch.cat(parts), whole)
    listed = fastebm.ops.normal(
        (3, 3, 5, 5), seed=1, step=4, chain_ids=torch.tensor([2**32 + 1, 2**32 - 3, 2**32], device=device)
    )
    assert torch.equal(listed, whole[[4, 0, 3]])


def test_shape_of_a_chain_does_not_matter(backend_device):
    _, device = backend_device
    flat = fastebm.ops.normal((3, 90), seed=6, device=device)
    assert torch.equal(fastebm.ops.normal((3, 2, 5, 9), seed=6, device=device).flatten(1), flat)
    longer = fastebm.ops.normal((3, 91), seed=6, device=device)
    assert torch.equal(longer[:, :90], flat)


def test_every_coordinate_matters(backend_device):
    _, device = backend_device
    at = {"seed": 5, "step": 6, "stream": 7, "chain_ids": 8}
    changes = [
        {},
        {"seed": 5 + 2**32},
        {"seed": 4},
        {"step": 5},
        {"stream": 6},
        {"chain_ids": 9},
        {"chain_ids": 8 + 2**32},
    ]
    draws = [fastebm.ops.normal((1, 4), device=device, **{**at, **change}) for change in changes]
    assert len({tuple(d.flatten().tolist()) for d in draws}) == len(changes)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_does_not_matter(backend_device, threads):
    _, device = backend_device
    shape = (5, 20011)
    expected = fastebm.ops.normal(shape, seed=2, device=device)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(fastebm.ops.normal(shape, seed=2, device=device), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [16, 128, 1024])
def test_block_size_does_not_matter(backend_device, rows, monkeypatch):
    name, device = backend_device
    if name != "triton":
        pytest.skip("only Triton's programs have a size to choose")
    shapes = [(3, 4, 4), (2, 100), (2, 101), (1, 2000)]
    expected = [fastebm.ops.normal(shape, seed=2, device=device) for shape in shapes]
    monkeypatch.setattr("fastebm.ops.triton.philox.ROWS", rows)
    for shape, whole in zip(shapes, expected, strict=True):
        assert torch.equal(fastebm.ops.normal(shape, seed=2, device=device), whole)


def test_manual_seed_governs_drawn_seeds():
    torch.manual_seed(3)
    first = [rng.draw_seed() for _ in range(3)]
    torch.manual_seed(3)
    assert [rng.draw_seed() for _ in range(3)] == first
    assert len(set(first)) == 3
    assert all(0 <= seed < 2**63 for seed in first)


# Overflow and other errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 2**32}, "step must be in"),
        ({"step": -1}, "step must be in"),
        ({"chain_ids": 2**56}, "chain ids must be in"),
        ({"chain_ids": 2**56 - 1}, "chain ids must be in"),  # the second chain of the batch overflows
        ({"chain_ids": -1}, "chain ids must be in"),
        ({"chain_ids": torch.tensor([0, 2**56])}, "chain ids must be in"),
        ({"chain_ids": torch.tensor([-1, 0])}, "chain ids must be in"),
        ({"chain_ids": torch.tensor([1, 2, 3])}, "shape \\(2,\\)"),
        ({"seed": 2**64}, "seed must be in"),
        ({"seed": -(2**63) - 1}, "seed must be in"),
        ({"stream": 256}, "stream must be in"),
        ({"stream": -1}, "stream must be in"),
        ({"dtype": torch.int32}, "float32, float64, bfloat16 or float16"),
    ],
)
def test_out_of_range_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        fastebm.ops.normal((2, 4), **{"seed": 0, **change})


@pytest.mark.parametrize("shape", [(), (-1, 2), (2, -3), (1, 2**34 + 1)])
def test_bad_shapes_are_errors(shape):
    with pytest.raises(ValueError, match="shape"):
        fastebm.ops.normal(shape, seed=0)


@pytest.mark.parametrize("chain_ids", [1.0, True, torch.tensor([1.0, 2.0]), torch.tensor([1, 2], dtype=torch.int32)])
def test_chains_of_another_type_are_errors(chain_ids):
    with pytest.raises(TypeError, match="chain_ids must be"):
        fastebm.ops.normal((2, 4), seed=0, chain_ids=chain_ids)


@pytest.mark.parametrize(
    ("key", "chain_ids"),
    [
        ((0, 2**32, 0), (0,)),
        ((0, -1, 0), (0,)),
        ((0, 0, 0), (2**56 - 1,)),
        ((0, 0, 0), (-1, 0)),
        ((0, 0, 0), (0, 2**56)),
    ],
)
def test_overflow_of_the_operator(backend_device, key, chain_ids):
    """On the CPU an error; a GPU is not read, so the chain's noise is NaN there."""
    _, device = backend_device
    key, chain_ids = torch.tensor(key, device=device), torch.tensor(chain_ids, device=device)
    if refuses(backend_device):
        with pytest.raises(RuntimeError, match="overflow"):
            torch.ops.fastebm.normal((2, 5), key, chain_ids, 0, torch.float32)
    else:
        drawn = torch.ops.fastebm.normal((2, 5), key, chain_ids, 0, torch.float32)
        assert bool(drawn.isnan().all(dim=1).any())


@pytest.mark.slow
@pytest.mark.parametrize("elements", [1, 516])
def test_more_chains_than_a_dimension_of_a_grid_holds(backend_device, elements):
    """CUDA's blocks lie in three dimensions, of which only the first holds more than 65,535."""
    _, device = backend_device
    chains = 65_535 * (128 if elements == 1 else 1) + 3
    drawn = fastebm.ops.normal((chains, elements), seed=5, step=1, device=device)
    for first in (0, chains // 2, chains - 2):
        alone = fastebm.ops.normal((2, elements), seed=5, step=1, chain_ids=first, device=device)
        assert torch.equal(drawn[first : first + 2], alone)


def test_overflow_is_nan_in_a_kernel(backend_device, monkeypatch):
    name, device = backend_device
    if (name, device) != ("triton", "cpu"):
        pytest.skip("shown on the interpreter, whose check before the kernel is taken away here")
    monkeypatch.setattr("fastebm.ops.triton.normal.check_readable_address", lambda *_: None)
    key, chain_ids = torch.tensor([0, 0, 0]), torch.tensor([2**56, 5, -1])
    drawn = torch.ops.fastebm.normal((3, 5), key, chain_ids, 0, torch.float32)
    assert drawn.isnan().all(dim=1).tolist() == [True, False, True]
    late = torch.ops.fastebm.normal((3, 5), torch.tensor([0, 2**32, 0]), torch.tensor([5]), 0, torch.float32)
    assert bool(late.isnan().all())


@pytest.mark.parametrize(
    ("key", "chain_ids"),
    [
        (torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)),
        (torch.zeros(3), torch.zeros(1, dtype=torch.int64)),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(1)),
    ],
)
def test_operator_refuses_tensors_of_another_form(key, chain_ids):
    with pytest.raises(ValueError, match="must be an int64 tensor"):
        torch.ops.fastebm.normal((3, 5), key, chain_ids, 0, torch.float32)


# Dispatcher and compiler --------------------------------------------------------------------------------------------


def test_opcheck(backend_device):
    _, device = backend_device
    key = rng.make_key(1, 2, device=device)
    for chain_ids in (rng.make_chain_ids(5, 3, device), torch.tensor([4, 2, 9], device=device)):
        torch.library.opcheck(torch.ops.fastebm.normal.default, ((3, 2, 5), key, chain_ids, 3, torch.float32))


def test_compiles_as_one_graph(backend_device):
    _, device = backend_device
    key, chain_ids = rng.make_key(1, 2, device=device), rng.make_chain_ids(5, 3, device)

    def draw(x: torch.Tensor) -> torch.Tensor:
        return x + torch.ops.fastebm.normal(x.shape, key, chain_ids, 0, x.dtype)

    x = torch.zeros(3, 7, device=device)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(draw, fullgraph=True, backend="aot_eager")(x), draw(x))


# The map from bits --------------------------------------------------------------------------------------------------


def box_muller(radius_words: np.ndarray, angle_words: np.ndarray) -> np.ndarray:
    """(n, 2) normals by mpmath, from the float32 uniforms of the words."""
    with mpmath.workprec(70):
        rows = []
        for radius_word, angle_word in zip(radius_words.tolist(), angle_words.tolist(), strict=True):
            radius = mpmath.sqrt(-2 * mpmath.log(mpmath.mpf(philox_by_hand.uniform(radius_word))))
            half_turns = 2 * mpmath.mpf(philox_by_hand.uniform(angle_word))
            rows.append((float(radius * mpmath.cospi(half_turns)), float(radius * mpmath.sinpi(half_turns))))
    return np.array(rows)


def _draw_words(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(radius words, angle words) by name of a case."""
    random = np.random.default_rng(7)
    if name == "smallest radius words":
        return np.arange(1 << 16), random.integers(0, 2**32, 1 << 16)
    if name == "random words":
        return random.integers(0, 2**32, 1 << 14), random.integers(0, 2**32, 1 << 14)
    # Where the logarithm vanishes and where cosine or sine does.
    ends = 2**32 - 1 - random.integers(0, 2**14, 1 << 12)
    quarters = random.integers(0, 4, 1 << 12) * 2**30 + random.integers(-512, 512, 1 << 12)
    return ends, quarters % 2**32


@once
@pytest.mark.parametrize("case", ["smallest radius words", "random words", "largest radius words at quarter turns"])
def test_map_against_mpmath(case):
    """Measured: at most 2.9, 3.4 and 2.2 ulp."""
    radius, angle = _draw_words(case)
    expected = torch.from_numpy(box_muller(radius, angle))
    drawn = normals_from_words(torch.from_numpy(np.stack([radius, angle, radius, angle], axis=-1)))
    assert torch.equal(drawn[:, :2], drawn[:, 2:])
    assert ulps(drawn[:, :2], expected) < 3.5
    if _C is not None:
        compiled = torch.tensor(
            [_C.normal_from_bits(r, a) for r, a in zip(radius.tolist(), angle.tolist(), strict=True)]
        )
        assert ulps(drawn[:, :2], compiled) <= 4
        assert ulps(compiled, expected) < 3.5


def test_largest_normal():
    words = torch.tensor([[0, angle, 0, 2**30] for angle in (0, 2**31, 2**32 - 1)])
    drawn = normals_from_words(words)
    assert float(drawn.abs().max()) == pytest.approx(math.sqrt(66 * math.log(2)), abs=1e-6)  # u = 2^-33: 6.7638
    assert bool(drawn.isfinite().all())


# Distribution -------------------------------------------------------------------------------------------------------

QUICK = pytest.param(10**7, id="1e7")
LONG = pytest.param(2 * 10**8, marks=pytest.mark.slow, id="2e8")


def chunks(count: int, size: int = 10**7, **address: int) -> Iterator[torch.Tensor]:
    """`count` normals, in pieces of one step each that fit in memory."""
    for step in range(count // size):
        yield fastebm.ops.normal((100, size // 100), seed=20240229, **{"step": step, **address})


@once
@pytest.mark.parametrize("count", [QUICK, LONG])
def test_moments_and_tails(count):
    sums = np.zeros(6)
    beyond = dict.fromkeys((3, 4, 5), 0)
    largest = 0.0
    for x in chunks(count):
        power, size = x.double(), x.abs()
        for k in range(6):
            sums[k] += float(power.sum())
            power *= x
        for sigmas in beyond:
            beyond[sigmas] += int((size > sigmas).sum())
        largest = max(largest, float(size.max()))
    moments = sums / count
    # E x^k is 0, 1, 0, 3, 0, 15; the variance of x^k is E x^2k - (E x^k)^2.
    for k, (mean, variance) in enumerate(((0, 1), (1, 2), (0, 15), (3, 96), (0, 945), (15, 10170)), start=1):
        assert abs(moments[k - 1] - mean) < 4 * math.sqrt(variance / count), f"moment {k}"
    for sigmas, found in beyond.items():
        expected = 2 * stats.norm.sf(sigmas) * count
        assert abs(found - expected) < 4 * math.sqrt(expected) + 1, (
            f"{found} beyond {sigmas} sigma, {expected:.1f} expected"
        )
    assert 5 < largest < 6.7639


@once
@pytest.mark.parametrize("count", [QUICK, LONG])
def test_kolmogorov_smirnov(count):
    """The distribution function at 2^16 points; P(D sqrt(n) > 1.95) is 0.001."""
    edges = torch.from_numpy(special.ndtri(np.arange(1, 1 << 16) / (1 << 16))).float()
    below = torch.zeros(1 << 16, dtype=torch.int64)
    for x in chunks(count):
        below += torch.bincount(torch.bucketize(x.flatten(), edges, right=True), minlength=1 << 16)
    distance = (
        (below.cumsum(0)[:-1].double() / count - torch.from_numpy(special.ndtr(edges.double().numpy()))).abs().max()
    )
    assert float(distance) * math.sqrt(count) < 1.95
    # The same counts by cells of equal probability.
    cells = below.reshape(256, -1).sum(1).double()
    statistic = float(((cells - count / 256) ** 2 / (count / 256)).sum())
    assert 1e-4 < stats.chi2.sf(statistic, 255) < 1 - 1e-4


def _correlations(x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """Standard scores of the correlation of x and y, and of their squares, where a shared radius would show."""
    root = math.sqrt(x.numel())
    return [
        float((x * y).sum(dtype=torch.float64)) / root,
        float(((x * x - 1) * (y * y - 1)).sum(dtype=torch.float64)) / (2 * root),
    ]


@once
@pytest.mark.parametrize("count", [QUICK, LONG])
def test_no_correlation_anywhere(count):
    scores: dict[str, np.ndarray] = {}

    def add(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        scores[name] = scores.get(name, np.zeros(2)) + np.array(_correlations(x, y))

    pieces = 0
    for step, x in enumerate(chunks(count)):
        for lag in (1, 2, 3, 4, 5, 8, 64, 1024):
            add(f"lag {lag} within a chain", x[:, :-lag], x[:, lag:])
        add("pairs of one draw", x[:, 0::2], x[:, 1::2])
        add("neighbouring chains", x[:-1], x[1:])
        address = {"seed": 20240229, "step": step}
        for name, change in {
            "next step": {"step": step + 1},
            "step far away": {"step": step + 2**31},
            "next stream": {"stream": 1},
            "chain 2^32 away": {"chain_ids": 2**32},
            "next seed": {"seed": 20240230},
            "seed 2^32 away": {"seed": 20240229 + 2**32},
        }.items():
            add(name, x, fastebm.ops.normal(x.shape, **{**address, **change}))
        pieces += 1
    for name, score in scores.items():
        assert np.abs(score / math.sqrt(pieces)).max() < 4.3, f"{name}: {score / math.sqrt(pieces)}"
