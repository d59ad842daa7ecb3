"""The farm: any per-item work on a Ray cluster, every item exactly once.

Plain actors, each holding one model and pinned to a GPU (or a share of the CPUs), fed by a small driver:

    input datasets ──ids──▶ driver ──units of ids──▶ actors ──one shard per unit──▶ output dataset

* The output is the only truth: to-do = input ids - ids in readable output shards. A damaged shard is set aside and done again.
* An actor writes its unit as one shard, all or nothing, named by the unit's ids; a unit done twice overwrites itself.
* Actors are never restarted by Ray. The driver replaces a dead one and queues its units again; a unit that kills its worker twice is
  split into single rows, and a row that kills again becomes an error row.
* One run per output folder: a lease with a heartbeat; a worker publishes nothing for a run that lost its lease.
* At the end the ids of input and output are compared; they must be equal, each once.

Parts: `worker` (the task's interface and the actor), `pool` (workers and units in flight), `capacity`, `progress`, `lease`.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.utils import read_ray_address
from ray.exceptions import RayError

from pmpd import tables
from pmpd.capacity import FarmOptions, check_capacity, live_nodes, plan
from pmpd.lease import Lease
from pmpd.pool import Pool
from pmpd.progress import Progress
from pmpd.worker import FarmTask, Place, Unit

AUTO_UNIT_ROWS = 64
"""Items of a unit where the rows that decode together follow from a worker's memory."""


def batch_of(batch_size: int | Literal["auto"]) -> tuple[int | None, int]:
    """What a job's --batch-size means: (rows that decode together, None = as many as the worker's memory holds; items of a unit)."""
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


class ReconcileError(RuntimeError):
    """Output and input do not hold the same ids."""


def connect() -> None:
    """Joins the Ray of RAY_ADDRESS (a submitted job has it), else the one that `ray start` made or joined on this machine, else starts
    one for this process. Such a Ray of another process is never joined: it ends with its process.

    ValueError: RAY_ADDRESS can't be joined, or the machine's own Ray refuses this process.
    """
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    given = os.environ.get("RAY_ADDRESS") or "auto"
    address = read_ray_address() if given == "auto" else given
    if address is None or address == "local" or (given == "auto" and not _answers(address)):
        ray.init(address="local", include_dashboard=False, **quiet)
        return
    told = f"RAY_ADDRESS={address}" if given != "auto" else f"the Ray of this machine, {address}"
    if not _answers(address):
        raise ValueError(f"{told}: no Ray answers there; start it, or unset RAY_ADDRESS")
    if given == "auto":
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as Ray does where it looks for the address itself
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RayError, ValueError) as error:
        if "AuthenticationError" in f"{error!r} {error.__cause__}":
            raise ValueError(
                f"{told}: it refuses this process's token; put the cluster's token into ~/.ray/auth_token and set RAY_AUTH_MODE=token "
                "(RAY_ADDRESS=local starts a Ray of its own)"
            ) from error
        raise ValueError(
            f"{told}: it can't be joined ({error}); give host:port of a running Ray (RAY_ADDRESS=local starts one of its own)"
        ) from error


def _answers(address: str) -> bool:
    """Whether something listens there: Ray itself takes minutes to find that nothing does."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True


def output_folder(path: str) -> str:
    """A submitted job runs in a copy of the working directory that Ray deletes: there, a relative path is taken from home."""
    submitted = "/runtime_resources/working_dir_files/" in os.getcwd() and "://" not in path
    return tables.absolute(Path.home() / path if submitted else path)


def run(
    task: FarmTask,
    inputs: Mapping[str, str],
    dataset: str | Path,
    config: Mapping[str, Any],
    options: FarmOptions,
    lease: Lease | None = None,
    stream: TextIO | None = None,
) -> FarmResult:
    """Does `task` for every item of the inputs that is not in `dataset` yet. The first input says which items there are.

    `config` is what defines the rows. Needs `connect()` first, and a `lease` on a folder that holds the dataset (taken here if None).
    ValueError: what a user can mend. ReconcileError: the output does not hold exactly the input's ids.
    """
    target = tables.absolute(dataset)
    manifest = tables.check_config(target, config)
    with contextlib.ExitStack() as stack:
        held = lease if lease is not None else stack.enter_context(Lease(target))
        return _run(task, {name: tables.absolute(path) for name, path in inputs.items()}, target, config, options, held, stream, manifest)


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
    found = {name: tables.scan(path, task.id_column) for name, path in inputs.items()}
    for name, scan in found.items():
        if scan.unreadable:
            raise ValueError(
                f"input {name}: {next(iter(scan.unreadable.values()))}; run the stage that makes it (--stage {name}): it does the rows of "
                "that shard again and keeps the others"
            )
    where = {name: scan.where() for name, scan in found.items()}
    primary, *others = inputs
    ids = where[primary]
    if not ids:
        raise ValueError(f"input {inputs[primary]}: it holds no rows; nothing to do")
    for name in others:
        lacking = [key for key in ids if key not in where[name]]
        if lacking:
            raise ValueError(
                f"input {name} lacks {len(lacking)} of {len(ids)} ids, e.g. {', '.join(lacking[:3])}; run the stage that makes it first"
            )
    lengths = {key: found[primary].shards[shard].lengths[row] for key, (shard, row) in ids.items()}

    tables.remove_temporary(dataset)
    output = tables.scan(dataset, task.id_column)
    unreadable = [tables.set_aside(path, dataset) for path in output.unreadable]
    _drop_duplicates(output, task.one_row_per_item)
    if options.retry_errors:
        _drop_errors(tables.scan(dataset, task.id_column, full=False))
    output = tables.scan(dataset, task.id_column, full=False)
    done = _items(output)
    unknown = [key for key in done if key not in ids]
    if unknown:
        raise ValueError(
            f"output folder {dataset}: it holds {len(unknown)} ids that are not in the input, e.g. {', '.join(unknown[:3])}: the input has "
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
                tables.write_manifest(
                    dataset, None, config, table=task.table, complete=False, models=models, seconds=seconds_before, device=device
                )
                check_capacity(options, progress.say)
                pool = Pool(task, dataset, lease, options, progress, models)
            elif attempt:
                progress.say(f"{len(todo)} rows are not where they were written; doing them again")
            pool.work(_units(todo, where, found, options))
            models = pool.models
            output = tables.scan(dataset, task.id_column, full=False)
            _drop_duplicates(output, task.one_row_per_item)
            output = tables.scan(dataset, task.id_column, full=False)
            done = _items(output)
            lease.check()
    finally:
        if pool is not None:
            pool.close()
            device = ", ".join(sorted(pool.devices)) or device
            progress.up = 0
            progress.tick(force=True)

    _reconcile(ids, output, dataset, task.one_row_per_item)
    seconds = time.monotonic() - begin
    schema = output.shards[0].schema if output.shards else None
    rows = sum(len(shard.ids) for shard in output.shards)
    errors = sum(sum(shard.errors) for shard in output.shards)
    if pool is not None or manifest is None or not manifest["complete"] or unreadable:
        tables.write_manifest(
            dataset,
            schema,
            config,
            table=task.table,
            complete=True,
            models=models,
            counts={"rows": rows, "items": len(done), "errors": errors, "shards": len(output.shards), "unreadable": len(unreadable)},
            seconds=seconds_before + seconds,
            device=device,
            run={"unit_rows": options.unit_rows, "num_workers": options.num_workers, "gpus_per_worker": options.gpus_per_worker},
        )
    return FarmResult(dataset, rows, errors, progress.new, seconds, progress.rows_per_second, tuple(unreadable))


def _items(output: tables.Scan) -> dict[str, bool]:
    """Item id -> whether one of its rows has an error."""
    items: dict[str, bool] = {}
    for shard in output.shards:
        for key, error in zip(shard.ids, shard.errors, strict=True):
            items[key] = items.get(key, False) or error
    return items


def _units(todo: Sequence[str], where: Mapping[str, Any], found: Mapping[str, tables.Scan], options: FarmOptions) -> Iterable[Unit]:
    """Units of neighbours in length, long ones first; not larger than gives every worker one."""
    wanted, _, _ = plan(options, live_nodes())
    size = max(1, min(options.unit_rows, -(-len(todo) // wanted)))
    for first in range(0, len(todo), size):
        ids = tuple(todo[first : first + size])
        rows = {name: tuple((found[name].shards[at[key][0]].path, at[key][1]) for key in ids) for name, at in where.items()}
        yield Unit(ids, rows)


def _drop_duplicates(output: tables.Scan, one_row_per_item: bool) -> None:
    """An item that is in two shards (a worker outlived its run) stays in one: one without error if there is one."""
    best: dict[str, tuple[bool, int, int]] = {}
    for index, shard in enumerate(output.shards):
        for row, (key, error) in enumerate(zip(shard.ids, shard.errors, strict=True)):
            candidate = (error, index, row)
            if key not in best or candidate < best[key]:
                best[key] = candidate
    for index, shard in enumerate(output.shards):
        drop = [row for row, key in enumerate(shard.ids) if best[key][1] != index or (one_row_per_item and best[key][2] != row)]
        if drop:
            tables.drop_rows(shard.path, drop)


def _drop_errors(output: tables.Scan) -> None:
    """Takes the items with an error out, so that they are to do again."""
    for shard in output.shards:
        bad = {key for key, error in zip(shard.ids, shard.errors, strict=True) if error}
        if bad:
            tables.drop_rows(shard.path, [row for row, key in enumerate(shard.ids) if key in bad])


def _reconcile(ids: Mapping[str, Any], output: tables.Scan, dataset: str, one_row_per_item: bool) -> None:
    """ReconcileError unless every input id is in the output exactly once, and no other."""
    counts: Counter[str] = Counter()
    for shard in output.shards:
        counts.update(shard.ids if one_row_per_item else set(shard.ids))
    problems = {
        "missing": [key for key in ids if key not in counts],
        "more than once": [key for key, count in counts.items() if count > 1],
        "unknown": [key for key in counts if key not in ids],
    }
    told = [f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})" for what, keys in problems.items() if keys]
    if output.unreadable:
        told.append(f"{len(output.unreadable)} unreadable shard(s) ({next(iter(output.unreadable))})")
    if told:
        raise ReconcileError(
            f"output {dataset} is not complete: ids {'; '.join(told)}. Run the same command again: it does what is missing"
        )


@dataclass(frozen=True)
class ModelSource:
    """How a worker gets its model."""

    path: str
    precisions: tuple[int, ...] | None = None
    kernel: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if os.path.exists(self.path):  # a worker's working directory may be another; a Hugging Face id stays as it is
            object.__setattr__(self, "path", os.path.abspath(self.path))

    def load(self, place: Place) -> tuple[Any, str]:
        """The model on the worker's device, and that device's name. Where Ray gives out GPUs that torch does not see, the CPU."""
        import torch

        from pmpd.model import PMPDForCausalLM
        from pmpd.quantize.convert import local_folder
        from pmpd.weights.base import compute_dtype

        torch.set_num_threads(place.threads)
        device = torch.device("cuda" if place.gpu_ids and torch.cuda.is_available() else "cpu")
        model = PMPDForCausalLM(
            local_folder(self.path),
            self.precisions,
            dtype=compute_dtype(device),
            kernel=self.kernel,
            trust_remote_code=self.trust_remote_code,
        ).eval()
        return model.to(device), torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
