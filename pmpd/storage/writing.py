"""A dataset that one process writes from rows that come one by one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from pmpd.storage.compaction import remove_temporary
from pmpd.storage.dataset import data_folder, list_shards, table_name, to_table, write_shard
from pmpd.storage.files import remove
from pmpd.storage.manifest import check_config, is_whole, write_manifest
from pmpd.storage.uri import join


def write_dataset(
    dataset: str,
    schema: pa.Schema,
    rows: Callable[[Counter[str]], Iterator[dict[str, Any]]],
    config: Mapping[str, Any],
    *,
    rows_per_shard: int,
    row_group_rows: int | None = None,
    characters_of: Callable[[dict[str, Any]], int] = lambda row: 0,
    characters_per_shard: int = 1 << 26,
) -> dict[str, int]:
    """Writes the rows as shards, streaming, unless they are there already; the manifest's counts.

    A shard has at most `rows_per_shard` rows, and ends where those have `characters_per_shard` characters.
    `rows` may count what it meets; `rows`, `shards` and `errors` are counted here. A dataset that was cut
    short is written again from its beginning: the rows must always be the same. UserError: the folder is of
    another configuration.
    """
    manifest = check_config(dataset, config)
    if manifest is not None and is_whole(dataset, manifest, schema.names[0]):
        return manifest["counts"]
    begin = time.monotonic()
    table = table_name(schema)
    write_manifest(dataset, schema, config, table=table, complete=False)
    remove_temporary(dataset)
    for path in list_shards(dataset):
        remove(path)
    counts: Counter[str] = Counter(rows=0, errors=0)
    source = rows(counts)

    def shards() -> Iterator[list[dict[str, Any]]]:
        shard: list[dict[str, Any]] = []
        characters = 0
        for row in source:
            shard.append(row)
            characters += characters_of(row)
            if len(shard) == rows_per_shard or characters >= characters_per_shard:
                yield shard
                shard, characters = [], 0
        if shard:
            yield shard

    for index, shard in enumerate(shards()):
        path = join(data_folder(dataset), f"part-{index:05}.parquet")
        write_shard(to_table(shard, schema), path, row_group_rows)
        counts.update(rows=len(shard), shards=1, errors=sum(bool(row.get("error")) for row in shard))
    write_manifest(
        dataset,
        schema,
        config,
        table=table,
        complete=True,
        counts=counts,
        seconds=time.monotonic() - begin,
    )
    return dict(counts)
