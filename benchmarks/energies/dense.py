"""Networks of dense layers on vectors: perceptrons, Boltzmann machines, autoencoders, flows, latent priors."""

from __future__ import annotations

import itertools
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .entry import OF_DENSITIES, Entry, image


def perceptron(*widths: int, activation: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


class Squeezed(nn.Module):
    """A net whose output (B, 1) becomes (B,)."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


def readme_net(inputs: int = 3072, width: int = 256) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, 1))


class BoltzmannMachine(nn.Module):
    """Free energy of binary visible units."""

    def __init__(self, visible: int = 784, hidden: int = 256):
        super().__init__()
        self.W = nn.Parameter(0.05 * torch.randn(hidden, visible))
        self.v_bias = nn.Parameter(torch.zeros(visible))
        self.h_bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, v: Tensor) -> Tensor:
        hidden = F.softplus(F.linear(v, self.W, self.h_bias)).sum(dim=1)
        return -torch.matmul(v, self.v_bias) - hidden


class GaussianBoltzmannMachine(nn.Module):
    """Free energy of Gaussian visible units."""

    def __init__(self, visible: int = 64, hidden: int = 128):
        super().__init__()
        self.W = nn.Parameter(0.1 * torch.randn(visible, hidden))
        self.mean = nn.Parameter(torch.zeros(visible))
        self.log_sigma = nn.Parameter(torch.zeros(visible))
        self.bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, v: Tensor) -> Tensor:
        sigma = self.log_sigma.exp()
        quadratic = (0.5 * ((v - self.mean) / sigma) ** 2).sum(1)
        return quadratic - torch.log(1 + torch.exp((v / sigma**2) @ self.W + self.bias)).sum(1)


class ClassifierEnergy(nn.Module):
    """A classifier whose energy is minus the log-sum-exp of its logits, or one logit where a label is given."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor, y: int | None = None) -> Tensor:
        logits = self.classifier(x)
        return -logits.logsumexp(dim=1) if y is None else -F.log_softmax(logits, dim=1)[:, y]


def conditional() -> partial[Tensor]:
    return partial(ClassifierEnergy(perceptron(20, 64, 64, 10, activation=nn.ReLU)).eval(), y=3)


class DenseAutoencoder(nn.Module):
    """The reconstruction error of an autoencoder."""

    def __init__(self, inputs: int = 784):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 16))
        self.decoder = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, inputs), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return F.mse_loss(self.decoder(self.encoder(x)), x, reduction="none").sum(dim=1)


class ProductOfExperts(nn.Module):
    """Student t experts on linear filters."""

    def __init__(self, dim: int = 64, experts: int = 128):
        super().__init__()
        self.filters = nn.Linear(dim, experts, bias=False)
        self.weights = nn.Parameter(torch.rand(experts))

    def forward(self, x: Tensor) -> Tensor:
        return (F.softplus(self.weights) * torch.log1p(0.5 * self.filters(x).square())).sum(-1)


class CouplingFlow(nn.Module):
    """The negative log-likelihood of a RealNVP flow."""

    def __init__(self, dim: int = 4, layers: int = 4):
        super().__init__()
        self.nets = nn.ModuleList(perceptron(dim // 2, 64, dim, activation=nn.ReLU) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        log_det = x.new_zeros(len(x))
        a, b = x.chunk(2, dim=1)
        for net in self.nets:
            s, t = net(a).chunk(2, dim=1)
            s = torch.tanh(s)
            a, b = b * torch.exp(s) + t, a
            log_det = log_det + s.sum(dim=1)
        z = torch.cat([a, b], dim=1)
        return 0.5 * (z**2 + math.log(2 * math.pi)).sum(1) - log_det


class MaskedAutoregressive(nn.Module):
    """One masked layer pair: mean and log scale of each coordinate given those before it."""

    def __init__(self, dim: int = 8, hidden: int = 64):
        super().__init__()
        degrees, inner = torch.arange(dim), torch.arange(hidden) % (dim - 1)
        self.hidden, self.out = nn.Linear(dim, hidden), nn.Linear(hidden, 2 * dim)
        self.register_buffer("mask1", (inner[:, None] >= degrees).float())
        self.register_buffer("mask2", (degrees.repeat(2)[:, None] > inner).float())

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(F.linear(x, self.hidden.weight * self.mask1, self.hidden.bias))
        mean, log_scale = F.linear(h, self.out.weight * self.mask2, self.out.bias).chunk(2, 1)
        return (0.5 * ((x - mean) * torch.exp(-log_scale)) ** 2 + log_scale).sum(1)


class ConvexNetwork(nn.Module):
    """Input-convex: weights between hidden layers are made positive by softplus."""

    def __init__(self, dim: int = 20, width: int = 64):
        super().__init__()
        self.first, self.skip = nn.Linear(dim, width), nn.Linear(dim, width)
        self.inner, self.last = nn.Parameter(torch.randn(width, width) - 4), nn.Parameter(torch.randn(1, width) - 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.softplus(self.first(x))
        h = F.softplus(F.linear(h, F.softplus(self.inner)) + self.skip(x))
        return F.linear(h, F.softplus(self.last)).squeeze(1) + 0.05 * x.square().sum(1)


class Bilinear(nn.Module):
    """A bilinear form of two embeddings of the state, by `nn.Bilinear` and einsum."""

    def __init__(self, dim: int = 20, width: int = 16):
        super().__init__()
        self.left, self.right = nn.Linear(dim, width), nn.Linear(dim, width)
        self.form = nn.Bilinear(width, width, 4)
        self.core = nn.Parameter(torch.randn(width, width) / width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.tanh(self.left(x)), torch.tanh(self.right(x))
        return self.form(a, b).square().sum(-1) + torch.einsum("bi,ij,bj->b", a, self.core, b)


class FourierFeatures(nn.Module):
    """Random sines and cosines before a perceptron."""

    def __init__(self, dim: int = 2, features: int = 64):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(dim, features))
        self.net = perceptron(2 * features, 64, 1, activation=nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        phase = 2 * math.pi * x @ self.frequencies
        return self.net(torch.cat([phase.sin(), phase.cos()], dim=-1))[:, 0]


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(3.0 * x)


class RadialBasis(nn.Module):
    """Gaussian bumps around learned centres."""

    def __init__(self, dim: int = 2, centres: int = 64):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(centres, dim))
        self.log_width = nn.Parameter(torch.zeros(centres))
        self.head = nn.Linear(centres, 1)

    def forward(self, x: Tensor) -> Tensor:
        squared = (x.unsqueeze(1) - self.centres.unsqueeze(0)).pow(2).sum(-1)
        return self.head(torch.exp(-squared * self.log_width.exp())).squeeze(1) + 0.5 * x.pow(2).sum(1)


class Maxout(nn.Module):
    """Linear pieces, of which the largest counts."""

    def __init__(self, dim: int = 20, width: int = 32, pieces: int = 4):
        super().__init__()
        self.pieces = pieces
        self.first, self.second = nn.Linear(dim, width * pieces), nn.Linear(width, pieces)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).view(x.size(0), -1, self.pieces).max(dim=2)[0]
        return self.second(h).amax(dim=1)


class Gated(nn.Module):
    """A residual SwiGLU block with RMS norm."""

    def __init__(self, dim: int = 32):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.up, self.gate, self.down = nn.Linear(dim, 64), nn.Linear(dim, 64), nn.Linear(64, dim)
        self.head = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return self.head(F.gelu(h)).view(-1)


class Ensemble(nn.Module):
    """The mean of several nets' energies, with their spread as a penalty."""

    def __init__(self, members: int = 4):
        super().__init__()
        self.members = nn.ModuleList(perceptron(10, 32, 1, activation=nn.Tanh) for _ in range(members))

    def forward(self, x: Tensor) -> Tensor:
        energies = torch.stack([member(x).squeeze(1) for member in self.members])
        return energies.mean(0) + energies.std(0)


class CosineGuide(nn.Module):
    """The angle between an embedding of the state and a target, as CLIP guidance has it."""

    def __init__(self, dim: int = 64):
        super().__init__()
        self.encoder = perceptron(dim, 128, 32, activation=nn.GELU)
        self.register_buffer("target", torch.randn(1, 32))

    def forward(self, x: Tensor) -> Tensor:
        return 10 * (1 - F.cosine_similarity(F.normalize(self.encoder(x), dim=-1), self.target, dim=-1))


class LatentPosterior(nn.Module):
    """A latent energy-based prior and the likelihood of an image under a small generator."""

    def __init__(self, latent: int = 32):
        super().__init__()
        self.prior = perceptron(latent, 64, 1, activation=nn.GELU)
        self.generator = nn.Sequential(
            nn.Linear(latent, 16 * 4 * 4),
            nn.ReLU(),
            nn.Unflatten(1, (16, 4, 4)),
            nn.ConvTranspose2d(16, 8, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(8, 1, 4, 2, 1),
            nn.Tanh(),
        )
        self.register_buffer("image", 2 * torch.rand(1, 1, 16, 16) - 1)

    def forward(self, z: Tensor) -> Tensor:
        error = (self.generator(z) - self.image).square().sum((1, 2, 3))
        return self.prior(z).squeeze(1) + 0.5 * z.square().sum(1) + error / (2 * 0.3**2)


class Hopfield(nn.Module):
    """The energy of a modern Hopfield network."""

    def __init__(self, dim: int = 64, patterns: int = 100):
        super().__init__()
        self.register_buffer("patterns", torch.randn(patterns, dim) / math.sqrt(dim))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (x * x).sum(-1) - torch.logsumexp(4.0 * x @ self.patterns.t(), dim=-1) / 4.0


def normed(norm: type[nn.Module]) -> nn.Module:
    net = nn.Sequential(nn.Linear(20, 64), norm(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1))
    if isinstance(net[1], nn.BatchNorm1d):
        nn.init.uniform_(net[1].running_var, 0.5, 2.0)
        nn.init.normal_(net[1].running_mean)
    return net


def _dense(name, build, dim, source, **options) -> Entry:
    return Entry(name, "dense", source, build, (dim,), **{"step_size": 1e-2} | options)


DENSE: tuple[Entry, ...] = (
    _dense(
        "MLP 2-64-64-1", lambda: Squeezed(perceptron(2, 64, 64, 1)), 2, "tutorials on toy data", batches=OF_DENSITIES
    ),
    _dense("MLP 784-512-1", lambda: perceptron(784, 512, 1, activation=nn.ReLU), 784, "the smallest net for digits"),
    Entry(
        "MLP 3072-256-1", "dense", "the example of our README", readme_net, (3, 32, 32), states=image, step_size=1e-2
    ),
    _dense("MLP 784-500-500-1", lambda: Squeezed(perceptron(784, 500, 500, 1, activation=nn.Softplus)), 784, "digits"),
    _dense("RBM", BoltzmannMachine, 784, "Hinton 2002: free energy", states=image),
    _dense("Gaussian RBM", GaussianBoltzmannMachine, 64, "Hinton and Salakhutdinov 2006: free energy"),
    _dense(
        "spectral norm",
        lambda: nn.Sequential(
            parametrizations.spectral_norm(nn.Linear(20, 64)),
            nn.ELU(),
            parametrizations.spectral_norm(nn.Linear(64, 64)),
            nn.ELU(),
            nn.Linear(64, 1),
        ),
        20,
        "Miyato et al. 2018: normed layers",
    ),
    _dense(
        "weight norm",
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(20, 64)),
            nn.SELU(),
            parametrizations.weight_norm(nn.Linear(64, 1)),
        ),
        20,
        "Salimans and Kingma 2016: normed layers",
    ),
    _dense("layer norm", lambda: normed(nn.LayerNorm), 20, "Ba et al. 2016, with dropout in eval mode"),
    _dense("batch norm", lambda: normed(nn.BatchNorm1d), 20, "Ioffe and Szegedy 2015, in eval mode"),
    _dense(
        "JEM, dense",
        lambda: ClassifierEnergy(perceptron(784, 256, 10, activation=nn.ReLU)),
        784,
        "Grathwohl et al. 2020: -logsumexp of the logits",
    ),
    _dense("JEM, one class", conditional, 20, "Grathwohl et al. 2020: a class given by a partial"),
    _dense("autoencoder, dense", DenseAutoencoder, 784, "Zhao et al. 2017 (EBGAN): reconstruction error", states=image),
    _dense("product of experts", ProductOfExperts, 64, "Welling et al. 2003: Student t experts"),
    _dense("coupling flow", CouplingFlow, 4, "Dinh et al. 2017 (RealNVP): likelihood", step_size=1e-3),
    _dense("autoregressive flow", MaskedAutoregressive, 8, "Papamakarios et al. 2017 (MAF): likelihood"),
    _dense("convex network", ConvexNetwork, 20, "Amos et al. 2017: input-convex networks"),
    _dense("bilinear", Bilinear, 20, "bilinear forms by nn.Bilinear and einsum"),
    _dense("Fourier features", FourierFeatures, 2, "Tancik et al. 2020", batches=OF_DENSITIES, step_size=1e-4),
    _dense(
        "SIREN",
        lambda: nn.Sequential(nn.Linear(2, 64), Sine(), nn.Linear(64, 64), Sine(), nn.Linear(64, 1)),
        2,
        "Sitzmann et al. 2020: sines as activations",
        batches=OF_DENSITIES,
    ),
    _dense("radial basis", RadialBasis, 2, "Broomhead and Lowe 1988", batches=OF_DENSITIES),
    _dense("Maxout", Maxout, 20, "Goodfellow et al. 2013"),
    _dense("SwiGLU, RMS norm", Gated, 32, "Shazeer 2020; Zhang and Sennrich 2019"),
    _dense("ensemble", Ensemble, 10, "Lakshminarayanan et al. 2017: mean and spread of several nets"),
    _dense("cosine guide", CosineGuide, 64, "Radford et al. 2021 (CLIP): similarity to a target"),
    _dense("latent posterior", LatentPosterior, 32, "Pang et al. 2020: latent prior and generator"),
    _dense("Hopfield", Hopfield, 64, "Ramsauer et al. 2021: modern Hopfield networks"),
)
