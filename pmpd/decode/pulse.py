"""What a model at work has done so far. Another thread may look at it at any time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

import numpy as np


class Pulse:
    """Forwards of rows by precision, and the longest time between two steps, in seconds."""

    def __init__(self) -> None:
        self._by_bits = np.zeros(33, np.int64)
        self._last: float | None = None
        self.longest_seconds = 0.0
        self.doing = ""
        """What it is at, for people to read, where rows and forwards say little."""

    def step(self, bits: Iterable[int], forwards: int = 1) -> None:
        """One forward of the model, or several; `bits`: the precision of each of its rows."""
        self._by_bits += forwards * np.bincount(np.asarray(bits, np.int64), minlength=33)
        now = time.monotonic()
        if self._last is not None:
            self.longest_seconds = max(self.longest_seconds, now - self._last)
        self._last = now

    def rest(self) -> None:
        """Nothing is asked of the model from here to the next step: that time is no step's."""
        self._last = None

    @property
    def forwards(self) -> int:
        return int(self._by_bits.sum())

    def by_bits(self) -> Counter[int]:
        return Counter({bits: int(count) for bits, count in enumerate(self._by_bits) if count})
