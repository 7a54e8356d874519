"""Energies of every kind of operation, each with its name and the shape of its samples.

An energy is a function of a batch, or a factory of a module, which takes no arguments. Weights are float32 numbers, so
that float64 has the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributions, nn
from torch.utils.checkpoint import checkpoint

Energy = Callable[[Tensor], Tensor]


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) / math.sqrt(shape[-1])


_KEPT = {shape: weights(*shape) for shape in [(4,), (5,), (6,), (4, 6), (6, 6), (7, 6), (5, 4), (3, 6), (2, 5, 6)]}


def like(x: Tensor, *shape: int) -> Tensor:
    """Constant numbers in the dtype of x."""
    return _KEPT[shape].to(x.dtype)


def total(x: Tensor) -> Tensor:
    """One number of each sample, to which all entries contribute differently."""
    flat = x.flatten(1)
    return (flat * torch.linspace(0.5, 1.5, flat.shape[1]).to(x.dtype)).sum(1)


class Ends(nn.Module):
    """A network whose outputs are added up."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return total(self.layers(x).square() * 0.5 + self.layers(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return total(self.attention(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return total(state[0] if isinstance(state, tuple) else state)


class RecurrentLayer(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return total(self.layer(x)[0])


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return total(self.form(x, x.sin()))


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 6)
        self.register_buffer("labels", torch.tensor([1, 3, 3, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return total(self.table(self.labels) @ x.unsqueeze(-1))


class Block(nn.Module):
    """A block of a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 8, 4, 4)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, F.gelu, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return total(self.block(self.patch(x).flatten(2).transpose(1, 2)))


class UNet(nn.Module):
    """Skips, and the head <x, f(x)>."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 4, 3, 2, 1)
        self.up = nn.ConvTranspose2d(4, 4, 4, 2, 1)
        self.last = nn.Conv2d(5, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(F.silu(self.down(x)))
        return (x * self.last(torch.cat([x, F.silu(up)], 1))).flatten(1).sum(1)


def module(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A factory of a module with fixed weights, in eval mode."""

    def made() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make().eval().requires_grad_(False)

    return made


def net(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return module(lambda: Ends(*(layer() for layer in layers)))


def positive_definite(x: Tensor) -> Tensor:
    """A well-conditioned positive definite (B, 3, 3) matrix of the sample."""
    a = x.unflatten(1, (3, 3))
    return a @ a.mT + 0.5 * torch.eye(3, dtype=x.dtype)


def score_matching(x: Tensor) -> Tensor:
    def inner(one: Tensor) -> Tensor:
        return (one.sin() * one.cos().roll(1)).sum() + one.square().square().sum()

    score = torch.func.vmap(torch.func.grad(inner))(x)
    return 0.5 * score.square().sum(1)


def inner_autograd(x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = x if x.requires_grad else x.detach().requires_grad_()
        value = (y.sin().square() * like(y, 6)).sum()
        (score,) = torch.autograd.grad(value, y, create_graph=True)
    return score.square().sum(1)


def in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:3] *= 2.0
    y[:, 0] = x[:, 1] * x[:, 2]
    y.add_(x.sin()).clamp_(-2, 2)
    return total(y.square())


def rotated(x: Tensor) -> Tensor:
    """A grid of points, turned and scaled."""
    turn = torch.tensor([[[0.8, 0.3, 0.0], [-0.3, 0.9, 0.1]]]).to(x.dtype)
    return F.affine_grid(turn.expand(len(x), 2, 3), [len(x), 2, 4, 6], align_corners=False)


def leapfrog(x: Tensor) -> Tensor:
    position, momentum = x[:, :3], x[:, 3:]
    for _ in range(5):
        momentum = momentum - 0.1 * position.sin()
        position = position + 0.1 * momentum
    return total(torch.cat([position, momentum], 1).square())


def dihedral(x: Tensor) -> Tensor:
    first, axis, last = x[:, 0] - x[:, 1], x[:, 2] - x[:, 1], x[:, 3] - x[:, 2]
    axis = axis / axis.norm(dim=-1, keepdim=True)
    v, w = (side - (side * axis).sum(-1, keepdim=True) * axis for side in (first, last))
    return 1 + torch.cos(3 * torch.atan2((torch.cross(axis, v, dim=-1) * w).sum(-1), (v * w).sum(-1)))


def hidden_markov(x: Tensor) -> Tensor:
    transitions, forward = like(x, 6, 6).log_softmax(1), x[:, 0].log_softmax(1)
    for t in range(1, x.shape[1]):
        forward = torch.logsumexp(forward[:, :, None] + transitions, 1) + x[:, t]
    return -torch.logsumexp(forward, 1)


def sinkhorn(x: Tensor) -> Tensor:
    cost = torch.cdist(x, like(x, 5, 4)[None, :, :2]).square()
    f = x.new_zeros(len(x), x.shape[1])
    for _ in range(5):
        g = -torch.logsumexp(f[:, :, None] - cost, 1)
        f = -torch.logsumexp(g[:, None] - cost, 2)
    return f.sum(1) + g.sum(1)


def nearest_neighbours(x: Tensor) -> Tensor:
    indices = torch.cdist(x, x).topk(3, largest=False).indices
    near = x[:, None].expand(-1, x.shape[1], -1, -1).gather(2, indices[..., None].expand(-1, -1, -1, x.shape[2]))
    return (near - x[:, :, None]).square().sum((1, 2, 3))


def gaussian_process(x: Tensor) -> Tensor:
    times = torch.arange(5).to(x.dtype)
    squares = (times[:, None] - times).square()
    kernel = torch.exp(x[:, :1, None].sin() - 0.5 * squares * torch.exp(-x[:, 1:2, None].sin()))
    noise = (torch.exp(x[:, 2:3, None].sin()) + 0.1) * torch.eye(5, dtype=x.dtype)
    mean = torch.zeros(5, dtype=x.dtype)
    return -distributions.MultivariateNormal(mean, kernel + noise).log_prob(like(x, 5))


def stick_breaking(x: Tensor) -> Tensor:
    part = torch.sigmoid(x)
    left = torch.cat([torch.ones_like(x[:, :1]), (1 - part).cumprod(1)[:, :-1]], 1)
    return -(part * left * torch.arange(6).to(x.dtype)).sum(1).add(0.1).log()


def predator_and_prey(x: Tensor) -> Tensor:
    u, v = x[:, 0].sin().exp(), x[:, 1].sin().exp()
    path = []
    for _ in range(10):
        u, v = u + 0.05 * (u - 0.5 * u * v), v + 0.05 * (0.3 * u * v - v)
        path.append(torch.stack([u, v], 1))
    return (torch.stack(path, 1) - 1).square().sum((1, 2))


def spectrogram(x: Tensor) -> Tensor:
    window = torch.hann_window(8).to(x.dtype)
    return torch.stft(x, 8, 4, window=window, return_complex=True).abs().square().sum((1, 2))


# A name, the shape of a sample, and the energy.
VECTORS: list[tuple[str, Energy]] = [
    ("square", lambda x: 0.5 * x.square().sum(1)),
    ("double well", lambda x: ((x.square() - 1).square()).sum(-1)),
    ("rosenbrock", lambda x: (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)),
    ("funnel", lambda x: 0.5 * (x[:, 0] / 3) ** 2 + 0.5 * (x[:, 1:] ** 2 * torch.exp(-x[:, :1].clamp(-9, 9))).sum(1)),
    ("mixture", lambda x: -torch.logsumexp(-0.5 * (x[:, None] - like(x, 7, 6)).square().sum(-1), 1)),
    ("rings", lambda x: (x.norm(dim=1) - 2).square() * 3),
    ("xy", lambda x: -torch.cos(x - x.roll(1, 1)).sum(1)),
    ("quadratic form", lambda x: 0.5 * torch.einsum("bi,ij,bj->b", x, like(x, 6, 6), x)),
    ("rbm", lambda x: -F.softplus(x @ like(x, 7, 6).T).sum(1) - x @ like(x, 6)),
    ("hopfield", lambda x: -torch.logsumexp(4 * x @ like(x, 7, 6).T, 1) / 4 + 0.5 * x.square().sum(1)),
    (
        "lennard-jones",
        lambda x: (lambda r: (r**-12 - 2 * r**-6).sum((1, 2)))(1.5 + (x[:, :, None] - x[:, None]).square()),
    ),
    ("class logits", lambda x: -(x @ like(x, 7, 6).T).log_softmax(1)[:, 3]),
    ("softmax", lambda x: total(x.softmax(1) * x)),
    ("logsumexp of all", lambda x: x.logsumexp(dim=1)),
    ("log softmax", lambda x: total(F.log_softmax(x, -1).sin())),
    ("cross entropy", lambda x: F.cross_entropy(x, torch.full((len(x),), 2), reduction="none")),
    ("nll", lambda x: F.nll_loss(x.log_softmax(1), torch.full((len(x),), 1), reduction="none")),
    (
        "bce",
        lambda x: F.binary_cross_entropy_with_logits(x, like(x, 6).sigmoid().expand_as(x), reduction="none").sum(1),
    ),
    ("huber", lambda x: F.huber_loss(x, torch.zeros_like(x), reduction="none").sum(1)),
    ("smooth l1", lambda x: F.smooth_l1_loss(x, like(x, 6).expand_as(x), reduction="none").sum(1)),
    ("kl", lambda x: F.kl_div(x.log_softmax(1), like(x, 6).softmax(0).expand_as(x), reduction="none").sum(1)),
    ("layer norm", lambda x: total(F.layer_norm(x, (6,), like(x, 6)).tanh())),
    ("rms norm", lambda x: total(F.rms_norm(x, (6,), like(x, 6)).tanh())),
    ("normalize", lambda x: total(F.normalize(x, dim=1).square())),
    ("cosine", lambda x: F.cosine_similarity(x, like(x, 6).expand_as(x), dim=1)),
    ("variance", lambda x: x.var(1) + x.std(1, correction=0)),
    ("mean", lambda x: x.mean(1).square() + x.square().mean(dim=1)),
    ("norm 1", lambda x: x.norm(p=1, dim=1)),
    ("norm 3", lambda x: x.norm(p=3, dim=1)),
    ("norm 2.5", lambda x: torch.linalg.vector_norm(x, 2.5, dim=1)),
    ("norm inf", lambda x: x.norm(p=math.inf, dim=1)),
    ("norm -inf", lambda x: torch.linalg.vector_norm(x, -math.inf, dim=1)),
    ("norm 0.5", lambda x: torch.linalg.vector_norm(x, 0.5, dim=1)),
    ("matrix norm", lambda x: torch.linalg.matrix_norm(x.unflatten(1, (2, 3)))),
    ("prod", lambda x: x.prod(1)),
    ("prod of all", lambda x: (1 + x.square()).prod(dim=-1).log()),
    ("max", lambda x: x.max(1).values),
    ("max and its index", lambda x: (lambda m: m.values * (1 + 0.1 * m.indices))(x.max(1))),
    ("min", lambda x: x.min(dim=1)[0].square()),
    ("amax", lambda x: x.amax(1) * 2 - x.amin(1)),
    ("aminmax", lambda x: (lambda m: m.max - m.min)(torch.aminmax(x, dim=1))),
    ("argmax", lambda x: x.sum(1) * F.one_hot(x.argmax(1), 6).to(x.dtype).mul(like(x, 6)).sum(1)),
    ("sort", lambda x: total(x.sort(1).values.square())),
    ("sort down", lambda x: total(torch.sort(x, dim=1, descending=True)[0].sin())),
    ("argsort", lambda x: total(x.gather(1, x.argsort(1)).sin())),
    ("topk", lambda x: total(x.topk(3, 1).values.sin())),
    ("kthvalue", lambda x: x.kthvalue(2, 1).values.sin()),
    ("median", lambda x: x.median(1).values.sin()),
    ("quantile", lambda x: torch.quantile(x, 0.3, dim=1).sin()),
    ("cumsum", lambda x: total(x.cumsum(1).square())),
    ("cumprod", lambda x: total((1 + 0.1 * x).cumprod(1).sin())),
    ("logcumsumexp", lambda x: total(x.logcumsumexp(1).sin())),
    ("cummax", lambda x: total(x.cummax(1).values.sin())),
    ("diff", lambda x: x.diff(dim=1).square().sum(1)),
    ("flip", lambda x: total(x.flip(1) * x)),
    ("triu", lambda x: total(torch.triu(x[:, :, None] * x[:, None, :]))),
    ("tril indices", lambda x: total((x[:, :, None] * x[:, None])[:, *torch.tril_indices(6, 6)])),
    ("outer", lambda x: total(torch.einsum("bi,bj->bij", x, x.sin()))),
    ("trace", lambda x: torch.einsum("bii->b", x[:, :, None] * x.sin()[:, None])),
    ("diagonal", lambda x: total(torch.diag_embed(x.sin()) @ like(x, 6, 6))),
    ("kron", lambda x: total(torch.kron(x.unflatten(1, (2, 3))[0], torch.ones(2, 2).to(x.dtype))[None])),
    ("gather", lambda x: total(x.gather(1, torch.tensor([[0, 0, 2, 5]]).expand(len(x), -1)).sin())),
    ("index", lambda x: total(x[:, torch.tensor([3, 3, 1, -1])].sin())),
    ("index select", lambda x: total(x.index_select(1, torch.tensor([3, 3, 1])).sin())),
    ("index add", lambda x: total(torch.zeros_like(x).index_add(1, torch.tensor([1, 1, 0, 5, 5, 5]), x).sin())),
    (
        "scatter add",
        lambda x: total(torch.zeros_like(x).scatter_add(1, torch.tensor([[1, 1, 0, 5, 5, 5]]).expand_as(x), x).sin()),
    ),
    ("scatter", lambda x: total(x.scatter(1, torch.tensor([[1, 2]]).expand(len(x), -1), x.sin()[:, :2]) ** 2)),
    ("take along", lambda x: total(torch.take_along_dim(x, torch.tensor([[0, 2]]).expand(len(x), -1), 1).sin())),
    ("moving index", lambda x: x.gather(1, (x[:, :1].sigmoid() * 5).long())[:, 0].sin() + x.sum(1)),
    ("lookup", lambda x: like(x, 6)[(x.sigmoid() * 5).long()].mul(x).sum(1)),
    ("masked fill", lambda x: total(x.masked_fill(x > 0.3, 0.3).exp())),
    ("where", lambda x: torch.where(x > 0, x.square(), -x * 3).sum(1)),
    ("clamp", lambda x: total(x.clamp(-0.5, 0.7).square())),
    ("clamp with tensors", lambda x: total(x.clamp(like(x, 6) - 0.5, like(x, 6) + 0.5).square())),
    ("abs", lambda x: x.abs().sum(1) + (x - 0.5).abs().sqrt().sum(1)),
    ("rounded", lambda x: total(x - x.round() + x.floor() * x + x.ceil().sin() * x + x.trunc() * x)),
    ("frac", lambda x: total(x.frac().square() + x.fmod(0.7) + x.remainder(0.3) * x)),
    (
        "remainder of tensors",
        lambda x: total(torch.remainder(x, 1 + x.roll(1, 1).square()) + torch.fmod(x, 2 + x.sin())),
    ),
    (
        "integer division",
        lambda x: total(torch.div(x, 0.4, rounding_mode="floor") * x + torch.div(x, -0.3, rounding_mode="trunc")),
    ),
    ("floor of integers", lambda x: total((x * 3).long().to(x.dtype) * x)),
    (
        "power",
        lambda x: total((x.square() + 0.1) ** 1.7 + (x.square() + 0.1).pow(x.sin()) + x**3 + 2.0 ** x.sin() + x**-3),
    ),
    ("exp", lambda x: total(x.sin().exp() + x.cos().expm1() + torch.exp2(x.sin()))),
    (
        "logs",
        lambda x: total((1 + x.square()).log() + x.square().log1p() + (1 + x.square()).log2() + (1 + x * x).log10()),
    ),
    ("trigonometry", lambda x: total(x.sin() * x.cos() + (0.4 * x.sin()).tan())),
    (
        "arcs",
        lambda x: total((0.9 * x.sin()).asin() + (0.9 * x.cos()).acos() + x.atan() + torch.atan2(x, 1 + x.roll(1, 1))),
    ),
    ("hyperbolic", lambda x: total(x.sin().sinh() + x.cos().cosh() + x.tanh())),
    ("area", lambda x: total(x.asinh() + (1.1 + x.square()).acosh() + (0.9 * x.sin()).atanh())),
    ("hypot", lambda x: total(torch.hypot(x, x.roll(1, 1) + 0.1) + x.square().add(1).rsqrt())),
    ("sinc", lambda x: total(torch.sinc(x))),
    ("logaddexp", lambda x: total(torch.logaddexp(x, x.roll(1, 1)) + torch.logaddexp2(x, 0 * x))),
    ("lerp", lambda x: total(torch.lerp(x, x.sin(), 0.3) + torch.lerp(x, x.cos(), x.sigmoid()))),
    ("addcmul", lambda x: total(torch.addcmul(x, x.sin(), x.cos(), value=0.5) + torch.addcdiv(x, x, 1 + x * x))),
    ("erf", lambda x: total(x.erf() + torch.special.ndtr(x) + (x / 3).erfc())),
    ("lgamma", lambda x: total(torch.lgamma(x.square() + 0.3))),
    ("digamma", lambda x: total(torch.digamma(x.square() + 0.3))),
    ("erfinv", lambda x: total(torch.erfinv(0.9 * x.sin()))),
    ("i0", lambda x: total(torch.special.i0e(x) + torch.i0(x.sin()))),
    ("log ndtr", lambda x: -total(torch.special.log_ndtr(x))),
    ("xlogy", lambda x: total(torch.xlogy(x.square() + 0.1, x.square() + 0.2) + torch.special.entr(x.sigmoid()))),
    ("logit", lambda x: total(torch.logit(x.sigmoid() * 0.8 + 0.1))),
    ("softplus", lambda x: total(F.softplus(x) + F.softplus(x, beta=3.0, threshold=2.0))),
    ("elu", lambda x: total(F.elu(x) + F.selu(x) + F.celu(x, 0.7) + F.elu(x, 0.3))),
    ("gelu", lambda x: total(F.gelu(x) + F.gelu(x, approximate="tanh") * x)),
    ("silu", lambda x: total(F.silu(x) + F.mish(x) * 0.5)),
    ("hard", lambda x: total(F.hardswish(x) + F.hardsigmoid(x) * x + F.hardtanh(x, -0.5, 0.4) + F.relu6(x))),
    ("shrink", lambda x: total(F.softshrink(x, 0.3) + F.hardshrink(x, 0.2) + F.tanhshrink(x) + F.softsign(x))),
    ("threshold", lambda x: total(F.threshold(x, 0.1, -0.3) + F.relu(x) * x + F.leaky_relu(x, 0.1) + F.logsigmoid(x))),
    ("glu", lambda x: total(F.glu(x, 1)) + total(F.prelu(x, torch.tensor([0.2]).to(x.dtype)))),
    ("softmin", lambda x: total(F.softmin(x, 1) * x)),
    ("bump", lambda x: total(torch.exp(-1 / (1 - (0.9 * x.sin()).square())))),
    ("heaviside", lambda x: total(x * (x > 0.2).to(x.dtype) + x.sign() * x + torch.copysign(x, like(x, 6)))),
    ("nan to num", lambda x: total(torch.nan_to_num(x) * x)),
    ("in place", in_place),
    ("leapfrog", leapfrog),
    ("score matching", score_matching),
    ("inner autograd", inner_autograd),
    ("checkpoint", lambda x: checkpoint(lambda y: total(y.sin() * y), x, use_reentrant=False)),
    ("jvp", lambda x: total(torch.func.jvp(lambda y: y.sin() * y.roll(1, 1), (x,), (torch.ones_like(x),))[1])),
    ("vmap", lambda x: torch.func.vmap(lambda y: (y @ like(y, 6, 6) @ y).tanh())(x)),
    (
        "hessian trace",
        lambda x: torch.func.vmap(lambda y: torch.func.hessian(lambda z: (z.sin() * z.roll(1)).sum())(y).trace())(x),
    ),
    ("complex", lambda x: total(torch.view_as_complex(x.unflatten(1, (3, 2))).mul(1 + 2j).exp().abs())),
    (
        "complex parts",
        lambda x: total((lambda z: (z * z.conj()).real + (z * z).imag + z.angle())(torch.complex(x[:, :3], x[:, 3:]))),
    ),
    ("polar", lambda x: total(torch.view_as_real(torch.polar(x[:, :3].exp(), x[:, 3:])))),
    (
        "complex division",
        lambda x: total((lambda z: (z / (2 + z.conj())).abs())(torch.complex(x[:, :3].tanh(), x[:, 3:]))),
    ),
    ("fft", lambda x: total(torch.fft.fft(x).abs())),
    ("rfft", lambda x: total(torch.fft.rfft(x, norm="ortho").abs().square())),
    ("ifft", lambda x: total(torch.fft.ifft(torch.fft.fft(x) * torch.fft.fft(like(x, 6))).real.square())),
    ("irfft", lambda x: total(torch.fft.irfft(torch.fft.rfft(x) * torch.arange(4).to(x.dtype), n=6).sin())),
    ("normal", lambda x: -distributions.Normal(like(x, 6), like(x, 6).exp()).log_prob(x).sum(1)),
    (
        "multivariate normal",
        lambda x: (
            -distributions.MultivariateNormal(
                like(x, 6), like(x, 6, 6) @ like(x, 6, 6).T + torch.eye(6).to(x.dtype)
            ).log_prob(x)
        ),
    ),
    (
        "low rank normal",
        lambda x: -distributions.LowRankMultivariateNormal(like(x, 6), like(x, 4, 6).T, like(x, 6).exp()).log_prob(x),
    ),
    (
        "mixture of normals",
        lambda x: (
            -distributions.MixtureSameFamily(
                distributions.Categorical(logits=like(x, 7, 6)[:, 0]),
                distributions.Independent(distributions.Normal(like(x, 7, 6), 0.7 * torch.ones(7, 6).to(x.dtype)), 1),
            ).log_prob(x)
        ),
    ),
    (
        "beta",
        lambda x: (
            -distributions.Beta(torch.tensor(2.0).to(x.dtype), torch.tensor(3.0).to(x.dtype))
            .log_prob(x.sigmoid() * 0.98 + 0.01)
            .sum(1)
        ),
    ),
    ("gamma", lambda x: -distributions.Gamma(2.0 + 0 * x, 1.0 + x.square()).log_prob(x.square() + 0.1).sum(1)),
    ("student", lambda x: -distributions.StudentT(3.0, torch.zeros(6).to(x.dtype), 2.0).log_prob(x).sum(1)),
    ("cauchy", lambda x: -distributions.Cauchy(like(x, 6), 1.0 + 0 * like(x, 6)).log_prob(x).sum(1)),
    ("laplace", lambda x: -distributions.Laplace(like(x, 6), 1.0 + 0 * like(x, 6)).log_prob(x).sum(1)),
    ("gumbel", lambda x: -distributions.Gumbel(like(x, 6), 2.0 + 0 * like(x, 6)).log_prob(x.sin()).sum(1)),
    ("von mises", lambda x: -distributions.VonMises(like(x, 6), 2.0 + 0 * like(x, 6)).log_prob(x).sum(1)),
    (
        "categorical",
        lambda x: (
            -distributions.Categorical(logits=x).log_prob(torch.tensor(2))
            + distributions.Categorical(logits=x).entropy()
        ),
    ),
    ("dirichlet", lambda x: -distributions.Dirichlet(torch.full((6,), 1.5).to(x.dtype)).log_prob(x.softmax(1))),
    (
        "log normal",
        lambda x: (
            -distributions.LogNormal(0.0 * like(x, 6), 1.0 + 0 * like(x, 6), validate_args=False)
            .log_prob(x.sin().exp())
            .sum(1)
        ),
    ),
    ("poisson", lambda x: -distributions.Poisson(x.exp()).log_prob(torch.arange(6).to(x.dtype)).sum(1)),
    (
        "kl of normals",
        lambda x: distributions.kl_divergence(
            distributions.Normal(x, 1.0 + x.square()), distributions.Normal(like(x, 6), 1 + 0 * like(x, 6))
        ).sum(1),
    ),
    ("half normal", lambda x: -distributions.HalfNormal(1.0 + x.square()).log_prob(x.abs() + 0.1).sum(1)),
    ("rational", lambda x: total((1 + x) / (2 + x.square()) / (1 + x.square().sqrt()))),
    ("broadcast", lambda x: (x[:, :, None] * like(x, 6, 6) + like(x, 6)[:, None]).sin().sum((1, 2))),
    ("chunks", lambda x: (lambda a, b: (a * b.tanh()).sum(1))(*x.chunk(2, 1))),
    ("stack", lambda x: total(torch.stack([x, x.sin(), x.square()], 1).amax(1))),
    ("repeat", lambda x: total(x.repeat(1, 2).sin() + x.repeat_interleave(2, 1).cos() + x.tile(2))),
    ("cross", lambda x: total(torch.linalg.cross(x[:, :3], x[:, 3:]))),
    ("polynomial", lambda x: total(torch.stack([x**k for k in range(6)], -1) @ like(x, 6))),
    ("bucketize", lambda x: total(torch.bucketize(x, torch.tensor([-0.5, 0.0, 0.5]).to(x.dtype)).to(x.dtype) * x)),
    ("unfold", lambda x: total(x.unfold(1, 3, 1).sin().prod(-1))),
    ("logdet of a diagonal", lambda x: x.square().add(0.1).log().sum(1)),
]
OTHERS: list[tuple[str, tuple[int, ...], Any]] = [
    ("inverse", (9,), lambda x: total(torch.linalg.inv(positive_definite(x)))),
    ("det", (9,), lambda x: torch.linalg.det(positive_definite(x))),
    ("logdet", (9,), lambda x: torch.logdet(positive_definite(x))),
    ("slogdet", (9,), lambda x: torch.linalg.slogdet(x.unflatten(1, (3, 3)) + 2 * torch.eye(3).to(x.dtype))[1]),
    ("cholesky", (9,), lambda x: total(torch.linalg.cholesky(positive_definite(x)))),
    ("solve", (9,), lambda x: total(torch.linalg.solve(positive_definite(x), x[:, :3, None]))),
    (
        "triangular solve",
        (9,),
        lambda x: total(
            torch.linalg.solve_triangular(torch.linalg.cholesky(positive_definite(x)), x[:, :3, None], upper=False)
        ),
    ),
    (
        "cholesky solve",
        (9,),
        lambda x: total(torch.cholesky_solve(x[:, :3, None], torch.linalg.cholesky(positive_definite(x)))),
    ),
    (
        "gaussian of the sample",
        (9,),
        lambda x: (
            -distributions.MultivariateNormal(torch.zeros(3).to(x.dtype), positive_definite(x)).log_prob(x[:, :3])
        ),
    ),
    ("matrix power", (9,), lambda x: total(torch.linalg.matrix_power(x.unflatten(1, (3, 3)), 3))),
    ("cdist 2", (8, 3), lambda x: torch.cdist(x, x.sin() + 1).sum((1, 2))),
    ("cdist of itself", (5, 3), lambda x: torch.cdist(x, x).square().sum((1, 2)) + torch.cdist(x, x).sum((1, 2))),
    ("cdist 1", (5, 3), lambda x: torch.cdist(x, x.roll(1, 1), p=1).sum((1, 2))),
    ("cdist inf", (5, 3), lambda x: torch.cdist(x, x.roll(1, 1) + 1, p=math.inf).sum((1, 2))),
    ("cdist 3", (5, 3), lambda x: torch.cdist(x, x.roll(1, 1) + 1, p=3).sum((1, 2))),
    ("pdist", (5, 3), lambda x: torch.stack([F.pdist(one).sin().sum() for one in x])),
    ("pdist 1", (5, 3), lambda x: torch.stack([F.pdist(one, 1.0).sin().sum() for one in x])),
    (
        "molecule",
        (7, 3),
        lambda x: (lambda r: (r**-6 - r**-3)[:, *torch.triu_indices(7, 7, 1)].sum(1))(
            (x[:, :, None] - x[:, None]).square().sum(-1) + 0.5
        ),
    ),
    (
        "phi 4",
        (6, 6),
        lambda x: ((x - x.roll(1, 1)).square() + (x - x.roll(1, 2)).square() + (x.square() - 1).square()).sum((1, 2)),
    ),
    ("sequence", (8, 4), lambda x: total(F.softplus(x @ like(x, 5, 4).T).cumsum(1))),
    ("sdpa", (2, 5, 4), lambda x: total(F.scaled_dot_product_attention(x, x.sin(), x.cos()))),
    ("causal sdpa", (2, 5, 4), lambda x: total(F.scaled_dot_product_attention(x, x.sin(), x.cos(), is_causal=True))),
    ("pair sum", (5, 6), lambda x: total(torch.einsum("bij,bkj->bik", x, x).softmax(-1) @ x)),
    ("bmm with constants", (2, 4, 5), lambda x: total(torch.matmul(x, like(x, 2, 5, 6)).tanh())),
    (
        "matmul of a transposed batch",
        (4, 5),
        lambda x: total((x.transpose(0, 1) @ like(x, 5, 4)).tanh().transpose(0, 1)),
    ),
    ("matmul from the left", (6, 3), lambda x: total(torch.matmul(like(x, 6, 6), x).tanh())),
    ("pixel shuffle", (4, 4, 4), lambda x: total(F.pixel_shuffle(x, 2).sin() + F.pixel_shuffle(x, 2).square())),
    ("pixel unshuffle", (1, 4, 4), lambda x: total(F.pixel_unshuffle(x, 2).sin())),
    ("unfold image", (2, 5, 5), lambda x: total(F.unfold(x, 3, padding=1, stride=2).sin())),
    ("fold", (12, 4), lambda x: total(F.fold(x.sin(), (3, 3), 2))),
    ("reflect pad", (2, 4, 5), lambda x: total(F.pad(x, (2, 1, 1, 2), mode="reflect").sin())),
    ("replicate pad", (2, 4, 5), lambda x: total(F.pad(x, (2, 1, 1, 2), mode="replicate").sin())),
    ("circular pad", (2, 4, 5), lambda x: total(F.pad(x, (2, 1, 1, 2), mode="circular").sin())),
    ("constant pad", (2, 4, 5), lambda x: total(F.pad(x, (2, -1, 1, 2), value=0.7).sin())),
    ("reflect pad 1-d", (2, 6), lambda x: total(F.pad(x, (2, 3), mode="reflect").sin())),
    ("replicate pad 3-d", (1, 2, 3, 3), lambda x: total(F.pad(x, (1, 1, 1, 1, 1, 1), mode="replicate").sin())),
    ("max pool", (2, 6, 6), lambda x: total(F.max_pool2d(x, 3, 2, 1).sin())),
    ("max pool 1-d", (2, 7), lambda x: total(F.max_pool1d(x, 3, 2).sin())),
    ("max pool 3-d", (1, 4, 4, 4), lambda x: total(F.max_pool3d(x, 2).sin())),
    ("max pool ceil", (1, 7, 7), lambda x: total(F.max_pool2d(x, 2, ceil_mode=True, dilation=2).sin())),
    ("avg pool", (2, 6, 6), lambda x: total(F.avg_pool2d(x, 3, 2, 1).sin())),
    ("avg pool 1-d", (2, 7), lambda x: total(F.avg_pool1d(x, 3, 2, 1).sin())),
    ("avg pool 3-d", (1, 4, 4, 4), lambda x: total(F.avg_pool3d(x, 2).sin())),
    (
        "avg pool without padding",
        (1, 7, 7),
        lambda x: total(F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False).sin()),
    ),
    ("adaptive avg", (2, 7, 5), lambda x: total(F.adaptive_avg_pool2d(x, (3, 2)).sin())),
    ("adaptive avg 1-d", (2, 7), lambda x: total(F.adaptive_avg_pool1d(x, 3).sin())),
    ("adaptive avg 3-d", (1, 4, 5, 3), lambda x: total(F.adaptive_avg_pool3d(x, (2, 2, 1)).sin())),
    ("adaptive max", (2, 7, 5), lambda x: total(F.adaptive_max_pool2d(x, (3, 2)).sin())),
    ("adaptive max 1-d", (2, 7), lambda x: total(F.adaptive_max_pool1d(x, 3).sin())),
    ("lp pool", (2, 6, 6), lambda x: total(F.lp_pool2d(x.square() + 0.1, 3.0, 2).sqrt())),
    ("global max", (2, 5, 5), lambda x: total(x.amax((2, 3)).sin())),
    ("nearest", (2, 3, 4), lambda x: total(F.interpolate(x, scale_factor=2).sin())),
    ("nearest exact", (2, 3, 4), lambda x: total(F.interpolate(x, (5, 7), mode="nearest-exact").sin())),
    ("linear", (2, 5), lambda x: total(F.interpolate(x, 8, mode="linear").sin())),
    ("bilinear", (2, 3, 4), lambda x: total(F.interpolate(x, scale_factor=2, mode="bilinear").sin())),
    (
        "bilinear aligned",
        (2, 3, 4),
        lambda x: total(F.interpolate(x, (5, 7), mode="bilinear", align_corners=True).sin()),
    ),
    ("bilinear odd scale", (2, 5, 5), lambda x: total(F.interpolate(x, scale_factor=1.5, mode="bilinear").sin())),
    ("antialias", (1, 8, 8), lambda x: total(F.interpolate(x, (3, 4), mode="bilinear", antialias=True).sin())),
    ("bicubic", (1, 5, 5), lambda x: total(F.interpolate(x, (7, 8), mode="bicubic").sin())),
    ("trilinear", (1, 2, 3, 3), lambda x: total(F.interpolate(x, scale_factor=2, mode="trilinear").sin())),
    ("area resampling", (1, 6, 6), lambda x: total(F.interpolate(x, (3, 2), mode="area").sin())),
    ("dihedral angle", (4, 3), dihedral),
    ("hidden markov model", (5, 6), hidden_markov),
    ("sinkhorn", (4, 2), sinkhorn),
    ("nearest neighbours", (6, 2), nearest_neighbours),
    ("gaussian process", (3,), gaussian_process),
    ("stick breaking", (6,), stick_breaking),
    ("predator and prey", (2,), predator_and_prey),
    ("spectrogram", (16,), spectrogram),
    ("ising", (1, 6, 6), lambda x: -(x * x.roll(1, 2) + x * x.roll(1, 3)).sum((1, 2, 3))),
    ("rotated image", (2, 5, 5), lambda x: total(F.grid_sample(x, rotated(x), align_corners=False).sin())),
    (
        "rotated image with borders",
        (2, 5, 5),
        lambda x: total(F.grid_sample(x, rotated(x), "bicubic", "border", align_corners=True).sin()),
    ),
    ("max unpool", (1, 4, 4), lambda x: total(F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2).sin())),
    (
        "total variation",
        (1, 5, 5),
        lambda x: x.diff(dim=2).abs().sum((1, 2, 3)) + x.diff(dim=3).square().add(1e-3).sqrt().sum((1, 2, 3)),
    ),
    ("fft 2-d", (1, 5, 6), lambda x: torch.fft.fft2(x).abs().log1p().sum((1, 2, 3))),
    ("rfft 2-d", (1, 5, 6), lambda x: torch.fft.irfft2(torch.fft.rfft2(x).mul(0.5), s=(5, 6)).square().sum((1, 2, 3))),
    ("group norm", (4, 4, 4), lambda x: total(F.group_norm(x, 2, like(x, 4)).sin())),
    ("instance norm", (3, 4, 4), lambda x: total(F.instance_norm(x).sin())),
    ("local response", (4, 4, 4), lambda x: total(F.local_response_norm(x, 3).sin())),
    ("pixel norm", (4, 4, 4), lambda x: total(x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8))),
    ("class sum", (2, 4, 4), lambda x: x.tanh().view(len(x), 2, -1).sum(2).square().sum(1)),
    ("channel shuffle", (4, 3, 3), lambda x: total(F.channel_shuffle(x, 2).sin())),
    (
        "frames",
        (3, 2, 4, 4),
        lambda x: total(
            F.conv2d(x.flatten(0, 1), like(x, 2, 5, 6)[:, :2, :4].reshape(2, 2, 2, 2)).unflatten(0, (-1, 3)).sin()
        ),
    ),
    ("conv", (2, 6, 6), net(lambda: nn.Conv2d(2, 3, 3, padding=1), nn.SiLU, lambda: nn.Conv2d(3, 2, 3, 2))),
    ("conv 1-d", (2, 9), net(lambda: nn.Conv1d(2, 3, 3, padding=1), nn.Tanh, lambda: nn.Conv1d(3, 2, 3, 2))),
    ("conv 3-d", (1, 4, 4, 4), net(lambda: nn.Conv3d(1, 2, 3, padding=1), nn.Tanh)),
    ("grouped", (4, 5, 5), net(lambda: nn.Conv2d(4, 6, 3, groups=2), nn.Tanh)),
    ("depthwise", (4, 5, 5), net(lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Tanh, lambda: nn.Conv2d(4, 2, 1))),
    ("dilated", (2, 7, 7), net(lambda: nn.Conv2d(2, 3, 3, padding=2, dilation=2), nn.Tanh)),
    ("conv same", (2, 5, 5), net(lambda: nn.Conv2d(2, 3, (3, 2), padding="same"), nn.Tanh)),
    ("conv circular", (2, 5, 5), net(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Tanh)),
    ("conv reflect", (2, 5, 5), net(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.Tanh)),
    ("conv transpose", (2, 4, 4), net(lambda: nn.ConvTranspose2d(2, 3, 4, 2, 1), nn.Tanh)),
    ("conv transpose 1-d", (2, 5), net(lambda: nn.ConvTranspose1d(2, 3, 3, 2, 1, 1), nn.Tanh)),
    ("conv transpose 3-d", (1, 2, 3, 2), net(lambda: nn.ConvTranspose3d(1, 2, 3, 2, 1, 1), nn.Tanh)),
    ("conv transpose grouped", (4, 3, 3), net(lambda: nn.ConvTranspose2d(4, 4, 3, 2, groups=2, dilation=2), nn.Tanh)),
    ("batch norm", (3, 4, 4), net(lambda: nn.Conv2d(3, 3, 1), lambda: nn.BatchNorm2d(3), nn.ReLU)),
    (
        "norms",
        (4, 4),
        net(lambda: nn.LayerNorm((4, 4)), lambda: nn.GroupNorm(2, 4), lambda: nn.BatchNorm1d(4), nn.Tanh),
    ),
    ("layer norm 2-d", (6, 4, 4), net(lambda: nn.GroupNorm(1, 6), nn.GELU)),
    ("instance norm affine", (3, 4, 4), net(lambda: nn.InstanceNorm2d(3, affine=True), nn.Tanh)),
    ("instance norm running", (3, 4, 4), net(lambda: nn.InstanceNorm2d(3, track_running_stats=True), nn.Tanh)),
    (
        "mlp",
        (6,),
        net(lambda: nn.Linear(6, 16), nn.SiLU, lambda: nn.Linear(16, 16), nn.Softplus, lambda: nn.Linear(16, 1)),
    ),
    ("spectral norm", (6,), net(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Tanh)),
    ("weight norm", (6,), net(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh)),
    ("prelu net", (6,), net(lambda: nn.Linear(6, 8), lambda: nn.PReLU(8), lambda: nn.Linear(8, 2))),
    ("dropout in eval mode", (6,), net(lambda: nn.Linear(6, 8), nn.Dropout, nn.Tanh)),
    ("maxout", (6,), net(lambda: nn.Linear(6, 8), lambda: nn.Unflatten(1, (4, 2)), lambda: nn.MaxPool1d(2))),
    (
        "alexnet",
        (2, 8, 8),
        net(lambda: nn.Conv2d(2, 4, 3), nn.ReLU, lambda: nn.MaxPool2d(2), nn.Flatten, lambda: nn.Linear(36, 3)),
    ),
    ("attention", (5, 8), module(Attention)),
    ("transformer", (8, 8), module(lambda: Ends(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)))),
    ("vit block", (1, 8, 8), module(Block)),
    ("u-net", (1, 8, 8), module(UNet)),
    ("gru", (4, 3), module(lambda: Recurrent(nn.GRUCell(3, 5)))),
    ("lstm", (4, 3), module(lambda: Recurrent(nn.LSTMCell(3, 5)))),
    ("rnn", (4, 3), module(lambda: Recurrent(nn.RNNCell(3, 5)))),
    ("gru layer", (4, 3), module(lambda: RecurrentLayer(nn.GRU(3, 5, batch_first=True)))),
    ("lstm layer", (4, 3), module(lambda: RecurrentLayer(nn.LSTM(3, 5, batch_first=True)))),
    ("bilinear form", (6,), module(Bilinear)),
    ("embedding", (6,), module(Embedded)),
    ("cosine module", (6,), lambda x: nn.CosineSimilarity()(x, x.roll(1, 1))),
]


ENERGIES: list[tuple[str, tuple[int, ...], Any]] = [*((name, (6,), energy) for name, energy in VECTORS), *OTHERS]
