"""Datasets: a folder of Parquet shards, written whole or not at all, scanned without reading their
columns."""

from __future__ import annotations

import posixpath
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pmpd.errors import UserError
from pmpd.storage.files import StorageError, exists, list_files, remove, resolve, write_bytes
from pmpd.storage.multipart import abort_uploads
from pmpd.storage.parquet import ForeignTypeError, open_parquet
from pmpd.storage.schemas import features_type
from pmpd.storage.uri import base_name, join, parent, shown


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
    return sorted(path for path in list_files(data_folder(dataset)) if shown(path).endswith(".parquet"))


def remove_temporary(dataset: str | Path) -> None:
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


def table_name(schema: pa.Schema) -> str:
    return (schema.metadata or {}).get(b"pmpd.table", b"?").decode()


def write_shard(table: pa.Table, path: str | Path, row_group_rows: int | None = None) -> int:
    """Writes one Parquet file, all or nothing, with checksums; its size in bytes. Row groups are what
    `read_rows` reads at least.

    ShardWriteError where the disk is full or not writable: nothing else is touched by that.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, row_group_size=row_group_rows)
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
    return pa.concat_tables([read_shard(path, columns) for path in shards])


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


@dataclass(frozen=True)
class Shard:
    """What the driver knows of one readable shard."""

    path: str
    ids: tuple[str, ...]
    errors: tuple[bool, ...]
    """Whether the row's `error` is set; all False where the table has no such column."""
    lengths: tuple[int, ...]
    """The row's `prompt_tokens` (0 where null or not in the table)."""
    schema: pa.Schema


def inspect_shard(path: str | Path, id_column: str, full: bool = True) -> Shard:
    """Reads what identifies the rows of a shard. With `full` every byte of every column is read against its
    checksum.

    ValueError where the shard is damaged or has no such column.
    """
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
    errors = table["error"].is_valid().to_pylist() if "error" in wanted else [False] * count
    lengths = (
        [length or 0 for length in table["prompt_tokens"].to_pylist()]
        if "prompt_tokens" in wanted
        else [0] * count
    )
    return Shard(str(path), tuple(table[id_column].to_pylist()), tuple(errors), tuple(lengths), schema)


@dataclass
class Scan:
    """The shards of a dataset as found on disk."""

    shards: list[Shard] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    """Path -> why."""

    def where(self) -> dict[str, tuple[int, int]]:
        """Id -> (index into `shards`, row): where it was found first."""
        found: dict[str, tuple[int, int]] = {}
        for index, shard in enumerate(self.shards):
            for row, key in enumerate(shard.ids):
                found.setdefault(key, (index, row))
        return found


def scan(dataset: str | Path, id_column: str = "prompt_id", full: bool = True) -> Scan:
    """Looks at every shard of a dataset: the only truth about what is done."""
    paths = list_shards(dataset)

    def look(path: str) -> Shard | str:
        try:
            return inspect_shard(path, id_column, full)
        except (StorageError, ForeignTypeError):  # no damage: nothing of it may be set aside
            raise
        except ValueError as error:
            return str(error)

    result = Scan()
    with ThreadPoolExecutor(min(8, max(1, len(paths)))) as pool:
        for path, found in zip(paths, pool.map(look, paths), strict=True):
            if isinstance(found, str):
                result.unreadable[path] = found
            else:
                result.shards.append(found)
    return result


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
