"""Small shards into few files with large row groups.

    data/ (many shards) ──copy, compare──▶ _compacted/ ──commit──▶ data/ (few files)

The commit is one step: on a local file system the two folders change places (`renameat2`, where the
kernel and the file system can), so that whoever reads `data/` sees one state or the other. Elsewhere it is
the file `_compacted.json`, from which on this project's readers look into `_compacted/`; the files are then
brought to `data/`. Stopped anywhere, the same call goes on: before the commit it begins again, after it it
finishes.
"""

from __future__ import annotations

import ctypes
import json
import os
import posixpath
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pmpd.errors import UserError
from pmpd.storage.dataset import (
    COMMITTED,
    COMPACTED,
    SOURCE_KEY,
    dataset_folder,
    parquet_options,
    remove_leftovers,
    shard_files,
)
from pmpd.storage.files import exists, list_files, read_bytes, remove, resolve, told, write_bytes
from pmpd.storage.index import forget
from pmpd.storage.keys import alike
from pmpd.storage.manifest import read_manifest
from pmpd.storage.parquet import open_parquet
from pmpd.storage.scan import Scan, scan
from pmpd.storage.uri import base_name, join, shown

ROW_GROUP_BYTES = 128 << 20
FILE_BYTES = 1 << 30
_INPUTS = ("prompts", "references", "conversations")
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux


@dataclass(frozen=True)
class Compaction:
    """What was done."""

    rows: int
    shards_before: int
    shards_after: int
    bytes_before: int
    bytes_after: int


def compact(
    dataset: str | Path, row_group_bytes: int = ROW_GROUP_BYTES, file_bytes: int = FILE_BYTES
) -> Compaction:
    """Rewrites a dataset's shards as few files, each row once as it was; sizes are those of rows in memory.
    Only for the one run that holds the folder.

    UserError: no dataset there, a shard that can't be read, or an input whose rows are read one by one.
    """
    folder = dataset_folder(dataset)
    finish(folder)
    manifest = read_manifest(folder)
    before = shard_files(folder)
    if manifest is None or not before:
        raise UserError(f"{shown(folder)}: no dataset with rows; give a folder with data/*.parquet in it")
    if manifest["table"] in _INPUTS:
        raise UserError(
            f"{shown(folder)}: workers read single rows of {manifest['table']}, which large row groups "
            f"would make slow; compact what is made from them (labels, generations)"
        )
    rows = manifest.get("counts", {}).get("rows", 0)
    size = sum(size for _, size, _ in before)
    if len(before) == 1 or all(base_name(path).startswith("compact-") for path, *_ in before):
        return Compaction(rows, len(before), len(before), size, size)
    with open_parquet(before[0][0]) as parquet:
        id_column = parquet.schema_arrow.names[0]
    held = scan(folder, id_column)
    if held.unreadable:
        raise UserError(
            f"{next(iter(held.unreadable.values()))}; run the command that made {shown(folder)} again: it "
            f"repairs that, then compact"
        )
    target = join(folder, COMPACTED)
    for path in list_files(target, hidden=True):
        remove(path)
    written = _copy([path for path, *_ in before], target, row_group_bytes, file_bytes)
    _compare(held, written, id_column, folder)
    if [(path, size) for path, size, _ in shard_files(folder)] != [(path, size) for path, size, _ in before]:
        raise UserError(f"{shown(folder)}: its shards changed meanwhile; let the other run end, then compact")
    if not _exchange(folder):
        write_bytes(join(folder, COMMITTED), json.dumps([base_name(path) for path in written]).encode())
    finish(folder)
    after = shard_files(folder)
    return Compaction(len(held), len(before), len(after), size, sum(size for _, size, _ in after))


def _copy(paths: list[str], target: str, row_group_bytes: int, file_bytes: int) -> list[str]:
    """Writes the rows of the shards, in order, as `compact-*.parquet`; their paths."""
    schema, sources = _schema_of(paths)
    file_system, inner = resolve(target)
    file_system.create_dir(inner, recursive=True)
    written: list[str] = []
    writer: pq.ParquetWriter | None = None
    pending: list[pa.Table] = []
    in_file = 0

    def flush(end_file: bool) -> None:
        nonlocal writer, in_file
        if pending:
            group = pa.concat_tables(pending)
            pending.clear()
            if writer is None:
                written.append(join(target, f"compact-{len(written):05}.parquet"))
                writer = pq.ParquetWriter(
                    resolve(written[-1])[1],
                    schema.with_metadata({**(schema.metadata or {}), SOURCE_KEY: ",".join(sources)}),
                    filesystem=file_system,
                    **parquet_options(schema),
                )
            writer.write_table(group.replace_schema_metadata(writer.schema.metadata), len(group))
            in_file += group.nbytes
        if writer is not None and (end_file or in_file >= file_bytes):
            writer.close()
            writer, in_file = None, 0

    with told(target):
        try:
            for path in paths:
                with open_parquet(path) as parquet:
                    for group in range(parquet.num_row_groups):
                        table = parquet.read_row_group(group)
                        most = max(1, int(row_group_bytes * len(table) / max(1, table.nbytes)))
                        for first in range(0, len(table), most):
                            pending.append(table.slice(first, most))
                            if sum(part.nbytes for part in pending) >= row_group_bytes:
                                flush(end_file=False)
            flush(end_file=True)
        finally:
            if writer is not None:
                writer.close()
    if isinstance(file_system, pafs.LocalFileSystem):
        for path in [*(resolve(path)[1] for path in written), inner]:
            _sync(path)
    return written


def _schema_of(paths: list[str]) -> tuple[pa.Schema, list[str]]:
    """The schema all shards have, and the fingerprints of the code that made them."""
    first: pa.Schema | None = None
    sources: set[str] = set()
    for path in paths:
        with open_parquet(path) as parquet:
            schema = parquet.schema_arrow
        sources |= set((schema.metadata or {}).get(SOURCE_KEY, b"unknown").decode().split(","))
        first = first or schema
        if not schema.equals(first):
            raise UserError(
                f"{shown(path)}: its columns are not those of {shown(paths[0])}: no one file can hold both"
            )
    assert first is not None
    return first, sorted(sources)


def _compare(held: Scan, written: list[str], id_column: str, folder: str) -> None:
    """UserError unless the new files, read back against their checksums, hold the ids of the old ones."""
    for path in written:
        with open_parquet(path) as parquet:
            for group in range(parquet.num_row_groups):
                parquet.read_row_group(group)
    new = scan(join(folder, COMPACTED), id_column, full=False, folder_itself=True)
    old_keys, new_keys = (np.sort(part) for part in alike(held.keys, new.keys))
    if new.unreadable or not np.array_equal(old_keys, new_keys) or new.errors.sum() != held.errors.sum():
        raise UserError(
            f"{shown(folder)}: what was written is not what was read; nothing is changed, try again"
        )


def _exchange(folder: str) -> bool:
    """Lets `data` and `_compacted` change places, in one step. False where that can't be had."""
    file_system, inner = resolve(folder)
    if not isinstance(file_system, pafs.LocalFileSystem) or sys.platform != "linux":
        return False
    try:
        rename: Any = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here = -100  # AT_FDCWD
    first, second = (os.fsencode(posixpath.join(inner, name)) for name in ("data", COMPACTED))
    if rename(here, first, here, second, _EXCHANGE) != 0:
        return False
    _sync(inner)
    return True


def finish(folder: str) -> None:
    """After a commit: brings the files to `data/`. Before one, or after an exchange, drops what is left."""
    leftover, committed = join(folder, COMPACTED), join(folder, COMMITTED)
    content = read_bytes(committed)
    if content is not None:
        names = set(json.loads(content))
        data = join(folder, "data")
        for path in list_files(leftover):
            if base_name(path) in names:
                _duplicate(path, join(data, base_name(path)))
        for path in list_files(data):
            if base_name(path) not in names and base_name(path).endswith(".parquet"):
                remove(path)
        forget(folder)
        remove(committed)
    for path in list_files(leftover, hidden=True):
        remove(path)
    file_system, inner = resolve(leftover)
    if exists(leftover):
        file_system.delete_dir(inner)


def remove_temporary(dataset: str | Path) -> None:
    """Removes what killed writers left behind, and finishes a compaction that was stopped after its commit.
    Only for the one run that holds the folder."""
    remove_leftovers(dataset)
    if exists(join(dataset_folder(dataset), COMMITTED)):
        finish(dataset_folder(dataset))


def _duplicate(source: str, target: str) -> None:
    file_system, inner = resolve(source)
    goal = resolve(target)[1]
    if not isinstance(file_system, pafs.LocalFileSystem):
        file_system.copy_file(inner, goal)
        return
    Path(goal).unlink(missing_ok=True)
    os.link(inner, goal)


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems can't sync a folder
    finally:
        os.close(handle)
