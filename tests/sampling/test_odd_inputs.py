"""Tensors, modes and settings that samplers meet in use: the right value, or one line that says why not."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastebm import HMC, MALA, MCLMC, Cascade, Langevin, ParallelTempering, langevin_step, langevin_step_, ops
from fastebm.sampling import ExpandingCascade, linear

X = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)
OPTIONS: dict[str, Any] = {"step_size": 0.1, "noise_std": 0.1, "seed": 0}


class Subclass(Tensor):
    pass


def bowl(x: Tensor) -> Tensor:
    return 0.5 * x.square().sum((1, 2, 3))


def growing(x: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    return bowl(x) * beta


def half(x: Tensor) -> Tensor:
    """A gradient of 0.5 for whatever comes as a state."""
    return torch.full(X.shape if x.layout is not torch.strided or x.is_nested else x.shape, 0.5)


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "an update": lambda x: langevin_step(x, half(x), **OPTIONS),
    "an update in place": lambda x: langevin_step_(x, half(x), **OPTIONS),
    "chains": lambda x: Langevin(bowl, 0.1, 0.1).sample(x, 3, 0),
    "a cascade": lambda x: Cascade({2: bowl, 4: bowl}, step_size=0.1, num_steps=2).sample(x0=x, seed=0),
}
IN_VALUE: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: X.transpose(2, 3).contiguous().transpose(2, 3),
    "channels last": lambda: X.contiguous(memory_format=torch.channels_last),
    "a slice": lambda: torch.cat([X, X], 3)[..., :4],
    "a subclass": lambda: X.clone().as_subclass(Subclass),
    "negated by a bit": lambda: torch.view_as_complex(torch.stack([X, -X], -1)).conj().imag,
    "that requires grad": lambda: X.clone().requires_grad_(),
    "a parameter": lambda: nn.Parameter(X.clone()),
    "born in inference mode": lambda: born_in_inference(),
    "expanded": lambda: X[:1].expand(2, 3, 4, 4),
    "without chains": lambda: X[:0].clone(),
    "without pixels": lambda: X[:, :0].clone(),
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: X.to_sparse(), "must be a dense tensor, got a sparse_coo one"),
    "nested": (lambda: torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged), "must be a dense tensor"),
    "quantized": (
        lambda: torch.empty_quantized((2, 3, 4, 4), torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)),
        "quantized|qint8",
    ),
    "complex": (lambda: X.to(torch.complex64), "complex64"),
    "whole numbers": (lambda: X.int(), "int32"),
    "booleans": (lambda: X > 0, "bool"),
    "half": (lambda: X.half(), "float16"),
    "on the meta device": (lambda: X.to("meta"), "meta"),
    "without dimensions": (lambda: torch.zeros(()), r"without dimensions|got torch.float32 \(\)"),
}


def born_in_inference() -> Tensor:
    with torch.inference_mode():
        return X.clone()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", IN_VALUE)
def test_values_are_what_counts(kind: str, use: str) -> None:
    x = IN_VALUE[kind]()
    plain = x.detach().resolve_neg().contiguous().as_subclass(Tensor).clone()
    expected = USES[use](plain.clone())
    refusals = {
        ("that requires grad", "an update"): "no derivative",
        ("that requires grad", "an update in place"): "no derivative",
        ("a parameter", "an update"): "no derivative",
        ("a parameter", "an update in place"): "no derivative",
        ("negated by a bit", "an update in place"): "negated view",
        ("expanded", "an update in place"): "share memory",
    }
    if (kind, use) in refusals:
        with pytest.raises(RuntimeError, match=refusals[kind, use]) as refused:
            USES[use](x)
        assert len(str(refused.value).splitlines()) == 1
        assert torch.equal(x, plain)
        with torch.no_grad():
            if kind in ("that requires grad", "a parameter"):
                assert torch.equal(USES[use](x), expected)
        return
    found = USES[use](x)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found.as_subclass(Tensor), expected, rtol=0, atol=1e-7)
    if "in place" in use:
        assert found is x
    else:
        assert torch.equal(x.as_subclass(Tensor), plain)


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_holds_no_states_is_refused_in_one_line(kind: str, use: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises((TypeError, ValueError), match=message) as refused:
        USES[use](make())
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("use", ["chains", "a cascade"])
def test_nan_at_the_start_is_found(use: str) -> None:
    x = X.clone()
    x[1, 0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="1 of 2 chains are not finite; the first is chain 1"):
        USES[use](x)


# Modes and settings ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "the meta device by default": lambda: default_device("meta"),
    "deterministic algorithms": deterministic,
}
WORK: dict[str, Callable[[], Tensor]] = {
    "an update": lambda: langevin_step(X, X.flip(0), clamp=(X[0].abs().neg(), 0.75), **OPTIONS),
    "an update in place": lambda: langevin_step_(X.clone(), X.flip(0), mask=X > 0.5, known=X, **OPTIONS),
    "an update of each step size": lambda: langevin_step(X, X, **OPTIONS | {"step_size": X[:, 0, 0, 0].abs()}),
    "chains": lambda: Langevin(bowl, linear(0.1, 0.2), 0.1, clamp=(-1, X[0].abs())).sample(X, 3, 0, data_term=(X, 0.5)),
    "chains of trajectories": lambda: HMC(bowl, linear(0.1, 0.2), 2, mass=2.0, jitter=0.1).sample(
        X, 3, 0, mask=X > 0.5, known=X
    ),
    "microcanonical chains": lambda: MCLMC(bowl, 0.5).sample(X, 3, 0, mask=X > 0.9, known=X),
    "tempered chains": lambda: ParallelTempering(bowl, (1.0, 2.0), lambda e, t: MALA(e, 0.1 * t, temperature=t)).sample(
        X, 3, 0
    ),
    "chains of a net": lambda: Langevin(net(), 0.1, 0.1).sample(X, 3, 0),
    "a cascade": lambda: Cascade({2: bowl, 4: bowl}, step_size=0.1, num_steps=2).sample(4, 0, channels=3),
    "an expanding cascade": lambda: ExpandingCascade(growing, size=4, beta=0.5, num_steps=2).sample(4, 0, channels=3),
    "noise": lambda: ops.normal((2, 7), seed=0),
    "a blend": lambda: ops.expand_blend(X, X.flip(0), 0.25),
    "a tail": lambda: ops.block_tail(X, X.flip(0)),
}


def net() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 8, device="cpu", dtype=torch.float32), nn.SiLU())
    layers.append(nn.Linear(8, 1, device="cpu", dtype=torch.float32))
    for parameter in layers.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
        parameter.data = 0.2 * noise
    return layers


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_torch_change_no_value(setting: str, work: str) -> None:
    expected = WORK[work]()
    with SETTINGS[setting]():
        found = WORK[work]()
    assert found.dtype == torch.float32
    # Gradients follow autocast, states and updates don't.
    loose = setting == "autocast" and ("chains" in work or "cascade" in work)
    # Where programs can't be planned, which the sampler says, autograd sums in another order.
    unfused = setting.startswith("the meta device") and work == "chains of a net"
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3 if loose else 1e-6 if unfused else 0)


@pytest.mark.parametrize("work", ["an update", "an update in place"])
def test_updates_compile_as_one_graph(work: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(WORK[work], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), WORK[work]())


def test_chains_run_inside_a_compiled_function() -> None:
    torch._dynamo.reset()
    sampler = Langevin(bowl, 0.1, 0.1)
    compiled = torch.compile(lambda x: sampler.sample(x, 3, 0) + 1, backend="aot_eager")
    assert torch.equal(compiled(X), sampler.sample(X, 3, 0) + 1)


# What goes with chains ------------------------------------------------------------------------------------------------

FULL = torch.ones(2, 3, 4, 4, dtype=torch.bool)
CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"mask": FULL, "known": X[:, :1]}, ValueError, "known is an image of one channel"),
    ({"mask": FULL, "known": X[0, 0]}, ValueError, "known is an image of one channel"),
    ({"mask": FULL, "known": X[:1, :1]}, ValueError, "known is an image of one channel"),
    ({"data_term": (X[:, :1], 1.0)}, ValueError, "target of data_term is an image of one channel"),
    ({"mask": FULL, "known": torch.zeros(3, 3, 4, 4)}, ValueError, "known must broadcast|known or target holds 3"),
    ({"mask": FULL, "known": torch.zeros(2, 3, 8, 8)}, ValueError, "known must broadcast"),
    ({"mask": FULL[:, :2], "known": X}, ValueError, "mask must broadcast"),
    ({"mask": torch.ones(4, 1, 4, 4), "known": X}, ValueError, "mask must broadcast|mask, known or target holds 4"),
    ({"mask": 0.5 * FULL, "known": X}, ValueError, "mask must hold True and False, or 1 and 0, got 0.5"),
    ({"mask": math.nan * FULL, "known": X}, ValueError, "mask must hold True and False, or 1 and 0, got nan"),
    ({"mask": 255 * FULL.to(torch.uint8), "known": X}, ValueError, "or 1 and 0, got 255"),
    ({"mask": FULL, "known": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, TypeError, "known must be of floating point"),
    ({"mask": FULL, "known": X.to(torch.complex64)}, TypeError, "known must be of floating point"),
    ({"data_term": (X.int(), 1.0)}, TypeError, "target of data_term must be of floating point"),
    ({"mask": FULL.to_sparse(), "known": X}, TypeError, "mask must be a dense tensor"),
    ({"mask": FULL, "known": X.to("meta")}, ValueError, "known is on meta, x0 on cpu"),
    ({"data_term": (X, torch.ones(2))}, TypeError, "a number or a callable"),
    ({"chain_ids": torch.arange(3)}, ValueError, "one id a chain"),
    ({"chain_ids": torch.tensor([[0, 1]])}, ValueError, "one id a chain"),
    ({"chain_ids": torch.tensor([0.0, 1.0])}, TypeError, "int64"),
    ({"chain_ids": torch.tensor([0, 2**56])}, ValueError, r"chain ids must be in \[0, 2\^56\)"),
    ({"chain_ids": [0, 1]}, TypeError, "chain_ids must be an integer"),
]


@pytest.mark.parametrize("sampler", ["chains", "a cascade"])
@pytest.mark.parametrize(("options", "error", "message"), CASES)
def test_what_does_not_fit_is_refused_before_chains_run(options, error, message, sampler) -> None:
    calls = []

    def energy(x: Tensor) -> Tensor:
        calls.append(1)
        return bowl(x)

    sample: Callable[..., Tensor] = Langevin(energy, 0.1, 0.1).sample
    options = {"x0": X, "seed": 0, **options, "num_steps": 2}
    if sampler == "a cascade":
        sample = Cascade({2: energy, 4: energy}, num_steps=options.pop("num_steps")).sample
        options["start_size"] = 2
    with pytest.raises(error, match=message) as refused:
        sample(**options)
    assert len(str(refused.value).splitlines()) == 1
    assert not calls


def test_a_mask_of_one_channel_serves_all() -> None:
    mask = torch.zeros(4, 4)
    mask[0] = 1
    for given in (mask, mask[None], mask[None, None], mask.bool(), mask.int().expand(2, 1, 4, 4)):
        ends = Langevin(bowl, 0.1, 0.1).sample(X, 2, 0, mask=given, known=X)
        assert torch.equal(ends[:, :, 0], X[:, :, 0])
        assert (ends[:, :, 1:] != X[:, :, 1:]).all()
    constant = Langevin(bowl, 0.1, 0.1).sample(X, 2, 0, mask=mask, known=torch.tensor(0.5).view(1, 1, 1, 1))
    assert (constant[:, :, 0] == 0.5).all()


def test_an_id_draws_the_same_noise_wherever_it_stands() -> None:
    ids = torch.tensor([5, 5])
    ends = Langevin(bowl, 0.1, 0.1).sample(X[:1], 3, 0, ids, num_chains=2)
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[:1], Langevin(bowl, 0.1, 0.1).sample(X[:1], 3, 0, 5))


@pytest.mark.parametrize("result", [None, X.double(), X.to("meta"), X.tolist()], ids=["None", "dtype", "meta", "list"])
def test_projections_return_states(result: Any) -> None:
    with pytest.raises(TypeError, match=r"project must return a tensor of torch\.float32 on cpu, like its input"):
        Langevin(bowl, 0.1, 0.1).sample(X, 2, 0, project=lambda x: result)
