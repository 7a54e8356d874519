"""Each schema has its complete set of files: reference, C++, Triton, CUDA, tests and benchmarks, found by its name."""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from fastebm import build_extension as build
from fastebm.ops import backends, schemas
from fastebm.ops.options import StepOptions, TailOptions

ROOT = Path(__file__).resolve().parents[2]
SOURCES = build.source_folder()
SUBJECTS = list(dict.fromkeys(kernel.subject for kernel in schemas.KERNELS.values()))

every_kernel = pytest.mark.parametrize("name", schemas.KERNELS)


def kernels_of(backend: str) -> pytest.MarkDecorator:
    """The kernels that name this backend among theirs: only those have its files."""
    return pytest.mark.parametrize("name", [name for name, k in schemas.KERNELS.items() if backend in k.backends])


every_subject = pytest.mark.parametrize("subject", SUBJECTS)


@cache
def source(name: str) -> str:
    path = SOURCES / name
    assert path.is_file(), f"{path} is missing"
    return path.read_text()


def registered(text: str, name: str) -> bool:
    return re.search(rf'\.impl\(\s*"{name}"', text) is not None


@every_kernel
def test_reference(name):
    module = importlib.import_module(f"fastebm.ops.{schemas.KERNELS[name].subject}")
    assert callable(getattr(module, f"reference_{name}"))


# A GPU has warps for what these do with vectors.
ON_THE_CPU = ("lanes", "lane_samplers")


@every_kernel
def test_backends(name):
    """The CPU's and one of a GPU are the least, but for lanes; no file is there for a backend that isn't named."""
    kernel = schemas.KERNELS[name]
    least = {"cpp"} if kernel.subject in ON_THE_CPU else {"cpp", "triton"}
    assert least <= {*kernel.backends} <= {"cpp", "triton", "cuda"}
    others = [k.backends for k in schemas.KERNELS.values() if k.subject == kernel.subject]
    assert (SOURCES / f"cuda/{kernel.subject}.cu").is_file() == any("cuda" in backends for backends in others)


@kernels_of("cpp")
def test_cpp(name):
    file = f"cpu/{schemas.KERNELS[name].subject}.cpp"
    assert registered(source(file), name), f"{file} does not register {name}"
    assert file in build.CPP_SOURCES
    if backends._extension is not None:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastebm_cpp::{name}", "CPU")


@kernels_of("cuda")
def test_cuda(name):
    file = f"cuda/{schemas.KERNELS[name].subject}.cu"
    assert re.search(rf"\blaunch_{name}\(", source("cuda/launch.h")), f"launch.h does not declare launch_{name}"
    assert re.search(rf"\blaunch_{name}\(", source(file)), f"{file} does not define launch_{name}"
    assert registered(source("cuda/register.cpp"), name), f"register.cpp does not register {name}"
    assert file in build.CUDA_SOURCES


@kernels_of("triton")
def test_triton(name):
    """Read rather than imported: Triton may be missing."""
    path = ROOT / "fastebm" / "ops" / "triton" / f"{schemas.KERNELS[name].subject}.py"
    assert path.is_file(), f"{path} is missing"
    functions = {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert name in functions, f"{path} has no function {name}"
    examples = ROOT / "tests" / "ops" / "launch_examples" / path.name
    assert "def launch_examples(" in examples.read_text(), f"{examples} has no launch_examples to compile"
    schema = torch._C.parse_schema(f"fastebm::{name}{schemas.KERNELS[name].schema}")
    arguments = functions[name].args
    options = TailOptions if name.startswith("block_tail") else StepOptions
    taken = len(arguments.args) + (len(options._fields) if arguments.vararg else 0)
    assert taken == len(schema.arguments), f"{path}: {name} takes other arguments than its schema"


@every_subject
@pytest.mark.parametrize("folder", ["tests/ops", "benchmarks/ops"])
def test_tests_and_benchmarks(subject, folder):
    path = ROOT / folder / f"test_{subject}.py"
    assert path.is_file(), f"{path} is missing"
    assert re.search(r"^def test_", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", schemas.PUBLIC)
def test_public_operators_run_everywhere(name):
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastebm::{name}", key), (
            f"fastebm::{name} has no {key} kernel"
        )


def test_build_list_names_every_source():
    found = {str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.c*") if path.suffix in (".cpp", ".cu")}
    assert found == {*build.CPP_SOURCES, *build.CUDA_SOURCES}
