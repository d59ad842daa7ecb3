"""The farm: any per-item work on a Ray cluster, every item exactly once.

Plain actors, each holding one model and pinned to a GPU (or a share of the CPUs), fed by a small driver:

    input datasets ──ids──▶ driver ──units of ids──▶ actors ──one shard per unit──▶ output dataset

* The output is the only truth: to-do = input ids - ids in readable output shards. A damaged shard is set
  aside and done again.
* An actor writes its unit as one shard, all or nothing, named by the unit's ids; a unit done twice overwrites
  itself.
* Actors are never restarted by Ray. The driver replaces a dead one and queues its units again; a unit that
  kills its worker twice is split into single rows, and a row that kills again becomes an error row.
* One run per output folder: a lease with a heartbeat; a worker publishes nothing for a run that lost its
  lease.
* At the end the ids of input and output are compared; they must be equal, each once.

Parts: `worker` (the task's interface and the actor), `pool` (workers and units in flight), `capacity`,
`progress`, `lease`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from pmpd import storage
from pmpd.errors import UserError
from pmpd.farm.capacity import FarmOptions, check_capacity, live_nodes, plan
from pmpd.farm.ledger import drop_duplicates, drop_errors, items_of, reconcile
from pmpd.farm.pool import Pool
from pmpd.farm.progress import Progress
from pmpd.farm.worker import FarmTask, Unit
from pmpd.storage.lease import Lease

AUTO_UNIT_ROWS = 64
"""Items of a unit where the rows that decode together follow from a worker's memory."""


def batch_of(batch_size: int | Literal["auto"]) -> tuple[int | None, int]:
    """What a job's --batch-size means: (rows that decode together, None = as many as the worker's memory
    holds; items of a unit)."""
    return (None, AUTO_UNIT_ROWS) if batch_size == "auto" else (batch_size, batch_size)


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
    dataset (taken here if None). ValueError: what a user can mend. ReconcileError: the output does not hold
    exactly the input's ids.
    """
    target = storage.absolute(dataset)
    manifest = storage.check_config(target, config)
    with contextlib.ExitStack() as stack:
        held = lease if lease is not None else stack.enter_context(Lease(target))
        return _run(
            task,
            {name: storage.absolute(path) for name, path in inputs.items()},
            target,
            config,
            options,
            held,
            stream,
            manifest,
        )


def _run(
    task: FarmTask,
    inputs: Mapping[str, str],
    dataset: str,
    config: Mapping[str, Any],
    options: FarmOptions,
    lease: Lease,
    stream: TextIO | None,
    manifest: Mapping[str, Any] | None,
) -> FarmResult:
    begin = time.monotonic()
    found = {name: storage.scan(path, task.id_column) for name, path in inputs.items()}
    for name, scan in found.items():
        if scan.unreadable:
            raise UserError(
                f"input {name}: {next(iter(scan.unreadable.values()))}; run the stage that makes it (--stage "
                f"{name}): it does the rows of "
                "that shard again and keeps the others"
            )
    where = {name: scan.where() for name, scan in found.items()}
    primary, *others = inputs
    ids = where[primary]
    if not ids:
        raise UserError(f"input {inputs[primary]}: it holds no rows; nothing to do")
    for name in others:
        lacking = [key for key in ids if key not in where[name]]
        if lacking:
            raise UserError(
                f"input {name} lacks {len(lacking)} of {len(ids)} ids, e.g. {', '.join(lacking[:3])}; run "
                f"the stage that makes it first"
            )
    lengths = {key: found[primary].shards[shard].lengths[row] for key, (shard, row) in ids.items()}

    storage.remove_temporary(dataset)
    output = storage.scan(dataset, task.id_column)
    unreadable = [storage.set_aside(path, dataset) for path in output.unreadable]
    drop_duplicates(output, task.one_row_per_item)
    if options.retry_errors:
        drop_errors(storage.scan(dataset, task.id_column, full=False))
    output = storage.scan(dataset, task.id_column, full=False)
    done = items_of(output)
    unknown = [key for key in done if key not in ids]
    if unknown:
        raise UserError(
            f"output folder {dataset}: it holds {len(unknown)} ids that are not in the input, e.g. "
            f"{', '.join(unknown[:3])}: the input has "
            "changed; choose another --output-dir"
        )
    models = dict((manifest or {}).get("models", {})) if done else {}
    seconds_before = float((manifest or {}).get("seconds", 0.0))
    device = str((manifest or {}).get("device", ""))
    progress = Progress(task.table, len(ids), len(done), sum(done.values()), stream, options.progress_seconds)
    for path in unreadable:
        progress.say(f"a damaged shard was set aside as {path}; its rows are done again")
    if done:
        progress.say(f"{len(done)} of {len(ids)} rows are there already")

    pool = None
    try:
        for attempt in range(3):
            todo = sorted((key for key in ids if key not in done), key=lambda key: (-lengths[key], key))
            if not todo:
                break
            if pool is None:
                storage.write_manifest(
                    dataset,
                    None,
                    config,
                    table=task.table,
                    complete=False,
                    models=models,
                    seconds=seconds_before,
                    device=device,
                )
                check_capacity(options, progress.say)
                pool = Pool(task, dataset, lease, options, progress, models)
            elif attempt:
                progress.say(f"{len(todo)} rows are not where they were written; doing them again")
            pool.work(_units(todo, where, found, options))
            models = pool.models
            output = storage.scan(dataset, task.id_column, full=False)
            drop_duplicates(output, task.one_row_per_item)
            output = storage.scan(dataset, task.id_column, full=False)
            done = items_of(output)
            lease.check()
    finally:
        if pool is not None:
            pool.close()
            device = ", ".join(sorted(pool.devices)) or device
            progress.up = 0
            progress.tick(force=True)

    reconcile(ids, output, dataset, task.one_row_per_item)
    seconds = time.monotonic() - begin
    schema = output.shards[0].schema if output.shards else None
    rows = sum(len(shard.ids) for shard in output.shards)
    errors = sum(sum(shard.errors) for shard in output.shards)
    if pool is not None or manifest is None or not manifest["complete"] or unreadable:
        storage.write_manifest(
            dataset,
            schema,
            config,
            table=task.table,
            complete=True,
            models=models,
            counts={
                "rows": rows,
                "items": len(done),
                "errors": errors,
                "shards": len(output.shards),
                "unreadable": len(unreadable),
            },
            seconds=seconds_before + seconds,
            device=device,
            run={
                "unit_rows": options.unit_rows,
                "num_workers": options.num_workers,
                "gpus_per_worker": options.gpus_per_worker,
            },
        )
    return FarmResult(
        dataset, rows, errors, progress.new, seconds, progress.rows_per_second, tuple(unreadable)
    )


def _units(
    todo: Sequence[str], where: Mapping[str, Any], found: Mapping[str, storage.Scan], options: FarmOptions
) -> Iterable[Unit]:
    """Units of neighbours in length, long ones first; not larger than gives every worker one."""
    wanted, _, _ = plan(options, live_nodes())
    size = max(1, min(options.unit_rows, -(-len(todo) // wanted)))
    for first in range(0, len(todo), size):
        ids = tuple(todo[first : first + size])
        rows = {
            name: tuple((found[name].shards[at[key][0]].path, at[key][1]) for key in ids)
            for name, at in where.items()
        }
        yield Unit(ids, rows)
