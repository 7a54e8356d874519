"""The demo in a page: train an energy model on handwritten digits, coarse to fine, and sample from it.

python examples/quickstart.py            # minutes on two cores
python examples/quickstart.py --quick    # seconds: shows that it runs, learns little
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from fastebm.data import digits
from fastebm.evaluation import evaluate_digits
from fastebm.plotting import save_samples, save_strip
from fastebm.training import DIGITS, train

parser = argparse.ArgumentParser(description="Train on handwritten digits and sample.")
parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the run")
parser.add_argument("--iterations", type=int, nargs=2, default=DIGITS.iterations, help="at 4x4 and at 8x8")
parser.add_argument("--quick", action="store_true", help="a few iterations only")
arguments = parser.parse_args()

# Real images: float32 (N, 1, 8, 8) in [-1, 1]. Yours may have any power of two as size, and 1 or 3 colours.
images, _ = digits("train")

# A configuration is a frozen dataclass. This one trains an energy of 4x4 images first, then grows it to 8x8.
config = dataclasses.replace(DIGITS, iterations=(10, 15) if arguments.quick else tuple(arguments.iterations))

# Trains in a folder with checkpoints, log and pictures. Called again after a stop, it goes on from the last checkpoint.
device = "cuda" if torch.cuda.is_available() else "cpu"
run = train(config, images, arguments.out, device=device)

# Chains from uniform noise at 4x4, enlarged on the way; always the same ones for the same seed.
samples = run.sample(1000, seed=1)
save_samples(arguments.out / "quickstart.png", samples[:100], images[:100])
print(evaluate_digits(samples).explain())

# The energy itself: low for what looks real. Half of each image is noise here, and its energy says so.
energy = run.levels[8]
images = images.to(device)
spoiled = images.clone()
spoiled[..., 4:] = torch.rand_like(spoiled[..., 4:]) * 2 - 1
with torch.no_grad():
    print(f"mean energy of real digits {energy(images).mean():.3f}, of spoiled ones {energy(spoiled).mean():.3f}")

# Or follow the chains, update by update.
moments: list[torch.Tensor] = []
run.cascade().sample(8, seed=1, channels=1, keep=lambda k, x, info: moments.append(x))
save_strip(arguments.out / "quickstart_strip.png", moments)
print(f"pictures: {arguments.out}/*.png")
