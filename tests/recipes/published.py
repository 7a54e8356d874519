"""The published training loops in plain PyTorch, with the random numbers handed in, and what tests of recipes share."""

from __future__ import annotations

import torch
from torch import nn

from fastebm import ops
from fastebm.rng import Stream

F64 = torch.float64


class ConvNet(nn.Module):
    """A small smooth net on images (B, C, 8, 8), float64: energies (B,), or logits where `outputs` is more than 1."""

    def __init__(self, channels=1, outputs=1, scale=1.0, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 8, 3, stride=2))
            self.head = nn.Sequential(nn.SiLU(), nn.Flatten(), nn.Linear(72, outputs))
        self.scale, self.outputs = scale, outputs
        self.double()

    def forward(self, x, *conditions):
        out = self.scale * self.head(self.body(x))
        return out if self.outputs > 1 else out[:, 0]


class Bowl(nn.Module):
    """`scale sum(log cosh(x - center))`, smooth, with gradients of at most `scale`."""

    def __init__(self, scale=1.0, center=0.3):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=F64))
        self.center = center

    def forward(self, x, *conditions):
        return self.scale * (x - self.center).cosh().log().flatten(1).sum(1)


def gradient(energy, x, *conditions):
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(energy(x, *conditions).sum(), x)[0]


def noise_of(seed, first_step, ids, stream=Stream.LANGEVIN):
    """A function that gives the noise of the k-th step of the chains `ids`, like x."""

    def noise(k, x):
        return ops.normal(x.shape, seed=seed, step=first_step + k, stream=stream, chain_ids=ids, dtype=F64)

    return noise


# Chains: (energy, x, noise, num_steps, *conditions) -> ends


def igebm_chain(energy, x, noise, num_steps):
    for k in range(num_steps):
        x = x + 0.005 * noise(k, x)
        x_grad = gradient(energy, x).clamp(-0.01, 0.01)
        x = x - 10.0 * x_grad
        x = x.clamp(0, 1)
    return x


def uva_chain(energy, x, noise, num_steps):
    for k in range(num_steps):
        x = x + 0.005 * noise(k, x)
        x = x.clamp(-1, 1)
        step = -gradient(lambda y: -energy(y), x)  # the tutorial's net gives f = -E
        x = x + -10 * step.clamp(-0.03, 0.03)
        x = x.clamp(-1, 1)
    return x


def improved_cd_chain(energy, x, noise, num_steps):
    for k in range(num_steps):
        x = x + 0.001 * noise(k, x)
        x = x - 100.0 * gradient(energy, x)
        x = x.clamp(0, 1)
    return x


def clel_chain(energy, x, noise, num_steps):
    for k in range(num_steps):
        g = gradient(energy, x).clamp(-100, 100)
        x = x - g * 100 + noise(k, x) * 0.001
        x = x.clamp(0, 1)
    return x


def jem_chain(classifier, x, noise, num_steps, labels=None):
    def f(y):
        logits = classifier(y)
        return logits.logsumexp(1) if labels is None else torch.gather(logits, 1, labels[:, None])

    for k in range(num_steps):
        x = x + 1.0 * gradient(f, x) + 1e-2 * noise(k, x)
    return x


def short_run_chain(energy, x, noise, num_steps):
    for k in range(num_steps):
        x = x + gradient(lambda y: -energy(y), x) + 1e-2 * noise(k, x)
    return x


# Replay buffers


class PlainBuffer:
    """The four published buffers on lists; slots, restarts and a reservoir's random words come from a draw of ours."""

    def __init__(self, write, capacity, start, seed):
        self.write, self.capacity, self.start, self.seed = write, capacity, start, seed
        self.kept, self.next, self.seen, self.newest = {}, 0, 0, []

    def starts(self, draw):
        rows = []
        for slot, restarted, chain in zip(draw.slots.tolist(), draw.restarted.tolist(), draw.chain_ids, strict=True):
            if restarted:
                rows.append(self.start(chain[None], draw))
            elif self.write == "newest_first":  # UvA tutorial: the list has the newest first
                rows.append(self.newest[(self.seen - 1 - slot) % self.capacity])
            else:
                rows.append(self.kept[slot])
        return torch.stack(rows)

    def add(self, draw, ends):
        if self.write == "drawn":  # replay_buffer[inds] = final_samples
            for slot, end in zip(draw.slots.tolist(), ends, strict=True):
                self.kept[slot] = end
        elif self.write == "ring":
            for end in ends:
                self.kept[self.next] = end
                self.next = (self.next + 1) % self.capacity
        elif self.write == "newest_first":
            self.newest = (list(ends) + self.newest)[: self.capacity]
        else:  # Vitter's algorithm R
            for place, end in enumerate(ends):
                index = self.seen + place
                if index >= self.capacity:
                    index = reservoir_word(self.seed, draw.number, len(ends), place) * (index + 1) >> 32
                if index < self.capacity:
                    self.kept[index] = end
        self.seen += len(ends)


def reservoir_word(seed, number, count, place):
    """The random word of a place in a draw that chooses a reservoir's slot, by its definition."""
    u = ops.uniform((count, 8), seed=seed, step=number, stream=Stream.BUFFER_DRAW)[place, 2:4]
    high, low = (min(int(value * 65536), 65535) for value in u.tolist())
    return high * 65536 + low
