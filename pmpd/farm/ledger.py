"""What a run has to do and has done, as the files tell it: scan, repair, to do, reconcile, finish. Imports no
Ray.

The output is the only truth: to do = ids of the input - ids in readable shards of the output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pmpd import storage
from pmpd.errors import UserError
from pmpd.farm.task import FarmTask, Unit


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
        self.done: dict[str, bool] = {}
        """Id of an item in the output -> whether one of its rows has an error."""
        self.output = storage.Scan()

    # -- before the work

    def scan_inputs(self) -> None:
        found = {name: storage.scan(path, self.id_column) for name, path in self.inputs.items()}
        for name, scan in found.items():
            if scan.unreadable:
                raise UserError(
                    f"input {name}: {next(iter(scan.unreadable.values()))}; run the stage that makes "
                    f"{name} again: it does the rows of that shard and keeps the others"
                )
        self._shards = {name: scan.shards for name, scan in found.items()}
        self._where = {name: scan.where() for name, scan in found.items()}
        primary, *others = self.inputs
        self.ids = self._where[primary]
        if not self.ids:
            raise UserError(f"input {self.inputs[primary]}: it holds no rows; nothing to do")
        for name in others:
            lacking = [key for key in self.ids if key not in self._where[name]]
            if lacking:
                raise UserError(
                    f"input {name} lacks {len(lacking)} of {len(self.ids)} ids, e.g. "
                    f"{', '.join(lacking[:3])}; run the stage that makes it first"
                )

    def repair_output(self, retry_errors: bool = False) -> None:
        """Takes out of the output what must not count: half-written files, damaged shards, second rows of an
        item, and, if asked, errors. UserError where it holds items that the input has not."""
        storage.remove_temporary(self.dataset)
        output = storage.scan(self.dataset, self.id_column)
        self.unreadable = [storage.set_aside(path, self.dataset) for path in output.unreadable]
        if drop_duplicates(output, self.one_row_per_item):
            output = storage.scan(self.dataset, self.id_column, full=False)
        if retry_errors:
            drop_errors(output)
        self._read_output()
        unknown = [key for key in self.done if key not in self.ids]
        if unknown:
            raise UserError(
                f"output folder {self.dataset}: it holds {len(unknown)} ids that are not in the input, e.g. "
                f"{', '.join(unknown[:3])}: the input has changed; choose another output folder"
            )

    @property
    def known_models(self) -> dict[str, Any]:
        """Fingerprints of the models that the rows in the output are from."""
        return dict(self.manifest.get("models", {})) if self.done else {}

    # -- the work

    def todo(self) -> list[str]:
        """Ids without a row in the output; long prompts first, so that the end has no straggler."""
        shards = self._shards[next(iter(self.inputs))]

        def rank(key: str) -> tuple[int, str]:
            shard, row = self.ids[key]
            return -shards[shard].lengths[row], key

        return sorted((key for key in self.ids if key not in self.done), key=rank)

    def units(self, todo: list[str], size: int) -> Iterator[Unit]:
        """Units of neighbours in length, `size` items each. Made as they are asked for."""
        for first in range(0, len(todo), size):
            ids = tuple(todo[first : first + size])
            rows = {
                name: tuple((self._shards[name][at[key][0]].path, at[key][1]) for key in ids)
                for name, at in self._where.items()
            }
            yield Unit(ids, rows)

    def reread(self) -> None:
        """What the output holds after work was done."""
        self._read_output()
        if drop_duplicates(self.output, self.one_row_per_item):
            self._read_output()

    def _read_output(self) -> None:
        self.output = storage.scan(self.dataset, self.id_column, full=False)
        self.done = items_of(self.output)

    # -- after the work

    def reconcile(self) -> None:
        """ReconcileError unless every input id is in the output exactly once, and no other."""
        reconcile(self.ids, self.output, self.dataset, self.one_row_per_item)

    @property
    def rows(self) -> int:
        return sum(len(shard.ids) for shard in self.output.shards)

    @property
    def errors(self) -> int:
        """Rows with an error."""
        return sum(sum(shard.errors) for shard in self.output.shards)

    def begin(self) -> None:
        """Says in the manifest that rows are coming."""
        self._write_manifest(False, self.known_models, 0.0, str(self.manifest.get("device", "")))

    def finish(self, models: Mapping[str, Any], seconds: float, device: str, run: Mapping[str, Any]) -> None:
        """Says in the manifest that the output is whole. `seconds` are this run's."""
        counts = {
            "rows": self.rows,
            "items": len(self.done),
            "errors": self.errors,
            "shards": len(self.output.shards),
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
            self.output.shards[0].schema if complete and self.output.shards else None,
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


def items_of(output: storage.Scan) -> dict[str, bool]:
    """Item id -> whether one of its rows has an error."""
    items: dict[str, bool] = {}
    for shard in output.shards:
        for key, error in zip(shard.ids, shard.errors, strict=True):
            items[key] = items.get(key, False) or error
    return items


def drop_duplicates(output: storage.Scan, one_row_per_item: bool) -> bool:
    """An item that is in two shards (a worker outlived its run) stays in one: one without error if there is
    one. Whether there was any."""
    best: dict[str, tuple[bool, int, int]] = {}
    for index, shard in enumerate(output.shards):
        for row, (key, error) in enumerate(zip(shard.ids, shard.errors, strict=True)):
            candidate = (error, index, row)
            if key not in best or candidate < best[key]:
                best[key] = candidate

    def doubled(index: int, row: int, key: str) -> bool:
        return best[key][1] != index or (one_row_per_item and best[key][2] != row)

    return _drop(output, doubled)


def drop_errors(output: storage.Scan) -> bool:
    """Takes the items with an error out, so that they are to do again."""
    bad = {key for key, error in items_of(output).items() if error}
    return _drop(output, lambda index, row, key: key in bad)


def _drop(output: storage.Scan, out: Callable[[int, int, str], bool]) -> bool:
    changed = False
    for index, shard in enumerate(output.shards):
        rows = [row for row, key in enumerate(shard.ids) if out(index, row, key)]
        if rows:
            storage.drop_rows(shard.path, rows)
            changed = True
    return changed


def reconcile(ids: Mapping[str, Any], output: storage.Scan, dataset: str, one_row_per_item: bool) -> None:
    """ReconcileError unless every input id is in the output exactly once, and no other."""
    counts: Counter[str] = Counter()
    for shard in output.shards:
        counts.update(shard.ids if one_row_per_item else set(shard.ids))
    problems = {
        "missing": [key for key in ids if key not in counts],
        "more than once": [key for key, count in counts.items() if count > 1],
        "unknown": [key for key in counts if key not in ids],
    }
    told = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
        for what, keys in problems.items()
        if keys
    ]
    if output.unreadable:
        told.append(f"{len(output.unreadable)} unreadable shard(s) ({next(iter(output.unreadable))})")
    if told:
        raise ReconcileError(
            f"output {dataset} is not complete: ids {'; '.join(told)}. Run the same command again: it does "
            f"what is missing"
        )
