"""How results are stored: Parquet datasets with a manifest, on any file system that pyarrow knows.

A dataset is a folder: `data/*.parquet` (the shards, nothing else, so that every reader of Parquet folders
takes it as it is) and `manifest.json` beside it (what made it). Paths are local ones, NFS, or URIs that
`pyarrow.fs` knows (`s3://bucket/folder`).
"""

from __future__ import annotations

from pmpd.storage.compaction import remove_temporary
from pmpd.storage.copies import cache_folder, download_folder, upload_folder
from pmpd.storage.dataset import (
    data_folder,
    dataset_folder,
    drop_rows,
    list_shards,
    read_rows,
    read_shard,
    read_table,
    remove_dataset,
    set_aside,
    to_table,
    write_shard,
)
from pmpd.storage.files import (
    ShardWriteError,
    StorageError,
    absolute,
    exists,
    list_files,
    read_bytes,
    remove,
    resolve,
    write_bytes,
)
from pmpd.storage.index import Entry, Journal, entry_of
from pmpd.storage.keys import Seen
from pmpd.storage.lease import Lease, LeaseLostError
from pmpd.storage.manifest import (
    MANIFEST_KEYS,
    add_counts,
    check_config,
    differing_keys,
    discard_unused,
    is_whole,
    package_versions,
    read_manifest,
    write_manifest,
)
from pmpd.storage.parquet import ForeignTypeError, check_tables, open_parquet, parquet_of
from pmpd.storage.provenance import git_commit, source_fingerprint
from pmpd.storage.row_ids import ascii_id, utf8_id
from pmpd.storage.scan import Scan, Shard, inspect_shard, rows_of, scan
from pmpd.storage.schemas import (
    CONVERSATIONS,
    DOCUMENTS,
    GENERATIONS,
    JUDGMENTS,
    LABELLED_PROMPTS,
    MATCHES,
    PROMPTS,
    REFERENCES,
    SCHEMA_VERSION,
    SCORES,
    labels_schema,
    table_schema,
)
from pmpd.storage.uri import (
    base_name,
    connect,
    connections,
    is_uri,
    join,
    parent,
    redacted,
    shown,
    without_secrets,
)
from pmpd.storage.writing import write_dataset

__all__ = [
    "CONVERSATIONS",
    "DOCUMENTS",
    "GENERATIONS",
    "JUDGMENTS",
    "LABELLED_PROMPTS",
    "MANIFEST_KEYS",
    "MATCHES",
    "PROMPTS",
    "REFERENCES",
    "SCHEMA_VERSION",
    "SCORES",
    "Entry",
    "ForeignTypeError",
    "Journal",
    "Lease",
    "LeaseLostError",
    "Scan",
    "Seen",
    "Shard",
    "ShardWriteError",
    "StorageError",
    "absolute",
    "add_counts",
    "ascii_id",
    "base_name",
    "cache_folder",
    "check_config",
    "check_tables",
    "connect",
    "connections",
    "data_folder",
    "dataset_folder",
    "differing_keys",
    "discard_unused",
    "download_folder",
    "drop_rows",
    "entry_of",
    "exists",
    "git_commit",
    "inspect_shard",
    "is_uri",
    "is_whole",
    "join",
    "labels_schema",
    "list_files",
    "list_shards",
    "open_parquet",
    "package_versions",
    "parent",
    "parquet_of",
    "read_bytes",
    "read_manifest",
    "read_rows",
    "read_shard",
    "read_table",
    "redacted",
    "remove",
    "remove_dataset",
    "remove_temporary",
    "resolve",
    "rows_of",
    "scan",
    "set_aside",
    "shown",
    "source_fingerprint",
    "table_schema",
    "to_table",
    "upload_folder",
    "utf8_id",
    "without_secrets",
    "write_bytes",
    "write_dataset",
    "write_manifest",
    "write_shard",
]
