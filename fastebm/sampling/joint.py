"""Several tensors as the state of one chain."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastebm.scalars import shown

Parts = tuple[Any, ...] | dict[str, Any]
"""What a chain's state consists of: one tensor for each part, in a tuple or by name."""


class Joint(nn.Module):
    """An energy of several tensors as an energy of one, `(B, N)`, which all samplers take.

    The parts of a chain lie side by side in the order given, each in row-major order. So an entry's noise is that of
    its place among the N numbers, and depends neither on the batch nor on the values.

    Args:
        energy: a module or function that gives one number for each sample. For a tuple of parts it is called as
            `energy(*parts, *conditions)`, for a dict as `energy(parts, *conditions)`. It may also be a score, which
            returns parts.
        example: a tuple or dict of tensors `(B, ...)`, such as the starts. Their shapes without B are those of the
            parts; values and B do not matter.

    Raises TypeError or ValueError for what is not that.

    Example:
        >>> import torch, fastebm
        >>> start = {"positions": torch.zeros(500, 4, 3), "strain": torch.zeros(500)}
        >>> joint = fastebm.Joint(
        ...     lambda s: 0.5 * s["positions"].square().sum((1, 2)) + 2 * s["strain"].square(), start
        ... )
        >>> sampler = fastebm.Underdamped(joint, 0.3, 1.0, mass=joint.spread({"positions": 1.0, "strain": 4.0}))
        >>> end = joint.unpack(sampler.sample(joint.pack(start), num_steps=100, seed=0))
        >>> end["positions"].shape, 0.4 < float(end["strain"].std()) < 0.6
        (torch.Size([500, 4, 3]), True)
    """

    def __init__(self, energy: Callable[..., Any], example: Parts) -> None:
        super().__init__()
        if not callable(energy):
            raise TypeError(f"energy is a {type(energy).__name__}; it must be a module or a function of the parts")
        if not isinstance(example, tuple | Mapping) or not example:
            raise TypeError(f"the parts must be a tuple or dict of tensors, got {shown(example)}")
        self.energy = energy
        inner: Any = energy
        while isinstance(inner, functools.partial):
            inner = inner.func
        owner = getattr(inner, "__self__", inner)
        # The module of a bound method or a partial is registered, for its flags and weights.
        self.owner = owner if isinstance(owner, nn.Module) and owner is not energy else None
        self.names = tuple(example) if isinstance(example, Mapping) else None
        self.shapes: tuple[torch.Size, ...] = ()
        parts = self._listed(example)
        for name, part in zip(self._shown_names(len(parts)), parts, strict=True):
            if not isinstance(part, Tensor) or not part.dim():
                raise TypeError(f"part {name} must be a tensor (B, ...), got {shown(part)}")
        self.shapes = tuple(part.shape[1:] for part in parts)
        self.sizes = [math.prod(shape) for shape in self.shapes]

    def forward(self, x: Tensor, *conditions: Tensor) -> Tensor:
        """What the energy says of states `(B, N)`: `(B,)`; of a score `(B, N)`."""
        parts = self.unpack(x)
        found = self.energy(*((parts,) if isinstance(parts, dict) else parts), *conditions)
        return found if isinstance(found, Tensor) else self.pack(found)

    def pack(self, parts: Parts) -> Tensor:
        """Parts `(B, ...)` of one dtype as one tensor `(B, N)`: starts, known values, velocities, masks.

        Raises TypeError or ValueError where they don't have the names, the shapes, one B or one dtype.
        """
        given = self._listed(parts)
        for name, part, shape in zip(self._shown_names(len(given)), given, self.shapes, strict=True):
            if not isinstance(part, Tensor) or part.shape != (*given[0].shape[:1], *shape):
                batch = given[0].shape[0] if isinstance(given[0], Tensor) and given[0].dim() else "B"
                wanted = ", ".join(map(str, (batch, *shape)))
                raise ValueError(f"part {name} must be a tensor ({wanted}{'' if shape else ','}), got {shown(part)}")
            if part.dtype != given[0].dtype:
                raise TypeError(f"the parts must be of one dtype, got {given[0].dtype} and, as {name}, {part.dtype}")
        return torch.cat([part.flatten(1) if part.dim() > 1 else part[:, None] for part in given], 1)

    def unpack(self, x: Tensor) -> Any:
        """The parts of `(..., N)`, each `(..., *its shape)`, as the energy gets them: views where that is possible.

        Dimensions in front may be those of chains, or of a trajectory of chains.
        """
        if not isinstance(x, Tensor) or not x.dim() or x.shape[-1] != sum(self.sizes):
            raise ValueError(f"a joint state has shape (..., {sum(self.sizes)}), got {shown(x)}")
        pieces = zip(x.split(self.sizes, -1), self.shapes, strict=True)
        parts = tuple(piece.reshape(*x.shape[:-1], *shape) for piece, shape in pieces)
        return parts if self.names is None else dict(zip(self.names, parts, strict=True))

    def spread(self, values: Parts) -> Tensor:
        """A value for each entry, `(N,)`, from a number or tensor for each part: masses and masks of all chains.

        Raises ValueError where a value doesn't broadcast to its part of one sample.
        """
        given = self._listed(values)
        spread = []
        for name, value, shape in zip(self._shown_names(len(given)), given, self.shapes, strict=True):
            try:
                tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
                spread.append(tensor.expand(shape).flatten())
            except (RuntimeError, TypeError, ValueError):
                raise ValueError(
                    f"part {name} must be a number, or broadcast to {tuple(shape)}, got {shown(value)}"
                ) from None
        return torch.cat(spread)

    def _listed(self, parts: Any) -> tuple[Any, ...]:
        """The parts in order. Raises TypeError or ValueError for others than those of this state."""
        if self.names is None:
            if not isinstance(parts, tuple | list) or (self.shapes and len(parts) != len(self.shapes)):
                raise TypeError(f"the parts are a tuple of {len(self.shapes)}, got {shown(parts)}")
            return tuple(parts)
        if not isinstance(parts, Mapping):
            raise TypeError(f"the parts are a dict with {list(self.names)}, got {shown(parts)}")
        if set(parts) != set(self.names):
            raise ValueError(f"the parts are {list(self.names)}, got {list(parts)}")
        return tuple(parts[name] for name in self.names)

    def _shown_names(self, count: int) -> tuple[Any, ...]:
        return tuple(range(count)) if self.names is None else tuple(map(repr, self.names))

    def extra_repr(self) -> str:
        """The parts and their shapes, of one sample."""
        shapes = [tuple(shape) for shape in self.shapes]
        return str(tuple(shapes) if self.names is None else dict(zip(self.names, shapes, strict=True)))
