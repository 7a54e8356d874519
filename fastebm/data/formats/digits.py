"""Real handwritten digits that come with scikit-learn, so that nothing has to be downloaded."""

from typing import Literal

import torch
from torch import Tensor

from fastebm.data.pyramid import average_pool_to
from fastebm.ops.uniform import uniform
from fastebm.rng import Stream

TEST_SHARE = 0.2
SPLIT_SEED = 1797  # nobody's usual seed, so that no training order repeats these draws


def digits(split: Literal["train", "test"] = "train", size: int = 8) -> tuple[Tensor, Tensor]:
    """Images float32 (N, 1, size, size) in [-1, 1] (-1 is paper, 1 is ink) and labels int64 (N,) in 0..9.

    The 1,797 8x8 digits of the UCI "Optical Recognition of Handwritten Digits" test set. A fixed fifth of each class
    is the test split (chosen by our own random numbers, so that no library's version changes it), the rest the train
    split; a `size` of 4, 2 or 1 averages them down. Raises ValueError for another split or size.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'test'")
    from sklearn.datasets import load_digits  # here, because it takes a second to import

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().div(8).sub(1).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    chosen = _test_mask(labels) == (split == "test")
    return average_pool_to(images[chosen], size), labels[chosen]


def _test_mask(labels: Tensor) -> Tensor:
    draws = uniform((1, len(labels)), seed=SPLIT_SEED, stream=Stream.SHUFFLE)[0]
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        order = members[draws[members].argsort(stable=True)]
        mask[order[: round(TEST_SHARE * len(members))]] = True
    return mask
