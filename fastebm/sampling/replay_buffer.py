"""`ReplayBuffer`: the ends of chains, from which later chains go on, as energies are trained by persistent chains.

Everything that a buffer draws is a pure function of its seed, of the number of the draw and of the place in the draw.
Slots, restarts, classes and the places of a reservoir come from the stream `BUFFER_DRAW` at the step (number of the
draw), starts from `BUFFER_RESTART` at the id of the chain, and the fractions that uint8 lost from `BUFFER_NOISE`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastebm import ops, rng
from fastebm.memory import check_memory
from fastebm.rng import Stream
from fastebm.sampling.starts import Start, checked_range, images, random_words, scaled
from fastebm.sampling.starts import uniform as uniform_start
from fastebm.scalars import as_count, as_int, as_real, shown

__all__ = ["Draw", "ReplayBuffer"]

Write = Literal["drawn", "ring", "newest_first", "reservoir"]
RestartLaw = Literal["bernoulli", "binomial"]
Augment = Callable[[Tensor, int, Tensor], Tensor]

_DTYPES = (torch.uint8, torch.float16, torch.float32, torch.float64)
_TENSORS = ("x", "chain_ids", "steps", "written")
_NUMBERS = ("seed", "draws", "next_chain", "step", "nonfinite")
_FORM = ("write", "rank", "world_size", "low", "high")
_SLOT, _RESERVOIR, _LABEL, _RESTART = range(4)  # what the random words of a place in a draw are for


@dataclass(frozen=True, eq=False)
class Draw:
    """`n` chains to be continued, and where they came from; `put` takes it back with their ends.

    Attributes:
        x: the states, `(n, ...)` on the buffer's device, float32, or float64 where the buffer stores that.
        chain_ids: int64 `(n,)` on that device, all different.
        seed, start_step: of the chains' noise, for a sampler. No other draw has the same seed, steps and ids.
        num_steps: the number of updates that the chains are to run.
        labels: int64 `(n,)` on that device, the classes; None for a buffer without.
        steps: int64 `(n,)` on the CPU, the updates that each chain has behind it; 0 for those that start.
        restarted: bool `(n,)` on the CPU, the chains that start.
        slots: int64 `(n,)` on the CPU, the drawn slots.
        spare_ids: int64 `(n,)` on the CPU, the ids of the chains that stand in for ends that are not finite.
        number: the number of draws before it.
        source: the buffer that gave it.
        was_put: whether `put` took it back.
    """

    x: Tensor
    chain_ids: Tensor
    seed: int
    start_step: int
    num_steps: int
    labels: Tensor | None
    steps: Tensor
    restarted: Tensor
    slots: Tensor
    spare_ids: Tensor
    number: int
    source: ReplayBuffer = field(repr=False)
    was_put: bool = field(default=False, init=False)


class ReplayBuffer:
    """Keeps the ends of `capacity` chains. `draw` gives chains to go on from, and `put` takes their ends.

    A draw chooses slots at random with replacement, as all published buffers do. A slot that holds nothing yet gives a
    new chain, and so does any other with probability `restart`. A new chain has an id of its own and a state from
    `start`. A chain that stands twice in one draw keeps its id in the first place only; the others go on from the same
    state as new chains, since equal ids would give them equal noise.

    Args:
        shape: of one state, such as `(3, 32, 32)`.
        capacity: the number of slots, of all ranks together.
        restart: the probability that a drawn chain starts anew, in [0, 1].
        start: where new chains start: a function of `fastebm.starts`, one of your own of that form, or a float tensor
            `(N, ...)` of states to choose from.
        seed: of all draws; None draws one from torch's default generator.
        write: where ends go. "drawn": to the slots that were drawn, where the last of several to one slot stays (JEM,
            CLEL). "ring": to the next slots, round and round (IGEBM). "newest_first": the same, and slots are counted
            from the newest (UvA tutorial). "reservoir": to a slot or to none, so that the buffer is a uniform sample
            of all ends so far (improved CD; Vitter's algorithm R).
        restart_law: "bernoulli" decides on each chain by itself; "binomial" moves the new ones, a Binomial(n, restart)
            number, to the front of the draw (UvA tutorial).
        dtype: how states are stored: uint8, float16, float32 or float64.
        value_range: the range (low, high) of states, by default (-1, 1); for uint8 alone. A state is clamped to it and
            stored as `q = floor(256 (x - low) / (high - low))`, at most 255. It returns as
            `low + (high - low) (q + u) / 256` with u uniform in (0, 1].
        num_classes: 0, or the number of classes among which the slots are divided evenly.
        augment: a function `augment(x, seed, chain_ids)` of the drawn states of chains that go on, before a restart;
            returns states of the same shape. The seed is one of each draw.
        device: where the states are stored and drawn.
        rank, world_size: the number of this process, and of processes. Each has `capacity / world_size` slots of its
            own, and all draw the same number of chains in the same order of calls.

    Ranks share no slot and no chain id. With the same number of chains over all ranks, the ids, states and "bernoulli"
    choices of new chains are the same for every `world_size`. Which slots are drawn is not, except that while the slots
    are empty there is nothing else to draw: the union of the first draws is the same.

    Raises ValueError or TypeError for arguments out of range, and for more memory than there is. One buffer serves one
    thread.

    Source: IGEBM (Du & Mordatch 2019), JEM (Grathwohl et al. 2020), improved CD (Du et al. 2021), UvA DL tutorial 8.

    Example:
        >>> import torch, fastebm
        >>> energy = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 1))
        >>> sampler = fastebm.Langevin(energy, 0.1, 0.01, clamp=(-1, 1))
        >>> buffer = fastebm.ReplayBuffer((3, 8, 8), capacity=1000, restart=0.05, seed=0)
        >>> for iteration in range(3):
        ...     draw = buffer.draw(64, num_steps=20)
        ...     x = sampler.sample(draw.x, 20, draw.seed, draw.chain_ids, start_step=draw.start_step)
        ...     lost = buffer.put(draw, x)
        >>> buffer.step, lost, 150 < len(buffer) <= 192
        (60, 0, True)
    """

    def __init__(
        self,
        shape: Sequence[int],
        capacity: int,
        *,
        restart: float = 0.05,
        start: Start | Tensor | None = None,
        seed: int | None = None,
        write: Write = "drawn",
        restart_law: RestartLaw = "bernoulli",
        dtype: torch.dtype = torch.float32,
        value_range: tuple[float, float] | None = None,
        num_classes: int = 0,
        augment: Augment | None = None,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not isinstance(shape, tuple | list):
            raise TypeError(f"shape is a tuple of the sizes of one state, got {shown(shape)}")
        self.shape = tuple(as_count("a size of shape", size, 1) for size in shape)
        self.capacity = as_count("capacity", capacity, 1)
        self.restart = as_real("restart", restart)
        if not 0 <= self.restart <= 1:
            raise ValueError(f"restart is a probability in [0, 1], got {self.restart}")
        if isinstance(start, Tensor):
            start = images(start)
        self.start: Start = uniform_start(-1, 1) if start is None else start
        for name, function in (("start", self.start), ("augment", augment)):
            if not callable(function) and function is not None:
                raise TypeError(f"{name} must be a function, got {shown(function)}")
        self.augment = augment
        self.write = _one_of("write", write, Write)
        self.restart_law = _one_of("restart_law", restart_law, RestartLaw)
        if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES:
            raise TypeError(f"states are stored as uint8, float16, float32 or float64, got {shown(dtype)}")
        self.dtype = dtype
        if value_range is not None and dtype != torch.uint8:
            raise ValueError(f"value_range is for uint8 alone: {dtype} stores states as they are")
        self.low, self.high = checked_range("value_range", (-1.0, 1.0) if value_range is None else value_range)
        self.num_classes = as_count("num_classes", num_classes)
        self.world_size = as_count("world_size", world_size, 1)
        self.rank = as_count("rank", rank)
        if self.rank >= self.world_size:
            raise ValueError(f"rank must be below world_size, got rank {self.rank} of {self.world_size}")
        parts = self.world_size * max(self.num_classes, 1)
        if self.capacity % parts:
            raise ValueError(
                f"capacity must divide evenly among {self.world_size} ranks and {max(self.num_classes, 1)} classes, "
                f"got {self.capacity}"
            )
        self._slots_of_class = self.capacity // parts
        self.seed = rng.draw_seed() if seed is None else as_int("seed", seed)
        rng.make_key(self.seed)  # raises for a seed out of range
        self.device = torch.device(device)
        slots = self.capacity // self.world_size
        check_memory(f"a replay buffer of {slots} states {self.shape}", slots * self._bytes_of_state(), self.device)
        self._x = _zeros((slots, *self.shape), dtype, self.device)
        whole: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
        self._chain_ids = torch.full((slots,), -1, **whole)
        self._steps = torch.zeros(slots, **whole)
        self._written = torch.zeros(max(self.num_classes, 1), **whole)
        self.draws = 0
        self.next_chain = 0
        self.step = 0
        self.nonfinite = 0

    def __len__(self) -> int:
        """The number of this rank's slots that hold a chain."""
        return int((self._chain_ids >= 0).sum())

    def __repr__(self) -> str:
        classes = f", {self.num_classes} classes" if self.num_classes else ""
        rank = f", rank {self.rank} of {self.world_size}" if self.world_size > 1 else ""
        return (
            f"ReplayBuffer({len(self)} of {len(self._x)} slots hold a chain of {self.shape} as {self.dtype}; "
            f"write={self.write!r}, restart={self.restart:g}{classes}{rank})"
        )

    # Draws ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def draw(
        self, count: int, num_steps: int, *, labels: int | Tensor | None = None, slots: Tensor | None = None
    ) -> Draw:
        """`count` chains that are to run `num_steps` updates; the steps of their noise are taken from here on.

        Args:
            count: at least 1 and at most this rank's slots; the same on all ranks.
            num_steps: 0 or more; the next draw's `start_step` is larger by it.
            labels: the classes of the chains, int64 `(count,)`, or one for all; None draws them. Only with
                `num_classes`.
            slots: int64 `(count,)`, the slots to take in place of drawn ones; not together with `labels`.

        Raises ValueError or TypeError for others, and where a counter of the noise would overflow.
        """
        count, num_steps = as_count("count", count, 1), as_count("num_steps", num_steps)
        if count > len(self._x):
            raise ValueError(f"a draw of {count} chains needs a buffer of {count} slots at least, got {len(self._x)}")
        together = count * self.world_size
        self._check_counters(num_steps, 2 * together)
        words = self._words(count, self.draws)
        slots, classes = self._choose(words, labels, slots)
        fresh = self.next_chain + self.rank * count + torch.arange(count, device="cpu")
        kept, steps = self._chain_ids[slots], self._steps[slots]
        restarted = (kept < 0) | self._coins(words)
        ids = torch.where(restarted, fresh, kept)
        ids = torch.where(_repeated(ids), fresh, ids)
        steps = torch.where(restarted, 0, steps)
        x = self._restored(slots, ids, restarted, classes)
        draw = Draw(
            x=x,
            chain_ids=ids.to(self.device),
            seed=self.seed,
            start_step=self.step,
            num_steps=num_steps,
            labels=classes.to(self.device) if self.num_classes else None,
            steps=steps,
            restarted=restarted,
            slots=slots,
            spare_ids=fresh + together,
            number=self.draws,
            source=self,
        )
        self.draws += 1
        self.next_chain += 2 * together
        self.step += num_steps
        return draw

    def _check_counters(self, num_steps: int, ids: int) -> None:
        """Raises ValueError where noise would have to repeat."""
        if self.step + num_steps > rng.MAX_STEP or self.draws >= rng.MAX_STEP or self.next_chain + ids > rng.MAX_CHAIN:
            raise ValueError(
                f"after {self.draws} draws, {self.step} steps and {self.next_chain} chain ids the counter of the noise "
                f"has no room for {num_steps} steps and {ids} ids more: start a buffer with another seed"
            )

    def _words(self, count: int, number: int) -> Tensor:
        """The random words of `count` places of the draw `number`, (count, 4) on the CPU."""
        return random_words(
            count, 4, seed=self.seed, stream=Stream.BUFFER_DRAW, step=number, chain_ids=self.rank * count
        )

    def _coins(self, words: Tensor) -> Tensor:
        """The chains of a draw that start anew, bool (count,)."""
        coins = words[:, _RESTART] < round(self.restart * 2**32)
        return torch.arange(len(words), device="cpu") < coins.sum() if self.restart_law == "binomial" else coins

    def _choose(self, words: Tensor, labels: int | Tensor | None, slots: Tensor | None) -> tuple[Tensor, Tensor]:
        """The slots of a draw and their classes, int64 (count,) each, on the CPU."""
        size = self._slots_of_class
        if slots is not None:
            if labels is not None:
                raise ValueError("give labels or slots, not both: a slot has the class of its place")
            slots = _whole("slots", slots, len(words), len(self._x))
            return slots, slots // size
        classes = self._classes(words, labels)
        if self.write == "drawn":
            return classes * size + scaled(words[:, _SLOT], size), classes
        written = self._written[classes]
        place = scaled(words[:, _SLOT], written.clamp(max=size))
        return classes * size + ((written - 1 - place) % size if self.write == "newest_first" else place), classes

    def _classes(self, words: Tensor, labels: int | Tensor | None) -> Tensor:
        """The classes of a draw, int64 (count,) on the CPU."""
        if labels is None:
            return scaled(words[:, _LABEL], max(self.num_classes, 1))
        if not self.num_classes:
            raise ValueError("labels need a buffer with classes: give num_classes")
        if isinstance(labels, Tensor) and labels.dim():
            return _whole("labels", labels, len(words), self.num_classes)
        label = as_int("labels", labels)
        if not 0 <= label < self.num_classes:
            raise ValueError(f"labels must be in [0, {self.num_classes}), got {label}")
        return torch.full((len(words),), label, dtype=torch.int64, device="cpu")

    def _restored(self, slots: Tensor, ids: Tensor, restarted: Tensor, classes: Tensor) -> Tensor:
        """The states of the next draw."""
        x = self._x.index_select(0, slots.to(self.device))
        if self.dtype == torch.uint8:
            u = ops.uniform(
                x.shape,
                seed=self.seed,
                step=self.draws,
                stream=Stream.BUFFER_NOISE,
                chain_ids=ids.to(self.device),
            )
            x = u.add_(x).mul_((self.high - self.low) / 256).add_(self.low)
        elif self.dtype == torch.float16:
            x = x.float()
        if self.augment is not None and not bool(restarted.all()):
            seed = rng.fold_in_seed(self.seed, self.draws + 1)
            augmented = self.augment(x, seed, ids.to(self.device))
            if not isinstance(augmented, Tensor) or augmented.shape != x.shape or not augmented.is_floating_point():
                raise ValueError(f"augment must return states of shape {tuple(x.shape)}, got {shown(augmented)}")
            x = augmented.to(x, copy=True)
        rows = restarted.nonzero()[:, 0]
        if len(rows):
            x.index_copy_(0, rows.to(self.device), self._fresh(ids[rows], classes[rows]).to(x.dtype))
        return x

    def _fresh(self, ids: Tensor, classes: Tensor) -> Tensor:
        """The first states of the chains `ids`. Raises TypeError or ValueError for a start that gives others."""
        shape, on = (len(ids), *self.shape), self.device
        labels = classes.to(on) if self.num_classes else None
        x = self.start(shape, seed=self.seed, chain_ids=ids.to(on), labels=labels)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"start must return a tensor of floating point numbers, got {shown(x)}")
        if tuple(x.shape) != shape or x.device.type != on.type:
            raise ValueError(f"start must return states {shape} on {on}, got {shown(x)}")
        if not bool((x if self.dtype == torch.uint8 else x.to(self.dtype)).isfinite().all()):
            raise ValueError(f"start must return states that are finite in {self.dtype}, got others")
        return x.detach()

    # Ends -------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def put(self, draw: Draw, x: Tensor) -> int:
        """Stores the ends `x` of the chains of `draw`. Returns how many were not finite.

        In the place of a chain whose end is not finite (for float16, not finite in it) a new chain is stored at its
        start, and `nonfinite` counts it. Waits for the device once.

        Args:
            draw: what `draw` of this buffer returned; once.
            x: `(n, ...)`, of any floating type and device; not changed.

        Raises ValueError or TypeError for another draw, one that was put already, and another shape or type.
        """
        if not isinstance(draw, Draw):
            raise TypeError(f"put takes a draw of this buffer and the ends of its chains, got {shown(draw)}")
        if draw.source is not self or draw.number >= self.draws:
            raise ValueError(f"put takes a draw of this buffer, got draw {draw.number} of {draw.source!r}")
        if draw.was_put:
            raise ValueError(f"put takes a draw once, but draw {draw.number} was put already")
        count = len(draw.slots)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"the ends of chains are a tensor of floating point numbers, got {shown(x)}")
        if tuple(x.shape) != (count, *self.shape):
            raise ValueError(f"the ends of this draw have shape {(count, *self.shape)}, got {tuple(x.shape)}")
        ids, steps = draw.chain_ids.cpu(), draw.steps + draw.num_steps
        classes = torch.zeros_like(draw.slots) if draw.labels is None else draw.labels.cpu()
        stored, finite = self._encoded(x.detach())
        lost = 0
        if not bool(finite.all()):
            rows = (~finite).nonzero()[:, 0].cpu()
            lost = len(rows)
            ids = ids.index_copy(0, rows, draw.spare_ids[rows])
            steps = steps.index_fill(0, rows, 0)
            fresh, _ = self._encoded(self._fresh(ids[rows], classes[rows]))
            stored = stored.index_copy(0, rows.to(self.device), fresh)
        slots, rows = self._places(draw, classes)
        if len(rows) < count or self.write == "newest_first":
            stored = stored.index_select(0, rows.to(self.device))
        self._x.index_copy_(0, slots.to(self.device), stored)
        self._chain_ids[slots] = ids[rows]
        self._steps[slots] = steps[rows]
        if self.write != "drawn":
            self._written += classes.bincount(minlength=len(self._written))
        self.nonfinite += lost
        object.__setattr__(draw, "was_put", True)
        return lost

    def _encoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """States as they are stored, on the buffer's device, and which of them are finite, (n,)."""
        x = x.to(self.device)
        if self.dtype != torch.uint8:
            stored = x.to(self.dtype)
            return stored, _finite(stored)
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        steps = (x - self.low).mul_(256 / (self.high - self.low)).clamp_(0, 255)
        return steps.to(torch.uint8), _finite(x)

    def _places(self, draw: Draw, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The slots where ends go, all different, and the rows of the draw that go there."""
        rows, size = torch.arange(len(classes), device="cpu"), self._slots_of_class
        if self.write == "drawn":
            slots = draw.slots
        else:
            if self.write == "newest_first":  # the first of the draw is the newest, so it is written last
                rows, classes = rows.flip(0), classes.flip(0)
            before = self._written[classes] + _occurrence(classes)
            place = before % size
            if self.write == "reservoir":
                chosen = scaled(self._words(len(rows), draw.number)[:, _RESERVOIR], before + 1)
                place = torch.where(before < size, before, chosen)
            slots = classes * size + place
            if self.write == "reservoir":
                slots, rows = slots[place < size], rows[place < size]
        # Of several ends for one slot the last stays, which index_copy does not promise.
        last = len(slots) - 1 - torch.from_numpy(np.unique(slots.numpy()[::-1], return_index=True)[1])
        if len(last) == len(slots):
            return slots, rows
        return slots[last], rows[last]

    # State ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that later draws depend on besides the arguments, and what must agree with them.

        The tensors are the buffer's own and not copied: `x` `(slots, ...)`; int64 `chain_ids`, -1 where a slot is
        empty, and `steps`, `(slots,)`; int64 `written`, the number of ends of each class, 0 for `write="drawn"`. The
        whole numbers are `seed`, `draws`, `next_chain`, `step` and `nonfinite`. Of the arguments there are `write`,
        `rank`, `world_size` and the range `low`, `high`.
        """
        tensors = {"x": self._x, "chain_ids": self._chain_ids, "steps": self._steps, "written": self._written}
        return {**tensors, **{name: getattr(self, name) for name in (*_NUMBERS, *_FORM)}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues as the buffer that gave `state` would, bit for bit on the same kind of device.

        Raises ValueError for the state of another kind of buffer, or none at all; this one is then as it was.
        """
        try:
            numbers = self._checked(state)
        except TypeError as error:
            raise ValueError(f"not the state of this buffer: {error}") from None
        for name in _TENSORS:
            getattr(self, f"_{name}").copy_(state[name])
        for name, number in numbers.items():
            setattr(self, name, number)

    def _checked(self, state: Mapping[str, Any]) -> dict[str, int]:
        """The numbers of a state, all of which was checked."""
        if not isinstance(state, Mapping):
            raise TypeError(f"it is a mapping of names, got {type(state).__name__}")
        names = {*_TENSORS, *_NUMBERS, *_FORM}
        missing, unknown = sorted(names - {*state}), sorted(map(str, {*state} - names))
        if missing or unknown:
            raise ValueError(f"not the state of this buffer: missing {missing}, unknown {unknown}")
        for name in _FORM:
            if not isinstance(state[name], str | int | float) or state[name] != getattr(self, name):
                raise ValueError(f"the state's {name} is {shown(state[name])}, this buffer's {getattr(self, name)!r}")
        for name in _TENSORS:
            own, given = getattr(self, f"_{name}"), state[name]
            dense = isinstance(given, Tensor) and given.layout is torch.strided and not given.is_meta
            if not dense or (given.shape, given.dtype) != (own.shape, own.dtype):
                raise ValueError(f"the state's {name} is {shown(given)}, this buffer's {shown(own)}")
        numbers = {name: as_int(name, state[name]) for name in _NUMBERS}
        rng.make_key(numbers["seed"])
        limits = {"draws": rng.MAX_STEP, "next_chain": rng.MAX_CHAIN, "step": rng.MAX_STEP, "nonfinite": rng.MAX_CHAIN}
        for name, limit in limits.items():
            if not 0 <= numbers[name] <= limit:
                raise ValueError(f"the state's {name} must be in [0, {limit}], got {numbers[name]}")
        ids, steps, written = (state[name].cpu() for name in ("chain_ids", "steps", "written"))
        if int(ids.min()) < -1 or int(ids.max()) >= numbers["next_chain"]:
            raise ValueError(f"the state has chain ids {int(ids.min())} to {int(ids.max())}, but gave none of them out")
        if int(steps.min()) < 0 or int(steps.max()) > numbers["step"] or int(written.min()) < 0:
            raise ValueError("the state has chains of more steps than it counts, or negative counts")
        if self.dtype != torch.uint8 and not all(bool(part.isfinite().all()) for part in state["x"].split(4096)):
            raise ValueError("the state has chains that are not finite")
        return numbers

    def _bytes_of_state(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On the CPU the system gives the memory when a slot is first written, which `torch.zeros` would do."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, str(dtype).removeprefix("torch.")))


def _one_of(name: str, value: Any, literal: Any) -> Any:
    if not isinstance(value, str) or value not in get_args(literal):
        raise ValueError(f"{name} is one of {', '.join(map(repr, get_args(literal)))}, got {shown(value)}")
    return value


def _whole(name: str, values: Tensor, count: int, limit: int) -> Tensor:
    """A copy of `values` on the CPU. Raises TypeError or ValueError unless they are `count` numbers in [0, limit)."""
    if not isinstance(values, Tensor) or values.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {shown(values)}")
    if values.shape != (count,):
        raise ValueError(f"{name} must hold one number a chain, shape ({count},), got {tuple(values.shape)}")
    if int(values.min()) < 0 or int(values.max()) >= limit:
        raise ValueError(f"{name} must be in [0, {limit}), got {int(values.min())} to {int(values.max())}")
    return values.to("cpu", copy=True)


def _finite(x: Tensor) -> Tensor:
    """Which states of (n, ...) are finite, (n,). A sum is finite only where all its terms are, and takes one pass."""
    flat = x.reshape(len(x), -1)
    finite = flat.sum(1, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype).isfinite()
    return finite if bool(finite.all()) else flat.isfinite().all(1)


def _repeated(values: Tensor) -> Tensor:
    """True where a value stands that an earlier place has too."""
    repeated = np.ones(len(values), bool)
    repeated[np.unique(values.numpy(), return_index=True)[1]] = False
    return torch.from_numpy(repeated)


def _occurrence(classes: Tensor) -> Tensor:
    """How often the class of each place stands in earlier places."""
    order = classes.argsort(stable=True)
    counts = classes.bincount()
    first = counts.cumsum(0) - counts
    return torch.empty_like(classes).index_copy_(
        0, order, torch.arange(len(classes), device="cpu") - first[classes[order]]
    )
