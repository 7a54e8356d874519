"""Chooses the backend of an operator: reference, C++, Triton or CUDA. Nothing outside of `ops` branches on it.

    reference   plain PyTorch, any device and dtype; slow, and the definition of what is right
    cpp         compiled C++ on the CPU; AVX2, AVX-512, AVX512-BF16 or AMX chosen at run time, which
                FASTEBM_CPU=baseline|avx2|avx512|avx512_bf16|amx overrides
    triton      Triton on a GPU; on the CPU in Triton's interpreter (TRITON_INTERPRET=1), which is for tests
    cuda        CUDA C++ on a GPU

`auto` takes cpp on the CPU, and on a GPU cuda where it was built for that GPU, else triton; where none is there, the
reference. That one of the two is passed over, because of the GPU's compute capability or because Triton does not load,
is said once in a process.
Float64 on a GPU always takes the reference. `FASTEBM_BACKEND` sets the choice for the process, `backend(...)` for a
block of code in one thread or asyncio task.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import importlib
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import schemas
from .device_hash import device_hash

__all__ = [
    "BACKENDS",
    "backend",
    "launch",
    "refuse_autograd",
    "register",
    "register_autograd",
    "report",
    "select_backend",
    "unavailable_reason",
]

BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")

# None where nothing was chosen for the block of code that runs.
_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("fastebm_backend", default=None)
_extension: Any = None
_cuda_library: str | None = None
_extension_missing = ""
_cuda_library_missing = "it was not built"
# What the CUDA library holds code for, as TORCH_CUDA_ARCH_LIST says it: "8.0 9.0+PTX". None where it does not say.
_cuda_images: str | None = None
# Triton's own list of supported hardware begins here. Its compiler takes older GPUs too, untested.
_TRITON_CAPABILITY = (8, 0)
_warned: set[str] = set()
# Functions that this package calls in the extension, besides operators.
_REQUIRED_SYMBOLS = ("active_variant", "build_facts", "hash_memory", "program_layout", "self_test", "use_large_pages")
_triton_found = importlib.util.find_spec("triton") is not None


def _load_extensions() -> None:
    """Load the compiled libraries. One that exists but does not load gives a warning with the reason, never a crash."""
    global _extension, _cuda_library, _extension_missing, _cuda_library_missing, _cuda_images
    try:
        _extension = importlib.import_module("fastebm._C")
    except ModuleNotFoundError:
        _extension_missing = "they were not built"
    except ImportError as error:
        _extension_missing = f"they don't load: {error}"
    else:
        lacking = [name for name in _REQUIRED_SYMBOLS if not hasattr(_extension, name)]
        if lacking := _without_kernel("cpp") + lacking:
            _extension, _extension_missing = None, _outdated(lacking)
    if _extension is not None:
        # FASTEBM_CPU is read here: within the first operator's parallel region an error would lose its message.
        try:
            _extension.active_variant()
        except RuntimeError as error:
            raise ValueError(f"FASTEBM_CPU: {error}") from None
    if _extension is None:
        warnings.warn(
            f"fastebm runs without its compiled operators ({_extension_missing}): plain PyTorch takes their place, "
            "which is right but several times slower. `fastebm build` compiles them (it needs a C++ compiler).",
            RuntimeWarning,
            stacklevel=2,
        )
    for library in sorted(Path(__file__).parent.parent.glob("_cuda*.so")):
        try:
            torch.ops.load_library(str(library))
            if lacking := _without_kernel("cuda"):
                _cuda_library_missing = _outdated(lacking)
                warnings.warn(
                    f"fastebm runs without its CUDA operators: {_cuda_library_missing}. `fastebm build` compiles them.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            else:
                _cuda_library, _cuda_images = str(library), _images_of(library)
        except OSError as error:  # torch says which library, its cause what that one lacks
            _cuda_library_missing = f"it does not load: {error.__cause__ or error}"
            warnings.warn(
                f"fastebm's CUDA operators don't load: {error.__cause__ or error} (`fastebm build` replaces them where "
                f"torch has CUDA; elsewhere delete {library})",
                RuntimeWarning,
                stacklevel=2,
            )


def _without_kernel(backend_name: str) -> list[str]:
    """Operators that a compiled backend should have and that no loaded library registers.

    A library that was built before an operator was added lacks it. Calling it would raise NotImplementedError in the
    middle of some work.
    """
    key = {"cpp": "CPU", "cuda": "CUDA"}[backend_name]
    return [
        name
        for name, kernel in schemas.KERNELS.items()
        if backend_name in kernel.backends
        and not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastebm_{backend_name}::{name}", key)
    ]


def _images_of(library: Path) -> str | None:
    """What a CUDA library says it was built for, or None for one that does not."""
    try:
        images = ctypes.CDLL(str(library)).fastebm_cuda_images
    except AttributeError:
        return None
    images.restype = ctypes.c_char_p
    return str(images().decode())


def _outdated(lacking: Sequence[str]) -> str:
    return f"they were built from other sources than this package's, without {', '.join(lacking)}"


_load_extensions()


def _interpreted() -> bool:
    """Whether Triton's interpreter runs; anything else that the variable may hold is none to Triton, too."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")


@functools.cache
def _triton_missing() -> str | None:
    """Why Triton can't be imported, or None."""
    if not _triton_found:
        return "Triton is not installed"
    try:
        importlib.import_module("triton")
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        return f"Triton is installed, but does not load: {' '.join(str(error).split()) or type(error).__name__}"
    return None


def _holds_code_for(images: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs code that was built for a list of architectures.

    Machine code runs on its own capability and on later ones of the same generation, with an "a" on its own alone.
    PTX is compiled for any later GPU by the driver. A name that is not a number, such as "Hopper", is given the benefit
    of the doubt: an image that lacks is then CUDA's error at the first launch.
    """
    for image in images.split():
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", image)
        if found is None:
            return True
        built = (int(found[1]), int(found[2]))
        later = capability[0] == built[0] and capability >= built
        if capability == built or (later and found[3] != "a") or (found[4] and not found[3] and capability >= built):
            return True
    return False


def _wrong_gpu(name: str, index: int | None) -> str | None:
    """Why a GPU's compute capability keeps backend `name` from it, or None; `index` None is the current GPU."""
    if index is None:
        if not torch.cuda.is_available():
            return None
        index = torch.cuda.current_device()
    return _wrong_capability(name, index)


@functools.cache
def _wrong_capability(name: str, index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    number = ".".join(map(str, capability))
    this_gpu = f"{torch.cuda.get_device_name(index)} has compute capability {number}"
    if name == "triton" and capability < _TRITON_CAPABILITY:
        return f"Triton supports {'.'.join(map(str, _TRITON_CAPABILITY))} and later, and {this_gpu}"
    if name == "cuda" and _cuda_images is not None and not _holds_code_for(_cuda_images, capability):
        return (
            f"fastebm's CUDA library was built for {_cuda_images}, and {this_gpu}; "
            f"`TORCH_CUDA_ARCH_LIST={number} fastebm build` builds it for this GPU"
        )
    return None


def unavailable_reason(name: str, device_type: str, index: int | None = None) -> str | None:
    """Why backend `name` can't run on `device_type` ("cpu" or "cuda"), or None when it can.

    `index` is that of the GPU; None is the current one.
    """
    if name == "reference":
        return None
    if name == "cpp":
        if device_type != "cpu":
            return f"it runs on the CPU, not on {device_type}"
        missing = f"the compiled operators are missing: {_extension_missing}; `fastebm build` compiles them"
        return None if _extension is not None else missing
    if name == "triton":
        if device_type not in ("cpu", "cuda"):
            return f"it does not run on {device_type}"
        if _triton_found and device_type == "cpu" and not _interpreted():
            return "on the CPU it needs Triton's interpreter (TRITON_INTERPRET=1 before the process starts)"
        return _triton_missing() or (_wrong_gpu(name, index) if device_type == "cuda" else None)
    if device_type != "cuda":
        return f"it runs on a CUDA GPU, not on {device_type}"
    if _cuda_library is None:
        return f"fastebm's CUDA library is missing: {_cuda_library_missing}"
    return _wrong_gpu(name, index)


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run operators on one backend within a `with` block: "auto", "reference", "cpp", "triton" or "cuda".

    A backend that can't run on the tensors' device is an error at the first operator, not a fallback.

    The choice is a context variable: other threads and asyncio tasks keep theirs. What starts within the block takes
    it along only where Python copies the context, as for tasks and `asyncio.to_thread`; a new thread, the workers of a
    `ThreadPoolExecutor` and processes that are spawned start with the choice of the process, while a forked process
    (workers of a DataLoader on Linux) goes on with that of the thread that forked it. The derivatives of our operators
    run on the backend of their forward pass, also in autograd's own threads.

    Raises:
        ValueError: for another name.
        RuntimeError: where the block is left in another thread or task than it was entered in.

    Example:
        >>> import fastebm
        >>> with fastebm.ops.backend("reference"):
        ...     noise = fastebm.ops.normal((2, 3), seed=0)
    """
    entered = _override.set(_checked(name, "backend"))
    try:
        yield
    finally:
        try:
            _override.reset(entered)
        except ValueError:
            raise RuntimeError(
                f"the block of backend({name!r}) was left in another thread or task than it was entered in"
            ) from None


def program_layout(itemsize: int) -> tuple[int, int]:
    """(layout, outputs in a panel) of a program's weights as the C++ operators read them; see `instructions.Layout`."""
    layout: tuple[int, int] = _extension.program_layout(itemsize)
    return layout


def has_matrix_units() -> bool:
    """Whether the C++ operators use the CPU's matrix units for bfloat16."""
    return _extension is not None and _extension.active_variant() == "amx"


def content_hash(tensors: Sequence[Tensor]) -> int | None:
    """A hash of the contents of tensors, or None where hashing would cost more than it saves.

    That is for tensors on the CPU that are not contiguous, or without the C++ operators, and on other devices than CPU
    and GPU. The host waits once for each GPU.
    """
    ranges, on_devices = [], dict[torch.device, list[Tensor]]()
    for tensor in tensors:
        if tensor.layout is not torch.strided or tensor.is_quantized or not (tensor.is_cpu or tensor.is_cuda):
            return None
        if tensor.is_cuda:
            on_devices.setdefault(tensor.device, []).append(tensor)
        elif _extension is None or not tensor.is_contiguous():
            return None
        else:
            ranges.append((tensor.data_ptr(), tensor.numel() * tensor.itemsize))
    found: int = _extension.hash_memory(ranges) if ranges else 0
    for of_device in on_devices.values():
        sizes = tuple(tensor.numel() * tensor.itemsize for tensor in of_device)
        found = hash((found, sizes, int(device_hash(of_device))))
    return found


def use_large_pages(tensor: Tensor) -> None:
    """Ask the system for large pages behind a tensor that nothing was written to yet. It may ignore this."""
    if tensor.is_cpu and _extension is not None:
        _extension.use_large_pages(tensor.data_ptr(), tensor.numel() * tensor.itemsize)


def select_backend(device_type: str, double: bool = False, kernel: str | None = None, index: int | None = None) -> str:
    """The backend that runs an operator on `device_type` for float32 and narrower types, or for float64 where `double`.

    `kernel` is the one of `schemas.KERNELS` that is to run, where not all backends have it. `index` is that of the GPU;
    None is the current one.

    Raises:
        RuntimeError: where the backend asked for can't run there.
    """
    asked = _override.get() or _checked(os.environ.get("FASTEBM_BACKEND") or "auto", "FASTEBM_BACKEND")
    if asked != "auto":
        reason = unavailable_reason(asked, device_type, index)
        if reason is None and asked != "reference" and kernel and asked not in schemas.KERNELS[kernel].backends:
            reason = f"{kernel} has no {asked} kernel; it has {', '.join(schemas.KERNELS[kernel].backends)}"
        if reason is None and double and asked in ("triton", "cuda"):
            reason = "it has no float64; use the reference or cpp"
        if reason is not None:
            raise RuntimeError(f"backend {asked!r} was asked for but can't run: {reason}")
        return asked
    candidates = ("cpp",) if device_type == "cpu" else ("cuda", "triton")
    left_out = []
    for name in () if double and device_type != "cpu" else candidates:
        if kernel is not None and name not in schemas.KERNELS[kernel].backends:
            continue
        if unavailable_reason(name, device_type, index) is None:
            break
        left_out.append(name)
    else:
        name = "reference"
    for other in left_out:
        broken = _triton_missing() if other == "triton" and _triton_found else None
        if device_type == "cuda" and (reason := broken or _wrong_gpu(other, index)):
            _warn_once(f"backend {other!r} is left out, {name!r} takes its place: {reason}")
    return name


def refusal_of_programs(device: torch.device) -> str:
    """Why fused programs can't run on a device, or would run by the reference alone on a GPU; "" where they run.

    Instruction by instruction, the reference is slower than PyTorch's operations and autograd.
    """
    try:
        chosen = select_backend(device.type, kernel="run_program", index=device.index)
    except RuntimeError as error:
        return str(error)
    only_reference = device.type == "cuda" and chosen == "reference"
    return (unavailable_reason("triton", device.type, device.index) or "") if only_reference else ""


def _warn_once(message: str) -> None:
    if message not in _warned:
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        _warned.add(message)  # not where the warning was an error


def runs_compiled(kernel: str) -> bool:
    """Whether `kernel` runs in C++ on the CPU now: the extension is there, and no other backend was asked for."""
    try:
        return select_backend("cpu", kernel=kernel) == "cpp"
    except RuntimeError:
        return False


def launch(name: str, out: Tensor, *arguments: Any) -> None:
    """Run kernel `name` of `schemas.KERNELS` on the backend chosen for `out`."""
    if _plain_cpu and out.is_cpu and _override.get() is None:
        # The usual case skips the choice of a backend, which costs a step on tiny images 2 microseconds.
        return _COMPILED["cpp"][name](out, *arguments)
    backend_name = select_backend(out.device.type, out.dtype == torch.float64, name, out.device.index)
    if backend_name in _COMPILED:
        _COMPILED[backend_name][name](out, *arguments)
    elif backend_name == "triton":
        with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
            _python_kernel(f"fastebm.ops.triton.{schemas.KERNELS[name].subject}", name)(out, *arguments)
    else:
        _python_kernel(f"fastebm.ops.{schemas.KERNELS[name].subject}", f"reference_{name}")(out, *arguments)


_COMPILED: dict[str, dict[str, Callable[..., None]]] = {
    name: {k: getattr(namespace, k).default for k, kernel in schemas.KERNELS.items() if name in kernel.backends}
    for name, namespace in (("cpp", torch.ops.fastebm_cpp), ("cuda", torch.ops.fastebm_cuda))
}
_plain_cpu = _extension is not None and (os.environ.get("FASTEBM_BACKEND") or "auto") == "auto"
_python_kernels: dict[tuple[str, str], Callable[..., None]] = {}


def _python_kernel(module: str, function: str) -> Callable[..., None]:
    if (module, function) not in _python_kernels:
        _python_kernels[module, function] = getattr(importlib.import_module(module), function)
    return _python_kernels[module, function]


def register(name: str, *, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function implements public operator `name` on the CPU and on CUDA.

    Args:
        fake: gives empty outputs of the right shape, dtype and layout.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for key in ("CPU", "CUDA"):
            schemas.LIBRARY.impl(name, function, key)
        torch.library.register_fake(f"fastebm::{name}", fake, lib=schemas.LIBRARY)
        return function

    return decorate


def register_autograd(name: str, derivative: Callable[..., Any], setup_context: Callable[..., None] | None) -> None:
    """`torch.library.register_autograd` for public operator `name`.

    The derivative runs on the backend that was chosen around the operator's call, because autograd may run it in a
    thread of its own, where the caller's choice is not seen.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.chosen_backend = _override.get()
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    def on_the_backend(ctx: Any, *gradients: Any) -> Any:
        with contextlib.nullcontext() if ctx.chosen_backend is None else backend(ctx.chosen_backend):
            return derivative(ctx, *gradients)

    torch.library.register_autograd(f"fastebm::{name}", on_the_backend, setup_context=setup, lib=schemas.LIBRARY)


def refuse_autograd(name: str, *tensors: Tensor | None) -> None:
    """A clear error where autograd would record an operator that has no derivative.

    Called by the implementation rather than registered for autograd's dispatch key: another pass through Python would
    cost 5 microseconds a call.
    """
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"fastebm::{name} has no derivative, but was given a tensor that requires grad. "
                    "Call it under torch.no_grad(), or detach its inputs."
                )


def report() -> dict[str, Any]:
    """Which backend runs where, and how it was built: the facts that `fastebm info` prints.

    Returns:
        "cpu" and "cuda": the backend that operators take there now, and what keeps a GPU from the others, or why none;
        "cpu_variant": the instruction set of the C++ operators;
        "self_test": "passed" or what is wrong with the compiled random numbers; "extension", "cuda_extension": the
        libraries' files; "cuda_images": the compute capabilities that the CUDA library was built for;
        "build": facts of the build; "triton": its version or None.
    """
    facts: dict[str, Any] = {"cpu_variant": None, "self_test": None, "extension": None, "build": None}
    facts["cuda_extension"] = _cuda_library
    facts["cuda_images"] = _cuda_images
    facts["triton"] = None
    if _triton_found:
        from importlib.metadata import PackageNotFoundError, version

        with contextlib.suppress(PackageNotFoundError):
            facts["triton"] = version("triton")
    if _extension is not None:
        facts["cpu_variant"] = _extension.active_variant()
        facts["self_test"] = _extension.self_test() or "passed"
        facts["extension"] = _extension.__file__
        facts["build"] = _extension.build_facts()
    for device_type in ("cpu", "cuda"):
        try:
            facts[device_type] = select_backend(device_type)
        except RuntimeError as error:
            facts[device_type] = str(error)
    if not torch.cuda.is_available():
        facts["cuda"] = "no GPU"
    elif facts["cuda"] in BACKENDS:
        reasons = {name: _wrong_gpu(name, None) for name in ("cuda", "triton")}
        facts["cuda"] += "".join(f"; not {name}: {reason}" for name, reason in reasons.items() if reason)
    return facts
