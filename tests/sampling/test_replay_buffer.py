"""Replay buffers: each rule of writing against the published loop, resumes, ranks, classes, noise, bad input."""

import copy
import dataclasses
import json
import math
import pickle
import sys

import pytest
import safetensors.torch
import torch

from fastebm import Langevin, ReplayBuffer, ops, rng, starts
from fastebm.memory import free_memory
from fastebm.rng import Stream
from tests.docstrings import run_examples

WRITES = ("drawn", "ring", "newest_first", "reservoir")
DTYPES = (torch.uint8, torch.float16, torch.float32, torch.float64)


def filled(write, capacity=12, count=4, rounds=9, **options):
    """A buffer after some rounds whose chains go a step of 1/8 up each time."""
    buffer = ReplayBuffer((2, 3), capacity, seed=5, write=write, **({"restart": 0.2} | options))
    for _ in range(rounds):
        draw = buffer.draw(count, 2)
        buffer.put(draw, draw.x + 0.125)
    return buffer


def words(seed, number, count, first=0):
    """The four random words of each place in a draw, by their definition."""
    u = ops.uniform((count, 8), seed=seed, step=number, stream=Stream.BUFFER_DRAW, chain_ids=first)
    halves = [[min(math.floor(value * 65536), 65535) for value in row] for row in u.double().tolist()]
    return [[row[2 * k] * 65536 + row[2 * k + 1] for k in range(4)] for row in halves]


def fresh_starts(seed, ids, shape):
    u = [ops.uniform((1, *shape), seed=seed, stream=Stream.BUFFER_RESTART, chain_ids=i) for i in ids]
    return [(2 * each - 1)[0].double() for each in u]


# The published loops --------------------------------------------------------------------------------------------------


class PublishedBuffer:
    """The buffers of the published training loops, on lists, with the random numbers handed in."""

    def __init__(self, write, capacity):
        self.write, self.capacity, self.kept, self.next, self.seen = write, capacity, [], 0, 0

    def index(self, word):
        return word * (self.capacity if self.write == "drawn" else len(self.kept)) >> 32

    def get(self, index):
        """None where JEM's buffer would have its random images of the beginning."""
        return self.kept[index] if index < len(self.kept) else None

    def add(self, ends, indices, words):
        if self.write == "drawn":  # JEM: replay_buffer[inds] = final_samples
            self.kept += [None] * (self.capacity - len(self.kept))
            for index, end in zip(indices, ends, strict=True):
                self.kept[index] = end
        elif self.write == "newest_first":  # UvA tutorial: new ones before old ones, and the rest is cut off
            self.kept = (list(ends) + self.kept)[: self.capacity]
        elif self.write == "ring":  # IGEBM
            for end in ends:
                self.kept[self.next : self.next + 1] = [end]
                self.next = (self.next + 1) % self.capacity
        else:  # improved CD: algorithm R
            for end, word in zip(ends, words, strict=True):
                self.seen += 1
                index = len(self.kept) if len(self.kept) < self.capacity else word * self.seen >> 32
                if index < self.capacity:
                    self.kept[index : index + 1] = [end]


@pytest.mark.parametrize("law", ["bernoulli", "binomial"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(("capacity", "count"), [(12, 4), (10, 4), (5, 5)])
def test_cycles_equal_the_published_loop(write, capacity, count, law):
    """In float64: starts, restarts, which states go on, and where their ends go, over many cycles."""
    restart, seed, shape = 0.3, 11, (2, 3)
    buffer = ReplayBuffer(
        shape, capacity, restart=restart, seed=seed, write=write, restart_law=law, dtype=torch.float64
    )
    plain, next_chain = PublishedBuffer(write, capacity), 0
    for number in range(25):
        drawn = words(seed, number, count)
        coins = [row[3] / 2**32 < restart for row in drawn]
        if law == "binomial":
            coins = [place < sum(coins) for place in range(count)]
        indices = [plain.index(row[0]) for row in drawn]
        found = [None if coin else plain.get(index) for coin, index in zip(coins, indices, strict=True)]
        ids = range(next_chain, next_chain + count)
        begun = fresh_starts(seed, ids, shape)
        expected = torch.stack([new if old is None else old for old, new in zip(found, begun, strict=True)])
        next_chain += 2 * count

        draw = buffer.draw(count, 7)
        assert torch.equal(draw.x, expected)
        assert draw.restarted.tolist() == [old is None for old in found]
        assert (draw.start_step, draw.number) == (7 * number, number)
        ends = draw.x * 0.9 + torch.arange(count, dtype=torch.float64).view(-1, 1, 1)
        buffer.put(draw, ends)
        plain.add(ends.unbind(), indices, [row[1] for row in drawn])
    assert len(buffer) == sum(kept is not None for kept in plain.kept)
    assert {*map(str, buffer.state_dict()["x"].tolist())} >= {str(x.tolist()) for x in plain.kept if x is not None}


# Chains ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITES)
def test_no_noise_is_used_twice(write):
    buffer, seen = ReplayBuffer((1,), 8, restart=0.2, seed=3, write=write), set()
    for number in range(40):
        draw = buffer.draw(6, 3 if number % 2 else 5)
        used = {(int(i), draw.start_step + k) for i in draw.chain_ids for k in range(draw.num_steps)}
        assert len(used) == 6 * draw.num_steps  # ids within a draw differ
        assert not used & seen
        seen |= used
        buffer.put(draw, draw.x)


def test_a_chain_goes_on_as_if_it_had_never_stopped():
    sampler = Langevin(lambda x: x.square().flatten(1).sum(1), 0.1, 0.2)
    buffer = ReplayBuffer((2, 3), 1, restart=0, seed=4)
    starts_at = None
    for _ in range(3):
        draw = buffer.draw(1, 5)
        starts_at = draw.x if starts_at is None else starts_at
        buffer.put(draw, sampler.sample(draw.x, 5, draw.seed, draw.chain_ids, start_step=draw.start_step))
    assert torch.equal(buffer.draw(1, 0).x, sampler.sample(starts_at, 15, 4))
    assert buffer.draw(1, 0).steps.tolist() == [15]


def test_a_chain_that_is_drawn_twice_goes_on_once_under_its_id():
    buffer = filled("ring", restart=0)
    draw = buffer.draw(4, 2, slots=torch.tensor([3, 5, 3, 3]))
    kept = buffer.state_dict()["chain_ids"][3]
    assert draw.chain_ids[0] == kept
    assert (draw.chain_ids[2:] > buffer.state_dict()["chain_ids"].max()).all()
    assert len(draw.chain_ids.unique()) == 4
    assert torch.equal(draw.x[0], draw.x[2])
    assert not draw.restarted.any()
    assert (draw.steps[2:] == draw.steps[0]).all()


def test_slots_and_labels_are_copied():
    buffer = ReplayBuffer((1,), 4, restart=0, seed=0, num_classes=2)
    for name, given in (("slots", torch.tensor([3, 1])), ("labels", torch.tensor([1, 0]))):
        draw = buffer.draw(2, 1, **{name: given})
        given.fill_(0)
        assert draw.labels.tolist() == [1, 0]
        assert (draw.slots // 2).tolist() == [1, 0]


def test_of_several_ends_for_one_slot_the_last_stays():
    buffer = ReplayBuffer((1,), 4, restart=0, seed=0)
    draw = buffer.draw(4, 1, slots=torch.tensor([2, 1, 2, 2]))
    buffer.put(draw, torch.tensor([[10.0], [11.0], [12.0], [13.0]]))
    assert buffer.state_dict()["x"].flatten().tolist() == [0, 11, 13, 0]
    assert buffer.state_dict()["chain_ids"].tolist() == [-1, 1, 3, -1]
    assert buffer.state_dict()["steps"].tolist() == [0, 1, 1, 0]
    assert len(buffer) == 2


@pytest.mark.parametrize("write", WRITES)
def test_ends_never_race_for_a_slot(write):
    """index_copy with equal indices may keep any of them on a GPU."""
    buffer = filled(write, capacity=6, count=6, restart=0)
    for _ in range(20):
        draw = buffer.draw(6, 1)
        slots, rows = buffer._places(draw, torch.zeros(6, dtype=torch.int64))
        assert len(slots.unique()) == len(slots) == len(rows)
        buffer.put(draw, draw.x)


def test_draws_are_uniform_over_slots_and_restarts_have_their_frequency():
    buffer = filled("drawn", capacity=50, count=50, rounds=40, restart=0.05)
    slots, coins = [], []
    for _ in range(400):
        draw = buffer.draw(50, 0)
        slots.append(draw.slots)
        coins.append(draw.restarted.double().mean())
    counts = torch.cat(slots).bincount(minlength=50).double()
    chi2 = float(((counts - 400).square() / 400).sum())
    assert 25 < chi2 < 82  # 49 degrees of freedom: 0.1 % to 99.8 %
    assert abs(float(torch.stack(coins).mean()) - 0.05) < 3.5 * math.sqrt(0.05 * 0.95 / 20000)


def test_every_slot_of_a_large_buffer_can_be_drawn_as_often_as_any_other():
    """The 24 bits of one float32 would reach a 64th of these 2^30."""
    chosen = starts.scaled(starts.random_words(200_000, 1, seed=0, stream=Stream.BUFFER_DRAW, chain_ids=0)[:, 0], 2**30)
    assert len(chosen.unique()) > 199_950  # of 200,000 out of 2^30, some 19 pairs are equal
    assert (chosen % 16).bincount(minlength=16).min() > 12_000
    assert int(chosen.min()) >= 0
    assert int(chosen.max()) < 2**30


def test_a_reservoir_is_a_uniform_sample_of_all_ends():
    ages = torch.zeros(60)
    for seed in range(300):
        buffer = ReplayBuffer((1,), 6, restart=1, seed=seed, write="reservoir")
        for number in range(20):
            draw = buffer.draw(3, 0)
            buffer.put(draw, 3.0 * number + torch.arange(3.0).view(3, 1))
        ages += buffer.state_dict()["x"].flatten().long().bincount(minlength=60)
    chi2 = float(((ages - 30).square() / 30).sum()) / (1 - 6 / 60)  # each end is kept in 30 of 300 runs
    assert 30 < chi2 < 100  # 59 degrees of freedom


def test_one_restart_probability_of_0_and_1():
    never, always = filled("drawn", restart=0.0, rounds=60), filled("drawn", restart=1.0)
    assert not never.draw(12, 1).restarted.any()
    assert always.draw(12, 1).restarted.all()


# Storage --------------------------------------------------------------------------------------------------------------


def test_uint8_keeps_256_levels_and_gives_back_their_fractions():
    buffer = ReplayBuffer((5,), 3, restart=0, seed=2, dtype=torch.uint8, value_range=(-1, 3))
    draw = buffer.draw(2, 4, slots=torch.tensor([0, 2]))
    ends = torch.tensor([[-5.0, -1.0, 0.0, 2.99, 99.0], [0.1, 0.2, 0.3, 0.4, 0.5]])
    buffer.put(draw, ends)
    levels = ((ends.double() + 1) * 64).floor().clamp(0, 255)
    assert buffer.state_dict()["x"][[0, 2]].tolist() == levels.tolist()
    again = buffer.draw(2, 4, slots=torch.tensor([2, 0]))
    noise = ops.uniform((2, 5), seed=2, step=1, stream=Stream.BUFFER_NOISE, chain_ids=again.chain_ids)
    expected = -1 + 4 * (levels.flip(0) + noise.double()) / 256
    torch.testing.assert_close(again.x.double(), expected, rtol=0, atol=1e-6)
    assert again.chain_ids.tolist() == draw.chain_ids.flip(0).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_states_come_back(dtype):
    buffer = ReplayBuffer((3, 4), 6, restart=0, seed=1, dtype=dtype)
    draw = buffer.draw(6, 1, slots=torch.arange(6))
    ends = torch.linspace(-0.99, 0.99, 72).view(6, 3, 4)
    buffer.put(draw, ends)
    x = buffer.draw(6, 1, slots=torch.arange(6)).x
    assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    near = {torch.uint8: 1 / 128, torch.float16: 1e-3}.get(dtype, 0)
    assert (x - ends).abs().max() <= near
    assert buffer.state_dict()["x"].dtype == dtype


def test_ends_are_neither_changed_nor_kept_as_they_lie():
    buffer = ReplayBuffer((3, 4, 4), 6, restart=0, seed=1)
    draw = buffer.draw(6, 1, slots=torch.arange(6))
    ends = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )
    ends[1, 0, 0, 0] = math.nan
    before = ends.clone()
    buffer.put(draw, ends.requires_grad_())
    assert torch.equal(ends.nan_to_num(7), before.nan_to_num(7))
    x = buffer.draw(6, 1, slots=torch.arange(6)).x
    assert torch.equal(x[2:], before[2:])
    x.fill_(9)
    assert torch.equal(buffer.draw(6, 1, slots=torch.arange(6)).x[2:], before[2:])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_a_million_images_take_memory_only_where_they_are_written():
    if free_memory() < 4 * 2**30:
        pytest.skip("the buffer asks for 3 GiB of address space, and less memory is free")

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    buffer = ReplayBuffer((3, 32, 32), 10**6, seed=0, dtype=torch.uint8)
    where = buffer.state_dict()["x"].data_ptr()
    for _ in range(3):
        draw = buffer.draw(64, 1)
        buffer.put(draw, draw.x)
    assert buffer.state_dict()["x"].data_ptr() == where
    assert len(buffer) > 150
    assert resident() - before < 2**29  # the system may give 2 MiB at a time, for each of 192 ends


# Ends that are not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    ("dtype", "wrong"),
    [(torch.uint8, math.nan), (torch.float16, 1e6), (torch.float32, math.inf), (torch.float64, -math.inf)],
)
def test_a_chain_that_is_not_finite_starts_anew_and_is_counted(write, dtype, wrong):
    buffer = ReplayBuffer((2, 3), 8, restart=0, seed=6, write=write, dtype=dtype)
    draw = buffer.draw(4, 3, slots=torch.arange(4))
    ends = torch.full((4, 2, 3), 0.5)
    ends[1, 1, 2] = wrong
    assert buffer.put(draw, ends) == 1
    assert buffer.nonfinite == 1
    assert not ends.isfinite().all() or dtype == torch.float16
    state = buffer.state_dict()
    (slot,) = (state["chain_ids"] == draw.spare_ids[1]).nonzero()[0].tolist()
    assert state["steps"][slot] == 0
    again = buffer.draw(1, 1, slots=torch.tensor([slot]))
    assert again.chain_ids.tolist() == [int(draw.spare_ids[1])]
    assert again.x.isfinite().all()
    (start,) = fresh_starts(6, again.chain_ids.tolist(), (2, 3))
    torch.testing.assert_close(again.x[0].double(), start, rtol=0, atol={torch.uint8: 1 / 128}.get(dtype, 1e-3))
    assert draw.restarted[1]
    assert not torch.equal(start.float(), draw.x[1].float())  # it is not the same start once more
    assert not {*draw.spare_ids.tolist()} & {*draw.chain_ids.tolist()}
    assert len(buffer) == 4
    assert buffer.put(again, again.x) == 0
    assert buffer.nonfinite == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_large_numbers_are_finite(dtype):
    """Their sum is not."""
    buffer = ReplayBuffer((4,), 2, restart=0, seed=6, dtype=dtype)
    draw = buffer.draw(2, 1, slots=torch.arange(2))
    ends = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, -1.0, 1.0]], dtype=dtype) * torch.finfo(dtype).max
    assert buffer.put(draw, ends) == 0
    assert torch.equal(buffer.state_dict()["x"], ends)
    ends[0, 1] = math.inf
    assert buffer.put(buffer.draw(2, 1, slots=torch.arange(2)), ends) == 1
    assert torch.equal(buffer.state_dict()["x"][1], ends[1])


# Starts ---------------------------------------------------------------------------------------------------------------


def test_starts_depend_on_the_seed_and_the_chain_alone():
    a = ReplayBuffer((2, 3), 8, seed=6).draw(8, 1)
    b = ReplayBuffer((2, 3), 8, seed=6, dtype=torch.float64, write="ring").draw(5, 3)
    assert torch.equal(a.x[:5].double(), b.x)
    assert torch.equal(a.x, torch.stack(fresh_starts(6, range(8), (2, 3))).float())
    assert not torch.equal(a.x, ReplayBuffer((2, 3), 8, seed=7).draw(8, 1).x)


def test_any_function_and_any_set_of_states_is_a_start():
    seen = []

    def start(shape, *, seed, chain_ids, labels=None):
        seen.append((shape, seed, chain_ids.tolist(), labels.tolist()))
        return torch.full(shape, 2.0)

    buffer = ReplayBuffer((3,), 4, start=start, seed=9, num_classes=2)
    assert torch.equal(buffer.draw(2, 1, labels=1).x, torch.full((2, 3), 2.0))
    assert seen == [((2, 3), 9, [0, 1], [1, 1])]
    states = torch.eye(3)
    drawn = ReplayBuffer((3,), 300, start=states, seed=0).draw(300, 1).x
    assert drawn.sum(0).min() > 70  # each of the three states is a start
    assert (drawn.sum(1) == 1).all()


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        (lambda shape, **_: None, TypeError, "start must return a tensor of floating point numbers, got None"),
        (lambda shape, **_: torch.zeros(shape, dtype=torch.int64), TypeError, "floating point numbers"),
        (lambda shape, **_: torch.zeros(shape[1:]), ValueError, r"start must return states \(2, 3\) on cpu, got"),
        (lambda shape, **_: torch.full(shape, math.nan), ValueError, "finite in torch.float32"),
        (torch.zeros(4, 5), ValueError, r"states have shape \(5,\), but states of \(3,\) are asked for"),
    ],
)
def test_a_wrong_start_is_refused_and_leaves_the_buffer_as_it_was(start, error, message):
    buffer = ReplayBuffer((3,), 4, start=start)
    with pytest.raises(error, match=message):
        buffer.draw(2, 10)
    assert (buffer.draws, buffer.next_chain, buffer.step, len(buffer)) == (0, 0, 0, 0)


# Classes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITES)
def test_classes_keep_to_their_slots(write):
    buffer = ReplayBuffer((1,), 12, restart=0.2, seed=8, write=write, num_classes=3)
    for _ in range(60):
        draw = buffer.draw(5, 1)
        assert (draw.slots // 4 == draw.labels).all()
        going_on = ~draw.restarted
        assert torch.equal(draw.x[going_on, 0], draw.labels[going_on].float() + 10)
        buffer.put(draw, draw.labels.float().view(-1, 1) + 10)
    assert buffer.state_dict()["x"].flatten().tolist() == [10.0] * 4 + [11.0] * 4 + [12.0] * 4
    assert len(buffer) == 12


@pytest.mark.parametrize("write", ["ring", "newest_first", "reservoir"])
def test_each_class_is_a_buffer_of_its_own(write):
    """Given labels, a class holds what a buffer of that class alone would after the same ends."""
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    both = ReplayBuffer((1,), 8, restart=0, seed=1, write=write, num_classes=2)
    kept = {0: [], 1: []}
    for number in range(3):
        draw = both.draw(6, 1, labels=labels)
        assert torch.equal(draw.labels, labels)
        ends = 10.0 * number + torch.arange(6.0)
        both.put(draw, ends.view(6, 1))
        for label in (0, 1):
            new = ends[labels == label].tolist()
            kept[label] = new + kept[label] if write == "newest_first" else kept[label] + new
    found = both.state_dict()["x"].view(2, 4)
    assert both.state_dict()["written"].tolist() == [9, 9]
    for label in (0, 1):
        if write == "ring":
            assert sorted(found[label].tolist()) == sorted(kept[label][-4:])
        elif write == "newest_first":
            assert sorted(found[label].tolist()) == sorted(kept[label][:4])
        else:
            assert {*found[label].tolist()} <= {*kept[label]}
            assert len({*found[label].tolist()}) == 4


def test_drawn_classes_are_uniform():
    buffer = ReplayBuffer((1,), 40, seed=2, num_classes=4)
    counts = torch.cat([buffer.draw(40, 0).labels for _ in range(100)]).bincount(minlength=4)
    assert (counts - 1000).abs().max() < 100


def test_one_label_serves_all_chains():
    draw = ReplayBuffer((1,), 40, seed=2, num_classes=4).draw(5, 1, labels=torch.tensor(2))
    assert draw.labels.tolist() == [2] * 5
    assert ReplayBuffer((1,), 40, seed=2).draw(5, 1).labels is None


# Augmentation ---------------------------------------------------------------------------------------------------------


def test_augmentation_reaches_chains_that_go_on_and_no_others():
    calls = []

    def augment(x, seed, chain_ids):
        calls.append((seed, chain_ids.tolist()))
        return x.flip(1) + 100

    buffer = ReplayBuffer((4,), 6, restart=0.5, seed=3, augment=augment)
    first = buffer.draw(6, 1)
    assert not calls
    buffer.put(first, torch.arange(24.0).view(6, 4))
    kept = buffer.state_dict()["x"].clone()
    draw = buffer.draw(6, 1, slots=torch.arange(6))
    going_on = ~draw.restarted
    assert 0 < going_on.sum() < 6
    assert torch.equal(draw.x[going_on], kept[going_on].flip(1) + 100)
    assert draw.x[~going_on].abs().max() <= 1
    assert torch.equal(buffer.state_dict()["x"], kept)
    assert calls == [(rng.fold_in_seed(3, 2), draw.chain_ids.tolist())]
    buffer.augment = lambda x, seed, chain_ids: None
    with pytest.raises(ValueError, match=r"augment must return states of shape \(6, 4\), got None"):
        buffer.draw(6, 1, slots=torch.arange(6))


# Resumes --------------------------------------------------------------------------------------------------------------


def bytes_of(tensor):
    return tensor.contiguous().numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write", WRITES)
def test_a_resume_goes_on_bit_for_bit(tmp_path, write, dtype):
    options = {"dtype": dtype, "num_classes": 2, "restart_law": "binomial"}
    buffer = filled(write, **options)
    state = buffer.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    safetensors.torch.save_file(tensors, tmp_path / "buffer.safetensors")
    (tmp_path / "buffer.json").write_text(json.dumps({name: v for name, v in state.items() if name not in tensors}))
    resumed = ReplayBuffer((2, 3), 12, restart=0.2, write=write, seed=99, **options)
    resumed.load_state_dict(
        safetensors.torch.load_file(tmp_path / "buffer.safetensors")
        | json.loads((tmp_path / "buffer.json").read_text())
    )
    for _ in range(6):
        ours, theirs = buffer.draw(4, 2), resumed.draw(4, 2)
        for name in ("x", "chain_ids", "labels", "slots", "steps", "restarted", "spare_ids"):
            assert bytes_of(getattr(ours, name)) == bytes_of(getattr(theirs, name))
        assert (ours.seed, ours.start_step, ours.number) == (theirs.seed, theirs.start_step, theirs.number)
        buffer.put(ours, ours.x + 0.125)
        resumed.put(theirs, theirs.x + 0.125)
    for name, value in buffer.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]) if name in tensors else True
    assert {n: v for n, v in state.items() if n not in tensors}.keys() == {
        *("seed", "draws", "next_chain", "step", "nonfinite", "write", "rank", "world_size", "low", "high")
    }


def test_copies_and_pickles_go_on_alike():
    buffer = filled("reservoir")
    for other in (copy.deepcopy(buffer), pickle.loads(pickle.dumps(buffer))):
        assert torch.equal(copy.deepcopy(buffer).draw(4, 1).x, other.draw(4, 1).x)


def test_draws_neither_use_nor_move_the_generators_of_the_process():
    def run():
        buffer = filled("reservoir", dtype=torch.uint8, num_classes=3)
        return buffer.draw(4, 1).x

    torch.manual_seed(1)
    first = run()
    before = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, run())
    torch.manual_seed(1)
    run()
    assert torch.equal(before, torch.get_rng_state())


def test_without_a_seed_torch_governs():
    torch.manual_seed(3)
    first = ReplayBuffer((2,), 3)
    torch.manual_seed(3)
    assert ReplayBuffer((2,), 3).seed == first.seed != ReplayBuffer((2,), 3).seed


def test_a_default_device_does_not_move_the_bookkeeping():
    plain = filled("reservoir", num_classes=3, start=starts.images(torch.rand(4, 2, 3)))
    torch.set_default_device("meta")
    try:
        x = filled("reservoir", num_classes=3).draw(4, 1).x
    finally:
        torch.set_default_device(None)
    assert x.device == plain.draw(4, 1).x.device
    assert torch.equal(x, filled("reservoir", num_classes=3).draw(4, 1).x)


# Ranks ----------------------------------------------------------------------------------------------------------------


def ranks(world_size, count, rounds, **options):
    """What `world_size` processes draw of `count` chains together, in the order of ranks, for each round."""
    shared = {"restart": 0.3, "seed": 2, "world_size": world_size} | options
    buffers = [ReplayBuffer((3,), 24, rank=rank, **shared) for rank in range(world_size)]
    drawn = []
    for _ in range(rounds):
        draws = [buffer.draw(count // world_size, 2) for buffer in buffers]
        for buffer, draw in zip(buffers, draws, strict=True):
            buffer.put(draw, draw.x + 1)
        drawn.append(draws)
    return buffers, drawn


def joined(draws, name):
    return torch.cat([getattr(draw, name) for draw in draws])


@pytest.mark.parametrize("write", WRITES)
def test_ranks_share_no_slot_and_no_chain(write):
    buffers, drawn = ranks(4, 8, 12, write=write)
    kept = [buffer.state_dict()["chain_ids"] for buffer in buffers]
    assert sum(len(ids) for ids in kept) == 24
    ids = torch.cat([part[part >= 0].unique() for part in kept])
    assert len(ids.unique()) == len(ids)
    for draws in drawn:
        assert len(joined(draws, "chain_ids").unique()) == 8
    assert not torch.equal(drawn[3][0].slots, drawn[3][1].slots)


def test_the_union_of_new_chains_does_not_depend_on_the_number_of_ranks():
    (_, alone), (_, four) = ranks(1, 8, 12), ranks(4, 8, 12)
    for name in ("x", "chain_ids", "restarted", "spare_ids", "steps"):
        assert torch.equal(joined(alone[0], name), joined(four[0], name))
    for one, several in zip(alone, four, strict=True):
        assert {d.start_step for d in several} == {one[0].start_step}
        assert torch.equal(joined(one, "spare_ids"), joined(several, "spare_ids"))
        # The coins are the same; slots that hold nothing yet make some of the others new.
        new = joined(one, "restarted") & joined(several, "restarted")
        assert torch.equal(joined(one, "x")[new], joined(several, "x")[new])
        assert torch.equal(joined(one, "chain_ids")[new], joined(several, "chain_ids")[new])


def test_coins_do_not_depend_on_the_number_of_ranks_once_slots_are_full():
    buffers = [ranks(size, 24, 40, restart=0.0)[0] for size in (1, 2)]
    for group in buffers:
        for buffer in group:
            buffer.restart = 0.3
    coins = [torch.cat([buffer.draw(24 // len(group), 1).restarted for buffer in group]) for group in buffers]
    assert [len(b) for group in buffers for b in group] == [24, 12, 12]
    assert torch.equal(*coins)
    assert 0 < coins[0].sum() < 24


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shape": (0, 3)}, ValueError, "a size of shape must be at least 1, got 0"),
        ({"shape": (2.0,)}, TypeError, "a size of shape must be an integer"),
        ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
        ({"capacity": True}, TypeError, "capacity must be an integer"),
        ({"restart": 1.5}, ValueError, r"restart is a probability in \[0, 1\], got 1.5"),
        ({"restart": -0.1}, ValueError, r"in \[0, 1\], got -0.1"),
        ({"restart": math.nan}, ValueError, r"in \[0, 1\], got nan"),
        ({"restart": "0.05"}, TypeError, "restart must be a real number"),
        ({"start": "uniform"}, TypeError, "start must be a function, got 'uniform'"),
        ({"start": torch.zeros(3, dtype=torch.int64)}, TypeError, "states must be a tensor of floating point numbers"),
        ({"start": torch.full((2, 3), math.inf)}, ValueError, "states must be finite"),
        ({"seed": 2**64}, ValueError, r"seed must be in \[-2\^63, 2\^64\)"),
        ({"write": "lifo"}, ValueError, "write is one of 'drawn', 'ring', 'newest_first', 'reservoir', got 'lifo'"),
        ({"restart_law": None}, ValueError, "restart_law is one of 'bernoulli', 'binomial', got None"),
        ({"dtype": torch.int8}, TypeError, "stored as uint8, float16, float32 or float64, got torch.int8"),
        ({"dtype": torch.uint8, "value_range": (1, 1)}, ValueError, "finite low < high, got 1.0 and 1.0"),
        ({"dtype": torch.uint8, "value_range": 1}, TypeError, r"value_range needs a pair \(low, high\), got 1"),
        ({"value_range": (0, 1)}, ValueError, "value_range is for uint8 alone"),
        ({"num_classes": -1}, ValueError, "num_classes must not be negative, got -1"),
        ({"num_classes": 5}, ValueError, "capacity must divide evenly among 1 ranks and 5 classes, got 12"),
        ({"world_size": 5}, ValueError, "capacity must divide evenly among 5 ranks and 1 classes, got 12"),
        ({"world_size": 0}, ValueError, "world_size must be at least 1"),
        ({"world_size": 2, "rank": 2}, ValueError, "rank must be below world_size, got rank 2 of 2"),
        ({"augment": 3}, TypeError, "augment must be a function, got 3"),
        ({"capacity": 10**15}, ValueError, "a replay buffer of 10{15} states .* would need .* of memory"),
    ],
)
def test_wrong_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message) as refused:
        ReplayBuffer(**({"shape": (2, 3), "capacity": 12} | options))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": 13}, ValueError, "a draw of 13 chains needs a buffer of 13 slots at least, got 12"),
        ({"count": 0}, ValueError, "count must be at least 1, got 0"),
        ({"count": 1.0}, TypeError, "count must be an integer"),
        ({"num_steps": -1}, ValueError, "num_steps must not be negative"),
        ({"num_steps": 2**32 + 1}, ValueError, "the counter of the noise has no room"),
        ({"labels": 3}, ValueError, r"labels must be in \[0, 3\), got 3"),
        ({"labels": torch.tensor([0, 1])}, ValueError, r"one number a chain, shape \(4,\), got \(2,\)"),
        ({"labels": torch.zeros(4)}, TypeError, "labels must be an int64 tensor"),
        ({"labels": [0, 1, 2, 0]}, TypeError, "labels must be an integer"),
        ({"labels": torch.tensor([0, -1, 0, 0])}, ValueError, r"labels must be in \[0, 3\), got -1 to 0"),
        ({"slots": torch.tensor([0, 1, 2, 12])}, ValueError, r"slots must be in \[0, 12\), got 0 to 12"),
        ({"slots": [0, 1, 2, 3]}, TypeError, "slots must be an int64 tensor"),
        ({"slots": torch.arange(4), "labels": 1}, ValueError, "give labels or slots, not both"),
    ],
)
def test_wrong_draws_are_refused_and_leave_the_buffer_as_it_was(options, error, message):
    buffer = filled("drawn", num_classes=3)
    before = copy.deepcopy(buffer).draw(4, 1)
    with pytest.raises(error, match=message) as refused:
        buffer.draw(**({"count": 4, "num_steps": 1} | options))
    assert "\n" not in str(refused.value)
    assert torch.equal(buffer.draw(4, 1).x, before.x)


def test_labels_need_classes():
    with pytest.raises(ValueError, match="labels need a buffer with classes: give num_classes"):
        filled("ring").draw(4, 1, labels=0)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(4, 3, 2), ValueError, r"ends of this draw have shape \(4, 2, 3\), got \(4, 3, 2\)"),
        (torch.zeros(3, 2, 3), ValueError, r"have shape \(4, 2, 3\), got \(3, 2, 3\)"),
        (torch.zeros(4, 2, 3, dtype=torch.uint8), TypeError, "a tensor of floating point numbers"),
        (None, TypeError, "a tensor of floating point numbers, got None"),
    ],
)
def test_wrong_ends_are_refused(x, error, message):
    buffer = filled("ring")
    draw, before = buffer.draw(4, 1), buffer.state_dict()["x"].clone()
    with pytest.raises(error, match=message):
        buffer.put(draw, x)
    assert torch.equal(buffer.state_dict()["x"], before)


def test_ends_of_another_buffer_are_refused():
    buffer, other = filled("ring"), filled("ring")
    draw = other.draw(4, 1)
    with pytest.raises(ValueError, match="put takes a draw of this buffer, got draw 9 of ReplayBuffer"):
        buffer.put(draw, draw.x)
    with pytest.raises(TypeError, match="put takes a draw of this buffer and the ends of its chains, got a tensor"):
        buffer.put(draw.x, draw.x)
    with pytest.raises(ValueError, match="put takes a draw of this buffer"):
        buffer.put(dataclasses.replace(buffer.draw(4, 1), number=99), draw.x)


def test_counters_end_before_noise_repeats():
    for name, limit in (("draws", rng.MAX_STEP), ("next_chain", rng.MAX_CHAIN - 7), ("step", rng.MAX_STEP)):
        buffer = filled("ring")
        setattr(buffer, name, limit)
        with pytest.raises(ValueError, match="has no room for 1 steps and 8 ids more: start a buffer with another"):
            buffer.draw(4, 1)
    buffer.step = rng.MAX_STEP - 1
    assert buffer.draw(4, 1).start_step == rng.MAX_STEP - 1


@pytest.mark.parametrize("write", ["drawn", "ring", "newest_first", "reservoir"])
def test_a_draw_is_put_once(write):
    """Twice, it counted its ends twice and wrote over chains that had gone on since. One that failed may be put."""
    buffer = filled(write)
    draw = buffer.draw(4, 1)
    with pytest.raises(ValueError, match="have shape"):
        buffer.put(draw, draw.x[:3])
    assert not draw.was_put
    buffer.put(draw, draw.x)
    assert draw.was_put
    number, before = draw.number, {n: copy.deepcopy(v) for n, v in buffer.state_dict().items()}
    for again in (draw, copy.copy(draw)):
        with pytest.raises(ValueError, match=f"^put takes a draw once, but draw {number} was put already$"):
            buffer.put(again, draw.x + 1)
    for name, value in buffer.state_dict().items():
        assert torch.equal(value, before[name]) if isinstance(value, torch.Tensor) else value == before[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(12, 3, 2)}, r"the state's x is a tensor \(12, 3, 2\).*this buffer's a tensor \(12, 2, 3\)"),
        ({"x": torch.zeros(12, 2, 3, dtype=torch.float64)}, "the state's x is a tensor .* of torch.float64"),
        ({"x": torch.full((12, 2, 3), math.nan)}, "the state has chains that are not finite"),
        ({"x": torch.zeros(12, 2, 3).to_sparse()}, "the state's x is"),
        ({"x": None}, "the state's x is None"),
        ({"chain_ids": torch.zeros(11, dtype=torch.int64)}, r"the state's chain_ids is a tensor \(11,\)"),
        ({"chain_ids": torch.full((12,), 10**6)}, "the state has chain ids 1000000 to 1000000, but gave none of them"),
        ({"chain_ids": torch.full((12,), -2)}, "the state has chain ids -2"),
        ({"steps": torch.full((12,), 10**6)}, "chains of more steps than it counts"),
        ({"written": torch.full((1,), -1)}, "negative counts"),
        ({"seed": 2**64}, "seed must be in"),
        ({"seed": 0.5}, "not the state of this buffer: seed must be an integer"),
        ({"draws": -1}, r"the state's draws must be in \[0, 4294967296\], got -1"),
        ({"step": True}, "step must be an integer"),
        ({"write": "ring"}, "the state's write is 'ring', this buffer's 'drawn'"),
        ({"write": torch.zeros(2)}, "the state's write is a tensor"),
        ({"rank": 1}, "the state's rank is 1, this buffer's 0"),
        ({"world_size": 2}, "the state's world_size is 2"),
        ({"low": 0.0}, "the state's low is 0.0, this buffer's -1.0"),
        ({"more": 1}, r"not the state of this buffer: missing \[\], unknown \['more'\]"),
        ({"step": ...}, r"missing \['step'\], unknown \[\]"),
    ],
)
def test_wrong_states_are_refused_and_leave_the_buffer_as_it_was(change, message):
    buffer = filled("drawn")
    state = {name: value for name, value in (buffer.state_dict() | change).items() if value is not ...}
    before = copy.deepcopy(buffer).draw(4, 1)
    with pytest.raises(ValueError, match=message) as refused:
        buffer.load_state_dict(state)
    assert "\n" not in str(refused.value)
    assert torch.equal(buffer.draw(4, 1).x, before.x)
    with pytest.raises(ValueError, match="a mapping of names, got list"):
        buffer.load_state_dict([])


def test_a_buffer_says_what_it_holds():
    assert repr(filled("ring", rounds=2)) == (
        "ReplayBuffer(8 of 12 slots hold a chain of (2, 3) as torch.float32; write='ring', restart=0.2)"
    )
    assert "3 classes, rank 1 of 2" in repr(ReplayBuffer((1,), 12, num_classes=3, rank=1, world_size=2))


@pytest.mark.parametrize(("module", "count"), [("replay_buffer", 6), ("starts", 10)])
def test_examples_in_docstrings(module, count):
    assert run_examples(f"fastebm.sampling.{module}") == (0, count)
