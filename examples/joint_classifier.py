"""A classifier of digits that is trained as an energy too (JEM), with chains of each class from a buffer with classes.

python examples/joint_classifier.py            # half a minute
python examples/joint_classifier.py --quick    # seconds: shows that it runs
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import fastebm
from fastebm.data import digits
from fastebm.plotting import save_grid

parser = argparse.ArgumentParser(description="Train a joint classifier and energy on scikit-learn's digits.")
parser.add_argument("--iterations", type=int, default=1000)
parser.add_argument("--quick", action="store_true", help="a few iterations only")
parser.add_argument("--out", type=Path, default=Path("digits.png"), help="pictures of each class")
arguments = parser.parse_args()

torch.manual_seed(0)
(images, classes), (test, test_classes) = digits("train"), digits("test")
classifier = nn.Sequential(
    *(nn.Flatten(), nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 10))
)

# The published chains, with a class for each: they start in the share of the buffer that belongs to it.
recipe = fastebm.recipes.jem(classifier, num_classes=10, engine="autograd", step_size=0.1)
buffer = recipe.buffer((1, 8, 8), seed=0, capacity=1000)
optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)

for _ in range(20 if arguments.quick else arguments.iterations):
    batch = torch.randint(len(images), (64,))
    real, labels = recipe.noisy(images[batch]), classes[batch]
    negatives = recipe.negatives(real, buffer, labels=labels)
    loss = recipe.loss(classifier, real, negatives, labels)
    # Energies near 0 keep the training stable; the authors advise it where it diverges.
    loss = loss + 0.01 * sum(classifier(x).logsumexp(1).square().mean() for x in (real, negatives.x))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with torch.no_grad():
    right = (classifier(test).argmax(1) == test_classes).float().mean()
    asked = torch.arange(10).repeat_interleave(8)
    drawn = buffer.draw(80, 0, labels=asked).x
    agreed = (classifier(drawn).argmax(1) == asked).float().mean()
print(f"{100 * float(right):.1f} % of the test digits are classified right")
print(f"{100 * float(agreed):.0f} % of the chains are what their class says")
save_grid(arguments.out, drawn.clamp(-1, 1), columns=8)
