"""summary.json beside a dataset's manifest: what each run cost, and all of them together."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from pmpd.storage.dataset import dataset_folder
from pmpd.storage.files import join, read_bytes, write_bytes

SUMS = ("rows", "errors", "tokens", "wall_seconds", "worker_seconds")


def summary_path(dataset: str) -> str:
    return join(dataset_folder(dataset), "summary.json")


def read_summary(dataset: str) -> dict[str, Any] | None:
    """{"table", "runs": [...], "total": {...}}; None where there is none, or what is there is no summary."""
    content = read_bytes(summary_path(dataset))
    try:
        found = json.loads(content) if content else None
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("runs"), list) else None


def add_run(
    dataset: str,
    table: str,
    *,
    rows: int,
    errors: int,
    tokens: int,
    wall_seconds: float,
    worker_seconds: float,
    workers: int,
    stalls: int,
    device: str,
    forwards: Mapping[int, int],
    price_per_worker_hour: float | None,
) -> dict[str, Any]:
    """Adds a run to the dataset's summary; the whole of it. Rows and errors are the run's own."""
    run: dict[str, Any] = {
        "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rows": rows,
        "errors": errors,
        "tokens": tokens,
        "wall_seconds": round(wall_seconds, 3),
        "worker_seconds": round(worker_seconds, 3),
        "workers": workers,
        "stalls": stalls,
        "device": device,
        "forwards": {str(bits): count for bits, count in sorted(forwards.items(), reverse=True)},
        "price_per_worker_hour": price_per_worker_hour,
    }
    if price_per_worker_hour is not None:
        run["cost"] = round(price_per_worker_hour * worker_seconds / 3600, 6)
    runs = [*(read_summary(dataset) or {"runs": []})["runs"], run | rates(run)]
    total: dict[str, Any] = {key: sum(entry.get(key, 0) for entry in runs) for key in SUMS}
    if all("cost" in entry for entry in runs):
        total["cost"] = round(sum(entry["cost"] for entry in runs), 6)
    summary = {"table": table, "runs": runs, "total": total | rates(total)}
    write_bytes(summary_path(dataset), json.dumps(summary, indent=1).encode() + b"\n")
    return summary


def rates(run: Mapping[str, Any]) -> dict[str, float]:
    """Rows per worker-hour, and with a price the cost of 1,000 rows."""
    found = {}
    if run["worker_seconds"] > 0:
        found["rows_per_worker_hour"] = round(3600 * run["rows"] / run["worker_seconds"], 3)
    if "cost" in run and run["rows"]:
        found["cost_per_1000_rows"] = round(1000 * run["cost"] / run["rows"], 6)
    return found
