"""Attention, sequences, sets, graphs and molecules."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dense import perceptron
from .entry import OF_IMAGES, Entry, image
from .physics import cluster


class AttentionBlock(nn.Module):
    """Layer norm before `nn.MultiheadAttention` and before a perceptron."""

    def __init__(self, dim: int = 16, heads: int = 2):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class SequenceTransformer(nn.Module):
    """Positions by an embedding table, attention blocks, a mean over the sequence."""

    def __init__(self, length: int = 10, dim: int = 16, blocks: int = 2):
        super().__init__()
        self.positions = nn.Embedding(length, dim)
        self.blocks = nn.Sequential(*(AttentionBlock(dim) for _ in range(blocks)))
        self.head = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.head(self.blocks(h).mean(dim=1)).squeeze(-1)


class EncoderLayer(nn.Module):
    """PyTorch's own encoder layer."""

    def __init__(self, dim: int = 16):
        super().__init__()
        layer = nn.TransformerEncoderLayer(dim, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)).sum((1, 2))


class CausalAttention(nn.Module):
    """Heads split by hand and `scaled_dot_product_attention` with a causal mask."""

    def __init__(self, dim: int = 16, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.project, self.out, self.head = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.project(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        return self.head(F.relu(x + self.out(h)))[:, -1, 0]


class VisionTransformer(nn.Module):
    """Patches, a class token, positions, attention blocks."""

    def __init__(self, size: int = 16, patch: int = 4, dim: int = 32):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, stride=patch)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, dim))
        self.blocks = nn.ModuleList(AttentionBlock(dim, 4) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(x.shape[0], -1, -1), h], dim=1) + self.positions
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h)[:, 0])


class Mixer(nn.Module):
    """A perceptron over tokens and one over channels."""

    def __init__(self, tokens: int = 16, dim: int = 16):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.across, self.along = perceptron(tokens, 32, tokens), perceptron(dim, 32, dim)
        self.head = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.along(self.norm2(x))).mean(1)).flatten()


class SetPooling(nn.Module):
    """Learned queries attend to a set of points."""

    def __init__(self, dim: int = 16):
        super().__init__()
        self.embed = nn.Linear(3, dim)
        self.queries = nn.Parameter(torch.randn(2, dim))
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.head = nn.Linear(2 * dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.embed(x))
        pooled, _ = self.attention(self.queries.expand(len(x), -1, -1), h, h)
        return self.head(pooled.flatten(1)).squeeze(1)


class DeepSet(nn.Module):
    """A sum over the points of a set between two perceptrons."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.inner, self.outer = perceptron(3, width, width), perceptron(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).sum(dim=1)).squeeze(-1)


class TokenEnergy(nn.Module):
    """A small network on each token, summed."""

    def __init__(self, dim: int = 24):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).sum((1, 2))


class SoftTokens(nn.Module):
    """Logits of tokens become soft embeddings, which a convolution reads: text by Langevin dynamics."""

    def __init__(self, vocabulary: int = 20, dim: int = 16):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.conv = nn.Conv1d(dim, 32, 3, padding=1)
        self.head = nn.Linear(32, 1)

    def forward(self, logits: Tensor) -> Tensor:
        soft = torch.softmax(logits / 0.7, dim=-1)
        h = F.relu(self.conv((soft @ self.embedding.weight).transpose(1, 2))).amax(dim=2)
        entropy = -(soft * torch.log(soft + 1e-8)).sum((1, 2))
        return self.head(h).squeeze(1) + 0.1 * entropy


class Recurrent(nn.Module):
    """A simple recurrent cell in a Python loop: the surprise of each next step."""

    def __init__(self, dim: int = 4, width: int = 16):
        super().__init__()
        self.cell, self.predict, self.width = nn.Linear(dim + width, width), nn.Linear(width, dim), width

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], self.width, dtype=x.dtype, device=x.device)
        energy = 0.0
        for t in range(x.shape[1]):
            energy = energy + (x[:, t] - self.predict(h)).square().sum(1)
            h = torch.tanh(self.cell(torch.cat([x[:, t], h], dim=1)))
        return energy


class Gru(nn.Module):
    """The last state of `nn.GRU`."""

    def __init__(self, dim: int = 4, width: int = 16):
        super().__init__()
        self.gru, self.head = nn.GRU(dim, width, batch_first=True), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[1][-1]).squeeze(1)


class ChainField(nn.Module):
    """The free energy of a linear chain of labels, by the forward algorithm."""

    def __init__(self, labels: int = 6):
        super().__init__()
        self.transition = nn.Parameter(torch.randn(labels, labels))

    def forward(self, scores: Tensor) -> Tensor:
        alpha = scores[:, 0]
        for t in range(1, scores.size(1)):
            alpha = torch.logsumexp(alpha.unsqueeze(2) + self.transition, dim=1) + scores[:, t]
        return 0.5 * scores.square().sum((1, 2)) - alpha.logsumexp(1)


class Potts(nn.Module):
    """Soft residues at each site, with fields and couplings between sites."""

    def __init__(self, sites: int = 12, states: int = 5):
        super().__init__()
        self.fields = nn.Parameter(torch.randn(sites, states))
        self.couplings = nn.Parameter(0.1 * torch.randn(sites, states, sites, states))

    def forward(self, logits: Tensor) -> Tensor:
        p = logits.softmax(-1)
        pairs = torch.einsum("bia,iajc,bjc->b", p, self.couplings, p)
        return -(p * self.fields).sum((1, 2)) - 0.5 * pairs


class GraphNetwork(nn.Module):
    """Two rounds of messages along the edges of a fixed graph, gathered and added by index."""

    def __init__(self, nodes: int = 8, dim: int = 4, width: int = 16):
        super().__init__()
        ring = torch.arange(nodes)
        source = torch.cat([ring, ring.roll(1), ring.roll(2)])
        self.register_buffer("source", source)
        self.register_buffer("target", ring.repeat(3))
        self.embed, self.message = nn.Linear(dim, width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for _ in range(2):
            message = F.relu(self.message(torch.cat([h[:, self.source], h[:, self.target]], dim=-1)))
            h = h + torch.zeros_like(h).index_add(1, self.target, message)
        return self.head(h).sum(dim=(1, 2))


class Molecule(nn.Module):
    """Radial features of all pairwise distances, filters between atoms, a sum over atoms."""

    def __init__(self, atoms: int = 9, width: int = 16):
        super().__init__()
        self.species = nn.Embedding(4, width)
        self.register_buffer("numbers", torch.arange(atoms) % 4)
        self.register_buffer("centres", torch.linspace(0.5, 4.0, 12))
        self.filter, self.update = perceptron(12, width, width), perceptron(width, width, width)
        self.head = perceptron(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        difference = x.unsqueeze(2) - x.unsqueeze(1)
        off = 1 - torch.eye(n, dtype=x.dtype, device=x.device)
        r = torch.sqrt(difference.square().sum(-1) + 1e-8)
        radial = torch.exp(-4 * (r.unsqueeze(-1) - self.centres) ** 2)
        cutoff = 0.5 * (torch.cos(math.pi * torch.clamp(r / 5, max=1)) + 1) * off
        h = self.species(self.numbers).expand(len(x), -1, -1)
        filters = self.filter(radial) * cutoff.unsqueeze(-1)
        h = h + self.update((filters * h.unsqueeze(1)).sum(2))
        return self.head(h).sum((1, 2))


class EquivariantDistances(nn.Module):
    """Edges see squared distances, nodes the sum of their edges; a weak trap holds the points."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.edge, self.node = perceptron(1, width, width), perceptron(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        distances = torch.cdist(x, x) ** 2
        messages = self.edge(distances.unsqueeze(-1)).sum(dim=2)
        return self.node(messages).sum(dim=1).squeeze(-1) + 0.05 * x.square().sum((1, 2))


class GatherEnergy(nn.Module):
    """Entries chosen by fixed indices, and a table of learned vectors looked up by position."""

    def __init__(self, dim: int = 32):
        super().__init__()
        self.register_buffer("chosen", torch.randint(dim, (16,)))
        self.table = nn.Parameter(torch.randn(dim, 8))

    def forward(self, x: Tensor) -> Tensor:
        picked = x.gather(1, self.chosen.expand(len(x), -1))
        vectors = F.embedding(self.chosen, self.table)
        return (picked.unsqueeze(-1) * vectors).sum(1).square().sum(1) + x.square().sum(1)


def _structure(name, kind, build, shape, source, **options) -> Entry:
    return Entry(name, kind, source, build, shape, **{"step_size": 1e-2} | options)


STRUCTURES: tuple[Entry, ...] = (
    _structure("transformer", "attention", SequenceTransformer, (10, 16), "Vaswani et al. 2017, norms first"),
    _structure("encoder layer", "attention", EncoderLayer, (8, 16), "nn.TransformerEncoderLayer in eval mode"),
    _structure("causal attention", "attention", CausalAttention, (12, 16), "Radford et al. 2019: masked heads"),
    _structure(
        "ViT",
        "attention",
        VisionTransformer,
        (3, 16, 16),
        "Dosovitskiy et al. 2021",
        states=image,
        batches=OF_IMAGES,
        scales=(0.1, 1.0),
    ),
    _structure("Mixer", "attention", Mixer, (16, 16), "Tolstikhin et al. 2021"),
    _structure("set transformer", "attention", SetPooling, (12, 3), "Lee et al. 2019: pooling by attention"),
    _structure("deep set", "structure", DeepSet, (12, 3), "Zaheer et al. 2017"),
    _structure("tokens", "structure", TokenEnergy, (10, 24), "one perceptron on every token"),
    _structure("soft tokens", "structure", SoftTokens, (12, 20), "Qin et al. 2022 (COLD): soft text"),
    _structure("recurrent", "structure", Recurrent, (8, 4), "Elman 1990, as a loop"),
    _structure("GRU", "structure", Gru, (8, 4), "Cho et al. 2014: nn.GRU"),
    _structure("linear chain", "structure", ChainField, (10, 6), "Lafferty et al. 2001: the forward algorithm"),
    _structure("Potts", "structure", Potts, (12, 5), "Potts models of proteins, relaxed by softmax"),
    _structure("graph network", "structure", GraphNetwork, (8, 4), "Gilmer et al. 2017: messages by index_add"),
    _structure(
        "molecule",
        "structure",
        Molecule,
        (9, 3),
        "Schütt et al. 2017 (SchNet): radial filters",
        states=cluster,
        scales=(0.3, 1.0),
    ),
    _structure(
        "squared distances",
        "structure",
        EquivariantDistances,
        (9, 3),
        "Satorras et al. 2021 (EGNN)",
        states=cluster,
        scales=(0.3, 1.0),
    ),
    _structure("gather", "structure", GatherEnergy, (32,), "entries and embeddings by index"),
)
