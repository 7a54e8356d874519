"""A plugin of pytest that runs `fastebm_cuda::*` on the CPU: FASTEBM_HOST_BUILD is the library, FASTEBM_BACKEND cuda.

The library registers its operators for CUDA, as on a GPU. Here each gets an implementation for the CPU that tells the
checker which tensors it is given, and which of them its schema lets it write, and then calls the one for CUDA.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastebm.ops import backends, schemas

LIBRARY = os.environ["FASTEBM_HOST_BUILD"]

torch.ops.load_library(LIBRARY)
checker = ctypes.CDLL(LIBRARY)
checker.host_build_give.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
for counter in ("launches", "accesses", "barriers"):
    getattr(checker, f"host_build_{counter}").restype = ctypes.c_uint64

_on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_implementations = torch.library.Library("fastebm_cuda", "IMPL")


def give(name: str, tensor: Tensor, writable: bool) -> None:
    """Tells the checker that the kernels of the next call may touch a tensor, from its first to its last element."""
    if tensor.numel():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        size = tensor.element_size()
        checker.host_build_give(name.encode(), tensor.data_ptr(), (last + 1) * size, size, writable)


def _checked(operator: Any) -> Callable[..., None]:
    parameters = operator._schema.arguments

    def run(*arguments: Any) -> None:
        try:
            for parameter, argument in zip(parameters, arguments, strict=False):
                if isinstance(argument, Tensor):
                    written = parameter.alias_info is not None and parameter.alias_info.is_write
                    give(parameter.name, argument, written)
            operator.redispatch(_on_cuda, *arguments)
        finally:
            checker.host_build_take_back()

    return run


for _name, _kernel in schemas.KERNELS.items():
    if "cuda" in _kernel.backends:
        _implementations.impl(_name, _checked(getattr(torch.ops.fastebm_cuda, _name).default), "CPU")

if _lacking := backends._without_kernel("cuda"):
    raise RuntimeError(f"{LIBRARY} was built without {', '.join(_lacking)}")
backends._cuda_library = LIBRARY
_unavailable_reason = backends.unavailable_reason


def _also_on_the_cpu(name: str, device_type: str, *rest: Any) -> str | None:
    return _unavailable_reason(name, "cuda" if name == "cuda" else device_type, *rest)


backends.unavailable_reason = _also_on_the_cpu


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests of backends. The others say nothing of CUDA, and have run without this plugin."""
    chosen = [item for item in items if "backend_device" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the checker saw, for the test that started this process."""
    seen = {name: getattr(checker, f"host_build_{name}")() for name in ("launches", "accesses", "barriers")}
    terminalreporter.write_line("checked: " + ", ".join(f"{count} {name}" for name, count in seen.items()))
