"""Which backend a GPU gets by its compute capability and by what the CUDA library was built for; no GPU takes part."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastebm import build_extension
from fastebm.cli.info import Info
from fastebm.compiler import candidates
from fastebm.compiler.candidates import ProgramKey
from fastebm.ops import backends

Gpu = Callable[..., None]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Makes the process believe in GPUs, of these capabilities, and in a CUDA library that was built for `images`."""

    def believe(*capabilities: tuple[int, int], images: str | None = "8.0 9.0+PTX", library: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capabilities[index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: f"GPU {index}")
        monkeypatch.setattr(backends, "_cuda_library", "_cuda.so" if library else None)
        monkeypatch.setattr(backends, "_cuda_images", images)
        monkeypatch.setattr(backends, "_triton_found", True)
        monkeypatch.setattr(backends, "_triton_missing", lambda: None)
        monkeypatch.setattr(backends, "_warned", set())
        monkeypatch.delenv("FASTEBM_BACKEND", raising=False)
        backends._wrong_capability.cache_clear()

    yield believe
    backends._wrong_capability.cache_clear()


@pytest.mark.parametrize(
    ("images", "capability", "runs"),
    [
        ("8.0 9.0+PTX", (8, 0), True),
        ("8.0 9.0+PTX", (8, 9), True),  # machine code of 8.0
        ("8.0 9.0+PTX", (9, 0), True),
        ("8.0 9.0+PTX", (12, 0), True),  # the PTX
        ("8.0 9.0+PTX", (7, 5), False),
        ("7.5 8.0 9.0+PTX", (7, 5), True),
        ("7.5", (7, 0), False),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("9.0", (10, 0), False),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
        ("10.0f", (10, 3), True),
        ("10.0a+PTX", (12, 0), False),
        ("Hopper", (7, 5), True),  # not said in numbers: CUDA says at the first launch what is missing
    ],
)
def test_what_an_image_runs_on(images, capability, runs):
    assert backends._holds_code_for(images, capability) is runs


def test_a_gpu_that_the_library_was_built_for_takes_it_in_silence(gpu):
    gpu((9, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select_backend("cuda") == "cuda"
        assert backends.select_backend("cuda", kernel="run_program") == "triton"
        assert backends.select_backend("cuda", double=True) == "reference"


def test_a_missing_image_falls_back_and_is_said_once(gpu):
    gpu((8, 0), images="9.0+PTX")
    with pytest.warns(RuntimeWarning) as said:
        chosen = {backends.select_backend("cuda") for _ in range(3)} | {backends.select_backend("cuda", index=0)}
    assert chosen == {"triton"}
    assert [str(warning.message) for warning in said] == [
        "backend 'cuda' is left out, 'triton' takes its place: fastebm's CUDA library was built for 9.0+PTX, and GPU 0 "
        "has compute capability 8.0; `TORCH_CUDA_ARCH_LIST=8.0 fastebm build` builds it for this GPU"
    ]


def test_a_gpu_that_is_too_old_for_both_takes_the_reference(gpu):
    gpu((7, 5))
    with pytest.warns(RuntimeWarning) as said:
        assert {backends.select_backend("cuda") for _ in range(3)} == {"reference"}
    cuda, triton = (str(warning.message) for warning in said)
    assert cuda.startswith("backend 'cuda' is left out, 'reference' takes its place: fastebm's CUDA library was built")
    assert triton == (
        "backend 'triton' is left out, 'reference' takes its place: Triton supports 8.0 and later, and GPU 0 has "
        "compute capability 7.5"
    )


@pytest.mark.parametrize("error", [ImportError("libcuda.so.1: not found\nsee the log"), OSError("no libtriton")])
def test_triton_that_does_not_load_falls_back_and_is_said_once(gpu, monkeypatch, capsys, error):
    missing = backends._triton_missing
    gpu((9, 0), images=None, library=False)
    monkeypatch.setattr(backends, "_triton_missing", missing)
    missing.cache_clear()

    def fail(name):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(backends.importlib, "import_module", fail)
        why = f"Triton is installed, but does not load: {str(error).replace(chr(10), ' ')}"
        with pytest.warns(RuntimeWarning) as said:
            assert {backends.select_backend("cuda") for _ in range(3)} == {"reference"}
        assert [str(warning.message) for warning in said] == [
            f"backend 'triton' is left out, 'reference' takes its place: {why}"
        ]
        assert backends.unavailable_reason("triton", "cuda") == why
        with backends.backend("triton"), pytest.raises(RuntimeError, match=f"asked for but can't run: {why}"):
            backends.select_backend("cuda")
    missing.cache_clear()


def test_what_triton_takes_for_no_interpreter_is_none(monkeypatch):
    for value, interpreted in {"1": True, "True": True, "0": False, "": False, "no": False, "interpret": False}.items():
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert backends._interpreted() is interpreted


def test_a_warning_that_is_an_error_is_one_in_every_call(gpu):
    gpu((8, 0), images="9.0+PTX")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(RuntimeWarning, match="left out"):
                backends.select_backend("cuda")


def test_an_old_gpu_runs_what_was_built_for_it(gpu):
    gpu((7, 5), images="7.5 8.0 9.0+PTX")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select_backend("cuda") == "cuda"


def test_fused_programs_are_refused_where_only_their_reference_runs(gpu):
    """A GPU without Triton runs an energy on PyTorch's operations, which says why."""
    device = torch.device("cuda", 0)
    gpu((8, 0))
    assert backends.refusal_of_programs(device) == ""
    with backends.backend("reference"):
        assert backends.refusal_of_programs(device) == ""  # asked for
    with backends.backend("cuda"):
        assert "run_program has no cuda kernel; it has cpp, triton" in backends.refusal_of_programs(device)
    gpu((7, 5), images="7.5 8.0 9.0+PTX")
    too_old = "Triton supports 8.0 and later, and GPU 0 has compute capability 7.5"
    with pytest.warns(RuntimeWarning, match="backend 'triton' is left out"):
        assert backends.refusal_of_programs(device) == too_old
    key = ProgramKey(torch.Size((3, 8, 8)), torch.float32, device, torch.float32)
    assert candidates._refusal(key) == too_old
    assert backends.refusal_of_programs(torch.device("cpu")) == ""


@pytest.mark.parametrize(("asked", "why"), [("cuda", "was built for 8.0 9.0"), ("triton", "supports 8.0 and later")])
def test_what_is_asked_for_and_cannot_run_says_why(gpu, monkeypatch, asked, why):
    gpu((7, 5))
    monkeypatch.setenv("FASTEBM_BACKEND", asked)
    message = f"backend '{asked}' was asked for but can't run: .*{why}.*GPU 0 has compute capability 7.5"
    with pytest.raises(RuntimeError, match=message) as error:
        backends.select_backend("cuda")
    assert "\n" not in str(error.value)


def test_each_gpu_is_looked_at_by_itself(gpu):
    gpu((9, 0), (7, 5))
    assert backends.select_backend("cuda", index=0) == "cuda"
    with pytest.warns(RuntimeWarning, match="GPU 1 has compute capability 7.5"):
        assert backends.select_backend("cuda", index=1) == "reference"


def test_a_library_that_does_not_say_what_it_holds_is_tried(gpu):
    gpu((7, 5), images=None)
    assert backends.select_backend("cuda") == "cuda"


def test_without_a_library_there_is_nothing_to_say(gpu):
    gpu((9, 0), images=None, library=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select_backend("cuda") == "triton"


def test_info_shows_capabilities_and_what_was_built(gpu, capsys):
    gpu((8, 0), (7, 5), images="9.0+PTX")
    with pytest.warns(RuntimeWarning, match="left out"):
        assert Info()() == 0
    shown = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    shown = {name.strip(): value.strip() for name, value in shown.items()}
    assert shown["GPU"] == "GPU 0 (8.0), GPU 1 (7.5)"
    assert shown["cuda images"] == "9.0+PTX"
    assert shown["operators on a GPU"].startswith("triton; not cuda: fastebm's CUDA library was built for 9.0+PTX")


def test_info_says_once_why_what_is_asked_for_cannot_run(gpu, monkeypatch, capsys):
    gpu((7, 5))
    monkeypatch.setenv("FASTEBM_BACKEND", "cuda")
    assert Info()() == 0
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("operators on a GPU"))
    assert shown.count("has compute capability 7.5") == 1
    assert "backend 'cuda' was asked for but can't run: fastebm's CUDA library was built for 8.0 9.0+PTX" in shown


@pytest.mark.parametrize(
    ("asked", "images"),
    [
        (None, "7.5 8.0 9.0+PTX"),
        (" ", "7.5 8.0 9.0+PTX"),
        ("8.0;9.0+PTX", "8.0 9.0+PTX"),
        ("Ampere Hopper", "Ampere Hopper"),
    ],
)
def test_the_build_says_what_it_was_for(monkeypatch, asked, images):
    """tests/gpu/test_host_build.py reads the answer from a library."""
    built = []
    for name in ("TORCH_CUDA_ARCH_LIST", "CXX"):
        monkeypatch.setenv(name, asked or "g++")  # noted, so that it is as before after the test
    if asked is None:
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(build_extension, "cuda_unavailable_reason", lambda: None)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDAExtension", lambda *_, **options: built.append(options))
    build_extension.extensions()
    assert f'-DFASTEBM_CUDA_IMAGES="{images}"' in built[0]["extra_compile_args"]["cxx"]


def test_a_library_from_before_says_nothing():
    library = next(Path(torch.__file__).parent.glob("lib/libc10.*"))
    assert backends._images_of(library) is None
