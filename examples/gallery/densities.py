"""Four samplers on two densities of the plane whose moments are known, as a moving picture and a table.

python examples/gallery/densities.py            # half a minute; writes into runs/gallery/densities
python examples/gallery/densities.py --quick    # the same chains, with a few frames of the picture
"""

# %% [markdown]
# # Moving chains
#
# A sampler runs many chains side by side. Here four of them move on two densities, and their means and
# standard deviations are compared with the exact ones.

# %%
import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import fastebm
from fastebm.plotting import new_figure

parser = argparse.ArgumentParser(description="Move chains of four samplers on two densities.")
parser.add_argument("--out", type=Path, default=Path("runs/gallery/densities"), help="folder of the picture")
parser.add_argument("--quick", action="store_true", help="draw a few frames only")
arguments = parser.parse_args()
arguments.out.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# The first density is bent: its ridge is a parabola. The second has four modes of different weights, so far
# apart that a chain hardly crosses from one to another. An energy is `-log p(x)`, up to a constant, of a
# batch `(B, 2)`.

# %%
CENTERS = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, -2.0], [-2.0, 2.0]])
WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1])
STD, BEND = 0.4, 0.4


def bent(x: Tensor) -> Tensor:
    """The first number is normal, and the second is normal around `BEND` times its square."""
    ridge = BEND * x[:, 0].square()
    return 0.5 * (x[:, 0] / 1.5).square() + 0.5 * ((x[:, 1] - ridge) / STD).square()


def modes(x: Tensor) -> Tensor:
    squares = (x[:, None] - CENTERS).square().sum(2)
    return -(WEIGHTS.log() - squares / (2 * STD**2)).logsumexp(1)


mean = WEIGHTS @ CENTERS
EXACT = {  # mean and standard deviation of both axes
    "bent": (torch.tensor([0.0, BEND * 1.5**2]), torch.tensor([1.5, (2 * BEND**2 * 1.5**4 + STD**2) ** 0.5])),
    "four modes": (mean, (WEIGHTS @ CENTERS.square() + STD**2 - mean.square()).sqrt()),
}

# %% [markdown]
# All chains of a density start at one point. [Langevin](../../docs/samplers/langevin.md) takes every step;
# [MALA](../../docs/samplers/mala.md) and [HMC](../../docs/samplers/hmc.md) test each and refuse some, which
# makes them exact. [Tempering](../../docs/samplers/tempering.md) runs MALA at four temperatures and swaps
# states between them.
#
# A frame of the picture is the same number of gradients for each sampler, so that an expensive step is no
# advantage.

# %%
SAMPLERS = {  # and the gradients that a step costs
    "Langevin": (lambda e: fastebm.Langevin(e, **fastebm.schedules.from_epsilon(0.2)), 1),
    "MALA": (lambda e: fastebm.MALA(e, step_size=0.04), 1),
    "HMC": (lambda e: fastebm.HMC(e, step_size=0.15, num_leapfrogs=5), 5),
    "tempering": (
        lambda e: fastebm.ParallelTempering(
            e, [1.0, 3.0, 9.0, 27.0], lambda e, t: fastebm.MALA(e, 0.04 * t, temperature=t), swap_every=2
        ),
        4,
    ),
}
DENSITIES = {"bent": (bent, torch.tensor([[3.0, 3.6]])), "four modes": (modes, CENTERS[1:2])}
CHAINS, FRAMES, GRADIENTS = 2000, 36, 60  # in each frame

moving: dict[tuple[str, str], list[Tensor]] = {}
for density, (energy, start) in DENSITIES.items():
    for name, (make, cost) in SAMPLERS.items():
        sampler = make(energy)
        state = sampler.init(start, seed=0, num_chains=CHAINS)
        moving[density, name] = [state.x.clone()]
        for _ in range(FRAMES):
            state = sampler.advance(state, GRADIENTS // cost)
            moving[density, name].append(state.x.clone())

# %% [markdown]
# The dots are some of the chains, and the shade is the density.

# %%
LIMITS = {"bent": ((-4.2, 4.2), (-2.2, 6.2)), "four modes": ((-4, 4), (-4, 4))}
figure = new_figure(6.8, 3.7)
panels = figure.subplots(2, 4, sharex="row", sharey="row")
dots = []
for row, (density, (energy, _)) in zip(panels, DENSITIES.items(), strict=True):
    (left, right), (low, high) = LIMITS[density]
    x, y = torch.meshgrid(torch.linspace(left, right, 121), torch.linspace(low, high, 121), indexing="xy")
    shade = (-energy(torch.stack((x, y), 2).flatten(0, 1))).exp().view(121, 121).sqrt()
    for axes, name in zip(row, SAMPLERS, strict=True):
        axes.contourf(x, y, shade, levels=6, cmap="Blues", vmax=1.5 * shade.max())
        axes.set(xlim=(left, right), ylim=(low, high), xticks=[], yticks=[])
        dots.append((axes.scatter([], [], s=3, c="#c2410c", linewidths=0), moving[density, name]))
    row[0].set_ylabel(density)
for axes, name in zip(panels[0], SAMPLERS, strict=True):
    axes.set_title(name, fontsize=10)

figure.canvas.draw()
still, frames = figure.canvas.copy_from_bbox(figure.bbox), []
for k in range(0, FRAMES + 1, 18 if arguments.quick else 1):
    figure.canvas.restore_region(still)
    for points, positions in dots:
        points.set_offsets(positions[k][:100])
        figure.draw_artist(points)
    frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3]))
colours = frames[-1].quantize(20)  # of all frames, so that what does not change from one to the next costs nothing
frames = [frame.quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames]
pauses = [120] * (len(frames) - 1) + [2500]
frames[0].save(arguments.out / "moving.gif", save_all=True, append_images=frames[1:], duration=pauses, loop=0)

# %% [markdown]
# ![chains of four samplers from one point on: only tempering reaches all of the four modes](moving.gif)
#
# Moments say the same in numbers, over all chains and the second half of the frames. The error of a mean is
# in standard deviations of the density; the last columns are the standard deviations found, divided by the
# exact ones. Each has a number for each axis.

# %%
print(f"{'density':12}{'sampler':11}{'error of the means':>20}{'ratio of the stds':>20}")
for (density, name), positions in moving.items():
    mean, std = EXACT[density]
    x = torch.cat(positions[FRAMES // 2 :])
    errors, ratios = (x.mean(0) - mean) / std, x.std(0) / std
    print(f"{density:12}{name:11}{errors[0]:+12.3f} {errors[1]:+.3f} {ratios[0]:13.3f} {ratios[1]:.3f}")

# %% [markdown]
# On the bent density Langevin's standard deviations are off by the error of its step size, and longer
# chains would not help. On the four modes the chains of Langevin, MALA and HMC stay where they started. The
# exact samplers are exact for infinitely long chains; only tempering comes near in this time. [Which
# one?](../../docs/samplers/README.md#which-one) says what to take when, and [Was my chain any
# good?](../../docs/diagnostics.md) how to find out where the moments are not known.
