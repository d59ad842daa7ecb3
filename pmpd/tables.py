"""The Arrow schema of every table and the only helpers that read and write them.

A dataset is a folder: `data/*.parquet` (the shards, nothing else, so that every reader of Parquet folders takes it as it is) and
`manifest.json` beside it (what made it). Paths are local ones, NFS, or URIs that `pyarrow.fs` knows (`s3://bucket/folder`).

    python -m pmpd.tables PATH      # schema, row count, nulls; checks the manifest
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import posixpath
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

SCHEMA_VERSION = 1
"""Raised when a column changes its meaning; tables of different versions are never mixed."""

_IDS = pa.list_(pa.int32())


def table_schema(name: str, fields: Sequence[tuple[str, pa.DataType]], **metadata: str) -> pa.Schema:
    """A schema that carries its table's name and version. Only the first field, the row's key, can't be null."""
    columns = [pa.field(column, type_, nullable=index > 0) for index, (column, type_) in enumerate(fields)]
    return pa.schema(columns, metadata={"pmpd.table": name, "pmpd.schema_version": str(SCHEMA_VERSION), **metadata})


PROMPTS = table_schema(
    "prompts",
    [
        ("prompt_id", pa.string()),  # 16 hex digits, see pmpd.prompts
        ("source", pa.string()),  # where the record came from, for people: "file.json.gz:17", "topics/if"
        ("prompt_tokens", pa.int32()),
        ("document_tokens", pa.int32()),  # of the whole document, before truncation
        ("prompt_text", pa.string()),
        ("input_ids", _IDS),
        ("error", pa.string()),
    ],
)

REFERENCES = table_schema(
    "references",
    [
        ("prompt_id", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("reference_text", pa.string()),
        ("reference_ids", _IDS),  # new tokens, end-of-sequence included
        ("finish_reason", pa.string()),  # eos, length, error
        ("seconds", pa.float32()),
        ("worker", pa.string()),
        ("error", pa.string()),
    ],
)

PAIR = pa.struct(
    [
        ("high", pa.int8()),
        ("low", pa.int8()),
        ("label", pa.int8()),  # switch class 0..3
        ("rouge_l", pa.list_(pa.float32())),  # of branches 0..3, not rounded (the label rule rounds); null where not computed
        ("high_rouge_l", pa.float32()),
        ("high_text", pa.string()),
        ("high_ids", _IDS),
        ("branch_tokens", _IDS),  # new tokens of branches 0..3; null where not computed
    ]
)


def features_type(head_dim: int) -> pa.DataType:
    """KV features of one row: T prompt tokens of `head_dim` halves."""
    return pa.list_(pa.list_(pa.float16(), head_dim))


@cache
def labels_schema(head_dim: int) -> pa.Schema:
    """LABELS: one row per prompt with the labels of every pair and the KV features `keys`, `values` float16 [T, head_dim]."""
    return table_schema(
        "labels",
        [
            ("prompt_id", pa.string()),
            ("prompt_tokens", pa.int32()),
            ("prompt_text", pa.string()),
            ("input_ids", _IDS),
            ("reference_text", pa.string()),
            ("reference_ids", _IDS),
            ("pairs", pa.list_(PAIR)),
            ("keys", features_type(head_dim)),
            ("values", features_type(head_dim)),
            ("feature_tokens", pa.int32()),  # T
            ("seconds", pa.float32()),
            ("worker", pa.string()),
            ("error", pa.string()),
        ],
        **{"pmpd.head_dim": str(head_dim)},
    )


TRACE = pa.list_(pa.struct([("bits", pa.int8()), ("count", pa.int32())]))
"""Run-length encoded precisions of the forwards that produced the tokens, prefill first."""

CONVERSATIONS = table_schema(
    "conversations",
    [
        ("conversation_id", pa.string()),  # run, question and choice; sorts by run: the farm's item, all turns on one worker
        ("prompt_id", pa.string()),  # the question, whatever run answers it: what runs are joined by
        ("benchmark", pa.string()),
        ("benchmark_version", pa.string()),
        ("split", pa.string()),
        ("question_id", pa.string()),  # the record's own key
        ("category", pa.string()),
        ("model_id", pa.string()),
        ("run", pa.string()),  # short name of the scheduler setting: static-42/84
        ("kind", pa.string()),  # fp, uniform, static, random, confidence, kv_cache
        ("scheduler", pa.string()),  # JSON: Scheduler.describe(), prefill_bit, max_new_tokens
        ("choice", pa.int16()),
        ("template", pa.string()),  # conversation template of the prompts
        ("turns", pa.list_(pa.string())),
        ("references", pa.list_(pa.string())),  # one per turn, null where the data set has none
    ],
)

GENERATIONS = table_schema(
    "generations",
    [
        ("row_id", pa.string()),  # 16 hex digits over conversation, setting and turn: one row each
        ("conversation_id", pa.string()),
        ("prompt_id", pa.string()),
        ("benchmark", pa.string()),
        ("benchmark_version", pa.string()),
        ("split", pa.string()),
        ("question_id", pa.string()),
        ("category", pa.string()),
        ("model_id", pa.string()),
        ("model_fingerprint", pa.string()),
        ("run", pa.string()),
        ("kind", pa.string()),
        ("scheduler", pa.string()),
        ("choice", pa.int16()),
        ("turn", pa.int8()),  # 1, 2, …; null where the whole conversation failed
        ("template", pa.string()),
        ("prompt_text", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("dropped_tokens", pa.int32()),  # cut from the prompt's left to fit the model's positions
        ("reused_tokens", pa.int32()),  # of the prompt, taken from the cache of the turn before
        ("input_ids", _IDS),
        ("reference_text", pa.string()),
        ("output_text", pa.string()),  # without special tokens, cut at the template's stop string
        ("output_tokens", pa.int32()),
        ("output_ids", _IDS),  # new tokens, end-of-sequence included
        ("output_pieces", pa.list_(pa.string())),  # the text that each new token added
        ("finish_reason", pa.string()),  # eos, length, error
        ("precision_trace", TRACE),
        ("switch_steps", _IDS),  # high_bit_steps per pair, as decided
        ("classes", pa.list_(pa.int8())),  # switch class per pair, null for schedulers that decide no class
        ("decision_scores", pa.list_(pa.list_(pa.float32()))),  # logits per pair and class
        ("prefill_seconds", pa.float32()),
        ("decode_seconds", pa.float32()),
        ("forward_seconds", pa.list_(pa.struct([("bits", pa.int8()), ("seconds", pa.float32())]))),  # of a row alone, by this worker
        ("device", pa.string()),
        ("worker", pa.string()),
        ("error", pa.string()),
    ],
)

SCORES = table_schema(
    "scores",
    [
        ("benchmark", pa.string()),
        ("benchmark_version", pa.string()),
        ("split", pa.string()),
        ("model_id", pa.string()),
        ("run", pa.string()),
        ("kind", pa.string()),
        ("scheduler", pa.string()),
        ("turn", pa.int32()),  # null: all turns together
        ("metric", pa.string()),  # rouge_l, rouge_l_stemmed, bleu, bert_score, exact_match, first_divergence
        ("against", pa.string()),  # dataset, reference_output
        ("value", pa.float64()),
        ("low", pa.float64()),  # 95 % interval by paired bootstrap over questions
        ("high", pa.float64()),
        ("difference", pa.float64()),  # value minus that of the uniform highest precision, on the same questions
        ("difference_low", pa.float64()),
        ("difference_high", pa.float64()),
        ("nearest_uniform", pa.string()),  # the uniform run of the nearest average bits; null for uniform and unquantized runs
        ("nearest_difference", pa.float64()),  # value minus that run's, paired likewise
        ("nearest_difference_low", pa.float64()),
        ("nearest_difference_high", pa.float64()),
        ("rows", pa.int64()),  # turns scored
        ("error_rows", pa.int64()),  # turns of this run that failed; excluded from `value`
        ("unpaired_rows", pa.int64()),  # turns left out because another run has no answer to them
        ("average_bits", pa.float64()),  # mean over decode forwards of the turns scored
        ("average_bits_low", pa.float64()),
        ("average_bits_high", pa.float64()),
        ("decode_time_ratio", pa.float64()),  # to the uniform highest precision, by the speed model
        ("decode_time_ratio_16", pa.float64()),  # to the unquantized model
    ],
)


# ---------------------------------------------------------------------------------------------------------------- paths and bytes


def resolve(path: str | Path) -> tuple[pafs.FileSystem, str]:
    """File system and path within it, of a local path or a URI."""
    text = str(path)
    if "://" not in text:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text)).replace(os.sep, "/")
    try:
        return pafs.FileSystem.from_uri(text.rstrip("/"))
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"path {text}: {error}; give a local path or a URI that pyarrow knows (s3://, gs://, abfs://, hdfs://)") from error


def join(path: str | Path, *parts: str) -> str:
    return posixpath.join(str(path).rstrip("/"), *parts)


def data_folder(dataset: str | Path) -> str:
    """Where the shards of a dataset lie: the path to give to pandas, DuckDB, polars or `datasets`."""
    return join(dataset_folder(dataset), "data")


def dataset_folder(path: str | Path) -> str:
    """The dataset's own folder, for this or for its data folder: people pass the one they were shown last."""
    text = str(path).rstrip("/")
    return posixpath.dirname(text) if posixpath.basename(text) == "data" and not exists(join(text, "data")) and "/" in text else text


def absolute(path: str | Path) -> str:
    """The path with which every process of this machine means the same place."""
    return str(path) if "://" in str(path) else resolve(path)[1]


def exists(path: str | Path) -> bool:
    file_system, inner = resolve(path)
    return file_system.get_file_info(inner).type != pafs.FileType.NotFound


def write_bytes(path: str | Path, content: bytes | pa.Buffer) -> None:
    """All or nothing. Local: temporary name, fsync, rename. Object store: one put. ShardWriteError where it can't be written."""
    try:
        _write_bytes(path, content)
    except OSError as error:
        raise ShardWriteError(
            f"{path}: can't be written ({error}); everything finished before it is kept. Free space, make the folder writable or choose "
            "another --output-dir, then run the same command again: it goes on where it stopped"
        ) from error


def _write_bytes(path: str | Path, content: bytes | pa.Buffer) -> None:
    file_system, inner = resolve(path)
    if not isinstance(file_system, pafs.LocalFileSystem):
        with file_system.open_output_stream(inner) as stream:
            stream.write(content)
        return
    target = Path(inner)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(target.parent, os.O_RDONLY)  # the rename itself must survive a power cut too
    try:
        os.fsync(folder)
    except OSError:
        pass  # some network file systems can't sync a folder
    finally:
        os.close(folder)


def read_bytes(path: str | Path) -> bytes | None:
    """The content, or None where there is no such file. ValueError where a file is in the place of its folder."""
    file_system, inner = resolve(path)
    try:
        with file_system.open_input_stream(inner) as stream:
            return stream.read()
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise ValueError(f"{path}: a file is in the place of the folder; choose another --output-dir, or move that file away") from error


def remove(path: str | Path) -> None:
    """Removes one file; fine if it is gone already."""
    file_system, inner = resolve(path)
    with contextlib.suppress(FileNotFoundError):
        file_system.delete_file(inner)


def list_shards(dataset: str | Path) -> list[str]:
    """Full paths of the dataset's shards, sorted; [] where there is none."""
    return sorted(path for path in _list(data_folder(dataset)) if path.endswith(".parquet"))


def remove_temporary(dataset: str | Path) -> None:
    """Removes what killed writers left behind, in the dataset's folder and its data. Only for the one run that holds the folder."""
    for folder in (str(dataset), data_folder(dataset)):
        for path in _list(folder, hidden=True):
            if path.endswith(".tmp"):
                remove(path)


def _list(folder: str, hidden: bool = False) -> list[str]:
    file_system, inner = resolve(folder)
    infos = file_system.get_file_info(pafs.FileSelector(inner, allow_not_found=True))
    names = [info.base_name for info in infos if info.type == pafs.FileType.File]
    return [join(folder, name) for name in names if hidden or not name.startswith((".", "_"))]


# -------------------------------------------------------------------------------------------------------------------- rows, shards


def ragged(arrays: Sequence[np.ndarray | None], head_dim: int) -> pa.Array:
    """`features_type(head_dim)` from float16 arrays [T_i, head_dim]; None gives null."""
    present = [np.ascontiguousarray(array, dtype=np.float16).reshape(-1, head_dim) for array in arrays if array is not None]
    flat = np.concatenate(present) if present else np.zeros((0, head_dim), np.float16)
    inner = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1), pa.float16()), head_dim)
    lengths = iter(len(array) for array in present)
    offsets = np.cumsum([0, *(0 if array is None else next(lengths) for array in arrays)])
    mask = pa.array([array is None for array in arrays], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), inner, type=features_type(head_dim), mask=mask)


def to_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """A table of row dicts. A missing column is null; a key that is no column, or a value that does not fit, is a ValueError."""
    unknown = sorted({key for row in rows for key in row} - set(schema.names))
    if unknown:
        raise ValueError(f"table {table_name(schema)}: no column {', '.join(unknown)}; it has {', '.join(schema.names)}")
    columns = []
    for column in schema:
        values = [row.get(column.name) for row in rows]
        try:
            if _is_features(column.type):
                columns.append(ragged(values, column.type.value_type.list_size))
            else:
                columns.append(pa.array(values, column.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError, OverflowError) as error:
            raise ValueError(f"table {table_name(schema)}: a value of column {column.name} is no {column.type}: {error}") from error
    return pa.Table.from_arrays(columns, schema=schema)


def _is_features(type_: pa.DataType) -> bool:
    return pa.types.is_list(type_) and pa.types.is_fixed_size_list(type_.value_type) and pa.types.is_float16(type_.value_type.value_type)


def table_name(schema: pa.Schema) -> str:
    return (schema.metadata or {}).get(b"pmpd.table", b"?").decode()


def write_shard(table: pa.Table, path: str | Path, row_group_rows: int | None = None) -> int:
    """Writes one Parquet file, all or nothing, with checksums; its size in bytes. Row groups are what `read_rows` reads at least.

    ShardWriteError where the disk is full or not writable: nothing else is touched by that.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, row_group_size=row_group_rows)
    content = sink.getvalue()
    write_bytes(path, content)
    return content.size


class ShardWriteError(OSError, ValueError):
    """A shard or another file of a dataset could not be written (disk full, no permission): a ValueError for users, and an OSError for
    those who wait for it to pass."""

    def __reduce__(self) -> tuple[Any, ...]:  # carried from worker to driver
        return (ShardWriteError, self.args)


def read_shard(path: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """One shard with its checksums verified."""
    file_system, inner = resolve(path)
    with file_system.open_input_file(inner) as file:
        return pq.ParquetFile(file, page_checksum_verification=True).read(columns=None if columns is None else list(columns))


def read_table(dataset: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of a dataset (the folder that holds `manifest.json`), in no particular order. ValueError where there is none."""
    shards = list_shards(dataset)
    if not shards:
        raise ValueError(f"{dataset}: no Parquet in {data_folder(dataset)}; give a dataset folder, e.g. results/label/labels")
    return pa.concat_tables([read_shard(path, columns) for path in shards])


def read_rows(path: str | Path, rows: Sequence[int]) -> list[dict[str, Any]]:
    """The given rows of one shard as dicts, in the given order; reads only the row groups they are in."""
    file_system, inner = resolve(path)
    with file_system.open_input_file(inner) as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        ends = np.cumsum([parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)])
        groups = np.searchsorted(ends, rows, side="right")
        tables = {group: parquet.read_row_group(group) for group in sorted(set(groups.tolist()))}
    starts = np.concatenate([[0], ends[:-1]])
    return [tables[group].slice(row - int(starts[group]), 1).to_pylist()[0] for group, row in zip(groups.tolist(), rows, strict=True)]


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
    """Reads what identifies the rows of a shard. With `full` every byte of every column is read against its checksum.

    ValueError where the shard is damaged or has no such column.
    """
    file_system, inner = resolve(path)
    try:
        with file_system.open_input_file(inner) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            schema = parquet.schema_arrow
            if id_column not in schema.names:
                raise ValueError(f"no column {id_column}")
            wanted = [name for name in (id_column, "error", "prompt_tokens") if name in schema.names]
            if full:
                for group in range(parquet.num_row_groups):
                    parquet.read_row_group(group)
            table = parquet.read(columns=wanted)
    except (pa.ArrowException, OSError, ValueError, EOFError) as error:
        raise ValueError(f"shard {path} can't be read: {error}") from error
    count = len(table)
    errors = table["error"].is_valid().to_pylist() if "error" in wanted else [False] * count
    lengths = [length or 0 for length in table["prompt_tokens"].to_pylist()] if "prompt_tokens" in wanted else [0] * count
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
    target = join(dataset, "unreadable", f"{int(time.time())}-{posixpath.basename(path)}")
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


# --------------------------------------------------------------------------------------------------------------------- manifests


MANIFEST_KEYS = (
    "table",
    "schema_version",
    "complete",
    "config",
    "models",
    "counts",
    "seconds",
    "device",
    "packages",
    "python",
    "git_commit",
)


def write_manifest(
    dataset: str | Path,
    schema: pa.Schema | None,
    config: Mapping[str, Any],
    *,
    table: str,
    complete: bool,
    models: Mapping[str, Any] | None = None,
    counts: Mapping[str, int] | None = None,
    seconds: float = 0.0,
    device: str = "",
    run: Mapping[str, Any] | None = None,
) -> None:
    """`config` is what defines the rows (a folder of another one is refused); `run` is what does not (workers, batch size, …)."""
    manifest = {
        "table": table,
        "schema_version": SCHEMA_VERSION,
        "complete": complete,
        "config": dict(config),
        "models": dict(models or {}),
        "counts": dict(counts or {}),
        "seconds": round(seconds, 3),
        "device": device,
        "run": dict(run or {}),
        "packages": package_versions(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "git_commit": git_commit(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "columns": {} if schema is None else {column.name: str(column.type) for column in schema},
    }
    write_bytes(join(dataset, "manifest.json"), json.dumps(manifest, indent=1, sort_keys=False, default=str).encode() + b"\n")


def read_manifest(dataset: str | Path) -> dict[str, Any] | None:
    """The manifest, None where there is none. ValueError where it is damaged or of another schema version."""
    path = join(dataset_folder(dataset), "manifest.json")
    content = read_bytes(path)
    if content is None:
        return None
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); move the folder away or choose another --output-dir") from error
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        version = manifest.get("schema_version") if isinstance(manifest, dict) else None
        raise ValueError(
            f"{path}: schema version {version}, this program writes {SCHEMA_VERSION}; choose another output folder, or use the version of "
            "the program that wrote it"
        )
    return manifest


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for every key in which two configurations differ (compared as JSON holds them)."""
    before, after = (json.loads(json.dumps(dict(config), default=str)) for config in (old, new))
    keys = sorted(set(before) | set(after))
    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in keys if before.get(key) != after.get(key)]


def check_config(dataset: str | Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of an earlier run into this folder, if any. ValueError, naming the keys, where that had another configuration."""
    manifest = read_manifest(dataset)
    if manifest is None:
        if list_shards(dataset):
            raise ValueError(
                f"output folder {dataset}: it holds Parquet but no manifest.json, so it can't be continued; choose another --output-dir"
            )
        return None
    different = differing_keys(manifest["config"], config)
    if different:
        raise ValueError(
            f"output folder {dataset}: made with another configuration ({'; '.join(different)}); choose another --output-dir, "
            "or give the same flags to continue it"
        )
    return manifest


def is_whole(dataset: str | Path, manifest: Mapping[str, Any], id_column: str) -> bool:
    """Whether the manifest calls the dataset complete and its shards, all readable, hold as many rows as it counts."""
    if not manifest["complete"]:
        return False
    found = scan(dataset, id_column)
    return not found.unreadable and sum(len(shard.ids) for shard in found.shards) == manifest["counts"].get("rows")


@cache
def package_versions() -> dict[str, str]:
    """Versions of what can change a row."""
    versions = {}
    for name in ("pmpd", "torch", "transformers", "tokenizers", "ray", "pyarrow", "numpy", "rouge_score"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@cache
def git_commit() -> str | None:
    """Commit of the source tree this module runs from ("+" = with changes), None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


# ----------------------------------------------------------------------------------------------------------------- command line


def describe(dataset: str | Path) -> tuple[list[str], list[str]]:
    """Lines that describe a dataset folder or a single Parquet file, and the problems found in it."""
    single = str(dataset).endswith(".parquet")
    paths = [str(dataset)] if single else list_shards(dataset)
    lines, problems = [f"{dataset}"], []
    rows, error_rows, size = 0, 0, 0
    nulls: dict[str, int] = {}
    types: dict[str, str] = {}
    ids: dict[str, int] = {}
    versions = set()
    for path in paths:
        try:
            table = read_shard(path)
        except (pa.ArrowException, OSError, EOFError) as error:
            problems.append(f"{path}: unreadable: {error}")
            continue
        rows += len(table)
        size += resolve(path)[0].get_file_info(resolve(path)[1]).size
        versions.add((table.schema.metadata or {}).get(b"pmpd.schema_version", b"none").decode())
        for column in table.schema:
            if types.setdefault(column.name, str(column.type)) != str(column.type):
                problems.append(f"{path}: column {column.name} is {column.type}, elsewhere {types[column.name]}")
            nulls[column.name] = nulls.get(column.name, 0) + table[column.name].null_count
        error_rows += len(table) - table["error"].null_count if "error" in table.column_names else 0
        key = table.column_names[0]
        if not table.schema.field(key).nullable and key.endswith("_id"):
            for value in table[key].to_pylist():
                ids[value] = ids.get(value, 0) + 1
    lines.append(f"  {rows} rows, {len(paths)} shard(s), {size / 1e6:.2f} MB, {error_rows} row(s) with an error")
    width = max((len(name) for name in types), default=0)
    lines += [f"    {name:{width}}  {type_}" + (f"  ({nulls[name]} null)" if nulls[name] else "") for name, type_ in types.items()]
    twice = sorted(key for key, count in ids.items() if count > 1)
    if twice:
        problems.append(f"{len(twice)} id(s) more than once, e.g. {', '.join(twice[:3])}")
    if versions - {str(SCHEMA_VERSION)}:
        problems.append(f"schema version {', '.join(sorted(versions))} in the shards, this program knows {SCHEMA_VERSION}")
    if single:
        return lines, problems
    try:
        manifest = read_manifest(dataset)
    except ValueError as error:
        return lines, [*problems, str(error)]
    if manifest is None:
        return lines, [*problems, "no manifest.json"]
    missing = [key for key in MANIFEST_KEYS if key not in manifest]
    if missing:
        problems.append(f"manifest.json lacks {', '.join(missing)}")
    if not manifest.get("complete"):
        problems.append("manifest.json says that the run is not complete: run the same command again to finish it")
    elif manifest.get("counts", {}).get("rows") != rows:
        problems.append(f"manifest.json says {manifest.get('counts', {}).get('rows')} rows, the shards hold {rows}")
    commit = (manifest.get("git_commit") or "")[:12]
    made = f"  manifest: {manifest.get('table')}, schema version {manifest['schema_version']}, written {manifest.get('written', '')}"
    lines.append(made + (f", commit {commit}" if commit else "") + (f", on {manifest['device']}" if manifest.get("device") else ""))
    lines += [f"    {key} = {value}" for key, value in manifest.get("config", {}).items()]
    lines += [f"    model {role}: {model}" for role, model in manifest.get("models", {}).items()]
    return lines, problems


def datasets_under(path: str | Path) -> Iterator[str]:
    """The dataset folders at `path`: itself, or those one level below."""
    file_system, inner = resolve(path)
    if file_system.get_file_info(inner).type == pafs.FileType.File:
        return
    if exists(data_folder(path)) or exists(join(path, "manifest.json")):
        yield str(path)
        return
    for info in sorted(file_system.get_file_info(pafs.FileSelector(inner, allow_not_found=True)), key=lambda info: info.base_name):
        below = join(path, info.base_name)
        if info.type == pafs.FileType.Directory and (exists(data_folder(below)) or exists(join(below, "manifest.json"))):
            yield below


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m pmpd.tables PATH`. Exit code 1 if there is a problem."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["export-fastchat"]:
        return _export_fastchat(given[1:])
    parser = argparse.ArgumentParser(
        prog="python -m pmpd.tables", description="Schema, row count and nulls of a dataset; checks its manifest."
    )
    parser.add_argument("path", help="a dataset folder, a folder of them (results/label), or one Parquet file; local or a URI")
    path = parser.parse_args(given).path
    try:
        path = dataset_folder(path)
        if not exists(path):
            raise ValueError(f"{path}: no such file or folder")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    found = [path] if path.endswith(".parquet") else list(datasets_under(path))
    if not found:
        print(f"{path}: no dataset in it (a dataset is a folder with data/*.parquet and manifest.json)", file=sys.stderr)
        return 1
    failed = False
    for dataset in found:
        lines, problems = describe(dataset)
        print("\n".join(lines))
        print("  ok" if not problems else "\n".join(f"  PROBLEM: {problem}" for problem in problems))
        failed |= bool(problems)
    return int(failed)


def _export_fastchat(arguments: Sequence[str]) -> int:
    """`python -m pmpd.tables export-fastchat PATH FOLDER`: answers as FastChat's `llm_judge` reads them."""
    export = importlib.import_module("pmpd.benchmarks.fastchat_export").export  # by name: this module depends on no other

    parser = argparse.ArgumentParser(
        prog="python -m pmpd.tables export-fastchat", description="Answers as {model_id}-{run}.jsonl for FastChat's gen_judgment.py."
    )
    parser.add_argument("path", help="output folder of jobs/generate.py for one benchmark, e.g. results/generate/mt_bench")
    parser.add_argument("folder", help="where FastChat looks for answers, e.g. data/mt_bench/model_answer")
    parser.add_argument("--runs", help="only these runs, comma-separated")
    given = parser.parse_args(arguments)
    try:
        written = export(given.path, given.folder, given.runs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
