"""Golden numbers: noise, chains, trainings and tasks end in the very bits that were recorded.

They are the safety net of changes that must change no number. Tests use public calls alone and are edited where names
change; what they found stays. `FASTEBM_RECORD_GOLDEN=1 pytest tests/test_golden.py` records anew, into

    golden/everywhere.json    noise, equal on all machines and for all instruction sets of the C++ operators
    golden/<variant>.json     all else, by the instruction set ("cpu variant" of `fastebm info`; FASTEBM_CPU chooses)

Tensors and arrays are kept as the first 16 hex digits of the SHA-256 of their bytes, numbers as they are. The bits of
stock torch (convolutions, Adam, matrix products) differ between CPUs and versions, so that each file also holds digests
of stock torch alone: where these are others, what goes through stock torch is skipped. Plain Langevin chains, which are
fused operators alone, are compared wherever there is a file for the instruction set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import fastebm
from fastebm import evaluation, tasks, training
from fastebm.data import Images, digits, pyramid, to_pixels
from fastebm.models import CoarseToFineEnergy
from fastebm.ops import backends
from fastebm.tasks.restoration import Refinement, degradation, restore, restore_by_cascade

FOLDER = Path(__file__).parent / "golden"
RECORDING = os.environ.get("FASTEBM_RECORD_GOLDEN", "0") not in ("", "0")
VARIANTS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
_C: Any = backends._extension
Module = TypeVar("Module", bound=nn.Module)

pytestmark = [
    pytest.mark.skipif(_C is None, reason="fastebm's C++ operators are not built"),
    pytest.mark.skipif(
        os.environ.get("FASTEBM_BACKEND", "auto") not in ("", "auto", "cpp"), reason="the C++ operators are not chosen"
    ),
]


# What was recorded --------------------------------------------------------------------------------------------------


def digest(value: Any) -> Any:
    """Tensors, arrays and bytes as 16 hex digits; numbers as they are."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    if isinstance(value, np.ndarray):
        value = np.ascontiguousarray(value).tobytes()
    return hashlib.sha256(value).hexdigest()[:16] if isinstance(value, bytes) else value


class Golden:
    """One file of what was recorded: a dictionary for each section."""

    def __init__(self, name: str) -> None:
        self.path = FOLDER / f"{name}.json"
        self.recorded: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.fresh: set[str] = set()

    def check(self, section: str, found: Mapping[str, Any]) -> None:
        """Compares what was found with what was recorded; when recording, the first to come is written instead."""
        found = {name: digest(value) for name, value in found.items()}
        if RECORDING and section not in self.fresh:
            self.fresh.add(section)
            self.recorded[section] = found
            self.path.write_text(json.dumps(dict(sorted(self.recorded.items())), indent=1) + "\n")
        assert found == self.recorded.get(section, "not recorded")


@contextmanager
def one_thread() -> Iterator[None]:
    """Stock torch gives equal bits for one number of threads alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session")
def everywhere() -> Golden:
    return Golden("everywhere")


@pytest.fixture(scope="session")
def fused() -> Golden:
    """What the fused operators alone decide, on this CPU's instruction set."""
    golden = Golden(_C.active_variant())
    if not golden.recorded and not RECORDING:
        pytest.skip(f"nothing was recorded for the CPU variant {_C.active_variant()!r}")
    return golden


@pytest.fixture(scope="module")
def folded(fused: Golden) -> Golden:
    """The same with nets whose weights are folded into one another first, which is products of stock torch."""
    return unless_others(fused, "canary of products", products)


@pytest.fixture(scope="module")
def stock(folded: Golden) -> Golden:
    """What goes through stock torch as well."""
    if RECORDING:
        folded.recorded["made by"] = f"torch {torch.__version__}, numpy {np.__version__}, {cpu_model()}"
    return unless_others(folded, "canary", canary)


def unless_others(golden: Golden, section: str, canary: Callable[[], dict[str, Any]]) -> Golden:
    """Skips where stock torch alone finds other than what was recorded."""
    with one_thread():
        found = {name: digest(value) for name, value in canary().items()}
    if RECORDING:
        golden.check(section, found)
    if found != golden.recorded.get(section):
        pytest.skip("stock torch gives other bits on this machine than where the digests were recorded")
    return golden


def products() -> dict[str, Any]:
    found = {}
    for outer, inner, kernel in [(8, 1, 3), (8, 8, 3), (8, 8, 4), (4, 1, 3), (16, 8, 3)]:
        weight, before = noise(outer, inner, kernel, kernel, seed=1), noise(inner, inner, seed=2)
        found[f"after {outer, inner, kernel}"] = torch.einsum("omhw,mc->ochw", weight, before)
        found[f"before {outer, inner, kernel}"] = torch.einsum("om,mchw->ochw", noise(outer, outer, seed=3), weight)
        found[f"bias {outer, inner, kernel}"] = torch.einsum("omhw,m->o", weight, before[0])
        found[f"shifts {outer, inner, kernel}"] = weight.flatten(2) @ noise(kernel**2, (kernel + 1) ** 2, seed=4)
    return found


def canary() -> dict[str, Any]:
    """Stock torch and numpy alone, by what trainings and tasks below use, on shapes like theirs."""
    found: dict[str, Any] = {"randn": torch.randn(4099, generator=torch.Generator().manual_seed(0))}
    for width, size, kernel in [(1, 8, 1), (4, 8, 3), (4, 4, 3), (4, 4, 4), (2, 8, 4), (8, 4, 1), (3, 16, 3)]:
        for batch in (4, 6, 8):
            x, weight = noise(batch, width, size, size, seed=1), noise(4, width, kernel, kernel, seed=2)
            x, weight = x.requires_grad_(), weight.requires_grad_()
            y = F.conv2d(x, weight, padding=kernel // 2)
            y = F.avg_pool2d(F.batch_norm(F.silu(y), None, None, training=True), 2)
            found[f"convolution {batch, width, size, kernel}"] = torch.cat(
                [part.flatten() for part in (y, *torch.autograd.grad(y.square().sum(), (x, weight)))]
            )
    matrix, wide = noise(48, 48, seed=3), noise(48, 301, seed=4)
    found["product"], found["float64 product"] = matrix @ wide, (wide.double() @ wide.double().T)
    found["numpy product"] = wide.numpy().astype(np.float64) @ wide.numpy().astype(np.float64).T
    found["curves"] = torch.cat([f(wide).flatten() for f in (torch.exp, torch.erf, torch.sigmoid, torch.tanh, F.silu)])
    found["curves of positive"] = torch.cat(
        [f(wide.abs() / 8).flatten() for f in (torch.log, torch.erfinv, torch.sqrt)]
    )
    found["sums"] = torch.cat([wide.sum(1), wide.square().mean(1), wide.norm(dim=1), wide.std(1), wide.logsumexp(1)])
    covariance = (wide.double().cov() + torch.eye(48)).contiguous()
    found["linear algebra"] = torch.cat(
        [torch.linalg.cholesky(covariance).flatten(), torch.linalg.eigvalsh(covariance), torch.linalg.svdvals(wide)]
    )
    found["distances"] = torch.cdist(matrix, matrix.flip(0))
    parameters = [nn.Parameter(matrix.clone()), nn.Parameter(wide.clone())]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, betas=(0.5, 0.999))
    for _ in range(3):
        optimizer.zero_grad()
        (parameters[0] @ parameters[1]).square().mean().backward()
        optimizer.step()
    found["Adam"] = torch.cat([parameter.flatten() for parameter in parameters])
    return found


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def noise(*shape: int, seed: int) -> Tensor:
    """Normal deviates that no library's version changes."""
    return fastebm.ops.normal((1, int(np.prod(shape))), seed=seed).reshape(shape)


# Noise --------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each C++ instruction set in turn, the one before restored."""
    before = _C.active_variant()
    try:
        _C.set_variant(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    _C.set_variant(before)


def draws(device: str) -> dict[str, Tensor]:
    found = {}
    ids = torch.tensor([5, 2**40, 0], device=device)
    places: list[dict[str, Any]] = [
        {"seed": 0},
        {"seed": 2**63 + 5, "step": 2**31 + 1, "stream": 3, "chain_ids": 2**32 - 1},
        {"seed": -7, "step": 2, "stream": 12, "chain_ids": ids},
    ]
    for number, place in enumerate(places):
        for shape in ((3,), (3, 1), (3, 4099), (3, 3, 8, 8), (3, 1, 5, 7)):
            for draw in (fastebm.ops.normal, fastebm.ops.uniform):
                found[f"{draw.__name__} {number} {shape}"] = draw(shape, device=device, **place)
        for dtype in (torch.bfloat16, torch.float16):
            found[f"normal {number} {dtype}"] = fastebm.ops.normal((3, 65), device=device, dtype=dtype, **place)
    return found


def test_noise(everywhere: Golden, variant: str) -> None:
    everywhere.check("noise", draws("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_noise_on_a_gpu(everywhere: Golden, backend: str) -> None:
    if reason := backends.unavailable_reason(backend, "cuda"):
        pytest.skip(reason)
    with fastebm.ops.backend(backend):
        everywhere.check("noise", draws("cuda"))


def test_images(everywhere: Golden) -> None:
    found: dict[str, Any] = {}
    for split in ("train", "test"):
        images, labels = digits(split)
        found |= {split: images, f"{split} labels": labels, f"{split} pixels": to_pixels(images)}
        found |= {f"{split} {size}": level for size, level in pyramid(images, 4).items()}
    everywhere.check("images", found)


# Chains: the same for any number of threads -------------------------------------------------------------------------


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def _threads(request: pytest.FixtureRequest, _one_thread: None) -> None:
    torch.set_num_threads(request.param)


chains = pytest.mark.usefixtures("_threads")


def net(size: int = 16) -> CoarseToFineEnergy:
    """Without spectral norm, which is stock torch's."""
    return weighted(CoarseToFineEnergy(size, 1, base_width=2, lowest=4, spectral_norm=False))


def plain_net() -> nn.Module:
    """Of 8x8 images, with nothing in it that is folded."""
    convolutions = [nn.Conv2d(1, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.SiLU()]
    return weighted(nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8 * 4 * 4, 1)))


def weighted(module: Module) -> Module:
    """The module with weights that no library's version changes."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            scale = 0.5 if parameter.ndim == 1 else 1.5 / parameter[0].numel() ** 0.5
            parameter.copy_(scale * noise(*parameter.shape, seed=100 + number))
    return module.eval().requires_grad_(False)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@chains
@each_dtype
def test_gradients(folded: Golden, dtype: str) -> None:
    gradient = fastebm.energy_gradient(net(), dtype=DTYPES[dtype], engine="fused")
    found = {}
    for size in (4, 8, 16):
        found[f"energies {size}"], found[f"gradient {size}"] = gradient(noise(5, 1, size, size, seed=1))
    folded.check(f"gradients {dtype}", found)


@chains
@each_dtype
def test_langevin(fused: Golden, dtype: str) -> None:
    gradient = fastebm.energy_gradient(plain_net(), dtype=DTYPES[dtype], engine="fused")
    start = noise(6, 1, 8, 8, seed=1)
    mask, known = noise(6, 1, 8, 8, seed=2) > 0, noise(6, 1, 8, 8, seed=3)
    falling = fastebm.schedules.linear(0.1, 0.01)
    plain = fastebm.Langevin(gradient, 0.5, 0.02)
    clamped = fastebm.Langevin(gradient, fastebm.schedules.cosine(0.5, 0.1), falling, clamp=(-1, 1))
    state = plain.advance(plain.init(start, 4, chain_ids=3), 5)
    stepped, info = plain.step(state)
    fused.check(
        f"langevin {dtype}",
        {
            "plain": plain.sample(start, 9, seed=1),
            "batches": plain.sample(start, 9, seed=2, chain_ids=2**40, batch_size=4, start_step=7),
            "ids": plain.sample(start, 4, seed=2, chain_ids=torch.arange(6) * 3),
            "trajectory": plain.sample(start, 6, seed=1, thin=2, keep="trajectory"),
            "state": state.x,
            "step": stepped.x,
            "energy": info.energy,
            "clamped": clamped.sample(start, 9, seed=1),
            "mask": clamped.sample(start, 9, seed=1, mask=mask, known=known),
            "anchor": clamped.sample(start, 9, seed=1, data_term=(known, 0.5)),
            "hinge": plain.sample(start, 9, seed=1, data_term=(known, falling, 40.0), mask=mask, known=known),
            "clipped": fastebm.Langevin(gradient, 0.5, 0.02, grad_clip=0.05).sample(start, 5, seed=1),
            "norm clipped": fastebm.Langevin(gradient, 0.5, 0.02, grad_norm_clip=0.2).sample(start, 5, seed=1),
        },
    )


def held(x: Tensor) -> dict[str, dict[str, Any]]:
    """What chains are held by."""
    mask, other = noise(*x.shape, seed=5) > 0, noise(*x.shape, seed=6)
    return {"free": {}, "pinned": {"mask": mask, "known": other}, "pulled": {"data_term": (other, torch.tensor(3.0))}}


@chains
@each_dtype
def test_cascade(folded: Golden, dtype: str) -> None:
    levels = {size: net() for size in (4, 8, 16)}
    cascade = fastebm.Cascade(levels, num_steps=4, dtype=DTYPES[dtype], engine="fused")
    found = {f"level {size}": x for size, x in cascade.sample_levels(5, 1, 7, channels=1).items()}
    found["batches"] = cascade.sample(5, 2, channels=1, batch_size=3)
    start = noise(3, 1, 16, 16, seed=4)
    found |= {f"refined {name}": cascade.sample(None, 1, 2, x0=start, **how) for name, how in held(start).items()}
    folded.check(f"cascade {dtype}", found)


@chains
@each_dtype
def test_expanding_cascade(folded: Golden, dtype: str) -> None:
    cascade = fastebm.ExpandingCascade(net(), size=16, beta=0.4, num_steps=5, dtype=DTYPES[dtype], engine="fused")
    found = {f"level {size}": x for size, x in cascade.sample_levels(4, 1, 7, channels=1).items()}
    start = noise(3, 1, 16, 16, seed=4)
    found |= {f"refined {name}": cascade.sample(None, 1, 2, x0=start, **how) for name, how in held(start).items()}
    cascade.beta = 1.0
    found["grown"] = cascade.sample(4, 1, channels=1)
    folded.check(f"expanding {dtype}", found)


@chains
def test_climb(folded: Golden) -> None:
    energy = net()
    levels = {size: fastebm.energy_gradient(energy, engine="fused") for size in (4, 8, 16)}
    falling = fastebm.schedules.linear(0.05, 0.01)
    start, found = noise(4, 1, 4, 4, seed=4), {}
    pinned = {size: (noise(4, 1, size, size, seed=5) > 0, noise(4, 1, size, size, seed=6)) for size in (4, 8, 16)}
    mask, known = ({size: pair[place] for size, pair in pinned.items()} for place in (0, 1))
    pulled = {size: (target, 2.0) for size, target in known.items()}
    for name, how in {"free": {}, "pinned": {"mask": mask, "known": known}, "pulled": {"data_term": pulled}}.items():
        clamp = (-1, 1) if name == "free" else None
        cascade = fastebm.Cascade(levels, num_steps=3, step_size=0.7, noise_std=falling, clamp=clamp)
        ends = cascade.sample_levels(None, 1, 9, x0=start, **how)
        found |= {f"{name} {size}": x for size, x in ends.items()}
    folded.check("climb", found)


@chains
def test_restore_by_a_cascade(folded: Golden) -> None:
    energy, images = net(8), digits("test")[0][:4]
    cascade = fastebm.Cascade({4: energy, 8: energy}, num_steps=3, engine="fused")
    found = {}
    for task in ("super-resolution-2", "inpaint-box", "deblur-1"):
        operator = degradation(task, (1, 8, 8))
        y = operator.A(images)
        restored = restore_by_cascade(y, operator, cascade=cascade, restarts=2, refinement=Refinement(2, 0.1, 0.01))
        found |= {f"{task} y": y, task: restored.images, f"{task} energies": restored.starts}
    folded.check("restore by a cascade", found)


# Trainings ----------------------------------------------------------------------------------------------------------

SHARED: dict[str, Any] = {"channels": 1, "lr_decay": 0.5, "log_every": 1, "checkpoint_every": 7}
COARSE = training.CoarseToFineConfig(
    sizes=(4, 8),
    iterations=(8, 12),
    batch_sizes=(8, 6),
    learning_rates=(1e-3, 2e-3),
    base_width=1,
    num_steps=3,
    **SHARED,
)
SINGLE = SHARED | {"size": 8, "iterations": 20, "batch_size": 4, "num_steps": 2, "warmup": 4, "ema": 0.5}
EC_VAE = training.ECVAEConfig(latent=3, width=2, energy_width=2, energy_depth=2, **SINGLE)
EC_POSTERIOR = training.ECPosteriorConfig(latent=3, width=2, step_size=0.01, **SINGLE)
EC_FLOW = training.ECFlowConfig(
    brightnesses=17, levels=2, flow_steps=1, width=4, energy_width=2, energy_depth=2, **SINGLE
)
VARIED: dict[str, Any] = {"flip": True, "data_noise": 0.1, "engine": "autograd"}
CALIBRATED = VARIED | {"dual_rate": 0.5, "data_term_weight": 1.0, "energy_l2": 0.1}

Train = Callable[..., Any]
TRAININGS: dict[str, tuple[Train, Any, dict[str, Any]]] = {
    "coarse to fine": (training.train, COARSE, {}),
    "coarse to fine, restoring": (
        training.train, COARSE,
        VARIED | {"noisy_starts": 0.3, "start_temperature": 0.01, "hole_starts": 0.3, "ema": 0.9, "energy_l2": 0.1},
    ),
    "coarse to fine, expanding": (
        training.train, COARSE,
        VARIED | {"variant": "expanding", "clamp_ends": True, "max_batch": 4, "recompute_from": 8},
    ),
    "EC-VAE": (training.train, EC_VAE, {}),
    "EC-VAE, varied": (training.train, EC_VAE, CALIBRATED | {"num_chains": 1, "learned_variance": True}),
    "EC-VAE, plain": (training.train, EC_VAE, {"lambda_start": 0.0}),
    "EC posterior": (training.train, EC_POSTERIOR, {}),
    "EC posterior, varied": (
        training.train,
        EC_POSTERIOR,
        {"ema": 0.0, "flip": True, "engine": "autograd", "learned_variance": True, "temperature": 0.5},
    ),
    "EC flow": (training.train, EC_FLOW, {}),
    "EC flow, varied": (training.train, EC_FLOW, CALIBRATED | {"ema": 0.0}),
}  # fmt: skip


# Keys that have other names since the digests were recorded.
RECORDED_AS = {"nll": "surprise", "mean_of_chains": "chains", "neighbour_mean": "surroundings"}


@pytest.mark.parametrize("name", TRAININGS)
def test_training(stock: Golden, tmp_path: Path, name: str) -> None:
    """Twenty updates: the tensors of the last checkpoint, their names, all numbers of the log, and samples."""
    train, config, changes = TRAININGS[name]
    run = train(
        dataclasses.replace(config, **changes), digits("train")[0], tmp_path, progress=False, save_pictures=False
    )
    assert run.iteration == 20
    tensors = load_file(max((tmp_path / "checkpoints").glob("*.safetensors")))
    found: dict[str, Any] = {"tensors": len(tensors)}
    found["names"] = digest(json.dumps(sorted([key, list(x.shape)] for key, x in tensors.items())).encode())
    found["weights"] = digest("".join(sorted(digest(x) for x in tensors.values())).encode())  # whatever their names
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    lines = [{RECORDED_AS.get(key, key): value for key, value in line.items() if key != "seconds"} for line in lines]
    found["log"] = digest(json.dumps(lines, sort_keys=True).encode())
    found |= {"samples": run.sample(5), "samples of a seed": run.sample(5, seed=3)}
    if name.startswith("EC posterior"):
        found["refined"] = run.refine(digits("test")[0][:4], seed=2)
    if name.startswith("EC flow"):
        found["bits"] = run.bits_per_dimension(digits("test")[0][:4])
    stock.check(f"training {name}", found)


# Tasks on a small run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(stock: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty updates on digits, by which energies tell something."""
    folder = tmp_path_factory.mktemp("golden") / "digits"
    config = dataclasses.replace(
        COARSE, iterations=(30, 30), batch_sizes=(16, 16), base_width=2, engine="autograd", checkpoint_every=30
    )
    with one_thread():
        training.train(config, training.DigitsSource(), folder, progress=False, save_pictures=False)
    return folder


@pytest.fixture(scope="module")
def run(run_folder: Path) -> Any:
    return training.load(run_folder)


def images(count: int = 4) -> Tensor:
    return digits("test")[0][:count]


def test_denoise(stock: Golden, run: Any) -> None:
    noisy, found = tasks.add_noise(images(), 0.3, seed=1), {}
    for name, options in {
        "plain": tasks.DenoiseOptions(num_steps=4),
        "data term": tasks.DenoiseOptions(num_steps=4, temperature=0.01, noise_std=0.05, num_chains=5),
        "coarse": tasks.DenoiseOptions(num_steps=4, temperature=0.01, start_size=4),
    }.items():
        made = tasks.denoise(run, noisy, 0.3, options, clean=images(), seed=2, batch_size=3)
        found |= {name: made.restored, f"{name} energy": made.energy_after}
        found |= {f"{name} error": float((made.restored - images()).square().mean())}
    tuned = tasks.tune_denoising(run, images(2), 0.3, tasks.DenoiseOptions(num_steps=2), seed=1)
    found |= {"noisy": noisy, "tuned": [tuned.step_size, tuned.temperature, tuned.start_size]}
    stock.check("denoise", found)


def test_inpaint(stock: Golden, run: Any) -> None:
    found: dict[str, Any] = {}
    for pattern in ("square", "half", "pixels"):
        hole = tasks.hole_mask(pattern, 4, 8, seed=1)
        for coarse in (False, True):
            made = tasks.inpaint(
                run, images(), hole, tasks.InpaintOptions(num_steps=3, restarts=3, coarse=coarse), seed=1
            )
            name = f"{pattern}{' coarse' * coarse}"
            found |= {name: made.filled, f"{name} energy": made.energy, f"{name} diversity": made.diversity}
            found |= {
                f"{name} {RECORDED_AS.get(error, error)}": float(values.mean())
                for error, values in made.errors().items()
            }
    stock.check("inpaint", found)


def test_translate(stock: Golden, run: Any) -> None:
    found: dict[str, Any] = {}
    for name, options in {
        "plain": tasks.TranslateOptions(num_steps=6, snapshots=3),
        "pulled": tasks.TranslateOptions(num_steps=6, step_size=0.5, noise_std=0.05, snapshots=2, data_weight=0.5),
        "coarse": tasks.TranslateOptions(num_steps=3, snapshots=1, start_size=4, data_weight=0.3),
    }.items():
        made = tasks.translate(run, images().flip(3), options, seed=1, batch_size=3)
        found |= {name: made.snapshots, f"{name} energy": made.energy, f"{name} change": float(made.change.mean())}
    stock.check("translate", found)


def test_interpolate(stock: Golden, run: Any) -> None:
    found: dict[str, Any] = {}
    for between in ("noise", "coarse"):
        path = tasks.interpolate_chains(run, between, pairs=2, points=5, seed=1)
        found |= {between: path.images, f"{between} starts": path.starts, f"{between} energy": path.energy}
        found[f"{between} step"] = path.largest_step
    ways = tasks.interpolate_images(run, images()[:2], images()[2:], tasks.PathOptions(points=5, iterations=6))
    found |= {"relaxed": ways.relaxed, "straight": ways.straight, "energy": ways.energy_relaxed}
    stock.check("interpolate", found)


def test_generate(stock: Golden, run_folder: Path, run: Any, tmp_path: Path) -> None:
    tasks.generate(run_folder, 12, tmp_path / "samples.npz", chunk=5, device="cpu")
    tasks.generate(run_folder, 5, tmp_path / "seed.npz", seed=3, device="cpu")
    found = {name: np.load(tmp_path / f"{name}.npz")["images"] for name in ("samples", "seed")}
    near = tasks.nearest_images(run.sample(4), digits("train")[0], 3)
    stock.check("generate", found | {"nearest": near.indices, "distances": near.distances})


def test_detect(stock: Golden, run: Any) -> None:
    sets = {name: Images(to_pixels(digits(name)[0]), name=name, format="digits") for name in ("train", "test")}
    made = tasks.detect_outliers(run, sets["train"], sets["test"], count=60, seed=1, engine="autograd")
    found: dict[str, Any] = {"mean": made.levels.mean, "covariance": made.levels.covariance}
    later = ("combined", "untrained_combined")  # scores that were not there when these were recorded
    for name, scores in made.scores.items():
        found[f"{name} pixels"] = made.sets[name].pixels
        found |= {f"{name} {score}": values for score, values in scores.items() if score not in later}
    for name, metrics in made.metrics.items():
        kept = {score: each for score, each in metrics.items() if score not in later}
        found |= {f"{name} {score} metrics": list(vars(each).values()) for score, each in kept.items()}
    stock.check("detect", found)


def test_restore_by_a_decoder(stock: Golden, tmp_path: Path) -> None:
    config = dataclasses.replace(EC_VAE, width=4, latent=4, engine="autograd")
    vae = training.train(config, digits("train")[0], tmp_path, progress=False, save_pictures=False)
    found: dict[str, Any] = {"reconstructed": vae.reconstruct(images())}
    nets: dict[str, Any] = {"decoder": vae.vae.decode, "energy": vae.energy, "latent": 4, "engine": "autograd"}
    for method in ("adam", "langevin"):
        search = tasks.restoration.LatentSearch(method=method, num_steps=10, restarts=2, step_size=0.001)
        for task, spread in {"super-resolution-2": 0.0, "inpaint-random-50": 0.1}.items():
            operator = degradation(task, (1, 8, 8))
            made = restore(
                operator.A(images()),
                operator,
                noise=spread,
                search=search,
                refinement=Refinement(2, 0.01, 0.01),
                **nets,
            )
            found |= {f"{method} {task}": made.images, f"{method} {task} energies": made.starts}
            found |= {f"{method} {task} latents": made.latents}
    real, samples = images(50), vae.sample(50)
    health = evaluation.calibration_metrics(vae.energy, samples, real, step_size=0.1, noise_std=0.01, num_steps=3)
    found |= {"gap": health.gap, "gap of ends": health.gap_ends, "distance": health.distance, "ends": health.ends}
    stock.check("restore by a decoder", found)


def test_evaluate(stock: Golden, run: Any) -> None:
    real, samples = images(100), run.sample(100)
    health = evaluation.energy_metrics(run.levels[8], samples, real, step_size=1.0, noise_std=0.01, num_steps=3)
    found: dict[str, Any] = {"gap": health.gap, "of samples": health.acceptance_samples, "ends": health.long_run.images}
    found |= {"of data": health.acceptance_data, "motion": health.long_run.motion, "energy": health.long_run.energy_end}
    a, b = samples.flatten(1), real.flatten(1)
    found |= {"Fréchet": evaluation.frechet_distance(a, b), "kernel": list(evaluation.kernel_distance(a, b))}
    found |= {"precision": list(evaluation.precision_recall(a, b)), "near": evaluation.nearest_distances(a, b)}
    verdict = evaluation.evaluate_digits(real)
    found |= {"counts": list(verdict.classes.counts), "accuracy": verdict.accuracy, "far": verdict.nearest.median}
    stock.check("evaluate", found)
