"""Calibrate the generator of a GAN by an energy, and compare it with the same GAN without calibration, on 8x8 digits.

python examples/gan_generator.py                     # two minutes on a core
python examples/gan_generator.py --iterations 20     # seconds: shows that it runs

The energy is not a second discriminator. Its chains move the samples, and the generator minimises the squared distance
to their ends, a loss that does not saturate as the discriminator's may. At test time only the generator runs, once.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import fastebm
from fastebm.data import Images, digits, to_pixels
from fastebm.evaluation import RealImages, evaluate_samples, train_features
from fastebm.training import calibrate, calibration_loss, noise_floor

parser = argparse.ArgumentParser(description="Train a small GAN on digits, with and without calibration.")
parser.add_argument("--iterations", type=int, default=3000, help="updates of each of the two GANs")
parser.add_argument("--weight", type=float, default=3.0, help="of the calibration loss beside the GAN's")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

LATENT, BATCH, STEPS, SAMPLES = 16, 128, 15, 2000
train, test = (Images(to_pixels(images), labels) for images, labels in (digits("train"), digits("test")))
data = train.batch(slice(None))
classifier = train_features(train, test, images_seen=min(100_000, 50 * arguments.iterations))


def perceptron(inputs: int, outputs: int, *last: nn.Module, normed: bool = False) -> nn.Sequential:
    """Three layers, with spectral norm where the Lipschitz constant must stay bounded."""
    layers = [nn.Linear(inputs, 256), nn.Linear(256, 256), nn.Linear(256, outputs)]
    first, second, third = (spectral_norm(layer) for layer in layers) if normed else layers
    return nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2), third, *last)


def train_gan(weight: float, seed: int) -> tuple[nn.Module, float, float]:
    """Returns a generator of (B, 1, 8, 8), the last calibration loss, and seconds. A weight of 0 trains no energy."""
    torch.manual_seed(seed)
    generator = perceptron(LATENT, 64, nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))
    discriminator = nn.Sequential(nn.Flatten(), perceptron(64, 1, nn.Flatten(0)))
    energy = nn.Sequential(nn.Flatten(), perceptron(64, 1, nn.Flatten(0), normed=True))
    sampler = fastebm.Langevin(energy, step_size=0.05, noise_std=1e-3, engine="autograd")
    of_generator = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    of_discriminator = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    of_energy = torch.optim.Adam(energy.parameters(), lr=2e-4, betas=(0.0, 0.9))
    draws = torch.Generator().manual_seed(seed)
    distance, started = 0.0, time.perf_counter()
    for iteration in range(arguments.iterations):
        real = data[torch.randint(len(data), (BATCH,), generator=draws)]
        samples = generator(torch.randn(BATCH, LATENT, generator=draws))

        # The GAN's own update: the non-saturating loss of Goodfellow et al., 2014.
        judged_real, judged_samples = discriminator(real), discriminator(samples.detach())
        step(of_discriminator, F.softplus(-judged_real).mean() + F.softplus(judged_samples).mean())
        loss = F.softplus(-discriminator(samples)).mean()

        # The calibration: chains start at these samples, and the generator is pulled towards their ends.
        if weight:
            targets = calibrate(samples, sampler, STEPS, seed, chain_ids=iteration * BATCH)
            calibration = calibration_loss(samples, targets)
            energies = energy(torch.cat((real, targets)))
            step(of_energy, energies[:BATCH].mean() - energies[BATCH:].mean())
            loss, distance = loss + weight * calibration, calibration.item()
        step(of_generator, loss)
    return generator.eval(), distance, time.perf_counter() - started


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


least = noise_floor(fastebm.Langevin(torch.nn.Identity(), step_size=0.05, noise_std=1e-3), STEPS, 64)
for name, weight in (("plain", 0.0), ("calibrated", arguments.weight)):
    generator, distance, seconds = train_gan(weight, arguments.seed)
    with torch.no_grad():
        drawn = generator(torch.randn(SAMPLES, LATENT, generator=torch.Generator().manual_seed(1)))
    found = evaluate_samples(drawn, RealImages(train, test), classifier)
    of, real_of = found.comparison, found.classes
    moved = f"; chains move by {distance:.4f} (noise alone {least:.4f})" if weight else ""
    print(
        f"{name:10} distance {of.samples.frechet:.2f} (noise {of.noise.frechet:.1f}), precision "
        f"{of.samples.precision:.2f}, recall {of.samples.recall:.2f}, confident on {real_of.confident_share:.0%} (real "
        f"{real_of.confident_share_real:.0%}); {seconds:.0f} s{moved}"
    )
