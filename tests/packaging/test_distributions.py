"""What is built from the sources is what a user needs: compiled operators where possible, a working package elsewhere.

Each distribution is built once, by pip, from a copy of the tree; the tests look into it or run it in another process.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fastebm

from .contents import (
    ADDED,
    copied_tree,
    expected_in_sdist,
    expected_in_wheel,
    libraries,
    names_in_sdist,
    names_in_wheel,
    source_files,
)

# Of these, none may travel.
LEFT_BY_WORK = (
    "runs/demo/samples.png",
    "data/images.npz",
    "build/lib/fastebm/__init__.py",
    "dist/fastebm-0.0.0.tar.gz",
    "site/index.html",
    "fastebm/_C.cpython-311-x86_64-linux-gnu.so",
    "csrc/cpu/chain.o",
    "fastebm/__pycache__/memory.cpython-311.pyc",
    "tests/__pycache__/conftest.cpython-311.pyc",
    ".venv/bin/python",
    ".hypothesis/constants/00",
)


class Built(NamedTuple):
    wheel: Path
    log: str


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what would lead a child back to the checkout, and with changes."""
    dropped = {"PYTHONPATH", "FASTEBM_BACKEND", "FASTEBM_CPU", "TRITON_INTERPRET"}
    return {name: value for name, value in os.environ.items() if name not in dropped} | changes


def python(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """What a Python process prints on both streams; it must succeed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=dict(env or environment()),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"python {' '.join(arguments)} failed:\n{done.stdout}"
    return done.stdout


def build_wheel(tree: Path, folder: Path, env: Mapping[str, str]) -> Built:
    """A wheel of a tree that nothing was built in so far, and the build's log."""
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir", "--verbose"]
    log = python("-m", "pip", "wheel", *options, "--wheel-dir", str(folder), ".", cwd=tree, env=env)
    (wheel,) = folder.glob("*.whl")
    return Built(wheel, log)


def installed(wheel: Path, target: Path) -> dict[str, str]:
    """The environment of a process that finds the wheel installed in `target`; to be used with python -S.

    -S leaves .pth files out, and with them the hook of an editable install, which would lend its compiled operators.
    """
    python("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=target.parent)
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    return environment(PYTHONPATH=os.pathsep.join([str(target), *others]))


@pytest.fixture(scope="module")
def quick_compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The C++ compiler with its optimiser off, as `CXX`: a third of the time, and the same bits."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no C++ compiler on this machine: looked for {', '.join(names)}")
    wrapper = tmp_path_factory.mktemp("compiler") / "quick"
    wrapper.write_text(f'#!/bin/sh\nexec "{found}" "$@" -O0 -g0 -w\n')
    wrapper.chmod(0o755)
    return str(wrapper)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of a tree that was worked in."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = copied_tree(folder / "tree")
    for name in LEFT_BY_WORK:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("left by work\n")
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    python("-c", program, cwd=tree)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, quick_compiler: str) -> Built:
    """The wheel of an environment that has torch and a compiler, built from the tree."""
    folder = tmp_path_factory.mktemp("compiled")
    return build_wheel(copied_tree(folder / "tree"), folder, environment(CXX=quick_compiler))


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory, sdist: Path) -> Built:
    """The wheel of an environment where torch can't be imported, as in pip's isolated builds, built from the sdist."""
    folder = tmp_path_factory.mktemp("without_torch")
    hidden = folder / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('hidden by the test')\n")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build_wheel(folder / sdist.name.removesuffix(".tar.gz"), folder, environment(PYTHONPATH=str(hidden)))


def held(archive: Path, name: str) -> str:
    """The text of the one file of a wheel whose path ends with a name."""
    with zipfile.ZipFile(archive) as wheel:
        (found,) = (path for path in wheel.namelist() if path.endswith(name))
        return wheel.read(found).decode()


def test_source_distribution_holds_the_tree_and_nothing_else(sdist: Path) -> None:
    assert names_in_sdist(sdist) == expected_in_sdist(source_files())


def test_expectation_covers_what_builds_and_tests_need() -> None:
    expected = expected_in_sdist(source_files()) - ADDED
    needed = {"setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "LICENSE", "README.md", "CITATION.cff"}
    assert needed <= expected
    folders = {name.partition("/")[0] for name in expected if "/" in name}
    assert {"benchmarks", "csrc", "docs", "examples", "fastebm", "tests"} <= folders
    assert "tests/packaging/contents.py" in expected
    assert "csrc/module.cpp" in expected


def test_wheels_hold_the_package_and_the_sources_that_fastebm_build_needs(
    compiled: Built, without_torch: Built
) -> None:
    """Both ways to a wheel, from the tree and by the source distribution, end at the same files."""
    expected = expected_in_wheel(source_files(), fastebm.__version__)
    assert "fastebm/csrc/module.cpp" in expected
    assert names_in_wheel(without_torch.wheel) == expected
    names = names_in_wheel(compiled.wheel)
    assert names - libraries(names) == expected
    assert held(compiled.wheel, ".dist-info/top_level.txt").split() == ["fastebm"]
    assert "fastebm = fastebm.cli:main" in held(compiled.wheel, "/entry_points.txt")
    assert "License-Expression: Apache-2.0" in held(compiled.wheel, "/METADATA")


def test_description_leads_somewhere_from_an_index(without_torch: Built) -> None:
    """The README, with no link into a tree that a package index lacks."""
    about, _, description = held(without_torch.wheel, "/METADATA").partition("\n\n")
    assert "Description-Content-Type: text/markdown" in about
    assert description.startswith("# fastebm\n")
    targets = re.findall(r"(?:\]\(| src=\"| href=\")([^)\s\"]+)", description)
    assert len(targets) > 10
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []


def test_distributions_have_the_version_of_the_package(compiled: Built, without_torch: Built, sdist: Path) -> None:
    version = fastebm.__version__
    assert sdist.name == f"fastebm-{version}.tar.gz"
    with tarfile.open(sdist) as archive:
        about = archive.extractfile(f"fastebm-{version}/PKG-INFO")
        assert about is not None
        assert f"\nVersion: {version}\n" in about.read().decode()
    for wheel in (compiled.wheel, without_torch.wheel):
        assert wheel.name.startswith(f"fastebm-{version}-")
        assert f"\nVersion: {version}\n" in held(wheel, "/METADATA")


def test_wheel_is_compiled_for_its_platform(compiled: Built) -> None:
    """One library for this Python, with no path of the machine that built it; CUDA's where torch has CUDA."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    found = libraries(names_in_wheel(compiled.wheel))
    assert f"fastebm/_C{suffix}" in found
    assert found <= {f"fastebm/_C{suffix}", f"fastebm/_cuda{suffix}"}
    python_tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform_tag = re.sub(r"[-.]", "_", sysconfig.get_platform())
    assert compiled.wheel.name.endswith(f"-{python_tag}-{python_tag}-{platform_tag}.whl")
    assert "Root-Is-Purelib: false" in held(compiled.wheel, ".dist-info/WHEEL")
    assert "WITHOUT" not in compiled.log
    with zipfile.ZipFile(compiled.wheel) as archive:
        library = archive.read(f"fastebm/_C{suffix}")
    for folder in (compiled.wheel.parent, Path(torch.__file__).parent):
        assert str(folder).encode() not in library


def test_installed_wheel_runs_compiled(compiled: Built, tmp_path: Path) -> None:
    env = installed(compiled.wheel, tmp_path / "site")
    program = "import fastebm, torch, fastebm._C as c; print(fastebm.__file__); print(repr(c.self_test()))"
    lines = python("-S", "-W", "error", "-c", program, cwd=tmp_path, env=env).splitlines()
    assert lines[0].startswith(str(tmp_path / "site"))
    assert lines[1] == "''"


def test_wheel_built_without_torch_is_pure_and_says_so(without_torch: Built) -> None:
    assert without_torch.wheel.name.endswith("-py3-none-any.whl")
    assert "Root-Is-Purelib: true" in held(without_torch.wheel, ".dist-info/WHEEL")
    assert "WITHOUT its compiled operators" in without_torch.log
    assert "hidden by the test" in without_torch.log
    assert "fastebm build" in without_torch.log


def test_pure_wheel_warns_works_and_compiles_in_place(
    without_torch: Built, quick_compiler: str, tmp_path: Path
) -> None:
    env = installed(without_torch.wheel, tmp_path / "site")
    draw = "import fastebm; print(fastebm.__file__); print(fastebm.ops.normal((2, 3), seed=1).tolist())"
    said = python("-S", "-W", "always", "-c", draw, cwd=tmp_path, env=env)
    assert "fastebm build" in said, "a package without compiled operators must say how to get them"
    assert str(tmp_path / "site") in said
    assert not list((tmp_path / "site" / "fastebm").glob("_C*.so")), "an import must never compile"

    python("-S", "-m", "fastebm", "build", cwd=tmp_path, env=env | {"CXX": quick_compiler})
    assert list((tmp_path / "site" / "fastebm").glob("_C*.so"))
    check = "import fastebm, torch, fastebm._C as c; print(repr(c.self_test()))"
    assert python("-S", "-W", "error", "-c", check, cwd=tmp_path, env=env).splitlines()[-1] == "''"


def test_missing_compiler_makes_a_pure_package_and_a_clear_refusal(without_torch: Built, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    env = environment(PATH=str(bare), CXX="no-such-compiler")
    # The part of the build that decides, without pip around it: which extension modules, and what is said.
    program = (
        "import runpy, sys; sys.argv = ['setup.py', '--name']; print(runpy.run_path('setup.py')['compiled_part']())"
    )
    said = python("-c", program, cwd=copied_tree(tmp_path / "tree"), env=env)
    assert said.rstrip().endswith("{}")
    assert "WITHOUT its compiled operators" in said
    assert "no-such-compiler" in said

    env = installed(without_torch.wheel, tmp_path / "site") | {"PATH": str(bare), "CXX": "no-such-compiler"}
    refused = subprocess.run(
        [sys.executable, "-S", "-m", "fastebm", "build"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode != 0
    assert "no-such-compiler" in refused.stderr + refused.stdout
    assert "Traceback" not in refused.stderr
