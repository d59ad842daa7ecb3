"""Compares the results of two versions of this program, row by row: `python -m bench.same_rows BEFORE AFTER`.

BEFORE and AFTER are folders of results that the same commands made with the two versions. Every Parquet
dataset and every checkpoint below them is compared: rows by their id, in all columns that both versions have
but those that measure time or name a worker; tensors bit by bit. Exit code 1 if anything differs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import load_file

MEASURED = ("seconds", "worker", "time_ratio", "fingerprint")
"""Columns with one of these words in their name differ from run to run, or name the code."""


def rows_of(folder: Path) -> dict[str, dict[str, object]]:
    """Row id -> row, without what is measured. The id is the first column, and for tables whose first column
    is no id (scores) all without fractions."""
    tables = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    if not rows:
        return {}
    names = list(rows[0])
    is_id = len({row[names[0]] for row in rows}) == len(rows)
    keys = (
        names[:1]
        if is_id
        else [n for n in names if all(isinstance(row[n], str | int | None) for row in rows)]
    )
    kept = [name for name in names if not any(word in name for word in MEASURED)]
    found = {" ".join(str(row[key]) for key in keys): {name: row[name] for name in kept} for row in rows}
    assert len(found) == len(rows), f"{folder}: rows that no column tells apart"
    return found


def equal(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        shared = set(a) & set(b)
        return all(equal(a[key], b[key]) for key in shared)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (isinstance(a, float) and isinstance(b, float) and bool(np.isclose(a, b, rtol=1e-12)))


def compare_datasets(before: Path, after: Path) -> tuple[int, list[str]]:
    """Rows compared, and what differs."""
    old, new = rows_of(before), rows_of(after)
    problems = [f"{key}: only in one of the two" for key in sorted(set(old) ^ set(new))]
    for key in sorted(set(old) & set(new)):
        columns = [
            name for name in old[key] if name in new[key] and not equal(old[key][name], new[key][name])
        ]
        problems += [f"{key}: {', '.join(columns)}"] if columns else []
    return len(old), problems


def compare_tensors(before: Path, after: Path) -> tuple[int, list[str]]:
    """Tensors compared, and what differs."""
    old, new = load_file(before), load_file(after)
    names = sorted(set(old) | set(new))
    same = [name in old and name in new and old[name].tobytes() == new[name].tobytes() for name in names]
    return len(names), [name for name, is_same in zip(names, same, strict=True) if not is_same]


def main(before: str, after: str) -> int:
    failed = False
    paths = {path.parent for path in Path(before).rglob("*.parquet")} | set(
        Path(before).rglob("*.safetensors")
    )
    for path in sorted(paths):
        other = Path(after) / path.relative_to(before)
        if not other.exists():
            print(f"{other}: missing")
            failed = True
            continue
        compare = compare_datasets if path.is_dir() else compare_tensors
        count, problems = compare(path, other)
        what = "rows" if path.is_dir() else "tensors"
        print(
            f"{path.relative_to(before)}: {count} {what}, {len(problems)} differ"
            + "".join(f"\n  {p}" for p in problems[:5])
        )
        failed |= bool(problems)
    if not paths:
        print(f"{before}: no results in it")
    return int(failed or not paths)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
