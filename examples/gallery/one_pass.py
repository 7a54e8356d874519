"""One pass of a decoder instead of a chain: samples of an energy-calibrated VAE beside those of a plain one, on digits.

python examples/gallery/one_pass.py             # minutes on a core; writes into runs/gallery/one_pass
python examples/gallery/one_pass.py --quick     # seconds: shows that it runs, but learns little
"""

# %% [markdown]
# # One pass
#
# A VAE draws an image in one pass of its decoder, but a blurred one. A chain that starts there and goes
# down an energy makes it sharp. EC-VAE teaches the decoder to draw the ends of such chains, so that later
# no chain is needed.

# %%
import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import fastebm
from fastebm.data import Images, digits, to_pixels
from fastebm.evaluation import RealImages, evaluate_samples, train_features
from fastebm.plotting import save_panels
from fastebm.training.ec_vae.presets import EC_VAE_DIGITS

parser = argparse.ArgumentParser(description="Train a VAE of digits, plain and calibrated.")
parser.add_argument("--out", type=Path, default=Path("runs/gallery/one_pass"), help="folder of the picture")
parser.add_argument("--quick", action="store_true", help="train for a moment only")
arguments = parser.parse_args()
arguments.out.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# All VAEs have the same nets, half as wide as those of the [preset](../../docs/ec-vae.md#presets), and far
# fewer updates. Without a weight of the calibration (`lambda_start=0`) the training is that of a plain VAE.
# As its updates are several times as cheap, a second plain VAE takes six times as many.

# %%
small = dataclasses.replace(EC_VAE_DIGITS, iterations=350, warmup=35, width=16, max_width=64, energy_width=8, ema=0.98)
small = dataclasses.replace(small, energy_learning_rate=1e-3)
if arguments.quick:
    small = dataclasses.replace(small, iterations=80, warmup=8, width=8, batch_size=16, ema=0.9)
    small = dataclasses.replace(small, learning_rate=3e-3, energy_learning_rate=3e-3)
plain = dataclasses.replace(small, lambda_start=0.0)
longer = dataclasses.replace(plain, iterations=(2 if arguments.quick else 6) * plain.iterations)
configs = {"plain": plain, "plain, longer": longer, "calibrated": small}

images, labels = digits("train")
samples, seconds = {}, {}
for name, config in configs.items():
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        run = fastebm.train(config, images, Path(folder) / "run", progress=False, save_pictures=False)
    seconds[name] = time.process_time() - started
    samples[name] = run.sample(400 if arguments.quick else 2000, seed=1)  # one pass of the decoder each

# %%
save_panels(arguments.out / "samples.png", [*((name, x[:100]) for name, x in samples.items()), ("real", images[:100])])

# %% [markdown]
# ![samples of two plain VAEs and of the calibrated one, each in one pass, and real digits](samples.png)
#
# The distance is the Fréchet distance to real digits in the features of a small classifier, which says
# nothing beside published FID. The classifier also says of how many samples it is sure. The line of real
# digits compares those of the training set with unseen ones.

# %%
train, test = (Images(to_pixels(x), y) for x, y in (digits("train"), digits("test")))
classifier = train_features(train, test, images_seen=1_500 if arguments.quick else 30_000)
real = RealImages(train, test)
for name, x in samples.items():
    found = evaluate_samples(x, real, classifier)
    distances, classes, updates = found.comparison, found.classes, configs[name].iterations
    print(
        f"{name:14} distance {distances.samples.frechet:5.2f}, sure of {classes.confident_share:3.0%}"
        f" ({updates} updates in {seconds[name]:.0f} s of a core)"
    )
print(f"{'real digits':14} distance {distances.reference.frechet:5.2f}, sure of {classes.confident_share_real:3.0%}")
print(f"{'noise':14} distance {distances.noise.frechet:5.2f}")

# %% [markdown]
# The calibrated samples are nearer to real digits than those of the plain VAE, also than those of the one
# that was trained about as long; one run each, so small differences say nothing. All three are far from
# real digits after so short a training. [The preset's results](../../docs/results/ec-vae/README.md) are of
# longer trainings, several seeds and larger images, and say what the calibration costs: on digits, worse
# reconstructions. [EC-VAE](../../docs/ec-vae.md) explains the method, and how a [generator of your
# own](../own_generator.py) is calibrated.
