"""The order in which training reads its images: shuffled anew in each epoch, endless, and unchanged by a resume."""

from collections.abc import Iterator, Sized

import torch
from torch import Tensor

from fastebm.ops.uniform import uniform
from fastebm.rng import Stream
from fastebm.scalars import as_int


def batches(images: Sized, batch_size: int, seed: int, start_step: int = 0) -> Iterator[Tensor]:
    """An endless stream of indices into `images`, int64 (batch_size,) per batch. Only the length of `images` is read.

    Each epoch contains every image once, in an order that depends on (seed, epoch) alone; a batch may span two epochs.
    The stream from `start_step` on equals the stream from 0 without its first `start_step` batches. The epoch is the
    step of the shuffle stream of our counter-based random numbers.

    Raises ValueError for no images, a batch size below 1 or a negative start.
    """
    count, batch_size, start_step = len(images), as_int("batch_size", batch_size), as_int("start_step", start_step)
    if count < 1 or batch_size < 1 or start_step < 0:
        raise ValueError(
            f"got {count} images, batch_size {batch_size} and start_step {start_step}; needed are at least 1, 1 and 0"
        )
    return _index_stream(count, batch_size, seed, start_step)


def _index_stream(count: int, batch_size: int, seed: int, start_step: int) -> Iterator[Tensor]:
    epoch, offset = divmod(start_step * batch_size, count)
    rest = _permutation(count, seed, epoch)[offset:]
    while True:
        while len(rest) < batch_size:
            epoch += 1
            rest = torch.cat([rest, _permutation(count, seed, epoch)])
        yield rest[:batch_size]
        rest = rest[batch_size:]


def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    """Indices sorted by their uniform draws. The few draws that are equal in float32 keep their order."""
    return uniform((1, count), seed=seed, step=epoch, stream=Stream.SHUFFLE)[0].argsort(stable=True)
