"""What a dataset holds, looked up in its shards: the only truth about what is done. Shards that were read
before and have not changed are looked up in the index (`pmpd.storage.index`)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from pmpd.errors import UserError
from pmpd.storage import keys as ids_of
from pmpd.storage.dataset import Paths, dataset_folder, live_folder, parquet_names
from pmpd.storage.files import StorageError, remove
from pmpd.storage.index import INDEX, INDEX_FROM_SHARDS, Rows, read_index, write_index
from pmpd.storage.parquet import ForeignTypeError, open_parquet
from pmpd.storage.uri import base_name, join, shown

_BATCH = 4096
"""Shards that are looked at before their rows are packed together."""


@dataclass(frozen=True)
class Shard:
    """What is known of one readable shard."""

    path: str
    ids: tuple[str, ...]
    errors: tuple[bool, ...]
    """Whether the row's `error` is set; all False where the table has no such column."""
    lengths: tuple[int, ...]
    """The row's `prompt_tokens` (0 where null or not in the table)."""
    schema: pa.Schema


@dataclass
class Scan:
    """The rows of a dataset's readable shards, one shard after the other: 13 bytes a row where the ids are 16
    hex digits."""

    paths: Sequence[str] = ()
    starts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    """Shard s holds the rows starts[s] to starts[s + 1]; int64 [shards + 1]."""
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    """See `pmpd.storage.keys`."""
    errors: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    unreadable: dict[str, str] = field(default_factory=dict)
    """Path -> why."""
    read: int = 0
    """Shards that had to be opened."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def schema(self) -> pa.Schema | None:
        """Of the first shard."""
        if not self.paths:
            return None
        with open_parquet(self.paths[0]) as parquet:
            return parquet.schema_arrow

    @property
    def shards(self) -> list[Shard]:
        """The shards one by one, with ids as strings: for datasets that fit."""
        schema = self.schema
        return [
            Shard(
                path,
                tuple(ids_of.decode(self.keys[first:last])),
                tuple(self.errors[first:last].tolist()),
                tuple(self.lengths[first:last].tolist()),
                schema,
            )
            for path, first, last in zip(self.paths, self.starts, self.starts[1:], strict=False)
        ]

    def place(self, row: int) -> tuple[int, int]:
        """(shard, row in it) of a row."""
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return shard, int(row - self.starts[shard])

    def where(self) -> dict[str, tuple[int, int]]:
        """Id -> (shard, row in it): where it was found first."""
        found: dict[str, tuple[int, int]] = {}
        for index, shard in enumerate(self.shards):
            for row, key in enumerate(shard.ids):
                found.setdefault(key, (index, row))
        return found


def inspect_shard(path: str | Path, id_column: str, full: bool = True) -> Shard:
    """Reads what identifies the rows of a shard. With `full` every byte of every column is read against its
    checksum.

    UserError where the shard is damaged or has no such column.
    """
    rows, schema = _read(path, id_column, full)
    ids = tuple(ids_of.decode(rows.keys))
    return Shard(str(path), ids, tuple(rows.errors.tolist()), tuple(rows.lengths.tolist()), schema)


def rows_of(table: pa.Table, id_column: str) -> Rows:
    """What an index knows of a table's rows."""
    errors, lengths = np.zeros(len(table), bool), np.zeros(len(table), np.int32)
    if "error" in table.schema.names:
        errors = table["error"].is_valid().to_numpy()
    if "prompt_tokens" in table.schema.names:
        lengths = table["prompt_tokens"].fill_null(0).to_numpy().astype(np.int32)
    return Rows(ids_of.encode(table[id_column]), errors, lengths)


def _read(path: str | Path, id_column: str, full: bool) -> tuple[Rows, pa.Schema]:
    try:
        with open_parquet(path) as parquet:
            schema = parquet.schema_arrow
            if id_column not in schema.names:
                raise UserError(f"no column {id_column}")
            wanted = [name for name in (id_column, "error", "prompt_tokens") if name in schema.names]
            if full:
                for group in range(parquet.num_row_groups):
                    parquet.read_row_group(group)
            table = parquet.read(columns=wanted)
    except (StorageError, ForeignTypeError):
        raise
    except (pa.ArrowException, OSError, ValueError, EOFError) as error:
        raise UserError(f"shard {shown(path)} can't be read: {error}") from error
    return rows_of(table, id_column), schema


def scan(
    dataset: str | Path,
    id_column: str = "prompt_id",
    full: bool = True,
    remember: bool = False,
    folder_itself: bool = False,
) -> Scan:
    """Looks at every shard of a dataset. With `remember` (for the one run that holds the folder) what was
    read is kept in the index. With `folder_itself` the shards lie in that folder, not in its `data`."""
    folder = dataset_folder(dataset)
    listed = time.time_ns()
    where = str(dataset) if folder_itself else live_folder(folder)
    names, sizes, times = parquet_names(where)
    index = read_index(folder, id_column)
    at = index.find(names, sizes, times, full)
    paths = Paths(where, names)
    unknown = np.flatnonzero(at < 0)
    looked, counts_looked, unreadable = _look([paths[shard] for shard in unknown], id_column, full)

    known = at >= 0
    starts, counts, verified = (np.zeros(len(names), np.int64) for _ in range(3))
    starts[known], counts[known], verified[known] = (
        column[at[known]] for column in (index.starts, index.counts, index.verified)
    )
    counts[unknown] = counts_looked
    starts[unknown] = np.cumsum(np.maximum(counts_looked, 0)) - np.maximum(counts_looked, 0)
    verified[unknown] = full
    kept = counts >= 0
    starts, counts, verified, known = starts[kept], counts[kept], verified[kept], known[kept]
    names, sizes, times = names[kept], sizes[kept], times[kept]

    files = index.files
    rows = _gathered(index.rows, looked, known, starts, counts)
    del index, looked
    result = Scan(
        Paths(where, names), np.cumsum([0, *counts]), rows.keys, rows.errors, rows.lengths, unreadable,
        len(unknown),
    )  # fmt: skip
    news = len(unknown) or [base_name(path) for path in files] != [INDEX]
    if remember and news and len(names) >= INDEX_FROM_SHARDS:
        with contextlib.suppress(OSError):  # a folder that can't be written to is read again next time
            write_index(folder, id_column, listed, names, sizes, times, counts, verified.astype(bool), rows)
            for path in set(files) - {join(folder, INDEX)}:
                remove(path)
    return result


def _look(paths: Sequence[str], id_column: str, full: bool) -> tuple[Rows, np.ndarray, dict[str, str]]:
    """Opens shards: the rows of those that can be read, one after the other; how many each has, -1 where it
    can't be read; and why."""

    def look(path: str) -> Rows | str:
        try:
            return _read(path, id_column, full)[0]
        except (StorageError, ForeignTypeError):  # no damage: nothing of it may be set aside
            raise
        except ValueError as error:
            return str(error)

    counts = np.full(len(paths), -1)
    unreadable: dict[str, str] = {}
    packed: list[Rows] = []
    with ThreadPoolExecutor(min(8, max(1, len(paths)))) as pool:
        for first in range(0, len(paths), _BATCH):
            batch: list[Rows] = []
            for shard, found in enumerate(pool.map(look, paths[first : first + _BATCH]), first):
                if isinstance(found, str):
                    unreadable[paths[shard]] = found
                else:
                    counts[shard] = len(found)
                    batch.append(found)
            packed.append(Rows.joined(batch))
    return Rows.joined(packed), counts, unreadable


def _gathered(
    remembered: Rows, looked: Rows, known: np.ndarray, starts: np.ndarray, counts: np.ndarray
) -> Rows:
    """The rows of all shards in order. `known`: bool [S], whether a shard's rows are remembered ones; what
    follows one another there is taken as one piece."""
    ends = starts + counts
    breaks = np.flatnonzero((known[1:] != known[:-1]) | (starts[1:] != ends[:-1])) + 1
    pieces = []
    for first, last in zip([0, *breaks], [*breaks, len(known)], strict=True):
        if first < last:
            source = remembered if known[first] else looked
            pieces.append(source[starts[first] : ends[last - 1]])
    return Rows.joined(pieces)
