"""Every Triton kernel compiles for GPUs that aren't there, and its PTX shows what its example says."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import pytest

from fastebm.ops import schemas
from tests.gpu.compiled import all_capabilities, both_versions, lines_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def triton_modules() -> list[Any]:
    subjects = dict.fromkeys(kernel.subject for kernel in schemas.KERNELS.values() if "triton" in kernel.backends)
    return [importlib.import_module(f"fastebm.ops.triton.{subject}") for subject in subjects]


def test_every_kernel_has_a_launch_example():
    from tests.ops.launch_examples import all_launch_examples

    examples = all_launch_examples()
    names = [example.name for example in examples]
    assert len(set(names)) == len(names)
    kernels = {
        id(value): name
        for module in triton_modules()
        for name, value in vars(module).items()
        if name.endswith("_kernel")
    }
    missing = set(kernels) - {id(example.kernel) for example in examples}
    assert not missing, f"no launch example of {[kernels[kernel] for kernel in missing]}"
    for example in examples:
        assert {*example.signature, *example.constexprs} <= {*example.kernel.arg_names}, example.name
        assert not {*example.signature} & {*example.constexprs}, example.name


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"),
    reason="the run without Triton's interpreter compiles them",
)
@both_versions
@all_capabilities
def test_compiles_as_written(version, capability):
    shown = {line["name"]: line for line in lines_of(version, capability, "example")}

    from tests.ops.launch_examples import all_launch_examples

    wrong = []
    for example in all_launch_examples():
        code = shown[example.name]
        if "error" in code:
            wrong.append(f"{example.name}: {code['error']}")
            continue
        expected = {
            "fma": example.fused,
            "other_contractions": 0,
            "approximate": 0,
            "vector_loads": example.vector_loads,
            "vector_stores": example.vector_stores,
            "shared": None if example.shared else 0,
            "shared_accesses": None if example.shared else 0,
        }
        wrong += [
            f"{example.name}: {what} is {code[what]}, not {value}"
            for what, value in expected.items()
            if value is not None and code[what] != value
        ]
        double = example.fused_double if isinstance(example.fused_double, tuple) else (example.fused_double,)
        if code["fma_double"] not in double:
            wrong.append(f"{example.name}: fma_double is {code['fma_double']}, not {example.fused_double}")
        if code["stack"] > example.most_spilled:
            wrong.append(f"{example.name}: {code['stack']} bytes of stack, so that registers spill")
        if example.matrix is not None and not code[example.matrix]:
            wrong.append(f"{example.name}: no product of {example.matrix} on tensor cores")
        if example.shared and code["shared"] > example.most_shared:
            wrong.append(f"{example.name}: {code['shared']} bytes of shared memory")
    assert not wrong, "\n".join(wrong)
    # The radius of a pair of normals is a square root, and it is the correctly rounded one.
    for name in ("normal", "langevin_step plain"):
        assert shown[name]["sqrt_rn"] == 2
    assert shown["langevin_step factors"]["divisions"] == 1
