"""The table of activations: its formulas against autograd, its numbers and those of programs against csrc."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import torch

from fastebm import build_extension as build
from fastebm.ops.activations import (
    ACTIVATION_TABLE,
    ACTIVATIONS,
    PROGRAM_ACTIVATIONS,
    activation,
    activation_code,
    program_derivative,
    tail_activation,
)
from fastebm.ops.instructions import Buffer, Epilogue, EpilogueOp, Header, Instruction, Kind, Layout, Segment
from fastebm.ops.options import StepOptions


def names_of(file: str, kind: str, name: str) -> list[str]:
    """The names that an `enum class`, or the struct of that name, lists in a C++ header."""
    text = re.sub(r"//[^\n]*", "", (build.source_folder() / file).read_text())
    body = re.search(rf"{kind} {name}\b[^{{]*{{([^}}]*)}}", text)
    assert body is not None, f"{file} has no {kind} {name}"
    if kind == "enum class":
        return [word.strip() for word in body[1].split(",")]
    members = [re.sub(r"^\s*[\w:<>]+\s", "", declaration.strip()) for declaration in body[1].split(";")]
    return [word.strip() for member in members for word in member.split(",") if word.strip()]


def test_numbers_of_activations():
    assert names_of("activations.h", "enum class", "Activation") == [row.name for row in ACTIVATION_TABLE]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Layout", [layout.name.lower() for layout in Layout]),
        ("Kind", [kind.name.lower() for kind in Kind]),
        ("EpilogueOp", [op.name.lower() for op in EpilogueOp]),
    ],
)
def test_numbers_of_programs(name, expected):
    assert names_of("cpu/program.h", "enum class", name) == expected


@pytest.mark.parametrize(
    ("struct", "row"),
    [("BufferRow", Buffer), ("InstructionRow", Instruction), ("EpilogueRow", Epilogue), ("SegmentRow", Segment)],
)
def test_rows_of_programs(struct, row):
    assert names_of("cpu/program.h", "struct", struct) == [field.name for field in fields(row)]


def test_header_of_programs():
    listed = names_of("cpu/program.h", "struct", "ProgramHeader")
    assert listed[:5] == ["version", "buffers", "instructions", "epilogues", "segments"]
    assert listed[5:-1] == [field.name for field in fields(Header)]


def test_options_of_a_step():
    assert names_of("step_options.h", "struct", "StepOptions") == [*StepOptions._fields]


def test_position_is_the_number():
    for number, name in enumerate(PROGRAM_ACTIVATIONS):
        assert ACTIVATION_TABLE[number].name == name
    for name in ACTIVATIONS:
        assert ACTIVATION_TABLE[activation_code(name)[0]].name == name


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_are_those_of_autograd(name):
    x = torch.linspace(-6, 6, 48, dtype=torch.float64, requires_grad=True)
    number, parameter = activation_code(name)
    (first,) = torch.autograd.grad(activation(x, name).sum(), x, create_graph=True)
    torch.testing.assert_close(tail_activation(x, number, parameter, order=1), first)
    second = torch.autograd.grad(first.sum(), x)[0] if first.requires_grad else torch.zeros_like(x)
    torch.testing.assert_close(tail_activation(x, number, parameter, order=2), second)


@pytest.mark.parametrize("name", PROGRAM_ACTIVATIONS)
def test_derivatives_of_programs(name):
    number = PROGRAM_ACTIVATIONS.index(name)
    row = ACTIVATION_TABLE[number]
    parameters = [0.7, 1.3, 0.9][: row.num_parameters]
    low = 0.5 if name in ("sqrt", "rsqrt") else -6
    x = torch.linspace(low, 6, 48, dtype=torch.float64, requires_grad=True)
    result = row.function(x, *parameters)
    (expected,) = torch.autograd.grad(result.sum(), x)
    torch.testing.assert_close(program_derivative(x, number, parameters, of_result=False), expected)
    if row.backward_of_result is not None:
        torch.testing.assert_close(program_derivative(result, number, parameters, of_result=True), expected)
    else:
        with pytest.raises(ValueError, match="by its result"):
            program_derivative(result, number, parameters, of_result=True)


def test_the_block_tail_lacks_those_of_programs():
    with pytest.raises(ValueError, match="no activation tanh"):
        tail_activation(torch.zeros(1), PROGRAM_ACTIVATIONS.index("tanh"), 0.0, order=1)
