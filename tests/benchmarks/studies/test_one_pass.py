"""One decoder pass and chains: all samplers run, and the chains are those of the papers."""

from __future__ import annotations

import torch

from benchmarks.harness.pages import one_pass_table
from benchmarks.studies import one_pass
from fastebm.models import VAE, MultiScaleEnergy
from fastebm.sampling.schedules import evaluate


def test_one_pass_and_chains_are_measured_side_by_side() -> None:
    tiny = one_pass.Nets(size=8, channels=1, latent=4, width=2, max_width=4, energy_width=2, base_width=1)
    rows = one_pass.measure(tiny, batch=2, rounds=1, device="cpu", slice_seconds=0.0)
    chains = [row["method"] for row in rows if row["gradients"]]
    assert [method.split(",")[0] for method in chains] == ["CF-EBM", "like VAEBM", "like NCSN"]
    assert rows[0]["method"] == one_pass.ONE_PASS
    assert rows[0]["ratio"] == 1
    assert all(row["seconds"][0] > 0 for row in rows)
    assert one_pass_table("cpu", {"rows": rows}).count("\n") == 1 + len(rows)


def test_noise_falls_in_ten_levels_of_a_hundred_steps_and_step_sizes_with_its_square() -> None:
    sampler = one_pass.annealed(torch.nn.Flatten())
    num_steps, noise = (evaluate(schedule, 1000) for schedule in (sampler.step_size, sampler.noise_std))
    levels, counts = noise.unique_consecutive(return_counts=True)
    assert counts.tolist() == [100] * 10
    torch.testing.assert_close(levels, torch.logspace(0, -2, 10, dtype=torch.float64) * 0.2**0.5)
    torch.testing.assert_close(num_steps, noise.square() / 2)


def test_latents_and_noise_move_together_under_the_energy_of_the_noisy_image() -> None:
    vae = VAE(8, 1, latent=3, width=2, max_width=4, variance=0.09).eval().requires_grad_(False)
    energy = one_pass.JointEnergy(vae, MultiScaleEnergy(8, 1, width=2).eval()).requires_grad_(False)
    z, noise = torch.randn(2, 3), torch.randn(2, 1, 8, 8)
    state = torch.cat((noise, torch.zeros(2, 1, 8, 8)), 1).requires_grad_()
    with torch.no_grad():
        state[:, 1].flatten(1)[:, :3] = z
    image = vae.decode(z) + 0.3 * noise
    expected = energy.energy(image) + 0.5 * (z.square().sum(1) + noise.square().sum((1, 2, 3)))
    torch.testing.assert_close(energy(state), expected)
    (slope,) = torch.autograd.grad(energy(state).sum(), state)
    assert slope[:, 0].all()
    assert slope[:, 1].flatten(1)[:, :3].all()
    assert not slope[:, 1].flatten(1)[:, 3:].any()  # idle at 0
