"""A dataset that one process writes from rows that come one by one."""

from __future__ import annotations

import itertools
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
) -> dict[str, int]:
    """Writes the rows as shards, streaming, unless they are there already; the manifest's counts.

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
    for index in itertools.count():
        shard = list(itertools.islice(source, rows_per_shard))
        if not shard:
            break
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
