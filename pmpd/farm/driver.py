"""The farm: any per-item work, every item exactly once, on a Ray cluster or in this process.

    input datasets ──ids──▶ driver ──units of ids──▶ workers ──one shard per unit──▶ output dataset

* The output is the only truth (`ledger`): to do = input ids - ids in readable output shards. A damaged shard
  is set aside and done again.
* A worker writes its unit as one shard, all or nothing, named by the unit's ids (`workbench`); a unit done
  twice overwrites itself.
* Actors are never restarted by Ray. The driver (`pool`) replaces one that is dead or makes no progress, and
  queues its units again; what a lost worker says about its unit is in `blame`.
* One run per output folder: a lease with a heartbeat; a worker publishes nothing for a run that lost its
  lease, or that has replaced it.
* At the end the ids of input and output are compared; they must be equal, each once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from pmpd import storage
from pmpd.farm.ledger import Ledger, unit_rows
from pmpd.farm.local_pool import LocalPool
from pmpd.farm.options import FarmOptions
from pmpd.farm.progress import Progress, Publish
from pmpd.farm.task import FarmTask, Unit
from pmpd.storage.lease import Lease
from pmpd.storage.summary import add_run

ROUNDS = 3
"""Tries for rows that are not where they were written."""


@dataclass(frozen=True)
class FarmResult:
    """What a run did."""

    dataset: str
    rows: int
    """In the whole output."""
    errors: int
    """Rows of the output with an error."""
    new_items: int
    seconds: float
    """Of this run, first worker's start included."""
    rows_per_second: float
    """New items per second since the first worker was ready."""
    unreadable: tuple[str, ...] = ()
    """Damaged shards, where they were set aside."""


class Pool(Protocol):
    """What does the units."""

    models: dict[str, Any]
    devices: set[str]

    @property
    def wanted(self) -> int:
        """Workers that could have a unit each."""
        ...

    def work(self, units: Iterable[Unit], count: int) -> None: ...
    def close(self) -> None: ...


def run(
    task: FarmTask,
    inputs: Mapping[str, str],
    dataset: str | Path,
    config: Mapping[str, Any],
    options: FarmOptions,
    lease: Lease | None = None,
    stream: TextIO | None = None,
) -> FarmResult:
    """Does `task` for every item of the inputs that is not in `dataset` yet. The first input says which items
    there are.

    `config` is what defines the rows. Needs `connect()` first, and a `lease` on a folder that holds the
    dataset (taken here if None). UserError: what a user can mend. ReconcileError: the output does not hold
    exactly the input's ids.
    """
    ledger = Ledger(task, inputs, dataset, config)
    with contextlib.ExitStack() as stack:
        held = lease if lease is not None else stack.enter_context(Lease(ledger.dataset))
        return _run(task, ledger, options, held, stream)


def keep_workers(options: FarmOptions) -> contextlib.AbstractContextManager[None]:
    """Inside, runs with the same `options` share their workers, one after the other."""
    if options.in_process:
        return contextlib.nullcontext()
    from pmpd.farm import pool

    return pool.keep_workers()


def _run(
    task: FarmTask, ledger: Ledger, options: FarmOptions, lease: Lease, stream: TextIO | None
) -> FarmResult:
    begin = time.monotonic()
    ledger.scan_inputs()
    ledger.repair_output(options.retry_errors)
    progress = Progress(
        task.table, ledger.items, ledger.items_done, ledger.items_failed, stream,
        options.progress_seconds, task.most_forwards, _publisher(task.table, options),
    )  # fmt: skip
    for path in ledger.unreadable:
        progress.say(f"a damaged shard was set aside as {path}; its rows are done again")
    if ledger.items_done:
        progress.say(f"{ledger.items_done} of {ledger.items} rows are there already")

    pool: Pool | None = None
    try:
        for attempt in range(ROUNDS):
            todo = ledger.todo()
            if not len(todo):
                break
            if pool is None:
                ledger.begin()
                pool = _pool(task, ledger, lease, options, progress)
            elif attempt:
                progress.say(f"{len(todo)} rows are not where they were written; doing them again")
            rows = unit_rows(len(todo), options.unit_rows, pool.wanted)
            pool.work(ledger.units(todo, rows), -(-len(todo) // rows))
            ledger.reread()
            lease.check()
    finally:
        workers = progress.up
        if pool is not None:
            pool.close()
            ledger.journal.flush()
            _summarize(ledger, options, progress, pool, workers, time.monotonic() - begin)
            progress.end()

    ledger.reconcile()
    seconds = time.monotonic() - begin
    if pool is not None or not ledger.manifest.get("complete") or ledger.unreadable:
        settings = {
            "unit_rows": options.unit_rows,
            "num_workers": options.num_workers,
            "gpus_per_worker": options.gpus_per_worker,
            **task.recorded,
        }
        models = ledger.known_models if pool is None else pool.models
        device = "" if pool is None else ", ".join(sorted(pool.devices))
        ledger.finish(models, seconds, device, settings)
    return FarmResult(
        ledger.dataset, ledger.rows, ledger.errors, progress.new, seconds, progress.rows_per_second,
        tuple(ledger.unreadable),
    )  # fmt: skip


def _pool(task: FarmTask, ledger: Ledger, lease: Lease, options: FarmOptions, progress: Progress) -> Pool:
    arguments = (task, ledger.dataset, lease, options, progress, ledger.known_models, ledger.journal)
    if options.in_process:
        return LocalPool(*arguments)
    from pmpd.farm.pool import ClusterPool

    return ClusterPool(*arguments)


def _publisher(stage: str, options: FarmOptions) -> Publish | None:
    if options.in_process:
        return None
    from pmpd.farm.metrics import RayMetrics

    return RayMetrics(stage)


def _summarize(
    ledger: Ledger, options: FarmOptions, progress: Progress, pool: Pool, workers: int, seconds: float
) -> None:
    """A run that was stopped has cost something too; where the folder can't be written, that is what stopped
    it."""
    with contextlib.suppress(storage.ShardWriteError):
        add_run(
            ledger.dataset,
            ledger.table,
            rows=progress.new,
            errors=progress.new_errors,
            tokens=progress.tokens,
            wall_seconds=seconds,
            worker_seconds=progress.worker_seconds,
            workers=workers,
            stalls=progress.stalls,
            device=", ".join(sorted(pool.devices)),
            forwards=progress.by_bits,
            price_per_worker_hour=options.price_per_worker_hour,
        )
