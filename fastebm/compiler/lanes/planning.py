"""Leaves out what nobody reads, and gives every buffer a place in the arena."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .values import PLACE_BITS, PLACE_MASK, Array, Buffer, Group, Item, Places, Pointwise


@dataclass(frozen=True)
class Plan:
    """The items that are needed, the numbers of the arena, and where each buffer starts."""

    items: list[Item]
    arena: int
    starts: Array

    def address(self, value: Places) -> Array:
        """Where the numbers lie in the arena."""
        if len(value.buffers) == 1:
            (index,) = value.buffers
            return value.codes + (int(self.starts[index]) - (index << PLACE_BITS))
        return self.starts[value.codes >> PLACE_BITS] + (value.codes & PLACE_MASK)


def plan(items: Sequence[Item], buffers: list[Buffer], given: Sequence[Places], wanted: Sequence[Places]) -> Plan:
    """The plan of items that run in order. The given numbers are kept to the end, one after the other from 0."""
    end = len(items)
    for index in frozenset().union(*(value.buffers for value in (*given, *wanted))):
        buffers[index].last = end
    needed = []
    for item in reversed(items):
        if isinstance(item, Group):
            _drop_unread(item, buffers)
            if not item.outputs:
                continue
            written = [out for _, _, out in item.outputs]
            position = item.position
        else:
            written = [item.out]
            position = min(buffers[b].made_at for b in item.out.buffers)
            if all(buffers[b].last < 0 for b in item.out.buffers):
                continue
        needed.append(item)
        for value in written:
            for b in value.buffers:
                buffers[b].last = max(buffers[b].last, position)
        for value in item.reads():
            for b in value.buffers:
                buffers[b].last = max(buffers[b].last, position)
    needed.reverse()
    arena = _place(buffers, given)
    return Plan(needed, arena, np.array([buffer.start for buffer in buffers], np.int64))


def _drop_unread(group: Group, buffers: list[Buffer]) -> None:
    group.outputs = [output for output in group.outputs if any(buffers[b].last >= 0 for b in output[2].buffers)]
    alive = {id(value) for _, value, _ in group.outputs}
    kept = []
    for node in reversed(group.nodes):
        if id(node) in alive:
            kept.append(node)
            alive |= {id(value) for value in node.inputs if isinstance(value, Pointwise)}
    group.nodes = kept[::-1]


def _place(buffers: list[Buffer], given: Sequence[Places]) -> int:
    """First fit, in the order in which buffers are written: each is taken from its writer to its last reader."""
    arena = 0
    for value in given:
        (index,) = value.buffers
        buffers[index].start = arena
        arena += buffers[index].size
    busy = [(0, arena)]  # (start, end), sorted
    ends: list[tuple[int, int, int]] = []  # (last reader, start, end)
    for buffer in sorted((b for b in buffers if b.start < 0 and b.last >= 0), key=lambda b: b.made_at):
        while ends and ends[0][0] < buffer.made_at:
            _, start, end = heapq.heappop(ends)
            del busy[bisect.bisect_left(busy, (start, end))]
        start = 0
        for low, high in busy:
            if low - start >= buffer.size:
                break
            start = max(start, high)
        buffer.start = start
        bisect.insort(busy, (start, start + buffer.size))
        heapq.heappush(ends, (buffer.last, start, start + buffer.size))
        arena = max(arena, start + buffer.size)
    return arena
