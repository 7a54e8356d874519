"""The measurement behind `fastebm bench`: Langevin chains of one energy, the user's or ours, against the baselines."""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastebm.compiler import energy_gradient
from fastebm.compiler.faults import FaultWarning
from fastebm.evaluation.speed.baselines import Updates
from fastebm.evaluation.speed.comparison import Plan, reason
from fastebm.evaluation.speed.eager import Energy, module_of
from fastebm.evaluation.speed.energies import compare_chains
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.evaluation.speed.rows import Run, write_runs
from fastebm.models import CoarseToFineEnergy
from fastebm.runs.files import check_writable
from fastebm.runs.nets import initialized

# Small against [-1, 1], to which the chains are clamped; the time of an update does not depend on them.
_STEP_SIZE, _NOISE_STD = 0.1, 0.01


def bench(
    energy: str | None,
    shape: tuple[int, ...],
    *,
    batch: int,
    dtype: torch.dtype,
    num_steps: int,
    rounds: int,
    engine: str,
    device: str,
    out: Path | None,
    overwrite: bool = False,
    log: Callable[[str], None],
) -> Run:
    """Measures chains of `num_steps` updates and writes the rows to `out` if that is given.

    Args:
        energy: `package.module:factory`, or None for the CF-EBM net of images of `shape`.
        shape: of a sample.
        batch, num_steps, rounds: chains at a time, updates of each, rounds of the comparison; at least 1.
        dtype: in which energies run, `torch.float32` or `torch.bfloat16`.
        engine: of our gradient, as `energy_gradient` takes it.
        device: "cpu" or "cuda".
        out: a .json file in a folder that exists; it must not be there itself unless `overwrite` is given.
        log: called with a line before anything that takes long.

    Raises ValueError, in one line, for a wrong argument and for an energy that can't be measured.
    """
    for name, value in (("batch", batch), ("num-steps", num_steps), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if out is not None and out.suffix != ".json":
        raise ValueError(f"--out must end in .json, got {out}")
    if out is not None:
        check_writable(out, overwrite=overwrite)
    net = _energy(energy, shape, device)
    name = f"CF-EBM {shape[-1]}x{shape[-1]}" if energy is None else energy
    plan = Plan("bench", name, shape, batch, dtype, engine, device, rounds, log=log)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FaultWarning)  # what is slower because something failed is no result
            rows = compare_chains(net, plan, Updates.constant(num_steps, _STEP_SIZE, _NOISE_STD))
    except (ArithmeticError, FaultWarning, RuntimeError, TypeError) as error:
        raise ValueError(f"{name} can't be measured: {reason(error)}") from error
    run = Run(machine_facts(device), tuple(rows))
    if out is not None:
        write_runs(out, [run])
    return run


def list_candidates(
    energy: str | None, shape: tuple[int, ...], *, batch: int, dtype: torch.dtype, engine: str, device: str
) -> list[str]:
    """A line for each way to run the gradient of the energy, fastest first, with its time and whether it is chosen.

    The arguments are those of `bench`. Empty for an engine that leaves no choice.
    """
    if engine == "autograd":
        return []
    plan = Plan("bench", "", shape, batch, dtype, engine, device, 1, log=lambda line: None)
    timings = energy_gradient(_energy(energy, shape, device), dtype=dtype, engine=engine).timings(plan.samples())
    lines = []
    for timing in sorted(timings, key=lambda each: math.inf if each.seconds is None else each.seconds):
        spent = f"no: {timing.refused}" if timing.seconds is None else f"{1e6 * timing.seconds:.1f} us"
        bits = ", same bits in any batch" if timing.batch_invariant else ""
        lines.append(f"{timing.name}: {spent}{bits}{' <- chosen' if timing.chosen else ''}")
    return lines


def _energy(energy: str | None, shape: tuple[int, ...], device: str) -> Energy:
    return _coarse_to_fine(shape, device) if energy is None else load_energy(energy, shape, device)


def parse_shape(text: str) -> tuple[int, ...]:
    """ "3,32,32" as (3, 32, 32). Raises ValueError for anything but positive numbers with commas between."""
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1 or math.prod(shape) > 2**31:
        raise ValueError(f"--shape must be positive numbers with commas between, like 3,32,32; got {text!r}")
    return shape


def _coarse_to_fine(shape: tuple[int, ...], device: str) -> Energy:
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError(f"without --energy the samples must be square images, like 3,32,32; --shape is {shape}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = initialized(lambda: CoarseToFineEnergy(shape[1], shape[0], lowest=min(8, shape[1])), device)
    return net.eval()


def load_energy(name: str, shape: tuple[int, ...], device: str) -> Energy:
    """The energy that the factory `package.module:factory` returns, on `device`; the current folder is searched too.

    Raises ValueError, in one line, for a name that leads nowhere, a factory that fails, and a result that is no energy
    of samples of `shape`.
    """
    factory = _factory(name)
    try:
        energy = factory()
    except (Exception, SystemExit) as error:
        raise ValueError(f"--energy {name}: the factory failed: {reason(error)}") from error
    if not callable(energy):
        raise ValueError(f"--energy {name} returned a {type(energy).__name__}; it must be a module or a function of x")
    module = module_of(energy)
    if module is not None:
        module.to(device).eval()
    _check(name, energy, torch.zeros(2, *shape, device=device))
    return energy


def _factory(name: str) -> Callable[[], Energy]:
    path, colon, attribute = name.partition(":")
    if not (path and colon and attribute):
        raise ValueError(f"--energy must be package.module:factory, got {name!r}")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        factory = importlib.import_module(path)
    except Exception as error:
        raise ValueError(f"--energy {name}: {path} can't be imported: {reason(error)}") from error
    finally:
        sys.path.remove(here)
    for part in attribute.split("."):
        if not hasattr(factory, part):
            raise ValueError(f"--energy {name}: {path} has no {attribute}")
        factory = getattr(factory, part)
    if not callable(factory):
        raise ValueError(f"--energy {name} is a {type(factory).__name__}; it must be a function that makes the energy")
    return factory


@torch.no_grad()
def _check(name: str, energy: Energy, x: Tensor) -> None:
    shape = "x".join(map(str, x.shape))
    try:
        energies = energy(x)
    except Exception as error:
        raise ValueError(f"--energy {name} fails on samples of {shape}: {reason(error)}") from error
    if not isinstance(energies, Tensor):
        raise ValueError(f"--energy {name} returned a {type(energies).__name__} for x of {shape}, not a tensor")
    if energies.ndim == 0 or energies.shape[0] != len(x) or energies.numel() != len(x):
        raise ValueError(
            f"--energy {name} returned shape {tuple(energies.shape)} for x of {shape}; an energy is one number a sample"
        )
