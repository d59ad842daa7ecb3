"""Few files with large row groups in place of many small shards.

    pmpd compact results/label/labels
    pmpd compact s3://bucket/labels

Every row stays as it is, and whoever reads meanwhile sees the old files or the new ones. A run that was
stopped goes on when the same command is given again, and a farm run goes on from a compacted
dataset as from any other.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import tyro
from rich.console import Console

from pmpd import storage
from pmpd.errors import UserError
from pmpd.storage.compaction import ROW_GROUP_BYTES, Compaction, compact


@dataclass(frozen=True)
class CompactJob:
    """Few files with large row groups in place of many small shards."""

    path: tyro.conf.Positional[str]
    """A dataset folder (results/label/labels); local or a URI."""
    row_group_mb: int = ROW_GROUP_BYTES >> 20
    """Size of a row group in memory, in MB."""

    def __post_init__(self) -> None:
        if self.row_group_mb < 1:
            raise UserError(f"--row-group-mb {self.row_group_mb}: at least 1")


def main(job: CompactJob, console: Console | None = None) -> Compaction:
    """Compacts and says what came of it. UserError for anything the user can cure."""
    console = console or Console()
    folder = storage.dataset_folder(job.path)
    if not storage.exists(folder):
        raise UserError(f"{storage.shown(folder)}: no such folder; give a dataset folder")
    with contextlib.ExitStack() as stack:
        for held in (storage.parent(storage.absolute(folder)), folder):  # a run holds the one or the other
            stack.enter_context(storage.Lease(held))
        done = compact(folder, job.row_group_mb << 20)
    console.print(
        f"{done.rows} rows: {done.shards_before} files ({done.bytes_before / 1e6:.1f} MB) are now "
        f"{done.shards_after} ({done.bytes_after / 1e6:.1f} MB)",
        soft_wrap=True,
    )
    return done
