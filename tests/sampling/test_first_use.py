"""`precompile`: what it makes, what it says, and that a chain afterwards has nothing to make and the same bits."""

from __future__ import annotations

import collections
import gc
import importlib.util
import os
import sys
import threading
from unittest import mock

import pytest
import torch
from torch import nn

import fastebm
from fastebm.compiler.compiled_gradient import CompiledGradient
from fastebm.sampling import Precompiled
from tests.gpu.graph_recorder import GraphRecorder


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(128, 1)).eval()


def sampler_of(energy):
    return fastebm.Langevin(energy, step_size=0.1, noise_std=0.05, clamp=(-1, 1))


SAMPLERS = {
    "Langevin": lambda energy: fastebm.Langevin(energy, step_size=0.1, noise_std=0.05),
    "a schedule": lambda energy: fastebm.Langevin(energy, fastebm.schedules.linear(0.1, 0.01), 0.0),
    "Underdamped": lambda energy: fastebm.Underdamped(energy, step_size=0.1, friction=1.0),
    "HMC": lambda energy: fastebm.HMC(energy, step_size=0.1, num_leapfrogs=2),
    "tempering": lambda energy: fastebm.ParallelTempering(
        energy, (1.0, 2.0), lambda energy, t: fastebm.MALA(energy, 0.01 * t, temperature=t)
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_chain_afterwards_compiles_nothing_and_has_the_same_bits(name):
    x0 = torch.linspace(-1, 1, 4 * 16).reshape(4, 1, 4, 4)
    before = x0.clone()
    expected = SAMPLERS[name](net()).sample(x0, 12, seed=3)
    sampler = SAMPLERS[name](net())
    random = torch.random.get_rng_state()
    found = fastebm.precompile(sampler, x0, num_steps=12)
    assert torch.equal(random, torch.random.get_rng_state())
    assert torch.equal(x0, before)
    assert found.kernels == ()
    assert found.graphs == found.loaded == 0
    assert found.gradients[0].startswith("fused")
    assert found.seconds > 0
    with mock.patch.object(CompiledGradient, "_compile", side_effect=AssertionError("compiled at its first use")):
        assert torch.equal(sampler.sample(x0, 12, seed=3), expected)


def test_cascades_and_energies_without_a_program():
    def energy(x):
        return 0.5 * x.square().sum((1, 2, 3))

    cascade = fastebm.Cascade({4: energy, 8: energy}, step_size=0.1, num_steps=2)
    found = fastebm.precompile(cascade, count=3, channels=1)
    assert len(found.gradients) == 2
    expected = fastebm.Cascade({4: energy, 8: energy}, step_size=0.1, num_steps=2).sample(3, seed=1, channels=1)
    with mock.patch.object(CompiledGradient, "_compile", side_effect=AssertionError("compiled at its first use")):
        assert torch.equal(cascade.sample(3, seed=1, channels=1), expected)
    autograd = fastebm.Langevin(energy, 0.1, 0.0, engine="autograd")
    assert "engine is 'autograd'" in str(fastebm.precompile(autograd, torch.zeros(2, 1, 4, 4)))


def test_bad_input():
    with pytest.raises(TypeError, match=r"precompile takes a sampler or a cascade, got Sequential"):
        fastebm.precompile(net())
    with pytest.raises(TypeError, match=r"x0 must be a tensor of starts \(B, ...\), got None"):
        fastebm.precompile(sampler_of(net()))
    with pytest.raises(ValueError, match="num_steps is not for a cascade"):
        fastebm.precompile(fastebm.Cascade({4: net()}), num_steps=3)
    with pytest.raises(ValueError, match="needs the length of the chain: give num_steps"):
        fastebm.precompile(SAMPLERS["a schedule"](net()), torch.zeros(2, 1, 4, 4))


def test_says_what_it_did():
    done = Precompiled(("fused, bfloat16",) * 2, ("instruction_kernel",) * 3 + ("step_kernel",), 2, 2, 1.25)
    assert str(done) == (
        "fused, bfloat16: 4 kernels compiled (3 instruction_kernel, 1 step_kernel), 2 from the cache, "
        "2 CUDA graphs captured, 1.2 s"
    )


def test_graphs_are_captured_and_replayed_afterwards():
    energy = net()
    with GraphRecorder().installed() as recorder, fastebm.ops.backend("reference"):
        sampler, x0 = sampler_of(energy), torch.linspace(-1, 1, 64).reshape(4, 1, 4, 4)
        found = fastebm.precompile(sampler, x0)
        assert found.graphs == recorder.graphs == 2
        recorder.start_counting()
        ends = sampler.sample(x0, 9, seed=3)
        assert recorder.graphs == 2
        assert recorder.counts.replays == 2
    with fastebm.ops.backend("reference"):
        assert torch.equal(ends, sampler_of(net()).sample(torch.linspace(-1, 1, 64).reshape(4, 1, 4, 4), 9, seed=3))


compiles = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"),
    reason="Triton is not installed, or its interpreter runs here, which compiles nothing",
)


@pytest.fixture
def compiled_in(monkeypatch, tmp_path):
    """Threads in which kernels were compiled, with an empty cache on disk."""
    from triton import knobs

    threads = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **told: threads.append(threading.get_ident()))
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    return threads


@pytest.fixture
def small_program(compiled_in, monkeypatch):
    """What runs a program of few instructions on a GPU that isn't there, the GPU's driver, and the instructions."""
    from fastebm.ops.triton import compiling
    from fastebm.ops.triton.program import instruction_kernel
    from tests.gpu.fake_driver import fake_gpu
    from tests.gpu.launches import code_and_workspace, gpu_program

    monkeypatch.setattr(compiling, "_known", {})
    monkeypatch.setattr(instruction_kernel, "device_caches", collections.defaultdict(instruction_kernel.create_binder))
    with fake_gpu(80) as gpu:
        program = gpu_program(net(), (1, 4, 4), torch.bfloat16)
        code, workspace = code_and_workspace(program, 3)

        def run():
            torch.ops.fastebm.run_program(torch.zeros(3, 1, 4, 4), code, program.constants, workspace)

        yield run, gpu, len(program.lowered.instructions)


@compiles
def test_kernels_of_a_program_are_compiled_in_threads(small_program, compiled_in):
    """All of them before the first is launched."""
    from fastebm.ops.compilation import watch_compilation

    run, gpu, instructions = small_program
    with watch_compilation(torch.device("cpu")) as compilation:
        run()
    assert len(gpu.launches) == instructions
    assert {*compilation.compiled} == {"instruction_kernel"}
    assert len(compilation.compiled) == len(compiled_in) == len(gpu.kernels)
    assert threading.get_ident() not in compiled_in
    run()
    assert len(gpu.launches) == 2 * instructions
    assert len(compiled_in) == len(gpu.kernels)


@compiles
def test_an_interrupt_of_the_wait_leaves_nothing_behind(small_program, monkeypatch):
    import triton

    def interrupt(futures):
        raise KeyboardInterrupt

    run, gpu, instructions = small_program
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[triton.AsyncCompileMode.__module__], "as_completed", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert not gpu.launches
    run()
    assert len(gpu.launches) == instructions


@compiles
def test_a_kernel_that_fails_says_so_where_it_is_launched(small_program, monkeypatch):
    from triton.compiler import ASTSource

    threads = []

    def refuse(*arguments):
        threads.append(threading.get_ident())
        raise RuntimeError("this one is refused")

    run, _, _ = small_program
    with monkeypatch.context() as patch:
        patch.setattr(ASTSource, "make_ir", refuse)
        with pytest.raises(RuntimeError, match="this one is refused"):
            run()
    assert threads[0] != threads[-1] == threading.get_ident()
    run()  # the next call finds nothing half done


@compiles
@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_while_threads_parse(small_program, monkeypatch, enabled):
    """Where CPython's parser fails by it, up to 3.11; the program's own choice is there again afterwards."""
    from triton.compiler import ASTSource

    from fastebm.ops.triton import compiling

    make_ir, seen = ASTSource.make_ir, []

    def watched(source, *arguments, **options):
        seen.append(gc.isenabled())
        return make_ir(source, *arguments, **options)

    run, _, _ = small_program
    monkeypatch.setattr(ASTSource, "make_ir", watched)
    monkeypatch.setattr(compiling, "PARSER_FAILS", True)
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        run()
        assert seen
        assert not any(seen)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


@compiles
def test_the_parser_may_fail_in_a_thread(small_program, compiled_in, monkeypatch):
    """As CPython's does up to 3.11 where threads share it. Triton raises an error of its own from it."""
    from triton.compiler import ASTSource

    make_ir, failed = ASTSource.make_ir, set()

    def fail_once(source, *arguments, **options):
        if source not in failed:
            failed.add(source)
            try:
                raise SystemError("AST constructor recursion depth mismatch (before=37, after=65)")
            except SystemError as error:
                raise ValueError("in a call") from error
        return make_ir(source, *arguments, **options)

    run, gpu, instructions = small_program
    monkeypatch.setattr(ASTSource, "make_ir", fail_once)
    run()
    assert len(gpu.launches) == instructions
    assert len(failed) == len(compiled_in)
    assert threading.get_ident() not in compiled_in
