"""The parts of an update: its batch is cut into them by index, each rank computes its own, and all are put together.

Whatever a part gives depends on its images and chains alone, which have numbers of their own, and not on the rank that
computes it. So what is put together in the order of the parts has the same bits for any number of ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastebm.distributed import Ranks
from fastebm.training.trainer.metrics import Metrics

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Part:
    """Images, and as many chains, `start` to `stop` of an update of `count` images, whose first has number `first`.

    Images and chains are numbered through the whole run.
    """

    start: int
    stop: int
    count: int
    first: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def number(self) -> int:
        """The number of the first image of the part, which is the id of its first chain."""
        return self.first + self.start

    @property
    def share(self) -> float:
        """The weight of a mean over the part in the mean over the batch."""
        return len(self) / self.count

    def overlap(self, low: int, high: int) -> Part:
        """What the part has of the images `low` to `high` of the batch, which may be nothing."""
        start = min(max(self.start, low), self.stop)
        return replace(self, start=start, stop=max(start, min(self.stop, high)))

    def rows(self, first: int = 0) -> slice:
        """Where the part lies in rows that begin with image `first` of the batch."""
        return slice(self.start - first, self.stop - first)


class Parts:
    """Cuts batches into parts, one for each microbatch, and gathers what ranks compute.

    With one microbatch there is one part for each rank, and sums depend on the number of ranks by their rounding. With
    more there are as many parts, whatever the number of ranks, and so the sums do not depend on it.

    Attributes:
        ranks: the processes that work together.
        count: the number of parts, of all ranks together.

    Raises ValueError where there are more ranks than microbatches, unless there is one microbatch, or more ranks than
    images in a batch of `smallest_batch`.
    """

    def __init__(self, ranks: Ranks, microbatches: int, smallest_batch: int) -> None:
        if 1 < microbatches < ranks.size:
            raise ValueError(
                f"microbatches is {microbatches}, too few for {ranks.size} ranks: give as many or more, or 1 for "
                "batches that are cut by the number of ranks"
            )
        if smallest_batch < ranks.size:
            raise ValueError(
                f"a batch of {smallest_batch} is too small for {ranks.size} ranks: each needs one image at least"
            )
        self.ranks = ranks
        self.count = max(microbatches, ranks.size)
        self._fixed = microbatches > 1

    def of(self, batch_size: int, first: int) -> list[Part]:
        """The parts that this rank computes of an update whose first image has number `first`."""
        bounds = self._bounds(batch_size)
        return [Part(bounds[k], bounds[k + 1], batch_size, first) for k in self.ranks.share(self.count)]

    def _bounds(self, batch_size: int) -> list[int]:
        """Where the parts of a batch begin, and its end."""
        return [batch_size * k // self.count for k in range(self.count + 1)]

    def _lengths(self, batch_size: int) -> list[int]:
        """How many images each part of a batch has."""
        return [high - low for low, high in itertools.pairwise(self._bounds(batch_size))]

    def compute(self, net: nn.Module, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """What `function` gives for each of this rank's parts, all of which find the same buffers in `net`.

        The power iterations of a spectral norm therefore run once an update, whatever the number of parts. The running
        statistics of batch norm end as the mean of those of all parts.
        """
        items = list(items)
        if not self._fixed:  # one part a rank, and what batch norm sees there is that of all (`batch_norm_of_all`)
            return [function(item) for item in items]
        buffers = list(net.buffers())
        before = [buffer.clone() for buffer in buffers]
        statistics = [s for norm in batch_norms(net) for s in (norm.running_mean, norm.running_var) if s is not None]
        results, after = [], []
        for item in items:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            results.append(function(item))
            after.append([statistic / self.count for statistic in statistics])
        if statistics:
            for statistic, mean in zip(statistics, self._sum(after), strict=True):
                statistic.copy_(mean)
        return results

    def gradients(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        gradient: Callable[[Item], Result],
        items: Iterable[Item],
    ) -> list[Result]:
        """Sets the gradients of the optimizer's parameters to the sum over the parts of all ranks.

        Args:
            net: the net whose parameters they are.
            gradient: adds the gradient of a part's share of the loss to those that are there.
            items: its arguments, one for each of this rank's parts.

        Returns what `gradient` gives for each.
        """
        parts: list[list[Tensor]] = []

        def from_zero(item: Item) -> Result:
            optimizer.zero_grad()
            result = gradient(item)
            if self.count > 1:
                parts.append([p.grad for p in self._with_gradient(optimizer) if p.grad is not None])
                if self.ranks.size == 1:  # added at once, so that no more than two are kept
                    parts[:] = [self.ranks.sum_in_order(parts)]
            return result

        results = self.compute(net, from_zero, items)
        if self.count > 1:
            sums = parts[0] if self.ranks.size == 1 else self._sum(parts)
            for parameter, total in zip(self._with_gradient(optimizer), sums, strict=True):
                parameter.grad = (
                    total.contiguous()
                )  # of one layout for any number of ranks, as norms are added up in it
        return results

    def _sum(self, parts: list[list[Tensor]]) -> list[Tensor]:
        """The sum over the parts of all ranks in their order, from those of this rank."""
        # A rank with fewer parts than others adds zeros.
        lacking = -(-self.count // self.ranks.size) - len(parts)
        return self.ranks.sum_in_order([*parts, *[[torch.zeros_like(tensor) for tensor in parts[0]]] * lacking])

    @staticmethod
    def _with_gradient(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
        return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]

    def gather(self, values: Iterable[Tensor]) -> Tensor:
        """A tensor of one shape for each part, (count, ...), on every rank, from those of this rank's parts."""
        return self.ranks.gather(torch.stack([value.detach() for value in values]), self.count)

    def rows_of_batch(self, rows: Sequence[Tensor], batch_size: int) -> Tensor:
        """What this rank's parts have of each image of a batch, (len(part), ...), of all images, on every rank."""
        if self.ranks.size == 1:
            return torch.cat(list(rows))
        lengths = self._lengths(batch_size)
        padded = (F.pad(part, (0, 0) * (part.dim() - 1) + (0, max(lengths) - len(part))) for part in rows)
        return torch.cat([part[:length] for part, length in zip(self.gather(padded), lengths, strict=True)])

    def loss_and_energies(
        self, found: Sequence[tuple[Tensor, Tensor, Tensor]], batch_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of the batch, and its energies of data and samples (batch_size,), on every rank.

        They come from those of this rank's parts: a part's share of the loss, and the energies of its own.
        """
        losses, data, samples = (tuple(each.detach() for each in of_parts) for of_parts in zip(*found, strict=True))
        if self.ranks.size == 1:
            return torch.stack(losses).sum(), torch.cat(data), torch.cat(samples)
        lengths = self._lengths(batch_size)
        table = self.gather(
            torch.cat((loss[None], *(F.pad(energies, (0, max(lengths) - len(energies))) for energies in both)))
            for loss, *both in zip(losses, data, samples, strict=True)
        )
        both = table[:, 1:].unflatten(1, (2, max(lengths)))
        data_of_all, samples_of_all = (
            torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)]) for rows in both.unbind(1)
        )
        return table[:, 0].sum(), data_of_all, samples_of_all

    def means(self, metrics: Sequence[Metrics], images: Sequence[int]) -> Metrics:
        """The metrics of the batch, on every rank, from those of this rank's parts.

        They are means over the number of `images` that each part counts for, and of `largest_...` the largest.
        """
        if self.count == 1:
            return metrics[0]
        names = list(metrics[0])
        first = metrics[0][names[0]]
        table = self.gather(
            torch.stack([first.new_tensor(count, dtype=torch.float32), *(part[name].float() for name in names)])
            for count, part in zip(images, metrics, strict=True)
        )
        weights, columns = table[:, 0] / table[:, 0].sum(), table[:, 1:].unbind(1)
        return {
            name: column.max() if name.startswith("largest") else (weights * column).sum()
            for name, column in zip(names, columns, strict=True)
        }

    @contextmanager
    def batch_norm_of_all(self, net: nn.Module) -> Iterator[None]:
        """Within the block, batch norm in train mode has the statistics of the whole batch where ranks cut it.

        So it is as in one process. Gradients flow through the statistics too, and are right where the losses of all
        ranks are added. `torch.nn.SyncBatchNorm` does not run on a CPU.
        """
        norms = [] if self._fixed or self.ranks.size == 1 else list(batch_norms(net))
        for norm in norms:
            norm.forward = _Synced(norm, self.ranks)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            for norm in norms:
                del norm.forward  # type: ignore[method-assign]


def batch_norms(net: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (module for module in net.modules() if isinstance(module, nn.BatchNorm2d))


class _Synced:
    """The forward pass of a batch norm over all ranks."""

    def __init__(self, norm: nn.BatchNorm2d, ranks: Ranks) -> None:
        self.norm, self.ranks = norm, ranks

    def __call__(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not norm.training:
            return type(norm).forward(norm, x)
        values = x.float()
        own = values.new_tensor([values.numel() // values.shape[1]])
        # In two passes, as the mean of squares minus the square of the mean loses digits.
        sums = _SumOverRanks.apply(torch.cat((values.sum((0, 2, 3)), own)), self.ranks)
        count, mean = sums[-1].detach(), (sums[:-1] / sums[-1].detach())[:, None, None]
        centred = values - mean
        squares = _SumOverRanks.apply(centred.square().sum((0, 2, 3)), self.ranks)
        variance = squares / count
        self._move_statistics(mean.detach().flatten(), variance.detach() * (count / (count - 1)))
        scale = (variance + norm.eps).rsqrt() * norm.weight
        return (centred * scale[:, None, None] + norm.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _move_statistics(self, mean: Tensor, variance: Tensor) -> None:
        norm = self.norm
        if norm.num_batches_tracked is None or norm.running_mean is None or norm.running_var is None:
            return
        norm.num_batches_tracked += 1
        momentum = norm.momentum if norm.momentum is not None else 1.0 / float(norm.num_batches_tracked)
        norm.running_mean.lerp_(mean, momentum)
        norm.running_var.lerp_(variance, momentum)


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over the ranks, whose gradient is the sum of their gradients."""

    @staticmethod
    def forward(context: Any, x: Tensor, ranks: Ranks) -> Tensor:  # type: ignore[override]
        context.ranks = ranks
        return ranks.gather(x[None], ranks.size).sum(0)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return context.ranks.gather(gradient[None], context.ranks.size).sum(0), None
