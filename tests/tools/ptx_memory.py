"""The memory of ptx.py. It records which threads have used each place, and raises `Fault` if a
device's result would be undefined."""

from __future__ import annotations

from typing import Any

import numpy as np

NOBODY = 0  # lanes (threads of a launch) are numbered from 1


class Fault(AssertionError):
    """What no kernel may do."""


class Users:
    """The first and the last lane that used each place; and the first and last of the lanes that
    have met at a barrier since, and so may use it without a race."""

    def __init__(self, places: int) -> None:
        self.first, self.last = (np.zeros(places, np.int32) for _ in range(2))
        self.low: Any = None  # allocated at the first barrier
        self.high: Any = None

    def add(self, at: Any, lanes: Any) -> None:
        """Lanes ascend. If several are assigned to one place, numpy keeps the last."""
        self.last[at] = np.maximum(self.last[at], lanes)
        at, lanes = at[::-1], lanes[::-1]
        first = self.first[at]
        self.first[at] = np.where(first == NOBODY, lanes, np.minimum(first, lanes))
        if self.low is not None:
            self.low[at] = self.high[at] = NOBODY

    def forget(self, at: Any) -> None:
        self.first[at] = self.last[at] = NOBODY

    def meet(self, start: Any, end: Any) -> None:
        """Each lane has just met `start[lane]` to `end[lane]` at a barrier, or NOBODY."""
        if self.low is None:
            self.low, self.high = np.zeros_like(self.first), np.zeros_like(self.first)
        start, end = start[self.first], end[self.first]
        more = (start != NOBODY) & (self.last <= end)
        more &= (self.low == NOBODY) | (start <= self.low) & (self.high <= end)
        self.low[more], self.high[more] = start[more], end[more]

    def strange(self, at: Any, lanes: Any) -> bool:
        """Whether a lane comes to a place that another lane used, without a barrier between."""
        first, last = self.first[at], self.last[at]
        others = (first != NOBODY) & ((first != lanes) | (last != lanes))
        if self.low is not None:
            others &= (lanes < self.low[at]) | (self.high[at] < lanes)
        return bool(others.any())


class Memory:
    """The items of an array, which begins at an address."""

    def __init__(self, base: int, items: Any) -> None:
        self.base, self.items = base, items
        self.writers, self.readers = Users(len(items)), Users(len(items))  # since the last write

    def meet(self, start: Any, end: Any) -> None:
        self.writers.meet(start, end)
        self.readers.meet(start, end)

    def find(self, addresses: Any, size: int, lanes: Any) -> tuple[Any, Any]:
        """The index of each item that a lane accesses, and that lane's number for each item."""
        if (addresses % size).any():
            raise Fault("misaligned")
        each = self.items.itemsize
        found = (addresses - self.base)[:, None] // each + np.arange(size // each)
        if found.min() < 0 or found.max() >= len(self.items):
            raise Fault("out of bounds")
        return found, np.broadcast_to(lanes[:, None], found.shape)

    def read(self, addresses: Any, size: int, lanes: Any) -> Any:
        at, lanes = self.find(addresses, size, lanes)
        if self.writers.strange(at, lanes):
            raise Fault("a race: read what another thread wrote, without a barrier")
        self.readers.add(at, lanes)
        return self.items[at]

    def write(self, addresses: Any, values: Any, lanes: Any) -> None:
        at, lanes = self.find(addresses, values.shape[1] * values.itemsize, lanes)
        if self.writers.strange(at, lanes) or self.readers.strange(at, lanes):
            raise Fault("a race: wrote where another thread was, without a barrier")
        self.readers.forget(at)
        self.writers.forget(at)
        self.writers.add(at, lanes)
        if (self.writers.first[at] != self.writers.last[at]).any():
            raise Fault("several threads wrote to one place")
        self.items[at] = values.view(self.items.dtype)
