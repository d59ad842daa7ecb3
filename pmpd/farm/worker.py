"""What a task has to say, and the actor that does it: a unit of items in, one shard out.

A row that raises is an error row; a unit's shard is written all or nothing, and only for a run that holds its
lease.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa
import ray

from pmpd import storage
from pmpd.errors import UserError
from pmpd.storage.lease import LeaseLostError, token_in

POISONED = 17
"""Exit code of a worker whose GPU context is broken."""

Item = dict[str, dict[str, Any]]
"""Input name -> the item's row of that input."""


@dataclass(frozen=True)
class Place:
    """Where a worker runs."""

    worker: str
    """Its name in the `worker` column: node/process, with the GPU ids if it has any."""
    threads: int
    gpu_ids: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        return "cuda" if self.gpu_ids else "cpu"


@dataclass(frozen=True)
class BuiltTask:
    """A task with its model loaded, inside a worker."""

    run: Callable[[list[Item]], Iterable[dict[str, Any]]]
    """Rows for a unit of items, in any order. An exception is charged to the one row that raises it (the
    others are done again)."""
    schema: pa.Schema
    models: Mapping[str, Any] = field(default_factory=dict)
    """Fingerprints: part of what defines the rows, so they must be equal on all workers and in a continued
    run."""
    device: str = ""
    tokens: Callable[[dict[str, Any]], int] = lambda row: 0
    """Tokens that a row cost, for the rate."""


class FarmTask(ABC):
    """A picklable recipe for the work. `build` is called once per worker."""

    table: ClassVar[str]
    """Name of the output table."""
    id_column: ClassVar[str] = "prompt_id"
    """The item's id, in the inputs and in the output."""
    one_row_per_item: ClassVar[bool] = True
    """False: an item may give several rows, all in one shard (the turns of a conversation)."""

    @abstractmethod
    def build(self, place: Place) -> BuiltTask:
        """Loads what the work needs. A ValueError stops the run with its message."""


@dataclass(frozen=True)
class Unit:
    """Items done together by one worker, and written as one shard."""

    ids: tuple[str, ...]
    rows: Mapping[str, tuple[tuple[str, int], ...]]
    """Input name -> (shard, row) per id."""
    kills: int = 0
    node_losses: int = 0
    failures: int = 0
    split: bool = False
    """A single row of a unit that killed its worker twice."""
    failed: str | None = None
    """Set: no work, only error rows with this text."""

    @property
    def name(self) -> str:
        return hashlib.sha256("/".join(sorted(self.ids)).encode()).hexdigest()[:16]

    def singles(self) -> list[Unit]:
        return [
            Unit((key,), {name: (at[i],) for name, at in self.rows.items()}, split=True)
            for i, key in enumerate(self.ids)
        ]


@dataclass(frozen=True)
class UnitResult:
    items: int
    error_items: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class WorkerInfo:
    place: Place
    models: Mapping[str, Any]
    device: str


def shard_path(dataset: str, unit: Unit) -> str:
    return storage.join(storage.data_folder(dataset), f"part-{unit.name}.parquet")


def note_path(dataset: str, unit: Unit) -> str:
    """Where a worker that must end itself says why; temporary, as half-written files are."""
    return storage.join(dataset, f".death.{unit.name}.tmp")


def error_text(error: BaseException, tail_lines: int = 6) -> str:
    """Class, message and the end of the traceback."""
    frames = "".join(traceback.format_tb(error.__traceback__)).rstrip().splitlines()[-2 * tail_lines :]
    return (
        f"{type(error).__name__}: {error}\n" + "\n".join(frames)
        if frames
        else f"{type(error).__name__}: {error}"
    )


def poisons_process(error: BaseException | None) -> bool:
    """Whether the GPU context of this process is beyond repair. Running out of GPU memory is not that."""
    while error is not None:
        kind, text = type(error).__name__, str(error)
        if kind != "OutOfMemoryError" and (
            kind == "AcceleratorError"
            or any(s in text for s in ("CUDA error", "CUBLAS_STATUS", "device-side"))
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


class Worker:
    """The actor: a loop around a task. Its methods return numbers only; rows go straight to storage."""

    def __init__(self, connections: Mapping[str, tuple[str, str]] | None = None) -> None:
        storage.connect(connections or {})

    def start(
        self,
        task: FarmTask,
        dataset: str,
        lease_path: str,
        lease_token: str,
        gpus: float,
        workers_per_node: int,
    ) -> WorkerInfo:
        context = ray.get_runtime_context()
        node_id = context.get_node_id()
        gpu_ids = tuple(str(gpu) for gpu in context.get_accelerator_ids().get("GPU", []))
        own: dict[str, float] = next(
            (node["Resources"] for node in ray.nodes() if node["NodeID"] == node_id), {}
        )
        share = gpus / own["GPU"] if gpus and own.get("GPU") else 1 / workers_per_node
        threads = max(1, int(own.get("CPU", 1) * share))
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
            os.environ[variable] = str(threads)
        if "torch" in sys.modules:  # imported while the task was unpickled: too late for the variables
            sys.modules["torch"].set_num_threads(threads)
        name = f"{ray.util.get_node_ip_address()}/{os.getpid()}" + (
            f"/gpu{'+'.join(gpu_ids)}" if gpu_ids else ""
        )
        self.place = Place(name, threads, gpu_ids)
        self.task, self.dataset = task, dataset
        self.lease_path, self.lease_token = lease_path, lease_token
        if storage.read_bytes(lease_path) is None:
            raise UserError(
                f"output folder {dataset}: node {name} does not see it; --output-dir must be on storage that "
                f"all nodes share (NFS, s3://…)"
            )
        self._check_lease()
        self.built = task.build(self.place)
        return WorkerInfo(self.place, dict(self.built.models), self.built.device)

    def run(self, unit: Unit) -> UnitResult:
        """Does a unit and writes its shard; returns when that is durable."""
        begin = time.monotonic()
        self.unit = unit
        rows: dict[str, list[dict[str, Any]]] = {}
        items = self._read(unit)
        for key, item in items.items():
            problem = unit.failed or next(
                (f"{name}: {row['error']}" for name, row in item.items() if row.get("error")), None
            )
            if problem is not None:
                rows[key] = [self._error_row(item, problem)]
        self._work({key: item for key, item in items.items() if key not in rows}, rows)
        table = self._table(items, rows)
        self._check_lease()
        storage.write_shard(table, shard_path(self.dataset, unit))
        error_items = sum(any(row.get("error") for row in rows[key]) for key in unit.ids)
        tokens = sum(self.built.tokens(row) for key in unit.ids for row in rows[key] if not row.get("error"))
        return UnitResult(len(unit.ids), error_items, tokens, time.monotonic() - begin)

    def _read(self, unit: Unit) -> dict[str, Item]:
        items: dict[str, Item] = {key: {} for key in unit.ids}
        for name, where in unit.rows.items():
            by_shard: dict[str, list[tuple[str, int]]] = {}
            for key, (path, index) in zip(unit.ids, where, strict=True):
                by_shard.setdefault(path, []).append((key, index))
            for path, wanted in by_shard.items():
                for (key, _), row in zip(
                    wanted, storage.read_rows(path, [index for _, index in wanted]), strict=True
                ):
                    if row[self.task.id_column] != key:
                        raise RuntimeError(f"{path}: changed while it was in use")
                    items[key][name] = row
        return items

    def _work(self, items: dict[str, Item], rows: dict[str, list[dict[str, Any]]]) -> None:
        """Fills `rows`. After an exception the items not yet done are tried one by one, to find the row it
        belongs to."""
        try:
            if items:
                self._collect(list(items.values()), rows)
        except Exception as error:
            if poisons_process(error):
                with contextlib.suppress(OSError):  # Ray would only tell that the process is gone
                    storage.write_bytes(note_path(self.dataset, self.unit), error_text(error).encode())
                os._exit(POISONED)
            left = {key: item for key, item in items.items() if key not in rows}
            if len(items) > 1:
                for key, item in left.items():
                    self._work({key: item}, rows)
            else:
                rows.update({key: [self._error_row(item, error_text(error))] for key, item in left.items()})
        for key, item in items.items():
            if key not in rows:
                rows[key] = [self._error_row(item, "the task returned no row for it")]

    def _collect(self, items: list[Item], rows: dict[str, list[dict[str, Any]]]) -> None:
        expected = {next(iter(item.values()))[self.task.id_column] for item in items}
        for row in self.built.run(items):
            key = row[self.task.id_column]
            assert key in expected, f"a row of an item that was not asked for: {key}"
            assert not (self.task.one_row_per_item and key in rows), f"two rows of one item: {key}"
            rows.setdefault(key, []).append(row)

    def _table(self, items: Mapping[str, Item], rows: dict[str, list[dict[str, Any]]]) -> pa.Table:
        """The unit's shard. An item with a value that its column can't hold becomes an error row, in `rows`
        too."""

        def table(keys: Iterable[str]) -> pa.Table:
            flat = [row for key in keys for row in rows[key]]
            if "worker" in self.built.schema.names:
                flat = [{**row, "worker": row.get("worker") or self.place.worker} for row in flat]
            return storage.to_table(flat, self.built.schema)

        try:
            return table(items)
        except ValueError:
            for key, item in items.items():
                try:
                    table([key])
                except ValueError as error:
                    rows[key] = [self._error_row(item, error_text(error))]
            return table(items)

    def _error_row(self, item: Item, text: str) -> dict[str, Any]:
        """What the first input knows of the item, in the columns that the output shares with it, and the
        error."""
        source = next(iter(item.values()))
        row = {name: source.get(name) for name in self.built.schema.names if name in source} | {"error": text}
        # The table's own key must not be null; where that is not the item's id it is derived from it.
        first = self.built.schema.names[0]
        return (
            row
            if first in row
            else {first: hashlib.sha256(f"{row[self.task.id_column]}/error".encode()).hexdigest()[:16], **row}
        )

    def _check_lease(self) -> None:
        if token_in(self.lease_path) != self.lease_token:
            raise LeaseLostError(
                f"output folder {self.dataset}: this run no longer holds it; nothing was written"
            )
