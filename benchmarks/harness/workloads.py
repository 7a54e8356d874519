"""The workloads of the suites, through fastebm's public interface alone, so that an older revision can run them too.

A `Workload` describes the work in values that JSON can hold; `ours` makes a function that does it once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastebm
from benchmarks.harness import nets
from fastebm import rng

# CF-EBM's own settings (Zhao et al., ICLR 2021), for all chains here.
STEP_SIZE, NOISE_STD = 1.0, 0.015
SIZES = (8, 16, 32, 64, 128)
# The slots of a replay buffer that nets of others are trained with.
SLOTS = 1024
# Too small to move the weights of a net that is measured over and over.
LEARNING_RATE = 1e-9

Run = Callable[[], Any]


@dataclass(frozen=True)
class Workload:
    """One case of a suite.

    Attributes:
        suite: the name of a function below, which does the work.
        case: the net, or the variety of an operator.
        shape: of a sample.
        batch: number of samples.
        dtype: "float32" or "bfloat16".
        num_steps: updates of a chain; in a cascade, of each level.
        engine, device: as `energy_gradient` and torch take them.
    """

    suite: str
    case: str
    shape: tuple[int, ...]
    batch: int
    dtype: str
    num_steps: int = 1
    engine: str = "fused"
    device: str = "cpu"

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Workload:
        return cls(**(dict(stored) | {"shape": tuple(stored["shape"])}))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def precision(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def full_shape(self) -> tuple[int, ...]:
        return (self.batch, *self.shape)

    @property
    def name(self) -> str:
        return f"{self.case} {'x'.join(map(str, self.full_shape))} {self.dtype}"


def ours(work: Workload) -> Run:
    """A function that does the work once, by fastebm."""
    return {
        "energy_gradient": energy_gradient,
        "chains": chains,
        "cascade": cascade,
        "training": training,
        "replay_buffer": replay_buffer,
        "langevin": langevin,
        "mclmc": mclmc,
        "block_tail": block_tail,
        "expand_blend": expand_blend,
        "normal": normal,
        "uniform": uniform,
        "underdamped": underdamped,
        "mala": mala,
    }[work.suite](work)


def noise(work: Workload, seed: int) -> Tensor:
    return fastebm.ops.normal(work.full_shape, seed=seed, device=work.device, dtype=work.precision)


def images(work: Workload) -> Tensor:
    """Uniform in [-1, 1], float32."""
    return fastebm.ops.uniform(work.full_shape, seed=0, device=work.device) * 2 - 1


# ---- energies


def energy_gradient(work: Workload) -> Run:
    net = nets.build(work.case, work.shape, work.device)
    gradient = fastebm.energy_gradient(net, dtype=work.precision, engine=work.engine)
    x = images(work)

    def run() -> None:
        with gradient.chain():
            for _ in range(work.num_steps):
                gradient(x)

    return run


def chains(work: Workload) -> Run:
    net = nets.build(work.case, work.shape, work.device)
    sampler = fastebm.Langevin(net, STEP_SIZE, NOISE_STD, clamp=(-1, 1), dtype=work.precision, engine=work.engine)
    x = images(work)
    return lambda: sampler.sample(x, work.num_steps, seed=0)


def levels(work: Workload) -> dict[int, nn.Module]:
    """A separate net for each resolution of a cascade; the net alone where it takes one resolution."""
    if work.case != "CF-EBM":
        return {work.shape[-1]: nets.build(work.case, work.shape, work.device)}
    sizes = [size for size in SIZES if size <= work.shape[-1]]
    return {size: nets.build(work.case, (work.shape[0], size, size), work.device) for size in sizes}


def cascade(work: Workload) -> Run:
    sampler = cascade_of(levels(work), work)
    return lambda: sampler.sample(work.batch, seed=0, channels=work.shape[0], device=work.device)


def cascade_of(energies: Mapping[int, nn.Module], work: Workload) -> fastebm.Cascade:
    return fastebm.Cascade(dict(energies), num_steps=work.num_steps, dtype=work.precision, engine=work.engine)


def training(work: Workload) -> Run:
    """An iteration as the trainer makes it: chains through frozen nets and the one in training, loss, backward, Adam.

    The update computes in the workload's dtype, as autocast does for the baselines. Other nets than CF-EBM, which have
    one resolution, draw from a replay buffer besides and write back.
    """
    net = nets.build(work.case, work.shape, work.device).train()
    energies = {size: level if size < work.shape[-1] else net for size, level in levels(work).items()}
    sampler, real, optimizer = cascade_of(energies, work), images(work), adam(net)
    gradient = fastebm.weight_gradient(net, dtype=work.precision)  # by autograd where folding saves little
    cotangent = torch.ones(2 * work.batch, device=work.device) / work.batch
    cotangent[work.batch :] *= -1
    exchange = buffer_of(work)
    started = 0

    def iterate() -> None:
        nonlocal started
        fake = sampler.sample(
            work.batch, seed=0, chain_ids=started, channels=work.shape[0], device=work.device, check=False
        )
        started += work.batch
        exchange(fake)
        optimizer.zero_grad()
        gradient.backward(torch.cat((real, fake)), cotangent)
        optimizer.step()

    return iterate


def buffer_of(work: Workload) -> Callable[[Tensor], None]:
    """What exchanges the ends of chains with a replay buffer; nothing for CF-EBM, whose chains start from noise."""
    if work.case == "CF-EBM":
        return lambda ends: None
    buffer = fastebm.ReplayBuffer(work.shape, SLOTS, restart=0.05, seed=0, device=work.device)
    count = 0

    def exchange(ends: Tensor) -> None:
        nonlocal count
        buffer.put(buffer.draw(work.batch, count), ends)
        count += 1

    return exchange


def adam(net: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(net.parameters(), LEARNING_RATE, betas=(0.5, 0.999), fused=True)


def update(
    energy: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, real: Tensor, fake: Tensor, work: Workload
) -> None:
    """One update of the weights: lowers the mean energy of real images and raises that of the chains' ends.

    Images are channels-last for baselines too: on a CPU with matrix units the other layout took twelve times as long.
    """
    low = work.precision is not torch.float32
    with torch.autocast(work.device, dtype=work.precision if low else torch.bfloat16, enabled=low):
        energies = energy(torch.cat((real, fake)).contiguous(memory_format=torch.channels_last)).float()
    loss = energies[: len(real)].mean() - energies[len(real) :].mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# ---- replay buffers

CAPACITY = 10**5


def replay_buffer(work: Workload) -> Run:
    """A draw and its write back, stored as uint8."""
    return buffer_cycle(work, torch.uint8)


def buffer_cycle(work: Workload, dtype: torch.dtype) -> Run:
    """A draw of a batch and its write back at the drawn slots, of a buffer whose slots are all full."""
    buffer = fastebm.ReplayBuffer(work.shape, CAPACITY, restart=0.05, seed=0, dtype=dtype, device=work.device)
    ends = images(work)
    for slots in torch.arange(CAPACITY).split(work.batch):
        buffer.put(buffer.draw(len(slots), 0, slots=slots), ends[: len(slots)])

    def cycle() -> None:
        buffer.put(buffer.draw(work.batch, work.num_steps), ends)

    return cycle


# ---- operators


def langevin(work: Workload) -> Run:
    """`langevin_step_` on float32 images, with noise or, in the case "no noise", without."""
    x, grad = images(work), noise(work, seed=1)
    schedule = torch.tensor([[0.1, 0.0 if work.case == "no noise" else 0.05]], device=work.device)
    key, ids = rng.make_key(0, device=work.device), rng.make_chain_ids(0, len(x), work.device)
    advance = torch.tensor([0, 1, 1], device=work.device)
    options = (-1.0, 1.0, *(None,) * 8, 0.0)

    def step() -> None:
        torch.ops.fastebm.langevin_step_(x, grad, schedule, key, ids, *options)
        key.add_(advance)

    return step


def mclmc(work: Workload) -> Run:
    """`mclmc_step_` as a sampler calls it at a whole step, with a refresh between two turns; or at half of one."""
    x, grad = images(work), noise(work, seed=1)
    momentum = torch.nn.functional.normalize(noise(work, seed=2).flatten(1)).view_as(x)
    sums = torch.zeros(len(x), 2, dtype=torch.float64, device=work.device)
    row = [0.0, 0.0, 0.6, 0.01] if work.case == "no refresh" else [0.2, 0.01, 0.2, 0.01]
    coefficients = torch.tensor([row], dtype=torch.float64, device=work.device)
    key, ids = rng.make_key(0, device=work.device), rng.make_chain_ids(0, len(x), work.device)
    advance = torch.tensor([0, 1, 1], device=work.device)

    def step() -> None:
        torch.ops.fastebm.mclmc_step_(x, momentum, sums, grad, coefficients, key, ids, None)
        key.add_(advance)

    return step


def tail_inputs(work: Workload) -> tuple[Tensor, Tensor]:
    """The two branches at the end of a block, in the layout that the case names."""
    layout = torch.channels_last if "channels-last" in work.case else torch.contiguous_format
    first, second = (noise(work, seed).contiguous(memory_format=layout) for seed in (0, 1))
    return first, second


def block_tail(work: Workload) -> Run:
    return run_tail(fastebm.ops.block_tail, work)


def run_tail(tail: Callable[[Tensor, Tensor], Tensor], work: Workload) -> Run:
    """The tail forward, or forward and backward where the case says so; for ours and for the baselines."""
    main, skip = tail_inputs(work)
    if "backward" not in work.case:
        return torch.no_grad()(lambda: tail(main, skip))
    grad = torch.randn_like(tail(main, skip))
    main.requires_grad_()
    skip.requires_grad_()
    return lambda: torch.autograd.grad(tail(main, skip), (main, skip), grad)


def expand_blend(work: Workload) -> Run:
    primal, fade = noise(work, seed=0), noise(work, seed=1)
    beta = torch.full((1,), 0.3, device=work.device)
    return lambda: fastebm.ops.expand_blend(primal, fade, beta)


def normal(work: Workload) -> Run:
    return lambda: fastebm.ops.normal(work.full_shape, seed=0, device=work.device)


def uniform(work: Workload) -> Run:
    return lambda: fastebm.ops.uniform(work.full_shape, seed=0, device=work.device)


def underdamped(work: Workload) -> Run:
    """A step of BAOAB or leapfrog that closes and opens, or the kinetic energy, as the case names."""
    x, velocity, grad = images(work), noise(work, seed=1), noise(work, seed=2)
    if work.case == "kinetic energy":
        return lambda: fastebm.ops.kinetic_energy(velocity)
    key, ids = rng.make_key(0, 1, device=work.device), rng.make_chain_ids(0, len(x), work.device)
    schedule, advance = (
        torch.tensor([[0.01, 0.9, 0.05]], device=work.device),
        torch.tensor([0, 1, 1], device=work.device),
    )

    def step() -> None:
        if work.case == "BAOAB":
            fastebm.ops.baoab_step_(x, velocity, grad, schedule=schedule, key=key, chain_ids=ids)
        else:
            fastebm.ops.leapfrog_(x, velocity, grad, schedule=schedule, key=key)
        key.add_(advance)

    return step


def mala_states(work: Workload) -> tuple[Tensor, ...]:
    """x, energy, gradient and those of a proposal; every other chain goes far up, the rest far down."""
    x, grad, proposal_grad = images(work), noise(work, seed=1), noise(work, seed=2)
    energy = torch.zeros(work.batch, device=work.device)
    rise = 1e9 * (torch.arange(work.batch, device=work.device) % 2 * 2 - 1).float()
    return x, energy, grad, x + 0.05, rise, proposal_grad


def mala(work: Workload) -> Run:
    states = mala_states(work)
    key, ids = rng.make_key(0, device=work.device), rng.make_chain_ids(0, work.batch, work.device)
    schedule, advance = torch.tensor([[0.1, 0.05]], device=work.device), torch.tensor([0, 1, 1], device=work.device)

    def step() -> None:
        states[1].zero_()
        fastebm.ops.mala_step_(*states, schedule=schedule, key=key, chain_ids=ids)
        key.add_(advance)

    return step
