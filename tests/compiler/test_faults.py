"""Where the compiler itself fails, users are told: by a warning with the cause, or by an error with engine "fused"."""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastebm
from fastebm.compiler import candidates, capture, weight_gradient, weight_program
from fastebm.compiler import energy_gradient as make_gradient
from fastebm.compiler.executor import CompiledExecutor
from fastebm.compiler.faults import FaultWarning
from fastebm.compiler.lanes import LaneExecutor
from fastebm.compiler.lanes import executor as lanes
from fastebm.compiler.lanes.decompositions import DECOMPOSITIONS, activations
from fastebm.ops import CompiledLanes, CompiledProgram


class ToolError(Exception):
    """As other compilers raise them."""


ERRORS = (
    TypeError("a list where a tuple was expected"),
    RuntimeError("Triton Error [CUDA]: out of resources"),
    KeyError("buffer"),
    AssertionError(),
    ToolError("at 3:4:\n    x = y"),
)


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail


# What fails: the object, its attribute, and whether lane programs run, which come first where they do.
STAGES = {
    "lowering of lanes": (lanes, "lower", True),
    "constants of lanes": (LaneExecutor, "refresh", True),
    "run of lanes": (CompiledLanes, "__call__", True),
    "import": (capture, "_program", False),
    "rewrites": (candidates, "build_gradient_program", False),
    "lowering": (candidates, "lower", False),
    "layout": (CompiledProgram, "__init__", False),
    "folding": (CompiledExecutor, "refresh", False),
    "packing": (CompiledProgram, "refresh", False),
    "planning": (CompiledProgram, "code", False),
    "run": (CompiledProgram, "__call__", False),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 16, 1), nn.Flatten(0)
    ).eval()


def images() -> Tensor:
    return torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1)) - 0.5


@pytest.fixture
def broken(monkeypatch) -> Callable[[str, Exception], None]:
    def breaking(stage: str, error: Exception) -> None:
        owner, name, with_lanes = STAGES[stage]
        monkeypatch.setattr(owner, name, failing(error))
        if not with_lanes:
            monkeypatch.setattr(candidates, "_lanes_take", lambda key: False)

    return breaking


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_fault_is_said_once_with_its_cause_and_place(broken, stage, error):
    broken(stage, error)
    energy, x = net(), images()
    gradient = make_gradient(energy)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        energies, slope = gradient(x)
        gradient(x)
        gradient(x[:3])
    assert [w.category for w in found] == [FaultWarning]
    text = str(found[0].message)
    assert text.startswith("the compiler failed for Sequential")
    cause = ": ".join(filter(None, [type(error).__name__, str(error).split("\n")[0]]))
    assert f"{cause} (" in text
    assert "fastebm/compiler/" in text
    assert found[0].filename == __file__
    expected = make_gradient(energy, engine="autograd")(x)
    torch.testing.assert_close((energies, slope), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_is_an_error_where_a_program_was_asked_for(broken, stage):
    broken(stage, error := TypeError("a list where a tuple was expected"))
    gradient = make_gradient(net(), engine="fused")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"engine is 'fused', but .*a list where a tuple was expected") as raised:
            gradient(images())
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("runs", [CompiledLanes, CompiledProgram])
def test_a_kernel_that_computes_other_numbers_is_a_fault(monkeypatch, runs):
    """Another program of the energy has autograd's numbers, so that this is no refusal."""
    if runs is CompiledProgram:
        monkeypatch.setattr(candidates, "_lanes_take", lambda key: False)
    call = runs.__call__

    def wrong(self, *arguments):
        energies, slope = call(self, *arguments)
        return energies, 1.5 * slope

    monkeypatch.setattr(runs, "__call__", wrong)
    energy, x = net(), images()
    gradient = make_gradient(energy)
    with pytest.warns(FaultWarning, match=r"program: ArithmeticError: its gradients differ from autograd's"):
        found = gradient(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient(x)
    torch.testing.assert_close(found, make_gradient(energy, engine="autograd")(x), rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"engine is 'fused', but .*its gradients differ from autograd's"):
        make_gradient(energy, engine="fused")(x)


def test_an_energy_of_the_whole_batch_is_no_fault():
    """No program has autograd's numbers."""
    x = images()
    gradient = make_gradient(lambda x: x.square().sum((1, 2, 3)) * len(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("error", FaultWarning)
        gradient(x[:1])
        gradient(x)
    assert "not fused" in repr(gradient)


def test_rounding_of_an_energy_near_0_is_no_fault():
    """Where it is a sum of large terms, autograd's own numbers change with the last place of x."""
    columns = torch.linalg.qr(torch.randn(48, 5, generator=torch.Generator().manual_seed(0)))[0]
    x = (torch.randn(6, 5, generator=torch.Generator().manual_seed(1)) @ columns.mT).reshape(6, 3, 4, 4)

    def off_subspace(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return 50 * (flat - flat @ columns @ columns.mT).square().sum(1)

    gradient = make_gradient(off_subspace)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FaultWarning)
        gradient(x)
        gradient(x + 1)  # off the subspace


def test_a_fault_in_a_decomposition_is_told_from_an_energy_that_has_no_trace(monkeypatch):
    """What the energy raises within a trace is a refusal; what our rules raise by a mistake of their own is none."""
    energy, x = nn.Sequential(nn.Flatten(), nn.Linear(48, 1), nn.LogSigmoid(), nn.Flatten(0)), images()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FaultWarning)
        make_gradient(energy, engine="fused")(x)

    place = activations.TABLE[torch.ops.aten.log_sigmoid_forward.default]
    assert place.__code__.co_filename == activations.__file__
    broken = compile("def broken(*given):\n    return len(None)\n", activations.__file__, "exec")
    namespace: dict[str, Any] = {}
    exec(broken, namespace)
    monkeypatch.setitem(DECOMPOSITIONS, torch.ops.aten.log_sigmoid_forward.default, namespace["broken"])
    with pytest.warns(FaultWarning, match=r"TypeError: object of type 'NoneType' has no len\(\).*activations\.py"):
        make_gradient(energy)(x)

    def branching(x: Tensor) -> Tensor:
        return (x if float(x.detach().flatten()[0]) > 0 else 2 * x).square().sum((1, 2, 3))

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        make_gradient(branching)(x[:1])
    assert not [w for w in said if w.category is FaultWarning]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_program_that_fails_in_a_later_chain_is_made_anew_or_said(monkeypatch, error):
    monkeypatch.setattr(candidates, "_lanes_take", lambda key: False)
    energy, x = net(), images()
    gradient = make_gradient(energy)
    gradient(x)
    with torch.no_grad():
        energy[0].weight.mul_(2)
    monkeypatch.setattr(CompiledProgram, "refresh", failing(error))
    with pytest.warns(FaultWarning, match=type(error).__name__):
        found = gradient(x)
    torch.testing.assert_close(found, make_gradient(energy, engine="autograd")(x), rtol=1e-4, atol=1e-6)


def test_a_warning_that_is_an_error_is_one_in_every_call(monkeypatch):
    """As in benchmarks: a call that is tried again does not run by autograd in silence."""
    monkeypatch.setattr(candidates, "_lanes_take", lambda key: False)
    monkeypatch.setattr(candidates, "lower", failing(TypeError("a list where a tuple was expected")))
    monkeypatch.setattr(weight_program, "lower", failing(TypeError("a list where a tuple was expected")))
    x, without_program = images(), make_gradient(lambda x: torch.fft.rfft2(x).abs().sum((1, 2, 3)))
    gradient, of_weights = make_gradient(net()), weight_gradient(net())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for _ in range(3):
            with pytest.raises(FaultWarning, match="a list where a tuple was expected"):
                gradient(x)
            with pytest.raises(FaultWarning, match="a list where a tuple was expected"):
                of_weights(x, torch.ones(4))
            with pytest.raises(RuntimeWarning, match="runs by autograd instead of a fused program"):
                without_program(x)


def test_a_folder_beside_the_package_is_the_users(broken):
    """Its name begins as the package's, and so do those of packages around PyTorch."""
    broken("lowering", TypeError("a list where a tuple was expected"))
    for installed in (fastebm, torch):
        file = f"{Path(installed.__file__).parent}_experiments/chain.py"
        code = compile("def call(gradient, x):\n    return gradient(x)\n", file, "exec")
        namespace: dict[str, Any] = {}
        exec(code, namespace)
        with pytest.warns(FaultWarning) as found:
            namespace["call"](make_gradient(net()), images())
        assert [w.filename for w in found] == [file]


OF_WEIGHTS = {
    "capture": (capture, "_program"),
    "rewrites": (weight_program, "build_weight_program"),
    "lowering": (weight_program, "lower"),
    "layout": (CompiledProgram, "__init__"),
    "packing": (CompiledProgram, "refresh"),
    "run": (CompiledProgram, "__call__"),
    "kernel": (weight_program, "weight_gradients_"),
    "back to the parameters": (sys.modules["fastebm.compiler.weight_gradient"], "_through"),
}


@pytest.mark.parametrize("stage", OF_WEIGHTS)
def test_faults_of_the_gradients_of_weights(monkeypatch, stage):
    owner, name = OF_WEIGHTS[stage]
    energy, x = fastebm.models.CoarseToFineEnergy(8, base_width=4).eval(), torch.rand(3, 3, 8, 8)
    cotangent = torch.ones(3)
    expected = weight_gradient(energy, engine="autograd")(x, cotangent)
    error = ToolError("no registers left")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(error))
        found = weight_gradient(energy)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            energies, gradients = found(x, cotangent)
            found(x, cotangent)
        assert [w.category for w in said] == [FaultWarning]
        assert "ToolError: no registers left (" in str(said[0].message)
        assert "fastebm/compiler/" in str(said[0].message)
        assert said[0].filename == __file__
        with pytest.raises(RuntimeError, match=r"engine is 'fused', but .*no registers left") as raised:
            weight_gradient(energy, engine="fused")(x, cotangent)
        assert raised.value.__cause__ is error
    torch.testing.assert_close((energies, gradients), expected)


def test_a_backend_that_can_not_run_programs_is_no_fault():
    """It was asked for by its name; PyTorch's operations run, and say so."""
    x = images().double().float()
    gradient = make_gradient(net())
    with warnings.catch_warnings(), fastebm.ops.backend("cuda"):
        warnings.simplefilter("error")
        gradient(x)
    assert "PyTorch operations: backend 'cuda' was asked for but can't run" in gradient.describe()


# Functions that catch any exception, and what becomes of it.
BROAD = {
    "compiler/candidates.py _lane_candidate": "CompilerFaultError",
    "compiler/candidates.py candidates": "CompilerFaultError",
    "compiler/capture.py _export": "a refusal: the energy's own code ran in PyTorch's exporter",
    "compiler/checks.py unless_it_raises": "the energy's own code, at points that its owner did not ask for",
    "compiler/compiled_gradient.py _refreshed": "met again by the program made anew, where it is a fault",
    "compiler/compiled_gradient.py _tried": "CompilerFaultError",
    "compiler/compiled_gradient.py timings": "torch.compile's own reason, in the table",
    "compiler/device_graphs.py capture": "raised",
    "compiler/faults.py as_faults": "CompilerFaultError",
    "compiler/frozen_weights.py _release": "raised when all flags are restored",
    "compiler/frozen_weights.py frozen_weights": "raised when all flags are restored",
    "compiler/lanes/executor.py of": "a refusal, or raised where it is our own",
    "compiler/lanes/trace.py multiplies": "the exporter tells, which runs the energy next",
    "compiler/measuring.py as_in_a_chain": "measured without a graph; a chain says why it has none",
    "compiler/process_state.py __enter__": "raised",
    "ops/triton/compiling.py _compiled": "raised, unless CPython's parser failed, which is asked again",
    "sampling/graphs.py advance_": "FaultWarning",
}


def test_nothing_else_catches_any_exception():
    """What swallows exceptions of any kind hides faults. A new place needs a reason."""
    package = Path(fastebm.__file__).parent
    found = set()
    for folder in ("compiler", "ops", "sampling", "models", "losses.py", "rng.py"):
        top = package / folder
        for path in [top] if top.suffix else sorted(top.rglob("*.py")):
            for function in ast.walk(ast.parse(path.read_text())):
                if isinstance(function, ast.FunctionDef):
                    for handler in [each for each in ast.walk(function) if isinstance(each, ast.ExceptHandler)]:
                        kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
                        if any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds):
                            found.add(f"{path.relative_to(package).as_posix()} {function.name}")
    assert found == BROAD.keys()
