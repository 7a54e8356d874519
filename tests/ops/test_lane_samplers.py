"""`run_lane_sampler`: the bits of the operators that take its steps one by one, whatever runs beside."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from fastebm import ops, rng
from fastebm.ops import LaneSampler, SamplerOptions
from tests.ops.test_lanes import _C, mixed, quadratic, samples

pytestmark = pytest.mark.skipif(
    os.environ.get("FASTEBM_BACKEND") in ("triton", "cuda"), reason="lane programs have no kernel for a GPU"
)

OPTIONS = {
    "plain": (),
    "clip": ("clip",),
    "masses of elements": ("masses of elements",),
    "masses of chains": ("masses of chains",),
    "masses of all": ("masses of elements", "masses of chains"),
    "walls": ("walls",),
    "mask": ("mask",),
    "all": ("clip", "masses of elements", "masses of chains", "walls", "mask"),
}
every_kind = pytest.mark.parametrize("kind", list(LaneSampler), ids=lambda kind: kind.name)


def options_for(x: Tensor, kind: LaneSampler, rows: int, per_chain: bool, *used: str) -> SamplerOptions:
    """Options of chains x; each changes some chains or entries and leaves others."""
    generator = torch.Generator().manual_seed(2)
    batch, width = x.shape[0], x[0].numel()
    columns = 2 if kind == LaneSampler.MALA else 3
    schedule = 0.05 + 0.3 * torch.rand((rows, batch, columns) if per_chain else (rows, columns), generator=generator)
    if columns == 3:
        schedule[..., 1] = 1 - 0.5 * schedule[..., 1]
        if kind == LaneSampler.HMC:
            schedule[..., 1:] = torch.tensor([1.0, 0.0])
        elif per_chain:
            schedule[:, ::3, 1:] = torch.tensor([1.0, 0.0])  # chains without friction beside others
            schedule[:, 1::3, 2] = 0
    masses = None
    if "masses of elements" in used or "masses of chains" in used:
        shape = (batch if "masses of chains" in used else 1, width if "masses of elements" in used else 1)
        masses = 0.5 + torch.rand(shape, generator=generator)
    mask = torch.rand(x.shape, generator=generator) < 0.3 if "mask" in used else None
    if mask is not None and kind != LaneSampler.MALA:
        masses = (torch.ones(1, 1) if masses is None else masses) * (~mask).reshape(batch, -1)
    heat = 0.5 + torch.rand((rows, batch) if per_chain else (rows,), generator=generator)
    return SamplerOptions(
        int(kind),
        3 if kind == LaneSampler.HMC else 1,
        schedule,
        rng.make_key(7, 3),
        rng.make_chain_ids(2**40 + 5, batch),
        heat if kind == LaneSampler.HMC else None,
        None if kind == LaneSampler.MALA else masses,
        mask,
        0.4 if "clip" in used and kind == LaneSampler.MALA else None,
        -1.2 if "walls" in used else None,
        1.4 if "walls" in used else None,
    )


class Chains:
    """The state of chains: x, kept energy and gradient, and velocities."""

    def __init__(self, x: Tensor, program: tuple[Tensor, ...], options: SamplerOptions) -> None:
        if options.low is not None:
            x = x.clamp(options.low, options.high)
        self.x = x.clone()
        self.energy, self.gradient = torch.ops.fastebm.run_lanes(self.x, *program)
        if options.mask is not None:
            self.gradient.masked_fill_(options.mask, 0)
        kinetic = options.kind in (LaneSampler.BAOAB, LaneSampler.OBABO)
        self.velocity = 0.3 * x.flip(0).contiguous() if kinetic else None
        if self.velocity is not None and options.mask is not None:
            self.velocity.masked_fill_(options.mask, 0)

    def tensors(self) -> list[Tensor]:
        return [each for each in (self.x, self.energy, self.gradient, self.velocity) if each is not None]

    def advance(self, program: tuple[Tensor, ...], steps: int, options: SamplerOptions) -> Any:
        given = (self.x, self.energy, self.gradient, self.velocity, *program, steps)
        return torch.ops.fastebm.run_lane_sampler(*given, *options)


def one_by_one(chains: Chains, program: tuple[Tensor, ...], steps: int, options: SamplerOptions) -> Any:
    """The steps by the operators of each: the reference's loop with the backend that is chosen."""
    from fastebm.ops import lane_samplers

    tested = options.kind in (LaneSampler.MALA, LaneSampler.HMC)
    batch = len(chains.x)
    results = (
        torch.empty(steps, batch),
        torch.empty(steps if tested else 0, batch, dtype=torch.bool),
        torch.empty(steps if tested else 0, batch, dtype=torch.float64),
    )
    step = {LaneSampler.MALA: lane_samplers._mala, LaneSampler.HMC: lane_samplers._hmc}.get(
        LaneSampler(options.kind), lane_samplers._underdamped
    )
    one = torch.tensor([0, 1, 1])

    def evaluate(at: Tensor) -> tuple[Tensor, Tensor]:
        energy, gradient = torch.ops.fastebm.run_lanes(at, *program)
        return energy, gradient if options.mask is None else gradient.masked_fill_(options.mask, 0)

    for i in range(steps):
        results[0][i] = chains.energy
        outcome = step(chains.x, chains.energy, chains.gradient, chains.velocity, evaluate, options, one)
        if outcome is not None:
            results[1][i], results[2][i] = outcome
    return results


def assert_same(first: Any, second: Any) -> None:
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other) or (
            torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())
        )


@every_kind
@pytest.mark.parametrize("used", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("per_chain", [False, True], ids=["one schedule", "a schedule each"])
def test_many_steps_are_one_after_the_other(variant: str, kind: LaneSampler, used: Any, per_chain: bool) -> None:
    made, constants = mixed()
    program = (*made.encoded(), constants)
    for batch in (1, 2, 40):
        options = options_for(samples(batch), kind, 4, per_chain, *used)
        whole, single = Chains(samples(batch), program, options), Chains(samples(batch), program, options)
        found = whole.advance(program, 5, options._replace(key=(key := options.key.clone())))
        assert_same(found, one_by_one(single, program, 5, options))
        assert_same(whole.tensors(), single.tensors())
        assert key.tolist() == options.key.tolist() == [7, 8, 5]
        if options.mask is not None:
            start = samples(batch) if options.low is None else samples(batch).clamp(options.low, options.high)
            assert torch.equal(whole.x[options.mask], start[options.mask])


@every_kind
@pytest.mark.parametrize("sample", [1, 3, 64, 65, 1500])
def test_samples_of_all_sizes(variant: str, kind: LaneSampler, sample: int) -> None:
    """Sums are in one order; a single chain takes its elements side by side."""
    program = (*quadratic(sample).encoded(), torch.zeros(1))
    for batch in (1, 20):
        x = samples(batch, sample)
        options = options_for(x, kind, 4, True, "masses of elements", "walls")
        options = options._replace(
            schedule=options.schedule / options.schedule.new_tensor([sample**0.5, 1, 1][: options.schedule.shape[-1]])
        )
        whole, single = Chains(x, program, options), Chains(x, program, options)
        found = whole.advance(program, 3, options._replace(key=options.key.clone()))
        assert_same(found, one_by_one(single, program, 3, options))
        assert_same(whole.tensors(), single.tensors())


@every_kind
def test_bits_do_not_depend_on_the_batch_the_threads_or_the_instruction_set(variant: str, kind: LaneSampler) -> None:
    made, constants = mixed()
    program, start, threads = (*made.encoded(), constants), samples(150), torch.get_num_threads()
    whole = options_for(start, kind, 4, True, *OPTIONS["all"])

    def chains(first: int, last: int) -> Tensor:
        def part(each: Tensor | None) -> Tensor | None:
            return each[first:last].clone() if each is not None and len(each) == 150 else each

        options = whole._replace(
            schedule=whole.schedule[:, first:last].contiguous(),
            key=whole.key.clone(),
            chain_ids=whole.chain_ids + first,
            temperature=None if whole.temperature is None else whole.temperature[:, first:last].contiguous(),
            inverse_mass=part(whole.inverse_mass),
            mask=part(whole.mask),
        )
        made = Chains(start[first:last], program, options)
        if made.velocity is not None:
            made.velocity.copy_(0.3 * start[first:last]).masked_fill_(options.mask, 0)
        made.advance(program, 9, options)
        return made.x

    all_ = chains(0, 150)
    assert not torch.equal(all_, start)
    for size in (1, 7, 16, 64):
        parts = [chains(first, min(first + size, 150)) for first in range(0, 150, size)]
        assert_same([torch.cat(parts)], [all_])
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same([chains(0, 150)], [all_])
    finally:
        torch.set_num_threads(threads)
    _C.set_variant("baseline")
    assert_same([chains(0, 150)], [all_])


@every_kind
def test_float64_and_the_reference_agree(kind: LaneSampler) -> None:
    """Of a quadratic energy, where no test is on the edge: float32 kernels, and the reference in float64."""
    made = quadratic(6)
    program = (*made.encoded(), torch.zeros(1))
    options = options_for(samples(30), kind, 4, True, "masses of elements")
    narrow = Chains(samples(30), program, options)
    narrow_results = narrow.advance(program, 4, options._replace(key=options.key.clone()))
    wide_options = options._replace(
        key=options.key.clone(), inverse_mass=None if options.inverse_mass is None else options.inverse_mass.double()
    )
    wide_program = (*program[:2], program[2].double())
    wide = Chains(samples(30).double(), wide_program, wide_options)
    wide_results = wide.advance(wide_program, 4, wide_options)
    assert torch.allclose(narrow_results[2], wide_results[2], atol=2e-5)
    assert torch.equal(narrow_results[1], wide_results[1])
    for one, other in zip(narrow.tensors(), wide.tensors(), strict=True):
        assert torch.allclose(one.double(), other, atol=2e-5)
    with ops.backend("reference"):
        plain = Chains(samples(30), program, options)
        plain_results = plain.advance(program, 4, options._replace(key=options.key.clone()))
    assert torch.equal(plain_results[1], narrow_results[1])
    assert torch.allclose(plain.x, narrow.x, atol=2e-6)


@every_kind
def test_opcheck(kind: LaneSampler) -> None:
    made, constants = mixed()
    program = (*made.encoded(), constants)
    options = options_for(samples(5), kind, 2, False, *OPTIONS["all"])
    chains = Chains(samples(5), program, options)
    arguments = (chains.x, chains.energy, chains.gradient, chains.velocity, *program, 2, *options)
    torch.library.opcheck(torch.ops.fastebm.run_lane_sampler.default, arguments)


@every_kind
def test_no_chains_and_no_steps(kind: LaneSampler) -> None:
    made, constants = mixed()
    program = (*made.encoded(), constants)
    options = options_for(samples(3), kind, 2, False)
    chains = Chains(samples(3), program, options)
    before = [each.clone() for each in chains.tensors()]
    assert chains.advance(program, 0, options)[0].shape == (0, 3)
    assert_same(chains.tensors(), before)
    empty = Chains(samples(3)[:0], program, options._replace(mask=None))
    assert empty.advance(program, 2, options._replace(chain_ids=torch.zeros(1, dtype=torch.int64)))[0].shape == (2, 0)
    assert options.key.tolist() == [7, 5, 2]


@pytest.mark.parametrize(
    ("kind", "changed", "words"),
    [
        (LaneSampler.MALA, {"kind": 9}, "no sampler of kind 9"),
        (LaneSampler.HMC, {"num_leapfrogs": 0}, "num_leapfrogs >= 1"),
        (LaneSampler.HMC, {"temperature": None}, "temperatures"),
        (LaneSampler.MALA, {"schedule": torch.ones(1, 3)}, r"schedule must be a float32 table \(steps, 2\)"),
        (LaneSampler.BAOAB, {"schedule": torch.ones(1, 4, 3)}, r"schedule must be a float32 table \(steps, 3\)"),
        (LaneSampler.MALA, {"low": 0.0}, "low and high go together"),
        (LaneSampler.MALA, {"mask": torch.ones(3, 6)}, "mask must be torch.bool"),
        (LaneSampler.MALA, {"chain_ids": torch.zeros(2, dtype=torch.int64)}, "chain_ids must be"),
    ],
)
def test_bad_options_are_refused(kind: LaneSampler, changed: dict[str, Any], words: str) -> None:
    made, constants = mixed()
    program = (*made.encoded(), constants)
    options = options_for(samples(3), kind, 2, False)
    with pytest.raises(ValueError, match=words):
        Chains(samples(3), program, options).advance(program, 1, options._replace(**changed))


def test_tensors_that_share_memory_are_refused() -> None:
    made, constants = mixed()
    program = (*made.encoded(), constants)
    options = options_for(samples(3), LaneSampler.MALA, 2, False)
    chains = Chains(samples(3), program, options)
    chains.gradient = chains.x
    with pytest.raises(ValueError, match="share memory"):
        chains.advance(program, 1, options)
