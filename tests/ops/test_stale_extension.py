"""Compiled operators from before an operator was added: a warning that names it, and the reference in their place."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fastebm.ops import backends, schemas

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"),
    reason="Triton's interpreter takes over from an extension that is left out; a run without it shows what does else",
)

ROOT = Path(__file__).resolve().parents[2]
NEWER = "added_since_the_build"

# An extension that loads and registers nothing, as far as can be from one of today.
WITH_ANOTHER_EXTENSION = """
import sys, types, warnings
older = types.ModuleType("fastebm._C")
older.active_variant = lambda: "avx2"
sys.modules["fastebm._C"] = older
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastebm.ops
for warning in caught:
    print("warned:", warning.message)
print("runs on", fastebm.ops.backends.report()["cpu"], tuple(fastebm.ops.normal((2, 3), seed=0).shape))
with fastebm.ops.backend("cpp"):
    try:
        fastebm.ops.normal((2, 3), seed=0)
    except RuntimeError as error:
        print("refused:", error)
"""


@pytest.fixture
def loaded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was loaded stays as it was for tests after this one."""
    if backends._extension is None:
        pytest.skip("the compiled operators are not built here")
    for name in ("_extension", "_cuda_library", "_extension_missing", "_cuda_library_missing"):
        monkeypatch.setattr(backends, name, getattr(backends, name))


def test_an_older_extension_is_named_and_left_out() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITH_ANOTHER_EXTENSION],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    warned, runs, refused = done.stdout.splitlines()
    assert "were built from other sources than this package's, without normal, uniform, langevin_step" in warned
    assert "hash_memory" in warned
    assert "`fastebm build` compiles them" in warned
    assert runs == "runs on reference (2, 3)"
    assert refused.startswith("refused: backend 'cpp' was asked for but can't run")
    assert "`fastebm build` compiles them" in refused


@pytest.mark.usefixtures("loaded_anew")
def test_one_operator_that_is_newer_than_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends._without_kernel("cpp") == []
    schema = "(Tensor(a!) out) -> ()"
    library = torch.library.Library("fastebm_cpp", "FRAGMENT")
    library.define(NEWER + schema)
    monkeypatch.setitem(schemas.KERNELS, NEWER, schemas.Kernel("normal", schema, backends=("cpp",)))
    with pytest.warns(RuntimeWarning, match=f"without {NEWER}.*fastebm build"):
        backends._load_extensions()
    assert backends.select_backend("cpu") == "reference"
    assert NEWER in str(backends.unavailable_reason("cpp", "cpu"))


@pytest.mark.usefixtures("loaded_anew")
def test_todays_extension_is_loaded_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends._load_extensions()
    assert backends.select_backend("cpu") == "cpp"


def test_a_cuda_library_that_does_not_load_says_what_it_lacks(loaded_anew, monkeypatch, tmp_path) -> None:
    """As one does that was built for another CUDA, or for a torch that has none."""
    (tmp_path / "ops").mkdir()
    (tmp_path / "_cuda.so").write_bytes(b"no library")
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "ops" / "backends.py"))
    with pytest.warns(RuntimeWarning, match=r"don't load: .*_cuda\.so: file too short \(`fastebm build`") as said:
        backends._load_extensions()
    assert len(said) == 1
    assert "does not load" in (backends.unavailable_reason("cuda", "cuda") or "")
