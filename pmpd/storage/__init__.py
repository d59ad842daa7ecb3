"""How results are stored: Parquet datasets with a manifest, on any file system that pyarrow knows.

A dataset is a folder: `data/*.parquet` (the shards, nothing else, so that every reader of Parquet folders
takes it as it is) and `manifest.json` beside it (what made it). Paths are local ones, NFS, or URIs that
`pyarrow.fs` knows (`s3://bucket/folder`).
"""

from __future__ import annotations

from pmpd.storage.copies import cache_folder, download_folder, upload_folder
from pmpd.storage.dataset import (
    Scan,
    Shard,
    data_folder,
    drop_rows,
    inspect_shard,
    list_shards,
    read_rows,
    read_shard,
    read_table,
    remove_temporary,
    scan,
    set_aside,
    to_table,
    write_shard,
)
from pmpd.storage.files import (
    ShardWriteError,
    StorageError,
    absolute,
    exists,
    read_bytes,
    remove,
    resolve,
    write_bytes,
)
from pmpd.storage.lease import Lease, LeaseLostError
from pmpd.storage.manifest import (
    MANIFEST_KEYS,
    check_config,
    differing_keys,
    git_commit,
    is_whole,
    package_versions,
    read_manifest,
    write_manifest,
)
from pmpd.storage.parquet import ForeignTypeError, check_tables, open_parquet, parquet_of
from pmpd.storage.schemas import (
    CONVERSATIONS,
    GENERATIONS,
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

__all__ = [
    "CONVERSATIONS",
    "GENERATIONS",
    "MANIFEST_KEYS",
    "PROMPTS",
    "REFERENCES",
    "SCHEMA_VERSION",
    "SCORES",
    "ForeignTypeError",
    "Lease",
    "LeaseLostError",
    "Scan",
    "Shard",
    "ShardWriteError",
    "StorageError",
    "absolute",
    "base_name",
    "cache_folder",
    "check_config",
    "check_tables",
    "connect",
    "connections",
    "data_folder",
    "differing_keys",
    "download_folder",
    "drop_rows",
    "exists",
    "git_commit",
    "inspect_shard",
    "is_uri",
    "is_whole",
    "join",
    "labels_schema",
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
    "remove_temporary",
    "resolve",
    "scan",
    "set_aside",
    "shown",
    "table_schema",
    "to_table",
    "upload_folder",
    "without_secrets",
    "write_bytes",
    "write_manifest",
    "write_shard",
]
