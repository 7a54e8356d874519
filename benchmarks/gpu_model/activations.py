"""What activations cost on a GPU, and what their approximations lose, without a GPU.

    python -m benchmarks.gpu_model.activations              prints the table
    python -m benchmarks.gpu_model.activations --write      and puts it on the page docs/results/gpu-model

Instructions are counted in machine code for sm_90: those of a kernel that writes an activation and its derivative, as a
program does, less those of one that copies. Errors are those of the compiled kernel, which tests/gpu/ptx runs on the
CPU: it makes `ex2.approx` and `rcp.approx` as wrong as their documentation allows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu_model.command import count
from benchmarks.gpu_model.instructions import opcodes_of
from fastebm.ops.activations import PROGRAM_ACTIVATIONS, program_activation, program_derivative
from fastebm.ops.triton.activations import activate, derivative
from tests.gpu.fake_driver import fake_gpu
from tests.gpu.ptx.launches import ptx_machine

BLOCK, WARPS = 1024, 4
SMOOTH = ("silu", "gelu", "gelu_tanh", "elu", "softplus", "tanh", "sigmoid", "exp")
# As PyTorch's modules have them by default.
PARAMETERS = {"elu": (1.0, 1.0, 1.0), "softplus": (1.0, 20.0)}


@triton.jit
def activation_kernel(
    x: tl.tensor,
    value: tl.tensor,
    slope: tl.tensor,
    numbers: tl.tensor,
    ACTIVATION: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The activation and its derivative of float32 numbers, or with ACTIVATION -1 two copies of them."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(x + at)
    a, b, c = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    if ACTIVATION >= 0:
        tl.store(slope + at, derivative(h, a, b, c, ACTIVATION, False, APPROXIMATE))
        tl.store(value + at, activate(h, a, b, c, ACTIVATION, APPROXIMATE))
    else:
        tl.store(slope + at, h)
        tl.store(value + at, h)


def numbers_of(name: str) -> Tensor:
    """The parameters of an activation as kernels read them."""
    return torch.tensor([*PARAMETERS.get(name, ()), 0.0, 0.0, 0.0][:3])


def launch(name: str, x: Tensor, approximate: bool) -> tuple[Tensor, Tensor]:
    """(values, derivatives) at x, whose length is a multiple of BLOCK. "copy" is no activation."""
    value, slope = torch.empty_like(x), torch.empty_like(x)
    number = -1 if name == "copy" else PROGRAM_ACTIVATIONS.index(name)
    activation_kernel[(len(x) // BLOCK,)](
        *(x, value, slope, numbers_of(name), number, approximate, BLOCK), num_warps=WARPS, enable_fp_fusion=False
    )
    return value, slope


def instructions(name: str, approximate: bool) -> float:
    """Machine instructions for each element, beside those of a copy."""
    with fake_gpu(90) as gpu:
        for each in (name, "copy"):
            launch(each, torch.zeros(BLOCK), approximate)
    with_activation, copying = (sum(map(len, opcodes_of(each.kernel.asm["cubin"]).values())) for each in gpu.launches)
    return (with_activation - copying) / (BLOCK / (32 * WARPS))


def finite_bfloat16() -> Tensor:
    """All finite numbers of bfloat16 from -88 to 88, between which no exponential overflows, in float32."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    every = every[every.abs() <= 88]
    return torch.cat([every, every.new_zeros(-len(every) % BLOCK)])


def truth(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """(values, derivatives) in float64."""
    number, parameters = PROGRAM_ACTIVATIONS.index(name), PARAMETERS.get(name, ())
    exact = x.double()
    if name == "silu":  # PyTorch's own formula of the derivative takes a difference from 1
        slope = torch.sigmoid(exact) * (1 + exact * torch.sigmoid(-exact))
    elif name == "sigmoid":
        slope = torch.sigmoid(exact) * torch.sigmoid(-exact)
    elif name == "tanh":
        slope = torch.cosh(exact) ** -2
    else:
        slope = program_derivative(exact, number, parameters, of_result=False)
    return program_activation(exact, number, parameters), slope


def units(found: Tensor, right: Tensor) -> float:
    """The largest error in units of bfloat16's last place; in those of 2^-8 where the right number is smaller."""
    place = torch.exp2(torch.floor(torch.log2(right.abs().clamp_min(2.0**-8))) - 7)
    return float(((found.double() - right).abs() / place).max())


def as_compiled(name: str, x: Tensor, capability: int = 90) -> tuple[Tensor, Tensor]:
    """(values, derivatives) of the approximate kernel at x, before what is stored is rounded."""
    with ptx_machine(capability):
        return launch(name, x, True)


def rows() -> list[dict[str, Any]]:
    """A row for each smooth activation."""
    found, x = [], finite_bfloat16()
    for name in SMOOTH:
        counted = {f"instructions, {how}": instructions(name, how == "bfloat16") for how in ("float32", "bfloat16")}
        value, slope = (units(*pair) for pair in zip(as_compiled(name, x), truth(name, x), strict=True))
        found.append({"activation": name, **counted, "error": value, "error of the derivative": slope})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    return count("activations", __doc__, rows, arguments)


if __name__ == "__main__":
    sys.exit(main())
