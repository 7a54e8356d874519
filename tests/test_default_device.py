"""`torch.set_default_device` decides where users' tensors are made, and nothing of ours.

Under "meta", whatever lands there by mistake has no numbers, and what is computed from it fails or is another.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastebm
from fastebm import ops, schedules, tasks, training
from fastebm.data import digits
from fastebm.evaluation import metrics
from fastebm.models import CoarseToFineEnergy
from fastebm.sampling.diagnostics import Diagnostics

PACKAGE = Path(fastebm.__file__).parent
# Functions that follow the default device where they are not told another one.
CONSTRUCTORS = {
    *("empty", "empty_permuted", "empty_strided", "zeros", "ones", "full", "eye", "arange", "linspace", "logspace"),
    *("range", "tril_indices", "triu_indices", "rand", "randn", "randint", "randperm", "tensor", "as_tensor"),
    *("asarray", "scalar_tensor", "sparse_coo_tensor", "sparse_csr_tensor", "hann_window", "hamming_window"),
    *("fftfreq", "rfftfreq"),
}


def without_device(path: Path) -> Iterator[str]:
    """The calls of constructors in a file that name no device; `**options` may hold one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CONSTRUCTORS:
            root: Any = node.func.value
            while isinstance(root, ast.Attribute):
                root = root.value
            named = any(keyword.arg in ("device", None) for keyword in node.keywords)
            if isinstance(root, ast.Name) and root.id == "torch" and not named:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"


def test_every_tensor_is_made_on_a_device_by_name():
    """But for the parameters of nets, which are made where PyTorch makes those of its layers."""
    files = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "models"]
    assert len(files) > 200
    assert [call for path in files for call in without_device(path)] == []


def test_calls_without_a_device_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "file.py").write_text(
        "import torch\na = torch.zeros(3)\nb = torch.zeros(3, device='cpu')\nc = torch.fft.fftfreq(3)\n"
        "d = torch.ones(2, **options)\ne = x.new_zeros(2)\nf = torch.zeros_like(x)\n"
    )
    assert [*without_device(tmp_path / "file.py")] == ["file.py:2: torch.zeros(3)", "file.py:4: torch.fft.fftfreq(3)"]


@contextmanager
def elsewhere() -> Iterator[None]:
    """The default device is one without memory."""
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        assert torch.zeros(1).is_meta
        yield
    finally:
        torch.set_default_device(None if before == torch.device("cpu") else before)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def cpu(*values: float) -> Tensor:
    return torch.tensor(values, device="cpu")


def net(size: int = 8, channels: int = 1) -> nn.Module:
    with torch.device("cpu"):
        torch.manual_seed(0)
        return CoarseToFineEnergy(size, channels, base_width=2, lowest=4)


def quartic(x: Tensor) -> Tensor:
    return (0.25 * x**4 - 0.5 * x**2).sum(tuple(range(1, x.dim())))


X = noise(4, 3)
IMAGES = noise(4, 1, 8, 8, seed=1).tanh()
MASK = noise(8, 8, seed=2) > 0
IDS = torch.arange(3, device="cpu")


def langevin(energy: Any = quartic, x: Tensor = X, steps: int = 9, **options: Any) -> Tensor:
    given = {"step_size": 0.1, "noise_std": 0.1} | options
    return fastebm.Langevin(energy, **given).sample(x, steps, seed=3)


def sampled(sampler: Any, steps: int = 5, **options: Any) -> Any:
    return sampler.sample(X, steps, seed=3, **options)


def warmed(sampler: Any) -> Tensor:
    state = sampler.warm_up(sampler.init(X, seed=3), 40)
    return sampler.advance(state, 3).x


def buffer() -> Any:
    held = fastebm.ReplayBuffer((1, 8, 8), 16, seed=1, restart=0.5)
    sampler, found = fastebm.Langevin(net(), 0.1, 0.1), []
    for _ in range(3):
        draw = held.draw(8, num_steps=2)
        found.append(draw.x)
        held.put(draw, sampler.sample(draw.x, 2, draw.seed, draw.chain_ids, start_step=draw.start_step))
    saved = held.state_dict()
    held.load_state_dict(saved)
    return found, [value for value in saved.values() if isinstance(value, Tensor)]


def diagnosed() -> Any:
    observed = Diagnostics(lags=4)
    _, summary = fastebm.Langevin(quartic, 0.1, 0.1).sample(X, 40, seed=3, diagnostics=observed)
    return str(summary)


def tempered() -> Any:
    ladder = fastebm.ParallelTempering(quartic, (1.0, 2.0, 4.0), lambda e, t: fastebm.MALA(e, 0.1 * t, temperature=t))
    return ladder.sample(X, 20, seed=3), ladder.tuned(X, 40, seed=3).temperatures


def joint() -> Any:
    parts = fastebm.Joint(lambda a, b: quartic(a) + quartic(b), (X, X[:, :1]))
    return parts.spread((0.5, cpu(2.0))), langevin(parts, parts.pack((X, X[:, :1])))


def weights(dtype: torch.dtype | None, engine: str) -> Any:
    return fastebm.weight_gradient(net(), dtype=dtype, engine=engine)(IMAGES, noise(4, seed=3))


def train(config: Any, folder: Path) -> Any:
    run = training.train(config, digits("train")[0], folder, device="cpu", progress=False, save_pictures=False)
    found = training.load(folder, "cpu").sample(3, seed=1)
    assert torch.equal(found, run.sample(3, seed=1))
    return found


SINGLE: dict[str, Any] = {"channels": 1, "size": 8, "iterations": 4, "batch_size": 4, "num_steps": 2, "warmup": 1}
SMALL = SINGLE | {"energy_width": 2, "energy_depth": 2, "engine": "autograd"}
WORK: dict[str, Callable[[Path], Any]] = {
    "noise": lambda _: (ops.normal((3, 4), seed=1), ops.uniform((3, 4), seed=1, chain_ids=IDS)),
    "schedules": lambda _: schedules.evaluate(schedules.cosine(0.3, 0.1), 7),
    "temperatures": lambda _: fastebm.Langevin(quartic, schedules.linear(0.3, 0.1), 0.1).temperature(5),
    "langevin step": lambda _: fastebm.langevin_step(X, X, step_size=0.1, noise_std=0.1, seed=1, clamp=(-1, 1)),
    "langevin": lambda _: langevin(),
    "langevin, scheduled": lambda _: langevin(step_size=schedules.linear(0.3, 0.1), noise_std=cpu(0.1, 0.2, 0.3, 0.4)),
    "langevin, bounded": lambda _: langevin(clamp=(-0.5, cpu(0.1, 0.2, 0.3)), momentum=0.5),
    "langevin, preconditioned": lambda _: langevin(preconditioner="rms"),
    "langevin by autograd": lambda _: langevin(engine="autograd"),
    "langevin, measured": lambda _: langevin(reproducible=False).shape,
    "lane programs": lambda _: langevin(net(), IMAGES, engine="fused"),
    "fused programs": lambda _: langevin(net(), IMAGES, engine="fused", dtype=torch.bfloat16),
    "held pixels": lambda _: fastebm.Langevin(net(), 0.1, 0.1).sample(
        IMAGES, 5, seed=1, mask=MASK, known=IMAGES.flip(3), data_term=(IMAGES, schedules.linear(1.0, 0.0), 0.1)
    ),
    "conditions": lambda _: fastebm.Langevin(lambda x, c: quartic(x) * (1 + c), 0.1, 0.1).sample(
        X[:3], 5, seed=1, conditions=[IDS]
    ),
    "trajectories": lambda _: sampled(fastebm.Langevin(quartic, 0.1, 0.1), keep="trajectory"),
    "saved states": lambda _: (
        lambda s: s.advance(s.load_state(s.init(X, seed=3).state_dict()), 4).x
    )(fastebm.Langevin(quartic, 0.1, 0.1)),
    "minibatches": lambda _: fastebm.Langevin(
        lambda x, rows: quartic(x) + (x[:, None] - rows).square().sum((1, 2)),
        0.01,
        0.1,
        minibatches=fastebm.Minibatches(noise(20, 3, seed=4), size=5),
    ).sample(X, 5, seed=1),
    "underdamped": lambda _: sampled(fastebm.Underdamped(quartic, 0.1, friction=1.0)),
    "hmc": lambda _: sampled(fastebm.HMC(quartic, 0.1, 3)),
    "hmc, warmed up": lambda _: warmed(fastebm.HMC(quartic, 0.1, 3)),
    "mala": lambda _: sampled(fastebm.MALA(quartic, 0.1)),
    "malt": lambda _: sampled(fastebm.MALT(quartic, 0.1, 3, friction=1.0)),
    "ghmc": lambda _: sampled(fastebm.GHMC(quartic, 0.1, persistence=0.7)),
    "mclmc": lambda _: sampled(fastebm.MCLMC(quartic, 0.1, decoherence_length=1.0)),
    "mclmc, warmed up": lambda _: warmed(fastebm.MCLMC(quartic, 0.1, decoherence_length=1.0)),
    "adjusted mclmc": lambda _: sampled(fastebm.AdjustedMCLMC(quartic, 0.1, 3)),
    "tempering": lambda _: tempered(),
    "joint": lambda _: joint(),
    "cascade": lambda _: fastebm.Cascade({4: net(), 8: net()}, num_steps=3).sample(3, 1, channels=1),
    "expanding cascade": lambda _: fastebm.ExpandingCascade(net(), size=8, beta=0.4, num_steps=2).sample(
        3, 1, channels=1
    ),
    "replay buffer": lambda _: buffer(),
    "diagnostics": lambda _: diagnosed(),
    "weights by a program": lambda _: weights(None, "fused"),
    "weights by autograd": lambda _: weights(None, "autograd"),
    "masks": lambda _: [tasks.hole_mask(pattern, 2, 8, seed=1) for pattern in ("square", "half", "pixels")],
    "frechet": lambda _: metrics.frechet.frechet_distance(noise(40, 3), noise(40, 3, seed=1)),
    "coarse to fine": lambda path: train(
        training.CoarseToFineConfig(
            sizes=(4, 8), iterations=(2, 3), batch_sizes=(4, 4), learning_rates=(1e-3, 1e-3), channels=1, base_width=1,
            num_steps=2, noisy_starts=0.5, start_temperature=0.01, hole_starts=0.25, ema=0.9, flip=True, data_noise=0.1,
            engine="autograd",
        ),
        path,
    ),
    "EC-VAE": lambda path: train(training.ECVAEConfig(latent=3, width=2, **SMALL), path),
    "EC posterior": lambda path: train(training.ECPosteriorConfig(latent=3, width=2, step_size=0.01, **SINGLE), path),
    "EC flow": lambda path: train(training.ECFlowConfig(levels=2, flow_steps=1, width=4, **SMALL), path),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", WORK)
def test_work_on_the_cpu_is_the_same_elsewhere(name, tmp_path):
    expected = WORK[name](tmp_path / "here")
    with elsewhere():
        found = WORK[name](tmp_path / "elsewhere")
        pairs = [*zip(tree_leaves(expected), tree_leaves(found), strict=True)]
    assert pairs
    for here, there in pairs:
        if isinstance(here, Tensor):
            assert there.device.type == "cpu"
            assert torch.equal(here, there)
        else:
            assert here == there
