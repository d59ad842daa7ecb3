"""What a worker does with a unit of items: read, run the task, write one shard. Imports no Ray.

A row that raises is an error row; a unit's shard is written all or nothing, and only for a run that holds its
lease and has not replaced this worker. Two threads may each do a unit: while one works, the last rows of the
one before are made where they need no device any more, and its shard is written, so that a GPU does not wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyarrow as pa

from pmpd import storage
from pmpd.errors import UserError
from pmpd.farm.task import (
    Beat,
    FarmTask,
    Item,
    LateRow,
    Place,
    Unit,
    UnitResult,
    WorkerInfo,
    shard_path,
)
from pmpd.storage.lease import check_publication


def error_text(error: BaseException, tail_lines: int = 6) -> str:
    """Class, message and the end of the traceback."""
    frames = "".join(traceback.format_tb(error.__traceback__)).rstrip().splitlines()[-2 * tail_lines :]
    return "\n".join([f"{type(error).__name__}: {error}", *frames])


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


class Workbench:
    """A task built in this process, and the units it does one after another."""

    def __init__(
        self,
        task: FarmTask,
        dataset: str,
        lease_path: str,
        lease_token: str,
        place: Place,
        worker_id: str,
        poisoned: Callable[[Unit, BaseException], None],
    ) -> None:
        """`poisoned` is called where the process can't go on; it must not return."""
        self.task, self.dataset, self.place = task, dataset, place
        self.lease_path, self.lease_token, self.worker_id = lease_path, lease_token, worker_id
        self._poisoned = poisoned
        self._unit: Unit | None = None
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._forwards_before = 0
        self._ending: tuple[Unit, dict[str, list[dict[str, Any]]], int] | None = None
        """The unit whose last rows are waited for, its rows and its forwards."""
        self._next: list[Item] = []
        """Of the unit that waits for its turn, if they are on offer."""
        self._later: dict[str, dict[str, Item]] = {}
        """Unit -> items that were read before its turn."""
        self._may_offer = False
        """Not where items are tried one by one: an exception is that one's."""
        self._turn = threading.Lock()
        """Of the unit that is worked on."""
        self._writing = threading.Lock()
        """Of the unit whose shard is written, the one before it."""

    def build(self) -> WorkerInfo:
        if storage.read_bytes(self.lease_path) is None:
            raise UserError(
                f"output folder {self.dataset}: node {self.place.worker} does not see it; it must "
                f"be on storage that all nodes share (NFS, s3://…)"
            )
        self._check_publication()
        begin = time.monotonic()
        self.built = self.task.build(self.place)
        if self.built.offers is not None:
            self.built.offers(self._take_next)
        seconds = time.monotonic() - begin
        built = self.built
        return WorkerInfo(self.place, dict(built.models), built.device, seconds, built.note)

    def run(self, unit: Unit, later: Unit | None = None) -> UnitResult:
        """Does a unit and writes its shard; returns when that is durable. Shards are written in the order in
        which units are worked on. A unit is read while the one before it is worked on, by whoever calls `run`
        for it meanwhile, or as `later` where nobody does."""
        items = self._later.pop(unit.name, None) or self._read(unit)
        self._next = self._workable(unit, items)
        with self._turn:
            begin = time.monotonic()
            self._next = []
            if later is not None and self.built.offers is not None:
                with contextlib.suppress(Exception):  # told when it is its turn
                    self._later = {later.name: self._read(later)}
                    self._next = self._workable(later, self._later[later.name])
            rows, late, forwards = self._done(unit, items)
            self._writing.acquire()  # before the next unit has its turn: no two shards at once
        try:
            self._ending = unit, rows, sum(forwards.values())
            self._wait_for(late, items, rows)
            table = self._table(items, rows)
            self._check_publication()
            path = shard_path(self.dataset, unit)
            size = storage.write_shard(table, path, self.task.row_group_rows)
            entry = storage.entry_of(path, size, storage.rows_of(table, self.task.id_column))
        finally:
            self._ending = None
            self._writing.release()
        error_items = sum(any(row.get("error") for row in rows[key]) for key in unit.ids)
        tokens = sum(self.built.tokens(row) for key in unit.ids for row in rows[key] if not row.get("error"))
        seconds = time.monotonic() - begin
        return UnitResult(len(unit.ids), error_items, tokens, seconds, forwards, entry)

    def _workable(self, unit: Unit, items: Mapping[str, Item]) -> list[Item]:
        return [item for item in items.values() if self._problem(unit, item) is None]

    def _take_next(self) -> list[Item]:
        """Items of the unit that waits, once; none while there is no such unit."""
        if not self._may_offer:
            return []
        items, self._next = self._next, []
        return items

    @staticmethod
    def _problem(unit: Unit, item: Item) -> str | None:
        """Why there is no work on the item."""
        errors = (f"{name}: {row['error']}" for name, row in item.items() if row.get("error"))
        return unit.failed or next(errors, None)

    def _done(
        self, unit: Unit, items: dict[str, Item]
    ) -> tuple[dict[str, list[dict[str, Any]]], list[LateRow], dict[int, int]]:
        """(the rows of the unit's items, those of them that are still to come, precision -> forwards of
        rows)."""
        pulse = self.built.pulse
        before = pulse.by_bits()
        rows: dict[str, list[dict[str, Any]]] = {}
        late: list[LateRow] = []
        self._forwards_before, self._rows, self._unit = pulse.forwards, rows, unit
        try:
            for key, item in items.items():
                problem = self._problem(unit, item)
                if problem is not None:
                    rows[key] = [self._error_row(item, problem)]
            self._may_offer = True
            self._work({key: item for key, item in items.items() if key not in rows}, rows, late)
        finally:
            self._may_offer = False
            pulse.rest()
            self._unit, self._rows = None, {}
        return rows, late, dict(pulse.by_bits() - before)

    def _wait_for(
        self, late: Iterable[LateRow], items: Mapping[str, Item], rows: dict[str, list[dict[str, Any]]]
    ) -> None:
        for coming in late:
            try:
                row = coming.row()
            except Exception as error:
                row = self._error_row(items[coming.key], error_text(error))
            rows[coming.key].append(row)

    def beat(self) -> Beat | None:
        """How far the unit is that is worked on, else the one whose last rows are waited for; None between
        units. Another thread asks."""
        unit, rows, ending, pulse = self._unit, self._rows, self._ending, self.built.pulse
        if unit is not None:
            forwards = pulse.forwards - self._forwards_before
        elif ending is not None:
            unit, rows, forwards = ending
        else:
            return None
        there = sum(map(bool, list(rows.values())))
        return Beat(unit.name, there, forwards, pulse.longest_seconds, pulse.doing)

    def _check_publication(self) -> None:
        check_publication(self.lease_path, self.lease_token, self.worker_id)

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

    def _work(
        self, items: dict[str, Item], rows: dict[str, list[dict[str, Any]]], late: list[LateRow]
    ) -> None:
        """Fills `rows` and `late`. After an exception the items not yet done are tried one by one, to find
        the row it belongs to."""
        try:
            if items:
                self._collect(list(items.values()), rows, late)
        except Exception as error:
            self._may_offer = False
            if poisons_process(error):
                assert self._unit is not None
                with self._writing:  # the unit before this one has no part in it
                    self._poisoned(self._unit, error)
            left = {key: item for key, item in items.items() if key not in rows}
            if len(items) > 1:
                for key, item in left.items():
                    self._work({key: item}, rows, late)
            else:
                rows.update({key: [self._error_row(item, error_text(error))] for key, item in left.items()})
        for key, item in items.items():
            if key not in rows:
                rows[key] = [self._error_row(item, "the task returned no row for it")]

    def _collect(self, items: list[Item], rows: dict[str, list[dict[str, Any]]], late: list[LateRow]) -> None:
        expected = {next(iter(item.values()))[self.task.id_column] for item in items}
        for row in self.built.run(items):
            key = row.key if isinstance(row, LateRow) else row[self.task.id_column]
            assert key in expected, f"a row of an item that was not asked for: {key}"
            assert not (self.task.one_row_per_item and key in rows), f"two rows of one item: {key}"
            of_item = rows.setdefault(key, [])
            if isinstance(row, LateRow):
                late.append(row)
            else:
                of_item.append(row)

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
        if first in row:
            return row
        key = hashlib.sha256(f"{row[self.task.id_column]}/error".encode()).hexdigest()[:16]
        return {first: key, **row}
