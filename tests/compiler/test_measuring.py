"""What is measured of several ways to run an energy: on a GPU, the time until its work is done."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastebm import ops
from fastebm.compiler import measuring
from fastebm.compiler.candidates import ProgramKey, candidates
from fastebm.compiler.executor import CompiledExecutor
from fastebm.compiler.measuring import BUDGET, MAX_ROUNDS, MIN_ROUNDS, as_in_a_chain, measured
from tests.gpu.graph_recorder import GraphRecorder


class Clock:
    """Time that passes by work: the host's at once, a device's when the host waits for it."""

    def __init__(self) -> None:
        self.now = self.pending = 0.0
        self.runs = 0

    def run(self, on_host: float, on_device: float):
        def work() -> None:
            self.now += on_host
            self.pending = max(0.0, self.pending - on_host) + on_device
            self.runs += 1

        return work

    def synchronize(self, device: torch.device) -> None:
        self.now, self.pending = self.now + self.pending, 0.0


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: made.now)
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    return made


def test_a_gpus_work_counts_and_not_its_launch(clock):
    """By the host's time alone, the program of few launches would always be the fastest."""
    one_launch, many_launches = clock.run(0.00001, 0.004), clock.run(0.0005, 0.001)
    seconds = measured([one_launch, many_launches], torch.device("cuda"))
    assert seconds == pytest.approx([0.00401, 0.0015])


def test_the_budget_is_kept(clock):
    slow, quick = clock.run(1.0, 0.0), clock.run(1e-5, 0.0)
    measured([slow], torch.device("cpu"))
    assert clock.runs == 1 + MIN_ROUNDS
    clock.runs = 0
    measured([quick], torch.device("cpu"))
    assert clock.runs == 1 + MAX_ROUNDS
    assert MAX_ROUNDS * 1e-5 < BUDGET


def test_a_fused_program_is_measured_as_a_graph():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16, 1), nn.Flatten(0)).eval()
    recorder = GraphRecorder()
    with ops.backend("reference"), recorder.installed():
        x = torch.rand(3, 1, 4, 4)
        with recorder.pause():
            key = ProgramKey(torch.Size((1, 4, 4)), torch.float32, torch.device("cpu"), torch.float32)
            executor = next(iter(candidates(net, net, key, x))).executor
            assert isinstance(executor, CompiledExecutor)
            executor.refresh()
            expected = executor(x)
        run = as_in_a_chain(executor, x)
        recorder.start_counting()
        found = run()
        assert recorder.counts.refreshes == 1
        assert recorder.counts.operators == 0
        assert all(map(torch.equal, found, expected))
        recorder.failure = RuntimeError("not while capturing")
        assert all(map(torch.equal, as_in_a_chain(executor, x)(), expected))
