"""Triton's kernels as compiled for sm_80 and sm_90: their PTX runs on the CPU.

The suites of tests/ops run once more on it, with the tolerances of a GPU. Out-of-bounds and misaligned accesses, races
between threads or blocks, and copies that nobody waits for are errors there, whatever numbers come out.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import pytest

from tests.gpu.ptx import machine

pytestmark = [
    pytest.mark.skipif(machine.missing() is not None, reason=machine.missing() or ""),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = ("normal", "uniform", "langevin", "block_tail", "expand_blend", "mala", "mclmc", "underdamped")
PROGRAMS = (
    *("test_convolution", "test_phases_of_a_transposed_convolution", "test_everything_behind_phases", "test_nets"),
    *("test_other_kinds", "test_activations", "test_slope_of_a_result", "test_operands", "test_uneven_programs"),
)
STEPS = (
    *("test_backends_agree", "test_backends_agree_to_the_last_bit", "test_words_are_those_of_their_address"),
    *("test_against_formula_and_compiled", "test_dtypes_of_the_gradient", "test_gpu_and_cpp_are_bit_equal"),
    "test_against_densities_and_compiled",
)
CHAINS = ("test_is_one_update_after_the_other", "test_options")
WEIGHTS = ("test_convolution", "test_all_tasks_of_a_net_in_one_call", "test_transposed_convolution")


class Suite(NamedTuple):
    """Tests of tests/ops that run in every session: three cases of each, its first and its last among them.

    Attributes:
        capability: of the GPU that kernels are compiled for.
        files: their names without "test_".
        tests: names of functions.
        but: a part of the names of cases that are left out.
    """

    capability: int
    files: tuple[str, ...]
    tests: tuple[str, ...]
    but: str


SUITES = {
    "programs": Suite(80, ("program",), PROGRAMS, "decoded"),
    "programs on sm_90": Suite(90, ("program", "chain"), ("test_convolution", "test_nets", *CHAINS[:1]), "decoded"),
    "steps, chains and gradients of weights": Suite(
        80, (*OPERATORS, "chain", "weight_gradients"), (*STEPS, *CHAINS, *WEIGHTS), "float16"
    ),
}


def started(
    capability: int, files: tuple[str, ...], cache: Path, log: IO[str], *arguments: str
) -> subprocess.Popen[str]:
    """Tests of operators on the kernels as compiled, in a process of their own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    environment |= {
        "FASTEBM_BACKEND": "triton",
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": path,
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.gpu.ptx.pytest_plugin",
        "-rp",
        "--tb=short",
    ]
    command += ["--ptx-capability", str(capability), *arguments, *(f"tests/ops/test_{name}.py" for name in files)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)


def assert_passed(status: int, said: str) -> set[str]:
    """The tests that passed, some kernels having run."""
    assert status == 0, said
    ran = re.search(r"(\d+) launches of (\d+) kernels ran as PTX", said)
    assert ran is not None, said
    assert int(ran[2]) > 0, said
    return set(re.findall(r"^PASSED \S+?::(\w+)", said, re.MULTILINE))


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[str], Path]]]:
    """All suites, under way beside each other."""
    machine.Kernel(".visible .entry none() { ret; }")  # builds the machine before they do
    running = {}
    for name, suite in SUITES.items():
        folder = tmp_path_factory.mktemp("ptx")
        with open(folder / "log", "w") as log:
            chosen = f"({' or '.join(suite.tests)}) and not {suite.but}"
            process = started(suite.capability, suite.files, folder / "cache", log, "--ptx-cases", "3", "-k", chosen)
            running[name] = process, folder / "log"
    yield running
    for process, _ in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", SUITES)
def test_operators_as_compiled(suites, name):
    process, log = suites[name]
    status = process.wait()
    assert assert_passed(status, log.read_text()) >= {*SUITES[name].tests}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("file", [*OPERATORS, "program", "chain", "weight_gradients"])
def test_all_cases_as_compiled(tmp_path, file, capability):
    with open(tmp_path / "log", "w") as log:
        status = started(capability, (file,), tmp_path / "cache", log).wait()
    assert assert_passed(status, (tmp_path / "log").read_text())


BROKEN = """
import re, sys, torch
from fastebm.ops.instructions import Epilogue
from tests.gpu.ptx.assembler import PtxError
from tests.gpu.ptx.launches import arguments_of, ptx_machine
from tests.gpu.ptx.machine import Kernel
from tests.ops.test_program import SIZES, STORE, ProgramBuilder, images

with ptx_machine(int(sys.argv[1])) as launches:
    for size in SIZES.values():
        making = ProgramBuilder((40, 12, 12))
        target = making.buffer((33, 12, 12))
        making.convolution(0, (33, 12, 12), (3, 3), Epilogue(STORE, target), pad_y=1, pad_x=1)
        making.finish(target).fused(size, "cpu")(images(3, making.sample))
    for launch in [launch for launch in launches if "cp.async.wait_group" in launch.kernel.asm["ptx"]]:
        text, given = launch.kernel.asm["ptx"], arguments_of(launch)
        tensors = [value for _, value in launch.arguments if isinstance(value, torch.Tensor)]
        Kernel(text).run(**given)
        right = [tensor.clone() for tensor in tensors]
        for part in re.finditer(r"(?:bar\\.sync|(?:cp\\.async|wgmma)\\.wait_group[.\\w]*)\\s+\\d+;", text):
            try:
                Kernel(text[: part.start()] + text[part.end() :]).run(**given)
                found = not all(map(torch.equal, tensors, right))  # a product that never arrives is no fault, but wrong
            except PtxError as error:
                found = True
            print("found:" if found else "not found:", part[0])
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_every_barrier_and_wait_of_a_convolution_is_needed(tmp_path, capability):
    """Without any one of them, the machine finds the fault. For sm_90 the compiler puts in some that aren't needed."""
    unset = ("TRITON_INTERPRET", "FASTEBM_BACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    path = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    command = [sys.executable, "-c", BROKEN, str(capability)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"not found:{'' if capability == 80 else ' cp.async'}" not in done.stdout, done.stdout
    for wait in ("bar.sync", "cp.async.wait_group", *(["wgmma.wait_group"] if capability == 90 else [])):
        assert done.stdout.count(f"found: {wait}") > 3
