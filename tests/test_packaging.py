"""What is built from the sources is what a user needs: compiled operators where possible, a working package elsewhere.

Each distribution is built once, by pip, from a copy of the tree; the tests look into it or run it in another process.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = shutil.ignore_patterns(
    ".*", "__pycache__", "build", "dist", "results", "*.so", "*.egg-info", "tests", "venv"
)
SOURCES = (".h", ".cpp", ".cu")


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


def copied_tree(target: Path) -> Path:
    shutil.copytree(ROOT, target, ignore=NOT_COPIED)
    shutil.rmtree(target / "runs", ignore_errors=True)  # of the checkout's owner; fastebm/runs stays
    return target


def build_wheel(folder: Path, env: Mapping[str, str]) -> Built:
    """A wheel of a fresh copy of the tree, and the build's log."""
    tree = copied_tree(folder / "tree")
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


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def extensions_in(wheel: Path) -> list[str]:
    return sorted(name for name in names_in(wheel) if name.endswith((".so", ".pyd")))


def operator_sources() -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.suffix in SOURCES}


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
def compiled(tmp_path_factory: pytest.TempPathFactory, quick_compiler: str) -> Built:
    """The wheel of an environment that has torch and a compiler."""
    return build_wheel(tmp_path_factory.mktemp("compiled"), environment(CXX=quick_compiler))


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The wheel of an environment where torch can't be imported, as in pip's isolated builds."""
    folder = tmp_path_factory.mktemp("without_torch")
    hidden = folder / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('hidden by the test')\n")
    return build_wheel(folder, environment(PYTHONPATH=str(hidden)))


def test_wheel_holds_every_module_the_sources_and_the_command(compiled: Built) -> None:
    names = names_in(compiled.wheel)
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastebm").rglob("*.py")}
    assert modules <= names, "a package folder without __init__.py does not travel"
    assert {f"fastebm/{source}" for source in operator_sources()} <= names
    assert {"fastebm/py.typed", "fastebm/report/page.html"} <= names
    assert not [name for name in names if name.startswith(("tests", "examples", "benchmarks"))]
    with zipfile.ZipFile(compiled.wheel) as archive:
        (entry_points,) = (name for name in names if name.endswith("/entry_points.txt"))
        assert "fastebm = fastebm.cli:main" in archive.read(entry_points).decode()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()


def test_wheel_is_compiled_for_its_platform(compiled: Built) -> None:
    assert [name for name in extensions_in(compiled.wheel) if name.startswith("fastebm/_C.")]
    assert not compiled.wheel.name.endswith("-none-any.whl")
    assert "WITHOUT" not in compiled.log


def test_installed_wheel_runs_compiled(compiled: Built, tmp_path: Path) -> None:
    env = installed(compiled.wheel, tmp_path / "site")
    program = "import fastebm, torch, fastebm._C as c; print(fastebm.__file__); print(repr(c.self_test()))"
    lines = python("-S", "-W", "error", "-c", program, cwd=tmp_path, env=env).splitlines()
    assert lines[0].startswith(str(tmp_path / "site"))
    assert lines[1] == "''"


def test_source_distribution_can_be_built_from(tmp_path: Path) -> None:
    tree = copied_tree(tmp_path / "tree")
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    python("-c", program, cwd=tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as held:
        names = {name.partition("/")[2] for name in held.getnames()}
    assert operator_sources() <= names
    assert {"setup.py", "pyproject.toml", "fastebm/build_extension.py", "LICENSE", "README.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_built_without_torch_is_pure_and_says_so(without_torch: Built) -> None:
    assert without_torch.wheel.name.endswith("-py3-none-any.whl")
    assert not extensions_in(without_torch.wheel)
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


# --- a wheel runs on an older processor than it was built on ---------------------------------------------------------

# Encodings that a processor without AVX2 lacks: all that starts with v and works on vector registers, masks, and BMI.
VECTOR = re.compile(r"^v\w+\s.*%[xyz]mm\d")
MASK = re.compile(r"^k(mov|or|and|xor|not|test|shift|unpck|add)\w*\s")
BMI = re.compile(r"^(andn|bextr|blsi|blsmsk|blsr|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx)[lq]?\s")
VARIANT = re.compile(r"avx2|avx512|\bamx::|_amx\b")


def modern_instructions(disassembly: str) -> dict[str, str]:
    """The first instruction beyond the baseline in each symbol of objdump's listing, by symbol."""
    found: dict[str, str] = {}
    symbol = ""
    for line in disassembly.splitlines():
        heading = re.match(r"^[0-9a-f]+ <(.+)>:$", line)
        if heading:
            symbol = heading.group(1)
            continue
        instruction = line.rpartition("\t")[2] if line.startswith(" ") else ""
        if any(kind.match(instruction) for kind in (VECTOR, MASK, BMI)):
            found.setdefault(symbol, instruction.strip())
    return found


def test_modern_instructions_are_recognised() -> None:
    listing = "\n".join(
        [
            "0000000000001000 <plain(float)>:",
            "    1000:\tmulss  %xmm0,%xmm1",
            "    1004:\tverr   %ax",
            "0000000000002000 <scale_avx2(float*)>:",
            "    2000:\tvmulps %ymm0,%ymm1,%ymm2",
            "0000000000003000 <leaked(int)>:",
            "    3000:\tmov    %rax,%rbx",
            "    3004:\tshlx   %rax,%rbx,%rcx",
            "0000000000004000 <also_leaked(int)>:",
            "    4000:\tvaddss %xmm0,%xmm1,%xmm2",
        ]
    )
    assert set(modern_instructions(listing)) == {"scale_avx2(float*)", "leaked(int)", "also_leaked(int)"}


def test_instructions_beyond_the_baseline_stay_in_their_variants() -> None:
    """Read from the optimised extension that is installed here: what the optimiser inlines is the point."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not installed: the machine code can't be read")
    found_extension = importlib.util.find_spec("fastebm._C")
    if found_extension is None or found_extension.origin is None:
        pytest.skip("the compiled operators are not built here")
    library = found_extension.origin
    command = [objdump, "--disassemble", "--demangle", "--no-show-raw-insn", library]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "elf64-x86-64" not in listing:
        pytest.skip("not an x86_64 build: there are no AVX variants")
    found = modern_instructions(listing)
    assert {symbol for symbol in found if "avx2" in symbol}, "the AVX2 variants are missing"
    assert {symbol for symbol in found if "avx512" in symbol}, "the AVX-512 variants are missing"
    outside = {symbol: instruction for symbol, instruction in found.items() if not VARIANT.search(symbol)}
    assert not outside, f"these would crash on a processor without AVX2: {outside}"
