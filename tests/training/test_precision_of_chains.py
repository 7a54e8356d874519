"""bfloat16 on weights that were trained: gradients as near as autocast's, and chains that end where float32's do."""

import dataclasses

import pytest
import torch

from fastebm.compiler import energy_gradient
from fastebm.data import digits
from fastebm.sampling import Cascade
from fastebm.training import DIGITS, train

CHAINS = 600


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = dataclasses.replace(DIGITS, iterations=(60, 120), engine="auto")
    images, _ = digits("train")
    return train(config, images, tmp_path_factory.mktemp("trained"), progress=False, save_pictures=False, device="cpu")


def test_bfloat16_gradients_are_at_most_twice_as_far_off_as_autocast(run):
    net = run.levels[8]
    x = run.sample(32, seed=3)
    wanted = energy_gradient(net.double(), engine="autograd")(x.double())[1]
    net.float()
    errors = {}
    for engine in ("fused", "autograd"):
        found = energy_gradient(net, dtype=torch.bfloat16, engine=engine)(x)[1]
        errors[engine] = float((found - wanted).norm() / wanted.norm())
    assert 0 < errors["fused"] < 2 * errors["autograd"]
    single = energy_gradient(net, dtype=torch.float32, engine="fused")(x)[1]
    assert (single - wanted).norm() < 1e-5 * wanted.norm()


def test_cascades_in_bfloat16_and_float32_end_alike(run):
    """Independent chains: the means of energies, pixels and their squares agree to 4.5 standard errors."""
    ends = {
        dtype: Cascade(run.levels, dtype=dtype).sample(CHAINS, seed, channels=1)
        for seed, dtype in ((11, torch.float32), (12, torch.bfloat16))
    }
    energy = energy_gradient(run.levels[8], engine="autograd")
    for measure in (lambda x: energy(x)[0], lambda x: x.mean((1, 2, 3)), lambda x: x.square().mean((1, 2, 3))):
        one, other = (measure(x).double() for x in ends.values())
        error = ((one.var() + other.var()) / CHAINS).sqrt()
        assert (one.mean() - other.mean()).abs() < 4.5 * error
    same = Cascade(run.levels, dtype=torch.bfloat16).sample(CHAINS, 11, channels=1)
    assert not torch.equal(same, ends[torch.float32])
