"""The index of a dataset: the ids of shards that were looked at before, kept beside the data.

It is a memory of the shards and no more: an entry is believed where the shard has the size and the time that
it had then, and nothing that is damaged, gone or in doubt is. A scan writes `_index.npz`; while a run is at
work it adds parts (`_index-*.npz`), so that a run that is killed after 10^5 shards leaves few to open.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pmpd.storage import keys as ids_of
from pmpd.storage.files import list_files, remove, resolve, write_bytes
from pmpd.storage.uri import base_name, join

INDEX = "_index.npz"
_NAME = re.compile(r"_index(-\d+)?\.npz")
_VERSION = 2
INDEX_FROM_SHARDS = 64
"""Fewer are read as fast as an index."""
_DOUBT_NS = 5 * 10**9
"""A shard as young as this when the index was written may have been written once more within its time's
resolution."""


@dataclass(frozen=True)
class Rows:
    """What is known of rows: 13 bytes each where the ids are 16 hex digits."""

    keys: np.ndarray
    """See `pmpd.storage.keys`."""
    errors: np.ndarray
    """bool: whether the row's `error` is set; all False where the table has no such column."""
    lengths: np.ndarray
    """int32: the row's `prompt_tokens` (0 where null or not in the table)."""

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, part: slice) -> Rows:
        return Rows(self.keys[part], self.errors[part], self.lengths[part])

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """All one after the other; a single part is not copied."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            ids_of.concatenate([part.keys for part in parts]),
            np.concatenate([np.zeros(0, bool), *(part.errors for part in parts)]),
            np.concatenate([np.zeros(0, np.int32), *(part.lengths for part in parts)]),
        )


@dataclass(frozen=True)
class Entry:
    """One shard, as the one who wrote it knows it."""

    name: str
    size: int
    time_ns: int
    rows: Rows


@dataclass
class Index:
    """Shards by name (sorted, each once), and their rows."""

    names: np.ndarray
    """Bytes [S]."""
    sizes: np.ndarray
    times: np.ndarray
    starts: np.ndarray
    """int64 [S]: where the shard's rows begin."""
    counts: np.ndarray
    """int64 [S]: how many they are."""
    verified: np.ndarray
    """bool [S]: whether every byte was read against its checksum, or written by the one who says so."""
    certain: np.ndarray
    """bool [S]: whether the shard was old enough when this was written."""
    rows: Rows
    files: tuple[str, ...] = ()
    """Which this was read from."""

    def find(self, names: np.ndarray, sizes: np.ndarray, times: np.ndarray, full: bool) -> np.ndarray:
        """Where these shards, as they are now, are in the index; -1 where that is in doubt. int64 [N]."""
        if not len(self.names):
            return np.full(len(names), -1)
        at = np.minimum(np.searchsorted(self.names, names), len(self.names) - 1)
        same = (self.names[at] == names) & (self.sizes[at] == sizes) & (self.times[at] == times)
        same &= self.certain[at]
        if full:
            same &= self.verified[at]
        return np.where(same, at, -1)


def entry_of(path: str, size: int, rows: Rows) -> Entry | None:
    """Of a shard that was just written with `size` bytes; None where it is another one by now."""
    file_system, inner = resolve(path)
    with contextlib.suppress(OSError):
        info = file_system.get_file_info(inner)
        if info.size == size and info.mtime_ns is not None:
            return Entry(base_name(path), size, info.mtime_ns, rows)
    return None


def names_of(names: Sequence[str]) -> np.ndarray:
    """As bytes [N], which sort as the names do."""
    return np.array([name.encode() for name in names], np.bytes_) if len(names) else np.zeros(0, "S1")


def index_files(folder: str) -> list[str]:
    """Paths of a dataset's index and its parts, the oldest part first."""
    return sorted(
        (path for path in list_files(folder, hidden=True) if _NAME.fullmatch(base_name(path))),
        key=lambda path: (base_name(path) != INDEX, path),
    )


def forget(folder: str) -> None:
    """Removes the index."""
    for path in index_files(folder):
        remove(path)


def read_index(folder: str, id_column: str) -> Index:
    """Empty where there is none; what is damaged or of another column is left out."""
    files = index_files(folder)
    parts = [part for path in files if (part := _read(path, id_column)) is not None]
    rows = Rows.joined([part.pop("rows") for part in parts])
    counts = _column(parts, "counts", np.int64)
    names = np.concatenate([part["names"] for part in parts]) if parts else np.zeros(0, "S1")
    order = np.argsort(names, kind="stable")
    ordered = names[order]
    last = np.ones(len(order), bool)  # of a shard that is there twice the one written last counts
    last[:-1] = ordered[1:] != ordered[:-1]
    order = order[last]
    return Index(
        names[order],
        _column(parts, "sizes", np.int64)[order],
        _column(parts, "times", np.int64)[order],
        (np.cumsum(counts) - counts)[order],
        counts[order],
        _column(parts, "verified", bool)[order],
        _column(parts, "certain", bool)[order],
        rows,
        tuple(files),
    )


def _column(parts: Sequence[dict[str, Any]], name: str, dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(part[name] for part in parts)]).astype(dtype, copy=False)


def _read(path: str, id_column: str) -> dict[str, Any] | None:
    file_system, inner = resolve(path)
    try:
        with file_system.open_input_file(inner) as file, np.load(file, allow_pickle=False) as stored:
            head = json.loads(stored["head"].tobytes())
            if (head["version"], head["id_column"]) != (_VERSION, id_column):
                return None
            rows = Rows(stored["keys"], stored["errors"], stored["lengths"])
            part = {name: stored[name] for name in ("names", "sizes", "times", "counts", "verified")}
        if len({len(column) for column in part.values()}) > 1 or part["counts"].sum() != len(rows):
            return None
        times = part["times"]
        return {**part, "certain": (times > 0) & (times <= head["written"] - _DOUBT_NS), "rows": rows}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def write_index(
    folder: str,
    id_column: str,
    written: int,
    names: np.ndarray,
    sizes: np.ndarray,
    times: np.ndarray,
    counts: np.ndarray,
    verified: np.ndarray,
    rows: Rows,
    name: str = INDEX,
) -> None:
    """`written`: in ns, from before the shards were listed."""
    head = json.dumps({"version": _VERSION, "id_column": id_column, "written": written})
    content = io.BytesIO()
    np.savez(
        content,
        head=np.frombuffer(head.encode(), np.uint8),
        names=names,
        sizes=sizes.astype(np.int64),
        times=times.astype(np.int64),
        counts=counts.astype(np.int32),
        verified=verified,
        keys=rows.keys,
        errors=rows.errors,
        lengths=rows.lengths,
    )
    write_bytes(join(folder, name), content.getbuffer())


class Journal:
    """The shards of a run at work, written to the index in parts as their workers tell of them. Where a part
    can't be written its shards are read next time."""

    SHARDS, SECONDS = 4096, 300.0

    def __init__(self, folder: str, id_column: str) -> None:
        self._folder, self._id_column = folder, id_column
        self._entries: list[Entry] = []
        self._total = 0
        self._last = time.monotonic()

    def add(self, entry: Entry | None) -> None:
        if entry is None:
            return
        self._entries.append(entry)
        self._total += 1
        enough = len(self._entries) >= INDEX_FROM_SHARDS and time.monotonic() - self._last > self.SECONDS
        if enough or len(self._entries) >= self.SHARDS:
            self.flush()

    def flush(self) -> None:
        """Writes what is old enough to be believed; the rest waits."""
        now = time.time_ns()
        ripe = [entry for entry in self._entries if entry.time_ns <= now - _DOUBT_NS]
        if not ripe or self._total < INDEX_FROM_SHARDS:
            return
        self._entries = [entry for entry in self._entries if entry.time_ns > now - _DOUBT_NS]
        self._last = time.monotonic()
        with contextlib.suppress(OSError):
            write_index(
                self._folder,
                self._id_column,
                now,
                names_of([entry.name for entry in ripe]),
                np.array([entry.size for entry in ripe]),
                np.array([entry.time_ns for entry in ripe]),
                np.array([len(entry.rows) for entry in ripe]),
                np.ones(len(ripe), bool),
                Rows.joined([entry.rows for entry in ripe]),
                f"_index-{now:020}.npz",
            )
