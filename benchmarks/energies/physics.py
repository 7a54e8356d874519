"""Energies of physics and chemistry: lattices, spins, chains, clusters of particles, molecules."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .entry import Entry, image


def phi4_chain(phi: Tensor) -> Tensor:
    kinetic = (phi.roll(1, dims=-1) - phi).square() / 2
    return (kinetic - 0.5 * phi.square() + 0.25 * phi**4).sum(-1)


def phi4_lattice(phi: Tensor) -> Tensor:
    action = (4 - 4.0) * phi**2 + 0.5 * phi**4
    for axis in (1, 2):
        action = action - phi * torch.roll(phi, 1, axis) - phi * torch.roll(phi, -1, axis) + 2 * phi**2
    return action.sum(dim=(1, 2))


def phi4_slices(phi: Tensor) -> Tensor:
    across = (phi[..., 1:] - phi[..., :-1]).pow(2).sum((1, 2, 3))
    down = (phi[..., 1:, :] - phi[..., :-1, :]).pow(2).sum((1, 2, 3))
    return 0.5 * (across + down) + (0.25 * phi**4 - 0.5 * phi**2).sum((1, 2, 3))


def xy_model(theta: Tensor) -> Tensor:
    right, below = torch.roll(theta, -1, 2), torch.roll(theta, -1, 1)
    return -(torch.cos(theta - right) + torch.cos(theta - below)).sum(dim=[1, 2])


def gauge_plaquettes(links: Tensor) -> Tensor:
    """U(1) links in two directions, (B, 2, L, L)."""
    u, v = links[:, 0], links[:, 1]
    plaquette = u + v.roll(-1, 1) - u.roll(-1, 2) - v
    return 2.0 * (1 - torch.cos(plaquette)).sum((1, 2))


class SoftIsing(nn.Module):
    """Ising spins after a Hubbard-Stratonovich transformation, with couplings of a 6x6 torus."""

    def __init__(self, side: int = 6):
        super().__init__()
        spins = torch.arange(side * side).view(side, side)
        coupling = torch.zeros(side * side, side * side)
        for axis in (0, 1):
            coupling[spins.flatten(), spins.roll(1, axis).flatten()] = 0.4
        coupling = coupling + coupling.T + 2.0 * torch.eye(side * side)
        self.register_buffer("inverse", torch.linalg.inv(coupling))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * torch.einsum("bi,ij,bj->b", x, self.inverse, x) - torch.log(torch.cosh(x)).sum(1)


class SpinGlass(nn.Module):
    """Soft spins in double wells with random couplings."""

    def __init__(self, spins: int = 32):
        super().__init__()
        coupling = torch.randn(spins, spins) / math.sqrt(spins)
        self.register_buffer("coupling", (coupling + coupling.T) / 2)

    def forward(self, s: Tensor) -> Tensor:
        pairs = torch.bmm((s @ self.coupling).unsqueeze(1), s.unsqueeze(2)).flatten()
        return (s.square() - 1).square().sum(1) - pairs


def cluster(shape: tuple[int, ...], generator: Generator, scale: float) -> Tensor:
    """Particles near the points of a grid that is 1.2 wide, so that none overlap; displaced by up to 0.1 `scale`."""
    _, particles, dim = shape
    side = math.ceil(particles ** (1 / dim))
    axes = [torch.arange(side, dtype=torch.float32)] * dim
    points = torch.cartesian_prod(*axes)[:particles]
    return 1.2 * (points - points.mean(0)) + 0.2 * scale * (torch.rand(shape, generator=generator) - 0.5)


def lennard_jones_cdist(x: Tensor) -> Tensor:
    row, column = torch.triu_indices(x.shape[1], x.shape[1], offset=1)
    r = torch.cdist(x, x)[:, row, column]
    return (4 * (r**-12 - r**-6)).sum(1) + 0.5 * (x - x.mean(1, keepdim=True)).square().sum((1, 2))


def lennard_jones_differences(x: Tensor) -> Tensor:
    n = x.shape[1]
    difference = x[:, :, None, :] - x[:, None, :, :]
    squared = (difference**2).sum(-1) + torch.eye(n, dtype=x.dtype, device=x.device)
    inverse = 1 / squared**3
    pairs = 4 * (inverse**2 - inverse) * (1 - torch.eye(n, dtype=x.dtype, device=x.device))
    return 0.5 * pairs.sum((1, 2)) + 0.5 * x.square().sum((1, 2))


def lennard_jones_fluid(x: Tensor) -> Tensor:
    """In a periodic box, by the nearest image of each particle."""
    box = 5.0
    i, j = torch.triu_indices(x.shape[1], x.shape[1], 1)
    difference = x[:, i] - x[:, j]
    difference = difference - box * torch.round(difference / box)
    inverse = difference.pow(2).sum(-1).reciprocal().pow(3)
    return (4 * inverse * (inverse - 1)).sum(-1)


def morse_cluster(x: Tensor) -> Tensor:
    i, j = torch.combinations(torch.arange(x.shape[1])).T
    r = torch.linalg.vector_norm(x.index_select(1, i) - x.index_select(1, j), dim=-1)
    return ((1 - torch.exp(-3.0 * (r - 1.1))) ** 2 - 1).sum(1)


def double_well_particles(x: Tensor) -> Tensor:
    """DW4: four particles in the plane, with a double well in each distance."""
    i, j = torch.triu_indices(4, 4, 1)
    d = (x[:, i] - x[:, j]).norm(dim=-1) - 4.0
    return 0.5 * (-4.0 * d**2 + 0.9 * d**4).sum(1)


def spread(shape: tuple[int, ...], generator: Generator, scale: float) -> Tensor:
    corners = torch.tensor([[0.0, 0], [4, 0], [0, 4], [4, 4]])
    return corners + 0.3 * scale * torch.randn(shape, generator=generator)


def trapped_ions(x: Tensor) -> Tensor:
    n = x.size(1)
    mask = ~torch.eye(n, dtype=torch.bool, device=x.device)
    squared = (x.unsqueeze(2) - x.unsqueeze(1)).square().sum(-1).masked_fill(~mask, 1.0)
    coulomb = squared.rsqrt().masked_fill(~mask, 0.0)
    return 0.5 * coulomb.sum((1, 2)) + 0.5 * (x * x).sum((1, 2))


def bent_chain(shape: tuple[int, ...], generator: Generator, scale: float) -> Tensor:
    """A helix of beads about one apart, displaced by about 0.1 `scale`."""
    turn = torch.arange(shape[1], dtype=torch.float32)
    helix = torch.stack([torch.cos(turn), torch.sin(turn), 0.4 * turn], dim=1)[:, : shape[2]]
    return helix + 0.1 * scale * torch.randn(shape, generator=generator)


def elastic_chain(x: Tensor) -> Tensor:
    bonds = x[:, 1:] - x[:, :-1]
    stretching = (bonds.norm(dim=-1) - 1).square().sum(1)
    bending = (x[:, 2:] - 2 * x[:, 1:-1] + x[:, :-2]).square().sum((1, 2))
    return 50 * stretching + bending


def dihedral_chain(x: Tensor) -> Tensor:
    """Bonds, angles and dihedrals of a short polymer."""
    bonds = torch.diff(x, dim=1)
    lengths = bonds.norm(dim=-1)
    cosines = -F.cosine_similarity(bonds[:, 1:], bonds[:, :-1], dim=-1)
    n1 = torch.linalg.cross(bonds[:, :-2], bonds[:, 1:-1])
    n2 = torch.linalg.cross(bonds[:, 1:-1], bonds[:, 2:])
    m1 = torch.linalg.cross(n1, F.normalize(bonds[:, 1:-1], dim=-1))
    phi = torch.atan2((m1 * n2).sum(-1), (n1 * n2).sum(-1))
    bonded = 10 * (lengths - 1).square().sum(1) + 5 * (cosines + 0.4).square().sum(1)
    return bonded + (1 + torch.cos(3 * phi)).sum(1)


def frenkel_kontorova(x: Tensor) -> Tensor:
    springs = 0.5 * (torch.diff(x, dim=1) - 0.1).square().sum(1)
    return springs + (1 - torch.cos(2 * math.pi * x)).sum(1)


def toda(x: Tensor) -> Tensor:
    bonds = x - torch.roll(x, 1, dims=1)
    return (torch.exp(-bonds) + bonds - 1 + 0.05 * x.square()).sum(1)


def fermi_pasta_ulam(x: Tensor) -> Tensor:
    d = torch.diff(F.pad(x, (1, 1)), dim=1)
    return (d**2 / 2 + 0.25 * d**3 / 3 + 0.5 * d**4 / 4).sum(1)


class SpectralPrior(nn.Module):
    """A Gaussian field of power spectrum 1 / (1 + k^2), by the FFT."""

    def __init__(self, side: int = 16):
        super().__init__()
        ky, kx = torch.fft.fftfreq(side) * side, torch.fft.rfftfreq(side) * side
        self.register_buffer("weight", (1 + ky[:, None] ** 2 + kx**2) / side**2)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (self.weight * torch.fft.rfft2(x).abs().square()).sum((-3, -2, -1))


def ginzburg_landau(x: Tensor) -> Tensor:
    psi = torch.view_as_complex(x)
    gradient = sum((psi - psi.roll(1, axis)).abs().square() for axis in (1, 2))
    density = psi.real.square() + psi.imag.square()
    return (gradient - density + 0.5 * density.square()).sum((1, 2))


def free_field(x: Tensor) -> Tensor:
    kernel = torch.tensor([[0.0, -1, 0], [-1, 4.5, -1], [0, -1, 0]]).to(x)[None, None]
    return 0.5 * (x * F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), kernel)).sum((1, 2, 3))


class TotalVariation(nn.Module):
    """A noisy image and the smoothed total variation of its explanation."""

    def __init__(self, side: int = 16):
        super().__init__()
        self.register_buffer("noisy", torch.rand(1, side, side))

    def forward(self, x: Tensor) -> Tensor:
        dx, dy = torch.diff(x, dim=3, append=x[..., -1:]), torch.diff(x, dim=2, append=x[..., -1:, :])
        variation = torch.sqrt(dx**2 + dy**2 + 1e-4).sum((1, 2, 3))
        return 10 * (x - self.noisy).square().sum((1, 2, 3)) + 2 * variation


def determinantal(x: Tensor) -> Tensor:
    """Repulsion by the log-determinant of a kernel matrix."""
    kernel = torch.exp(-0.5 * (x.unsqueeze(2) - x.unsqueeze(1)).square().sum(-1))
    kernel = kernel + 0.1 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return 0.5 * x.square().sum((1, 2)) - torch.logdet(kernel)


def membrane(x: Tensor) -> Tensor:
    """A membrane of points in space, (B, 3, 8, 8): springs to neighbours with a pressure."""
    links = [F.pairwise_distance(*pair) for pair in ((x[..., 1:], x[..., :-1]), (x[..., 1:, :], x[..., :-1, :]))]
    return sum((link - 0.5).square().flatten(1).sum(1) for link in links) - 0.01 * x[:, 2].sum((1, 2))


def _physics(name, function, shape, source, **options) -> Entry:
    return Entry(name, "physics", source, lambda: function, shape, **options)


NEAR = {"scales": (0.3, 1.0), "step_size": 1e-5}

PHYSICS: tuple[Entry, ...] = (
    _physics("phi^4, chain", phi4_chain, (64,), "scalar field theory in 1-D, by roll"),
    _physics("phi^4, lattice", phi4_lattice, (16, 16), "Albergo et al. 2019: the action of a 2-D lattice, by roll"),
    _physics("phi^4, slices", phi4_slices, (1, 16, 16), "the same with open ends, as an image of one channel"),
    _physics("XY model", xy_model, (8, 8), "Kosterlitz and Thouless 1973: planar spins on a torus"),
    _physics("U(1) gauge", gauge_plaquettes, (2, 8, 8), "Kanwar et al. 2020: plaquettes of a gauge field"),
    Entry("soft Ising", "physics", "Hubbard 1959; Zhang et al. 2012: continuous relaxation", SoftIsing, (36,)),
    Entry("spin glass", "physics", "Sherrington and Kirkpatrick 1975, with soft spins", SpinGlass, (32,)),
    _physics(
        "Lennard-Jones, cdist", lennard_jones_cdist, (13, 3), "LJ13 of Köhler et al. 2020", states=cluster, **NEAR
    ),
    _physics(
        "Lennard-Jones, differences", lennard_jones_differences, (7, 2), "seven discs, by pairs", states=cluster, **NEAR
    ),
    _physics("Lennard-Jones, periodic", lennard_jones_fluid, (8, 2), "nearest images by round", states=cluster, **NEAR),
    _physics("Morse cluster", morse_cluster, (8, 3), "Morse 1929: pairs by index_select", states=cluster, **NEAR),
    _physics("DW4", double_well_particles, (4, 2), "Köhler et al. 2020: equivariant flows", states=spread, **NEAR),
    _physics("trapped ions", trapped_ions, (6, 3), "Coulomb repulsion in a harmonic trap", states=cluster, **NEAR),
    _physics("elastic chain", elastic_chain, (32, 2), "bead-spring polymers", states=bent_chain, **NEAR),
    _physics("dihedral chain", dihedral_chain, (8, 3), "bonds, angles, torsions by atan2", states=bent_chain, **NEAR),
    _physics("Frenkel-Kontorova", frenkel_kontorova, (64,), "Frenkel and Kontorova 1938: a chain on a substrate"),
    _physics("Toda chain", toda, (32,), "Toda 1967: exponential springs", scales=(0.1, 1.0)),
    _physics("Fermi-Pasta-Ulam", fermi_pasta_ulam, (32,), "Fermi, Pasta and Ulam 1955: fixed ends by padding"),
    Entry("spectral prior", "physics", "a Gaussian random field by rfft2", SpectralPrior, (1, 16, 16)),
    _physics("Ginzburg-Landau", ginzburg_landau, (16, 16, 2), "Ginzburg and Landau 1950: a complex order parameter"),
    _physics("free field", free_field, (1, 16, 16), "a lattice Laplacian by a circular convolution"),
    Entry("total variation", "physics", "Rudin, Osher and Fatemi 1992", TotalVariation, (1, 16, 16), states=image),
    _physics("determinantal", determinantal, (6, 2), "Macchi 1975: a determinantal point process, by logdet"),
    _physics("membrane", membrane, (3, 8, 8), "springs between neighbours by pairwise_distance"),
)
