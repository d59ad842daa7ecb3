"""What is there and what is to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pmpd import storage
from pmpd.errors import UserError


class ReconcileError(UserError):
    """Output and input do not hold the same ids."""


def items_of(output: storage.Scan) -> dict[str, bool]:
    """Item id -> whether one of its rows has an error."""
    items: dict[str, bool] = {}
    for shard in output.shards:
        for key, error in zip(shard.ids, shard.errors, strict=True):
            items[key] = items.get(key, False) or error
    return items


def drop_duplicates(output: storage.Scan, one_row_per_item: bool) -> None:
    """An item that is in two shards (a worker outlived its run) stays in one: one without error if there is
    one."""
    best: dict[str, tuple[bool, int, int]] = {}
    for index, shard in enumerate(output.shards):
        for row, (key, error) in enumerate(zip(shard.ids, shard.errors, strict=True)):
            candidate = (error, index, row)
            if key not in best or candidate < best[key]:
                best[key] = candidate
    for index, shard in enumerate(output.shards):
        drop = [
            row
            for row, key in enumerate(shard.ids)
            if best[key][1] != index or (one_row_per_item and best[key][2] != row)
        ]
        if drop:
            storage.drop_rows(shard.path, drop)


def drop_errors(output: storage.Scan) -> None:
    """Takes the items with an error out, so that they are to do again."""
    for shard in output.shards:
        bad = {key for key, error in zip(shard.ids, shard.errors, strict=True) if error}
        if bad:
            storage.drop_rows(shard.path, [row for row, key in enumerate(shard.ids) if key in bad])


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
