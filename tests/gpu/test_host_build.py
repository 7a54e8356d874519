"""csrc/cuda built for the CPU: its operators give the bits of C++, and every access of their threads is checked.

No GPU takes part. What this can't show is what nvcc makes of the same sources, and how fast that is.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastebm.ops import backends, schemas
from tests.gpu import host_build

pytestmark = [
    pytest.mark.skipif(host_build.WHY_NOT is not None, reason=f"there is no host build: {host_build.WHY_NOT}"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"), reason="done without it"),
]

ROOT = Path(__file__).parents[2]
SUBJECTS = sorted({kernel.subject for kernel in schemas.KERNELS.values() if "cuda" in kernel.backends})
# What the suites skip on this backend, and why that is right.
SKIPPED = (
    r"no float64|float64 is for the reference and C\+\+",
    r"only Triton's programs have a size to choose",
    r"shown on the interpreter, whose check before the kernel is taken away here",
    r"CUDA graphs need a GPU",
    r"takes minutes; run it with --slow",
)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return host_build.build(tmp_path_factory.mktemp("host_build"), host_build.operators())


@pytest.fixture(scope="module")
def specimens(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("specimens")
    library = ctypes.CDLL(str(host_build.build(folder, [host_build.HERE / "specimens.cu"])))
    library.host_build_give.argtypes = [
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_int,
    ]
    return library


@pytest.mark.parametrize(
    "files", [[f"tests/ops/test_{subject}.py" for subject in SUBJECTS], ["tests/fuzz/test_cuda.py"]]
)
def test_suites_of_operators(library, files, request):
    """In a process of its own, because a backend that runs somewhere else is a fact of the whole process."""
    tries = request.config.getoption("--tries")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.gpu.host_build.plugin",
    ]
    if tries is not None:
        command.append(f"--tries={tries}")
    if request.config.getoption("--slow"):
        command.append("--slow")
    environment = {
        "FASTEBM_HOST_BUILD": str(library),
        "FASTEBM_BACKEND": "cuda",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*command, *files],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    for reason in re.findall(r"^SKIPPED \[\d+\] \S+: (.*)$", done.stdout, re.MULTILINE):
        assert any(re.match(known, reason) for known in SKIPPED), reason
    checked = re.search(r"checked: (\d+) launches, (\d+) accesses, (\d+) barriers", done.stdout)
    assert checked is not None
    assert all(int(count) > 100 for count in checked.groups()), checked[0]


def test_a_library_says_what_it_was_built_for(library):
    """This one was built for no GPU, and says so where `fastebm build` writes compute capabilities."""
    assert backends._images_of(library) == "unknown"


@pytest.mark.parametrize("error", range(-4, 5))
def test_roots_are_rounded(specimens, error):
    """All x in [1, 4), whose roots are those of x 4^k but for the exponent; then 0 and some from everywhere."""
    one, four = 0x3F800000, 0x40800000
    assert specimens.wrong_roots(one, four, 1, error) == 0
    assert specimens.wrong_roots(0, 1, 1, error) == 0
    smallest, largest = (int(torch.tensor(x).view(torch.int32)) for x in (2.0**-24, 2.0**7))
    assert specimens.wrong_roots(smallest, largest, 99, error) == 0


def test_a_root_that_begins_too_far_off_is_seen(specimens):
    assert specimens.wrong_roots(0x3F800000, 0x40800000, 1, 2000) > 0


def test_kernels_are_compiled_for_as_many_threads_as_they_are_launched_with():
    """With more, a launch fails on a GPU alone: a host build knows no `__launch_bounds__`."""
    bounds: dict[str, set[str]] = {}
    launched: dict[str, set[str]] = {}
    for name in ("*.cu", "*.h"):
        for path in sorted((ROOT / "csrc" / "cuda").glob(name)):
            source = path.read_text()
            for bound, kernel in re.findall(r"__launch_bounds__\((\w+)(?:, 1)?\)\s+(\w+)\(", source):
                bounds.setdefault(kernel, set()).add(bound)
            for kernel, threads in re.findall(r"\blaunch\((\w+)<[^;]*?, (\w+), stream\b", source):
                launched.setdefault(kernel, set()).add(threads)
            assert source.count("__global__") == source.count("__launch_bounds__"), path
    assert launched == bounds
    assert len(bounds) > 5


# The checker ------------------------------------------------------------------------------------------------------


def run(specimens: ctypes.CDLL, name: str) -> tuple[str | None, torch.Tensor, torch.Tensor]:
    """What is wrong with a kernel, or None; what it was given and what it wrote."""
    # Both lie in the middle of memory that belongs to the process, so that no access outside of them crashes.
    room = torch.arange(768.0).requires_grad_(False)
    given, written = room[128:384], room[448:704]
    specimens.host_build_give(b"in", given.data_ptr(), 1024, 4, 0)
    specimens.host_build_give(b"out", written.data_ptr(), 1024, 4, 1)
    kernel = getattr(specimens, f"specimen_{name}")
    kernel.restype, kernel.argtypes = ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_void_p]
    try:
        wrong = kernel(given.data_ptr(), written.data_ptr())
    finally:
        specimens.host_build_take_back()
    return None if wrong is None else wrong.decode(), given, written


@pytest.mark.parametrize("repeat", range(3))
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("copy", lambda x: x),
        ("copy_packs", lambda x: x),
        ("reverse", lambda x: x.view(4, 64).flip(1).flatten()),
        ("sums", lambda x: 2 * x.view(4, 64).sum(1, keepdim=True).expand(4, 64).flatten()),
    ],
)
def test_right_kernels_pass(specimens, name, expected, repeat):
    wrong, given, written = run(specimens, name)
    assert wrong is None
    assert torch.equal(written, expected(given))


@pytest.mark.parametrize("repeat", range(3))
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("copy_past_the_end", r"reads 4 bytes outside of its memory, 4 bytes after in \(thread 63 of block 3\)"),
        ("copy_before_the_start", r"writes 4 bytes outside of its memory, 4 bytes before out \(thread 0 of block 0\)"),
        ("write_the_input", r"writes in, which is only to be read"),
        ("copy_packs_misaligned", r"a misaligned or null access in packs.h:\d+"),
        ("reverse_without_a_barrier", r"shared memory (in a race with another thread|that no thread wrote)"),
        ("reverse_of_half", r"reads shared memory that no thread wrote"),
        ("sums_without_a_barrier", r"shared memory in a race with another thread"),
        ("barrier_of_half", r"some threads of a block ended while others wait at a barrier"),
        ("different_barriers", r"threads of a block wait at different barriers"),
        ("race_between_blocks", r"writes out in a race with another thread"),
        ("read_of_another_block", r"(reads|writes) out in a race with another thread"),
        ("race_within_a_block", r"writes out in a race with another thread"),
        ("shift_by_too_much", r"a shift out of range in specimens.cu:\d+"),
        ("index_past_an_array", r"an index outside of its array in specimens.cu:\d+"),
        ("on_another_stream", r"a launch on another stream than the current one"),
    ],
)
def test_mistakes_are_caught(specimens, name, message, repeat):
    """Whatever order the threads ran in."""
    wrong, _, _ = run(specimens, name)
    assert wrong is not None
    assert re.search(message, wrong), wrong
    assert run(specimens, "copy")[0] is None  # the next launch knows nothing of it
