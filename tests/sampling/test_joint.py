"""Several tensors as one state: packing, and the chains of the energy written by hand."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import fastebm


def coupled(positions, cell):
    """Particles in a box whose size is a part of the state."""
    return 0.5 * (positions - cell[:, None, None]).square().sum((1, 2)) + 2 * (cell - 1).square()


def by_name(parts, shift=None):
    energy = coupled(parts["positions"], parts["cell"])
    return energy if shift is None else energy + (parts["cell"] * shift[:, 0])


def by_hand(x):
    return coupled(x[:, :12].view(-1, 4, 3), x[:, 12])


def starts(count=6, dtype=torch.float32):
    made = torch.Generator().manual_seed(0)
    return {
        "positions": torch.randn(count, 4, 3, generator=made, dtype=dtype),
        "cell": torch.rand(count, generator=made, dtype=dtype),
    }


SAMPLERS = {
    "Langevin": lambda energy: fastebm.Langevin(energy, 0.05, 0.1),
    "MALA": lambda energy: fastebm.MALA(energy, 0.1),
    "Underdamped": lambda energy: fastebm.Underdamped(energy, 0.1, 1.0),
    "HMC": lambda energy: fastebm.HMC(energy, 0.2, 3),
    "MCLMC": lambda energy: fastebm.MCLMC(energy, 0.5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_come_back_as_they_were(dtype):
    start = starts(dtype=dtype)
    joint = fastebm.Joint(by_name, start)
    packed = joint.pack(start)
    assert packed.shape == (6, 13)
    assert packed.dtype == dtype
    back = joint.unpack(packed)
    assert list(back) == ["positions", "cell"]
    assert all(torch.equal(back[name], start[name]) for name in start)
    trajectory = joint.unpack(packed.expand(5, 6, 13))
    assert trajectory["positions"].shape == (5, 6, 4, 3)
    assert trajectory["cell"].shape == (5, 6)
    empty = joint.pack({name: part[:0] for name, part in start.items()})
    assert empty.shape == (0, 13)
    assert joint.unpack(empty)["positions"].shape == (0, 4, 3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_chains_of_the_energy_written_by_hand(name):
    start = starts()
    pair = fastebm.Joint(coupled, tuple(start.values()))
    named = fastebm.Joint(by_name, start)
    x0 = named.pack(start)
    assert torch.equal(pair.pack(tuple(start.values())), x0)
    wanted = SAMPLERS[name](by_hand).sample(x0, 20, seed=1)
    for joint in (pair, named):
        sampler = SAMPLERS[name](joint)
        torch.testing.assert_close(sampler.sample(x0, 20, seed=1), wanted, rtol=1e-4, atol=1e-5)
        assert sampler.gradient.batch_invariant, sampler.gradient.reason
        whole = sampler.sample(x0, 20, seed=1)
        assert torch.equal(sampler.sample(x0, 20, seed=1, batch_size=2), whole)


def test_masses_masks_and_conditions():
    start = starts(400)
    joint = fastebm.Joint(by_name, start)
    mass = joint.spread({"positions": torch.tensor([[1.0], [2.0], [3.0], [4.0]]), "cell": 10})
    assert mass.tolist() == [1.0] * 3 + [2.0] * 3 + [3.0] * 3 + [4.0] * 3 + [10.0]
    mask = joint.spread({"positions": False, "cell": True})
    assert mask.dtype == torch.bool
    x0 = joint.pack(start)
    sampler = fastebm.HMC(joint, 0.2, 5, mass=mass)
    end = joint.unpack(sampler.sample(x0, 60, seed=2, mask=mask, known=x0, conditions=[torch.zeros(400, 1)]))
    assert torch.equal(end["cell"], start["cell"])
    error = (end["positions"] - start["cell"][:, None, None]).flatten()
    assert abs(float(error.mean())) < 4 * 4800**-0.5
    assert abs(float(error.var()) - 1) < 5 * (2 / 4800) ** 0.5


def test_the_weights_of_a_module_and_of_a_bound_method_count():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))
            self.drop = nn.Dropout(0.5)

        def forward(self, positions, cell):
            return self.scale * self.drop(coupled(positions, cell))

    start = tuple(starts().values())
    net = Net()
    for energy in (net, net.forward, functools.partial(net)):
        joint = fastebm.Joint(energy, start)
        assert [*joint.parameters()] == [net.scale]
        assert len(joint.state_dict()) == 1
        sampler = fastebm.Langevin(joint, 0.05, 0.1)
        with torch.no_grad():
            net.scale.fill_(1.0)
        before = sampler.sample(joint.pack(start), 5, seed=0)
        with torch.no_grad():
            net.scale.fill_(2.0)
        twice = fastebm.Langevin(fastebm.Joint(lambda *parts: 2 * coupled(*parts), start), 0.05, 0.1)
        torch.testing.assert_close(sampler.sample(joint.pack(start), 5, seed=0), twice.sample(joint.pack(start), 5, 0))
        assert not torch.equal(before, sampler.sample(joint.pack(start), 5, seed=0))
        assert net.training
        assert net.drop.training


def test_a_score_returns_parts():
    start = starts(2000)
    joint = fastebm.Joint(lambda parts: {name: -part for name, part in parts.items()}, start)
    x = fastebm.Underdamped(fastebm.score_gradient(joint), 0.3, 1.0).sample(joint.pack(start), 60, seed=0)
    assert abs(float(x.var()) - 1) < 5 * (2 / x.numel()) ** 0.5


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda joint, s: fastebm.Joint(3, s), TypeError, "energy is a int"),
        (lambda joint, s: fastebm.Joint(by_name, s["cell"]), TypeError, "a tuple or dict"),
        (lambda joint, s: fastebm.Joint(by_name, {}), TypeError, "a tuple or dict"),
        (lambda joint, s: fastebm.Joint(by_name, {"cell": 1.0}), TypeError, "part 'cell' must be a tensor"),
        (lambda joint, s: joint.pack({"cell": s["cell"]}), ValueError, r"the parts are \['positions', 'cell'\]"),
        (lambda joint, s: joint.pack((s["cell"],)), TypeError, "a dict with"),
        (lambda joint, s: joint.pack(s | {"cell": s["cell"][:3]}), ValueError, r"part 'cell' must be a tensor \(6,\)"),
        (lambda joint, s: joint.pack(s | {"positions": 1.0}), ValueError, "part 'positions' must be a tensor"),
        (lambda joint, s: joint.pack(s | {"cell": s["cell"].double()}), TypeError, "of one dtype"),
        (lambda joint, s: joint.unpack(torch.zeros(6, 12)), ValueError, r"shape \(\.\.\., 13\)"),
        (lambda joint, s: joint.spread({"positions": torch.ones(5), "cell": 1}), ValueError, r"broadcast to \(4, 3\)"),
        (lambda joint, s: fastebm.Joint(coupled, (s["cell"],)).pack((1, 2)), TypeError, "a tuple of 1"),
    ],
)
def test_what_does_not_fit_is_told(call, error, words):
    start = starts()
    with pytest.raises(error, match=words):
        call(fastebm.Joint(by_name, start), start)


def test_who_hands_over_several_tensors_is_told_of_it():
    start = tuple(starts().values())
    with pytest.raises(TypeError, match=r"x0 must be a tensor, got tuple; fastebm\.Joint"):
        fastebm.MALA(fastebm.Joint(coupled, start), 0.1).sample(start, 2)
