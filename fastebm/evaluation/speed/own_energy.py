"""Somebody's own energy, named as `package.module:factory` on the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastebm.evaluation.speed.comparison import reason
from fastebm.evaluation.speed.eager import Energy, module_of


def load_energy(name: str, shape: tuple[int, ...], device: str) -> Energy:
    """What the factory `package.module:factory` returns, on `device`; the current folder is searched as well.

    Raises ValueError, in one line, for a name that leads nowhere, a factory that fails, and a result that is no energy
    of samples of `shape`.
    """
    factory = _factory(name)
    try:
        energy = factory()
    except Exception as error:
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
        module = importlib.import_module(path)
    except Exception as error:
        raise ValueError(f"--energy {name}: {path} can't be imported: {reason(error)}") from error
    finally:
        sys.path.remove(here)
    factory = module
    for part in attribute.split("."):
        if not hasattr(factory, part):
            raise ValueError(f"--energy {name}: {path} has no {attribute}")
        factory = getattr(factory, part)
    if not callable(factory):
        raise ValueError(f"--energy {name} is a {type(factory).__name__}; it must be a function that makes the energy")
    return factory


@torch.no_grad()
def _check(name: str, energy: Energy, x: Tensor) -> None:
    given = "x".join(map(str, x.shape))
    try:
        energies = energy(x)
    except Exception as error:
        raise ValueError(f"--energy {name} fails on samples of {given}: {reason(error)}") from error
    if not isinstance(energies, Tensor):
        raise ValueError(f"--energy {name} returned a {type(energies).__name__} for x of {given}, not a tensor")
    if energies.ndim == 0 or energies.shape[0] != len(x) or energies.numel() != len(x):
        raise ValueError(
            f"--energy {name} returned shape {tuple(energies.shape)} for x of {given}; an energy is one number a sample"
        )
