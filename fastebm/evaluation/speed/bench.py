"""What `fastebm bench` does: Langevin chains of one energy, anyone's, against stock PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from fastebm.evaluation.speed.baselines import Updates
from fastebm.evaluation.speed.comparison import Plan, reason
from fastebm.evaluation.speed.eager import Energy
from fastebm.evaluation.speed.energies import compare_chains
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.evaluation.speed.own_energy import load_energy
from fastebm.evaluation.speed.rows import Run, write_runs
from fastebm.models import CoarseToFineEnergy

# Small against [-1, 1], to which the chains are clamped: what an update costs doesn't depend on them.
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
    say: Callable[[str], None],
) -> Run:
    """Measures chains of `num_steps` updates and writes the rows to `out` if that is given.

    Args:
        energy: `package.module:factory`, or None for the CF-EBM net of images of `shape`.
        shape: of a sample.
        batch, num_steps, rounds: chains at a time, updates of each, rounds of the comparison; at least 1.
        dtype: in which energies run, `torch.float32` or `torch.bfloat16`.
        engine: of ours, as `energy_gradient` has it.
        device: "cpu" or "cuda".
        out: a .json file in a folder that exists.
        say: called with lines that tell what goes on.

    Raises ValueError for what was given wrongly, in one line.
    """
    for name, value in (("batch", batch), ("num_steps", num_steps), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    _check_out(out)
    net = _coarse_to_fine(shape, device) if energy is None else load_energy(energy, shape, device)
    name = f"CF-EBM {shape[-1]}x{shape[-1]}" if energy is None else energy
    plan = Plan("bench", name, shape, batch, dtype, engine, device, rounds, say=say)
    try:
        rows = compare_chains(net, plan, Updates.constant(num_steps, _STEP_SIZE, _NOISE_STD))
    except (ArithmeticError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name} can't be measured: {reason(error)}") from error
    run = Run(machine_facts(device), tuple(rows))
    if out is not None:
        write_runs(out, [run])
    return run


def parsed_shape(text: str) -> tuple[int, ...]:
    """ "3,32,32" as (3, 32, 32). Raises ValueError for what is not positive numbers with commas between."""
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
        net = CoarseToFineEnergy(shape[1], shape[0], lowest=min(8, shape[1]))
    return net.to(device).eval()


def _check_out(out: Path | None) -> None:
    if out is None:
        return
    if out.suffix != ".json":
        raise ValueError(f"--out must end in .json, got {out}")
    if not out.parent.is_dir():
        raise ValueError(f"the folder {out.parent} of --out does not exist")
