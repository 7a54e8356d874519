"""Running programs: memory that is planned, reused and never shared with what a caller holds."""

import gc

import torch
import torch.nn.functional as F

from fastebm.compiler.autodiff import differentiate
from fastebm.compiler.capture import capture
from fastebm.compiler.executor import MAX_PLANS, AtenExecutor
from fastebm.compiler.operations import Activation, Convolution, LinearCombination, Multiply, Permute
from fastebm.compiler.rewrites import build_gradient_program
from fastebm.models import CoarseToFineEnergy
from tests.compiler.small_programs import (
    Small,
    assert_close,
    assert_computes,
    by_autograd,
    energy_of,
    run,
    tensor,
    value,
)


def ready(program) -> AtenExecutor:
    executor = AtenExecutor(program, torch.float64)
    executor.refresh()
    return executor


def test_results_are_fresh_and_inputs_untouched():
    weight = tensor(4, 4, 3, 3)
    small = Small(4, 6, 6)
    for _ in range(3):
        small.then(Activation("silu"))
        small.then(Convolution(value(weight), padding=(1, 1)))
    executor = ready(differentiate(small.energy()))
    xs = [tensor(2, 4, 6, 6, seed=seed) for seed in range(3)]
    kept = [x.clone() for x in xs]
    first = [executor(x) for x in xs]
    again = [executor(x) for x in xs]
    for a, b, x, k in zip(first, again, xs, kept, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
        assert torch.equal(x, k)


def test_a_result_that_is_read_later_is_not_overwritten():
    """Every term is read twice, by operations that could write over it at the first reading."""
    small = Small(5)
    a = small.then(Activation("tanh"))
    b = small.then(Activation("silu"), a)
    c = small.then(LinearCombination((1.0, 1.0)), a, b)
    d = small.then(LinearCombination((2.0, 1.0, 0.5)), b, c, a)
    small.then(LinearCombination((1.0, 1.0, 1.0, 1.0)), d, c, b, a)

    def features(x):
        a = torch.tanh(x)
        b = F.silu(a)
        c = a + b
        d = 2 * b + c + 0.5 * a
        return d + c + b + a

    x = tensor(3, 5)
    for found, wanted in zip(
        run(differentiate(small.energy()), x), by_autograd(lambda x: energy_of(features(x)), x), strict=True
    ):
        assert_close(found, wanted)


def test_a_view_of_what_could_be_overwritten_is_read_first():
    small = Small(5, 5)
    h = small.then(Activation("tanh"), "x")
    small.then(Multiply(), h, small.then(Permute((1, 0)), h))
    h = small.then(Activation("silu"))
    small.then(LinearCombination((1.0, 1.0)), small.then(Permute((1, 0)), h), h)

    def features(x):
        h = torch.tanh(x)
        h = F.silu(h * h.transpose(1, 2))
        return h + h.transpose(1, 2)

    assert assert_computes([small.energy()], features, tensor(3, 5, 5))


def test_a_sum_that_takes_the_place_of_a_term_keeps_the_others():
    small = Small(5)
    terms = [
        small.then(Activation("tanh"), "x"),
        small.then(Activation("silu"), "x"),
        small.then(Activation("relu"), "x"),
    ]
    small.then(LinearCombination((2.0, 1.0, -0.5)), *terms)
    x = tensor(3, 5)
    (found,) = run(small.features(), x)
    assert_close(found, 2 * torch.tanh(x) + F.silu(x) - 0.5 * F.relu(x))


def test_new_weights_go_to_the_old_places():
    weight = tensor(4, 4, 1, 1)
    small = Small(4, 5, 5)
    small.then(Convolution(value(weight)))
    executor = ready(small.features())
    x = tensor(2, 4, 5, 5)
    places = {v: t.data_ptr() for v, t in executor._weights.items()}
    weight.mul_(3)
    assert_close(executor(x)[0], F.conv2d(x, weight / 3))
    executor.refresh()
    assert_close(executor(x)[0], F.conv2d(x, weight))
    assert {v: t.data_ptr() for v, t in executor._weights.items()} == places


def test_plans_of_few_batches_are_kept():
    small = Small(4, 5, 5)
    small.then(Activation("silu"))
    executor = ready(differentiate(small.energy()))
    for count in (4, 3, 4, 2, 5, 1):
        x = tensor(count, 4, 5, 5)
        assert executor(x)[1].shape == x.shape
        assert len(executor._of_thread.plans) <= MAX_PLANS


def test_the_workspace_does_not_grow_with_depth():
    """Activations that aren't kept share buffers, however many there are."""

    def workspace(depth: int) -> int:
        small = Small(4, 8, 8)
        for _ in range(depth):
            small.then(Convolution(value(tensor(4, 4, 3, 3)), padding=(1, 1)))
            small.then(Activation("silu"))
        executor = ready(differentiate(small.energy()))
        executor(tensor(2, 4, 8, 8))
        return executor.workspace()

    assert workspace(3) == workspace(9) > 0


def test_a_gradient_at_256_needs_less_than_half_of_autograds_memory():
    """Bytes that live at one time, results of convolutions included, as PyTorch's profiler counts them."""
    net = CoarseToFineEnergy(256, base_width=4).eval().requires_grad_(False)
    x = tensor(1, 3, 256, 256).float()
    executor = AtenExecutor(build_gradient_program(capture(net, net, x)), torch.float32)
    executor.refresh()

    def by_program():
        executor._of_thread.plans.clear()
        executor(x)

    assert peak(by_program) <= 0.5 * peak(lambda: by_autograd(net, x))


def peak(function) -> int:
    """The largest number of bytes that were allocated, beyond those before."""
    function()
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest
