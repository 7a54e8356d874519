"""The GPU that isn't there fails where one would, and says what was launched."""

from __future__ import annotations

import os

import pytest
import torch

from fastebm import ops

fake_driver = pytest.importorskip("tests.gpu.fake_driver", reason="Triton is not installed")
kernels = pytest.importorskip("tests.gpu.specimen_kernels", reason="Triton is not installed")
fake_gpu, MOST_SHARED = fake_driver.fake_gpu, fake_driver.MOST_SHARED

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"),
    reason="Triton's interpreter runs here, which compiles nothing",
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_a_launch_is_kept_and_nothing_is_launched():
    with fake_gpu(90) as gpu:
        ops.normal((3, 2, 5), seed=1)
        ops.normal((8, 2, 5), seed=1)
        first, second = gpu.launches
        assert len(gpu.kernels) == len(gpu.asked) == 1
        assert first.kernel is second.kernel
    assert first.name == "fill_kernel"
    assert first.grid == (1, 1, 1)
    assert [kind for kind, _ in first.arguments] == ["*fp32", "*i64", "*i64", "i32", "i32", "i32"]
    out, key, _, *numbers = (value for _, value in first.arguments)
    assert out.shape == (3, 2, 5)
    assert key.tolist()[0] == 1
    assert numbers[:2] == [3, 10]
    assert ".target sm_90" in first.kernel.asm["ptx"]
    assert ops.backends.select_backend("cpu") != "triton"


def test_what_is_left_out_is_not_compiled():
    with fake_gpu(80, compiles=lambda asked: False) as gpu:
        ops.normal((3, 2, 5), seed=1)
        ops.normal((3, 2, 4), seed=1)  # whole quads
    assert not gpu.launches
    assert [name for name, _ in gpu.asked] == ["fill_kernel"] * 2


def test_each_gpu_compiles_for_itself():
    found = {}
    for capability in MOST_SHARED:
        with fake_gpu(capability) as gpu:
            ops.uniform((1, 4), seed=0)
            found[capability] = gpu.launches[0].kernel.metadata.target.arch
    assert found == {capability: capability for capability in MOST_SHARED}


def test_too_much_shared_memory_is_an_error():
    x = torch.zeros(256, 128)  # 128 KiB
    with fake_gpu(90) as gpu:
        kernels.transposed_kernel[(1,)](x, x, 256, 128, num_warps=16, enable_fp_fusion=False)
        assert MOST_SHARED[120] < gpu.launches[0].kernel.metadata.shared
    with fake_gpu(120) as gpu, pytest.raises(Exception, match="out of resource: shared memory"):
        kernels.transposed_kernel[(1,)](x, x, 256, 128, num_warps=16, enable_fp_fusion=False)
    assert not gpu.launches


@pytest.mark.parametrize(("size", "spills"), [(1024, False), (8192, True)])
def test_registers_that_spill_are_seen(size, spills):
    x = torch.zeros(size)
    with fake_gpu(80) as gpu:
        kernels.above_the_smallest_kernel[(1,)](x, x, size, num_warps=1, enable_fp_fusion=False)
    assert (gpu.launches[0].kernel.n_spills > 0) == spills


def test_another_capability_is_refused():
    with pytest.raises(ValueError, match=r"one of \[80, 90, 120\], got 70"), fake_gpu(70):
        pass
