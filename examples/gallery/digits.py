"""Digits from noise to image: chains of an energy that was trained coarse to fine, step by step in a moving picture.

python examples/gallery/digits.py               # minutes on a core; writes into runs/gallery/digits
python examples/gallery/digits.py --run RUN     # seconds: the chains of a finished coarse-to-fine run of digits
python examples/gallery/digits.py --quick       # seconds: shows that it runs, but learns little
"""

# %% [markdown]
# # Digits out of noise
#
# An energy learns the handwritten digits of scikit-learn, first at 4x4 pixels and then at 8x8. A chain
# starts from noise, goes down the energy of the small images, is enlarged, and goes on down that of the
# large ones.

# %%
import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import fastebm
from fastebm.data import digits
from fastebm.evaluation import evaluate_digits, nearest_distances
from fastebm.plotting import tile
from fastebm.training import DIGITS

parser = argparse.ArgumentParser(description="Move chains from noise to digits.")
parser.add_argument("--out", type=Path, default=Path("runs/gallery/digits"), help="folder of the picture")
parser.add_argument("--run", type=Path, help="folder of a coarse-to-fine run of digits; by default one is trained")
parser.add_argument("--quick", action="store_true", help="train for a moment only")
arguments = parser.parse_args()
arguments.out.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# The training is the preset of [the demo](../../docs/results/digits/README.md) with fewer updates, so that
# it takes a minute or two of one core.

# %%
images, _ = digits("train")  # float32 (N, 1, 8, 8) in [-1, 1]
if arguments.run:
    run = fastebm.load(arguments.run)
else:
    config = dataclasses.replace(DIGITS, iterations=(30, 40) if arguments.quick else (100, 500))
    with tempfile.TemporaryDirectory() as folder:
        run = fastebm.train(config, images, Path(folder) / "run", progress=False, save_pictures=False)
print(run.cascade())

# %% [markdown]
# The function that is given as `keep` is called after each step.

# %%
steps: list[torch.Tensor] = []


def keep(k: int, x: torch.Tensor, info: fastebm.sampling.StepInfo) -> None:
    steps.extend([info.before.clone(), x.clone()] if k == 1 else [x.clone()])


run.cascade().sample(40, seed=1, channels=1, keep=keep)

frames = []
for k, x in enumerate(steps):
    tiled = tile(F.interpolate(x, (8, 8), mode="nearest"), columns=10, border=1.0)[..., 0]
    pixels = (255 * tiled).byte().repeat_interleave(7, 0).repeat_interleave(7, 1)
    pixels = F.pad(pixels, (0, 0, 22, 0), value=255)
    frames.append(Image.fromarray(pixels.numpy()))
    label = f"step {k} of {len(steps) - 1}, at {x.shape[3]}x{x.shape[2]}"
    ImageDraw.Draw(frames[-1]).text((8, 4), label, fill=0, font_size=14)
pauses = [150] * (len(frames) - 1) + [3000]
frames[0].save(arguments.out / "chains.png", save_all=True, append_images=frames[1:], duration=pauses, loop=0)

# %% [markdown]
# ![forty chains become digits: noise turns into blots of 4x4 pixels, and these into digits of 8x8](chains.png)
#
# Are they digits? Samples should be about as far from the nearest digit of the training set as unseen
# digits are: much nearer would be copies, much further no digits.

# %%
unseen, _ = digits("test")
samples, noise = run.sample(500, seed=2), 2 * torch.rand(500, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 1
for name, x in (("noise", noise), ("samples", samples), ("unseen digits", unseen)):
    print(f"{name:14} median distance to the nearest training digit {nearest_distances(x, images).median():.2f}")

# %% [markdown]
# The judge of the demo looks at classes, too.

# %%
print(evaluate_digits(samples).explain())

# %% [markdown]
# Samples lie further from the training digits than unseen digits do, and the classifier is sure of fewer of
# them. [The demo](../../docs/results/digits/README.md) has the result of the whole preset, and
# [Training](../../docs/training.md) explains the settings. `--run` shows the chains of a run of your own.
