"""What a dataset holds, looked up in its shards: the only truth about what is done.

The ids of shards that were read before are kept beside the data in `_index.parquet`, with each shard's size
and time. It is a memory of the shards and no more: a shard that is new, changed, or written about when the
index was, is read again, and an index that is damaged or gone is made again.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pmpd.errors import UserError
from pmpd.storage import keys as ids_of
from pmpd.storage.dataset import dataset_folder, parquet_in, shard_files
from pmpd.storage.files import StorageError, exists, write_bytes
from pmpd.storage.parquet import ForeignTypeError, open_parquet
from pmpd.storage.uri import base_name, join, shown

INDEX = "_index.parquet"
_VERSION = 1
INDEX_FROM_SHARDS = 64
"""Fewer are read as fast as an index."""
_DOUBT_NS = 5 * 10**9
"""A shard as young as this when the index was written may have been written once more within its time's
resolution."""


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


@dataclass(frozen=True)
class _Rows:
    """The rows of one shard, compactly."""

    keys: np.ndarray
    errors: np.ndarray
    lengths: np.ndarray
    schema: pa.Schema | None = None


@dataclass
class Scan:
    """The rows of a dataset's readable shards, one shard after the other: 13 bytes a row where the ids are 16
    hex digits."""

    paths: list[str] = field(default_factory=list)
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
    rows = _read(path, id_column, full)
    assert rows.schema is not None
    ids = tuple(ids_of.decode(rows.keys))
    return Shard(str(path), ids, tuple(rows.errors.tolist()), tuple(rows.lengths.tolist()), rows.schema)


def _read(path: str | Path, id_column: str, full: bool) -> _Rows:
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
    count = len(table)
    errors, lengths = np.zeros(count, bool), np.zeros(count, np.int32)
    if "error" in wanted:
        errors = table["error"].is_valid().to_numpy()
    if "prompt_tokens" in wanted:
        lengths = table["prompt_tokens"].fill_null(0).to_numpy().astype(np.int32)
    return _Rows(ids_of.encode(table[id_column]), errors, lengths, schema)


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
    files = parquet_in(str(dataset)) if folder_itself else shard_files(folder)
    index = _Index.read(folder, id_column)

    def look(file: tuple[str, int, int]) -> _Rows | str:
        try:
            return _read(file[0], id_column, full)
        except (StorageError, ForeignTypeError):  # no damage: nothing of it may be set aside
            raise
        except ValueError as error:
            return str(error)

    known = {path: index.rows(path, size, time_ns, full) for path, size, time_ns in files}
    unknown = [file for file in files if known[file[0]] is None]
    with ThreadPoolExecutor(min(8, max(1, len(unknown)))) as pool:
        looked = dict(zip((path for path, *_ in unknown), pool.map(look, unknown), strict=True))
    result = Scan(read=len(unknown))
    parts: list[_Rows] = []
    held: list[list] = []
    for path, size, time_ns in files:
        found = looked.get(path, known[path])
        assert found is not None
        if isinstance(found, str):
            result.unreadable[path] = found
            continue
        parts.append(found)
        result.paths.append(path)
        held.append([base_name(path), size, time_ns, len(found.keys), full or path not in looked])
    result.starts = np.cumsum([0, *(len(part.keys) for part in parts)])
    result.keys = ids_of.concatenate([part.keys for part in parts])
    if parts:
        result.errors = np.concatenate([part.errors for part in parts])
        result.lengths = np.concatenate([part.lengths for part in parts])
    if remember and unknown and len(files) >= INDEX_FROM_SHARDS:
        with contextlib.suppress(OSError):  # a folder that can't be written to is read again next time
            _write_index(folder, id_column, listed, held, result)
    return result


class _Index:
    """What an earlier scan found."""

    def __init__(self) -> None:
        self.shards: dict[str, tuple[int, int, bool, slice]] = {}
        self.written = 0
        self.table: _Rows | None = None

    @classmethod
    def read(cls, folder: str, id_column: str) -> _Index:
        """Empty where there is none, it is damaged, or it is of another column."""
        index, path = cls(), join(folder, INDEX)
        if not exists(path):
            return index
        try:
            with open_parquet(path) as parquet:
                head = json.loads(parquet.schema_arrow.metadata[b"pmpd.index"])
                if (head["version"], head["id_column"]) != (_VERSION, id_column):
                    return index
                table = parquet.read()
            keys = table["key"].combine_chunks()
            index.table = _Rows(
                keys.to_numpy() if keys.type == pa.uint64() else np.array(keys.to_pylist(), np.bytes_),
                table["error"].to_numpy(),
                table["length"].to_numpy(),
            )
            first = 0
            for name, size, time_ns, rows, verified in head["shards"]:
                index.shards[name] = (size, time_ns, verified, slice(first, first + rows))
                first += rows
            index.written = head["written"]
            if first != len(index.table.keys):
                return cls()
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
            return cls()
        return index

    def rows(self, path: str, size: int, time_ns: int, full: bool) -> _Rows | None:
        """The rows of a shard that is as it was; None where that is in doubt."""
        entry = self.shards.get(base_name(path))
        if entry is None or self.table is None:
            return None
        known_size, known_time, verified, at = entry
        same = (known_size, known_time) == (size, time_ns)
        if not same or time_ns > self.written - _DOUBT_NS or (full and not verified):
            return None
        return _Rows(self.table.keys[at], self.table.errors[at], self.table.lengths[at])


def _write_index(folder: str, id_column: str, listed: int, shards: Sequence[list], found: Scan) -> None:
    head = {"version": _VERSION, "id_column": id_column, "written": listed, "shards": shards}
    keys = found.keys
    table = pa.table(
        {
            "key": pa.array(keys) if keys.dtype == np.uint64 else pa.array(keys.tolist(), pa.binary()),
            "error": pa.array(found.errors),
            "length": pa.array(found.lengths),
        }
    ).replace_schema_metadata({"pmpd.index": json.dumps(head)})
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    write_bytes(join(folder, INDEX), sink.getvalue())
