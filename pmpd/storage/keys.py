"""Ids of many rows in little memory: numpy arrays in place of Python strings.

Ids of 16 hex digits are held as uint64, 8 bytes each; others as numpy's fixed-width bytes. Arrays of both
kinds can be sorted, searched and compared.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_PIECE = 1 << 18
_NIBBLES = np.full(256, 255, np.uint8)
_NIBBLES[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)


def encode(ids: Sequence[str] | pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Keys [N] of ids."""
    column = ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(list(ids), pa.string())
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if len(column) == 0:
        return np.zeros(0, np.uint64)
    column = column.cast(pa.binary())
    if column.null_count == 0 and pc.all(pc.equal(pc.binary_length(column), 16)).as_py():
        start = np.frombuffer(column.buffers()[1], np.int32)[column.offset]
        flat = np.frombuffer(column.buffers()[2], np.uint8)[start : start + 16 * len(column)]
        nibbles = _NIBBLES[flat].reshape(-1, 16)
        if nibbles.max() < 16:
            packed = np.ascontiguousarray((nibbles[:, ::2] << 4) | nibbles[:, 1::2])
            return packed.view(">u8").reshape(-1).astype(np.uint64)
    return np.array(["" if value is None else value for value in column.to_pylist()], np.bytes_)


def decode(keys: np.ndarray) -> list[str]:
    """The ids of keys."""
    if keys.dtype == np.uint64:
        text = keys.astype(">u8").tobytes().hex()
        return [text[first : first + 16] for first in range(0, len(text), 16)]
    return [value.decode() for value in keys.tolist()]


def concatenate(parts: Sequence[np.ndarray]) -> np.ndarray:
    """All keys one after the other; mixed kinds become bytes."""
    present = [part for part in parts if len(part)]
    if not present:
        return np.zeros(0, np.uint64)
    if len({part.dtype.kind for part in present}) > 1:
        present = [widened(part) for part in present]
    return np.concatenate(present)


def widened(keys: np.ndarray) -> np.ndarray:
    """The same ids as bytes."""
    return np.array(decode(keys), np.bytes_) if keys.dtype == np.uint64 else keys


def alike(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as one kind, so that they can be compared."""
    if first.dtype.kind == second.dtype.kind:
        return first, second
    return widened(first), widened(second)


def distinct(keys: np.ndarray) -> np.ndarray:
    """The keys, sorted, each once. numpy's `unique` does it with a hash table of some 40 bytes a key."""
    ordered = np.sort(keys)
    new = np.ones(len(ordered), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return ordered if new.all() else ordered[new]


def missing(wanted: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Positions in `wanted` of the keys that are not in `held`, which is sorted."""
    return np.flatnonzero(positions(wanted, held) < 0)


def positions(wanted: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Where in `held`, which is sorted, the keys are: the first of equal ones, -1 where there is none. int32
    [N], made in pieces."""
    wanted, held = alike(wanted, held)
    found = np.full(len(wanted), -1, np.int32)
    for first in range(0, len(wanted) if len(held) else 0, _PIECE):
        part = wanted[first : first + _PIECE]
        at = np.minimum(np.searchsorted(held, part), len(held) - 1)
        found[first : first + _PIECE] = np.where(held[at] == part, at, -1)
    return found


class Seen:
    """A set of keys (uint64) that grows: some 10 bytes each, where a Python set takes 100."""

    _FEW = 1 << 16

    def __init__(self) -> None:
        self._sorted = np.zeros(0, np.uint64).data  # a memoryview gives Python's ints, ten times as fast
        self._new: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._new)

    def add(self, key: int) -> bool:
        """Whether it is new."""
        if key in self._new:
            return False
        at = bisect_left(self._sorted, key)
        if at < len(self._sorted) and self._sorted[at] == key:
            return False
        self._new.add(key)
        if len(self._new) > max(self._FEW, len(self._sorted) // 16):
            both = np.concatenate([self._sorted, np.fromiter(self._new, np.uint64)])
            self._sorted = np.sort(both).data
            self._new = set()
        return True
