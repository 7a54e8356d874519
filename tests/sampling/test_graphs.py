"""Chains in CUDA graphs are the plain loop's, bit for bit: on a GPU, and on the CPU against a recorder of graphs."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastebm import Langevin, ops
from fastebm.compiler.faults import FaultWarning
from fastebm.models import CoarseToFineEnergy
from fastebm.sampling import Cascade
from fastebm.sampling.graphs import ChainGraphs, blocks
from fastebm.sampling.observers import FiniteCheck, all_deferrable, progress_bar, trajectory_recorder
from fastebm.sampling.schedules import cosine, linear
from tests.gpu import chain_start
from tests.gpu.graph_recorder import CaptureError, GraphRecorder

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("num_steps", [0, 1, 7, 8, 9, 16, 61])
def test_blocks_make_up_the_chain(num_steps):
    lengths = list(blocks(num_steps))
    assert sum(lengths) == num_steps
    assert lengths == sorted(lengths, reverse=True)
    assert lengths.count(8) == num_steps // 8


def test_who_reads_every_state_keeps_the_plain_loop():
    watch, frames = FiniteCheck(0, torch.arange(2)), trajectory_recorder(torch.zeros(3, 2, 3), 1)
    assert all_deferrable(())
    assert all_deferrable((watch,))
    assert not all_deferrable((watch, frames))
    assert not all_deferrable((lambda done, x, energies: None,))
    with progress_bar(3, True) as bar:
        assert all_deferrable((watch, *bar))


def test_energies_may_be_told_in_blocks():
    """What a watch finds does not depend on when it is called, as long as the order is kept."""
    energies = torch.tensor([[1.0, 2.0], [1.0, float("inf")], [1.0, 2.0]])
    watch = FiniteCheck(5, torch.tensor([3, 8]))
    for done, of_update in enumerate(energies, 1):
        watch(done, torch.zeros(2, 4), of_update)
    with pytest.raises(FloatingPointError, match=r"chain 8, by its energy before update 2 of 3 \(step 6\)"):
        watch.check()


def test_samplers_can_be_copied():
    sampler = Langevin(lambda x: x.square().sum(1), 0.1, 0.1)
    sampler._graphs._captured["kept"] = object()
    assert copy.deepcopy(sampler)._graphs._captured == {}
    assert isinstance(sampler._graphs, ChainGraphs)


# Against the recorder ------------------------------------------------------------------------------------------------


@pytest.fixture
def recorder() -> Iterator[GraphRecorder]:
    made = GraphRecorder()
    with made.installed():
        yield made
    assert not made.illegal


def net(size: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return CoarseToFineEnergy(size, base_width=8)


def start(batch: int = 4, size: int = 8) -> Tensor:
    return torch.tanh(torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)))


def plain(sampler: Langevin, x: Tensor, num_steps: int, **options) -> Tensor:
    """The same chain with an observer that reads every state, and so without graphs."""
    state = sampler.init(x, seed=3, num_steps=num_steps, **options)
    ends = sampler.advance_(state, num_steps, (lambda done, x, energies: None,)).x
    if sampler.clamp_at == "end":
        sampler._clamp_ends_(state, ends)
    return ends


def hole() -> Tensor:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5] = True
    return mask


BOUNDS = torch.tensor([0.2, 0.5, 0.9]).reshape(3, 1, 1)
OPTIONS = {
    "clamp": {"clamp": (-1, 1)},
    "bounds of each channel": {"clamp": (-BOUNDS, BOUNDS)},
    "clamp at the end": {"clamp": (-0.5, 0.5), "clamp_at": "end"},
    "clip": {"grad_clip": 1e-3},
    "clip of norms": {"grad_norm_clip": 1e-2},
    "noise first": {"noise_first": True, "clamp": (-1, 1), "clamp_noise": True},
    "schedules": {"step_size": cosine(0.5, 0.1), "noise_std": linear(0.05, 0.0)},
    "steps of each chain": {"step_size": torch.tensor([0.1, 0.2, 0.4, 0.8])},
    "steps of each update and chain": {"noise_std": torch.rand(19, 4, generator=torch.Generator().manual_seed(2))},
    "bfloat16": {"dtype": torch.bfloat16},
    "mask": {"mask": hole(), "known": start().flip(3)},
    "anchor": {"data_term": (-start(), 0.3)},
    "anchor with a hinge and a schedule": {"data_term": (-start(), linear(0.3, 0.0), 0.1)},
    "all at once": {
        "step_size": cosine(0.5, 0.1),
        "clamp": (-1, 1),
        "grad_clip": 1e-3,
        "mask": hole(),
        "known": start().flip(3),
        "data_term": (-start(), linear(0.3, 0.0), 0.1),
        "chain_ids": torch.tensor([5, 3, 2**40, 1]),
        "start_step": 7,
    },
}
OF_CHAINS = ("mask", "known", "data_term", "chain_ids", "start_step")


@pytest.mark.parametrize("name", OPTIONS)
def test_chains_of_all_options_are_the_plain_loops(recorder, name):
    given = {"step_size": 0.5, "noise_std": 0.01} | OPTIONS[name]
    sampler = Langevin(net(), engine="fused", **{key: v for key, v in given.items() if key not in OF_CHAINS})
    options = {key: value for key, value in given.items() if key in OF_CHAINS}
    expected = plain(sampler, start(), 19, **options)
    assert recorder.counts.replays == 0
    for _ in range(2):  # the first chain captures; all updates of the second one are replayed
        recorder.start_counting()
        assert torch.equal(sampler.sample(start(), 19, seed=3, **options), expected)
    assert recorder.counts.replays == len(list(blocks(19)))
    assert recorder.graphs == 2


def test_tensors_of_the_same_shapes_share_graphs(recorder):
    sampler = Langevin(net(), 0.5, linear(0.02, 0.0), engine="fused")
    for scale in (1.0, 0.5):  # the second chain has other values
        x = scale * start()
        options = {"mask": hole(), "known": x.flip(2), "data_term": (-x, 0.3, 0.1)}
        assert torch.equal(sampler.sample(x, 19, seed=3, **options), plain(sampler, x, 19, **options))
    assert len(sampler._graphs._captured) == 1
    assert recorder.graphs == 2


def test_another_hinge_has_graphs_of_its_own(recorder):
    """It is a number of the host, which a graph keeps as it was."""
    sampler = Langevin(net(), 0.5, 0.01, engine="fused")
    ends = []
    for hinge in (0.0, 100.0, 0.0):
        options = {"data_term": (-start(), 0.3, hinge)}
        ends.append(sampler.sample(start(), 10, seed=3, **options))
        assert torch.equal(ends[-1], plain(sampler, start(), 10, **options))
    assert not torch.equal(ends[0], ends[1])


def test_batches_that_change_have_graphs_of_their_own(recorder):
    sampler = Langevin(net(), 0.5, 0.01, clamp=(-1, 1), engine="fused")
    for num_steps, batch in ((1, 4), (2, 4), (20, 4), (11, 3), (20, 4), (0, 4)):
        x = start(batch)
        assert torch.equal(sampler.sample(x, num_steps, seed=3), plain(sampler, x, num_steps))
    assert len(sampler._graphs._captured) == 2
    assert torch.equal(sampler.sample(start(7), 20, seed=3, batch_size=4), plain(sampler, start(7), 20))


def test_new_weights_are_seen(recorder):
    energy = net()
    sampler = Langevin(energy, 0.5, 0.01, engine="fused")
    x, ends = start(), []
    for _ in range(3):
        ends.append(sampler.sample(x, 12, seed=3))
        assert torch.equal(ends[-1], plain(sampler, x, 12))
        with torch.no_grad():
            for parameter in energy.parameters():
                parameter.mul_(1.5)
    assert not torch.equal(ends[0], ends[1])
    assert len(sampler._graphs._captured) == 1


def normed() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 4, 2, 1), nn.Linear(8 * 16, 1)]
    first, second, last = (nn.utils.parametrizations.spectral_norm(layer) for layer in layers)
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), nn.Flatten(), last, nn.Flatten(0))


CHANGING = {"equalised": net, "spectral norms": normed, "plain": chain_start.convolutions}


def without_graphs(energy: nn.Module, num_steps: int = 10) -> Tensor:
    """The chain of a copy of the energy, whose weights are evaluated one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTEBM_GRAPHS", "0")
        return Langevin(copy.deepcopy(energy), 0.5, 0.01, engine="fused").sample(start(), num_steps, seed=3)


@pytest.mark.parametrize("name", CHANGING)
def test_changed_weights_are_evaluated_by_graphs(recorder, name):
    """From the third change at last, a chain begins as one with known weights does, but for replays."""
    energy = CHANGING[name]()
    sampler = Langevin(energy, 0.5, 0.01, engine="fused")
    begun = []
    for number in range(9):
        expected = without_graphs(energy)
        recorder.start_counting()
        assert torch.equal(sampler.sample(start(), 10, seed=3), expected)
        begun.append(recorder.first_replay)
        if number != 4:  # the fifth chain and the sixth have the same weights
            with torch.no_grad():
                for parameter in energy.parameters():
                    parameter.mul_(1.01)
            if name == "spectral norms":  # whose vectors move on
                energy.train()(start())
        if number == 6:  # others lie elsewhere
            layer = next(part for part in energy.modules() if isinstance(part, nn.Conv2d))
            held = layer.parametrizations.weight if hasattr(layer, "parametrizations") else layer
            of = "original" if held is not layer else "weight"
            setattr(held, of, nn.Parameter(getattr(held, of).detach() * 0.5))
    assert recorder.counts.replays
    replays = 1 if name == "plain" else 2
    assert [begun[i].refreshes for i in (0, 4, 5, 6)] == [0, replays, 0, replays]
    assert begun[4].operators == begun[5].operators < begun[1].operators
    assert begun[4].waits == begun[5].waits
    assert begun[7].operators > begun[4].operators


class Scaled(nn.Module):
    factor = 1.0

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def test_parametrizations_that_may_read_more_are_evaluated_anew(recorder, monkeypatch):
    energy = chain_start.convolutions()
    nn.utils.parametrize.register_parametrization(energy[0], "weight", Scaled())
    sampler, ends = Langevin(energy, 0.5, 0.01, engine="fused"), []
    for number in range(5):
        monkeypatch.setattr(Scaled, "factor", 1 + 0.1 * number)
        with torch.no_grad():
            energy[2].weight.mul_(1.01)
        ends.append(sampler.sample(start(), 10, seed=3))
        assert torch.equal(ends[-1], without_graphs(energy))
    assert not torch.equal(ends[3], ends[4])


@pytest.mark.filterwarnings("default")
def test_weights_that_no_graph_can_evaluate_are_evaluated_one_by_one(recorder):
    energy = chain_start.convolutions()
    sampler = Langevin(energy, 0.5, 0.01, engine="fused")

    def sample_with_others() -> None:
        with torch.no_grad():
            energy[0].weight.mul_(1.01)
        assert torch.equal(sampler.sample(start(), 10, seed=3), without_graphs(energy))

    sample_with_others()
    sample_with_others()
    recorder.failure = RuntimeError("operation not permitted when stream is capturing")
    with pytest.warns(FaultWarning, match="folding of weights runs without a CUDA graph.*not permitted") as found:
        sample_with_others()
    assert len(found) == 1
    tried, recorder.failure = recorder.graphs, None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_with_others()
    assert recorder.graphs == tried  # not tried again


def test_a_chain_that_is_cut_goes_on_in_graphs(recorder):
    sampler = Langevin(net(), cosine(0.5, 0.1), 0.01, engine="fused")
    state = sampler.init(start(), seed=3, num_steps=20)
    for num_steps in (3, 9, 8):
        saved = {name: v.clone() if isinstance(v, Tensor) else v for name, v in state.state_dict().items()}
        state = sampler.advance(sampler.load_state(saved), num_steps)
    assert torch.equal(state.x, plain(sampler, start(), 20))
    assert recorder.counts.replays


def test_cascades_are_the_plain_loops(recorder, monkeypatch):
    energies = {size: net(size).eval() for size in (8, 16)}
    cascade = Cascade(energies, num_steps=11, engine="fused")
    for count in (3, 2):
        by_graphs = cascade.sample(count, seed=3, channels=3)
        assert recorder.counts.replays
        with monkeypatch.context() as patch:
            patch.setenv("FASTEBM_GRAPHS", "0")
            recorder.start_counting()
            assert torch.equal(cascade.sample(count, seed=3, channels=3), by_graphs)
            assert recorder.counts.replays == 0


def test_chains_that_no_graph_serves_keep_the_plain_loop(recorder):
    x, label = start(), torch.arange(4.0)
    quadratic = lambda x, c: ((x - c.reshape(-1, 1, 1, 1)) ** 2).sum((1, 2, 3))  # noqa: E731
    moved = Langevin(net(), 0.5, 0.01, momentum=0.5, engine="fused")
    assert torch.equal(moved.sample(x, 12, seed=3), plain(moved, x, 12))
    conditional = Langevin(quadratic, 0.1, 0.01, engine="autograd")
    assert torch.equal(
        conditional.sample(x, 12, seed=3, conditions=[label]), plain(conditional, x, 12, conditions=[label])
    )
    sampler = Langevin(net(), 0.5, 0.01, engine="fused")
    frames = sampler.sample(x, 12, seed=3, keep="trajectory")
    assert torch.equal(frames[-1], plain(sampler, x, 12))
    sampler.sample(x, 12, seed=3, project=lambda x: x.clamp(-1, 1))
    assert recorder.graphs == 0


def test_an_energy_that_may_read_more_is_compared_first(recorder):
    """Its first update is made alone, in every chain."""
    energy = net()
    sampler = Langevin(lambda x: 2 * energy(x), 0.5, 0.01, engine="fused")
    energy.eval()
    for _ in range(2):
        assert torch.equal(sampler.sample(start(), 20, seed=3), plain(sampler, start(), 20))
    assert recorder.graphs == 2


@pytest.mark.filterwarnings("default")
def test_a_failed_capture_falls_back_with_one_warning(recorder):
    sampler = Langevin(net(), 0.5, 0.01, engine="fused")
    expected = plain(sampler, start(), 20)
    recorder.failure = RuntimeError("operation not permitted when stream is capturing")
    with pytest.warns(
        FaultWarning, match="CUDA graphs.*RuntimeError: operation not permitted.*FASTEBM_GRAPHS=0"
    ) as found:
        assert torch.equal(sampler.sample(start(), 20, seed=3), expected)
    assert len(found) == 1
    tried, recorder.failure = recorder.graphs, None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sampler.sample(start(), 20, seed=3), expected)
        assert recorder.graphs == tried  # not tried again
        assert torch.equal(sampler.sample(start(3), 20, seed=3), plain(sampler, start(3), 20))
    assert recorder.graphs == tried + 2  # another kind of states


def test_a_warning_of_a_capture_that_is_an_error_is_one_in_every_chain(recorder):
    """As in benchmarks: a chain that is tried again is no plain loop in silence."""
    sampler = Langevin(net(), 0.5, 0.01, engine="fused")
    recorder.failure = RuntimeError("operation not permitted when stream is capturing")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FaultWarning)
        for _ in range(3):
            with pytest.raises(FaultWarning, match="CUDA graphs"):
                sampler.sample(start(), 20, seed=3)
    recorder.failure = None
    assert torch.equal(sampler.sample(start(), 20, seed=3), plain(sampler, start(), 20))
    assert recorder.counts.replays


@pytest.mark.parametrize("at", [1, 5])  # in the warm-up, and in the capture
@pytest.mark.parametrize("invalid", [False, True])
def test_an_interrupt_is_none_of_the_captures(recorder, monkeypatch, at, invalid):
    """It goes on to the caller, also where the end of the capture fails; the next chain is captured anew."""
    sampler = Langevin(net(), 0.5, 0.01, engine="fused")
    expected = plain(sampler, start(), 20)
    make, moves = Langevin._mover, []

    def interrupted(self, state):
        move = make(self, state)

        def moved():
            moves.append(None)
            if len(moves) == at:
                if invalid and recorder.capturing is not None:
                    with pytest.raises(CaptureError):
                        state.x.tolist()
                raise KeyboardInterrupt
            return move()

        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Langevin, "_mover", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sampler.sample(start(), 20, seed=3)
    assert bool(recorder.illegal) == (invalid and at == 5)
    recorder.illegal.clear()
    recorder.start_counting()
    assert torch.equal(sampler.sample(start(), 20, seed=3), expected)
    assert recorder.counts.replays


def test_chains_in_inference_mode_and_others_share_graphs(recorder):
    sampler = Langevin(net(), 0.5, 0.01, clamp=(-1, 1), engine="fused")
    expected = plain(sampler, start(), 20)
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            assert torch.equal(sampler.sample(start(), 20, seed=3), expected)
    assert recorder.graphs == 2


def test_an_update_that_waits_for_the_device_is_no_graph(recorder, monkeypatch):
    """What the recorder refuses, a capture would: the chain goes on without a graph."""
    sampler = Langevin(net(), 0.5, 0.01, engine="fused")
    expected = plain(sampler, start(), 20)
    make = Langevin._mover

    def waiting(self, state):
        move = make(self, state)

        def moved():
            energies, gradient = move()
            float(energies.sum())
            return energies, gradient

        return moved

    monkeypatch.setattr(Langevin, "_mover", waiting)
    with pytest.warns(FaultWarning, match="_local_scalar_dense reads from the device in a capture"):
        assert torch.equal(sampler.sample(start(), 20, seed=3), expected)
    assert recorder.illegal
    recorder.illegal.clear()


def test_graphs_can_be_turned_off(recorder, monkeypatch):
    sampler = Langevin(net(), 0.5, 0.01, engine="fused")
    monkeypatch.setenv("FASTEBM_GRAPHS", "0")
    assert torch.equal(sampler.sample(start(), 20, seed=3), plain(sampler, start(), 20))
    assert recorder.graphs == 0
    monkeypatch.setenv("FASTEBM_GRAPHS", "no")
    with pytest.raises(ValueError, match="FASTEBM_GRAPHS must be 0 or 1, got 'no'"):
        sampler.sample(start(), 20, seed=3)
    with pytest.raises(ValueError, match="FASTEBM_GRAPHS must be 0 or 1, got 'no'"):
        Langevin(net(), 0.5, 0.01)  # on any device
    monkeypatch.setenv("FASTEBM_GRAPHS", "1")
    sampler.sample(start(), 20, seed=3)
    assert recorder.graphs == 2


def kept_graphs(sampler: Langevin) -> list[weakref.ref]:
    return [weakref.ref(graph) for c in sampler._graphs._captured.values() for graph, _ in c.graphs.values()]


def test_stale_graphs_are_freed_at_once(recorder):
    sampler = Langevin(net(), 0.5, 0.01, engine="fused")
    gc.disable()  # references alone must free them
    try:
        sampler.sample(start(2), 9, seed=3)
        (old,) = [weakref.ref(c.workspace) for c in sampler._graphs._captured.values()]
        small = kept_graphs(sampler)
        sampler.sample(start(16), 9, seed=3)  # takes a larger workspace
        assert old() is None
        assert {graph() for graph in small} == {None}
        large = kept_graphs(sampler)
        assert torch.equal(sampler.sample(start(2), 9, seed=3), plain(sampler, start(2), 9))
        assert None not in [graph() for graph in large]
        sampler.gradient._compiled._programs.clear()  # as if what the energy decides by had changed
        assert torch.equal(sampler.sample(start(2), 9, seed=3), plain(sampler, start(2), 9))
        assert {graph() for graph in large} == {None}
        assert len(sampler._graphs._captured) == 1
    finally:
        gc.enable()


def test_lost_chains_are_found_in_graphs(recorder):
    sampler = Langevin(lambda x: -x.square().sum((1, 2, 3)), 1e6, 0.0, engine="fused")
    with pytest.raises(FloatingPointError, match=r"4 of 4 chains are not finite; the first is chain 0, by its energy"):
        sampler.sample(start(), 40, seed=3)
    assert recorder.counts.replays


def test_an_energy_that_was_lost_for_a_while_is_found(recorder):
    """Later replays write to the memory of the block that had it."""
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(256, 1), nn.Flatten(0)]
    energy = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.fill_(0.1)
    sampler = Langevin(energy, 0.5, 0.0, clamp=(-1, 1), engine="fused")
    sampler.sample(start(), 24, seed=3)
    far = start()
    far[2] = 3e38
    with pytest.raises(FloatingPointError, match=r"the first is chain 2, by its energy before update 1 of 24"):
        sampler.sample(far, 24, seed=3)


def test_what_is_told_of_energies_is_the_plain_loops(recorder):
    """FiniteCheck, and observers that are told of updates one by one, in blocks and in the plain loop."""
    sampler = Langevin(net(), 0.5, 0.01, engine="fused")

    class Watch:
        def __init__(self, reads_states: bool) -> None:
            self.reads_states = reads_states
            self.seen: list[tuple[int, list[float]]] = []
            self.kept: list[Tensor] = []

        def __call__(self, done: int, x: Tensor, energies: Tensor) -> None:
            self.kept.append(energies.clone())
            self.seen.append(done)

    told = []
    for reads_states in (True, False):
        watch = Watch(reads_states)
        sampler.advance_(sampler.init(start(), seed=3), 20, (watch,))
        told.append(torch.stack(watch.kept))
        assert watch.seen == [*range(1, 21)]
    assert torch.equal(*told)
    assert recorder.counts.replays


# What the recorder finds ---------------------------------------------------------------------------------------------


def graph_of(function) -> torch.cuda.CUDAGraph:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            function()
    finally:
        torch.cuda.set_stream(stream)
    return graph


def test_a_capture_carries_nothing_out(recorder):
    x, y = torch.zeros(3), torch.ones(3)
    results = []
    graph = graph_of(lambda: (x.add_(1), results.append(x * y)))
    assert x.tolist() == [0, 0, 0]
    assert results[0].isnan().all()
    for count in (1, 2):
        y.fill_(10 * count)
        graph.replay()
        assert x.tolist() == [count] * 3
        assert results[0].tolist() == [10 * count**2] * 3
    del graph
    gc.collect()
    assert results[0].isnan().all()


def test_operators_of_fastebm_are_looked_into(recorder):
    x, key, ids = torch.zeros(2, 4), torch.tensor([3, 0, 0]), torch.zeros(1, dtype=torch.int64)
    noise = []
    graph = graph_of(lambda: noise.append(torch.ops.fastebm.normal([2, 4], key, ids, 0, torch.float32)))
    assert [call[0].__name__ for call in graph.calls] == ["normal.default"]
    for step in (0, 1):
        key[1] = step
        graph.replay()
        assert torch.equal(noise[0], ops.normal((2, 4), seed=3, step=step))
    assert x.is_cuda
    assert not torch.zeros(2, device="cpu").is_cuda


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "nonzero": lambda x: x.nonzero(),
    "index": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to the CPU": lambda x: x.to("cpu"),
    "numpy": lambda x: x.numpy(),
    "copy from the host": lambda x: x.copy_(torch.ones(3, device="cpu")),
    "copy to the host": lambda x: torch.ones(3, device="cpu").copy_(x),
    "to the GPU": lambda x: torch.ones(3, device="cpu").to(x.device),
    "numbers": lambda x: torch.tensor([1.0], device=x.device),
}


@pytest.mark.parametrize("name", WAITS)
def test_everything_that_waits_is_found(recorder, name):
    waits, x = WAITS[name], torch.ones(3)
    recorder.start_counting()
    waits(x)
    assert recorder.counts.waits == 1
    with pytest.raises(RuntimeError, match="previous error during capture"):
        graph_of(lambda: waits(x))
    assert len(recorder.illegal) == 1
    recorder.illegal.clear()
    recorder.replayed_in_call = True
    with pytest.raises(CaptureError, match="between replays"):
        waits(x)
    recorder.replayed_in_call = False
    recorder.illegal.clear()


def test_work_on_the_host_is_no_wait(recorder):
    numbers = torch.linspace(0, 1, 3, device="cpu")
    recorder.start_counting()
    assert (numbers + 1)[1:].sum().item() == 3.5
    assert (recorder.counts.operators, recorder.counts.waits) == (0, 0)


# What the start of a chain costs -------------------------------------------------------------------------------------


def test_the_page_has_what_is_counted_now():
    """`docs/results/gpu-model/chain-start.md`; `python -m tests.gpu.chain_start` prints the table."""
    page = (Path(__file__).parents[2] / "docs/results/gpu-model/chain-start.md").read_text()
    for row in chain_start.rows():
        assert row in page


# On a GPU ------------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replayed_chains_are_the_plain_loops(dtype):
    sampler = Langevin(net().cuda(), 0.5, 0.01, clamp=(-1, 1), dtype=dtype, engine="fused")
    for num_steps, batch in ((1, 4), (2, 4), (20, 4), (11, 3), (20, 4)):
        x = start(batch).cuda()
        assert torch.equal(sampler.sample(x, num_steps, seed=3), plain(sampler, x, num_steps))
    assert len(sampler._graphs._captured) == 2


@needs_gpu
def test_pinned_pixels_anchors_and_schedules_are_replayed():
    sampler = Langevin(net().cuda(), 0.5, linear(0.02, 0.0), engine="fused")
    x = start().cuda()
    mask = torch.zeros(8, 8, dtype=torch.bool, device="cuda")
    mask[2:5] = True
    for scale in (1.0, 0.5):  # the second chain has other values in tensors of the same shapes
        options = {"mask": mask, "known": scale * x, "data_term": (-scale * x, 0.3, 0.1)}
        assert torch.equal(sampler.sample(scale * x, 19, seed=3, **options), plain(sampler, scale * x, 19, **options))
    assert len(sampler._graphs._captured) == 1


@needs_gpu
def test_new_weights_are_seen_and_a_new_program_is_captured_anew():
    energy = net().cuda()
    sampler = Langevin(energy, 0.5, 0.01, engine="fused")
    x = start().cuda()
    ends = [sampler.sample(x, 12, seed=3)]
    (captured,) = sampler._graphs._captured.values()
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.mul_(1.5)
    ends.append(sampler.sample(x, 12, seed=3))
    assert next(iter(sampler._graphs._captured.values())) is captured
    assert not torch.equal(*ends)
    assert torch.equal(ends[1], plain(sampler, x, 12))
    sampler.gradient._compiled._programs.clear()  # as if what the energy decides by had changed
    assert torch.equal(sampler.sample(x, 12, seed=3), plain(sampler, x, 12))
    assert next(iter(sampler._graphs._captured.values())) is not captured


@needs_gpu
def test_lost_chains_are_found_in_graphs_too():
    sampler = Langevin(lambda x: -x.square().sum((1, 2, 3)), 1e6, 0.0, engine="fused")
    with pytest.raises(FloatingPointError, match="not finite"):
        sampler.sample(start().cuda(), 40, seed=3)


@needs_gpu
def test_autograd_keeps_the_plain_loop():
    sampler = Langevin(net().cuda(), 0.5, 0.01, engine="autograd")
    assert torch.equal(sampler.sample(start().cuda(), 12, seed=3), plain(sampler, start().cuda(), 12))
    assert not sampler._graphs._captured
