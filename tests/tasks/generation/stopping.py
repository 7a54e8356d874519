"""Stops a generation after some chunks, as a failure would."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastebm.sampling.cascade import LevelSampler


class StopError(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    """Has the sampler fail once it has drawn so many chunks."""
    left, sample = iter(range(chunks)), LevelSampler.sample

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        if next(left, None) is None:
            raise StopError
        return sample(*arguments, **options)

    monkeypatch.setattr(LevelSampler, "sample", counted)
