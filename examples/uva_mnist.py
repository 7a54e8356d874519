"""The UvA tutorial's deep energy model on MNIST, with its sampler, buffer and loss replaced by five lines (marked).

python examples/uva_mnist.py DATA     # DATA: a folder with MNIST's files; without it, random images
python examples/uva_mnist.py --quick  # seconds: shows that it runs
"""

import argparse
import itertools

import torch
from torch import Tensor, nn

import fastebm
from fastebm.data import open_images, to_float

parser = argparse.ArgumentParser(description="Train the UvA tutorial's energy.")
parser.add_argument("data", nargs="?", help="a folder with MNIST's files")
parser.add_argument("--iterations", type=int, default=1000)
parser.add_argument("--quick", action="store_true", help="small images, chains and batches")
arguments = parser.parse_args()

torch.manual_seed(0)
size, batch, steps, iterations = (8, 16, 5, 5) if arguments.quick else (28, 128, 60, arguments.iterations)
if arguments.data is None:
    print("no folder with MNIST was given: the images are random")
    images = (torch.rand(1024, 1, size, size) > 0.8).float() * 2 - 1
else:
    images = to_float(open_images(arguments.data, size=size, channels=1).pixels)


class CNNModel(nn.Module):
    """The tutorial's net, smaller. It gives f = -E, `(B,)`."""

    def __init__(self, features: int = 16) -> None:
        super().__init__()
        widths = (1, features, 2 * features, 4 * features)
        layers = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.SiLU()) for a, b in itertools.pairwise(widths)]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze(-1)


model = CNNModel()
energy = fastebm.recipes.Negated(model)
recipe = fastebm.recipes.uva_tutorial(energy, num_steps=steps)  # 1
buffer = recipe.buffer(images.shape[1:], seed=0)  # 2: was Sampler(model, img_shape, sample_size)
optimizer = recipe.optimizer.build(model.parameters())  # 3

for iteration in range(iterations):
    real = recipe.noisy(images[torch.randint(len(images), (batch,))])
    negatives = recipe.negatives(real, buffer)  # 4: was sampler.sample_new_exmps(steps=60, step_size=10)
    loss = recipe.loss(energy, real, negatives)  # 5: was reg_loss + cdiv_loss
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    if iteration % 100 == 0 or iteration == iterations - 1:
        print(f"iteration {iteration}: loss {float(loss.detach()):+.4f}, {len(buffer)} chains in the buffer")
