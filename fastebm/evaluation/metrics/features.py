"""Features of a small classifier trained on the data, for distances without Inception's weights."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fastebm.data import Images, batches, to_float, to_pixels
from fastebm.ops.uniform import uniform
from fastebm.progress import progress_bar
from fastebm.rng import Stream
from fastebm.runs.files import replacing

WIDTH = 64
BATCH = 128
IMAGES_SEEN = 100_000
PEAK_RATE = 3e-3
HELD_OUT_SHARE = 0.1
NOT_COMPARABLE = "not comparable to published FID"
"""What every output says of distances in these features."""
FEATURES_FILE = "features.safetensors"
_KIND = "fastebm features"

Task = Literal["classes", "rotations"]


class FeatureNet(nn.Module):
    """A plain convolutional classifier of images (B, channels, size, size) in [-1, 1], with 64 features.

    Each block halves the resolution, down to 4x4, and has up to 64 channels, batch norm and ReLU. The features are the
    input of the last linear layer and not negative.
    """

    def __init__(self, size: int, channels: int, classes: int) -> None:
        super().__init__()
        # From 16x16 on the first convolution has stride 2: at full size it would take half of the time.
        stride, side, width = (2, size // 2, 16) if size >= 16 else (1, size, 16)
        layers: list[nn.Module] = [*_block(channels, width, 5, stride)]
        while side > 4:
            layers += [*_block(width, min(2 * width, WIDTH), 3, 1), nn.MaxPool2d(2)]
            side, width = side // 2, min(2 * width, WIDTH)
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.top = nn.Sequential(nn.Linear(16 * width, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU())
        self.head = nn.Linear(WIDTH, classes)

    def features(self, x: Tensor) -> Tensor:
        """float32 (B, 64)."""
        return self.top(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.head(self.features(x))


class Features(NamedTuple):
    """Features float32 (N, D) of N images, and the probabilities of the classifier's classes, float32 (N, K)."""

    features: Tensor
    probabilities: Tensor


FeatureExtractor = Callable[[Tensor | Images], Features]


def float64_features(*sets: Tensor) -> tuple[Tensor, ...]:
    """Sets of features (N, D), N >= 2, in float64. Raises ValueError for other shapes, different D, and NaN."""
    for features in sets:
        if features.ndim != 2 or len(features) < 2 or not features.shape[1] or not features.isfinite().all():
            raise ValueError(f"features must be finite and (N, D) with N >= 2, got {tuple(features.shape)}")
    if len(columns := {features.shape[1] for features in sets}) > 1:
        raise ValueError(f"features have {' and '.join(map(str, columns))} columns; they must be of one kind")
    return tuple(features.detach().double() for features in sets)


@dataclass(frozen=True, eq=False)
class FeatureClassifier:
    """A trained `FeatureNet` and what it was trained on. Distances in its features are NOT comparable to published FID.

    Attributes:
        task: "classes" if it predicts labels, "rotations" if it predicts by how many quarter turns an image was turned.
        size, channels: of its images.
        classes: names of the classes.
        accuracy: on `held_out` images that it was not trained on.
        data, digest: the training images in words, and a digest of these images and their labels.
        images_seen: training images over all epochs.
    """

    net: FeatureNet
    task: Task
    size: int
    channels: int
    classes: tuple[str, ...]
    accuracy: float
    held_out: int
    data: str
    digest: str
    seed: int
    images_seen: int

    @torch.no_grad()
    def __call__(self, images: Tensor | Images, batch_size: int = 500) -> Features:
        """Features and class probabilities of images (N, channels, size, size): floats in [-1, 1] or bytes.

        Floats become bytes first by `fastebm.data.to_pixels` (clamped, the nearest of 256 levels), so that samples and
        real images are measured alike. Raises ValueError for other shapes and for values that are not finite.
        """
        pixels = self._pixels(images)
        device = next(self.net.parameters()).device
        parts = []
        for part in pixels.split(batch_size):
            features = self.net.features(to_float(part.to(device)))
            parts.append((features, self.net.head(features).softmax(dim=1)))
        return Features(*(torch.cat([part[index] for part in parts]).cpu() for index in range(2)))

    def _pixels(self, images: Tensor | Images) -> Tensor:
        if isinstance(images, Images):
            images = images.pixels
        wanted = (self.channels, self.size, self.size)
        if images.ndim != 4 or images.shape[1:] != wanted or not len(images):
            raise ValueError(f"these features are of images (N, {', '.join(map(str, wanted))}), got {[*images.shape]}")
        if images.dtype == torch.uint8:
            return images
        if not images.isfinite().all():
            raise ValueError("images must be finite")
        return to_pixels(images)

    @functools.cached_property
    def label(self) -> str:
        """Identifies these features in files of statistics by a digest of the weights."""
        content = hashlib.sha256()
        for name, tensor in sorted(self.net.state_dict().items()):
            content.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return f"small classifier {content.hexdigest()[:16]} of {self.task} ({NOT_COMPARABLE})"

    def metadata(self) -> dict[str, Any]:
        """All attributes but the net, for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "net"}
        return values | {"classes": list(self.classes)}

    def save(self, path: str | Path) -> None:
        """Writes one .safetensors file, completely or not at all."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.net.state_dict().items()}
        with replacing(Path(path)) as temporary:
            save_file(tensors, temporary, metadata={_KIND: json.dumps(self.metadata())})

    @classmethod
    def load(
        cls, path: str | Path, images: Images | None = None, device: torch.device | str | None = None
    ) -> FeatureClassifier:
        """Reads a file of `save`; if `images` are passed, it must have been trained on them.

        Raises ValueError for another file and for a classifier of other images, FileNotFoundError for a missing file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: there is no such file of features")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {})[_KIND])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata["classes"] = tuple(metadata["classes"])
            net = FeatureNet(metadata["size"], metadata["channels"], len(metadata["classes"]))
            net.load_state_dict(tensors)
            loaded = cls(net.eval().to(device), **metadata)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: is no file of features that --train-features made ({error})") from error
        if images is not None and loaded.digest != digest(images):
            raise ValueError(
                f"{path}: was trained on other images ({loaded.data}): train features anew, in another file"
            )
        return loaded


def train_features(
    images: Images,
    held_out: Images | None = None,
    *,
    task: Task = "classes",
    images_seen: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> FeatureClassifier:
    """Trains a classifier on `images`; the result is a function of them, the seed and the number of threads.

    MNIST at 32x32 takes about a minute on one core.

    Args:
        images: square images, with labels if `task` is "classes".
        held_out: images to measure the accuracy on; by default a tenth of `images`, which is then not trained on.
        task: "classes", or "rotations" for images without labels: the classifier then predicts by how many quarter
            turns an image was rotated (Gidaris et al., 2018), which is only possible if the data have an up and a down.
        images_seen: training images over all epochs; by default 100,000.
        seed: of weights, order of the images and rotations.
        progress: shows a bar.

    Raises ValueError for images without labels, of fewer than two classes or not square, and too few of them.

    Example:
        >>> import torch
        >>> from fastebm.data import Images
        >>> from fastebm.evaluation import train_features
        >>> labels = torch.arange(400) % 2
        >>> dark_and_bright = Images(labels.to(torch.uint8).mul(255)[:, None, None, None].repeat(1, 1, 8, 8), labels)
        >>> classifier = train_features(dark_and_bright, images_seen=2000)
        >>> classifier.accuracy, classifier(dark_and_bright).features.shape
        (1.0, torch.Size([400, 64]))
    """
    images_seen = IMAGES_SEEN if images_seen is None else images_seen
    if images_seen < 1:
        raise ValueError(f"images_seen must be at least 1, got {images_seen}")
    data, trained_on = repr(images), digest(images)
    if held_out is None:
        images, held_out = random_split(images, HELD_OUT_SHARE, seed)
    classes = _class_names(images, held_out, task)
    if task == "rotations":
        images, held_out = _rotate(images, seed), _rotate(held_out, seed)
    if len(images) < BATCH:
        raise ValueError(f"{images.name}: {len(images)} images are too few to train features on: {BATCH} are needed")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = FeatureNet(images.size, images.channels, len(classes))
    _fit(net.to(device), images, images_seen, seed, progress)
    untested = FeatureClassifier(
        net.eval(),
        task,
        images.size,
        images.channels,
        classes,
        accuracy=0.0,
        held_out=len(held_out),
        data=data,
        digest=trained_on,
        seed=seed,
        images_seen=images_seen,
    )
    assert held_out.labels is not None
    correct = untested(held_out).probabilities.argmax(dim=1).eq(held_out.labels)
    return dataclasses.replace(untested, accuracy=float(correct.double().mean()))


def digest(images: Images) -> str:
    """SHA-256 of pixels and labels, to check whether features were trained on them."""
    content = hashlib.sha256(repr(tuple(images.pixels.shape)).encode())
    for tensor in (images.pixels, images.labels):
        if tensor is not None:
            content.update(tensor.cpu().contiguous().numpy().data)
    return content.hexdigest()


def random_split(images: Images, share: float, seed: int = 0) -> tuple[Images, Images]:
    """Two disjoint parts of a set, the second with a `share` of it chosen by `seed`, both in the set's order.

    Raises ValueError where a part would be empty.
    """
    draws = uniform((1, len(images)), seed=seed, step=1, stream=Stream.SHUFFLE)[0]
    count = round(share * len(images))
    if not 0 < count < len(images):
        raise ValueError(f"{images.name}: {len(images)} images are too few to hold a share of {share:g} out")
    order = draws.argsort(stable=True)
    return select(images, order[count:].sort().values), select(images, order[:count].sort().values)


def select(images: Images, indices: Tensor) -> Images:
    """The images at int64 `indices` with their labels."""
    labels = None if images.labels is None else images.labels[indices]
    return dataclasses.replace(images, pixels=images.pixels[indices], labels=labels)


def _block(inputs: int, outputs: int, kernel: int, stride: int) -> Iterator[nn.Module]:
    yield nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    yield nn.BatchNorm2d(outputs)
    yield nn.ReLU()


def _class_names(images: Images, held_out: Images, task: Task) -> tuple[str, ...]:
    if task == "rotations":
        return tuple(f"{90 * turns} degrees" for turns in range(4))
    for part in (images, held_out):
        if part.labels is None:
            raise ValueError(
                f"{part.name}: has no labels, which features by classes are trained on: give data with labels, or "
                'train by rotations (task "rotations"; --rotations)'
            )
    assert images.labels is not None
    assert held_out.labels is not None
    count = 1 + int(max(images.labels.max(), held_out.labels.max()))
    if count < 2:
        raise ValueError(f"{images.name}: has only one class; at least 2 are needed")
    return images.classes if len(images.classes) == count else tuple(map(str, range(count)))


def _rotate(images: Images, seed: int) -> Images:
    """Each image rotated by 0 to 3 quarter turns, chosen by the seed, with that number as its label."""
    _ = images.size  # raises where they are not square
    draws = uniform((1, len(images)), seed=seed, stream=Stream.AUGMENTATION)[0]
    turns = draws.mul(4).long().clamp(max=3)
    pixels = images.pixels.clone()
    for number in range(1, 4):
        pixels[turns == number] = pixels[turns == number].rot90(number, (2, 3))
    return dataclasses.replace(images, pixels=pixels, labels=turns, classes=())


def _fit(net: FeatureNet, images: Images, images_seen: int, seed: int, progress: bool) -> None:
    assert images.labels is not None
    device = next(net.parameters()).device
    updates = -(-images_seen // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=updates)
    net.train()
    order = batches(images, BATCH, seed)
    with progress_bar(updates, "features", "update", shown=progress) as bar:
        for _ in range(updates):
            indices = next(order)
            logits = net(images.batch(indices, device))
            loss = F.cross_entropy(logits, images.labels[indices].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
