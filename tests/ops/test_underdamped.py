"""Kicks, drifts and O steps against the formulas in float64, closed forms, and the compiled backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastebm
from fastebm import ops, rng
from fastebm.ops import backends
from tests.ops.agreement import assert_agrees, compiled_or_reference, exact, ulps
from tests.ops.precision import supported

_C = backends._extension
SEED, STEP, CHAIN = -7, 2**31 + 5, 2**32 - 2
SHAPES = [(1,), (3, 2), (2, 63), (2, 1025), (37, 1, 4, 4), (4, 3, 7, 5), (2, 3, 32, 32)]
SCHEMES = ("baoab", "obabo", "leapfrog")
HALVES = {"open": (False, True), "close": (True, False), "close and open": (True, True)}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash((shape, seed)) % 2**31))


def size(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])


def _rows(batch: int) -> Tensor:
    """Two rows of a table for each chain; every third chain has no friction and no noise."""
    h = randn(2, batch, seed=1).abs() / 4 + 0.05
    c = torch.sigmoid(randn(2, batch, seed=2))
    sigma = (1 - c * c).sqrt() * 0.8
    c[:, ::3], sigma[:, ::3] = 1.0, 0.0
    return torch.stack([h, c, sigma], dim=-1)


def _mass_with_zeros(rows: int, columns: int) -> Tensor:
    mass = randn(rows, columns, seed=3).abs() + 0.1
    mass.view(-1)[::5] = 0.0
    return mass


OPTIONS: dict[str, Callable[[tuple[int, ...]], dict[str, Any]]] = {
    "plain": lambda shape: {},
    "no friction": lambda shape: {"schedule": torch.tensor([[0.3, 1.0, 0.0], [0.2, 1.0, 0.0]])},
    "friction without noise": lambda shape: {"schedule": torch.tensor([[0.3, 0.5, 0.0], [0.2, 0.25, 0.0]])},
    "a row for each chain": lambda shape: {"schedule": _rows(shape[0])},
    "listed chains": lambda shape: {"chain_ids": torch.arange(shape[0]).flip(0) * 3 + 2**33},
    "one mass": lambda shape: {"inverse_mass": torch.tensor([[1.75]])},
    "a mass of each element": lambda shape: {"inverse_mass": _mass_with_zeros(1, size(shape))},
    "a mass of each chain": lambda shape: {"inverse_mass": _mass_with_zeros(shape[0], 1)},
    "a mass of each entry": lambda shape: {"inverse_mass": _mass_with_zeros(shape[0], size(shape))},
    "walls": lambda shape: {"low": -1.75, "high": 2.25},
    "a wall below": lambda shape: {"low": -0.5},
    "a wall above": lambda shape: {"high": 0.5},
    "work": lambda shape: {"work": randn(shape[0], seed=8).double()},
    "everything": lambda shape: {
        "schedule": _rows(shape[0]),
        "chain_ids": torch.arange(shape[0]).flip(0) * 3 + 2**33,
        "inverse_mass": _mass_with_zeros(shape[0], size(shape)),
        "low": -1.75,
        "high": 2.5,
        "work": randn(shape[0], seed=8).double(),
    },
}

Case = dict[str, Any]


def case(shape: tuple[int, ...], name: str, dtype: torch.dtype = torch.float32, grad: Any = torch.float32) -> Case:
    """Arguments of a step by name."""
    made: Case = {
        "x": randn(*shape).to(dtype),
        "velocity": randn(*shape, seed=5).to(dtype),
        "grad": randn(*shape, seed=6).to(grad),
        "schedule": torch.tensor([[0.3, 0.5, 0.25], [0.2, 0.75, 0.5]]),
        "key": torch.tensor([SEED, STEP, 1]),
        "chain_ids": torch.tensor([CHAIN]),
        **OPTIONS[name](shape),
    }
    if "inverse_mass" in made:
        made["inverse_mass"] = made["inverse_mass"].to(dtype)
    return made


def run(scheme: str, given: Case, device: str, close: bool, open: bool) -> Case:  # noqa: A002
    """x, velocity and work after a step of copies."""
    copies = {name: value.clone().to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    x, velocity, grad = copies.pop("x"), copies.pop("velocity"), copies.pop("grad")
    if scheme == "leapfrog":
        del copies["chain_ids"]
    step = {"baoab": ops.baoab_step_, "obabo": ops.obabo_step_, "leapfrog": ops.leapfrog_}[scheme]
    step(x, velocity, grad, **copies, close=close, open=open)
    return {"x": x, "velocity": velocity} | ({"work": copies["work"]} if "work" in copies else {})


def formula(scheme: str, given: Case, close: bool, open: bool) -> Case:  # noqa: A002
    """The step in float64, written afresh from the docstrings, for a key with schedule index 1."""
    x, v, g = (given[name].double().flatten(1) if given[name].dim() > 1 else given[name].double()[:, None]
               for name in ("x", "velocity", "grad"))  # fmt: skip
    batch, elements = x.shape
    w = given.get("inverse_mass", torch.ones(1, 1)).double()
    rows = given["schedule"].double().reshape(2, -1, 3).expand(2, batch, 3)
    low, high = given.get("low", -math.inf), given.get("high", math.inf)
    seed, step, _ = given["key"].tolist()
    ids = given["chain_ids"] if len(given["chain_ids"]) > 1 else given["chain_ids"] + torch.arange(batch)

    def noise(stream: rng.Stream, at: int) -> Tensor:
        return ops.normal((batch, elements), seed=seed, step=at, stream=stream, chain_ids=ids).double()

    def kick(v: Tensor, row: Tensor) -> Tensor:
        return v - row[:, :1] / 2 * w * g

    def refresh(v: Tensor, row: Tensor, stream: rng.Stream, at: int) -> Tensor:
        if scheme == "leapfrog":
            return v
        return row[:, 1:2] * v + row[:, 2:] * w.sqrt() * noise(stream, at)

    def drift(x: Tensor, v: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        x = x + distance * v
        turned = (x < low) | (x > high)
        x = torch.where(x < low, 2 * low - x, torch.where(x > high, 2 * high - x, x))
        return x, torch.where(turned, -v, v)

    def kinetic(v: Tensor) -> Tensor:
        return torch.where(w == 0, 0.0, v * v / w).sum(1) / 2

    work = given.get("work", torch.zeros(batch, dtype=torch.float64)).clone()
    if close:
        v = kick(v, rows[0])
        work += kinetic(v)
        if scheme == "obabo":
            v = refresh(v, rows[0], rng.Stream.MOMENTUM_END, step - 1)
    if open:
        h = rows[1, :, :1]
        if scheme == "obabo":
            v = refresh(v, rows[1], rng.Stream.MOMENTUM, step)
        work -= kinetic(v)
        v = kick(v, rows[1])
        if scheme == "baoab":
            quiet = (rows[1, :, 1:2] == 1) & (rows[1, :, 2:] == 0)
            x1, v1 = drift(x, v, h)
            x2, v2 = drift(x, v, h / 2)
            x2, v2 = drift(x2, refresh(v2, rows[1], rng.Stream.MOMENTUM, step), h / 2)
            x, v = torch.where(quiet, x1, x2), torch.where(quiet, v1, v2)
        else:
            x, v = drift(x, v, h)
    return {"x": x.reshape(given["x"].shape), "velocity": v.reshape(given["x"].shape), "work": work}


def agrees_with_compiled(scheme: str, given: Case, backend_device: tuple[str, str], halves: str) -> Case:
    found = run(scheme, given, backend_device[1], *HALVES[halves])
    with ops.backend(compiled_or_reference()):
        expected = run(scheme, given, "cpu", *HALVES[halves])
    for name in ("x", "velocity"):
        assert_agrees(found[name], expected[name], backend_device, scale=4.0)
    if "work" in found:
        close = {"rtol": 0, "atol": 0} if exact(backend_device) else {"rtol": 1e-6, "atol": 1e-5}
        torch.testing.assert_close(found["work"].cpu(), expected["work"], **close)
    return {name: value.cpu() for name, value in found.items()}


# The step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_formula_and_compiled(backend_device, shape, scheme, name):
    for halves in HALVES:
        given = case(shape, name)
        found = agrees_with_compiled(scheme, given, backend_device, halves)
        with ops.backend(compiled_or_reference()):
            expected = formula(scheme, given, *HALVES[halves])
        for what, value in found.items():
            tolerance = {"rtol": 1e-6, "atol": 1e-4} if what == "work" else {"rtol": 1e-6, "atol": 2e-6}
            torch.testing.assert_close(value.double(), expected[what], **tolerance)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("grad", [torch.float64, torch.float32, torch.bfloat16])
def test_float64_state(backend_device, grad, scheme, name):
    backend, device = backend_device
    given = case((4, 3, 5, 5), name, torch.float64, grad)
    if backend == "triton":
        with pytest.raises(RuntimeError, match="float64"):
            run(scheme, given, device, True, True)
        return
    for halves in HALVES:
        found = run(scheme, given, device, *HALVES[halves])
        expected = formula(scheme, given, *HALVES[halves])
        for what, value in found.items():
            assert value.dtype == torch.float64
            torch.testing.assert_close(value.cpu(), expected[what], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("shape", [(3, 37), (2, 3, 8, 8)], ids=str)
def test_narrow_gradients_are_widened(backend_device, dtype, name, shape):
    for scheme in SCHEMES:
        given = case(shape, name, grad=dtype)
        found = run(scheme, given, backend_device[1], True, True)
        wide = run(scheme, given | {"grad": given["grad"].float()}, backend_device[1], True, True)
        for what, value in found.items():
            assert torch.equal(value, wide[what])


def test_without_friction_all_three_are_leapfrog(backend_device):
    for name in ("no friction", "everything"):
        for halves in HALVES.values():
            given = case((4, 3, 7, 5), name)
            given["schedule"] = given["schedule"].clone()
            expected = run("leapfrog", given, backend_device[1], *halves)  # which reads the step size alone
            given["schedule"][..., 1:] = torch.tensor([1.0, 0.0])
            for scheme in ("baoab", "obabo"):
                for what, value in run(scheme, given, backend_device[1], *halves).items():
                    assert torch.equal(value, expected[what]), (scheme, what)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_closing_and_opening_may_be_two_calls(backend_device, scheme, name):
    given = case((3, 2, 6, 6), name)
    at_once = run(scheme, given, backend_device[1], True, True)
    closed = run(scheme, given, backend_device[1], True, False)
    after = run(scheme, given | {k: v.cpu() for k, v in closed.items()}, backend_device[1], False, True)
    for what in ("x", "velocity"):
        assert torch.equal(after[what], at_once[what])
    if "work" in at_once:
        torch.testing.assert_close(after["work"], at_once["work"], rtol=1e-13, atol=1e-12)


def test_nothing_moves_without_halves(backend_device):
    given = case((3, 5), "everything")
    for scheme in SCHEMES:
        for what, value in run(scheme, given, backend_device[1], False, False).items():
            assert torch.equal(value.cpu(), given[what])


def test_streams_and_steps_of_the_noise(backend_device):
    """From rest, without a gradient and with decay 0, the velocity is the noise itself."""
    zero, ids, device = torch.zeros(3, 37), torch.tensor([CHAIN]), backend_device[1]
    given = {"x": zero, "velocity": zero, "grad": zero, "schedule": torch.tensor([[1.0, 0.0, 1.0]])}
    given |= {"key": torch.tensor([SEED, STEP, 0]), "chain_ids": ids}
    address = {"seed": SEED, "chain_ids": CHAIN, "device": device}
    opened = ops.normal((3, 37), stream=rng.Stream.MOMENTUM, step=STEP, **address)
    closed = ops.normal((3, 37), stream=rng.Stream.MOMENTUM_END, step=STEP - 1, **address)
    assert torch.equal(run("baoab", given, device, False, True)["velocity"], opened)
    assert torch.equal(run("obabo", given, device, False, True)["velocity"], opened)
    assert torch.equal(run("obabo", given, device, True, False)["velocity"], closed)


@pytest.mark.parametrize("index", [0, 1, 2, 3, 100, 2**40])
def test_rows_of_the_schedule(backend_device, index):
    """What opens reads row min(index, S - 1), what closes the one before."""
    table = torch.tensor([[0.1, 0.5, 0.3], [0.2, 0.6, 0.2], [0.3, 0.7, 0.1]])
    for scheme in SCHEMES:
        given = case((3, 2, 5), "plain") | {"schedule": table}
        given["key"] = torch.tensor([SEED, STEP, index])
        found = run(scheme, given, backend_device[1], True, True)
        both = torch.stack([table[min(max(index - 1, 0), 2)], table[min(index, 2)]])
        given |= {"schedule": both[:, None].expand(2, 3, 3), "key": torch.tensor([SEED, STEP, 1])}
        for what, value in run(scheme, given, backend_device[1], True, True).items():
            assert torch.equal(found[what], value)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nan_stays_in_its_place(backend_device, scheme):
    given = case((4, 2, 3, 3), "everything")
    clean = run(scheme, given, backend_device[1], True, True)
    given["velocity"][1, 0, 0, 1] = math.nan
    given["grad"][2, 1, 2, 0] = math.nan
    found = run(scheme, given, backend_device[1], True, True)
    for what in ("x", "velocity"):
        changed = found[what].isnan().nonzero().tolist()
        assert changed == [[1, 0, 0, 1], [2, 1, 2, 0]]
        assert torch.equal(found[what][[0, 3]], clean[what][[0, 3]])
    if scheme == "obabo":
        assert found["work"].isnan().tolist() == [False, True, True, False] or found["work"][0] == clean["work"][0]
    assert torch.equal(found["work"][[0, 3]], clean["work"][[0, 3]])


def test_entries_of_no_inverse_mass_stay(backend_device):
    given = case((4, 30), "a mass of each entry")
    held = given["inverse_mass"] == 0
    given["velocity"][held] = 0.0
    for scheme in SCHEMES:
        found = run(scheme, given, backend_device[1], True, True)
        assert torch.equal(found["x"].cpu()[held], given["x"][held])
        assert bool((found["velocity"].cpu()[held] == 0).all())
        assert bool((found["x"].cpu() != given["x"])[~held].all())


# Closed forms -------------------------------------------------------------------------------------------------------


def test_kinetic_energy(backend_device):
    _, device = backend_device
    for shape in [*SHAPES, (0, 3), (3, 0), (2, 5000)]:
        for dtype in (torch.float32, torch.float64):
            if not supported(backend_device, dtype):
                continue
            v = randn(*shape, seed=5).to(dtype)
            flat = v.double().reshape(shape[0], size(shape))
            tables = {"none": None, "all": torch.full((1, 1), 0.25), "zero": torch.zeros(1, 1)}
            if v.numel():
                tables |= {"chain": _mass_with_zeros(shape[0], 1), "entry": _mass_with_zeros(shape[0], size(shape))}
            for w in tables.values():
                w = None if w is None else w.to(dtype)
                found = ops.kinetic_energy(v.to(device), None if w is None else w.to(device))
                assert found.dtype == torch.float64
                divided = flat.square() if w is None else torch.where(w == 0, 0.0, flat.square() / w.double())
                torch.testing.assert_close(found.cpu(), divided.sum(1) / 2, rtol=1e-14, atol=0)
                with ops.backend("reference"):
                    assert torch.equal(found.cpu(), ops.kinetic_energy(v, w))


def test_kinetic_energy_of_a_strided_velocity(backend_device):
    v = randn(4, 3, 6, 6).to(backend_device[1])
    expected = ops.kinetic_energy(v)
    assert torch.equal(ops.kinetic_energy(v.contiguous(memory_format=torch.channels_last)), expected)
    wide = torch.rand(6, 216, device=v.device)[:, ::2][:4]
    assert torch.equal(ops.kinetic_energy(v, wide), ops.kinetic_energy(v, wide.contiguous()))


def trajectory(scheme: str, case: Case, device: str, num_steps: int, gradient: Callable[[Tensor], Tensor]) -> Case:
    """x, velocity and work after steps of a chain."""
    state = {name: case[name].clone().to(device) for name in ("x", "velocity", "work") if name in case}
    rest = {k: v for k, v in case.items() if k not in ("x", "velocity", "grad")}
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in rest.items()}
    options |= {"key": case["key"].clone().to(device)} | ({"work": state["work"]} if "work" in state else {})
    if scheme == "leapfrog":
        options.pop("chain_ids", None)
    step = {"baoab": ops.baoab_step_, "obabo": ops.obabo_step_, "leapfrog": ops.leapfrog_}[scheme]
    for i in range(num_steps + 1):
        ends = {"close": i > 0, "open": i < num_steps}
        step(state["x"], state["velocity"], gradient(state["x"]), **options, **ends)
        options["key"] += torch.tensor([0, 1, 1], device=device)
    return state


def test_leapfrog_keeps_its_own_energy(backend_device):
    """At the force -x, leapfrog keeps (1 - h^2/4) x^2 + v^2 to rounding."""
    if not supported(backend_device, torch.float64):
        pytest.skip("Triton's kernels have no float64")
    h = 0.5
    start = {"x": randn(20, 3).double(), "velocity": randn(20, 3, seed=5).double()}
    start |= {"schedule": torch.tensor([[h, 1.0, 0.0]]), "key": torch.tensor([0, 0, 0])}
    end = trajectory("leapfrog", start, backend_device[1], 100, lambda x: x)

    def kept(state: Case) -> Tensor:
        return ((1 - h * h / 4) * state["x"].square() + state["velocity"].square()).cpu()

    torch.testing.assert_close(kept(end), kept(start), rtol=1e-13, atol=1e-13)


def test_leapfrog_is_reversible_between_walls(backend_device):
    if not supported(backend_device, torch.float64):
        pytest.skip("Triton's kernels have no float64")
    start = {"x": torch.rand(20, 3, generator=torch.Generator().manual_seed(0)).double()}
    start |= {"velocity": randn(20, 3, seed=5).double(), "low": 0.0, "high": 1.0, "key": torch.tensor([0, 0, 0])}
    start |= {"schedule": torch.tensor([[0.1, 1.0, 0.0]])}
    there = trajectory("leapfrog", start, backend_device[1], 25, lambda x: 2 * x)
    assert bool(((there["x"] >= 0) & (there["x"] <= 1)).all())
    back = trajectory("leapfrog", start | {"x": there["x"], "velocity": -there["velocity"]}, backend_device[1], 25,
                      lambda x: 2 * x)  # fmt: skip
    torch.testing.assert_close(back["x"].cpu(), start["x"], rtol=0, atol=1e-12)
    torch.testing.assert_close(-back["velocity"].cpu(), start["velocity"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_work_is_the_kinetic_part_of_the_energy_error(backend_device, scheme):
    """Without noise it is the change of the kinetic energy; with OBABO's, the error that a Metropolis test corrects."""
    given = case((6, 3, 5, 5), "everything")
    given["schedule"] = given["schedule"][:1].clone()
    noisy = scheme == "obabo"
    if not noisy:
        given["schedule"][..., 1:] = torch.tensor([1.0, 0.0])
    given |= {"work": torch.zeros(6, dtype=torch.float64), "key": torch.tensor([SEED, 0, 0])}
    found = trajectory(scheme, given, backend_device[1], 5, lambda x: x**3)
    if not noisy:
        change = [ops.kinetic_energy(v.cpu(), given["inverse_mass"]) for v in (found["velocity"], given["velocity"])]
        torch.testing.assert_close(found["work"].cpu(), change[0] - change[1], rtol=1e-12, atol=1e-12)
        return
    state, total = given, torch.zeros(6, dtype=torch.float64)
    for i in range(6):
        one = {**given, "x": state["x"], "velocity": state["velocity"], "grad": state["x"] ** 3}
        one["key"] = torch.tensor([SEED, i, i])
        one["work"] = torch.zeros(6, dtype=torch.float64)
        with ops.backend("reference"):
            state = formula_of_one_row(one, i > 0, i < 5)
        total += state["work"]
    torch.testing.assert_close(found["work"].cpu(), total, rtol=1e-4, atol=1e-4)


def formula_of_one_row(given: Case, close: bool, open: bool) -> Case:  # noqa: A002
    expected = formula("obabo", given | {"schedule": given["schedule"].expand(2, -1, -1)}, close, open)
    return {name: value if name == "work" else value.float() for name, value in expected.items()}


@pytest.mark.parametrize("scheme", ["baoab", "obabo"])
@pytest.mark.parametrize("h", [0.25, 1.0, 1.5])
def test_stationary_covariance_of_a_gaussian(backend_device, scheme, h):
    """At the force -x the step is linear, z' = A z + B xi, and its stationary covariance is known: BAOAB has that of x
    without error, and 1 - h^2/4 for v; OBABO has 1 / (1 - h^2/4) for x, and that of v without error."""
    if not supported(backend_device, torch.float64):
        pytest.skip("Triton's kernels have no float64")
    _, device = backend_device
    c = math.exp(-0.5)
    quiet = torch.tensor([[h, c, 0.0]])
    noisy = torch.tensor([[h, c, math.sqrt(1 - c * c)]])
    key, ids = torch.tensor([SEED, 0, 0]), torch.tensor([CHAIN])

    def step(z: Tensor, schedule: Tensor) -> Tensor:
        start = {"x": z[:, :1].clone(), "velocity": z[:, 1:].clone(), "schedule": schedule, "key": key}
        end = trajectory(scheme, start | {"chain_ids": ids}, device, 1, lambda x: x)
        return torch.cat([end["x"], end["velocity"]], dim=1).cpu()

    a = step(torch.eye(2, dtype=torch.float64), quiet).T
    shifts = step(torch.zeros(4, 2, dtype=torch.float64), noisy)
    streams = [(rng.Stream.MOMENTUM, 0)] + ([(rng.Stream.MOMENTUM_END, 0)] if scheme == "obabo" else [])
    drawn = torch.cat(
        [ops.normal((4, 1), seed=SEED, step=at, stream=s, chain_ids=CHAIN).double() for s, at in streams], 1
    )
    b = torch.linalg.lstsq(drawn, shifts).solution.T
    torch.testing.assert_close(drawn @ b.T, shifts, rtol=1e-12, atol=1e-12)
    system = torch.eye(4, dtype=torch.float64) - torch.kron(a, a)
    covariance = torch.linalg.solve(system, (b @ b.T).flatten()).reshape(2, 2)
    variances = (1.0, 1 - h * h / 4) if scheme == "baoab" else (1 / (1 - h * h / 4), 1.0)
    torch.testing.assert_close(covariance, torch.diag(torch.tensor(variances).double()), rtol=1e-6, atol=1e-6)


# Where it lies, and how it is split ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (0, 3, 4, 4)], ids=str)
def test_empty(backend_device, shape):
    given = case((3, 4), "plain") | {name: torch.empty(shape) for name in ("x", "velocity", "grad")}
    given["work"] = torch.ones(shape[0], dtype=torch.float64)
    for scheme in SCHEMES:
        found = run(scheme, given, backend_device[1], True, True)
        assert found["x"].shape == shape
        assert bool((found["work"] == 1).all())


def test_what_is_read_may_lie_anyhow(backend_device):
    _, device = backend_device
    given = case((3, 2, 6, 6), "everything")
    expected = run("obabo", given, device, True, True)
    laid = dict(given)
    for name in ("grad", "schedule", "inverse_mass"):
        laid[name] = torch.stack([given[name], given[name] + 9], dim=-1)
    laid |= {name: torch.stack([given[name], given[name]], dim=-1) for name in ("key", "chain_ids")}
    moved = {k: v.clone().to(device) if isinstance(v, Tensor) else v for k, v in laid.items()}
    for name in ("grad", "schedule", "inverse_mass", "key", "chain_ids"):
        moved[name] = moved[name][..., 0]
        assert not moved[name].is_contiguous()
    x, velocity, grad = moved.pop("x"), moved.pop("velocity"), moved.pop("grad")
    ops.obabo_step_(x, velocity, grad, **moved)
    assert torch.equal(x, expected["x"])
    assert torch.equal(velocity, expected["velocity"])
    assert torch.equal(moved["work"], expected["work"])


@pytest.mark.parametrize("name", ["x", "velocity", "work", "part of x", "moved by one"])
def test_what_is_read_may_be_what_is_written(backend_device, name):
    """The gradient of a Gaussian is x itself."""
    _, device = backend_device
    given = case((3, 6), "work")
    if name == "work":  # the inverse mass in the memory of the work
        given = case((3, 6), "work", torch.float32) | {"inverse_mass": torch.ones(1, 1)}
    for scheme in SCHEMES:
        room = torch.zeros(30, device=device)
        x = room[:18].view(3, 6)
        x.copy_(given["x"])
        velocity, work = given["velocity"].clone().to(device), given["work"].abs().clone().to(device)
        grad, mass = given["grad"].to(device), None
        if name == "work":
            mass = work.view(torch.float32)[1::2][:1].view(1, 1)
        else:
            grads = {
                "x": x,
                "velocity": velocity,
                "part of x": x[1:2].expand(3, 6),
                "moved by one": room[1:19].view(3, 6),
            }
            grad = grads[name]
        copies = {"x": x, "velocity": velocity, "grad": grad, "work": work}
        copies = {k: v.clone() for k, v in copies.items()} | {k: given[k] for k in ("schedule", "key", "chain_ids")}
        expected = run(scheme, copies | ({} if mass is None else {"inverse_mass": mass.clone()}), device, True, True)
        options = {k: given[k].to(device) for k in ("schedule", "key", "chain_ids")} | {"work": work}
        options |= {} if mass is None else {"inverse_mass": mass}
        if scheme == "leapfrog":
            del options["chain_ids"]
        step = {"baoab": ops.baoab_step_, "obabo": ops.obabo_step_, "leapfrog": ops.leapfrog_}[scheme]
        step(x, velocity, grad, **options)
        for what, value in (("x", x), ("velocity", velocity), ("work", work)):
            assert torch.equal(value, expected[what])


def test_what_is_written_must_lie_apart(backend_device):
    given = case((2, 4), "plain")
    options = {k: given[k].to(backend_device[1]) for k in ("schedule", "key", "chain_ids")}
    room = torch.zeros(16, device=backend_device[1])
    x, grad = room[:8].view(2, 4), torch.zeros(2, 4, device=backend_device[1])
    with pytest.raises(RuntimeError, match="x and velocity are both written and must not share memory"):
        ops.baoab_step_(x, room[4:12].view(2, 4), grad, **options)
    work = room[4:8].view(torch.float64)
    with pytest.raises(RuntimeError, match="x and work are both written and must not share memory"):
        ops.baoab_step_(x, room[8:].view(2, 4), grad, work=work, **options)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_batch_can_be_split_anyhow(backend_device, scheme, name):
    given = case((6, 3, 5, 5), name)
    whole, parts = run(scheme, given, backend_device[1], True, True), []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = {k: given[k][rows] for k in ("x", "velocity", "grad")}
        ids = given["chain_ids"]
        part |= {"key": given["key"], "chain_ids": ids[rows] if len(ids) > 1 else ids + rows.start}
        part["schedule"] = given["schedule"][:, rows] if given["schedule"].dim() == 3 else given["schedule"]
        part |= {k: given[k] for k in ("low", "high") if k in given}
        part |= {k: given[k][rows] for k in ("inverse_mass", "work") if k in given}
        parts.append(run(scheme, part, backend_device[1], True, True))
    for what, value in whole.items():
        assert torch.equal(torch.cat([part[what] for part in parts]), value)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_thread_count_does_not_matter(backend_device, threads, name):
    given = case((3, 3, 80, 101), name)
    expected = run("obabo", given, backend_device[1], True, True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for what, value in run("obabo", given, backend_device[1], True, True).items():
            assert torch.equal(value, expected[what])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [16, 256])
def test_block_size_does_not_matter(backend_device, rows, monkeypatch):
    name, device = backend_device
    if name != "triton":
        pytest.skip("only Triton's programs have a size to choose")
    for options in ("plain", "everything"):
        given = case((3, 2, 8, 8), options)
        expected = run("obabo", given, device, True, True)
        monkeypatch.setattr("fastebm.ops.triton.philox.ROWS", rows)
        for what, value in run("obabo", given, device, True, True).items():
            assert torch.equal(value, expected[what])
        monkeypatch.undo()


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


@pytest.mark.skipif(_C is None, reason="fastebm's C++ operators are not built")
@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_cpp_variants_are_bit_equal(variant, dtype, state, name):
    with ops.backend("cpp"):
        for shape in ((4, 3, 7, 5), (2, 3, 32, 32)):
            for scheme in SCHEMES:
                given = case(shape, name, state, dtype)
                found = run(scheme, given, "cpu", True, True)
                _C.set_variant("baseline")
                expected = run(scheme, given, "cpu", True, True)
                _C.set_variant(variant)
                for what, value in found.items():
                    assert torch.equal(value, expected[what])


def test_reference_matches_compiled_to_the_last_bit():
    """The reference's fused multiply-adds are exact but for rare double roundings, which don't occur here."""
    if compiled_or_reference() != "cpp":
        pytest.skip("fastebm's C++ operators are not built")
    for name in OPTIONS:
        for scheme in SCHEMES:
            for halves in HALVES.values():
                found = []
                for backend in ("cpp", "reference"):
                    with ops.backend(backend):
                        found.append(run(scheme, case((4, 3, 20, 20), name), "cpu", *halves))
                for what, value in found[0].items():
                    assert ulps(value, found[1][what]) == 0, (name, scheme, what)
                    assert what != "work" or torch.equal(value, found[1][what])


# Dispatcher, compiler, graphs ---------------------------------------------------------------------------------------


def operator_arguments(device: str, name: str, scheme: int) -> tuple[Any, ...]:
    given = case((3, 2, 4, 4), name)
    order = ("x", "velocity", "work", "grad", "schedule", "key", "chain_ids", "inverse_mass", "low", "high")
    arguments = (given.get(k) for k in order)
    return (*(a.to(device) if isinstance(a, Tensor) else a for a in arguments), scheme, True, True)


@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("scheme", [0, 1, 2])
def test_opcheck(backend_device, name, scheme):
    arguments = operator_arguments(backend_device[1], name, scheme)
    torch.library.opcheck(torch.ops.fastebm.kinetic_step_.default, arguments)
    mass = arguments[7]
    torch.library.opcheck(torch.ops.fastebm.kinetic_energy.default, (arguments[1], mass))


def test_compiles_as_one_graph(backend_device):
    _, device = backend_device
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case((3, 2, 4, 4), "everything").items()}
    advance = torch.tensor([0, 1, 1], device=device)

    def chain(x: Tensor, velocity: Tensor, work: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        x, velocity, work = x.clone(), velocity.clone(), work.clone()
        for step in range(3):
            rest = {k: given[k] for k in ("schedule", "chain_ids", "inverse_mass", "low", "high")}
            ops.obabo_step_(x, velocity, x.tanh(), key=key, work=work, close=step > 0, open=step < 2, **rest)
            key = key + advance
        return x, velocity, work, ops.kinetic_energy(velocity)

    torch._dynamo.reset()
    start = tuple(given[k] for k in ("x", "velocity", "work", "key"))
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*start), chain(*start), strict=True):
        assert torch.equal(found, expected)


def test_works_in_inference_mode(backend_device):
    given = case((3, 2, 4, 4), "everything")
    expected = run("baoab", given, backend_device[1], True, True)
    with torch.inference_mode():
        for what, value in run("baoab", given, backend_device[1], True, True).items():
            assert torch.equal(value, expected[what])


def test_captured_graph_replays_at_a_later_step(backend_device):
    name, device = backend_device
    if device != "cuda" or name == "reference":
        pytest.skip("CUDA graphs need a GPU and a compiled backend")
    arguments = operator_arguments(device, "everything", 1)
    x, velocity, work, _, _, key, *_ = arguments
    start, advance = [t.clone() for t in (x, velocity, work, key)], torch.tensor([0, 1, 1], device=device)

    def reset() -> None:
        for tensor, value in zip((x, velocity, work, key), start, strict=True):
            tensor.copy_(value)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.ops.fastebm.kinetic_step_(*arguments)
    side.synchronize()
    reset()
    for _ in range(3):
        torch.ops.fastebm.kinetic_step_(*arguments)
        key += advance
    expected = [t.clone() for t in (x, velocity, work)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.fastebm.kinetic_step_(*arguments)
        key += advance
    reset()
    for _ in range(3):
        graph.replay()
    for found, right in zip((x, velocity, work), expected, strict=True):
        assert torch.equal(found, right)


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "chain"), [((0, 2**32, 0), 0), ((0, -1, 0), 0), ((0, 1, 0), 2**56 - 1), ((0, 1, 0), -1), ((0, 1, -1), 0)]
)
def test_addresses_out_of_range(backend_device, key, chain):
    _, device = backend_device
    given = case((2, 5), "plain") | {"key": torch.tensor(key), "chain_ids": torch.tensor([chain])}
    for scheme in ("baoab", "obabo"):
        if device == "cpu":
            with pytest.raises(RuntimeError, match=r"overflow|schedule index"):
                run(scheme, given, device, True, True)
        else:
            assert bool(run(scheme, given, device, True, True)["x"].isnan().all(dim=1).any())


def test_obabo_closes_no_step_before_the_first(backend_device):
    _, device = backend_device
    given = case((2, 5), "plain") | {"key": torch.tensor([0, 0, 0])}
    run("obabo", given, device, False, True)
    run("baoab", given, device, True, True)
    if device == "cpu":
        with pytest.raises(RuntimeError, match="OBABO closes the step before the key's, but the key is that of step 0"):
            run("obabo", given, device, True, True)
    else:
        assert bool(run("obabo", given, device, True, True)["velocity"].isnan().all())


def test_out_of_range_is_nan_in_a_kernel(backend_device, monkeypatch):
    if backend_device != ("triton", "cpu"):
        pytest.skip("shown on the interpreter, whose check before the kernel is taken away here")
    monkeypatch.setattr("fastebm.ops.triton.underdamped.check_readable_address", lambda *_: None)
    monkeypatch.setattr("fastebm.ops.triton.underdamped.check_index", lambda *_: None)
    monkeypatch.setattr("fastebm.ops.triton.underdamped.check_closing", lambda *_: None)
    given = case((3, 8), "work") | {"chain_ids": torch.tensor([2**56, 5, -1]), "key": torch.tensor([0, 1, 0])}
    for scheme in ("baoab", "obabo"):
        found = run(scheme, given, "cpu", True, True)
        assert found["x"].isnan().all(dim=1).tolist() == [True, False, True]
        for key in ((0, 2**32, 0), (0, -1, 0), (0, 1, -1)):
            rest = {"key": torch.tensor(key), "chain_ids": torch.tensor([5, 6, 7])}
            assert bool(run(scheme, given | rest, "cpu", True, True)["velocity"].isnan().all())


@pytest.mark.parametrize("which", ["x", "velocity", "grad", "work", "inverse_mass"])
def test_autograd_is_refused(backend_device, which):
    device = backend_device[1]
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case((2, 4), "everything").items()}
    given[which].requires_grad_()
    x, velocity, grad = given.pop("x"), given.pop("velocity"), given.pop("grad")
    with pytest.raises(RuntimeError, match=r"kinetic_step_ has no derivative.*no_grad"):
        ops.baoab_step_(x, velocity, grad, **given)
    with torch.no_grad():
        ops.baoab_step_(x, velocity, grad, **given)
    with pytest.raises(RuntimeError, match=r"kinetic_energy has no derivative.*no_grad"):
        ops.kinetic_energy(torch.ones(2, 4, device=device, requires_grad=True))


TABLE = torch.tensor([[0.1, 0.5, 0.5]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"velocity": None}, TypeError, "velocity must be a tensor, got NoneType"),
        ({"schedule": 0.1}, TypeError, "schedule must be a tensor, got float"),
        ({"key": 3}, TypeError, "key must be a tensor, got int"),
        ({"work": 0.0}, TypeError, "work must be a tensor or None, got float"),
        ({"inverse_mass": 2.0}, TypeError, "inverse_mass must be a tensor or None, got float"),
        ({"grad": torch.zeros(2, 4).to_sparse()}, TypeError, "grad must be a dense tensor"),
        ({"x": torch.zeros(())}, ValueError, "without dimensions"),
        ({"x": torch.zeros(2, 4, dtype=torch.float16)}, TypeError, "x must be float32"),
        ({"x": torch.zeros(4, 2).T}, ValueError, r"x is written in place and must be contiguous, got strides \(1, 2\)"),
        ({"x": torch.zeros(1, 4).expand(2, 4)}, ValueError, "x is written in place and must be contiguous"),
        ({"velocity": torch.zeros(4, 2).T}, ValueError, "velocity is written in place and must be contiguous"),
        ({"velocity": torch.zeros(2, 5)}, ValueError, r"velocity must have x's shape \(2, 4\)"),
        ({"velocity": torch.zeros(2, 4).double()}, TypeError, "velocity must be float32 for x of torch.float32"),
        ({"grad": torch.zeros(2, 4).double()}, TypeError, "grad must be float32 or bfloat16 or float16"),
        ({"grad": torch.zeros(2, 4, dtype=torch.int32)}, TypeError, "grad must be float32"),
        ({"grad": torch.zeros(1, 4)}, ValueError, "grad must have x's shape"),
        ({"grad": torch.zeros(2, 4, device="meta")}, ValueError, "device"),
        ({"schedule": torch.zeros(3)}, ValueError, r"schedule must be a float32 table \(steps, 3\) or \(steps, 2, 3\)"),
        ({"schedule": torch.zeros(0, 3)}, ValueError, "schedule must be a float32 table"),
        ({"schedule": torch.zeros(1, 2)}, ValueError, "of .step size, decay, noise std., got torch.float32"),
        ({"schedule": torch.zeros(1, 3, 3)}, ValueError, "schedule must be a float32 table"),
        ({"schedule": torch.zeros(1, 3).double()}, ValueError, "schedule must be a float32 table"),
        ({"schedule": torch.zeros(1, 3, device="meta")}, ValueError, "schedule must be on x's device"),
        ({"key": torch.zeros(2, dtype=torch.int64)}, ValueError, "key must be an int64 tensor"),
        ({"key": torch.zeros(3, dtype=torch.int32)}, ValueError, "key must be an int64 tensor"),
        ({"inverse_mass": torch.ones(2, 4).double()}, TypeError, "inverse_mass must be torch.float32, as x is"),
        ({"inverse_mass": torch.ones(4)}, ValueError, r"inverse_mass must be a table \(1 or 2, 1 or 4\)"),
        ({"inverse_mass": torch.ones(3, 1)}, ValueError, "inverse_mass must be a table"),
        ({"inverse_mass": torch.ones(1, 2)}, ValueError, "inverse_mass must be a table"),
        ({"work": torch.zeros(2)}, ValueError, r"work must be float64 of shape \(2,\)"),
        ({"work": torch.zeros(3).double()}, ValueError, "work must be float64"),
        ({"work": torch.zeros(4).double()[::2]}, ValueError, "work is written in place and must be contiguous"),
        ({"low": 1.0, "high": 1.0}, ValueError, "low < high, got 1.0 and 1.0"),
        ({"low": math.nan}, ValueError, "low < high, got nan and None"),
        ({"high": -math.inf}, ValueError, "low < high, got None and -inf"),
        ({"low": "0"}, TypeError, "low must be a real number"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_errors(change, error, message):
    arguments = {name: torch.zeros(2, 4) for name in ("x", "velocity", "grad")}
    arguments |= {"schedule": TABLE, "key": rng.make_key(0, 1), **change}
    steps: list[tuple[Callable[..., None], Case]] = [(ops.leapfrog_, {})]
    steps += [(step, {"chain_ids": torch.tensor([0])}) for step in (ops.baoab_step_, ops.obabo_step_)]
    for step, more in steps:
        with pytest.raises(error, match=message) as caught:
            step(**arguments, **more)
        assert "\n" not in str(caught.value)


def test_errors_of_chain_ids():
    states = [torch.zeros(2, 4) for _ in range(3)]
    for step in (ops.baoab_step_, ops.obabo_step_):
        with pytest.raises(ValueError, match="chain_ids must be an int64 tensor"):
            step(*states, schedule=TABLE, key=rng.make_key(0, 1), chain_ids=torch.zeros(3, dtype=torch.int64))
        with pytest.raises(TypeError, match="chain_ids must be a tensor, got int"):
            step(*states, schedule=TABLE, key=rng.make_key(0, 1), chain_ids=0)
    address = (TABLE, rng.make_key(0, 1), torch.tensor([0]))
    arguments = (*states[:2], None, states[2], *address, None, None, None, 3, True, True)
    with pytest.raises(ValueError, match="scheme must be 0"):
        torch.ops.fastebm.kinetic_step_(*arguments)


@pytest.mark.parametrize(
    ("velocity", "mass", "error", "message"),
    [
        (1.0, None, TypeError, "velocity must be a tensor, got float"),
        (torch.zeros(()), None, ValueError, "velocity must be .chains"),
        (torch.zeros(2, 3, dtype=torch.int64), None, TypeError, "velocity must be float32"),
        (torch.zeros(2, 3), torch.ones(3), ValueError, "inverse_mass must be a table"),
        (torch.zeros(2, 3), torch.ones(2, 3).double(), TypeError, "inverse_mass must be torch.float32"),
    ],
)
def test_errors_of_the_kinetic_energy(velocity, mass, error, message):
    with pytest.raises(error, match=message):
        ops.kinetic_energy(velocity, mass)


def test_public_names():
    assert {"baoab_step_", "obabo_step_", "leapfrog_", "kinetic_energy"} <= set(fastebm.ops.__all__)


def test_a_drift_over_both_walls_ends_in_no_number(backend_device):
    """Mirrored once and beyond the other wall: NaN, on all backends, so that a test rejects such a trajectory."""
    _, device = backend_device
    x, velocity = torch.zeros(3, 1, device=device), torch.tensor([[1.0], [2.0], [5.0]], device=device)
    schedule, key = torch.tensor([[1.0, 1.0, 0.0]], device=device), torch.zeros(3, dtype=torch.int64, device=device)
    ops.leapfrog_(x, velocity, torch.zeros_like(x), schedule=schedule, key=key, low=-0.5, high=0.75, close=False)
    assert torch.equal(x[:2].cpu(), torch.tensor([[0.5], [-0.5]])), "2 * 0.75 - 1, and 2 * 0.75 - 2"
    assert x[2].isnan().all()
