"""Features of a small classifier trained on the data, for distances without Inception's weights."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fastebm.data import Images, batches, to_float, to_pixels
from fastebm.data.value_range import SIGNED, to_signed
from fastebm.distributed import shared_rows, together
from fastebm.ops.uniform import uniform
from fastebm.progress import progress_bar
from fastebm.rng import Stream
from fastebm.runs.files import replacing
from fastebm.runs.nets import initialized

WIDTH = 64
BATCH = 128
IMAGES_SEEN = 100_000
PEAK_RATE = 3e-3
HELD_OUT_SHARE = 0.1
MIN_PER_CLASS = 10
"""Training images of a class, on average: of fewer, the labels rather are numbers of images or of persons."""
UNLABELLED = -1
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


def image_bytes(images: Tensor | Images) -> Tensor:
    """uint8 pixels of images, not empty: the nearest of 256 levels of floats in [-1, 1]; bytes as they are.

    Raises ValueError for floats that are not finite or outside of [-1, 1] by more than half a level, and for no images,
    TypeError for another dtype.
    """
    if isinstance(images, Images):
        return images.pixels
    if images.dtype == torch.uint8 and images.numel():
        return images
    if not images.is_floating_point() and images.dtype != torch.uint8:
        raise TypeError(f"images must be floats in [-1, 1] or bytes (uint8), got {images.dtype}")
    return to_pixels(to_signed(images, SIGNED))


def float64_features(*sets: Tensor) -> tuple[Tensor, ...]:
    """Sets of features (N, D), N >= 2, in float64. Raises ValueError for other shapes, different D, and NaN."""
    for features in sets:
        if features.ndim != 2 or len(features) < 2 or not features.shape[1] or not features.isfinite().all():
            raise ValueError(f"features must be finite and (N, D) with N >= 2, got {tuple(features.shape)}")
    if len(columns := {features.shape[1] for features in sets}) > 1:
        raise ValueError(f"features have {' and '.join(map(str, columns))} columns; they must be of one kind")
    return tuple(features.detach().double() for features in sets)


@torch.no_grad()
def described(describe: Callable[[Tensor], tuple[Tensor, Tensor]], pixels: Tensor, batch_size: int) -> Features:
    """The features and probabilities of bytes (N, C, S, S) on the CPU, in batches, which several ranks share."""

    def of(rows: range) -> Features:
        parts = [describe(part) for part in pixels[rows.start : rows.stop].split(batch_size)]
        return Features(*(torch.cat([part[index].float().cpu() for part in parts]) for index in range(2)))

    return shared_rows(len(pixels), of, batch_size)


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
        unlabelled: images that were left out of the training and of `held_out`, because they have no label.
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
    unlabelled: int = 0

    @torch.no_grad()
    def __call__(self, images: Tensor | Images, batch_size: int = 500) -> Features:
        """Features and class probabilities of images (N, channels, size, size): floats in [-1, 1] or bytes.

        Floats become bytes first (`image_bytes`), so that samples and real images are measured alike. Raises
        ValueError for other shapes, and as `image_bytes`.
        """
        return together(described, self._describe, self._pixels(images), batch_size)

    def _describe(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.net.features(to_float(pixels.to(next(self.net.parameters()).device)))
        return features, self.net.head(features).softmax(dim=1)

    def _pixels(self, images: Tensor | Images) -> Tensor:
        shape = images.pixels.shape if isinstance(images, Images) else images.shape
        wanted = (self.channels, self.size, self.size)
        if len(shape) != 4 or shape[1:] != wanted or not shape[0]:
            raise ValueError(f"these features are of images (N, {', '.join(map(str, wanted))}), got {[*shape]}")
        return image_bytes(images)

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
        """Writes one .safetensors file, completely or not at all. Raises OSError where the disk does not take it."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.net.state_dict().items()}
        try:
            with replacing(Path(path)) as temporary:
                save_file(tensors, temporary, metadata={_KIND: json.dumps(self.metadata())})
        except SafetensorError as error:  # of a full disk, too
            raise OSError(f"{path} can't be written: {error}") from error

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
            with torch.device("cpu"), safe_open(path, framework="pt") as file:  # it follows the default device
                metadata = json.loads((file.metadata() or {})[_KIND])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            loaded = cls(_net_of(metadata, tensors).to(device), **metadata | {"classes": tuple(metadata["classes"])})
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
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
        images: square images, with labels if `task` is "classes": any numbers from 0 on, each that occurs is a class.
            Images with the label -1 have none and are left out; at least 10 images of each class are needed on average.
        held_out: images to measure the accuracy on; by default a tenth of `images`, which is then not trained on. Those
            of classes that `images` lack count as mistakes.
        task: "classes", or "rotations" for images without labels: the classifier then predicts by how many quarter
            turns an image was rotated (Gidaris et al., 2018), which is only possible if the data have an up and a down.
        images_seen: training images over all epochs; by default 100,000.
        seed: of weights, order of the images and rotations.
        progress: shows a bar.

    Raises ValueError for images without labels or with other labels, of fewer than two classes or too many, or not
    square, and for too few of them.

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
    data, trained_on, given = repr(images), digest(images), len(images) + (0 if held_out is None else len(held_out))
    _ = images.size  # raises where they are not square
    if task == "classes":
        images, held_out = _labelled(images), None if held_out is None else _labelled(held_out)
    if held_out is None:
        images, held_out = random_split(images, HELD_OUT_SHARE, seed)
    unlabelled = given - len(images) - len(held_out)
    if len(images) < BATCH:
        kind = "images with labels" if unlabelled else "images"
        raise ValueError(f"{images.name}: {len(images)} {kind} are too few to train features on: {BATCH} are needed")
    if task == "classes":
        images, held_out, classes = _number_classes(images, held_out)
    else:
        images, held_out = _rotate(images, seed), _rotate(held_out, seed)
        classes = tuple(f"{90 * turns} degrees" for turns in range(4))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = initialized(lambda: FeatureNet(images.size, images.channels, len(classes)), device)
    _fit(net, images, images_seen, seed, progress)
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
        unlabelled=unlabelled,
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


def _labelled(images: Images) -> Images:
    """The images that have a label. Raises ValueError where none has, and for labels below -1."""
    if images.labels is None or not (images.labels != UNLABELLED).any():
        raise ValueError(
            f"{images.name}: has no labels, which features by classes are trained on: give data with labels, or "
            'train by rotations (task "rotations"; --rotations)'
        )
    if (lowest := int(images.labels.min())) < UNLABELLED:
        raise ValueError(f"{images.name}: labels must be numbers of classes from 0 on, or -1 for none, got {lowest}")
    kept = (images.labels != UNLABELLED).nonzero().flatten()
    return images if len(kept) == len(images) else select(images, kept)


def _number_classes(images: Images, held_out: Images) -> tuple[Images, Images, tuple[str, ...]]:
    """Both sets with their classes numbered from 0 to K - 1, and the names of the K classes of `images`.

    Images of other classes in `held_out` get -1. Raises ValueError where K is below 2 or large for so many images.
    """
    assert images.labels is not None
    numbers, labels = images.labels.unique(return_inverse=True)
    if len(numbers) < 2:
        raise ValueError(f"{images.name}: has only one class; at least 2 are needed")
    if len(numbers) * MIN_PER_CLASS > len(images):
        raise ValueError(
            f"{images.name}: {len(numbers):,} classes are too many for {len(images):,} images, of which at least "
            f"{MIN_PER_CLASS} to a class are needed on average; where labels number something else than classes, train "
            'by rotations (task "rotations"; --rotations)'
        )
    known = len(images.classes)
    names = tuple(images.classes[number] if number < known else str(number) for number in numbers.tolist())
    assert held_out.labels is not None
    places = torch.searchsorted(numbers, held_out.labels).clamp(max=len(numbers) - 1)
    places = places.where(numbers[places] == held_out.labels, torch.full_like(places, -1))
    return (
        dataclasses.replace(images, labels=labels, classes=names),
        dataclasses.replace(held_out, labels=places, classes=names),
        names,
    )


def _net_of(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> FeatureNet:
    """The net that a file describes and holds, in eval mode. Raises ValueError and others where it does not fit."""
    for name, kind in {field.name: field.type for field in dataclasses.fields(FeatureClassifier)}.items():
        if kind in ("int", "str", "float") and type(metadata.get(name, 0 if kind == "int" else None)).__name__ != kind:
            raise ValueError(f"{name} must be of type {kind}, got {metadata.get(name)!r}")
    if metadata["task"] not in get_args(Task):
        raise ValueError(f"task must be one of {', '.join(get_args(Task))}, got {metadata['task']!r}")
    with torch.device("meta"):  # shapes are compared with those of the tensors before memory is taken
        net = FeatureNet(metadata["size"], metadata["channels"], len(metadata["classes"]))
    expected = {name: tensor.dtype for name, tensor in net.state_dict().items()}
    wrong = [name for name, tensor in tensors.items() if name in expected and tensor.dtype != expected[name]]
    wrong += [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if wrong:
        raise ValueError(f"{wrong[0]} is {tensors[wrong[0]].dtype} or not finite")
    net.load_state_dict(tensors, assign=True)
    return net.eval()


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
