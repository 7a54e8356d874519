"""Processes that work together: exchange, sums in a fixed order, work of all ranks, what goes wrong between them."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastebm
from fastebm.cli import main
from fastebm.cli.arguments import select_device
from fastebm.distributed import Ranks, launched, led, placed, ranks, shared_rows, together
from tests.distributed import tasks
from tests.distributed.processes import outcomes_of, run

ROOT = Path(__file__).resolve().parents[1]
SIZES = pytest.mark.parametrize("size", [2, 4])
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "FASTEBM_TIMEOUT")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64, 1000])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 1000])
def test_shares_are_contiguous_and_even(size: int, count: int) -> None:
    shares = [Ranks(rank, size).share(count) for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_alone_exchanges_nothing() -> None:
    x = torch.ones(3, 2)
    with launched() as here:
        assert here == ranks() == Ranks()
        assert here.first
        assert here.gather(x, 3) is x
        assert here.broadcast(x) is x
        here.barrier()
        assert led(lambda: 3) == 3
        assert together(torch.add, x, 1).tolist() == (x + 1).tolist()
        assert shared_rows(4, lambda rows: list(rows)) == [0, 1, 2, 3]
    assert here.sum_in_order([[x]])[0] is x


def test_it_costs_no_import_of_torch() -> None:
    program = "import sys, fastebm.distributed as d\nwith d.launched(): pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@SIZES
def test_exchange(size: int) -> None:
    run(size, tasks.exchange)


@SIZES
def test_sums_do_not_depend_on_the_number_of_ranks(size: int) -> None:
    parts = tasks.gradients()
    alone = Ranks().sum_in_order(parts)
    assert not torch.equal(alone[0], Ranks().sum_in_order(parts[::-1])[0]), "the order does not show"
    for found in run(size, tasks.sums):
        for one, other in zip(found, alone, strict=True):
            tasks.assert_same(one, other)


@pytest.mark.parametrize("parts", [[], [[torch.ones(2)], []]])
def test_parts_that_differ_are_refused(parts: list[list[torch.Tensor]]) -> None:
    with pytest.raises(ValueError, match="parts must be one or more and have as many tensors each"):
        Ranks().sum_in_order(parts)


@SIZES
def test_samplers_of_a_program_of_ones_own_give_the_bits_of_one_process(size: int) -> None:
    alone = tasks.own_samplers()
    for found in run(size, tasks.own_samplers):
        for one, other in zip(found, alone, strict=True):
            tasks.assert_same(one, other)


@SIZES
def test_the_program_of_the_docs_gives_the_bits_of_one_process(size: int) -> None:
    text = "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "scaling.md").read_text(), re.S | re.M))
    alone, *others = run(1, tasks.program, text) + run(size, tasks.program, text)
    assert alone.shape == (1000, 2)
    for other in others:
        tasks.assert_same(other, alone)


@SIZES
def test_all_ranks_share_the_work_of_the_first_and_its_errors(size: int) -> None:
    seen, *others = run(size, tasks.work_together)
    assert others == [[]] * (size - 1)
    computing, failures, plain = seen[:4], seen[4:-1], seen[-1]
    # Whose rows they are: none, the last rank's single one, and then everybody's.
    assert computing[0] == []
    assert computing[1] == [size - 1]
    assert computing[3] == list(range(size))
    assert plain == [0, 1, 2, 3, 4]
    assert len(failures) >= 10
    for kind, on, message in failures:
        unknown = kind == "unpicklable" and on
        own = (
            "UnpicklableError: of its own kind" if kind == "unpicklable" else f"FloatingPointError: chains of rank {on}"
        )
        assert message == (f"RuntimeError: {own}" if unknown else own), (kind, on)


@pytest.mark.parametrize(
    ("how", "message"),
    [("sleeps", "another of 3 processes did not answer within 2 s"), ("ends", "another of 3 processes has ended")],
)
def test_a_rank_that_is_lost_is_an_error_of_the_others(how: str, message: str) -> None:
    outcomes = outcomes_of(3, tasks.fall_silent, how, FASTEBM_TIMEOUT="2")
    assert [outcome.result for outcome in outcomes[:2]] == [message] * 2


def test_a_rank_that_stops_while_it_waits_for_work_is_an_error_of_the_first() -> None:
    outcomes = outcomes_of(2, tasks.fall_silent_at_work, FASTEBM_TIMEOUT="2")
    assert outcomes[0].result == "another of 2 processes did not answer within 2 s", outcomes


def test_blocks_in_blocks_and_groups_of_the_caller() -> None:
    assert run(2, tasks.meet) == [Ranks(rank, 2, rank, 2) for rank in range(2)]
    assert run(2, tasks.use_a_group_that_is_there) == [Ranks(rank, 2, rank, 2) for rank in range(2)]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE is not: torchrun sets both, a process alone needs neither"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be below WORLD_SIZE, got RANK=2 and WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK must be below WORLD_SIZE, got RANK=0 and WORLD_SIZE=0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK must be a whole number, got '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, got 'two'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "2 processes need MASTER_ADDR and MASTER_PORT to meet"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
            "MASTER_PORT must be a whole number, got 'x'",
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},
            "LOCAL_RANK must be below LOCAL_WORLD_SIZE, got LOCAL_RANK=1 and LOCAL_WORLD_SIZE=1",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "FASTEBM_TIMEOUT": "soon"},
            "FASTEBM_TIMEOUT must be a number of seconds, got 'soon'",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "FASTEBM_TIMEOUT": "0"},
            "a timeout is a positive number of seconds, at most 10^9, got 0",
        ),
    ],
)
def test_a_wrong_world_is_one_line_and_exit_code_2(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as refused, launched():
        pass
    assert message in str(refused.value)
    assert main(["info"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"fastebm: {refused.value}\n")


def test_a_port_that_is_taken_and_a_meeting_that_nobody_comes_to(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(ConnectionError, match=r"2 processes could not meet at 127.0.0.1:\d+: the port is in use"):
            launched().__enter__()
        assert main(["info"]) == 2
    monkeypatch.setenv("FASTEBM_TIMEOUT", "1")
    with pytest.raises(ConnectionError, match=r"2 processes could not meet at .*: .*1/2 clients joined"):
        launched().__enter__()
    assert "the port is in use" in capfd.readouterr().err


def test_torchrun_gives_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert placed() == Ranks()
    values = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a"}
    for name, value in (values | {"MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    assert placed() == Ranks(5, 8, 1, 4)


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Ranks(5, 8, 1, 4)
    monkeypatch.setattr("fastebm.cli.arguments.ranks", lambda: here)
    monkeypatch.setattr("fastebm.ops.backends.select_backend", lambda device, **_: "triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert select_device(None) == select_device("cuda") == torch.device("cuda:1")
    assert select_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda:0 is one GPU for 8 processes: cuda gives each its own"):
        select_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 processes were started on this machine, and it has 2 GPUs: start as many"):
        select_device("cuda")
    monkeypatch.setattr("fastebm.cli.arguments.ranks", Ranks)
    assert select_device("cuda:1") == torch.device("cuda:1")
    assert fastebm.distributed.ranks() == Ranks()
