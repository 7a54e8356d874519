"""The program that docs/how-it-works/compiler.md prints is the one that the compiler makes."""

from __future__ import annotations

import torch

from fastebm.compiler.capture import capture
from fastebm.compiler.cost_model import Machine
from fastebm.compiler.rewrites import FORWARD, WITHOUT_POLYPHASE, build_gradient_program, rewritten, simplify
from tests.compiler.networks import ResidualNet
from tests.compiler.printed_program import PAGE, energy_of, filled
from tests.compiler.small_programs import by_autograd, run


def test_the_page_is_what_the_code_prints():
    page = PAGE.read_text()
    assert filled(page) == page, "python -m tests.compiler.printed_program fills the page"
    assert filled(page.replace("| `silu` |", "| `other` |")) == page


def test_the_printed_energy_keeps_its_numbers():
    energy = energy_of(PAGE.read_text()).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    program = build_gradient_program(capture(energy, energy, x), Machine(), WITHOUT_POLYPHASE)
    for found, expected in zip(run(program, x), by_autograd(energy, x), strict=True):
        torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-10, atol=1e-12)


def test_rewrites_one_after_the_other_end_at_the_simplified_program():
    net = ResidualNet(4).eval()
    machine = Machine()
    program = capture(net, net, torch.zeros(2, 3, 16, 16))
    times = [machine.time(program)]
    made = list(rewritten(program, machine, FORWARD))
    assert len(made) > 3
    for _, better in made:
        times.append(machine.time(better))
    assert times == sorted(times, reverse=True)
    assert len({*times}) == len(times)
    assert [node.name for node in made[-1][1]] == [node.name for node in simplify(program, machine, FORWARD)]
