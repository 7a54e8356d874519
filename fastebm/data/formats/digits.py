"""The handwritten digits that come with scikit-learn: real images without a download."""

from typing import Literal

import torch
from torch import Tensor

from fastebm.data.pyramid import average_pool_to
from fastebm.ops.uniform import uniform
from fastebm.rng import Stream
from fastebm.runs.interrupts import uninterrupted

TEST_SHARE = 0.2
SPLIT_SEED = 1797  # an unusual seed, so that no training order repeats these draws


def digits(split: Literal["train", "test"] = "train", size: int = 8) -> tuple[Tensor, Tensor]:
    """Images, float32 (N, 1, size, size) in [-1, 1] with -1 for paper and 1 for ink, and labels, int64 (N,) in 0..9.

    The source is the test set of the UCI "Optical Recognition of Handwritten Digits": 1,797 digits of 8x8 pixels. A
    fixed fifth of each class is the test split, drawn by our own random numbers so that it does not depend on library
    versions; the rest is the train split. A `size` of 4, 2 or 1 averages the images down.

    Raises ValueError for another split or size.

    Example:
        >>> from fastebm.data import digits
        >>> images, labels = digits("test")
        >>> images.shape
        torch.Size([359, 1, 8, 8])
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    with uninterrupted():
        from sklearn.datasets import load_digits  # imported here because it takes a second

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().div(8).sub(1).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    members = _test_mask(labels) == (split == "test")
    return average_pool_to(images[members], size), labels[members]


def _test_mask(labels: Tensor) -> Tensor:
    draws = uniform((1, len(labels)), seed=SPLIT_SEED, stream=Stream.SHUFFLE)[0]
    mask = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        order = members[draws[members].argsort(stable=True)]
        mask[order[: round(TEST_SHARE * len(members))]] = True
    return mask
