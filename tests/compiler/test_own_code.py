"""Programs against the energy's own code: what moves an energy is noticed, what a program can't have is not fused."""

import dataclasses
import functools
import logging
import random
import types
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastebm import Langevin, ops
from fastebm.compiler import candidates, compiled_gradient, energy_gradient
from fastebm.compiler.fingerprint import covers

pytestmark = pytest.mark.skipif(not ops.backends.runs_compiled("run_lanes"), reason="the C++ operators do not run")


def states(count: int = 5, length: int = 4) -> Tensor:
    return torch.randn(count, length, generator=torch.Generator().manual_seed(3))


def mlp(length: int = 4, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(length, 16), nn.SiLU(), nn.Linear(16, 1)).eval()


@pytest.fixture
def captures(monkeypatch):
    """The programs that are made while a test runs."""
    made: list[object] = []
    original = candidates.candidates

    def counted(*arguments):
        made.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(compiled_gradient, "candidates", counted)
    return made


def assert_right(gradient, energy, x: Tensor) -> None:
    for found, wanted in zip(gradient(x), energy_gradient(energy, engine="autograd")(x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# ---- whatever an energy reads


@dataclasses.dataclass
class Config:
    beta: float = 1.0
    inner: types.SimpleNamespace = dataclasses.field(default_factory=lambda: types.SimpleNamespace(beta=1.0))


SETTINGS = {"beta": 1.0}
NUMBER = 1.0


class Slotted:
    __slots__ = ("beta",)

    def __init__(self):
        self.beta = 1.0


class Reads(nn.Module):
    """An energy times whatever `read` finds."""

    shared = 1.0

    def __init__(self, read):
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.config = Config()
        self.plain = torch.tensor(1.0)
        self.values = [1.0, {"beta": 1.0}]
        self.array = np.ones(3)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return (self.net(x).squeeze(1).square() + x.square().sum(1)) * self.read(self)


def _global_number(value: float) -> None:
    global NUMBER
    NUMBER = value


def cases() -> dict:
    """By name: what an energy reads, and what sets it to a number."""
    namespace, slotted, array, cell = types.SimpleNamespace(beta=1.0), Slotted(), np.ones(1), [1.0]
    closed = torch.tensor(1.0)
    generator = {"value": 1.0}

    class Lazy:
        @property
        def beta(self):
            return generator["value"]

    lazy = Lazy()
    return {
        "dataclass of a module": (lambda net: net.config.beta, lambda net, v: setattr(net.config, "beta", v)),
        "nested namespace": (lambda net: net.config.inner.beta, lambda net, v: setattr(net.config.inner, "beta", v)),
        "class attribute": (lambda net: net.shared, lambda net, v: setattr(type(net), "shared", v)),
        "plain tensor replaced": (lambda net: net.plain, lambda net, v: setattr(net, "plain", torch.tensor(v))),
        "plain tensor in place": (lambda net: net.plain, lambda net, v: net.plain.fill_(v)),
        "item of a plain tensor": (lambda net: net.plain.item(), lambda net, v: net.plain.fill_(v)),
        "list": (lambda net: net.values[0], lambda net, v: net.values.__setitem__(0, v)),
        "dict in a list": (lambda net: net.values[1]["beta"], lambda net, v: net.values[1].update(beta=v)),
        "array of a module": (lambda net: float(net.array.mean()), lambda net, v: net.array.fill(v)),
        "closed-over namespace": (lambda net: namespace.beta, lambda net, v: setattr(namespace, "beta", v)),
        "closed-over slots": (lambda net: slotted.beta, lambda net, v: setattr(slotted, "beta", v)),
        "closed-over array": (lambda net: float(array[0]), lambda net, v: array.fill(v)),
        "closed-over list": (lambda net: cell[0], lambda net, v: cell.__setitem__(0, v)),
        "closed-over tensor's item": (lambda net: closed.item(), lambda net, v: closed.fill_(v)),
        "global dict": (lambda net: SETTINGS["beta"], lambda net, v: SETTINGS.update(beta=v)),
        "global number": (lambda net: NUMBER, lambda net, v: _global_number(v)),
        "property": (lambda net: lazy.beta, lambda net, v: generator.update(value=v)),
        "default": (_default, lambda net, v: setattr(_default, "__defaults__", (v,))),
        "keyword default": (_keyword, lambda net, v: _keyword.__kwdefaults__.update(beta=v)),
        "environment": (_environment, lambda net, v: _ENVIRONMENT.update(beta=str(v))),
    }


_ENVIRONMENT = types.MappingProxyType({"beta": "1.0"}).copy()


def _environment(net) -> float:
    """Stands for what can't be found by looking: it is reached through a string."""
    import importlib

    return float(importlib.import_module(__name__).__dict__["_ENVIR" + "ONMENT"]["beta"])


def _default(net, beta=1.0) -> float:
    return beta


def _keyword(net, *, beta=1.0) -> float:
    return beta


@pytest.mark.parametrize("start", ["anywhere", "zeros"])
@pytest.mark.parametrize("name", cases())
def test_what_moves_an_energy_is_noticed(name, start):
    read, change = cases()[name]
    change_back = Reads(read)
    net = Reads(read)
    x = states() if start == "anywhere" else torch.zeros(5, 4)
    gradient = energy_gradient(net)
    try:
        for value in (1.0, 3.0, 0.5):
            change(net, value)
            assert_right(gradient, net, x)
            assert gradient.engine == "fused"
    finally:
        change(change_back, 1.0)


def test_an_energy_that_moves_in_every_chain_is_left_to_autograd_and_that_is_said_once(captures):
    clock = iter(range(1, 100))

    def energy(x):
        return x.square().sum(1) * next(clock)

    with pytest.warns(RuntimeWarning, match="runs by autograd.*it is random"):
        energy_gradient(energy)(states())
    values = {"beta": 0.0}

    def moving(x):
        return x.square().sum(1) * values["beta"]

    gradient = energy_gradient(moving)

    def many_chains():
        for values["beta"] in map(float, range(1, 14)):
            assert_right(gradient, moving, states())

    with pytest.warns(RuntimeWarning) as said:
        many_chains()
    assert len([w for w in said if "changed between each two" in str(w.message)]) == 1
    assert len(captures) <= 10


@pytest.mark.parametrize(
    "draw", [random.random, np.random.random, lambda: torch.rand(())], ids=["random", "np", "torch"]
)
def test_random_energies_are_not_frozen(draw):
    def energy(x):
        return (x + 0.002 * draw()).square().sum(1)

    gradient = energy_gradient(energy)
    with pytest.warns(RuntimeWarning, match="autograd"):
        energies = [gradient(states())[0] for _ in range(3)]
    assert gradient.engine == "autograd"
    assert not torch.equal(energies[0], energies[1])
    assert not torch.equal(energies[1], energies[2])


def test_a_counter_costs_one_capture_in_all(captures):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.global_step, self.losses = mlp(), 0, []

        def forward(self, x):
            return self.net(x)

    net = Counting()
    sampler = Langevin(net, 0.1, 0.1)
    for step in range(8):
        net.global_step = step
        net.losses.append(float(step))
        sampler.sample(states(), 5, seed=0)
    assert len(captures) == 2  # the second one shows that these change nothing
    assert sampler.gradient.engine == "fused"


def test_a_refused_energy_is_refused_once(captures):
    def energy(x):
        return x.square().sum(1) if x.sum() > 1e9 else x.pow(4).sum(1)

    gradient = energy_gradient(energy)
    with pytest.warns(RuntimeWarning, match="autograd"):
        gradient(states())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            gradient(states())
    assert len(captures) == 1


def test_covered_energies_are_not_evaluated_again():
    net = mlp()
    assert covers(net, net)
    assert covers(functools.partial(net), net)
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    assert not covers(net, net)
    net = mlp()
    net[1].register_forward_pre_hook(lambda *_: None)
    assert not covers(net, net)
    net = mlp()
    net.forward = net.forward
    assert not covers(net, net)
    assert not covers(Reads(lambda net: 1.0), Reads(lambda net: 1.0))
    assert not covers(lambda x: net(x), None)


def test_starts_that_say_nothing():
    """At zeros, energies and gradients are the same for any factor. What is found by looking is captured anew."""
    quadratic = types.SimpleNamespace(k=1.0)

    def visible(x):
        return 0.5 * quadratic.k * x.square().sum(1)

    def hidden(x):
        return 0.5 * _environment(None) * x.square().sum(1)

    def wall(x):
        return 10 * torch.relu(x.norm(dim=1) - quadratic.k).square()

    for energy, change, start in (
        (visible, lambda v: setattr(quadratic, "k", v), torch.zeros(500, 2)),
        (hidden, lambda v: _ENVIRONMENT.update(beta=str(v)), torch.zeros(500, 2)),
        (wall, lambda v: setattr(quadratic, "k", v), 0.1 * torch.ones(500, 2)),
    ):
        sampler = Langevin(energy, 0.05, 0.3)
        for value in (1.0, 3.0):
            change(value)
            wanted = Langevin(energy, 0.05, 0.3, engine="autograd").sample(start, 60, seed=0)
            torch.testing.assert_close(sampler.sample(start, 60, seed=0), wanted, rtol=1e-3, atol=1e-4)
            assert sampler.gradient.engine == "fused"
        change(1.0)


def test_one_large_energy_hides_no_change():
    setting = {"beta": 1.0}

    def energy(x):
        return x.square().sum(1) * float(_ENVIRONMENT["beta"]) + 1e-3 * x.pow(8).sum(1)

    x = states(40)
    x[7] *= 100
    gradient = energy_gradient(energy)
    try:
        for setting["beta"] in (1.0, 1.5):
            _ENVIRONMENT.update(beta=str(setting["beta"]))
            ours, wanted = gradient(x)[1], energy_gradient(energy, engine="autograd")(x)[1]
            assert ((ours - wanted).norm(dim=1) <= 1e-4 * wanted.norm(dim=1)).all()
    finally:
        _ENVIRONMENT.update(beta="1.0")


def test_energies_that_read_the_batch():
    starts = torch.zeros(1, 2)
    for energy in (
        lambda x: x.square().sum(1) / len(x) * 5,
        lambda x: x.square().sum(1) - 0.5 * (x - x.detach().mean(0)).square().sum(1),
        lambda x: x.square().sum(1) * torch.arange(1, len(x) + 1),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            found = Langevin(energy, 0.02, 0.3).sample(starts, 40, 0, num_chains=50)
        wanted = Langevin(energy, 0.02, 0.3, engine="autograd").sample(starts, 40, 0, num_chains=50)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for energy in (
        lambda x: x.square().sum(1) + 3 * (x - x.roll(1, 0)).square().sum(1),
        lambda x: (x - x[:1]).square().sum(1) + x.square().sum(1),
        lambda x: x.square().cumsum(0).sum(1),
    ):
        for engine in ("auto", "autograd"):
            sampler = Langevin(energy, 0.02, 0.2, engine=engine)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="chains would influence each other"):
                    sampler.sample(torch.ones(1, 2), 10, 0, num_chains=40)
    gradient = energy_gradient(lambda x: x.square().sum(1) * x.shape[0])
    with warnings.catch_warnings(), gradient.chain():
        warnings.simplefilter("ignore", RuntimeWarning)
        for count in (1, 4):
            x = states(count)
            torch.testing.assert_close(gradient(x)[1], 2 * count * x)


def test_settings_of_a_backward_pass_are_noticed():
    limit = {"value": 0.5}

    class Clip(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            return gradient.clamp(-limit["value"], limit["value"])

    gradient = energy_gradient(lambda x: Clip.apply(x).square().sum(1))
    for limit["value"] in (0.5, 5.0):
        assert float(gradient(10 * states())[1].abs().max()) == limit["value"]


def test_energies_that_differentiate_inside():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).eval()

    def score(x):
        y = x if x.requires_grad else x.clone().requires_grad_()
        return torch.autograd.grad(net(y).sum(), y, create_graph=True)[0].square().sum(1)

    gradient = energy_gradient(score)
    for _ in range(2):
        assert_right(gradient, score, states())


def test_numbers_in_lists_are_not_frozen():
    for make in (torch.tensor, torch.as_tensor):
        energy = functools.partial(_listed, make)
        gradient = energy_gradient(energy)
        with warnings.catch_warnings(), gradient.chain():
            warnings.simplefilter("ignore", RuntimeWarning)
            for scale in (1.0, 3.0):
                assert_right(gradient, energy, scale * torch.ones(1, 3))


def _listed(make, x: Tensor) -> Tensor:
    return x.square().sum(1) * make([x.detach().norm()])


def test_hooks_of_all_modules_are_noticed():
    net = mlp()
    gradient = energy_gradient(net)
    gradient(states())
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, output: output * 1.5)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            assert_right(gradient, net, states())
    finally:
        handle.remove()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_short_whole_numbers_wrap_around_as_in_pytorch(dtype):
    def energy(x, c):
        return x.square().sum(1) * (c - 1)

    gradient = energy_gradient(energy)
    with warnings.catch_warnings(), gradient.chain():
        warnings.simplefilter("ignore", RuntimeWarning)
        for rows in ((1, 2), (0, 1)):
            c = torch.tensor(rows, dtype=dtype)
            torch.testing.assert_close(gradient(states(2), (c,))[1], 2 * states(2) * (c - 1)[:, None])


def test_conditions_that_are_written_within_a_chain():
    c, x = torch.zeros(5, 4), states()
    gradient = energy_gradient(lambda x, c: (x - c).square().sum(1))
    with gradient.chain():
        for _ in range(3):
            torch.testing.assert_close(gradient(x, (c,))[1], 2 * (x - c))
            c.data.add_(1)


# ---- gradients that are not those of the operations


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Scaled(torch.autograd.Function):
    """The identity, with another gradient only beyond 10: no check at small states would see it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() > 10, 0 * gradient, gradient)


def hooked(x: Tensor) -> Tensor:
    h = x * 1
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient.clamp(-20, 20))
    return h.square().sum(1)


def backward_hook() -> nn.Module:
    net = mlp()
    net[0].register_full_backward_hook(lambda module, inputs, outputs: None)
    return net


OBSTACLES = {
    "tensor hook": (lambda: hooked, "hook"),
    "module hook": (backward_hook, "backward hook"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_hooks_in_the_backward_pass_are_not_fused(name):
    make, word = OBSTACLES[name]
    energy = make()
    gradient = energy_gradient(energy)
    with pytest.warns(RuntimeWarning, match=word):
        gradient(states())
    for scale in (1.0, 30.0):
        assert_right(gradient, energy, scale * states())
    assert gradient.engine == "autograd"


@pytest.mark.parametrize("function", [Rounded, Scaled])
def test_a_backward_pass_by_hand_is_kept(function):
    def energy(x):
        return function.apply(x).square().sum(1)

    gradient = energy_gradient(energy, engine="fused")
    gradient(states())
    for scale in (1.0, 30.0):
        assert_right(gradient, energy, scale * states())
    with ops.backend("reference"), pytest.raises(RuntimeError, match=f"autograd.Function {function.__name__}"):
        energy_gradient(energy, engine="fused")(states())


STOPPED = {
    "detach": lambda x: (x * x.detach()).sum(1),
    "straight through": lambda x: (x + (x.round() - x).detach()).square().sum(1),
    "no_grad": lambda x: (x * _without_gradient(x)).sum(1),
}


def _without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.tanh()


@pytest.mark.parametrize("name", STOPPED)
def test_parts_without_a_gradient(name):
    for scale in (0.3, 5.0):
        gradient = energy_gradient(STOPPED[name])
        assert_right(gradient, STOPPED[name], scale * states())


@pytest.mark.parametrize("activation", [nn.ELU(), nn.SELU(), nn.CELU(), nn.Softplus(), nn.GELU(), nn.LogSigmoid()])
@pytest.mark.parametrize("shape", [(6,), (3, 4, 4)])
def test_activations_keep_their_tails(activation, shape):
    def energy(x):
        return (activation(x) * torch.linspace(0.5, 1, x[0].numel()).view(x.shape[1:])).flatten(1).sum(1)

    base = torch.linspace(-1, 1, 7)
    for scale in (1.0, 20.0, 80.0):
        x = (scale * base).view(7, *[1] * len(shape)).expand(7, *shape).contiguous()
        by_autograd = energy_gradient(energy, engine="autograd")
        wanted = by_autograd(x.double())[1].flatten(1)
        # Per sample, because the tail of one is far smaller than the gradient of another. Autograd itself loses that of
        # a GELU in float32.
        size = wanted.norm(dim=1).clamp(min=1e-30)
        theirs = (by_autograd(x)[1].flatten(1) - wanted).norm(dim=1) / size
        ours = (energy_gradient(energy, engine="fused")(x)[1].flatten(1) - wanted).norm(dim=1) / size
        assert (ours <= (2 * theirs).clamp(min=2e-5)).all(), (scale, ours, theirs)


# ---- probes


def test_the_energy_is_only_called_with_the_given_states():
    seen = []

    def energy(x):
        seen.append(x.detach().clone() if type(x) is Tensor else None)
        return (x - 0.5).square().sum(1)

    x = torch.rand(6, 4)
    gradient = energy_gradient(energy)
    for _ in range(3):
        gradient(x)
    real = [each for each in seen if each is not None]
    assert len(real) > 3
    assert all(torch.equal(each, x) for each in real if each.device.type == "cpu" and len(each) != 1)


def asserted(x: Tensor) -> Tensor:
    if type(x) is Tensor:  # the numbers of traced tensors are unknown
        assert x.min() >= 0
        assert x.max() <= 1
    return x.square().sum(1)


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize(
    "energy",
    [
        asserted,
        lambda x: -torch.distributions.Beta(torch.tensor(2.0), torch.tensor(3.0)).log_prob(x).sum(1),
        lambda x: -(x.log() + (1 - x).log()).sum(1),
    ],
    ids=["asserted", "beta", "barrier"],
)
def test_energies_on_an_interval(energy, engine):
    x = torch.rand(5, 4) * 0.8 + 0.1
    ends = Langevin(energy, 1e-4, 0.0, clamp=(0.05, 0.95), engine=engine).sample(x, 5)
    assert ends.isfinite().all()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_rows_for_each_chain_in_a_closure(count, engine):
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 10)).eval()
    y, labels, x = torch.randn(count, 3, 4, 4), torch.arange(count), torch.randn(count, 3, 4, 4)
    for energy in (
        lambda x: -net(x).gather(1, labels[:, None])[:, 0],
        lambda x: (x - y).square().sum((1, 2, 3)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            found = Langevin(energy, 0.05, 0.01, engine=engine).sample(x, 3, seed=0)
        wanted = Langevin(energy, 0.05, 0.01, engine="autograd").sample(x, 3, seed=0)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("engine", ["auto", "fused", "autograd"])
def test_squeezed_energies_at_a_last_batch_of_one(engine):
    net = mlp()
    sampler = Langevin(lambda x: net(x).squeeze(), 0.1, 0.1, engine=engine)
    whole = sampler.sample(states(9), 4, seed=0)
    torch.testing.assert_close(sampler.sample(states(9), 4, seed=0, batch_size=4), whole)


def test_influence_that_vanishes_at_the_start_is_found_at_the_next_call():
    def spread(x):
        return x.sum(1) * (x - x.mean(0)).square().mean()

    with pytest.raises(RuntimeError, match="chains would influence each other"):
        Langevin(spread, 0.1, 0.1, engine="autograd").sample(torch.zeros(4, 3), 5)


# ---- modules in wrappers, hooks, terminals


def test_hooks_see_no_traced_tensors(capfd):
    net, seen = mlp(), []
    net[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(output)).remove()
    Langevin(net, 0.1, 0.1).sample(states(), 10)
    assert seen
    assert all(type(output) is Tensor and len(output) == 5 for output in seen)


def test_a_hook_that_changes_a_result_is_not_dropped():
    net = mlp()
    net[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    gradient = energy_gradient(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert_right(gradient, net, states())


def test_older_spectral_norms_are_part_of_the_energy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 16)), nn.SiLU(), nn.Linear(16, 1))
        net(states())
        assert_right(energy_gradient(net), net, states())


def test_nothing_is_printed(capfd, caplog):
    labels = torch.arange(5)
    normal = torch.distributions.MultivariateNormal(torch.zeros(4), torch.eye(4))
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for energy in (
            lambda x: -normal.log_prob(x),
            lambda x: x.gather(1, labels[:, None] % 4)[:, 0],
            lambda x: x.sum(1) if x.sum() > 0 else x.square().sum(1),
        ):
            energy_gradient(energy)(states())
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""
    assert not caplog.records


def test_scripted_compiled_and_replicated_modules():
    net = mlp()
    assert_right(energy_gradient(nn.DataParallel(net)), net, states())
    assert energy_gradient(nn.DataParallel(net)).name == "Sequential"
    compiled = energy_gradient(torch.compile(net, backend="eager"))
    assert_right(compiled, net, states())
    assert compiled.engine == "fused"
    scripted = torch.jit.script(mlp().train())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_right(energy_gradient(scripted), scripted, states())
    assert scripted.training


def test_a_trace_that_fails_within_a_transform_leaves_autograd_as_it_was():
    net = mlp()
    energy = torch.vmap(lambda u: net(u)[0] if u.sum().item() > 0 else 2 * net(u)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError):
            energy_gradient(energy)(states())
    assert_right(energy_gradient(net), net, states())


# ---- precision


@pytest.mark.parametrize(
    "energy",
    [
        lambda x: (x.square() - 1).square().sum(1),
        lambda x: -torch.logsumexp(-0.5 * (x[:, None] - torch.arange(8.0)[:, None]).square().sum(-1), 1),
    ],
    ids=["double well", "mixture"],
)
def test_what_autocast_keeps_in_float32_stays_there(energy):
    x = 3 * states(64)
    wanted = energy_gradient(energy, engine="autograd")(x.double())[1]
    errors = {}
    for engine in ("fused", "autograd"):
        found = energy_gradient(energy, dtype=torch.bfloat16, engine=engine)(x)[1]
        errors[engine] = float((found - wanted).norm() / wanted.norm())
    assert errors["fused"] <= 2 * errors["autograd"] + 1e-6


def test_a_deep_net_is_held_to_the_error_of_autocast_itself():
    torch.manual_seed(1)
    layers = [layer for _ in range(14) for layer in (nn.LeakyReLU(0.2), nn.Conv2d(16, 16, 3, 1, 1))]
    net = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), *layers, nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(16 * 64, 1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.5)
    x = torch.rand(4, 3, 8, 8) * 2 - 1
    gradient = energy_gradient(net, dtype=torch.bfloat16)
    found = gradient(x)[1]
    assert gradient.engine == "fused"
    wanted = energy_gradient(net, engine="autograd")(x.float())[1]
    autocast = energy_gradient(net, dtype=torch.bfloat16, engine="autograd")(x)[1]
    assert (found - wanted).norm() <= 2 * (autocast - wanted).norm() + 1e-2 * wanted.norm()


# ---- conditions


def conditional(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return (x - y).square().sum(1) / t + x.pow(4).sum(1)


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_conditions_go_with_their_chains(engine):
    x, y, t = states(7), states(7).flip(0), torch.linspace(0.5, 2, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        sampler = Langevin(conditional, 0.05, 0.1, engine=engine)
        whole = sampler.sample(x, 6, seed=1, conditions=(y, t))
        closed = Langevin(lambda x: conditional(x, y, t), 0.05, 0.1, engine="autograd").sample(x, 6, seed=1)
        torch.testing.assert_close(whole, closed)
        torch.testing.assert_close(sampler.sample(x, 6, seed=1, conditions=(y, t), batch_size=3), whole)
        order = torch.tensor([3, 1, 0, 6, 5, 4, 2])
        permuted = sampler.sample(x[order], 6, seed=1, chain_ids=order, conditions=(y[order], t[order]))
        torch.testing.assert_close(permuted, whole[order])
        one = sampler.sample(x, 6, seed=1, conditions=(y[:1], t[:1]))
        torch.testing.assert_close(one, sampler.sample(x, 6, seed=1, conditions=(y[:1].expand(7, 4), t[:1].expand(7))))
        state = sampler.init(x, seed=1, conditions=(y, t))
        state = type(state).from_state_dict(state.state_dict())
        torch.testing.assert_close(sampler.advance(state, 6).x, whole)


@pytest.mark.parametrize(
    ("conditions", "error", "words"),
    [
        ((torch.zeros(3, 4),), ValueError, r"one row for each of 5 samples, got a tensor of shape \(3, 4\)"),
        ((1.0,), TypeError, "conditions must be tensors, got float"),
        ((torch.tensor(1.0),), ValueError, r"got a tensor of shape \(\)"),
    ],
)
def test_conditions_that_do_not_fit(conditions, error, words):
    with pytest.raises(error, match=words):
        Langevin(lambda x, y: (x - y).square().sum(1), 0.1, 0.0).sample(states(), 2, conditions=conditions)


@pytest.mark.parametrize("energy", [mlp(), lambda x: x.square().sum(1)], ids=["covered", "function"])
def test_what_is_measured_is_the_batch_that_is_given(energy, monkeypatch):
    sizes = []

    def measure(runs, device):
        sizes.extend(len(run()[0]) for run in runs)
        return [1.0] * len(runs)

    monkeypatch.setattr(compiled_gradient, "measured", measure)
    gradient = energy_gradient(energy, reproducible=False)
    assert_right(gradient, energy, states(9))
    assert len(sizes) >= 2
    assert set(sizes) == {9}
