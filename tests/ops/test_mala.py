"""The Metropolis tests against the proposal densities in float64, closed forms, and the compiled backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastebm import ops, rng
from fastebm.ops import backends
from tests.ops.agreement import assert_agrees, compiled_or_reference, exact, ulps
from tests.ops.precision import supported

_C = backends._extension
SEED, STEP, CHAIN = -7, 2**31 + 5, 2**32 - 2
SHAPES = [(1,), (3, 2), (2, 63), (2, 1025), (37, 1, 4, 4), (4, 3, 7, 5), (2, 3, 32, 32)]
NO_STEP_OPTIONS = (None,) * 10 + (0.0,)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash((shape, seed)) % 2**31))


def by_chain(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))


def quartic(x: Tensor) -> tuple[Tensor, Tensor]:
    """(energies, gradient) of x^4/4 + x^2/2, in x's dtype."""
    return by_chain(x**4 / 4 + x**2 / 2).double().sum(1).to(x.dtype), x**3 + x


OPTIONS: dict[str, Callable[[tuple[int, ...]], dict[str, Any]]] = {
    "plain": lambda shape: {},
    "a row for each chain": lambda shape: {
        "schedule": torch.stack([randn(2, shape[0], seed=k).abs() / 5 + 0.05 for k in (1, 2)], dim=-1)
    },
    "listed chains": lambda shape: {"chain_ids": torch.arange(shape[0]).flip(0) * 3 + 2**33},
    "clipped": lambda shape: {"grad_clip": 0.6},
    "walls": lambda shape: {"low": -1.0, "high": 1.25},
    "a wall below": lambda shape: {"low": -1.0},
    "a wall above": lambda shape: {"high": 1.0},
    "energies in float64": lambda shape: {},
    "everything": lambda shape: {
        "schedule": torch.stack([randn(2, shape[0], seed=k).abs() / 5 + 0.05 for k in (1, 2)], dim=-1),
        "chain_ids": torch.arange(shape[0]).flip(0) * 3 + 2**33,
        "grad_clip": 0.8,
        "low": -1.0,
        "high": 1.25,
    },
}

STATES = ("x", "energy", "grad", "proposal", "proposal_energy", "proposal_grad")
Case = dict[str, Any]


def case(shape: tuple[int, ...], name: str, dtype: torch.dtype = torch.float32, grad: Any = None) -> Case:
    """Arguments of a step by name, with the proposal that a Langevin step makes of them."""
    made: Case = {
        "schedule": torch.tensor([[0.3, 0.1], [0.2, 0.6]]),
        "key": torch.tensor([SEED, STEP, 1]),
        "chain_ids": torch.tensor([CHAIN]),
        **OPTIONS[name](shape),
    }
    low, high = made.get("low", -math.inf), made.get("high", math.inf)
    x = randn(*shape).clamp(max(low, -3.0), min(high, 3.0)).to(dtype)
    made["x"] = x
    made["energy"], made["grad"] = quartic(x)
    made["grad"] = made["grad"].to(grad or dtype)
    with ops.backend(compiled_or_reference()):
        address = (made["schedule"], made["key"], made["chain_ids"])
        options = (None, None, made.get("grad_clip"), *NO_STEP_OPTIONS[3:])
        y = torch.ops.fastebm.langevin_step(x, made["grad"], *address, *options)
    made["proposal"] = torch.where(y < low, 2 * low - y, torch.where(y > high, 2 * high - y, y))
    made["proposal_energy"], made["proposal_grad"] = quartic(made["proposal"])
    made["proposal_grad"] = made["proposal_grad"].to(grad or dtype)
    if name == "energies in float64":
        made |= {each: made[each].double() for each in ("energy", "proposal_energy")}
    return made


def run(given: Case, device: str) -> Case:
    """The states, accepted and log_ratio after a step of copies."""
    copies = {name: value.clone().to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    states = [copies.pop(name) for name in STATES]
    accepted, log_ratio = ops.mala_step_(*states, **copies)
    return dict(zip(STATES[:3], states, strict=False)) | {"accepted": accepted, "log_ratio": log_ratio}


def formula(given: Case) -> Tensor:
    """log_ratio from the densities of the noise there and back in float64, for a key with schedule index 1."""
    x, there, g, back = (by_chain(given[k]).double() for k in ("x", "proposal", "grad", "proposal_grad"))
    if (clip := given.get("grad_clip")) is not None:
        g, back = g.clamp(-clip, clip), back.clamp(-clip, clip)
    batch = len(x)
    eta, sigma = given["schedule"].double().reshape(2, -1, 2).expand(2, batch, 2)[1].unsqueeze(-1).unbind(1)
    ids = given["chain_ids"] if len(given["chain_ids"]) > 1 else given["chain_ids"] + torch.arange(batch)
    noise = ops.normal(tuple(x.shape), seed=SEED, step=STEP, chain_ids=ids).double()
    low, high = given.get("low", -math.inf), given.get("high", math.inf)
    y = x - eta * g + sigma * noise
    wall = torch.where(y < low, low, high)
    # The way back goes through the same wall: beyond it lies what its mirror makes of x.
    unfolded = torch.where((y < low) | (y > high), 2 * wall - x, x)
    noise_back = (unfolded - there + eta * back) / sigma
    temperature = (sigma * sigma / (2 * eta))[:, 0]
    rise = given["proposal_energy"].double() - given["energy"].double()
    return -rise / temperature - (noise_back.square() - noise.square()).sum(1) / 2


def log_uniforms(given: Case) -> Tensor:
    batch = len(given["x"])
    ids = given["chain_ids"] if len(given["chain_ids"]) > 1 else given["chain_ids"] + torch.arange(batch)
    key = given["key"].tolist()
    u = ops.uniform((batch, 1), seed=key[0], step=key[1], stream=rng.Stream.ACCEPTANCE, chain_ids=ids)
    return u[:, 0].double().log()


# The step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_densities_and_compiled(backend_device, shape, name):
    given = case(shape, name)
    found = run(given, backend_device[1])
    with ops.backend(compiled_or_reference()):
        compiled, expected = run(given, "cpu"), formula(given)
        below = log_uniforms(given) < compiled["log_ratio"]
    tolerance = {"rtol": 0, "atol": 0} if exact(backend_device) else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(found["log_ratio"].cpu(), compiled["log_ratio"], **tolerance)
    elements = math.prod(shape[1:])
    inside = compiled["log_ratio"] > -math.inf
    torch.testing.assert_close(compiled["log_ratio"][inside], expected[inside], rtol=1e-4, atol=2e-6 * elements + 1e-4)
    assert torch.equal(found["accepted"].cpu(), below)
    chosen = below.reshape(-1, *(1,) * (len(shape) - 1))
    for state in ("x", "energy", "grad"):
        proposed = given["proposal" if state == "x" else f"proposal_{state}"]
        where = chosen if state != "energy" else below
        assert torch.equal(found[state].cpu(), torch.where(where, proposed, given[state]))


def test_examples_accept_and_reject():
    """Of the cases above, so that neither branch goes untested."""
    with ops.backend(compiled_or_reference()):
        answers = torch.cat([run(case((37, 1, 4, 4), name), "cpu")["accepted"] for name in OPTIONS])
    assert 30 < int(answers.sum()) < len(answers) - 30


@pytest.mark.parametrize("grad", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "energies in float64"])
def test_float64_state(backend_device, grad, name):
    given = case((4, 3, 5, 5), name, torch.float64, grad)
    if backend_device[0] == "triton":
        with pytest.raises(RuntimeError, match="float64"):
            run(given, backend_device[1])
        return
    found, expected = run(given, backend_device[1]), formula(given)
    inside = found["log_ratio"].cpu() > -math.inf
    torch.testing.assert_close(found["log_ratio"].cpu()[inside], expected[inside], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_narrow_gradients_are_widened_and_kept(backend_device, dtype, name):
    given = case((9, 37), name, grad=dtype)
    found = run(given, backend_device[1])
    wide = run(given | {k: given[k].float() for k in ("grad", "proposal_grad")}, backend_device[1])
    assert found["grad"].dtype == dtype
    for what in ("x", "energy", "accepted", "log_ratio"):
        assert torch.equal(found[what], wide[what])
    assert torch.equal(found["grad"].float(), wide["grad"])


def test_a_proposal_beyond_a_wall_is_rejected(backend_device):
    given = case((3, 5), "walls")
    given["proposal"][1, 2] = 1.25 + 1e-3
    found = run(given, backend_device[1])
    assert found["log_ratio"].isneginf().tolist() == [False, True, False]
    assert not bool(found["accepted"][1])
    assert torch.equal(found["x"][1].cpu(), given["x"][1])


def test_far_walls_change_nothing(backend_device):
    given = case((5, 300), "plain")
    expected = run(given, backend_device[1])
    for what, value in run(given | {"low": -1e6, "high": 1e6}, backend_device[1]).items():
        assert torch.equal(value, expected[what])


def test_a_chain_lost_stays_alone(backend_device):
    """NaN in a proposal, its gradient or its energy rejects that chain, and its neighbours are as they were."""
    given = case((6, 40), "walls")
    clean = run(given, backend_device[1])
    given["proposal"][1, 3] = math.nan
    given["proposal_grad"][2, 39] = math.nan
    given["proposal_energy"][3] = math.nan
    given["proposal_energy"][4] = -math.inf
    found = run(given, backend_device[1])
    assert found["accepted"].tolist()[1:5] == [False] * 4
    for row in (0, 5):
        for what, value in found.items():
            assert torch.equal(value[row], clean[what][row])
    for row in (1, 2, 3, 4):
        for what in ("x", "energy", "grad"):
            assert torch.equal(found[what][row].cpu(), given[what][row])


def test_without_noise_only_descent_is_accepted(backend_device):
    """At temperature 0 the ratio is infinite either way."""
    x = torch.tensor([[1.0], [2.0], [3.0]])
    states = {"x": x, "energy": torch.tensor([1.0, 1.0, 1.0]), "grad": torch.zeros(3, 1), "proposal": x.clone()}
    states |= {"proposal_energy": torch.tensor([0.5, 1.5, 1.0]), "proposal_grad": torch.zeros(3, 1)}
    states |= {"schedule": torch.tensor([[0.1, 0.0]]), "key": rng.make_key(0), "chain_ids": torch.tensor([0])}
    found = run(states, backend_device[1])
    assert found["accepted"].tolist() == [True, False, False]
    assert found["log_ratio"].tolist()[:2] == [math.inf, -math.inf]


@pytest.mark.parametrize("index", [0, 1, 2, 100, 2**40])
def test_rows_of_the_schedule(backend_device, index):
    table = torch.tensor([[0.1, 0.5], [0.2, 0.6], [0.3, 0.7]])
    given = case((3, 2, 5), "plain") | {"schedule": table, "key": torch.tensor([SEED, STEP, index])}
    expected = run(given | {"schedule": table[min(index, 2)][None].contiguous()}, backend_device[1])
    for what, value in run(given, backend_device[1]).items():
        assert torch.equal(value, expected[what])
    each = table[:, None].expand(3, 3, 2)
    for what, value in run(given | {"schedule": each}, backend_device[1]).items():
        assert torch.equal(value, expected[what])


# The Metropolis test alone ------------------------------------------------------------------------------------------


def metropolis(given: Case, device: str) -> Case:
    copies = {k: given[k].clone().to(device) for k in (*STATES, "log_ratio", "key", "chain_ids")}
    states = [copies.pop(name) for name in STATES]
    accepted = ops.metropolis_(*states, copies.pop("log_ratio"), **copies)
    return dict(zip(STATES[:3], states, strict=False)) | {"accepted": accepted}


@pytest.mark.parametrize("name", ["plain", "listed chains", "energies in float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_metropolis_at_the_ratio_of_a_step(backend_device, shape, name):
    given = case(shape, name)
    expected = run(given, backend_device[1])
    for what, value in metropolis(given | {"log_ratio": expected["log_ratio"].cpu()}, backend_device[1]).items():
        assert torch.equal(value, expected[what])


def test_metropolis_of_what_is_no_number(backend_device):
    ratios = [math.inf, -math.inf, math.nan, 0.0, math.inf, math.inf, math.inf]
    energies = [1.0, 1.0, 1.0, 1.0, math.inf, -math.inf, math.nan]
    given = case((7, 3), "plain") | {"log_ratio": torch.tensor(ratios, dtype=torch.float64)}
    given |= {"proposal_energy": torch.tensor(energies), "energy": torch.full((7,), math.inf)}
    found = metropolis(given, backend_device[1])
    assert found["accepted"].tolist() == [True, False, False, True, False, False, False]
    assert found["energy"].tolist() == [1.0, math.inf, math.inf, 1.0, math.inf, math.inf, math.inf]


def test_uniforms_decide(backend_device):
    """Of 20,000 chains at a ratio of log 0.3, 30 % are accepted, those whose uniform lies below it."""
    batch = 20_000
    given = {"x": torch.zeros(batch, 1), "energy": torch.zeros(batch), "grad": torch.zeros(batch, 1)}
    given |= {
        "proposal": torch.ones(batch, 1),
        "proposal_energy": torch.ones(batch),
        "proposal_grad": torch.ones(batch, 1),
    }
    given |= {"log_ratio": torch.full((batch,), math.log(0.3), dtype=torch.float64)}
    given |= {"key": torch.tensor([3, 5, 0]), "chain_ids": torch.tensor([11])}
    accepted = metropolis(given, backend_device[1])["accepted"].cpu()
    assert torch.equal(accepted, log_uniforms(given) < math.log(0.3))
    assert abs(float(accepted.double().mean()) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / batch)


# Closed forms -------------------------------------------------------------------------------------------------------


def chain(
    energy: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, schedule: Tensor, num_steps: int, **options: Any
):
    """(x after steps of MALA, the mean acceptance)."""
    low, high = options.get("low", -math.inf), options.get("high", math.inf)
    ids, rate = torch.tensor([0]), 0.0
    e, g = energy(x)
    with ops.backend(compiled_or_reference()):  # too many chains for Triton's interpreter
        for step in range(num_steps):
            key = rng.make_key(9, step)
            y = torch.ops.fastebm.langevin_step(x, g, schedule, key, ids, *NO_STEP_OPTIONS)
            y = torch.where(y < low, 2 * low - y, torch.where(y > high, 2 * high - y, y))
            accepted, _ = ops.mala_step_(x, e, g, y, *energy(y), schedule=schedule, key=key, chain_ids=ids, **options)
            rate += float(accepted.double().mean()) / num_steps
    return x, rate


def test_mala_keeps_a_gaussian_with_narrow_gradients():
    """Started in the target, the second and fourth moments stay, with gradients of bfloat16, at a step where Langevin
    without a test would be off by a third."""
    batch, eta = 20_000, 1.0

    def energy(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.square().sum(1) / 2, x.bfloat16()

    x, rate = chain(energy, randn(batch, 1), torch.tensor([[eta, math.sqrt(2 * eta)]]), 30)
    assert 0.5 < rate < 0.9
    assert abs(float(x.square().mean()) - 1) < 4 * math.sqrt(2 / batch)
    assert abs(float((x**4).mean()) - 3) < 4 * math.sqrt(96 / batch)


def test_mala_between_walls_has_the_law_of_its_box():
    """exp(-3x) on [0, 1], and at a uniform start: the mean and the variance after many steps are those of the law."""
    batch, eta = 20_000, 0.05

    def energy(x: Tensor) -> tuple[Tensor, Tensor]:
        return 3 * x.sum(1), torch.full_like(x, 3.0)

    start = torch.rand(batch, 1, generator=torch.Generator().manual_seed(0))
    x, rate = chain(energy, start, torch.tensor([[eta, math.sqrt(2 * eta)]]), 100, low=0.0, high=1.0)
    mean = 1 / 3 - 1 / (math.e**3 - 1)
    square = 2 / 9 - (1 + 2 / 3) / (math.e**3 - 1)
    variance = square - mean**2
    assert 0.5 < rate < 0.95
    assert bool(((x >= 0) & (x <= 1)).all())
    assert abs(float(x.double().mean()) - mean) < 4 * math.sqrt(variance / batch)
    assert abs(float(x.double().square().mean()) - square) < 4 * math.sqrt(square / batch)


def test_the_ratio_is_exact_where_densities_cancel(backend_device):
    """At a step of 1e-6 the two densities differ by less than float32 can tell."""
    if not supported(backend_device, torch.float64) or backend_device[1] != "cpu":
        pytest.skip("Triton's kernels have no float64")
    x = randn(50, 20).double()
    eta = 2.0**-20
    schedule, key, ids = torch.tensor([[eta, 2.0**-10]]), rng.make_key(0), torch.tensor([0])
    for dtype, within in ((torch.float64, 1e-9), (torch.float32, 2e-3)):
        start = x.to(dtype)
        proposal = torch.ops.fastebm.langevin_step(start, start.clone(), schedule, key, ids, *NO_STEP_OPTIONS)
        e, g = start.double().square().sum(1).to(dtype) / 2, start.clone()
        states = (start.clone(), e.double(), g, proposal, proposal.double().square().sum(1) / 2, proposal.clone())
        _, ratio = ops.mala_step_(*states, schedule=schedule, key=key, chain_ids=ids)
        here, there = start.double(), proposal.double()
        # For the energy x^2/2 at T = 1/2: the two gradients' sum is that of the states.
        expected = -2 * (eta / 4) * (there.square() - here.square()).sum(1)
        energy_part = there.square().sum(1) / 2 - e.double()
        if dtype == torch.float64:
            torch.testing.assert_close(ratio, expected, rtol=within, atol=1e-12)
        else:
            rounding = 2 * (energy_part - ((there - here) * (there + here)).sum(1) / 2)
            torch.testing.assert_close(ratio + rounding, expected, rtol=within, atol=1e-12)


# Where it lies, and how it is split ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (0, 3), (0, 3, 4, 4)], ids=str)
def test_no_chains(backend_device, shape):
    given = case((3, 4), "plain") | {name: torch.empty(shape) for name in ("x", "grad", "proposal", "proposal_grad")}
    given |= {name: torch.empty(0) for name in ("energy", "proposal_energy")}
    given["log_ratio"] = torch.empty(0, dtype=torch.float64)
    found = run({k: v for k, v in given.items() if k != "log_ratio"}, backend_device[1])
    assert found["accepted"].shape == found["log_ratio"].shape == (0,)
    assert metropolis(given, backend_device[1])["accepted"].shape == (0,)


def test_chains_without_elements(backend_device):
    given = case((3, 4), "plain") | {name: torch.empty(3, 0) for name in ("x", "grad", "proposal", "proposal_grad")}
    given |= {"energy": torch.tensor([0.0, 0.0, 0.0]), "proposal_energy": torch.tensor([-1.0, 1000.0, -2.0])}
    found = run(given, backend_device[1])
    assert found["accepted"].tolist() == [True, False, True]
    assert found["energy"].tolist() == [-1.0, 0.0, -2.0]


def test_what_is_read_may_lie_anyhow(backend_device):
    _, device = backend_device
    given = case((3, 2, 6, 6), "everything")
    expected = run(given, device)
    moved = {k: v.clone().to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
    for name in ("proposal", "proposal_energy", "proposal_grad", "schedule", "key", "chain_ids"):
        moved[name] = torch.stack([moved[name], moved[name] + 9], dim=-1)[..., 0]
        assert not moved[name].is_contiguous()
    states = [moved.pop(name) for name in STATES]
    accepted, log_ratio = ops.mala_step_(*states, **moved)
    for found, what in zip((*states[:3], accepted, log_ratio), expected, strict=True):
        assert torch.equal(found, expected[what])


def test_what_is_read_may_be_what_is_written(backend_device):
    """The gradient of a Gaussian at its proposal is the proposal; a chain may propose another one's state."""
    _, device = backend_device
    given = case((4, 6), "plain")
    x, energy, grad = (given[k].to(device) for k in ("x", "energy", "grad"))
    ratio = torch.tensor([math.inf, -math.inf] * 2, dtype=torch.float64, device=device)
    options = {"key": given["key"].to(device), "chain_ids": given["chain_ids"].to(device)}
    written = [t.clone() for t in (x, energy, grad)]
    proposals = (written[0][1:2].expand(4, 6), written[1], written[2][2:3].expand(4, 6))
    accepted = ops.metropolis_(*written, *proposals, ratio, **options)
    assert accepted.tolist() == [True, False, True, False]
    assert torch.equal(written[0], torch.stack([x[1], x[1], x[1], x[3]]))
    assert torch.equal(written[1], energy)
    assert torch.equal(written[2], torch.stack([grad[2], grad[1], grad[2], grad[3]]))


def test_what_is_written_must_lie_apart(backend_device):
    given = case((2, 4), "plain")
    x = given["x"].clone().to(backend_device[1])
    rest = [given[k].to(backend_device[1]) for k in STATES[3:]]
    options = {k: given[k].to(backend_device[1]) for k in ("schedule", "key", "chain_ids")}
    with pytest.raises(RuntimeError, match="x and grad are both written and must not share memory"):
        ops.mala_step_(x, given["energy"].to(x.device), x, *rest, **options)
    with pytest.raises(RuntimeError, match="x and energy are both written and must not share memory"):
        ops.mala_step_(x, x.view(-1)[:2], given["grad"].to(x.device), *rest, **options)


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_batch_can_be_split_anyhow(backend_device, name):
    given = case((6, 3, 5, 5), name)
    whole, parts = run(given, backend_device[1]), []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        ids, table = given["chain_ids"], given["schedule"]
        part = {k: given[k] for k in ("key", "grad_clip", "low", "high") if k in given} | {
            k: given[k][rows] for k in STATES
        }
        part |= {"chain_ids": ids[rows] if len(ids) > 1 else ids + rows.start}
        part |= {"schedule": table[:, rows] if table.dim() == 3 else table}
        parts.append(run(part, backend_device[1]))
    for what, value in whole.items():
        assert torch.equal(torch.cat([part[what] for part in parts]), value)


@pytest.mark.parametrize("threads", [1, 2])
def test_thread_count_does_not_matter(backend_device, threads):
    given = case((4, 3, 60, 100), "everything")
    expected = run(given, backend_device[1])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for what, value in run(given, backend_device[1]).items():
            assert torch.equal(value, expected[what])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [16, 256])
def test_block_size_does_not_matter(backend_device, rows, monkeypatch):
    name, device = backend_device
    if name != "triton":
        pytest.skip("only Triton's programs have a size to choose")
    given = case((5, 2, 8, 8), "everything")
    expected = run(given, device)
    monkeypatch.setattr("fastebm.ops.triton.philox.ROWS", rows)
    for what, value in run(given, device).items():
        assert torch.equal(value, expected[what])


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
        for shape in ((4, 3, 7, 5), (2, 3, 32, 32), (40, 2)):
            given = case(shape, name, state, dtype)
            found = run(given, "cpu")
            _C.set_variant("baseline")
            expected = run(given, "cpu")
            _C.set_variant(variant)
            for what, value in found.items():
                assert torch.equal(value, expected[what])


def test_reference_matches_compiled():
    """States to the bit; the ratio to the rounding of float64, in which the reference has no fused multiply-add."""
    if compiled_or_reference() != "cpp":
        pytest.skip("fastebm's C++ operators are not built")
    for name in OPTIONS:
        given = case((40, 3, 20, 20), name)
        found = []
        for backend in ("cpp", "reference"):
            with ops.backend(backend):
                found.append(run(given, "cpu"))
        for what in ("x", "energy", "grad"):
            assert ulps(found[0][what], found[1][what]) == 0, (name, what)
        assert torch.equal(found[0]["accepted"], found[1]["accepted"])
        torch.testing.assert_close(found[0]["log_ratio"], found[1]["log_ratio"], rtol=1e-12, atol=1e-12)


# Dispatcher, compiler, graphs ---------------------------------------------------------------------------------------


def operator_arguments(device: str, name: str) -> tuple[Any, ...]:
    given = case((3, 2, 4, 4), name)
    arguments = [given.get(k) for k in (*STATES, "schedule", "key", "chain_ids", "grad_clip", "low", "high")]
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in arguments)


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_opcheck(backend_device, name):
    arguments = operator_arguments(backend_device[1], name)
    torch.library.opcheck(torch.ops.fastebm.mala_step_.default, arguments)
    ratio = torch.tensor([0.0, -1.0, 1.0], dtype=torch.float64, device=backend_device[1])
    torch.library.opcheck(torch.ops.fastebm.metropolis_.default, (*arguments[:6], ratio, *arguments[7:9]))


def test_compiles_as_one_graph(backend_device):
    _, device = backend_device
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case((3, 2, 4, 4), "plain").items()}
    options = {k: given[k] for k in ("schedule", "chain_ids")}

    def steps(x: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        x = x.clone()
        energy, grad = x.square().flatten(1).sum(1) / 2, x.clone()
        for _ in range(3):
            y = torch.ops.fastebm.langevin_step(x, grad, given["schedule"], key, given["chain_ids"], *NO_STEP_OPTIONS)
            at_y = (y, y.square().flatten(1).sum(1) / 2, y.clone())
            _, ratio = ops.mala_step_(x, energy, grad, *at_y, key=key, **options)
            accepted = ops.metropolis_(x, energy, grad, *at_y, ratio, key=key, chain_ids=given["chain_ids"])
            key = key + torch.tensor([0, 1, 1], device=device)
        return x, energy, grad, accepted

    torch._dynamo.reset()
    compiled = torch.compile(steps, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(given["x"], given["key"]), steps(given["x"], given["key"]), strict=True):
        assert torch.equal(found, expected)


def test_works_in_inference_mode(backend_device):
    given = case((3, 2, 4, 4), "everything")
    expected = run(given, backend_device[1])
    with torch.inference_mode():
        for what, value in run(given, backend_device[1]).items():
            assert torch.equal(value, expected[what])


def test_captured_graph_replays_at_a_later_step(backend_device):
    name, device = backend_device
    if device != "cuda" or name == "reference":
        pytest.skip("CUDA graphs need a GPU and a compiled backend")
    arguments = operator_arguments(device, "everything")
    key, start, advance = arguments[7], [t.clone() for t in arguments[:8]], torch.tensor([0, 1, 1], device=device)

    def reset() -> None:
        for tensor, value in zip(arguments[:8], start, strict=True):
            tensor.copy_(value)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.ops.fastebm.mala_step_(*arguments)
    side.synchronize()
    reset()
    for _ in range(3):
        accepted, log_ratio = torch.ops.fastebm.mala_step_(*arguments)
        key += advance
    expected = [t.clone() for t in (*arguments[:3], accepted, log_ratio)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        accepted, log_ratio = torch.ops.fastebm.mala_step_(*arguments)
        key += advance
    reset()
    for _ in range(3):
        graph.replay()
    for found, right in zip((*arguments[:3], accepted, log_ratio), expected, strict=True):
        assert torch.equal(found, right)


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "chain"), [((0, 2**32, 0), 0), ((0, -1, 0), 0), ((0, 1, 0), 2**56 - 1), ((0, 1, 0), -1), ((0, 1, -1), 0)]
)
def test_addresses_out_of_range(backend_device, key, chain):
    _, device = backend_device
    given = case((2, 5), "plain") | {"key": torch.tensor(key), "chain_ids": torch.tensor([chain])}
    given["log_ratio"] = torch.zeros(2, dtype=torch.float64)
    step = {k: v for k, v in given.items() if k != "log_ratio"}
    if device == "cpu":
        with pytest.raises(RuntimeError, match=r"overflow|schedule index"):
            run(step, device)
        if key[2] >= 0:
            with pytest.raises(RuntimeError, match="overflow"):
                metropolis(given, device)
    else:
        found = run(step, device)
        lost = found["log_ratio"].isnan()
        assert bool(lost.any())
        assert not bool(found["accepted"][lost].any())


def test_out_of_range_is_nan_in_a_kernel(backend_device, monkeypatch):
    if backend_device != ("triton", "cpu"):
        pytest.skip("shown on the interpreter, whose check before the kernel is taken away here")
    monkeypatch.setattr("fastebm.ops.triton.mala.check_readable_address", lambda *_: None)
    monkeypatch.setattr("fastebm.ops.triton.mala.check_index", lambda *_: None)
    given = case((3, 8), "plain") | {"chain_ids": torch.tensor([2**56, 5, -1])}
    found = run(given, "cpu")
    assert found["log_ratio"].isnan().tolist() == found["energy"].isnan().tolist() == [True, False, True]
    assert found["accepted"].tolist()[::2] == [False, False]
    for key in ((0, 2**32, 0), (0, -1, 0), (0, 0, -1)):
        found = run(given | {"key": torch.tensor(key), "chain_ids": torch.tensor([5])}, "cpu")
        assert bool(found["log_ratio"].isnan().all())
        assert not bool(found["accepted"].any())


@pytest.mark.parametrize("which", STATES)
def test_autograd_is_refused(backend_device, which):
    device = backend_device[1]
    given = {k: v.to(device) for k, v in case((2, 4), "plain").items()}
    given[which].requires_grad_()
    states, ratio = [given[k] for k in STATES], torch.zeros(2, dtype=torch.float64, device=device)
    options = {k: given[k] for k in ("key", "chain_ids")}
    with pytest.raises(RuntimeError, match=r"mala_step_ has no derivative.*no_grad"):
        ops.mala_step_(*states, schedule=given["schedule"], **options)
    with pytest.raises(RuntimeError, match=r"metropolis_ has no derivative.*no_grad"):
        ops.metropolis_(*states, ratio, **options)
    with torch.no_grad():
        ops.mala_step_(*states, schedule=given["schedule"], **options)


WRONG_STATES = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"energy": 1.0}, TypeError, "energy must be a tensor, got float"),
    ({"proposal_grad": None}, TypeError, "proposal_grad must be a tensor, got NoneType"),
    ({"proposal": torch.zeros(2, 4).to_sparse()}, TypeError, "proposal must be a dense tensor"),
    ({"x": torch.zeros(())}, ValueError, "without dimensions"),
    ({"x": torch.zeros(2, 4, dtype=torch.float16)}, TypeError, "x must be float32"),
    ({"x": torch.zeros(4, 2).T}, ValueError, "x is written in place and must be contiguous"),
    ({"grad": torch.zeros(4, 2).T}, ValueError, "grad is written in place and must be contiguous"),
    ({"grad": torch.zeros(2, 4).double()}, TypeError, "grad must be float32 or bfloat16 or float16"),
    ({"grad": torch.zeros(2, 5)}, ValueError, "grad must have x's shape"),
    ({"proposal": torch.zeros(2, 5)}, ValueError, r"proposal must have x's shape \(2, 4\)"),
    ({"proposal": torch.zeros(2, 4).double()}, TypeError, "proposal must be float32 for x of torch.float32"),
    ({"proposal_grad": torch.zeros(2, 4).bfloat16()}, TypeError, "proposal_grad must be float32"),
    ({"proposal_grad": torch.zeros(2, 4, device="meta")}, ValueError, "proposal_grad must have x's shape"),
    ({"energy": torch.zeros(3)}, ValueError, r"energy must be float32 or float64 of shape \(2,\)"),
    ({"energy": torch.zeros(2, 1)}, ValueError, "energy must be float32 or float64"),
    ({"energy": torch.zeros(2).bfloat16()}, ValueError, "energy must be float32 or float64"),
    ({"energy": torch.zeros(4)[::2]}, ValueError, "energy is written in place and must be contiguous"),
    ({"proposal_energy": torch.zeros(2).double()}, ValueError, "proposal_energy must be float32 of shape"),
    ({"key": torch.zeros(2, dtype=torch.int64)}, ValueError, "key must be an int64 tensor"),
    ({"key": 0}, TypeError, "key must be a tensor, got int"),
    ({"chain_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, "chain_ids must be an int64 tensor"),
    ({"chain_ids": 0}, TypeError, "chain_ids must be a tensor, got int"),
]
WRONG_OPTIONS = [
    ({"schedule": 0.1}, TypeError, "schedule must be a tensor, got float"),
    ({"schedule": torch.zeros(1, 3)}, ValueError, "of .step size, noise std., got torch.float32"),
    (
        {"schedule": torch.zeros(1, 3, 2)},
        ValueError,
        r"schedule must be a float32 table \(steps, 2\) or \(steps, 2, 2\)",
    ),
    ({"schedule": torch.zeros(1, 2, device="meta")}, ValueError, "schedule must be on x's device"),
    ({"grad_clip": 0.0}, ValueError, "grad_clip must be positive"),
    ({"grad_clip": "1"}, TypeError, "grad_clip must be a real number"),
    ({"low": 1.0, "high": 1.0}, ValueError, "low < high, got 1.0 and 1.0"),
    ({"low": math.nan}, ValueError, "low < high, got nan and None"),
]
name_of_change = {"ids": lambda value: ",".join(value) if isinstance(value, dict) else None}


def arguments_of_zeros(change: Case) -> tuple[list[Any], Case]:
    zeros = {k: torch.zeros(2) if "energy" in k else torch.zeros(2, 4) for k in STATES}
    zeros |= {"key": rng.make_key(0), "chain_ids": torch.tensor([0]), **change}
    return [zeros.pop(k) for k in STATES], zeros


@pytest.mark.parametrize(("change", "error", "message"), WRONG_STATES + WRONG_OPTIONS, **name_of_change)
def test_errors_of_the_step(change, error, message):
    states, options = arguments_of_zeros({"schedule": torch.tensor([[0.1, 0.5]]), **change})
    with pytest.raises(error, match=message) as caught:
        ops.mala_step_(*states, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *WRONG_STATES,
        ({"log_ratio": 0.0}, TypeError, "log_ratio must be a tensor, got float"),
        ({"log_ratio": torch.zeros(2)}, ValueError, r"log_ratio must be float64 of shape \(2,\)"),
        ({"log_ratio": torch.zeros(3).double()}, ValueError, "log_ratio must be float64"),
    ],
    **name_of_change,
)
def test_errors_of_the_test(change, error, message):
    states, options = arguments_of_zeros({"log_ratio": torch.zeros(2).double(), **change})
    with pytest.raises(error, match=message) as caught:
        ops.metropolis_(*states, options.pop("log_ratio"), **options)
    assert "\n" not in str(caught.value)


def test_gradients_of_float64_states(backend_device):
    """A float64 state asks for float64 energies, whatever its gradient is."""
    if not supported(backend_device, torch.float64):
        pytest.skip("Triton's kernels have no float64")
    states, options = arguments_of_zeros({"schedule": torch.tensor([[0.1, 0.5]])})
    states = [t.double() for t in states]
    ops.mala_step_(*states, **options)
    assert_agrees(states[0], torch.zeros(2, 4).double(), backend_device)
    with pytest.raises(ValueError, match="energy must be float64"):
        ops.mala_step_(states[0], states[1].float(), *states[2:], **options)
