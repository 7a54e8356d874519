"""Holes in unseen digits, filled in by the chains of a small trained energy, beside plain baselines.

python examples/gallery/inpainting.py               # minutes on a core; writes into runs/gallery/inpainting
python examples/gallery/inpainting.py --run RUN     # seconds: a finished coarse-to-fine run of digits
python examples/gallery/inpainting.py --quick       # seconds: shows that it runs, but learns little
"""

# %% [markdown]
# # Holes filled in
#
# An energy of images fills in what is missing: chains move the pixels of the hole, and all others stay as
# they are.

# %%
import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import fastebm
from fastebm.data import digits, neighbour_mean
from fastebm.plotting import save_columns
from fastebm.tasks import InpaintOptions, hole_mask, inpaint
from fastebm.training import DIGITS

parser = argparse.ArgumentParser(description="Fill in holes of digits.")
parser.add_argument("--out", type=Path, default=Path("runs/gallery/inpainting"), help="folder of the picture")
parser.add_argument("--run", type=Path, help="folder of a run of digits; by default one is trained")
parser.add_argument("--quick", action="store_true", help="train for a moment only")
arguments = parser.parse_args()
arguments.out.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# The energy is the demo's, with two changes. Of the chains of its training, more than half start at digits
# with a hole (`hole_starts`), and all have more noise. [Training](../../docs/training.md#what-an-update-is)
# explains the settings.

# %%
images, _ = digits("train")
if arguments.run:
    run = fastebm.load(arguments.run)
else:
    config = dataclasses.replace(
        DIGITS,
        iterations=(30, 40) if arguments.quick else (60, 400),
        hole_starts=0.6,
        noise_start=0.1,
        noise_end=0.05,
    )
    with tempfile.TemporaryDirectory() as folder:
        run = fastebm.train(config, images, Path(folder) / "run", progress=False, save_pictures=False)

# %% [markdown]
# The digits come from the test set. There are three kinds of holes: half of each digit, a square in it, and
# about half of all pixels, drawn at random. Sixteen chains fill each hole, first at 4x4 pixels and then at
# 8x8. Each is a guess of its own, and their mean has the smallest squared error.

# %%
unseen = digits("test")[0][: 60 if arguments.quick else None]
holes = {pattern: hole_mask(pattern, len(unseen), 8) for pattern in ("half", "square", "pixels")}
options = InpaintOptions(num_steps=15, restarts=16, coarse=True)
results = {pattern: inpaint(run, unseen, hole, options, seed=1) for pattern, hole in holes.items()}

# %% [markdown]
# Two baselines fill the same holes. The plain one gives each missing pixel the mean of the known pixels
# around it. The other is hard to beat on images that are so small: the exact mean of the missing pixels if
# all pixels were normal, with the means and covariances of the training digits.


# %%
def normal_mean(x: Tensor, hole: Tensor, real: Tensor, ridge: float = 0.01) -> Tensor:
    """Images `(N, 1, 8, 8)` with the conditional mean in the hole, of a normal distribution fitted to `real`."""
    mean, covariance = real.flatten(1).mean(0), real.flatten(1).T.cov() + ridge * torch.eye(64)
    filled = x.flatten(1).clone()
    for row, missing in zip(filled, hole.expand_as(x).flatten(1), strict=True):
        weights = torch.linalg.solve(covariance[~missing][:, ~missing], covariance[~missing][:, missing])
        row[missing] = mean[missing] + (row - mean)[~missing] @ weights
    return filled.view_as(x).clamp(-1, 1)


# %% [markdown]
# The errors are root mean squares over the pixels of a hole, where black is -1 and white 1.

# %%
print(f"{'hole':8}{'neighbours':>12}{'normal':>10}{'one chain':>12}{'mean of chains':>17}")
for pattern, result in results.items():
    errors = {name: float(values.mean()) for name, values in result.errors().items()}
    hole = result.hole.expand_as(unseen)
    normal = ((normal_mean(unseen, hole, images) - unseen) * hole).flatten(1).square().sum(1) / hole.flatten(1).sum(1)
    print(
        f"{pattern:8}{errors['neighbour_mean']:12.3f}{normal.sqrt().mean():10.3f}{errors['mean_of_chains']:12.3f}"
        f"{errors['mean']:17.3f}"
    )

# %%
shown, result = slice(0, 7), results["half"]
columns = {
    "digit": unseen[shown],
    "with hole": unseen.masked_fill(result.hole, 0.0)[shown],
    "neighbours": neighbour_mean(unseen, result.hole)[shown],
    "normal": normal_mean(unseen[shown], result.hole.expand_as(unseen)[shown], images),
    "a chain": result.filled[shown, 0],
    "another": result.filled[shown, 1],
    "mean of 16": result.mean[shown],
}
save_columns(arguments.out / "filled.png", columns)

# %% [markdown]
# ![the lower half of unseen digits, filled in by both baselines, by chains, and by the mean of chains](filled.png)
#
# The chains are nearer to the truth than the neighbours, for each kind of hole. The normal distribution is
# nearer still: a training of minutes does not reach it on images of 64 pixels, and squared errors favour
# the blur of a mean. A chain gives what neither baseline has: a sample, with strokes, that differs from
# chain to chain where the known pixels leave a choice.
#
# [Restoration](../../docs/results/restoration/README.md) has the numbers of whole trainings on larger
# images, and [Tasks](../../docs/tasks.md#inpaint) explains the options.
