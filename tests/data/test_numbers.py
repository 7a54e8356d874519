"""Numbers of numpy and tensors without axes are taken wherever a number is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastebm.data import ImagePyramid, Images, add_noise, average_pool_to, batches, digits, pyramid, random_hole_masks

KINDS = [np.int64, np.int32, np.array, torch.tensor]


@pytest.mark.parametrize("number", KINDS)
def test_numbers_of_every_kind(number: Callable) -> None:
    images = Images(torch.arange(6 * 64, dtype=torch.int64).remainder(256).to(torch.uint8).reshape(6, 1, 8, 8))
    floats = images.batch(slice(None))
    assert torch.equal(next(batches(images, number(4), 0, number(2))), next(batches(images, 4, 0, 2)))
    assert torch.equal(average_pool_to(floats, number(4)), average_pool_to(floats, 4))
    assert list(pyramid(floats, number(2))) == [2, 4, 8]
    assert ImagePyramid(images, number(2), cache_bytes=number(0)).sizes == (2, 4, 8)
    assert digits("test", size=number(4))[0].shape[2:] == (4, 4)
    for real in (number(2), np.float32(2), torch.tensor(2.0)):
        noisy = add_noise(floats, real, seed=0, positions=0)
        assert noisy.dtype == torch.float32
        assert torch.equal(noisy, add_noise(floats, 2, seed=0, positions=0))
    masks = random_hole_masks(number(3), number(8), seed=0, positions=0)
    assert torch.equal(masks, random_hole_masks(3, 8, seed=0, positions=0))
