"""What one-pass samples are judged by, in the features of the classifier that `fastebm evaluate` trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastebm.data import Images, digits, open_images, to_float, to_pixels
from fastebm.evaluation import FeatureClassifier, frechet_distance
from fastebm.training.coarse_to_fine.presets import SHAPING

SAMPLES = 3000
Row = dict[str, Any]


@dataclass(frozen=True)
class Judge:
    """What samples are judged by: a classifier that never saw the test images, and both kinds of images."""

    features: FeatureClassifier
    train: Images
    test: Images

    def real(self) -> Tensor:
        """The train images (N, C, S, S) that samples are compared with, in [-1, 1]."""
        return to_float(self.train.pixels[:SAMPLES])

    def samples(self, samples: Tensor) -> Row:
        """Of samples: distance to real images, the share it is sure of, high frequencies where real images have 1."""
        described = self.features(samples)
        return {
            "distance": frechet_distance(described.features, self.features(self.train.pixels[:SAMPLES]).features),
            "confident": float((described.probabilities.max(1).values >= 0.9).double().mean()),
            "sharpness": high_frequencies(samples) / high_frequencies(self.real()),
        }

    def reference(self) -> Row:
        """What real images, uniform noise and held-out ones have."""
        real = self.features(self.train.pixels[:SAMPLES]).features
        described = self.features(self.test.pixels[:SAMPLES])
        noise = torch.rand(SAMPLES, *self.train.pixels.shape[1:], generator=torch.Generator().manual_seed(0)) * 2 - 1
        return {
            "accuracy": self.features.accuracy,
            "distance": frechet_distance(described.features, real),
            "confident": float((described.probabilities.max(1).values >= 0.9).double().mean()),
            "noise": frechet_distance(self.features(noise).features, real),
        }


def high_frequencies(images: Tensor) -> float:
    """The mean squared response to the Laplacian: small where images are blurred."""
    kernel = images.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(images.shape[1], 1, 3, 3)
    return float(F.conv2d(images, kernel, groups=images.shape[1]).square().mean())


def labelled_images(name: str, data: Path | None, size: int, channels: int) -> tuple[Images, Images]:
    """Train and test images with labels."""
    if name == "digits":
        train, test = (Images(to_pixels(images), labels) for images, labels in (digits("train"), digits("test")))
        return train, test
    if data is None:
        raise SystemExit(f"--data is needed for {name}")
    shaping = SHAPING.get(name, {})
    train, test = (open_images(data, size=size, channels=channels, split=part, **shaping) for part in ("train", "test"))
    return train, test


def at_size(images: Images, size: int) -> Images:
    """The images by average pooling; energies need fewer halvings then."""
    factor = images.pixels.shape[-1] // size
    pooled = [F.avg_pool2d(to_float(part), factor) for part in images.pixels.split(5000)]
    return Images(to_pixels(torch.cat(pooled)), images.labels)
