"""Heads as research code writes them: views of images that are summed, scaled and mapped are fused programs too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastebm import ops
from fastebm.compiler import operations as op
from fastebm.compiler.autodiff import differentiate
from fastebm.compiler.capture import capture
from fastebm.compiler.lowering import lower
from fastebm.compiler.rewrites import WITHOUT_POLYPHASE, build_gradient_program
from fastebm.compiler.view_sinking import sink_views
from tests.compiler.small_programs import Small, assert_close, by_autograd, run, tensor, value

C = tensor(6, seed=1)
ROW = tensor(1, 6, seed=2)
MAP = tensor(6, 7, 8, seed=3)
FLAT = tensor(2, 6 * 7 * 8, seed=4)
MATRIX = tensor(4, 6, seed=5)

HEADS = {
    "view, sum": lambda h: h.view(h.shape[0], -1).sum(1),
    "view of channels, sum": lambda h: h.view(h.shape[0], h.shape[1], -1).sum(2) @ C,
    "view of channels, mean": lambda h: h.view(h.size(0), h.size(1), -1).mean(2) @ C,
    "view of channels, kept": lambda h: h.view(h.size(0), 6, -1).sum(2, keepdim=True).view(-1, 6) @ C,
    "flatten, mean": lambda h: h.flatten(2).mean(-1) @ C,
    "flatten, sums": lambda h: h.flatten(2).sum(-1).sum(-1),
    "flatten, linear": lambda h: F.linear(h.flatten(1), FLAT).square().sum(1),
    "sums of axes": lambda h: h.sum((1, 2, 3)) + h.sum([-1, -2]).sum(1) + h.mean(dim=(1, 2, 3)),
    "sums in turn": lambda h: h.sum(-1).sum(-1).sum(-1) + h.sum(1).square().sum((1, 2)),
    "means in turn": lambda h: h.mean(3).mean(2) @ C,
    "global pool, view": lambda h: F.adaptive_avg_pool2d(h, 1).view(h.size(0), -1) @ C,
    "global pool, squeeze": lambda h: F.adaptive_avg_pool2d(h, 1).squeeze(-1).squeeze(-1) @ C,
    "global pool, squeeze of all": lambda h: F.adaptive_avg_pool2d(h, 1).squeeze() @ C,
    "global pool, indices": lambda h: F.adaptive_avg_pool2d(h, 1)[:, :, 0, 0] @ C,
    "pool of the whole size": lambda h: F.avg_pool2d(h, h.size()[2:]).flatten(1) @ C,
    "pool of the length": lambda h: F.adaptive_avg_pool1d(h.flatten(2), 1).flatten(1) @ C,
    "pool of all": lambda h: F.adaptive_avg_pool1d(h.flatten(1), 1).squeeze(1),
    "channels last, sum": lambda h: h.permute(0, 2, 3, 1).sum((1, 2)) @ C,
    "channels last, linear": lambda h: F.linear(h.permute(0, 2, 3, 1), ROW).mean((1, 2)).squeeze(-1),
    "channels last, scaled": lambda h: (F.silu(h.permute(0, 2, 3, 1)) * C + C.square()).sum((1, 2, 3)),
    "channels last, flat": lambda h: F.linear(h.permute(0, 2, 3, 1).flatten(1), FLAT).square().sum(1),
    "channels last, rows": lambda h: (h.permute(0, 2, 3, 1).reshape(h.size(0), -1, 6) @ C).sum(1),
    "tokens, linear": lambda h: F.linear(h.flatten(2).transpose(1, 2), MATRIX).square().mean((1, 2)),
    "tokens, logsumexp": lambda h: -F.linear(h.flatten(2).mT, MATRIX).logsumexp(2).mean(1),
    "tokens, centred": lambda h: (h.flatten(2).mT - h.flatten(2).mT.mean(1, keepdim=True)).square().mean((1, 2)),
    "tokens, parts": lambda h: (h.flatten(2).mT[:, :, :3] * h.flatten(2).mT[:, :, 3:]).sum((1, 2)),
    "rows of channels": lambda h: (MATRIX @ h.flatten(2)).square().mean((1, 2)),
    "one number from the left": lambda h: (C @ h.flatten(2)).square().sum(1),
    "moved": lambda h: h.movedim(1, -1).mean((1, 2)) @ C + h.swapaxes(1, 2).sum((2, 3)).square().sum(1),
    "transposed": lambda h: h.transpose(1, 3).sum((1, 2)) @ C,
    "map of weights": lambda h: (h * MAP).sum((1, 2, 3)) + (h.flatten(1) * MAP.flatten()).sum(1),
    "flat map of weights": lambda h: (h.flatten(2) * MAP.flatten(1)).sum((1, 2)),
    "flat channels of weights": lambda h: (h.flatten(2) * C[:, None]).sum(2).sum(1),
    "squares": lambda h: 0.5 * (h**2).flatten(start_dim=1).sum(dim=-1) + h.flatten(2).square().sum(2).sum(1),
    "einsum of all": lambda h: torch.einsum("bchw->b", h) + torch.einsum("bchw->bc", h) @ C,
    "einsum of weights": lambda h: torch.einsum("bchw,c->b", h, C) + torch.einsum("bchw,chw->b", h, MAP),
    "einsum of channels": lambda h: torch.einsum("bchw,oc->bohw", h, MATRIX).square().mean((1, 2, 3)),
    "stack of two sums": lambda h: torch.stack([h.sum((1, 2, 3)), h.mean((1, 2, 3))], 1).sum(1),
    "two pools side by side": lambda h: torch.cat([h.mean((2, 3)), h.flatten(2).sum(2)], 1) @ torch.cat([C, C]),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_fused_programs(name):
    weight = tensor(6, 3, 3, 3, seed=6)

    def energy(x: Tensor) -> Tensor:
        return HEADS[name](torch.tanh(F.conv2d(x, weight, padding=1)))

    x = tensor(5, 3, 7, 8, seed=7)
    expected = by_autograd(energy, x)
    captured = capture(energy, None, x)
    for found, wanted in zip(run(differentiate(captured), x), expected, strict=True):
        assert_close(found, wanted)
    lowered = lower(build_gradient_program(captured, passes=WITHOUT_POLYPHASE), 8)
    fused = ops.CompiledProgram(lowered.program, x.device)
    fused.refresh(*lowered.constants())
    with torch.no_grad():
        for found, wanted in zip(fused(x), expected, strict=True):
            assert_close(found, wanted)


VIEWS = {
    "split": ((6, 4, 5), (op.Reshape((2, 3, 4, 5)), op.Activation("tanh"), op.Permute((1, 0, 2, 3)))),
    "split in two": ((4, 3, 5), (op.Reshape((2, 6, 5)), op.Activation("tanh"), op.Sum((1,)))),
    "axes of length 1": ((1, 4, 5), (op.Permute((1, 2, 0)), op.Activation("tanh"), op.Reshape((4, 1, 5)))),
    "a turned image": ((2, 4, 5), (op.Permute((2, 1, 0)), op.Activation("tanh"), op.Reshape((5, 8)))),
    "a turned vector": ((2, 4, 5), (op.Permute((2, 1, 0)), op.Reshape((40,)), op.Activation("tanh"))),
    "one number": ((2, 4, 5), (op.Permute((2, 1, 0)), op.Sum((0, 1, 2)), op.Reshape(()))),
    "stretched": ((2, 4, 5), (op.Permute((2, 0, 1)), op.Sum((0, 2)), op.Broadcast((5, 2, 4)))),
    "stretched to another length": ((2, 4, 5), (op.Permute((2, 0, 1)), op.Sum((0, 2)), op.Broadcast((7, 2, 4)))),
    "stretched after a reshape": (
        (2, 4, 5),
        (op.Reshape((2, 20)), op.Sum((1,)), op.Reshape((2,)), op.Reshape((2, 1)), op.Broadcast((2, 20))),
    ),
    "a part of merged axes": ((2, 4, 5), (op.Reshape((2, 20)), op.Slice(1, 3, 9))),
    "padded": ((2, 4, 5), (op.Permute((1, 2, 0)), op.Pad((1, 0, 0), (0, 0, 2)))),
    "softmax": ((2, 4, 5), (op.Permute((1, 2, 0)), op.Softmax(2))),
    "a linear map of rows": ((2, 4, 5), (op.Permute((0, 2, 1)), op.Linear(value(tensor(3, 4))))),
    "a linear map of one channel": ((1, 4, 5), (op.Reshape((20, 1)), op.Linear(value(tensor(3, 1))), op.Sum((0,)))),
    "scaled": ((2, 4, 5), (op.Permute((1, 2, 0)), op.Affine(value(tensor(5, 1)), value(tensor(4, 1, 2))))),
}


@pytest.mark.parametrize("name", VIEWS)
def test_every_view_stays_what_it_was(name):
    sample, operations = VIEWS[name]
    small = Small(*sample)
    for operation in operations:
        small.then(operation)
    program, x = small.features(), tensor(3, *sample)
    (found,), (wanted,) = run(sink_views(program), x), run(program, x)
    assert found.shape == wanted.shape
    assert_close(found, wanted)


def test_images_with_other_users_stay_where_they_are():
    small = Small(2, 4, 5)
    image = small.then(op.Activation("tanh"))
    tokens = small.then(op.Permute((1, 2, 0)), image)
    active = small.then(op.Activation("silu"), tokens)
    back = small.then(op.Permute((2, 0, 1)), active)
    small.then(op.Multiply(), image, back)
    sunk = sink_views(small.features())
    assert [type(node.operation) for node in sunk] == [op.Input, op.Activation, op.Activation, op.Multiply]
    x = tensor(3, 2, 4, 5)
    assert_close(run(sunk, x)[0], run(small.features(), x)[0])


def test_energies_that_start_by_flattening_their_images_stay_linear_maps_of_vectors():
    x = tensor(3, 2, 4, 5)
    weight = tensor(7, 40)
    captured = capture(lambda x: F.linear(0.5 * x.flatten(1), weight).square().sum(1), None, x)
    assert [type(node.operation) for node in captured][:4] == [op.Input, op.Reshape, op.LinearCombination, op.Linear]
