"""Few files with large row groups in place of many small shards."""

from __future__ import annotations

import contextlib

from rich.console import Console

from pmpd import plugins, storage
from pmpd.cli.flags.compact import CompactJob
from pmpd.errors import UserError
from pmpd.storage.compaction import Compaction, compact


def main(job: CompactJob, console: Console | None = None) -> Compaction:
    """Compacts and says what came of it. UserError for anything the user can cure."""
    console = console or Console()
    plugins.load(job.plugins)
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
