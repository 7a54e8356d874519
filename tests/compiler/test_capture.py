"""The vocabulary: each ATen operation that an energy may use, captured, differentiated and run against autograd."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastebm
from fastebm.compiler.autodiff import differentiate
from fastebm.compiler.capture import UnsupportedError, capture
from fastebm.compiler.operations import Convolution
from fastebm.compiler.rewrites import build_gradient_program, simplify
from tests.compiler.small_programs import assert_close, by_autograd, energy_of, run, tensor

W = tensor(6, 4, 3, 3, seed=1)
W1 = tensor(6, 4, 1, 1, seed=2)
B = tensor(6, seed=3)
T = tensor(4, 6, 4, 4, seed=4)
WHOLE = tensor(6, 4, 9, 9, seed=9)
LINEAR = tensor(5, 36, seed=5)
CHANNEL = tensor(4, 1, 1, seed=6)
MAP = tensor(1, 4, 9, 9, seed=7)
NUMBER = torch.tensor([0.7], dtype=torch.float64)

IMAGES = {
    "conv2d": lambda x: F.conv2d(x, W, B, padding=1),
    "conv2d without bias, strided, unequally padded": lambda x: F.conv2d(x, W, stride=(2, 1), padding=(2, 0)),
    "conv2d same": lambda x: F.conv2d(x, W, B, padding="same", dilation=2),
    "conv2d valid": lambda x: F.conv2d(x, W, B, padding="valid"),
    "conv2d with groups": lambda x: F.conv2d(x, W[:, :2], B, groups=2),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, T, B, stride=2, padding=1, output_padding=1),
    "conv_transpose2d with groups": lambda x: F.conv_transpose2d(x, T[:, :3], stride=3, groups=2),
    "conv2d of the whole image": lambda x: F.conv2d(x, WHOLE, B),
    "conv_transpose2d of one pixel": lambda x: F.conv_transpose2d(x[:, :, :1, :1], T) + x[:, :1, :4, :4],
    "linear": lambda x: F.linear(x.flatten(2)[:, :, :36], LINEAR, B[:5]),
    "matmul": lambda x: x.flatten(2)[..., :36] @ LINEAR.T,
    "matmul with a vector": lambda x: x.flatten(2)[..., :36] @ LINEAR[0] + x.mean((2, 3)).mv(B[:4])[:, None],
    "einsum": lambda x: (
        torch.einsum("bchw->bwc", x) + torch.einsum("bchw,oc->bohw", x, LINEAR[:, :4])[:, :1, 0, 0, None]
    ),
    "einsum of weights": lambda x: (
        torch.einsum("bchw,wc->bh", x, LINEAR[:4, :9].T) + torch.einsum("chw,bchw->b", MAP[0], x)[:, None]
    ),
    "einsum of two results": lambda x: torch.einsum("bchw,bwhc->bh", x, F.silu(x).movedim(1, -1).transpose(1, 2)),
    "einsum of several axes": lambda x: (
        torch.einsum("bchw,ochw->bo", x, WHOLE) + torch.einsum("bchw,c->bw", x, B[:4])[:, :6]
    ),
    "matmul from the left": lambda x: LINEAR[:, :4] @ x.flatten(2) + (B[:4] @ x.flatten(2))[:, None],
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x * 1.0, inplace=True),
    "swish by hand": lambda x: x * torch.sigmoid(x) / 1.1,
    "swish with a slope": lambda x: x * torch.sigmoid(NUMBER * x),
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu": lambda x: F.elu(x, alpha=0.7),
    "elu with a negative alpha": lambda x: F.elu(x, alpha=-0.7),
    "selu": F.selu,
    "leaky relu": lambda x: F.leaky_relu(x, 0.3),
    "leaky relu with a negative slope": lambda x: F.leaky_relu(x, -0.3),
    "relu": F.relu,
    "softplus": lambda x: F.softplus(x, beta=2.0),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "glu": lambda x: F.glu(x, dim=1),
    "exp": lambda x: torch.exp(0.1 * x),
    "square": lambda x: x.square() + x**2 + torch.pow(x, 2) + x * x,
    "hardswish, hardsigmoid, mish": lambda x: torch.cat([F.hardswish(4 * x), F.hardsigmoid(4 * x), F.mish(x)], 1),
    "bounds": lambda x: F.relu6(6 * x) + F.hardtanh(x, -0.5, 0.7) + x.clamp(-0.3, 0.4) + x.clamp(min=0.1),
    "upper bounds": lambda x: torch.clamp_max(x, 0.2) + torch.clip(x, max=-0.1) + F.threshold(x, 0.1, 0.1),
    "celu, log of a sigmoid": lambda x: F.celu(x, 0.5) + F.logsigmoid(30 * x),
    "shrinking": lambda x: F.softshrink(x, 0.3) + F.tanhshrink(x),
    "softsign and quotients": lambda x: F.softsign(x) + x / (1 + x.square()) + 2 / (3 + x.abs()) + MAP / (9 + x),
    "prelu": lambda x: F.prelu(x, NUMBER) + F.prelu(x, 0.3 * B[:4]),
    "rrelu": lambda x: F.rrelu(x),
    "powers": lambda x: x**3 + x**4 + x**1 + (x**2 + 1) ** 0.5 + (x**2 + 1) ** -0.5 + (x**2 + 1) ** -1,
    "roots": lambda x: torch.sqrt(x.square() + 1) + torch.rsqrt(x.square() + 1) + torch.reciprocal(x.square() + 1),
    "numbers": lambda x: (2 - 3 * x) / 7 + 1 - x.neg() * 0.5,
    "factors": lambda x: x * NUMBER + NUMBER / 3 - x / NUMBER,
    "by channel": lambda x: (x * CHANNEL + CHANNEL.square()) / (CHANNEL - 9),
    "by pixel": lambda x: x * MAP + MAP,
    "alpha": lambda x: torch.add(x, F.silu(x), alpha=0.3) + torch.sub(x, F.silu(x), alpha=2),
    "products": lambda x: x * F.silu(x) * torch.tanh(x),
    "gates by channel": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)) + x.sum((2, 3), keepdim=True),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "avg_pool2d, all options": lambda x: F.avg_pool2d(x, (3, 2), 2, 1, ceil_mode=True, count_include_pad=False),
    "avg_pool2d with a divisor": lambda x: F.avg_pool2d(x, 3, 1, 1, divisor_override=5),
    "max_pool2d": lambda x: F.max_pool2d(x, (3, 2)) + F.max_pool2d(F.relu(x), (3, 2)),
    "max_pool2d of the whole image": lambda x: F.max_pool2d(x, x.shape[2:], ceil_mode=True),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (3, 1)),
    "global means": lambda x: x.mean((2, 3)) + x.sum((-1, -2)) + x.mean(3).mean(2, keepdim=True).squeeze(2),
    "sums in turn": lambda x: x.square().sum(1).sum(1),
    "logsumexp": lambda x: torch.logsumexp(x, 1) + torch.logsumexp(x, dim=(2,)).mean(1, keepdim=True),
    "instance norm": lambda x: F.instance_norm(x, weight=B[:4], bias=B[2:]) + F.instance_norm(x, eps=0.1),
    "instance norm by running statistics": lambda x: F.instance_norm(x, B[:4], B[:4].square(), use_input_stats=False),
    "group norm": lambda x: F.group_norm(x, 2, B[:4], B[2:]) + F.group_norm(x, 1) + F.group_norm(x, 4, eps=0.1),
    "layer norm": lambda x: F.layer_norm(x, (4, 9, 9), WHOLE[0], WHOLE[1]) + F.layer_norm(x, (9,)),
    "layer norm of channels": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,), B[:4], B[2:]).permute(0, 3, 1, 2),
    "layer norm of vectors": lambda x: F.layer_norm(x.flatten(1), (324,)),
    "rms norm": lambda x: F.rms_norm(x, (4, 9, 9), WHOLE[0]) + F.rms_norm(x, (9, 9), eps=0.1),
    "norms by hand": lambda x: (x - x.mean(1, True)) / torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 1e-5),
    "variances": lambda x: x.var(1) + x.var((1, 2), correction=3)[:, None] + x.flatten(2).var(2).mean(1)[:, None, None],
    "means of lengths": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 1) + F.avg_pool1d(x.flatten(2), 81),
    "nearest upsampling": lambda x: F.interpolate(x, scale_factor=2) + F.interpolate(x, (18, 18), mode="nearest-exact"),
    "concatenation": lambda x: torch.cat([x, F.silu(x), x[:, :2]], dim=1),
    "slices": lambda x: x[:, 1:3, ::1, 2:-1] * x[:, 0:1, :, 3:] + x[:, -1, None, :, 3:],
    "chunks": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1) + torch.cat(x.split([1, 3], 1)[::-1], 1),
    "padding": lambda x: F.pad(x, (1, 2, 0, 3)) + F.pad(x, (1, 2, 0, 3), value=2.0).square(),
    "stacks": lambda x: torch.stack([x, x.square()], 2) * torch.stack([x.sum(1), x.mean(1)], 1)[:, None],
    "moved dimensions": lambda x: x.movedim(1, -1).mT.swapaxes(1, 3) + x.moveaxis((1, 2), (3, 1)).mean((1, 2, 3), True),
    "reshapes": lambda x: x.permute(0, 2, 3, 1).reshape(x.size(0), -1, 4).transpose(1, 2).unflatten(2, (9, 9)) * x,
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2) ** 2,
    "reshapes by -1": lambda x: x.view(-1, 36, 9).reshape(-1, 2, 2, 9, 9).flatten(1, 2) * x,
    "squeezes": lambda x: x[:, :, :1].squeeze(2).unsqueeze(-1) * 2,
    "expansion": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 9, 9) * x,
    "dropout in eval mode": lambda x: F.dropout(x, 0.5, training=False).clone().contiguous(),
    "a cast to its own type": lambda x: x.double().to(torch.float64).type_as(x),
    "block tail": lambda x: fastebm.ops.block_tail(F.conv2d(x, W, B), F.conv2d(x, W), activation="gelu_tanh"),
    "block tail with fade": lambda x: fastebm.ops.block_tail(
        x, x.square(), fade=F.avg_pool2d(x, 2), beta=0.3, activation="elu", alpha=0.5
    ),
    "expand blend": lambda x: fastebm.ops.expand_blend(x, x.square(), NUMBER),
}


@pytest.mark.parametrize("name", IMAGES)
def test_the_vocabulary_against_autograd(name):
    x = tensor(3, 4, 9, 9, seed=8)
    energy = lambda x: energy_of(IMAGES[name](x))  # noqa: E731
    expected = by_autograd(energy, x)
    captured = capture(energy, None, x)
    for program in (differentiate(captured), build_gradient_program(captured)):
        for found, wanted in zip(run(program, x), expected, strict=True):
            assert_close(found, wanted)


def test_vectors_and_batch_norms():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(7, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.BatchNorm1d(16, affine=False), nn.Linear(16, 1)
    )
    for norm in (net[1], net[3]):
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    net = net.double().eval()
    x = tensor(5, 7)
    program = build_gradient_program(capture(net, net, x))
    for found, wanted in zip(run(program, x), by_autograd(net, x), strict=True):
        assert_close(found, wanted)


def test_one_capture_serves_every_batch_and_new_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 1)).double().eval()
    program = differentiate(simplify(capture(net, net, tensor(2, 3, 6, 6))))
    for count in (1, 2, 7):
        x = tensor(count, 3, 6, 6, seed=count)
        for found, wanted in zip(run(program, x), by_autograd(net, x), strict=True):
            assert_close(found, wanted)
        with torch.no_grad():
            net[0].weight.mul_(1.5)
        net[3] = nn.Linear(64, 1, dtype=torch.float64)


def test_a_convolution_subclass_runs_its_own_forward():
    """Tracing that goes by a layer's class would take it for a plain convolution, and be silently wrong."""

    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight * 3, self.bias)

    net = nn.Sequential(Scaled(3, 1, 3), nn.Flatten(), nn.Linear(16, 1)).double().eval()
    x = tensor(2, 3, 6, 6)
    program = differentiate(capture(net, net, x))
    for found, wanted in zip(run(program, x), by_autograd(net, x), strict=True):
        assert_close(found, wanted)


def test_what_does_not_depend_on_x_is_no_part_of_the_program():
    norm = nn.utils.parametrizations.spectral_norm
    layer = norm(nn.Conv2d(3, 2, 3)).double().eval()
    energy = lambda x: (layer(x) * torch.ones(2, 1, 1) * math.pi).mean((1, 2, 3))  # noqa: E731
    program = simplify(capture(energy, None, tensor(2, 3, 6, 6)))
    assert [type(node.operation).__name__ for node in program].count("Convolution") == 1
    assert not any("Affine" in type(node.operation).__name__ for node in program)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        weights = torch.softmax(tokens @ tokens.transpose(1, 2), dim=-1)
        return (weights @ tokens).mean((1, 2))


def branching(x: Tensor) -> Tensor:
    return x.sum((1, 2, 3)) if x.mean() > 0 else x.square().sum((1, 2, 3))


REFUSED = {
    "attention": (Attention(), "a product of two results"),
    "control flow": (branching, "torch.export"),
    "group norm of vectors": (lambda x: F.group_norm(x.mean((2, 3)), 2).square().sum(1), "group_norm"),
    "a jump": (lambda x: F.threshold(x, 0.1, 0.2).sum((1, 2, 3)), "jump"),
    "a root without a rule": (lambda x: (x**0.3).sum((1, 2, 3)), "the power 0.3"),
    "variance over the batch": (lambda x: x.var(0).sum() * x.sum((1, 2, 3)), "along the batch"),
    "a length pooled in part": (lambda x: F.avg_pool1d(x.flatten(2), 9).sum((1, 2)), "whole length"),
    "batch norm in train mode": (lambda x: F.batch_norm(x, None, None, training=True).sum((1, 2, 3)), "batch"),
    "overlapping maxima": (lambda x: F.max_pool2d(x, 3, 2, 1).sum((1, 2, 3)), "side by side"),
    "maxima in ceil mode": (lambda x: F.max_pool2d(x, 2, ceil_mode=True).sum((1, 2, 3)), "side by side"),
    "maximum": (lambda x: x.amax((1, 2, 3)), "no rule imports aten.amax"),
    "noise": (lambda x: (x + torch.randn(4, 1, 1)).square().sum((1, 2, 3)), "random"),
    "dropout in train mode": (lambda x: F.dropout(x, 0.5, training=True).sum((1, 2, 3)), "random"),
    "sum over the batch": (lambda x: x.sum((1, 2, 3)) * x.sum(), "along the batch"),
    "mean over the batch": (lambda x: (x - x.mean(0, keepdim=True)).sum((1, 2, 3)), "along the batch"),
    "einsum of the batch": (lambda x: torch.einsum("bchw,bdhw->cd", x, x).sum() * x.sum((1, 2, 3)), "einsum"),
    "reversed batch": (lambda x: x.flip(0).sum((1, 2, 3)), "flip"),
    "samples as channels": (lambda x: x.reshape(1, -1, 9, 9).reshape(-1, 4, 9, 9).sum((1, 2, 3)), "first dimension"),
    "a cast": (lambda x: x.float().double().sum((1, 2, 3)), "float32"),
    "a sum in another type": (lambda x: x.sum((1, 2, 3), dtype=torch.float32), "float32, x is torch.float64"),
    "a batch twice as long": (lambda x: torch.cat([x, x]).sum((1, 2, 3)).reshape(2, -1).sum(0), "along the batch"),
    "detached": (lambda x: (x.detach() * x).sum((1, 2, 3)), "detach"),
    "the length of the batch": (lambda x: x.sum((1, 2, 3)) * torch.ones(x.shape[0]).sum(), "depends on the batch size"),
    "a factor by sample": (lambda x: x.sum((1, 2, 3)) * torch.ones(x.shape[0]), "batch"),
    "no dependence": (lambda x: torch.zeros(2, dtype=torch.float64), "don't depend on x"),
    "not one number": (lambda x: x.sum((1, 2)), "not one number"),
    "an exception": (lambda x: [][0], "IndexError"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_reason(name):
    energy, reason = REFUSED[name]
    with pytest.raises(UnsupportedError, match=reason):
        capture(energy, energy if isinstance(energy, nn.Module) else None, tensor(2, 4, 9, 9))


LENGTHS = {
    "view": lambda x: F.conv2d(x, W, B).view(len(x), -1).square().sum(1),
    "size": lambda x: (F.conv2d(x, W).reshape(int(x.size(0)), 6, -1) * torch.arange(6.0).to(x)[:, None]).sum((1, 2)),
}
OF_LENGTHS = {
    "mean over the batch": lambda x: x.square().sum((1, 2, 3)) / len(x),
    "a weight as long as the batch": lambda x: x.square().sum((1, 2, 3)) * torch.ones(len(x)).to(x).sum(),
    "a loop": lambda x: torch.stack([image.sum() for image in x]),
    "samples as channels": lambda x: F.conv2d(x.reshape(1, len(x) * 4, 9, 9), torch.ones(1, len(x) * 4, 9, 9)).sum(1),
    "a power": lambda x: x.square().sum((1, 2, 3)) * 1.1 ** len(x),
    "a row by sample": lambda x: x.square().sum((1, 2, 3)) + torch.linspace(0, 1, len(x)).to(x),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_the_length_of_the_batch_as_a_number_may_shape_results(name):
    captured = capture(LENGTHS[name], None, tensor(2, 4, 9, 9))
    for count in (1, 3, 11):
        x = tensor(count, 4, 9, 9, seed=count)
        for found, wanted in zip(run(differentiate(captured), x), by_autograd(LENGTHS[name], x), strict=True):
            assert_close(found, wanted)


@pytest.mark.parametrize("name", OF_LENGTHS)
def test_energies_that_depend_on_the_length_of_the_batch_are_refused(name):
    with pytest.raises(UnsupportedError):
        capture(OF_LENGTHS[name], None, tensor(2, 4, 9, 9))


def test_arguments_of_a_partial_are_part_of_the_energy():
    def energy(x, *, scale, offset):
        return (x * scale + offset).square().sum(1)

    offset = torch.ones(5, dtype=torch.float64)
    partial = functools.partial(energy, scale=3.0, offset=offset)
    x = tensor(2, 5)
    program = differentiate(capture(partial, None, x))
    for _ in range(2):
        for found, wanted in zip(run(program, x), by_autograd(partial, x), strict=True):
            assert_close(found, wanted)
        offset.mul_(2)  # held by reference


def test_convolutions_say_what_they_are():
    program = capture(lambda x: F.conv2d(x, W, B, stride=2).sum((1, 2, 3)), None, tensor(2, 4, 9, 9))
    (conv,) = [node for node in program if isinstance(node.operation, Convolution)]
    assert (conv.shape, conv.operation.attributes()) == ((6, 4, 4), "3x3 stride 2 + bias")
