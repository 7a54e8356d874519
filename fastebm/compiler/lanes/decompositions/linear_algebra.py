"""Factorisations of small matrices of the sample, column by column, as LAPACK goes: with pivots where it has them.

A permutation that depends on the sample is a choice between rows. Matrices beyond `LARGEST` are left alone.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .constants import literal

aten = torch.ops.aten

LARGEST = 12


def _square(a: Tensor) -> bool:
    return a.shape[-1] == a.shape[-2] <= LARGEST


def _info(a: Tensor) -> Tensor:
    return a.new_zeros(a.shape[:-2], dtype=torch.int32)


def cholesky_ex(a: Tensor, *, upper: bool = False, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    if not _square(a):
        return NotImplemented
    n = a.shape[-1]
    a = a.mT if upper else a
    columns: list[Tensor] = []
    for j in range(n):
        rest = a[..., j:, j]
        if columns:
            left = torch.stack([column[..., j:] for column in columns], -1)
            rest = rest - (left * left[..., :1, :]).sum(-1)
        columns.append(torch.nn.functional.pad(rest / rest[..., :1].sqrt(), (j, 0)))
    factor = torch.stack(columns, -1)
    return (factor.mT if upper else factor), _info(a)


def solve_triangular(a: Tensor, b: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Tensor:
    """By substitution, row after row."""
    if not _square(a):
        return NotImplemented
    if not left:
        return solve_triangular(a.mT, b.mT, upper=not upper, unitriangular=unitriangular).mT
    n = a.shape[-1]
    rows: dict[int, Tensor] = {}
    for i in reversed(range(n)) if upper else range(n):
        rest = b[..., i, :]
        done = sorted(rows)
        if done:
            known = torch.stack([rows[k] for k in done], -2)
            rest = rest - (a[..., i, done[0] : done[-1] + 1].unsqueeze(-1) * known).sum(-2)
        rows[i] = rest if unitriangular else rest / a[..., i, i].unsqueeze(-1)
    return torch.stack([rows[i] for i in range(n)], -2)


def _swapped(rows: Tensor, chosen: Tensor) -> Tensor:
    """The first of `rows` (..., r, n) and the one where `chosen` (..., r) is true change places."""
    mask = chosen.unsqueeze(-1)
    top = torch.where(mask, rows, 0.0).sum(-2, keepdim=True)
    rest = torch.where(mask, rows[..., :1, :], rows)
    return torch.cat([top, rest[..., 1:, :]], -2)


def _one_hot(index: Tensor, n: int) -> Tensor:
    return index.unsqueeze(-1) == literal(lambda: torch.arange(n, device="cpu"), index)


def lu_factor_ex(a: Tensor, *, pivot: bool = True, check_errors: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Both factors in one matrix, and the row that came to each place, counted from 1."""
    if not _square(a) or not pivot:
        return NotImplemented
    n = a.shape[-1]
    done, pivots = [], []
    for k in range(n):
        size = a[..., k].abs()
        largest = size.amax(-1, keepdim=True)
        places = literal(functools.partial(torch.arange, n - k), a)
        first = torch.where(size == largest, places, n).amin(-1)
        pivots.append(first + (k + 1))
        a = _swapped(a, _one_hot(first, n - k))
        top, rest = a[..., :1, :], a[..., 1:, :]
        done.append(top)
        if k < n - 1:
            factor = rest[..., k : k + 1] / top[..., k : k + 1]
            a = torch.cat([rest[..., :k], factor, rest[..., k + 1 :] - factor * top[..., k + 1 :]], -1)
    return torch.cat(done, -2), torch.stack(pivots, -1).to(torch.int32), _info(a)


def _permuted(b: Tensor, pivots: Tensor, back: bool) -> Tensor:
    n = b.shape[-2]
    for k in reversed(range(n)) if back else range(n):
        place = pivots[..., k] - (k + 1)
        b = torch.cat([b[..., :k, :], _swapped(b[..., k:, :], _one_hot(place, n - k))], -2)
    return b


def lu_solve(lu: Tensor, pivots: Tensor, b: Tensor, *, left: bool = True, adjoint: bool = False) -> Tensor:
    if not _square(lu):
        return NotImplemented
    if not left:
        return lu_solve(lu, pivots, b.mT, adjoint=not adjoint).mT
    if adjoint:
        y = solve_triangular(lu.mT, b, upper=False)
        return _permuted(solve_triangular(lu.mT, y, upper=True, unitriangular=True), pivots, True)
    y = solve_triangular(lu, _permuted(b, pivots, False), upper=False, unitriangular=True)
    return solve_triangular(lu, y, upper=True)


def _as_kept(a: Tensor) -> Tensor:
    """What PyTorch factorises: its backward formulas take a contiguous matrix to have been transposed."""
    return a.mT if a.is_contiguous() else a


def solve_ex(
    a: Tensor, b: Tensor, *, left: bool = True, check_errors: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _square(a):
        return NotImplemented
    vector = b.ndim == a.ndim - 1
    lu, pivots, info = lu_factor_ex(_as_kept(a))
    solution = lu_solve(lu, pivots, b.unsqueeze(-1) if vector else b, left=left, adjoint=a.is_contiguous())
    return (solution.squeeze(-1) if vector else solution), lu, pivots, info


def inv_ex(a: Tensor, *, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    if not _square(a):
        return NotImplemented
    eye = literal(lambda: torch.eye(a.shape[-1], device="cpu"), a).expand(a.shape)
    lu, pivots, info = lu_factor_ex(a)
    return lu_solve(lu, pivots, eye), info


def _sign(pivots: Tensor) -> Tensor:
    """-1 where an odd number of rows changed places."""
    moved = pivots != literal(lambda: torch.arange(1, pivots.shape[-1] + 1, device="cpu"), pivots)
    return torch.where(moved, -1.0, 1.0).prod(-1)


def det(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not _square(a):
        return NotImplemented
    lu, pivots, _ = lu_factor_ex(_as_kept(a))
    return _sign(pivots) * lu.diagonal(0, -2, -1).prod(-1), lu, pivots


def slogdet(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _square(a):
        return NotImplemented
    lu, pivots, _ = lu_factor_ex(_as_kept(a))
    diagonal = lu.diagonal(0, -2, -1)
    return _sign(pivots) * diagonal.sign().prod(-1), diagonal.abs().log().sum(-1), lu, pivots


def cholesky_solve(b: Tensor, factor: Tensor, upper: bool = False) -> Tensor:
    if not _square(factor):
        return NotImplemented
    lower = factor.mT if upper else factor
    return solve_triangular(lower.mT, solve_triangular(lower, b, upper=False), upper=True)


def cholesky_inverse(factor: Tensor, upper: bool = False) -> Tensor:
    eye = literal(lambda: torch.eye(factor.shape[-1], device="cpu"), factor).expand(factor.shape)
    return cholesky_solve(eye, factor, upper)


TABLE: dict[Any, Any] = {
    aten.linalg_cholesky_ex.default: cholesky_ex,
    aten.linalg_solve_triangular.default: solve_triangular,
    aten.linalg_lu_factor_ex.default: lu_factor_ex,
    aten.linalg_lu_solve.default: lu_solve,
    aten._linalg_solve_ex.default: solve_ex,
    aten.linalg_inv_ex.default: inv_ex,
    aten._linalg_det.default: det,
    aten._linalg_slogdet.default: slogdet,
    aten.cholesky_solve.default: cholesky_solve,
    aten._cholesky_solve_helper.default: cholesky_solve,
    aten.cholesky_inverse.default: cholesky_inverse,
}
