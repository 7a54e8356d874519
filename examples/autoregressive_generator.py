"""Calibrate an autoregressive generator by an energy, and compare it with the same model without, on 8x8 digits.

python examples/autoregressive_generator.py                     # three minutes on a core
python examples/autoregressive_generator.py --iterations 10     # seconds: shows that it runs

The model draws one pixel after another from 17 brightness levels. No gradient passes through the draws, so the squared
distance from samples to the ends of their chains can't be minimised. The likelihood of the chain ends replaces it. A
Gaussian decoder minimises ||end - G(z)||^2, which is -log N(end; G(z), 1) up to constants. This model minimises
-log p(end): maximum likelihood on calibrated samples, mixed with that on data. Uniform noise within a level makes
brightnesses continuous before a chain starts, and its end is rounded to the nearest level.

The calibration does not help here; docs/ec-vae.md has the numbers. A squared distance would move the generator by
exactly the chain's small step. Here the rounding turns that step into a jump of a whole level at some pixels, which is
noise in the training data.
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
from fastebm.training import calibrate

parser = argparse.ArgumentParser(
    description="Train a small autoregressive model of digits, with and without calibration."
)
parser.add_argument("--iterations", type=int, default=1500, help="updates of each of the two models")
parser.add_argument("--weight", type=float, default=1.0, help="of -log p(chain ends) beside -log p(data)")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

PIXELS, LEVELS, WIDTH, BATCH, STEPS, SAMPLES = 64, 17, 256, 64, 15, 2000
train, test = (Images(to_pixels(images), labels) for images, labels in (digits("train"), digits("test")))
data, unseen = (((digits(split)[0] + 1) * 8).round().long().flatten(1) for split in ("train", "test"))
classifier = train_features(train, test, images_seen=min(100_000, 50 * arguments.iterations))


class MaskedLinear(nn.Linear):
    """A linear layer in which unit i sees those of an earlier rank alone, or of the same where `same`."""

    def __init__(self, before: Tensor, after: Tensor, same: bool) -> None:
        super().__init__(len(before), len(after))
        self.register_buffer("mask", (before <= after[:, None] if same else before < after[:, None]).float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Autoregressive(nn.Module):
    """p(x) = Π p(x_i | x_1 .. x_{i-1}) over levels (B, 64) in 0..16, by a masked perceptron (Germain et al., 2015)."""

    def __init__(self) -> None:
        super().__init__()
        pixel, hidden = torch.arange(PIXELS), torch.arange(WIDTH) % (PIXELS - 1)
        self.body = nn.Sequential(
            MaskedLinear(pixel, hidden, same=True), nn.SiLU(), MaskedLinear(hidden, hidden, same=True), nn.SiLU()
        )
        self.head = MaskedLinear(hidden, pixel.repeat_interleave(LEVELS), same=False)

    def nats(self, x: Tensor) -> Tensor:
        """-log p(x), the mean over a batch."""
        logits = self.head(self.body(x / 8 - 1)).unflatten(1, (PIXELS, LEVELS))
        return F.cross_entropy(logits.transpose(1, 2), x, reduction="none").sum(dim=1).mean()

    @torch.no_grad()
    def sample(self, count: int, draws: torch.Generator) -> Tensor:
        x = torch.zeros(count, PIXELS, dtype=torch.long)
        weight = self.head.weight * self.head.mask
        for pixel in range(PIXELS):
            rows = slice(pixel * LEVELS, (pixel + 1) * LEVELS)
            logits = F.linear(self.body(x / 8 - 1), weight[rows], self.head.bias[rows])
            x[:, pixel] = torch.multinomial(logits.softmax(dim=1), 1, generator=draws)[:, 0]
        return x


def continuous(levels: Tensor, draws: torch.Generator) -> Tensor:
    """Numbers in [-1 - 1/16, 1 + 1/16) that round to these levels."""
    return (levels + torch.rand(levels.shape, generator=draws) - 0.5) / 8 - 1


def train_model(weight: float, seed: int) -> tuple[Autoregressive, float]:
    """A model, and seconds; no energy is trained for a weight of 0."""
    torch.manual_seed(seed)
    model = Autoregressive()
    layers = [nn.Linear(PIXELS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)]
    first, second, third = map(spectral_norm, layers)
    energy = nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2), third, nn.Flatten(0))
    sampler = fastebm.Langevin(energy, step_size=0.05, noise_std=1e-3, engine="autograd")
    of_model = torch.optim.Adam(model.parameters(), lr=1e-3)
    of_energy = torch.optim.Adam(energy.parameters(), lr=2e-4, betas=(0.0, 0.9))
    draws = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    for iteration in range(arguments.iterations):
        real = data[torch.randint(len(data), (BATCH,), generator=draws)]
        loss = model.nats(real)
        if weight:
            start = continuous(model.sample(BATCH, draws), draws)
            ends = calibrate(start, sampler, STEPS, seed, chain_ids=iteration * BATCH)
            energies = energy(torch.cat((continuous(real, draws), ends)))
            step(of_energy, energies[:BATCH].mean() - energies[BATCH:].mean())
            if iteration >= arguments.iterations // 5:  # before, there is little of a model and of an energy
                loss = loss + weight * model.nats(((ends + 1) * 8).round().clamp(0, LEVELS - 1).long())
        step(of_model, loss)
    return model, time.perf_counter() - started


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


for name, weight in (("plain", 0.0), ("calibrated", arguments.weight)):
    model, seconds = train_model(weight, arguments.seed)
    drawn = model.sample(SAMPLES, torch.Generator().manual_seed(1)).reshape(-1, 1, 8, 8) / 8 - 1
    found = evaluate_samples(drawn, RealImages(train, test), classifier)
    of, classes = found.comparison, found.classes
    with torch.no_grad():
        bits = float(model.nats(unseen)) / PIXELS / torch.log(torch.tensor(2.0))
    print(
        f"{name:10} distance {of.samples.frechet:.2f} (noise {of.noise.frechet:.1f}), precision "
        f"{of.samples.precision:.2f}, recall {of.samples.recall:.2f}, sure of {classes.confident_share:.0%} (real "
        f"{classes.confident_share_real:.0%}); unseen images {bits:.3f} bits a pixel; {seconds:.0f} s"
    )
