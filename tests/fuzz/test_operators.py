"""Raw operators with wrong arguments: programs with wrong numbers, and every C++ kernel with wrong tensors.

A try takes a right call, spoils something of it, and makes it. The call must refuse in one line, or give what the
reference gives for the same arguments. Tries run in processes of their own, so that a crash or an endless loop is seen
as what it is. `python -m tests.fuzz.test_operators 17 1` makes try 17 alone.
"""

from __future__ import annotations

import faulthandler
import functools
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
# Seconds for one try, which takes milliseconds, and longer where sanitizers watch.
LIMIT = 120
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError)
BIG = (2**15, 2**20, 2**31 - 1, 2**31, 2**32, 2**40, 2**47, 2**62, 2**63 - 1, -(2**63), -(2**40))


def test_wrong_arguments(tries: int) -> None:
    pytest.importorskip("fastebm._C", reason="the C++ operators are not built")
    found, at = [], 0
    while at < tries:
        made, failures = batch_of_tries(at, tries - at)
        found += failures
        at = made
    assert not found, f"{len(found)} of {tries} tries failed, each by itself again by the command given:\n" + "\n".join(
        found
    )


def batch_of_tries(first: int, count: int) -> tuple[int, list[str]]:
    """(the next try, what failed) of one process, which ends at a crash."""
    command = [sys.executable, "-m", "tests.fuzz.test_operators", str(first), str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    begun = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("try ")]
    failures = [line.removeprefix("FAILED ") for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    if done.returncode == 0:
        return first + count, failures
    assert begun, f"no try began: {done.stderr[-2000:]}"
    how = f"ended the process with {done.returncode}: {reason_of_end(done.stderr)}"
    return begun[-1] + 1, [*failures, f"{alone(begun[-1])}: {how}"]


def reason_of_end(stderr: str) -> str:
    told = [line for line in stderr.splitlines() if re.search(r"ERROR: |runtime error|Timeout|Fatal|Error", line)]
    return (told or stderr.splitlines()[-1:] or ["no word"])[0][:300]


def alone(number: int) -> str:
    return f"python -m tests.fuzz.test_operators {number} 1"


# One process --------------------------------------------------------------------------------------------------------


def make_tries(first: int, count: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for number in range(first, first + count):
        print(f"try {number}", flush=True)
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        rng = random.Random(f"operators {number}")
        kind = rng.random()
        wrong = (program_try if kind < 0.5 else weight_try if kind < 0.7 else kernel_try)(rng)
        if wrong is not None:
            print(f"FAILED {alone(number)}: {wrong}", flush=True)
    faulthandler.cancel_dump_traceback_later()


def refused(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return call(), None
    except REFUSALS as error:
        return None, error


def unclear(error: Exception) -> str | None:
    """What is wrong with a refusal of ours: it has more than one line. Those of torch's dispatcher are its own."""
    lines = str(error).strip().splitlines()
    return None if len(lines) == 1 or isinstance(error, NotImplementedError) else f"{len(lines)} lines: {lines[:2]}"


# Programs -----------------------------------------------------------------------------------------------------------


@functools.cache
def lowered_programs() -> dict[str, Any]:
    """Functions that give a `CompiledProgram` for numbers of so many bytes, by name."""
    from tests.ops.small_lowered_programs import ProgramBuilder
    from tests.ops.test_program import PLAIN_KINDS, operands

    made: dict[str, Any] = {}
    for name, kind in PLAIN_KINDS.items():
        builder = ProgramBuilder((5, 7, 6))
        made[name] = builder.finish(kind(builder))
    for name in ("add of larger pixels", "rows", "multiply one channel for all"):
        from tests.ops.test_program import gather

        builder = ProgramBuilder((6, 7, 5))
        steps = operands(builder)[name]
        made[name] = builder.finish(builder.stored(gather(6, 7, 5), *steps))
    return made


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(8, 40, 3, 2, 1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(640, 1),
        ),
        (3, 8, 8),
    ),
    "padding beyond the kernel": (
        lambda: nn.Sequential(nn.Conv2d(4, 3, (2, 1), 1, (0, 3)), nn.SiLU(), nn.Flatten(), nn.Linear(315, 1)),
        (4, 6, 15),
    ),
    "pool": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 17, 3, dilation=2),
            nn.ELU(),
            nn.AvgPool2d(2),
            nn.Conv2d(17, 5, 1),
            nn.Flatten(),
            nn.Linear(20, 1),
        ),
        (2, 8, 8),
    ),
    "vectors": (lambda: nn.Sequential(nn.Linear(6, 33), nn.Tanh(), nn.Linear(33, 9), LogSumExp()), (6,)),
}


class LogSumExp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.logsumexp(1)


@functools.cache
def compiled(name: str, size: int, variant: str) -> Any:
    """A program for the variant that is active."""
    from fastebm.compiler.capture import capture
    from fastebm.compiler.cost_model import Machine
    from fastebm.compiler.lowering import lower
    from fastebm.compiler.rewrites import WITHOUT_POLYPHASE, build_gradient_program
    from fastebm.ops import CompiledProgram

    if name not in NETS:
        return lowered_programs()[name].fused(size, "cpu")
    torch.manual_seed(0)
    make, sample = NETS[name]
    net, x = make().eval().requires_grad_(False), torch.zeros(2, *sample)
    machine = Machine.of(torch.device("cpu"), torch.float32 if size == 4 else torch.bfloat16)
    with torch.no_grad():
        found = lower(build_gradient_program(capture(net, net, x), machine, WITHOUT_POLYPHASE), size)
        program = CompiledProgram(found.program, torch.device("cpu"))
        program.refresh(*found.constants())
    return program


@functools.cache
def variants() -> tuple[str, ...]:
    from fastebm import _C

    known = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
    return known[: known.index(_C.best_variant()) + 1]


def program_try(rng: random.Random) -> str | None:
    from fastebm import _C

    size, variant = rng.choice((4, 2)), rng.choice(variants())
    name = rng.choice((*NETS, *NETS, *lowered_programs()))
    _C.set_variant(variant)
    torch.set_num_threads(rng.choice((1, 1, 2)))
    program, batch = compiled(name, size, variant), rng.choice((1, 2, 3, 17))
    x = torch.randn(batch, *program.lowered.sample, generator=torch.Generator().manual_seed(rng.randrange(99)))
    code, constants = program.code(batch).clone(), list(program.constants)
    workspace = program.workspace
    part = rng.choice(("code",) * 6 + ("constants", "workspace", "x"))
    what = f"{name}, {size} bytes, {variant}, batch {batch}, "
    if part == "code":
        code, how = spoiled_code(rng, code)
    elif part == "constants":
        at = rng.randrange(len(constants))
        how = "fewer constants"
        if rng.random() < 0.2:
            constants = constants[:at]
        else:
            constants[at], how = spoiled(rng, constants[at], [x, workspace])
            how = f"constant {at} {how}"
    elif part == "workspace":
        workspace, how = spoiled(rng, workspace, [x])
        how = f"workspace {how}"
    else:
        x, how = spoiled(rng, x, [workspace])
        how = f"x {how}"
    return verdict_on_program(rng, what + how, x, code, constants, workspace, part)


def verdict_on_program(
    rng: random.Random, what: str, x: Tensor, code: Tensor, constants: list[Tensor], workspace: Tensor, part: str
) -> str | None:
    from fastebm import ops
    from fastebm.ops.program_check import checked_program

    poison(workspace)
    with torch.no_grad(), ops.backend("cpp"):
        if rng.random() < 0.7:
            found, error = refused(lambda: torch.ops.fastebm.run_program(x, code, constants, workspace))
        else:
            found, error = refused(lambda: raw_chain(rng, x, code, constants, workspace))
    rule, _ = (None, None) if part != "code" else refused(lambda: checked_program(code))
    if error is not None:
        if unclear(error):
            return f"{what}: {unclear(error)}"
        about_code = re.search(r"code (is not|has|does not)", str(error)) is not None
        if part == "code" and about_code and rule is not None:
            return f"{what}: C++ refuses what Python takes: {error}"
        return None
    if part == "code" and rule is None and x.numel():
        return f"{what}: C++ takes what Python refuses"
    with torch.no_grad(), ops.backend("reference"):
        wanted, error = refused(lambda: torch.ops.fastebm.run_program(x, code, constants, workspace))
    if error is not None:
        return None if x.numel() == 0 else f"{what}: taken, but the reference says {error}"
    tolerance = 2e-3 if code[7] == 4 else 6e-2
    for name, ours, right in zip(("energies", "gradient"), found, wanted, strict=True):
        if ours.shape != right.shape or differ(ours, right, tolerance):
            numbers = f"{ours.flatten()[:4].tolist()}, {right.flatten()[:4].tolist()}"
            return f"{what}: {name} differ from the reference's: {numbers}"
    return None


def raw_chain(
    rng: random.Random, x: Tensor, code: Tensor, constants: list[Tensor], workspace: Tensor
) -> tuple[Tensor, Tensor]:
    """Energies and gradient by one step of the chain's kernel: x - gradient is what it leaves in the place of x."""
    energies, gradient = torch.full((1, len(x)), torch.nan), torch.full(x.shape, torch.nan)
    state, key = x.clone(memory_format=torch.contiguous_format) if readable(x) else x, torch.tensor([0, 0, 0])
    options = (torch.tensor([[0.0, 0.0]]), key, torch.tensor([0]))
    rest = [None if "Tensor?" in kind or "float?" in kind else 0.0 for kind in chain_options()[3:]]
    torch.ops.fastebm_cpp.run_chain(energies, state, gradient, code, constants, workspace, *options, *rest)
    return energies[0], gradient


@functools.cache
def chain_options() -> list[str]:
    from fastebm.ops.options import StepOptions, schema_of

    return schema_of(StepOptions).split(", ")


def poison(workspace: Tensor) -> None:
    """NaN in whatever an earlier call left."""
    if workspace.dtype == torch.uint8 and readable(workspace) and workspace.numel():
        torch.frombuffer(memory_of(workspace), dtype=torch.uint8).fill_(255)


def memory_of(tensor: Tensor) -> Any:
    storage = tensor.untyped_storage()
    return (torch.empty(0, dtype=torch.uint8).set_(storage)).numpy().data  # type: ignore[call-overload]


def differ(ours: Tensor, right: Tensor, tolerance: float) -> bool:
    """Beyond rounding, where the right value is finite and far from overflow."""
    counts = right.isfinite() & (right.abs() < 1e30)
    ours, right = ours[counts], right[counts]
    scale = max(1.0, float(right.abs().max())) if right.numel() else 1.0
    return bool(((ours - right).abs() > tolerance * scale).any() or ours.isnan().any())


def spoiled_code(rng: random.Random, code: Tensor) -> tuple[Tensor, str]:
    """One to three numbers changed, most often to something near or to another number of the program."""
    kind, numbers = rng.random(), code.tolist()
    if kind < 0.04:
        cut = rng.randrange(len(numbers))
        return code[:cut].clone(), f"code cut to {cut} numbers"
    if kind < 0.06:
        return code[::2], "every other number of code"
    if kind < 0.08:
        return code[:1].expand(len(numbers)), "code expanded from one number"
    changes = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(numbers))
        old = numbers[at]
        ways = (old + 1, old - 1, 0, -1, 1, 2 * old, old // 2, rng.choice(numbers), rng.randrange(200), rng.choice(BIG))
        numbers[at] = max(-(2**63), min(2**63 - 1, rng.choice(ways)))
        changes.append(f"code[{at}] = {numbers[at]} for {old}")
    return torch.tensor(numbers, dtype=torch.int64), ", ".join(changes)


# Gradients of weights -----------------------------------------------------------------------------------------------


def weight_try(rng: random.Random) -> str | None:
    from fastebm import _C
    from fastebm.ops.instructions import encode
    from fastebm.ops.weight_gradients import checked_tasks, encode_tasks, reference_weight_gradients
    from tests.ops.weight_workspaces import Lying, program_of, workspace_of

    size, variant, images = rng.choice((4, 2)), rng.choice(variants()), rng.choice((1, 3, 4))
    _C.set_variant(variant)
    torch.set_num_threads(rng.choice((1, 1, 2)))
    shapes = [(rng.choice((3, 20, 33)), rng.choice((1, 4)), rng.choice((1, 5))) for _ in range(3)]
    program = program_of(shapes, Lying(size, 2, 2, margin=rng.choice((0, 1)), dense=rng.random() < 0.5))
    tasks = [random_task(rng, result, shapes) for result in range(3)]
    results = [noise(rng, *task.result_shape()) for task in tasks]
    workspace = workspace_of(program, [noise(rng, images, *shape) for shape in shapes])
    given: list[Any] = [noise(rng, images), results, encode(program), encode_tasks(tasks), workspace]
    part = rng.choice(("tasks",) * 8 + ("code",) * 3 + ("results", "factors", "workspace"))
    if part == "tasks":
        table, how = spoiled_code(rng, given[3].flatten())
        given[3] = table.view(-1, given[3].shape[1]) if len(table) % given[3].shape[1] == 0 else table
    elif part == "code":
        given[2], how = spoiled_code(rng, given[2])
    elif part == "results":
        at = rng.randrange(3)
        results[at], how = spoiled(rng, results[at], [*results[:at], *results[at + 1 :], workspace])
    else:
        at = 0 if part == "factors" else 4
        given[at], how = spoiled(rng, given[at], [*results, workspace])
    what = f"weight_gradients, {size} bytes, {variant}, {part} {how}"
    alike = [r.clone() if readable(r) else r for r in results]
    _, error = refused(lambda: torch.ops.fastebm_cpp.weight_gradients(*given))
    rule, _ = (None, None) if part != "tasks" else refused(lambda: checked_tasks(given[2], given[3]))
    if error is not None:
        # An argument of another kind is the dispatcher's to refuse, in its own way.
        if re.search(r"csrc", str(error)) is not None and unclear(error):
            return f"{what}: {unclear(error)}"
        if part == "tasks" and rule is not None and "tasks that can't run" in str(error):
            # How many results there are is for the call to say.
            return None if "it has result" in str(error) else f"{what}: C++ refuses what Python takes: {error}"
        return None
    if part == "tasks" and rule is None:
        return f"{what}: C++ takes what Python refuses"
    _, error = refused(lambda: reference_weight_gradients(given[0], alike, *given[2:]))
    if error is not None:
        return None if given[0].numel() == 0 else f"{what}: taken, but the reference says {error}"
    for number, (ours, right) in enumerate(zip(results, alike, strict=True)):
        if readable(ours) and differ(ours, right, 1e-4):
            return f"{what}: result {number} differs from the reference's"
    return None


def random_task(rng: random.Random, result: int, shapes: list[tuple[int, int, int]]) -> Any:
    """A task that reads what buffers of such shapes hold."""
    from fastebm.ops.weight_gradients import WeightKind, WeightTask

    kind, gradient, source = rng.choice(tuple(WeightKind)), rng.randrange(3), rng.randrange(3)
    (channels, height, width), (inputs, *_) = shapes[gradient], shapes[source]
    fields: dict[str, int] = {"gradient_channel": rng.randrange(channels)}
    fields |= {"out": rng.randrange(1, channels - fields["gradient_channel"] + 1)}
    if kind == WeightKind.CONVOLUTION:
        fields |= {"source_buffer": source, "source_channel": rng.randrange(inputs)}
        fields |= {"inner": rng.randrange(1, inputs - fields["source_channel"] + 1)}
        fields |= {f"{name}_{axis}": rng.choice((1, 1, 2, 3)) for name in ("kernel", "stride") for axis in "yx"}
        fields |= {f"pad_{axis}": rng.choice((0, 1, -1)) for axis in "yx"}
    elif kind == WeightKind.PRODUCT:
        fields |= {"source_buffer": gradient, "source_channel": rng.randrange(channels), "source_broadcast": 1}
    if kind != WeightKind.CONVOLUTION:
        fields |= {"per_pixel": rng.choice((0, 1))}
    return WeightTask(kind, result, gradient, height=height, width=width, **fields)


# Kernels ------------------------------------------------------------------------------------------------------------


def noise(rng: random.Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rng.randrange(99))).to(dtype)


def tail_arguments(rng: random.Random) -> dict[str, Any]:
    dtype = rng.choice((torch.float32, torch.float64, torch.bfloat16, torch.float16))
    shape = (rng.choice((1, 3)), rng.choice((1, 5)), rng.choice((2, 5, 8)), rng.choice((2, 7)))
    pooled = (*shape[:2], shape[2] // 2, shape[3] // 2)
    images = [noise(rng, *shape, dtype=dtype) for _ in range(4)]
    small = [noise(rng, *pooled, dtype=dtype) for _ in range(4)]
    beta = torch.tensor([0.3], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return {"images": images, "small": small, "rest": (beta, 0, 1.0)}


def kernel_arguments(rng: random.Random, name: str) -> list[Any]:
    """Right arguments of a kernel."""
    key, ids, batch = torch.tensor([7, 3, 0]), torch.tensor([5]), rng.choice((1, 3))
    if name in ("normal", "uniform"):
        dtype = rng.choice((torch.float32, torch.float64, torch.bfloat16))
        return [torch.zeros(batch, 3, 11, dtype=dtype), key, rng.choice((ids, torch.arange(batch))), 2]
    if name == "langevin_step":
        shape = rng.choice(((batch, 7), (batch, 3, 10), (batch, 2, 3, 4)))
        tensors = [noise(rng, *shape) for _ in range(3)]
        schedule = rng.choice((torch.rand(3, 2), torch.rand(2, batch, 2)))
        rest = [None if "?" in kind else 0.0 for kind in chain_options()[3:]]
        return [*tensors, schedule, key, ids, *rest]
    if name in ("kinetic_step", "kinetic_energy"):
        return kinetic_arguments(rng, name, batch)
    if name in ("mala_step", "metropolis"):
        return metropolis_arguments(rng, name, batch)
    if name == "mclmc_step":
        shape = rng.choice(((batch, 7), (batch, 3, 10), (batch, 2, 3, 4)))
        x, momentum, grad = (noise(rng, *shape) for _ in range(3))
        coefficients = rng.choice((torch.rand(1, 4), torch.rand(batch, 4))).double()
        masses = torch.rand(rng.choice((1, batch)), rng.choice((1, grad[0].numel())))
        return [x, momentum, torch.zeros(batch, 2).double(), grad, coefficients, key, ids, rng.choice((None, masses))]
    if name.startswith("expand_blend"):
        dtype = rng.choice((torch.float32, torch.float64, torch.bfloat16))
        beta = torch.tensor(0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        return [*(noise(rng, 2, 3, 4, 5, dtype=dtype) for _ in range(3)), beta]
    tail = tail_arguments(rng)
    (a, b, c, _), (p, q, r, _), rest = tail["images"], tail["small"], tail["rest"]
    if name == "block_tail":
        return [p, a, b, q, *rest]
    if name == "block_tail_backward":
        return [a, b, p, q, c, *rest]
    return [p, a, b, c, q, r, tail["images"][3], *rest]


def kinetic_arguments(rng: random.Random, name: str, batch: int) -> list[Any]:
    dtype, elements = rng.choice((torch.float32, torch.float64)), rng.choice((7, 1030))
    x, velocity, grad = (noise(rng, batch, elements, dtype=dtype) for _ in range(3))
    sizes = (rng.choice((1, batch)), rng.choice((1, elements)))
    mass = rng.choice((None, noise(rng, *sizes, dtype=dtype).abs()))
    if name == "kinetic_energy":
        return [velocity, torch.zeros(batch, dtype=torch.float64), mass]
    work = rng.choice((None, torch.zeros(batch, dtype=torch.float64)))
    schedule = rng.choice((torch.rand(3, 3), torch.rand(2, batch, 3)))
    address = (torch.tensor([7, 3, rng.choice((0, 1, 9))]), rng.choice((torch.tensor([5]), torch.arange(batch))))
    walls = rng.choice(((None, None), (-0.5, 0.5), (None, 0.5)))
    halves = rng.choice(((True, True), (True, False), (False, True)))
    return [x, velocity, work, grad, schedule, *address, mass, *walls, rng.choice((0, 1, 2)), *halves]


def metropolis_arguments(rng: random.Random, name: str, batch: int) -> list[Any]:
    dtype, elements = rng.choice((torch.float32, torch.float64)), rng.choice((7, 1030))
    x, grad, proposal, proposal_grad = (noise(rng, batch, elements, dtype=dtype) for _ in range(4))
    energies = rng.choice((dtype, torch.float64))
    energy, proposal_energy = (noise(rng, batch, dtype=energies) for _ in range(2))
    accepted, ratio = torch.zeros(batch, dtype=torch.bool), noise(rng, batch, dtype=torch.float64)
    address = (torch.tensor([7, 3, rng.choice((0, 1, 9))]), rng.choice((torch.tensor([5]), torch.arange(batch))))
    proposed = (proposal, proposal_energy, proposal_grad)
    if name == "metropolis":
        return [x, energy, grad, accepted, *proposed, ratio, *address]
    schedule = rng.choice((torch.rand(3, 2), torch.rand(2, batch, 2))) + 0.1
    options = (rng.choice((None, 0.5)), *rng.choice(((None, None), (-9.0, 9.0), (None, 9.0))))
    return [x, energy, grad, accepted, ratio, *proposed, schedule, *address, *options]


KERNELS = {  # how many outputs come first, with what lies between them
    "normal": 1,
    "uniform": 1,
    "langevin_step": 1,
    "kinetic_step": 3,
    "kinetic_energy": 2,
    "mala_step": 5,
    "metropolis": 4,
    "mclmc_step": 3,
    "block_tail": 1,
    "block_tail_backward": 3,
    "block_tail_double_backward": 2,
    "expand_blend": 1,
    "expand_blend_backward": 2,
}


def kernel_try(rng: random.Random) -> str | None:
    from fastebm import _C
    from fastebm.ops import schemas

    name = rng.choice(tuple(KERNELS))
    _C.set_variant(rng.choice(variants()))
    arguments = kernel_arguments(rng, name)
    at = rng.randrange(len(arguments))
    old = arguments[at]
    if isinstance(old, Tensor):
        arguments[at], how = spoiled(rng, old, [t for t in arguments if isinstance(t, Tensor) and t is not old])
    elif old is None:
        arguments[at] = rng.choice((0.5, torch.ones(()), arguments[0], torch.ones(2, 2, dtype=torch.bool)))
        how = "given"
    else:
        arguments[at] = rng.choice((-1, 12, 255, 256, 2**40, 0.0, float("nan"), None, 10**30))
        how = f"= {arguments[at]}"
    what = f"{name}, argument {at} {how}"
    alike = [t.clone() if isinstance(t, Tensor) and readable(t) else t for t in arguments]
    _, error = refused(lambda: getattr(torch.ops.fastebm_cpp, name)(*arguments))
    if error is not None:
        # An argument of another kind is the dispatcher's to refuse, in its own way.
        ours = re.search(r"csrc", str(error)) is not None
        return f"{what}: {unclear(error)}" if ours and unclear(error) else None
    module = __import__(f"fastebm.ops.{schemas.KERNELS[name].subject}", fromlist=["x"])
    _, error = refused(lambda: getattr(module, f"reference_{name}")(*alike))
    if error is not None:
        return None  # the reference is stricter where PyTorch is
    for k, (ours, right) in enumerate(zip(arguments[: KERNELS[name]], alike[: KERNELS[name]], strict=True)):
        if isinstance(ours, Tensor) and readable(ours) and differ(ours.double(), right.double(), 2e-2):
            return f"{what}: output {k} differs from the reference's"
    return None


def readable(tensor: Tensor) -> bool:
    plain = tensor.is_cpu and tensor.layout == torch.strided
    return plain and (tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0)


def spoiled(rng: random.Random, tensor: Tensor, others: list[Tensor]) -> tuple[Tensor, str]:
    """The tensor with another dtype, shape, layout, place or device."""
    flat = tensor.flatten()

    def emptied() -> Tensor:
        copy = tensor.clone()
        copy.untyped_storage().resize_(0)
        return copy

    def narrower() -> Tensor:
        d = rng.randrange(tensor.dim()) if tensor.dim() else None
        return tensor if d is None or not tensor.shape[d] else tensor.narrow(d, 0, tensor.shape[d] - 1)

    ways: dict[str, Callable[[], Tensor]] = {
        "in another dtype": lambda: tensor.to(rng.choice((torch.float64, torch.int8, torch.bfloat16, torch.int64))),
        "complex": lambda: tensor.to(torch.complex64),
        "empty": lambda: flat[:0],
        "one number": lambda: flat[:1].reshape(()) if flat.numel() else flat,
        "flat": lambda: flat,
        "narrower": narrower,
        "narrower, contiguous": lambda: narrower().contiguous(),
        "transposed": lambda: tensor.transpose(0, -1) if tensor.dim() else tensor,
        "expanded from one number": lambda: flat[:1].expand(tensor.shape) if flat.numel() else tensor,
        "overlapping itself": lambda: flat.as_strided(tensor.shape, (1,) * tensor.dim()),
        "with one more dimension": lambda: tensor[None],
        "longer": lambda: torch.cat([tensor, tensor]) if tensor.dim() else tensor,
        "of other memory": lambda: rng.choice(others) if others else tensor,
        "inside of other memory": lambda: inside(rng, tensor, others),
        "without memory": emptied,
        "on meta": lambda: tensor.to("meta"),
        "sparse": lambda: tensor.to_sparse(),
        "channels last": lambda: tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor,
        "moved by one": lambda: torch.cat([flat[:1], flat])[1:].reshape(tensor.shape) if flat.numel() else tensor,
    }
    way = rng.choice(tuple(ways))
    found, error = refused(ways[way])
    return (tensor, f"as it is ({way} is not for it)") if error is not None else (found, way)


def inside(rng: random.Random, tensor: Tensor, others: list[Tensor]) -> Tensor:
    """A tensor like this one in the memory of another argument."""
    hosts = [t for t in others if t.is_cpu and t.dtype == tensor.dtype and t.numel() >= tensor.numel()]
    return rng.choice(hosts).flatten()[: tensor.numel()].view(tensor.shape) if hosts else tensor


if __name__ == "__main__":
    make_tries(int(sys.argv[1]), int(sys.argv[2]))
