"""The gallery of energies: which engine runs each, its gradient against float64, and its bits in split batches.

Every energy of `benchmarks/energies` is captured once. What falls to autograd is listed here with the reason, so that
nothing falls silently, and what runs again leaves the list.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

import fastebm
from benchmarks.energies import GALLERY, Entry, true_gradient
from benchmarks.energies.entry import Energy, engine_of
from fastebm.ops import backends

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5
BATCH = 5

# Energies that no program runs, and what their gradients say about it.
BY_AUTOGRAD: dict[str, str] = {}
# Energies that run by programs of single operations of PyTorch.
ON_STOCK_OPERATIONS: set[str] = set()
# Energies at whose capture PyTorch says something, of those that are watched.
WATCHED = (
    "mixture, distributions",
    "vmap",
    "Morse cluster",
    "Gaussian by Cholesky",
    "Gaussian, distributions",
    "GRU",
    "U-Net",
)
NOISY: set[str] = set()
# Energies whose gradient at equal entries depends on the order in which a sort leaves them.
CHOOSES_AMONG_TIES = {"order statistics"}

pytestmark = pytest.mark.skipif(
    not backends.runs_compiled("run_lanes"), reason="lane programs need the compiled operators"
)


@dataclass
class Captured:
    """An entry's energy, and its gradient after a first call."""

    entry: Entry
    energy: Energy
    gradient: fastebm.EnergyGradient
    engine: str

    def states(self, scale: float) -> Tensor:
        return self.entry.start(BATCH, Generator().manual_seed(1), scale)


@functools.cache
def captured(entry: Entry) -> Captured:
    energy = entry.make()
    gradient = fastebm.energy_gradient(energy)
    gradient(entry.start(BATCH, Generator().manual_seed(0)))
    return Captured(entry, energy, gradient, engine_of(gradient))


every_energy = pytest.mark.parametrize("entry", GALLERY, ids=lambda entry: entry.name)


def test_the_gallery_names_each_energy_once_with_its_source():
    assert len({entry.name for entry in GALLERY}) == len(GALLERY) >= 60
    assert all(entry.source and entry.kind for entry in GALLERY)
    assert not [entry.name for entry in GALLERY if "|" in entry.name + entry.source]  # they are cells of a table
    assert all({1, 64} <= {*entry.batches} for entry in GALLERY)


@every_energy
def test_gradients_are_those_of_float64_at_every_scale(entry: Entry):
    found = captured(entry)
    for scale in entry.scales:
        x = found.states(scale)
        before = x.clone()
        energies, gradient = found.gradient(x)
        truth = true_gradient(found.energy, x)
        assert truth.isfinite().all()
        assert truth.any()
        assert (gradient.double() - truth).norm() <= TOLERANCE * truth.norm()
        assert energies.shape == (BATCH,)
        assert energies.isfinite().all()
        assert torch.equal(x, before)


def test_bfloat16_is_within_twice_the_error_of_autocast():
    """On fused kernels; lane programs compute in float32 where there are no matrix units."""
    errors = {}
    for entry in (entry for entry in GALLERY if captured(entry).engine == "fused"):
        energy = captured(entry).energy
        gradient = fastebm.energy_gradient(energy, dtype=torch.bfloat16)
        for scale in entry.scales:
            # Many of what is small: a single state of a heavy tail can decide an error.
            x = entry.start(256 if len(entry.shape) == 1 else 32, Generator().manual_seed(5), scale)
            truth, leaf = true_gradient(energy, x), x.clone().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                energies = energy(leaf)
            (by_autocast,) = torch.autograd.grad(energies.float().sum(), leaf)
            error, allowed = ((part.double() - truth).norm() for part in (gradient(x)[1], by_autocast))
            errors[entry.name, scale] = float(error / allowed)
    assert errors
    assert {key: ratio for key, ratio in errors.items() if not ratio <= 2} == {}


# States outside of a domain, and those with several right gradients, have nothing to compare.
SPECIAL = [
    pytest.param(entry, where, id=f"{entry.name}-{where}")
    for entry in GALLERY
    for where in ("zeros", "ones", "far")
    if entry.clamp is None and (where == "far" or entry.name not in CHOOSES_AMONG_TIES)
]


@pytest.mark.parametrize(("entry", "where"), SPECIAL)
def test_gradients_at_special_states_are_as_good_as_those_of_autograd(entry: Entry, where: str):
    """Equal states, where kinks and ties are, and states 100 times as far out: what is not finite is so in both."""
    found = captured(entry)
    x = {"zeros": torch.zeros_like, "ones": torch.ones_like, "far": lambda x: 100 * x}[where](found.states(1.0))
    leaf = x.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(found.energy(leaf).sum(), leaf)
    gradient, truth = found.gradient(x)[1], true_gradient(found.energy, x)
    assert torch.equal(gradient.isfinite(), by_autograd.isfinite())
    known = by_autograd.isfinite() & truth.isfinite()
    error, allowed = ((part.double() - truth)[known].norm() for part in (gradient, by_autograd))
    assert error <= max(TOLERANCE * truth[known].norm(), 3 * allowed)


@every_energy
def test_bits_are_the_same_in_split_batches_where_a_program_of_ours_runs(entry: Entry):
    found = captured(entry)
    if found.engine in ("autograd", "stock"):
        assert entry.name in BY_AUTOGRAD or entry.name in ON_STOCK_OPERATIONS  # these promise no bits
        return
    x = found.states(1.0)
    whole, split = found.gradient(x), [found.gradient(part) for part in x.split([1, 3, 1])]
    for together, parts in zip(whole, zip(*split, strict=True), strict=True):
        assert torch.equal(together, torch.cat(parts))


@every_energy
def test_chains_stay_finite_and_in_the_domain(entry: Entry):
    """With the step size that the benchmark takes; `sample` raises where an energy or a state is not finite."""
    found = captured(entry)
    sampler = fastebm.Langevin(found.gradient, entry.step_size, entry.noise_std, clamp=entry.clamp)
    x = sampler.sample(entry.start(16, Generator().manual_seed(2)), 50, seed=0)
    low, high = entry.clamp or (-1e4, 1e4)
    assert ((x >= low) & (x <= high)).all()


@pytest.mark.parametrize(
    "entry",
    [entry for entry in GALLERY if entry.name not in BY_AUTOGRAD.keys() | ON_STOCK_OPERATIONS],
    ids=lambda e: e.name,
)
def test_chains_have_the_same_bits_in_any_split_and_step_by_step(entry: Entry):
    found = captured(entry)
    sampler = fastebm.Langevin(found.gradient, entry.step_size, entry.noise_std, clamp=entry.clamp)
    x, num_steps = entry.start(19, Generator().manual_seed(2)), 8
    whole = sampler.sample(x, num_steps, seed=0)
    parts = [sampler.sample(x[i:j], num_steps, seed=0, chain_ids=i) for i, j in ((0, 1), (1, 18), (18, 19))]
    assert torch.equal(whole, torch.cat(parts))
    state = sampler.init(x, seed=0)
    with found.gradient.chain():
        for _ in range(num_steps):
            state, _ = sampler.step(state)
    assert torch.equal(whole, state.x)


def test_no_energy_falls_silently():
    engines = {entry.name: captured(entry) for entry in GALLERY}
    fallen = {name: found.gradient.reason for name, found in engines.items() if found.engine == "autograd"}
    assert fallen.keys() == BY_AUTOGRAD.keys(), {
        name: fallen.get(name, "runs now: take it out of BY_AUTOGRAD") for name in fallen.keys() ^ BY_AUTOGRAD.keys()
    }
    assert {name: part for name, part in BY_AUTOGRAD.items() if part not in fallen[name]} == {}
    assert {name for name, found in engines.items() if found.engine == "stock"} == ON_STOCK_OPERATIONS
    assert all(name in repr(engines[name].gradient) or fallen[name] in repr(engines[name].gradient) for name in fallen)


def test_captures_print_nothing():
    """In a process of its own, because PyTorch's logs and warnings reach the terminal past pytest and Python."""
    program = f"""
import sys, torch, fastebm
from benchmarks.energies import GALLERY
for entry in GALLERY:
    if entry.name in {WATCHED}:
        print("==", entry.name, file=sys.stderr, flush=True)
        fastebm.energy_gradient(entry.make())(entry.start(4, torch.Generator().manual_seed(0)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    said = dict(part.split("\n", 1) for part in done.stderr.split("== ")[1:])
    assert said.keys() == {*WATCHED}
    assert {name for name, text in said.items() if text.strip()} == NOISY, said
