"""What users launch on a GPU compiles for every GPU and Triton, without spills, and one kernel serves all batches."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from tests.gpu.compiled import all_capabilities, both_versions, lines_of

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"),
        reason="Triton's interpreter runs here, which compiles nothing",
    ),
]


def faults(lines):
    """What is wrong with compiled kernels, in one line each."""
    from tests.gpu.fake_driver import ALL_REGISTERS, MOST_REGISTERS, MOST_SHARED, WARP

    for line in lines:
        name = line["name"]
        if "error" in line:
            yield f"{name}: {line['error']}"
            continue
        threads = WARP * line["warps"]
        if line["stack"]:
            yield f"{name}: {line['stack']} bytes of stack, so that registers spill"
        if line["registers"] > MOST_REGISTERS or line["registers"] * threads > ALL_REGISTERS:
            yield f"{name}: {line['registers']} registers in each of {threads} threads"
        if line["shared"] > MOST_SHARED[line["capability"]]:
            yield f"{name}: {line['shared']} bytes of shared memory"


@both_versions
@all_capabilities
def test_a_share_of_all_launches_compiles_without_spills(version, capability):
    """All versions and GPUs together compile each kernel once."""
    lines = lines_of(version, capability, "launch")
    assert len(lines) > 50
    assert not list(faults(lines))


@pytest.mark.slow
@both_versions
@all_capabilities
def test_all_launches_compile_without_spills(version, capability):
    lines = lines_of(version, capability, "launch", whole=True)
    assert len(lines) > 400
    assert not list(faults(lines))


@both_versions
@all_capabilities
def test_one_kernel_serves_all_batches(version, capability):
    """Batches of 256, 3 and 1 ask for no kernel that 64 did not, but for samplers' tensors of one sample."""
    lines = lines_of(version, capability, "asked")
    assert len(lines) > 15
    for line in lines:
        assert "error" not in line, f"{line['name']}: {line['error']}"
        assert line["64"] == line["256"] == line["3"]
        # Of one sample alone, a mask of a whole image is as contiguous as x is.
        assert line["1"] == line["64"] + line["name"].startswith("samplers")


@pytest.mark.parametrize("levels", [(32,), (8, 16, 32)], ids=str)
def test_a_chain_compiles_nothing_that_its_first_check_did_not(levels):
    """A program is checked with 3 samples before a chain of 64 runs, at each resolution of a cascade."""
    from benchmarks.harness import nets
    from tests.gpu.fake_driver import fake_gpu
    from tests.gpu.launches import chain_launches

    with fake_gpu(90, compiles=lambda asked: False) as gpu:
        made = [
            chain_launches(nets.build("CF-EBM", (3, size, size), "cpu"), (3, size, size), torch.bfloat16)
            for size in levels
        ]
        for launch in made:
            launch(3)
        checked = list(gpu.asked)
        for launch in made:
            launch(64)
        assert list(gpu.asked) == checked
