"""The demo in one page: train an energy model on handwritten digits, coarse to fine, and sample from it.

python examples/quickstart.py            # minutes on two cores
python examples/quickstart.py --quick    # seconds: shows that it runs, but learns little
"""

import argparse
import dataclasses
from pathlib import Path

import torch

import fastebm
from fastebm.data import digits
from fastebm.evaluation import evaluate_digits
from fastebm.plotting import save_samples, save_strip
from fastebm.training import DIGITS

parser = argparse.ArgumentParser(description="Train on handwritten digits and sample.")
parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the run")
parser.add_argument("--iterations", type=int, nargs=2, default=DIGITS.iterations, help="at 4x4 and at 8x8")
parser.add_argument("--quick", action="store_true", help="a few iterations only")
arguments = parser.parse_args()

# Real images: float32 (N, 1, 8, 8) in [-1, 1]. Other images may have any power of two as size, and 1 or 3 channels.
images, _ = digits("train")

# A configuration is a frozen dataclass. This one trains an energy of 4x4 images first, then grows it to 8x8.
config = dataclasses.replace(DIGITS, iterations=(10, 15) if arguments.quick else tuple(arguments.iterations))

# This trains in a folder with checkpoints, log and pictures. After a stop the same call continues from the last
# checkpoint.
device = "cuda" if torch.cuda.is_available() else "cpu"
run = fastebm.train(config, images, arguments.out, device=device)

# Chains start from uniform noise at 4x4 and are enlarged to 8x8. The same seed gives the same images.
samples = run.sample(1000, seed=1)
save_samples(arguments.out / "quickstart.png", samples[:100], images[:100])
print(evaluate_digits(samples).explain())

# The energy is low for what looks real. Here half of each image is replaced by noise, which raises the energy.
energy = run.levels[8]
images = images.to(device)
spoiled = images.clone()
spoiled[..., 4:] = torch.rand_like(spoiled[..., 4:]) * 2 - 1
with torch.no_grad():
    print(f"mean energy of real digits {energy(images).mean():.3f}, of spoiled ones {energy(spoiled).mean():.3f}")

# A callback follows the chains, update by update.
steps: list[torch.Tensor] = []
run.cascade().sample(8, seed=1, channels=1, keep=lambda k, x, info: steps.append(x))
save_strip(arguments.out / "quickstart_strip.png", steps)
print(f"pictures: {arguments.out}/*.png")
