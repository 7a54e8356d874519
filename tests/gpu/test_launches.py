"""Triton kernels compile for each GPU and version as they are written, within its resources; one serves all batches."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from typing import Any

import pytest
import torch

from fastebm.ops import schemas
from fastebm.ops.instructions import (
    Buffer,
    Epilogue,
    EpilogueOp,
    Header,
    Instruction,
    Kind,
    Layout,
    PlannedProgram,
    Segment,
    encode,
)
from tests.gpu.compiled import all_capabilities, both_versions, lines_of

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"),
        reason="Triton's interpreter runs here, which compiles nothing",
    ),
]


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
        if bool(code["approximate"]) != example.approximate:
            wrong.append(f"{example.name}: {code['approximate']} approximate instructions")
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
    assert shown["langevin_step factors"]["divisions"] == 1


# Bytes of registers that may spill: the assembler does that where more blocks then run at a time. With a limit of 128
# registers or more (`.maxnreg`), a convolution that spilled 8 on sm_80 spilled none.
SPILLED = {"instruction_kernel": 8, "chain_kernel": 40, "convolution_weight_kernel": 8, "kinetic_work_kernel": 8}


def faults(lines):
    """What is wrong with compiled kernels, in one line each."""
    from tests.gpu.fake_driver import ALL_REGISTERS, MOST_REGISTERS, MOST_SHARED, WARP

    for line in lines:
        if "error" in line:
            yield f"{line['name']}: {line['error']}"
            continue
        name = f"{line['name']}, {line['kernel']}"
        threads = WARP * line["warps"]
        if line["stack"] > SPILLED.get(line["kernel"], 0):
            yield f"{name}: {line['stack']} bytes of stack, so that registers spill"
        if line["registers"] > MOST_REGISTERS or line["registers"] * threads > ALL_REGISTERS:
            yield f"{name}: {line['registers']} registers in each of {threads} threads"
        if line["shared"] > MOST_SHARED[line["capability"]]:
            yield f"{name}: {line['shared']} bytes of shared memory"


@both_versions
@all_capabilities
def test_a_share_of_all_launches_compiles(version, capability):
    """All versions and GPUs together compile each kernel once."""
    lines = lines_of(version, capability, "launch")
    assert len(lines) > 50
    assert not list(faults(lines))


@pytest.mark.slow
@both_versions
@all_capabilities
def test_all_launches_compile(version, capability):
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


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_launches_overlap_where_the_gpu_lets_them(capability):
    """No block touches memory before it waited for the launch before."""
    from tests.gpu.fake_driver import fake_gpu
    from tests.ops.test_program import SIZES, STORE, ProgramBuilder, images

    making = ProgramBuilder((40, 4, 4))
    target = making.buffer((33, 4, 4))
    making.convolution(0, (33, 4, 4), (3, 3), Epilogue(STORE, target), pad_y=1, pad_x=1)
    making.finish(target)
    with fake_gpu(capability) as gpu:
        making.fused(next(iter(SIZES.values())), "cpu")(images(3, making.sample))
    assert len(gpu.launches) > 2
    for launch in gpu.kernels:
        ptx, touches = launch.kernel.asm["ptx"], re.compile(r"\b(?:(?:ld|st|red|atom)\.global|cp\.async\.c[ag])")
        before, waits, after = ptx.partition("griddepcontrol.wait")
        assert bool(waits) == launch.kernel.metadata.launch_pdl == (capability >= 90)
        assert touches.search(after if waits else before)
        assert not waits or not touches.search(before)
        assert ptx.count("griddepcontrol.launch_dependents") == bool(waits)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 64), (torch.float32, 32)], ids=["bfloat16", "float32"])
def test_blocks_of_products(dtype, most):
    """A thread has at most so many sums, three stages of operands fit twice, and blocks are those of any batch."""
    from benchmarks.harness import nets
    from fastebm.ops.triton.program import calls_of, facts_of
    from tests.gpu.fake_driver import WARP, fake_gpu
    from tests.gpu.launches import code_and_workspace, gpu_program

    shape = (3, 32, 32)
    with fake_gpu(90, compiles=lambda asked: False):
        program = gpu_program(nets.build("CF-EBM", shape, "cpu"), shape, dtype)
    found = []
    for batch in (3, 64):
        code, facts = code_and_workspace(program, batch)[0], facts_of(torch.empty(batch, *shape), program.constants)
        found.append([(call.shape, call.num_warps) for call in calls_of(code.numpy().tobytes(), facts)[1]])
    assert found[0] == found[1]
    products = [(each, warps) for each, warps in found[0] if each.kind == Kind.CONVOLUTION and not each.paired]
    assert max(each.rows * each.columns / (WARP * warps) for each, warps in products) == most
    for each, _ in products:
        assert 3 * (each.rows + each.columns) * each.depth * dtype.itemsize <= 96 * 1024


def test_images_that_an_int32_does_not_count_are_refused():
    from fastebm.ops.triton.program import Facts, calls_of

    def calls(height, width):
        row = (width + 8) * 4
        buffer = Buffer(1, height, width, 4, pixel_stride=4, row_stride=row, image_stride=height * row)
        slot = -(-(buffer.image_stride + 64 * 4) * 4 // 4096) * 4096
        load = Instruction(Kind.LOAD, source_channels=1, channels=1, height=height, width=width, first=0, count=1)
        store = Epilogue(EpilogueOp.STORE, 0)
        header, segments = Header(Layout.PLAIN, 0, 4, 1, slot, 1), (Segment(0, 1, 1),)
        program = PlannedProgram(header, (buffer,), (load,), (store,), segments)
        return calls_of(encode(program).numpy().tobytes(), Facts((1, height, width), ((torch.float32, (8,)),)))

    assert len(calls(16384, 32700)[1]) == 1
    with pytest.raises(ValueError, match=r"has 2149056512 numbers; this kernel counts up to 2\*\*31 of them"):
        calls(16384, 32784)


@pytest.mark.parametrize(("elements", "kind"), [(2**31 - 1, "i32"), (2**31, "i64")])
def test_the_longest_chains_are_launched(elements, kind):
    """`tests/ops/test_rows.py` shows which quads their programs then have."""
    from fastebm import rng
    from fastebm.ops.triton.normal import fill
    from fastebm.ops.triton.philox import ROWS
    from tests.gpu.fake_driver import fake_gpu

    out = torch.empty(1).expand(1, elements)  # nothing is written, so that it need not exist
    with fake_gpu(90) as gpu:
        fill(out, rng.make_key(0, 0), rng.make_chain_ids(0, 1), 0, normal=True)
    (launch,) = gpu.launches
    assert launch.grid[0] == -(-elements // (4 * ROWS))
    assert (kind, elements) in launch.arguments
