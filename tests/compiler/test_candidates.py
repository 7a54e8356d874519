"""Which program comes first: it depends on the energy and the kind of samples alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastebm.compiler import candidates as choosing
from fastebm.compiler.candidates import FUSED, LANES, Candidate, ProgramKey, candidates
from fastebm.ops import backends


def convolutions(channels: int, inner: int) -> nn.Module:
    """Two convolutions of an image of 3x8x8 with so many channels between them, and a linear map."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, channels, 3, padding=1), nn.SiLU(), nn.Conv2d(channels, inner, 3, padding=1), nn.SiLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inner * 64, 1), nn.Flatten(0)).requires_grad_(False)


def first(net: nn.Module, batch: int, dtype: torch.dtype) -> str:
    x = torch.zeros(batch, 3, 8, 8)
    made = next(iter(candidates(net, net, ProgramKey(x.shape[1:], x.dtype, x.device, dtype), x)))
    assert isinstance(made, Candidate)
    return made.name


@pytest.fixture
def without_matrix_units():
    extension = backends._extension
    if extension is None or not backends.runs_compiled("run_lanes"):
        pytest.skip("the compiled operators are not built, or not chosen")
    before = extension.active_variant()
    if before == "amx":
        extension.set_variant("avx512_bf16")
    yield
    extension.set_variant(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("channels", "inner", "name"), [(2, 2, LANES), (8, 4, LANES), (64, 64, FUSED), (128, 32, FUSED)]
)
def test_images_take_lanes_where_there_is_little_to_multiply(without_matrix_units, channels, inner, name, dtype):
    net = convolutions(channels, inner)
    for batch in (1, 64):
        assert first(net, batch, dtype) == name


def test_linear_maps_of_images_take_lanes(without_matrix_units):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 256), nn.SiLU(), nn.Linear(256, 1), nn.Flatten(0))
    assert first(net.requires_grad_(False), 2, torch.float32) == LANES


class SumByView(nn.Module):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h.view(len(h), -1).sum(1)


@pytest.mark.parametrize("norm", [nn.Identity, nn.InstanceNorm2d, lambda width: nn.GroupNorm(8, width)])
def test_critics_of_others_are_fused_programs(without_matrix_units, norm):
    layers = (nn.Conv2d(3, 64, 3, padding=1), norm(64), nn.Hardswish(), nn.Conv2d(64, 64, 3, padding=1), norm(64))
    net = nn.Sequential(*layers, nn.Mish(), nn.MaxPool2d(2), SumByView()).requires_grad_(False)
    assert first(net, 2, torch.float32) == FUSED


ENERGIES = {
    "lattice": (lambda x: ((x.roll(1, 2) - x).square() + x**4).sum((1, 2, 3)), False),
    "filters of a closure": (lambda x: torch.conv2d(x, torch.ones(2, 3, 3, 3)).square().sum((1, 2, 3)), True),
    "a product of matrices": (lambda x: (x.flatten(1) @ torch.ones(192, 4)).square().sum(1), True),
    "convolutions": (convolutions(2, 2), True),
    "no run": (lambda x: x.square().sum((1, 2, 3)) * [][0], True),
}


@pytest.mark.parametrize("name", ENERGIES)
def test_an_image_energy_without_products_is_not_exported_first(monkeypatch, name):
    if not backends.runs_compiled("run_lanes"):
        pytest.skip("the compiled operators are not built, or not chosen")
    energy, exports = ENERGIES[name]
    exported = []
    monkeypatch.setattr(choosing, "capture", lambda *_: exported.append(True) or pytest.fail("looked at first"))
    x, state = torch.rand(2, 3, 8, 8), torch.get_rng_state()
    module = energy if isinstance(energy, nn.Module) else None
    found = candidates(energy, module, ProgramKey(x.shape[1:], x.dtype, x.device, x.dtype), x)
    if exports:
        with pytest.raises(pytest.fail.Exception, match="looked at first"):
            next(iter(found))
    else:
        made = next(iter(found))
        assert isinstance(made, Candidate)
        assert made.name == LANES
    assert bool(exported) == exports
    assert torch.equal(torch.get_rng_state(), state)


def test_float32_chooses_alike_with_matrix_units_and_without():
    if not backends.runs_compiled("run_lanes"):
        pytest.skip("the compiled operators are not built, or not chosen")
    assert first(convolutions(2, 2), 2, torch.float32) == LANES
    assert first(convolutions(64, 64), 2, torch.float32) == FUSED
