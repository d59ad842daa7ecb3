"""Few files with large row groups in place of many small shards.

    pmpd compact results/label/labels
    pmpd compact s3://bucket/labels

Every row stays as it is, and whoever reads meanwhile sees the old files or the new ones. A run that was
stopped goes on when the same command is given again, and a farm run goes on from a compacted
dataset as from any other."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from pmpd.errors import UserError
from pmpd.storage.compaction import ROW_GROUP_BYTES


@dataclass(frozen=True)
class CompactJob:
    """Few files with large row groups in place of many small shards."""

    path: tyro.conf.Positional[str]
    """A dataset folder (results/label/labels); local or a URI."""
    row_group_mb: int = ROW_GROUP_BYTES >> 20
    """Size of a row group in memory, in MB."""
    plugins: str | None = None
    """Python modules to import first, comma-separated: what they register can be named then
    (docs/guides/extensions.md)."""

    def __post_init__(self) -> None:
        if self.row_group_mb < 1:
            raise UserError(f"--row-group-mb {self.row_group_mb}: at least 1")
