"""What the tests have processes do that work together."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastebm
import fastebm.tasks
import fastebm.training
from fastebm.cli import main
from fastebm.distributed import LostRankError, OnFirst, Ranks, launched, led, ranks, shared_rows, together

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.int64, torch.uint8, torch.complex64)
PARTS = 4


def commands(folder: Path, lines: Sequence[Sequence[str]]) -> list[int]:
    """The exit codes of commands in a folder."""
    os.chdir(folder)
    return [main(list(line)) for line in lines]


def exchange() -> None:
    """`gather` of all dtypes, layouts and numbers of rows; `broadcast` and `barrier`."""
    with launched() as here:
        for count in (0, 1, here.size - 1, here.size, 2 * here.size + 1, 11):
            for dtype in DTYPES:
                for shape in ((count,), (count, 3), (count, 2, 3, 2), (count, 0)):
                    whole = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
                    assert_same(here.gather(part(whole, here), count), whole)
        images = torch.randn(9, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        turned = images.to(memory_format=torch.channels_last)
        assert_same(here.gather(part(turned, here), 9), images)
        strided = images.transpose(1, 3)
        assert_same(here.gather(part(strided, here), 9), strided)
        needs_gradient = images.clone().requires_grad_()
        assert not here.gather(part(needs_gradient, here), 9).requires_grad
        sent = {"numbers": [1, 2], "tensor": images} if here.first else None
        assert_same(here.broadcast(sent)["tensor"], images)
        here.barrier()
        with pytest.raises(ValueError, match=r"of 100 rows, got a tensor of shape \(9, 3, 4, 4\)"):
            here.gather(images, 100)


def gradients() -> list[list[Tensor]]:
    """Parts whose sum depends on the order in which it is added up."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 10 ** (8 * torch.rand(shape, generator=generator) - 4)

    return [[draw(7, 5), draw(3).bfloat16(), draw(), draw(0), draw(11).double()] for _ in range(PARTS)]


def sums() -> list[Tensor]:
    """`sum_in_order` of the parts of all ranks, which leaves them as they were."""
    parts = gradients()
    with launched() as here:
        each = PARTS // here.size
        own = parts[here.rank * each : (here.rank + 1) * each]
        total = here.sum_in_order(own)
    for before, after in zip(gradients(), parts, strict=True):
        for one, other in zip(before, after, strict=True):
            assert_same(other, one)
    return total


def own_samplers() -> list[Tensor]:
    """Samplers in a program of a user's own: each rank runs the chains of its share, under their ids."""

    def energy(x: Tensor) -> Tensor:
        return 0.5 * x.square().flatten(1).sum(1) + 0.1 * x.flatten(1).cos().sum(1)

    samplers = [fastebm.Langevin(energy, 0.1, 0.3), fastebm.MALA(energy, 0.1), fastebm.HMC(energy, 0.1, 3)]
    starts = 2 * fastebm.ops.uniform((10, 2, 3), seed=5) - 1
    found = []
    with launched() as here:
        for sampler in samplers:
            own = here.share(len(starts))
            ends = sampler.sample(starts[own.start : own.stop], 20, seed=1, chain_ids=own.start)
            found.append(here.gather(ends, len(starts)))
    return found


def program(text: str) -> Tensor:
    """The `samples` of a program, which is run as the main one."""
    space = vars(sys.modules["__main__"])
    exec(compile(text, "docs/scaling.md", "exec"), space)
    return space["samples"]


@dataclass(frozen=True)
class Rows:
    """A result with rows."""

    numbers: Tensor
    nothing: None = None


def numbered(count: int) -> dict[str, Any]:
    """Every kind of result of `shared_rows`, with loops in loops; and which rank computed which row."""

    def inner(rows: range) -> Tensor:
        return torch.tensor([[float(row)] for row in rows])

    def outer(rows: range) -> dict[str, Any]:
        again = shared_rows(3, lambda few: torch.tensor(list(few)))
        assert again.tolist() == [0, 1, 2], "a loop in a loop was split"
        by = torch.full((len(rows),), ranks().rank)
        return {"pair": (inner(rows), [by]), "rows": Rows(inner(rows)), "none": None}

    return shared_rows(count, outer)


def fail(on: int, kind: str, count: int) -> None:
    """Fails on one rank, in a loop over rows, before or after it; a handler around it must not hide that."""
    if kind == "before" and ranks().rank == on:
        raise FloatingPointError(f"chains of rank {on}")

    def compute(rows: range) -> Tensor:
        if kind == "within" and ranks().rank == on:
            raise FloatingPointError(f"chains of rank {on}")
        if kind == "unpicklable" and ranks().rank == on:
            raise UnpicklableError(lambda: None)
        return torch.zeros(len(rows))

    try:
        shared_rows(count, compute)
        shared_rows(count, compute)
    except FloatingPointError:
        return
    if kind == "after" and ranks().rank == on:
        raise FloatingPointError(f"chains of rank {on}")


class UnpicklableError(Exception):
    """An exception that can't travel."""

    def __init__(self, value: Callable[[], None]) -> None:
        super().__init__("of its own kind")
        self.value = value


def drawn_seed() -> Tensor:
    return shared_rows(
        8, lambda rows: fastebm.ops.uniform((8, 2), seed=fastebm.rng.draw_seed())[rows.start : rows.stop]
    )


def stays(value: OnFirst[list[int]]) -> None:
    assert (value.value is None) is (ranks().rank > 0)


def work_together() -> list[Any]:
    """What rank 0 gets and sees of `together`; on the others nothing."""
    seen: list[Any] = []

    def command() -> int:
        for count in (0, 1, 3, 10):
            found = together(numbered, count)
            values, (by,) = found["pair"]
            assert values.flatten().tolist() == found["rows"].numbers.flatten().tolist() == list(range(count))
            assert found["none"] is None
            seen.append(sorted(set(by.tolist())))
        assert together(torch.linspace, 0, 1, 3).tolist() == [0, 0.5, 1]
        together(stays, OnFirst([1]))
        torch.manual_seed(3)
        drawn = together(drawn_seed)
        torch.manual_seed(3)
        assert_same(drawn, drawn_seed())
        for kind in ("before", "within", "after", "unpicklable"):
            for on in {0, ranks().size - 1}:
                for count in (1, 10):
                    if kind in ("within", "unpicklable") and count == 1 and on:
                        continue  # that rank computes nothing that counts
                    seen.append((kind, on, failure(on, kind, count)))
        seen.append(shared_rows(5, lambda rows: torch.tensor(list(rows))).tolist())
        return 7

    with launched():
        code = led(command)
    assert code == 7
    return seen


def failure(on: int, kind: str, count: int) -> str:
    try:
        together(fail, on, kind, count)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def fall_silent(how: str) -> str:
    """The last rank does not answer, or ends; what the others make of it."""
    with launched() as here:
        here.barrier()
        began = time.monotonic()
        if here.rank == here.size - 1:
            if how == "ends":
                return ""
            time.sleep(8)
        try:
            here.barrier()
        except LostRankError as error:
            assert how == "ends" or time.monotonic() - began >= 2
            return str(error)
    return ""


def fall_silent_at_work() -> str:
    """The last rank stops while it waits for a call; what rank 0 makes of it."""
    said = []

    def command() -> int:
        *_, last = together(pids).tolist()
        os.kill(int(last), signal.SIGSTOP)
        try:
            together(torch.ones, 2**22)
        except LostRankError as error:
            said.append(str(error))
        finally:
            os.kill(int(last), signal.SIGKILL)
        return 1

    try:
        with launched():
            led(command)
    except LostRankError:
        pass
    return "".join(said)


def pids() -> Tensor:
    return shared_rows(ranks().size, lambda rows: torch.tensor([os.getpid()]))


def meet() -> Ranks:
    with launched() as here, launched() as again:
        assert again is here is ranks()
        return here


def use_a_group_that_is_there() -> Ranks:
    import torch.distributed as group

    group.init_process_group("gloo")
    with launched() as here:
        here.barrier()
    assert group.is_initialized(), "a group of the caller's was torn down"
    assert ranks() == Ranks()
    group.destroy_process_group()
    return here


def part(whole: Tensor, here: Ranks) -> Tensor:
    own = here.share(len(whole))
    return whole[own.start : own.stop]


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)
