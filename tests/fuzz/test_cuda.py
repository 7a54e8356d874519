"""Random calls of the operators that have a CUDA kernel: its bits are those of C++.

They run on a GPU, and without one in the process that tests/gpu/test_host_build.py starts.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastebm
from fastebm import ops
from fastebm.ops import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(
        backends.unavailable_reason("cuda", DEVICE) is not None,
        reason=f"{backends.unavailable_reason('cuda', DEVICE)}; tests/gpu/test_host_build.py runs this on its own",
    ),
    pytest.mark.skipif(backends.unavailable_reason("cpp", "cpu") is not None, reason="the C++ operators are not built"),
]


@pytest.fixture
def backend_device() -> tuple[str, str]:
    return ("cuda", DEVICE)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("scaled_swish", "silu", "gelu", "gelu_tanh", "elu", "leaky_relu", "relu")


class Draw:
    """Random tensors and options of one try."""

    def __init__(self, seed: int) -> None:
        self.choice = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.shape = tuple(
            self.choice.choice(sizes)
            for sizes in ((1, 2, 3, 5), (1, 3, 4), (1, 2, 4, 5, 8, 17), (1, 3, 4, 6, 8, 9, 16, 17))
        )

    def maybe(self, probability: float) -> bool:
        return self.choice.random() < probability

    def layout(self, values: Tensor) -> Tensor:
        """The same values as channels-last, as part of a larger image, or off the grid of 16 bytes."""
        kind = self.choice.choice(("", "", "channels last", "part", "shifted"))
        if kind == "channels last":
            return values.contiguous(memory_format=torch.channels_last)
        if kind == "part":
            room = values.new_zeros(*values.shape[:3], values.shape[3] + 3)
            room[..., 1:-2] = values
            return room[..., 1:-2]
        if kind == "shifted":
            room = values.new_zeros(values.numel() + 1)
            room[1:] = values.flatten()
            return room[1:].view_as(values)
        return values

    def tensor(self, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.randn(self.shape, generator=self.generator)
        values[torch.rand(self.shape, generator=self.generator) < 0.1] = self.choice.choice((0.0, -0.0, 1.0, -1.0))
        return self.layout(values.to(dtype))


def on(device: str, value: object) -> object:
    if isinstance(value, Tensor):
        return value.to(device)
    return tuple(on(device, part) for part in value) if isinstance(value, tuple) else value


def both(call: Callable[..., Tensor], *tensors: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    with ops.backend("cuda"):
        cuda = call(*(on(DEVICE, t) for t in tensors), **{name: on(DEVICE, value) for name, value in options.items()})
    with ops.backend("cpp"):
        return cuda.cpu(), call(*tensors, **options)


def same_bits(cuda: Tensor, cpp: Tensor) -> bool:
    """NaN equals NaN, -0 does not equal 0."""
    same = (cuda == cpp) & (cuda.signbit() == cpp.signbit()) | (cuda.isnan() & cpp.isnan())
    return cuda.stride() == cpp.stride() and bool(same.all())


def test_langevin_step(backend_device, tries):
    wrong = []
    for seed in range(tries):
        draw = Draw(seed)
        choice, batch = draw.choice, draw.shape[0]
        options: dict[str, object] = {
            "step_size": 0.3,
            "noise_std": choice.choice((0.0, 0.1)),
            "seed": choice.getrandbits(62),
            "step": choice.getrandbits(31),
            "chain_ids": choice.choice((7, 2**40)),
        }
        if draw.maybe(0.3):
            options["step_size"] = torch.rand(batch, generator=draw.generator) + 0.1
            noise = torch.rand(batch, generator=draw.generator)
            options["noise_std"] = noise * torch.randint(0, 2, (batch,), generator=draw.generator)
        if draw.maybe(0.3):
            options["chain_ids"] = torch.randint(0, 2**55, (batch,), generator=draw.generator)
        if draw.maybe(0.6):
            options["clamp"] = choice.choice(
                ((-1, 1), (0, 1), (-0.0, 1), (-1, -0.0), (-1, 0), (None, 0.5), (-0.5, None))
            )
        if draw.maybe(0.3):
            options["grad_clip"] = 0.5
        elif draw.maybe(0.4):
            options["grad_norm_clip"] = 0.7
        if draw.maybe(0.3):
            *_, height, width = draw.shape
            shape = choice.choice(((height, width), draw.shape, (batch, 1, 1, width)))
            options["mask"], options["known"] = torch.rand(shape, generator=draw.generator) > 0.5, draw.tensor()
        if draw.maybe(0.4):
            hinge = (1.5 * draw.tensor().numel(),) if draw.maybe(0.5) else ()
            target = draw.tensor()
            if draw.maybe(0.2):
                target[torch.rand(draw.shape, generator=draw.generator) < 0.1] = choice.choice((torch.inf, torch.nan))
            options["data_term"] = (target, choice.choice((0.0, 0.3)), *hinge)
        cuda, cpp = both(fastebm.langevin_step, draw.tensor(), draw.tensor(choice.choice(DTYPES)), **options)
        if not same_bits(cuda, cpp):
            wrong.append((seed, draw.shape, options))
    assert not wrong


def test_noise(backend_device, tries):
    wrong = []
    for seed in range(tries):
        draw = Draw(seed)
        address = {
            "seed": draw.choice.getrandbits(62),
            "step": draw.choice.getrandbits(32),
            "chain_ids": draw.choice.getrandbits(55),
        }
        for draws in (fastebm.ops.normal, fastebm.ops.uniform):
            dtype = draw.choice.choice(DTYPES)
            with ops.backend("cuda"):
                cuda = draws(draw.shape, dtype=dtype, device=DEVICE, **address).cpu()
            with ops.backend("cpp"):
                cpp = draws(draw.shape, dtype=dtype, **address)
            if not same_bits(cuda, cpp):
                wrong.append((seed, draws.__name__, draw.shape, dtype, address))
    assert not wrong


def test_block_tail_and_its_derivatives(backend_device, tries):
    wrong = []
    for seed in range(tries):
        draw = Draw(seed)
        if min(draw.shape[2:]) < 2:
            continue
        dtype, activation = draw.choice.choice(DTYPES), draw.choice.choice(ACTIVATIONS)
        layout = draw.choice.choice((torch.contiguous_format, torch.channels_last))
        main, skip = (draw.tensor(dtype).contiguous(memory_format=layout) for _ in range(2))
        beta, fades = draw.choice.choice((0.0, 0.3, 1.0)), draw.maybe(0.7)
        fade = torch.nn.functional.avg_pool2d(draw.tensor(dtype).float(), 2).to(dtype) if fades else None
        results = []
        for backend, device in (("cuda", DEVICE), ("cpp", "cpu")):
            with ops.backend(backend):
                inputs = [x.to(device).detach().requires_grad_() for x in (main, skip)]
                if fade is not None:
                    inputs.append(fade.to(device).contiguous(memory_format=layout).detach().requires_grad_())
                faded, amount = (inputs[2], beta) if fades else (None, 1.0)
                out = ops.block_tail(*inputs[:2], fade=faded, beta=amount, activation=activation)
                gradients = torch.autograd.grad(out.float().square().sum(), inputs, create_graph=True)
                second = torch.autograd.grad(sum(g.float().square().sum() for g in gradients), inputs[0])
                results.append([out, *gradients, *second])
        if not all(same_bits(cuda.detach().cpu(), cpp.detach()) for cuda, cpp in zip(*results, strict=True)):
            wrong.append((seed, draw.shape, dtype, activation, layout, fades, beta))
    assert not wrong


def test_expand_blend_and_its_derivative(backend_device, tries):
    wrong = []
    for seed in range(tries):
        draw = Draw(seed)
        dtype, beta = draw.choice.choice(DTYPES), draw.choice.choice((0.0, 0.25, 0.7, 1.0))
        primal, fade = draw.tensor(dtype), draw.tensor(dtype)
        results = []
        for backend, device in (("cuda", DEVICE), ("cpp", "cpu")):
            with ops.backend(backend):
                inputs = [x.to(device).requires_grad_() for x in (primal, fade)]
                out = ops.expand_blend(*inputs, beta)
                results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
        if not all(same_bits(cuda.detach().cpu(), cpp.detach()) for cuda, cpp in zip(*results, strict=True)):
            wrong.append((seed, draw.shape, dtype, beta))
    assert not wrong
