"""Elementary and special functions over their whole domains, tails included: number for number against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastebm import ops
from fastebm.compiler.lanes import LaneExecutor, lower, trace

Function = Callable[[Tensor], Tensor]

# A function, its domain, and the size below which an error of one millionth of it is none: 1 where the function or its
# derivative has a root, or a tail that float32's own kernels lose as well.
FUNCTIONS: dict[str, tuple[Function, float, float, float]] = {
    "exp": (torch.exp, -87.0, 88.7, 0),
    "expm1": (torch.expm1, -100, 88.7, 0),
    "exp2": (torch.exp2, -125, 127.9, 0),
    "two to the x": (lambda x: 2**x, -125, 127.9, 0),
    "ten to the x": (lambda x: 10**x, -37, 38.5, 0),
    "log": (torch.log, 0, 1e30, 0),
    "log1p": (torch.log1p, -0.999, 1e30, 0),
    "log2": (torch.log2, 0, 1e30, 0),
    "log10": (torch.log10, 0, 1e30, 0),
    "sin": (torch.sin, -1e8, 1e8, 1e-3),
    "tan": (torch.tan, -100, 100, 1e-3),
    "tanh": (torch.tanh, -1e30, 1e30, 1),
    "sigmoid": (torch.sigmoid, -87, 1e30, 1e-30),
    "erf": (torch.erf, -9, 1e30, 0),
    "erfc": (torch.erfc, -1e30, 9, 0),
    "erfcx": (torch.special.erfcx, -9, 1e4, 1),
    "erfinv": (torch.erfinv, -0.9999, 0.9999, 0),
    "ndtr": (torch.special.ndtr, -12, 1e30, 0),
    "log ndtr": (torch.special.log_ndtr, -1e15, 10, 0),
    "atan": (torch.atan, -1e15, 1e15, 0),
    "asin": (torch.asin, -0.999, 0.999, 0),
    "acos": (torch.acos, -0.999, 0.999, 0),
    "sinh": (torch.sinh, -89.3, 89.3, 0),
    "cosh": (torch.cosh, -89.3, 89.3, 0),
    "asinh": (torch.asinh, -1e18, 1e18, 0),
    "acosh": (torch.acosh, 1.0001, 1e18, 0),
    "atanh": (torch.atanh, -0.999, 0.999, 0),
    "sqrt": (torch.sqrt, 0, 1e30, 0),
    "rsqrt": (torch.rsqrt, 0, 1e20, 0),
    "lgamma": (torch.lgamma, 0, 1e30, 1e-1),
    "digamma": (torch.digamma, 0, 1e30, 1e-1),
    "i0": (torch.i0, -80, 80, 0),
    "i0e": (torch.special.i0e, -1e10, 1e10, 1e-1),
    "i1": (torch.special.i1, -80, 80, 0),
    "elu": (F.elu, -85, 1e30, 0),
    "selu": (F.selu, -85, 1e30, 0),
    "gelu": (F.gelu, -1e15, 1e15, 1),
    "gelu by tanh": (lambda x: F.gelu(x, approximate="tanh"), -100, 1e10, 1),
    "silu": (F.silu, -80, 1e30, 1e-1),
    "mish": (F.mish, -80, 1e30, 1e-1),
    "softplus": (F.softplus, -85, 1e30, 0),
    "log sigmoid": (F.logsigmoid, -1e30, 85, 0),
    "logaddexp": (lambda x: torch.logaddexp(x, -x), -1e10, 1e10, 1),
    "gaussian": (lambda x: torch.exp(-x * x / 2), -13, 13, 0),
    "power 1.7": (lambda x: x**1.7, 0, 1e20, 0),
    "power 2.5": (lambda x: x**2.5, 0, 1e14, 0),
    "power -0.3": (lambda x: x**-0.3, 0, 1e20, 0),
    "power -1.5": (lambda x: x**-1.5, 1e-10, 1e10, 0),
    "hypot": (lambda x: torch.hypot(x, torch.ones_like(x)), -1e30, 1e30, 0),
}
TOLERANCE, OF_EAGER = 4e-6, 4.0


def grid(low: float, high: float) -> Tensor:
    """Numbers of every size between the bounds."""
    sizes = 10.0 ** torch.linspace(-10, 30, 1200, dtype=torch.float64)
    even = torch.linspace(max(low, -200), min(high, 200), 2400, dtype=torch.float64)
    close = torch.linspace(-3, 3, 1200, dtype=torch.float64)
    x = torch.cat([sizes, -sizes, even, close]).float()
    return x[(x > low) & (x < high)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_exact_in_the_whole_domain(name: str) -> None:
    if not ops.backends.runs_compiled("run_lanes"):
        pytest.skip("lane programs run on the compiled backend alone")
    function, low, high, floor = FUNCTIONS[name]
    x = grid(low, high)[:, None].contiguous()
    executor = LaneExecutor(lower(trace(lambda x: function(x[:, 0]), None, x[:1])), None)
    executor.refresh()

    def eager(x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        value = function(leaf[:, 0])
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0][:, 0]

    energies, gradient = executor(x)
    for found, truth, theirs in zip((energies, gradient[:, 0]), eager(x.double()), eager(x), strict=True):
        # Where neither float32's range nor its smallest normal numbers decide.
        compared = theirs.isfinite() & (truth.abs() < 3e38) & ((truth.abs() > 2e-38) | (truth == 0))
        assert compared.sum() > 1000
        bound = TOLERANCE * truth.abs().clamp(min=floor)
        bound = torch.maximum(bound, OF_EAGER * (theirs.double() - truth).abs())
        assert ((found.double() - truth).abs() <= bound)[compared].all()
