"""What a run has to do and has done, as the files tell it: scan, repair, to do, reconcile, finish. Imports no
Ray.

The output is the only truth: to do = ids of the input - ids in readable shards of the output. Ids are held as
numpy arrays (`pmpd.storage.keys`), once, and what is known of an item lies in arrays in their order; so 10^7
items fit into the driver.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pmpd import storage
from pmpd.errors import UserError
from pmpd.farm.task import FarmTask, Unit
from pmpd.storage import keys as ids_of

MANY_SHARDS = 64
"""From so many on, the items of a unit are neighbours in the input's shards too: 32 items of 32 shards would
open 32 files."""


class ReconcileError(UserError):
    """Output and input do not hold the same ids."""


class Ledger:
    """Input and output of one run. The first input says which items there are.

    UserError: what a user can mend (another configuration, a damaged or missing input).
    """

    def __init__(
        self, task: FarmTask, inputs: Mapping[str, str], dataset: str | Path, config: Mapping[str, Any]
    ) -> None:
        self.table, self.id_column = task.table, task.id_column
        self.one_row_per_item = task.one_row_per_item
        self.dataset = storage.absolute(dataset)
        self.config = config
        self.inputs = {name: storage.absolute(path) for name, path in inputs.items()}
        self.manifest = storage.check_config(self.dataset, config) or {}
        self.unreadable: list[str] = []
        """Damaged shards, where they were set aside."""
        self.output = storage.Scan()
        self._ids = np.zeros(0, np.uint64)  # sorted, each once
        self._done = np.zeros(0, bool)
        self.items_done = 0
        """Items in the output."""
        self.items_failed = 0
        """Items of the output one of whose rows has an error."""
        self.journal = storage.Journal(self.dataset, self.id_column)

    @property
    def items(self) -> int:
        """Items of the input."""
        return len(self._ids)

    # -- before the work

    def scan_inputs(self) -> None:
        self._places: dict[str, tuple[Sequence[str], np.ndarray]] = {}
        """Input -> its shards, and where each begins in the order of its rows."""
        self._row_of: dict[str, np.ndarray] = {}
        """Input -> for each item, in the order of ids, its row (uint32)."""
        for name, path in self.inputs.items():
            scan = storage.scan(path, self.id_column, remember=True)
            if scan.unreadable:
                raise UserError(
                    f"input {name}: {next(iter(scan.unreadable.values()))}; run the stage that makes "
                    f"{name} again: it does the rows of that shard and keeps the others"
                )
            self._places[name] = (scan.paths, scan.starts)
            ids, rows = _first_rows(scan.keys)
            if len(self._row_of):
                rows = rows[self._places_among(name, ids)]
            elif not len(ids):
                raise UserError(f"input {path}: it holds no rows; nothing to do")
            else:
                self._ids, self._done = ids, np.zeros(len(ids), bool)
                self._lengths = np.minimum(scan.lengths[rows], np.iinfo(np.uint16).max).astype(np.uint16)
            self._row_of[name] = rows

    def _places_among(self, name: str, held: np.ndarray) -> np.ndarray:
        """Where in the ids of another input each item is."""
        found = ids_of.positions(self._ids, held)
        lacking = np.flatnonzero(found < 0)
        if len(lacking):
            raise UserError(
                f"input {name} lacks {len(lacking)} of {len(self._ids)} ids, e.g. "
                f"{', '.join(ids_of.decode(self._ids[lacking[:3]]))}; run the stage that makes it first"
            )
        return found

    def repair_output(self, retry_errors: bool = False) -> None:
        """Takes out of the output what must not count: half-written files, damaged shards, second rows of an
        item, and, if asked, errors. UserError where it holds items that the input has not."""
        storage.remove_temporary(self.dataset)
        self._read_output(full=True)
        self.unreadable = [storage.set_aside(path, self.dataset) for path in self.output.unreadable]
        self.output.unreadable = {}
        if drop_duplicates(self.output, self.one_row_per_item):
            self._read_output()
        if retry_errors and drop_errors(self.output):
            self._read_output()
        if len(self._unknown):
            raise UserError(
                f"output folder {self.dataset}: it holds {len(self._unknown)} ids that are not in the input, "
                f"e.g. {', '.join(ids_of.decode(self._unknown[:3]))}: the input has changed; choose another "
                f"output folder"
            )

    @property
    def known_models(self) -> dict[str, Any]:
        """Fingerprints of the models that the rows in the output are from."""
        return dict(self.manifest.get("models", {})) if self.items_done else {}

    # -- the work

    def todo(self) -> np.ndarray:
        """Items without a row in the output (their places in the order of ids); long prompts first, so
        that the end has no straggler. Of a large input, items of about one length come in the order of its
        shards."""
        todo = np.flatnonzero(~self._done).astype(np.uint32)
        lengths = self._lengths[todo].astype(np.int32)
        name = next(iter(self.inputs))
        if len(self._places[name][0]) > MANY_SHARDS:
            lengths = (8 * np.log2(np.maximum(lengths, 1, dtype=np.float32))).astype(np.int16)
        return todo[np.lexsort((self._row_of[name][todo], -lengths))]

    def units(self, todo: np.ndarray, size: int) -> Iterator[Unit]:
        """Units of neighbours in length, `size` items each. Made as they are asked for."""
        for first in range(0, len(todo), size):
            items = todo[first : first + size]
            rows = {
                name: tuple(self._place(name, row) for row in self._row_of[name][items])
                for name in self.inputs
            }
            yield Unit(tuple(ids_of.decode(self._ids[items])), rows)

    def _place(self, name: str, row: int) -> tuple[str, int]:
        paths, starts = self._places[name]
        shard = int(np.searchsorted(starts, row, side="right")) - 1
        return paths[shard], int(row - starts[shard])

    def reread(self) -> None:
        """What the output holds after work was done."""
        self.journal.flush()
        self._read_output()
        if drop_duplicates(self.output, self.one_row_per_item):
            self._read_output()

    def _read_output(self, full: bool = False) -> None:
        self.output = storage.Scan()  # the memory of the one before is given back first
        self.output = storage.scan(self.dataset, self.id_column, full=full, remember=True)
        at = ids_of.positions(self.output.keys, self._ids)
        self._unknown = ids_of.distinct(self.output.keys[at < 0])
        self._done = np.zeros(len(self._ids), bool)
        self._done[at[at >= 0]] = True
        self.items_done = int(self._done.sum()) + len(self._unknown)
        self.items_failed = len(ids_of.distinct(self.output.keys[self.output.errors]))

    # -- after the work

    def reconcile(self) -> None:
        """ReconcileError unless every input id is in the output exactly once, and no other."""
        reconcile(self._ids, self.output, self.dataset, self.one_row_per_item)

    @property
    def rows(self) -> int:
        return len(self.output)

    @property
    def errors(self) -> int:
        """Rows with an error."""
        return int(self.output.errors.sum())

    def begin(self) -> None:
        """Says in the manifest that rows are coming."""
        self._write_manifest(False, self.known_models, 0.0, str(self.manifest.get("device", "")))

    def finish(self, models: Mapping[str, Any], seconds: float, device: str, run: Mapping[str, Any]) -> None:
        """Says in the manifest that the output is whole. `seconds` are this run's."""
        counts = {
            "rows": self.rows,
            "items": self.items_done,
            "errors": self.errors,
            "shards": len(self.output.paths),
            "unreadable": len(self.unreadable),
        }
        device = device or str(self.manifest.get("device", ""))
        self._write_manifest(True, models, seconds, device, counts, run)

    def _write_manifest(
        self,
        complete: bool,
        models: Mapping[str, Any],
        seconds: float,
        device: str,
        counts: Mapping[str, int] | None = None,
        run: Mapping[str, Any] | None = None,
    ) -> None:
        storage.write_manifest(
            self.dataset,
            self.output.schema if complete else None,
            self.config,
            table=self.table,
            complete=complete,
            models=models,
            counts=counts,
            seconds=float(self.manifest.get("seconds", 0.0)) + seconds,
            device=device,
            run=run,
        )


def unit_rows(todo: int, most: int, workers: int) -> int:
    """Items of a unit: not more than gives every worker one."""
    return max(1, min(most, -(-todo // workers)))


def _shards_of(output: storage.Scan, rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(output.starts, rows, side="right") - 1


def _first_rows(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the keys, sorted, each once; uint32: the first row of each)."""
    order = np.argsort(keys, kind="stable").astype(np.uint32)
    ordered = keys[order]
    again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    return (np.delete(ordered, again), np.delete(order, again)) if len(again) else (ordered, order)


def _doubled(output: storage.Scan, one_row_per_item: bool) -> list[np.ndarray]:
    """The rows of each item that is there more than once: twice at all, or (where items have several rows) in
    more than one shard."""
    ordered = np.sort(output.keys)
    if not (ordered[1:] == ordered[:-1]).any():
        return []
    order = np.argsort(output.keys, kind="stable")
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    if not one_row_per_item:
        shards = _shards_of(output, order)
        several = np.maximum.reduceat(shards, begins) != np.minimum.reduceat(shards, begins)
    else:
        several = np.diff(np.append(begins, len(order))) > 1
    ends = np.append(begins[1:], len(order))
    return [order[begins[item] : ends[item]] for item in np.flatnonzero(several)]


def drop_duplicates(output: storage.Scan, one_row_per_item: bool) -> bool:
    """An item that is in two shards (a worker outlived its run) stays in one: one without error if there is
    one. Whether there was any."""
    out: list[np.ndarray] = []
    for rows in _doubled(output, one_row_per_item):
        best = rows[np.argmin(output.errors[rows])]
        kept = rows == best if one_row_per_item else _shards_of(output, rows) == _shards_of(output, best)
        out.append(rows[~kept])
    return _drop(output, np.concatenate(out) if out else np.zeros(0, np.int64))


def drop_errors(output: storage.Scan) -> bool:
    """Takes the items with an error out, so that they are to do again."""
    return _drop(output, np.flatnonzero(np.isin(output.keys, output.keys[output.errors])))


def _drop(output: storage.Scan, rows: np.ndarray) -> bool:
    """Whether there was any such row."""
    shards = _shards_of(output, rows)
    for shard in np.unique(shards):
        storage.drop_rows(output.paths[shard], (rows[shards == shard] - output.starts[shard]).tolist())
    return len(rows) > 0


def reconcile(ids: np.ndarray, output: storage.Scan, dataset: str, one_row_per_item: bool) -> None:
    """ReconcileError unless every id of the input (each once) is in the output exactly once, and no other."""
    held = ids_of.distinct(output.keys)
    problems = {
        "missing": ids[ids_of.missing(ids, held)],
        "more than once": output.keys[[rows[0] for rows in _doubled(output, one_row_per_item)]],
        "unknown": held[ids_of.missing(held, ids)],
    }
    told = [
        f"{len(keys)} {what} ({', '.join(ids_of.decode(keys[:3]))}{', …' if len(keys) > 3 else ''})"
        for what, keys in problems.items()
        if len(keys)
    ]
    if output.unreadable:
        told.append(f"{len(output.unreadable)} unreadable shard(s) ({next(iter(output.unreadable))})")
    if told:
        raise ReconcileError(
            f"output {dataset} is not complete: ids {'; '.join(told)}. Run the same command again: it does "
            f"what is missing"
        )
