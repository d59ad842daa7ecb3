"""Datasets: a folder of Parquet shards, written whole or not at all, scanned without reading their
columns."""

from __future__ import annotations

import posixpath
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pmpd.errors import UserError
from pmpd.storage.files import exists, file_infos, list_files, remove, resolve, write_bytes
from pmpd.storage.multipart import abort_uploads
from pmpd.storage.parquet import open_parquet
from pmpd.storage.provenance import source_fingerprint
from pmpd.storage.schemas import features_type
from pmpd.storage.uri import base_name, join, parent, shown

SOURCE_KEY = b"pmpd.source"
"""In a shard's schema metadata: `source_fingerprint` of the code that made its rows."""


COMPACTED, COMMITTED = "_compacted", "_compacted.json"
"""Beside the data: the folder that a compaction writes, and the file that says it counts."""


def data_folder(dataset: str | Path) -> str:
    """Where the shards of a dataset lie: the path to give to pandas, DuckDB, polars or `datasets`."""
    return join(dataset_folder(dataset), "data")


def dataset_folder(path: str | Path) -> str:
    """The dataset's own folder, for this or for its data folder: people pass the one they were shown last."""
    text = str(path).rstrip("/")
    below = base_name(text) == "data" and "/" in shown(text) and not exists(join(text, "data"))
    return parent(text) if below else text


def list_shards(dataset: str | Path) -> list[str]:
    """Full paths of the dataset's shards, sorted; [] where there is none."""
    return [path for path, *_ in shard_files(dataset)]


def shard_files(dataset: str | Path) -> list[tuple[str, int, int]]:
    """(path, bytes, time of the last change in ns) of the shards, sorted; [] where there is none."""
    folder = live_folder(dataset)
    names, sizes, times = parquet_names(folder)
    return list(zip(Paths(folder, names), sizes.tolist(), times.tolist(), strict=True))


def parquet_names(folder: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Names (bytes [N], sorted), bytes and times of the last change in ns (int64 [N], 0 where a store tells
    none) of the Parquet files in a folder."""
    infos = [info for info in file_infos(folder) if info.base_name.endswith(".parquet")]
    names = np.array([info.base_name.encode() for info in infos], np.bytes_ if infos else "S1")
    order = np.argsort(names)
    sizes, times = (
        np.array([getattr(info, what) or 0 for info in infos], np.int64) for what in ("size", "mtime_ns")
    )
    return names[order], sizes[order], times[order]


class Paths(Sequence[str]):
    """The paths of a folder's files, made as they are asked for: 10^5 of them fit."""

    def __init__(self, folder: str, names: np.ndarray) -> None:
        self._folder, self._names = folder, names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [join(self._folder, name.decode()) for name in self._names[index]]
        return join(self._folder, self._names[index].decode())


def live_folder(dataset: str | Path) -> str:
    """Where the shards that count lie: in `data`, except from the moment a compaction is done until its files
    have been brought there."""
    folder = dataset_folder(dataset)
    committed = join(folder, COMMITTED)
    return join(folder, COMPACTED) if exists(committed) else join(folder, "data")


def remove_leftovers(dataset: str | Path) -> None:
    """Removes what killed writers left behind, in the dataset's folder and its data. Only for the one run
    that holds the folder."""
    for folder in (str(dataset), data_folder(dataset)):
        for path in list_files(folder, hidden=True):
            if shown(path).endswith(".tmp"):
                remove(path)
    abort_uploads(dataset)


# ------------------------------------------------------------------------------------------------------------


def ragged(arrays: Sequence[np.ndarray | None], head_dim: int) -> pa.Array:
    """`features_type(head_dim)` from float16 arrays [T_i, head_dim]; None gives null."""
    present = [
        np.ascontiguousarray(array, dtype=np.float16).reshape(-1, head_dim)
        for array in arrays
        if array is not None
    ]
    flat = np.concatenate(present) if present else np.zeros((0, head_dim), np.float16)
    inner = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1), pa.float16()), head_dim)
    lengths = iter(len(array) for array in present)
    offsets = np.cumsum([0, *(0 if array is None else next(lengths) for array in arrays)])
    mask = pa.array([array is None for array in arrays], pa.bool_())
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), inner, type=features_type(head_dim), mask=mask
    )


def to_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """A table of row dicts. A missing column is null; a key that is no column, or a value that does not fit,
    is a ValueError."""
    unknown = sorted({key for row in rows for key in row} - set(schema.names))
    if unknown:
        raise UserError(
            f"table {table_name(schema)}: no column {', '.join(unknown)}; it has {', '.join(schema.names)}"
        )
    columns = []
    for column in schema:
        values = [row.get(column.name) for row in rows]
        try:
            if _is_features(column.type):
                columns.append(ragged(values, column.type.value_type.list_size))
            else:
                columns.append(pa.array(values, column.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"table {table_name(schema)}: a value of column {column.name} is no {column.type}: {error}"
            ) from error
    return pa.Table.from_arrays(columns, schema=schema)


def _is_features(type_: pa.DataType) -> bool:
    return (
        pa.types.is_list(type_)
        and pa.types.is_fixed_size_list(type_.value_type)
        and pa.types.is_float16(type_.value_type.value_type)
    )


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """How every file of ours is written. Features have no dictionary: no two of them are equal, and trying
    took three quarters of the time."""
    return {
        "compression": "zstd",
        "write_page_checksum": True,
        "use_dictionary": [
            leaf for field in schema if not _is_features(field.type) for leaf in _leaves(field)
        ],
    }


def _leaves(field: pa.Field) -> Iterator[str]:
    """The columns of a field, as Parquet names them."""
    kind = field.type
    if pa.types.is_struct(kind):
        yield from (f"{field.name}.{leaf}" for child in kind for leaf in _leaves(child))
    elif pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        element = kind.value_field.with_name("element")
        yield from (f"{field.name}.list.{leaf}" for leaf in _leaves(element))
    else:
        yield field.name


def table_name(schema: pa.Schema) -> str:
    return (schema.metadata or {}).get(b"pmpd.table", b"?").decode()


def write_shard(table: pa.Table, path: str | Path, row_group_rows: int | None = None) -> int:
    """Writes one Parquet file, all or nothing, with checksums; its size in bytes. Row groups are what
    `read_rows` reads at least. The file says which sources wrote it (`pmpd.source`), unless the table says so
    already.

    ShardWriteError where the disk is full or not writable: nothing else is touched by that.
    """
    table = table.replace_schema_metadata({SOURCE_KEY: source_fingerprint(), **(table.schema.metadata or {})})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=row_group_rows, **parquet_options(table.schema))
    content = sink.getvalue()
    write_bytes(path, content)
    return content.size


def read_shard(path: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """One shard with its checksums verified."""
    with open_parquet(path) as parquet:
        return parquet.read(columns=None if columns is None else list(columns))


def read_table(dataset: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of a dataset (the folder that holds `manifest.json`), in no particular order. ValueError where
    there is none."""
    shards = list_shards(dataset)
    if not shards:
        raise UserError(
            f"{shown(dataset)}: no Parquet in {shown(data_folder(dataset))}; give a dataset folder, e.g. "
            f"results/label/labels"
        )
    try:
        return pa.concat_tables([read_shard(path, columns) for path in shards])
    except FileNotFoundError:  # compacted in the meantime
        if list_shards(dataset) == shards:
            raise
        return read_table(dataset, columns)


def read_rows(path: str | Path, rows: Sequence[int]) -> list[dict[str, Any]]:
    """The given rows of one shard as dicts, in the given order; reads only the row groups they are in."""
    with open_parquet(path) as parquet:
        ends = np.cumsum(
            [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        )
        groups = np.searchsorted(ends, rows, side="right")
        tables = {group: parquet.read_row_group(group) for group in sorted(set(groups.tolist()))}
    starts = np.concatenate([[0], ends[:-1]])
    return [
        tables[group].slice(row - int(starts[group]), 1).to_pylist()[0]
        for group, row in zip(groups.tolist(), rows, strict=True)
    ]


def remove_dataset(dataset: str | Path) -> None:
    """Removes the folder with all that is in it; fine if it is gone already."""
    file_system, inner = resolve(dataset_folder(dataset))
    if exists(dataset_folder(dataset)):
        file_system.delete_dir(inner)


def set_aside(path: str, dataset: str | Path) -> str:
    """Moves an unreadable shard out of the data, into `unreadable/`, and returns its new path."""
    target = join(dataset, "unreadable", f"{int(time.time())}-{base_name(path)}")
    file_system, inner = resolve(path)
    target_inner = resolve(target)[1]
    file_system.create_dir(posixpath.dirname(target_inner), recursive=True)
    file_system.move(inner, target_inner)
    return target


def drop_rows(path: str, rows: Iterable[int]) -> None:
    """Rewrites a shard without the given rows, or removes it if none is left."""
    table = read_shard(path)
    dropped = set(rows)
    kept = [row for row in range(len(table)) if row not in dropped]
    if kept:
        write_shard(table.take(pa.array(kept, pa.int64())), path)
    else:
        remove(path)


def datasets_under(path: str | Path) -> Iterator[str]:
    """The dataset folders at `path`: itself, or those one level below."""
    file_system, inner = resolve(path)
    if file_system.get_file_info(inner).type == pafs.FileType.File:
        return
    if exists(data_folder(path)) or exists(join(path, "manifest.json")):
        yield str(path)
        return
    for info in sorted(
        file_system.get_file_info(pafs.FileSelector(inner, allow_not_found=True)),
        key=lambda info: info.base_name,
    ):
        below = join(path, info.base_name)
        if info.type == pafs.FileType.Directory and (
            exists(data_folder(below)) or exists(join(below, "manifest.json"))
        ):
            yield below
