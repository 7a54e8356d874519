"""scikit-learn's handwritten digits: ranges, labels and the fixed split."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from fastebm.data import digits


def test_ranges_and_shapes():
    for split in ("train", "test"):
        images, labels = digits(split)
        assert images.shape == (len(labels), 1, 8, 8)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert (images.min(), images.max()) == (-1, 1)


def test_splits_are_stratified_and_share_out_all_digits():
    (train, train_labels), (test, test_labels) = digits("train"), digits("test")
    bunch = load_digits()
    both = torch.cat([train, test]).flatten(1)
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, (bunch.data / 8 - 1).tolist()))
    counts, test_counts = (torch.bincount(labels, minlength=10) for labels in (train_labels, test_labels))
    assert torch.equal(test_counts, ((counts + test_counts) * 0.2).round().long())


def test_labels_belong_to_their_images():
    bunch = load_digits()
    label_of = {tuple(row): label for row, label in zip((bunch.data / 8 - 1).tolist(), bunch.target, strict=True)}
    images, labels = digits("test")
    assert [label_of[tuple(row)] for row in images.flatten(1).tolist()] == labels.tolist()


def test_split_is_fixed():
    (images, labels), (again, _) = digits("test"), digits("test")
    assert torch.equal(images, again)
    assert labels[:12].tolist() == [0, 0, 2, 4, 5, 9, 7, 0, 5, 6, 5, 2]


def test_lower_sizes_are_average_pools():
    images = digits("train")[0]
    assert torch.equal(digits("train", 4)[0], F.avg_pool2d(images, 2))


def test_refuses_other_splits_and_sizes():
    with pytest.raises(ValueError, match="'validation'"):
        digits("validation")
    for size in (3, 16, 0):
        with pytest.raises(ValueError, match=f"size {size}"):
            digits("train", size)
