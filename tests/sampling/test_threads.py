"""Samplers and energy gradients in several threads: the bits of one thread, and a module as it was found."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import signal
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import fastebm
from fastebm.compiler import energy_gradient
from fastebm.compiler.frozen_weights import _frozen, frozen_weights
from fastebm.compiler.process_state import DeferredInterrupt, evaluating, exclusive, exporting
from fastebm.ops.backends import select_backend
from fastebm.ops.program import MAX_CODES

THREADS = 4
STEPS = 24


def plain(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 1),
    )


def spectral(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), spectral_norm(nn.Linear(64, 32)), nn.SiLU(), spectral_norm(nn.Linear(32, 1)))


class Stochastic(nn.Module):
    """Dropout and batch norm: another mode would show in the bits."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.drop = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.last = nn.Linear(256, 1)
        with torch.no_grad():
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))).flatten(1))


NETS = {"plain": plain, "spectral": spectral, "stochastic": Stochastic}


def starts(count: int = 8) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """What the functions return, each called in a thread of its own, all let loose at the same moment."""
    ready, results = threading.Barrier(len(works)), [None] * len(works)

    def run(i: int, work: Callable[[], Any]) -> None:
        ready.wait()
        try:
            results[i] = work()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=each) for each in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def flags(module: nn.Module) -> list[Any]:
    parts = [(name, type(part), part.training, sorted(vars(part))) for name, part in module.named_modules()]
    return parts + [(name, weight.requires_grad) for name, weight in module.named_parameters()]


# ---- bits


@pytest.mark.parametrize("engine", ["fused", "autograd"])
@pytest.mark.parametrize("name", NETS)
def test_one_sampler_in_several_threads_gives_the_bits_of_one(name, engine):
    net = NETS[name]().train()
    before = flags(net)
    sampler, x = fastebm.Langevin(net, 0.05, 0.01, engine=engine), starts()
    # Of several lengths, so that workspaces and codes differ too.
    works = [lambda k=k: sampler.sample(x[: 8 - k], STEPS, seed=k) for k in range(THREADS)]
    alone = [work() for work in works]
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(in_threads(*works), alone, strict=True))
    assert flags(net) == before
    assert not _frozen


def test_one_gradient_on_stock_operations_in_several_threads():
    net = plain().double()
    sampler = fastebm.Langevin(net, 0.05, 0.01, engine="fused")
    works = [lambda k=k: sampler.sample(starts().double(), STEPS, seed=k) for k in range(THREADS)]
    alone = [work() for work in works]
    assert "PyTorch operations" in sampler.gradient.describe()
    assert all(torch.equal(a, b) for a, b in zip(in_threads(*works), alone, strict=True))


def test_one_cascade_in_several_threads():
    nets = {4: nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.SiLU(), nn.Linear(8, 1)), 8: plain()}
    cascade = fastebm.Cascade(nets, step_size=0.1)
    works = [lambda k=k: cascade.sample(5, seed=k, channels=1) for k in range(THREADS)]
    alone = [work() for work in works]
    assert all(torch.equal(a, b) for a, b in zip(in_threads(*works), alone, strict=True))


@pytest.mark.parametrize("name", NETS)
def test_samplers_of_their_own_over_one_module(name):
    net = NETS[name]().train()
    before = flags(net)
    samplers = [fastebm.Langevin(net, 0.05, 0.01) for _ in range(THREADS)]
    alone = [sampler.sample(starts(), STEPS, seed=k) for k, sampler in enumerate(samplers)]
    for _ in range(3):
        works = [lambda k=k: samplers[k].sample(starts(), STEPS, seed=k) for k in range(THREADS)]
        assert all(torch.equal(a, b) for a, b in zip(in_threads(*works), alone, strict=True))
        assert flags(net) == before


def test_first_captures_in_several_threads_are_all_fused():
    samplers = [fastebm.Langevin(plain(k), 0.05, 0.01) for k in range(8)]
    found = in_threads(*(lambda k=k: samplers[k].sample(starts(), STEPS, seed=k) for k in range(8)))
    assert [sampler.gradient.engine for sampler in samplers] == ["fused"] * 8
    for k in range(8):
        assert torch.equal(found[k], fastebm.Langevin(plain(k), 0.05, 0.01).sample(starts(), STEPS, seed=k))


def test_a_capture_that_fails_leaves_other_threads_and_torch_alone():
    def fails(x: Tensor) -> Tensor:
        return (x.flatten(1).sum(1) * float(x.detach().sum() > 0)).exp()

    failing = [fastebm.Langevin(fails, 0.01, 0.01) for _ in range(4)]
    good = [fastebm.Langevin(plain(k), 0.05, 0.01) for k in range(4)]
    in_threads(*(lambda k=k, s=s: s.sample(starts(), 3, seed=k) for s in (*failing, *good) for k in range(1)))
    assert [sampler.gradient.engine for sampler in (*failing, *good)] == ["autograd"] * 4 + ["fused"] * 4
    states = in_threads(*(lambda: (type(torch.zeros(2) + 1), torch.is_grad_enabled()) for _ in range(2)))
    assert states == [(Tensor, True)] * 2
    assert type(torch.zeros(2)) is Tensor


def test_threads_train_their_own_nets_while_another_captures():
    """Attribute access and module calls of other threads go through what the exporter has patched.

    Their energies are right up to rounding: `torch.export` turns oneDNN off in the whole process.
    """
    enough = threading.Event()

    def train(seed: int) -> bool:
        net, x = Stochastic(seed).eval(), starts()
        expected = copy.deepcopy(net)(x)
        expected_gradient = torch.autograd.grad(expected.sum(), x.requires_grad_(), allow_unused=True)
        right = True
        while not enough.is_set():
            net.zero_grad()
            energies = net(x)
            energies.sum().backward()
            right &= (
                torch.allclose(energies, expected, rtol=1e-5, atol=1e-6)
                and type(net.first) is nn.Conv2d
                and net.last.weight.grad is not None
            )
        return right and expected_gradient is not None

    def captures() -> list[str]:
        try:
            samplers = [fastebm.Langevin(Stochastic(k), 0.05, 0.01) for k in range(4)]
            for sampler in samplers:
                sampler.sample(starts(), 2, seed=0)
            return [sampler.gradient.engine for sampler in samplers]
        finally:
            enough.set()

    assert in_threads(captures, lambda: train(1), lambda: train(2)) == [["fused"] * 4, True, True]


def test_new_weights_between_chains_of_threads():
    net = spectral()
    sampler = fastebm.Langevin(net, 0.05, 0.01)
    for _ in range(3):
        alone = fastebm.Langevin(copy.deepcopy(net), 0.05, 0.01).sample(starts(), STEPS, seed=0)
        found = in_threads(*(lambda: sampler.sample(starts(), STEPS, seed=0) for _ in range(THREADS)))
        assert all(torch.equal(each, alone) for each in found)
        with torch.no_grad():
            for weight in net.parameters():
                weight.add_(0.01)


def test_constants_that_a_chain_reads_are_not_overwritten():
    """A write that nobody may make while a chain runs: the running chain keeps its weights, a later one has the new."""
    net, x = plain(), starts()
    gradient = energy_gradient(net, engine="fused")
    with gradient.chain():
        before = gradient(x)[1]
        program = gradient.compiled_program(x)
        net[0].weight.data.mul_(2)
        later = in_threads(lambda: gradient(x)[1])[0]
        assert torch.equal(gradient(x)[1], before)
        assert gradient.compiled_program(x) is program
    assert torch.equal(later, energy_gradient(copy.deepcopy(net))(x)[1])
    assert torch.equal(gradient(x)[1], later)
    with gradient.chain():
        gradient(x)
        assert gradient.compiled_program(x) is program  # alone again, it writes to the same addresses


# ---- a module's flags


def test_nets_that_share_submodules_and_weights():
    shared = spectral_norm(nn.Linear(64, 16))
    first = nn.Sequential(nn.Flatten(), shared, nn.SiLU(), nn.Linear(16, 1)).train()
    second = nn.Sequential(nn.Flatten(), shared, nn.Tanh(), nn.Linear(16, 1)).train()
    second[3].weight = first[3].weight
    shared.bias.requires_grad_(False)
    before = flags(first), flags(second)
    a, b = energy_gradient(first), energy_gradient(second)
    expected = a(starts())[1], b(starts())[1]
    inside, entered, left = a.chain(), threading.Event(), threading.Event()

    def outlast() -> Tensor:
        with b.chain():
            entered.set()
            left.wait()
            assert not shared.training
            assert not first[3].weight.requires_grad
            return b(starts())[1]

    def first_to_leave() -> Tensor:
        with inside:
            entered.wait()
            found = a(starts())[1]
        assert not shared.training
        assert first[0].training  # held by this chain alone
        left.set()
        return found

    found = in_threads(first_to_leave, outlast)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert (flags(first), flags(second)) == before


def test_contexts_that_end_in_another_order_restore_what_the_first_found():
    net = spectral().train()
    net[1].eval()
    net[3].bias.requires_grad_(False)
    before = flags(net)
    contexts = [frozen_weights(net), frozen_weights(net[1]), frozen_weights(net)]
    for context in contexts:
        context.__enter__()
    for context in contexts:
        assert not any(part.training for part in net.modules())
        context.__exit__(None, None, None)
    assert flags(net) == before
    assert not _frozen


def test_a_compiled_module_and_the_one_inside_of_it():
    net = plain().train()
    compiled = torch.compile(net, backend="eager")
    contexts = [frozen_weights(net), frozen_weights(compiled)]
    for first, second in (contexts, [frozen_weights(compiled), frozen_weights(net)]):
        first.__enter__()
        second.__enter__()
        assert not compiled.training
        first.__exit__(None, None, None)
        assert not compiled.training
        second.__exit__(None, None, None)
        assert all(part.training for part in net.modules())


def test_a_chain_left_in_another_thread():
    net = spectral().train()
    before = flags(net)
    gradient = energy_gradient(net, engine="fused")
    expected = gradient(starts())[1]

    def states():
        with gradient.chain():
            for _ in range(3):
                yield gradient(starts())[1]

    generator = states()
    first = next(generator)
    second = in_threads(lambda: next(generator))[0]
    in_threads(generator.close)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert flags(net) == before
    with torch.no_grad():
        net[1].bias.add_(1)  # and the chain of the first thread is over, too
    assert not torch.equal(gradient(starts())[1], expected)


def test_a_generator_that_is_dropped():
    net = plain().train()
    gradient = energy_gradient(net)

    def states():
        with gradient.chain():
            while True:
                yield gradient(starts())

    generator = states()
    next(generator)
    assert not net.training
    del generator
    gc.collect()
    assert net.training
    assert not _frozen


def test_tasks_of_one_thread_whose_chains_overlap():
    net = spectral().train()
    before = flags(net)
    gradient = energy_gradient(net, engine="fused")
    expected = gradient(starts())[1]

    async def chain(enter: asyncio.Event, entered: asyncio.Event, leave: asyncio.Event, left: asyncio.Event) -> None:
        await enter.wait()
        try:
            with gradient.chain():
                entered.set()
                await leave.wait()
                assert torch.equal(gradient(starts())[1], expected)
                raise KeyError
        except KeyError:
            left.set()

    async def both() -> None:
        start, first_in, second_in, first_out, end = (asyncio.Event() for _ in range(5))
        start.set()
        await asyncio.gather(chain(start, first_in, second_in, first_out), chain(first_in, second_in, first_out, end))

    asyncio.run(both())
    assert flags(net) == before
    assert not _frozen


def test_training_while_a_chain_runs_is_refused():
    net = plain().train()
    before = flags(net)
    gradient = energy_gradient(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    others = torch.optim.SGD([torch.zeros(2, requires_grad=True)], 0.1)
    with gradient.chain():
        others.step()
        with pytest.raises(RuntimeError, match="an optimizer was about to change weights while a chain"):
            in_threads(optimizer.step)
    optimizer.step()
    with pytest.raises(RuntimeError, match="a Sequential was put into train mode while a chain"), gradient.chain():
        in_threads(net.train)
    assert flags(net) == before

    def leave_early() -> None:
        with gradient.chain():
            net.train()
            raise KeyError

    with pytest.raises(KeyError):
        leave_early()
    assert flags(net) == before


# ---- copies


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_of_what_has_run(copied):
    # Torch refuses to pickle parametrised modules.
    net = spectral() if copied is copy.deepcopy else Stochastic()
    sampler = fastebm.Langevin(net, 0.05, fastebm.schedules.linear(0.02, 0.01))
    expected = sampler.sample(starts(), STEPS, seed=0)
    for twin in (copied(sampler), fastebm.Langevin(copied(sampler.gradient), 0.05, sampler.noise_std)):
        assert torch.equal(twin.sample(starts(), STEPS, seed=0), expected)
        assert twin.gradient.energy is not sampler.gradient.energy
    cascade = fastebm.Cascade({8: plain()}, step_size=0.1)
    assert torch.equal(copied(cascade).sample(3, seed=0, channels=1), cascade.sample(3, seed=0, channels=1))
    expanding = fastebm.sampling.ExpandingCascade(Growing(), size=8, beta=0.5, num_steps=4, step_size=0.1)
    assert torch.equal(copied(expanding).sample(3, seed=0, channels=1), expanding.sample(3, seed=0, channels=1))


class Growing(nn.Module):
    def forward(self, x: Tensor, beta: float | Tensor = 1.0) -> Tensor:
        return (0.1 + 0.4 * beta) * x.square().sum((1, 2, 3))


def test_copies_within_a_chain_have_their_own():
    gradient = energy_gradient(lambda x: 0.5 * x.square().sum((1, 2, 3)))
    with gradient.chain():
        gradient(starts())
        twin = copy.deepcopy(gradient)
        assert twin.compiled_program(starts()) is None
        assert torch.equal(twin(starts())[1], gradient(starts())[1])


# ---- the backend


def test_the_backend_is_chosen_for_one_thread_and_task():
    chosen = threading.Barrier(2)

    def of(name: str) -> list[str]:
        with fastebm.ops.backend(name):
            chosen.wait()
            found = select_backend("cpu")
            chosen.wait()
            return [found, select_backend("cpu")]

    usual = select_backend("cpu")
    assert in_threads(lambda: of("reference"), lambda: of("auto")) == [["reference"] * 2, [usual] * 2]

    async def tasks() -> list[str]:
        entered = asyncio.Event()

        async def inside() -> str:
            with fastebm.ops.backend("reference"):
                entered.set()
                await asyncio.sleep(0)
                return await asyncio.to_thread(select_backend, "cpu")

        async def outside() -> str:
            await entered.wait()
            return select_backend("cpu")

        return list(await asyncio.gather(inside(), outside()))

    assert asyncio.run(tasks()) == ["reference", usual]
    with fastebm.ops.backend("reference"):
        assert in_threads(lambda: select_backend("cpu")) == [usual]


def test_the_backend_of_a_block_left_in_another_thread():
    block = fastebm.ops.backend("reference")
    in_threads(block.__enter__)
    with pytest.raises(RuntimeError, match=r"backend\('reference'\) was left in another thread"):
        block.__exit__(None, None, None)


def test_derivatives_run_on_the_backend_of_their_operator(monkeypatch):
    ran = []
    launch = fastebm.ops.expand_blend.__globals__["launch"]
    monkeypatch.setitem(
        fastebm.ops.expand_blend.__globals__,
        "launch",
        lambda name, *arguments: (ran.append((name, select_backend("cpu"))), launch(name, *arguments)),
    )
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    with fastebm.ops.backend("reference"):
        blended = fastebm.ops.expand_blend(x, x, torch.tensor(0.5))
    in_threads(blended.sum().backward)
    assert dict(ran) == {
        "expand_blend": "reference",
        "expand_blend_backward": "reference",
    }


# ---- memory


@pytest.fixture
def fused(monkeypatch):
    """Images run as fused programs even where they are small."""
    monkeypatch.setattr("fastebm.compiler.candidates.LARGE_IMAGE", 0)


def test_thousands_of_batch_sizes_are_bounded(fused):
    gradient = energy_gradient(nn.Sequential(nn.Flatten(), nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1)), engine="fused")
    x = torch.randn(2000, 3, 1, 1)
    with gradient.chain():
        for batch in range(1, 2001, 2):
            gradient(x[:batch])
        program = gradient.compiled_program(x)
        own = program._of_thread
        assert len(own.codes) == MAX_CODES
        workspace, code = program.workspace, program.code(2000)
        gradient(x[:7])
        assert program.workspace is workspace
        assert program.code(2000) is code
    with gradient.chain():
        gradient(x)
        assert gradient.compiled_program(x) is program


def test_thousands_of_sample_shapes_are_bounded(monkeypatch):
    monkeypatch.setattr("fastebm.compiler.compiled_gradient.MAX_PROGRAMS", 3)
    gradient = energy_gradient(lambda x: x.square().sum(1), engine="fused")
    with gradient.chain():
        first = gradient(torch.ones(2, 1))[1], gradient.compiled_program(torch.ones(2, 1))
        for length in range(2, 8):
            gradient(torch.ones(2, length))
        assert len(gradient._compiled._programs) == 3
        # The chain keeps what it runs.
        assert gradient.compiled_program(torch.ones(2, 1)) is first[1]
        assert torch.equal(gradient(torch.ones(2, 1))[1], first[0])


def test_a_threads_workspace_ends_with_it(fused):
    gradient = energy_gradient(plain(), engine="fused")

    def run() -> weakref.ref[Tensor]:
        with gradient.chain():
            gradient(starts())
            return weakref.ref(gradient.compiled_program(starts()).workspace)

    workspace = in_threads(run)[0]
    gc.collect()
    assert workspace() is None


# ---- Ctrl-C


class Note:
    """A handler of SIGINT that counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1


@pytest.fixture
def handler():
    note = Note()
    found = signal.signal(signal.SIGINT, note)
    yield note
    signal.signal(signal.SIGINT, found)


def interrupting(x: Tensor) -> Tensor:
    """An energy that is interrupted within a callback of a weak reference, where Python drops what is raised."""

    class Dropped:
        pass

    dropped = Dropped()
    callback = weakref.ref(dropped, lambda _: signal.raise_signal(signal.SIGINT))
    del dropped
    assert callback() is None
    return x.square().sum((1, 2, 3))


def test_ctrl_c_while_an_energy_is_captured_is_not_lost():
    pressed = []

    def energy(x: Tensor) -> Tensor:
        if len(x) == 1 and not pressed:  # one chain is traced
            pressed.append(1)
            return interrupting(x)
        return x.square().sum((1, 2, 3))

    sampler = fastebm.Langevin(energy, 0.05, 0.01)
    with pytest.raises(KeyboardInterrupt):
        sampler.sample(starts(), 5, seed=0)
    assert len(pressed) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert sampler.sample(starts(), 5, seed=0).isfinite().all()
    assert sampler.gradient.engine == "fused"


def test_ctrl_c_while_a_capture_fails_is_not_lost(handler):
    sent = []

    def energy(x: Tensor) -> Tensor:
        if len(x) == 1 or torch.compiler.is_exporting():
            sent.append(interrupting(x))
            raise ArithmeticError
        return x.square().sum((1, 2, 3))

    sampler = fastebm.Langevin(energy, 0.05, 0.01)
    sampler.sample(starts(), 5, seed=0)
    assert 1 <= handler.calls <= len(sent)  # interrupts of one capture are one
    assert sampler.gradient.engine == "autograd"
    assert signal.getsignal(signal.SIGINT) is handler


def test_what_defers_an_interrupt(handler):
    with DeferredInterrupt():
        with exclusive():
            signal.raise_signal(signal.SIGINT)
        assert handler.calls == 0
    assert handler.calls == 1

    def fails() -> None:
        with exclusive():
            signal.raise_signal(signal.SIGINT)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert handler.calls == 2
    with exclusive():  # the second press is for now
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert handler.calls == 3
    assert handler.calls == 3
    terminated = Note()
    found = signal.signal(signal.SIGTERM, terminated)
    with exclusive():
        signal.raise_signal(signal.SIGTERM)
        assert terminated.calls == 1
    signal.signal(signal.SIGTERM, found)
    other = Note()
    with exclusive():
        signal.signal(signal.SIGINT, other)
    assert signal.getsignal(signal.SIGINT) is other
    for system in (signal.SIG_IGN, signal.SIG_DFL):
        signal.signal(signal.SIGINT, system)
        with exclusive():
            assert signal.getsignal(signal.SIGINT) is system
    signal.signal(signal.SIGINT, handler)

    def of_thread() -> Any:
        with exclusive():
            return signal.getsignal(signal.SIGINT)

    assert in_threads(of_thread) == [handler]


def test_an_interrupt_while_weights_are_frozen_restores_them():
    class Pressing(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            signal.raise_signal(signal.SIGINT)
            return 2 * weight

    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).train()
    found = signal.signal(signal.SIGINT, signal.SIG_IGN)
    nn.utils.parametrize.register_parametrization(net[1], "weight", Pressing())
    signal.signal(signal.SIGINT, found)
    before = flags(net)
    with pytest.raises(KeyboardInterrupt), frozen_weights(net):
        raise AssertionError("unreachable")
    assert flags(net) == before
    assert not _frozen


# ---- the lock


def test_an_export_waits_for_evaluations_and_evaluations_for_the_export():
    order, inside, asked = [], threading.Event(), threading.Event()

    def evaluate() -> None:
        with evaluating(), evaluating():
            inside.set()
            asked.wait()
            order.append("evaluated")

    def export() -> None:
        inside.wait()
        asked.set()
        with exporting(), exporting(), evaluating():
            order.append("exporting")
            late.start()
            order.append("exported")

    def evaluate_late() -> None:
        with evaluating():
            order.append("late")

    late = threading.Thread(target=evaluate_late)
    in_threads(evaluate, export)
    late.join()
    assert order == ["evaluated", "exporting", "exported", "late"]


def test_energies_that_use_another_gradient_do_not_wait_in_a_circle():
    """Both threads capture one energy while they are inside of another."""
    inner = [energy_gradient(plain(k), engine="fused") for k in range(2)]
    both = threading.Barrier(2)

    def energy(k: int, x: Tensor) -> Tensor:
        if not waited[k]:
            waited[k] = True
            both.wait()
        return (x.detach() - inner[k](x.detach())[1] - x).square().sum((1, 2, 3))

    waited = [False, False]
    outer = [fastebm.Langevin(lambda x, k=k: energy(k, x), 0.05, 0.01, engine="autograd") for k in range(2)]
    found = in_threads(*(lambda k=k: outer[k].sample(starts(), 3, seed=0) for k in range(2)))
    assert all(each.isfinite().all() for each in found)
    assert [gradient.engine for gradient in inner] == ["fused"] * 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # newer Pythons warn of any fork beside threads
def test_a_child_process_is_not_locked_out_by_threads_that_it_does_not_have():
    inside, done = threading.Event(), threading.Event()

    def evaluate() -> None:
        with evaluating():
            inside.set()
            done.wait()

    def fork() -> int:
        inside.wait()
        try:
            child = os.fork()
            if child == 0:
                with exporting():
                    os._exit(7)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        finally:
            done.set()

    assert in_threads(evaluate, fork)[1] == 7


def test_a_capture_leaves_nothing_to_the_garbage_collector():
    """Callbacks of weak references would run within any code that makes the collector start; a Ctrl-C there is lost."""

    def graphs() -> int:
        return sum(type(each) is torch.fx.Graph for each in gc.get_objects())

    gc.collect()
    before, samplers = graphs(), []
    for net in (Growing(), plain(), spectral(), Stochastic()):
        samplers.append(fastebm.Langevin(net, 0.05, 0.01))
        samplers[-1].sample(starts(), 2, seed=0)
        assert samplers[-1].gradient.engine == "fused"
        assert graphs() <= before + len(samplers)  # a lane program keeps the graph of its constants
    assert gc.isenabled()


def test_samplers_die_with_their_last_reference():
    sampler = fastebm.Langevin(plain(), 0.05, 0.01)
    sampler.sample(starts(), 2, seed=0)
    program = weakref.ref(next(iter(sampler.gradient._compiled._programs.values())))
    gc.disable()
    try:
        del sampler
        assert program() is None
    finally:
        gc.enable()
