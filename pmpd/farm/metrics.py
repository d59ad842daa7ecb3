"""A run's numbers as metrics of the Ray cluster: `ray_pmpd_<name>` on every node's metrics port."""

from __future__ import annotations

from collections import Counter

from ray.util.metrics import Gauge

HELP = {
    "rows_done": "Rows that are durable",
    "rows_total": "Rows of the whole output",
    "rows_under_way": "Rows' worth of work done in units that are not finished",
    "rows_per_second": "Rows per second since the first worker was ready",
    "tokens": "Forwards of rows in this run, one per token",
    "tokens_per_second": "Tokens per second since the first worker was ready",
    "eta_seconds": "Seconds left at this rate",
    "seconds_per_row": "Worker seconds per row",
    "workers_up": "Workers that have loaded their model",
    "workers_wanted": "Workers that the cluster could hold",
    "queued_rows": "Rows that no worker has yet",
    "row_errors": "Rows with an error",
    "stalls": "Workers replaced because they made no progress",
}


class RayMetrics:
    """Publishes what `Progress` counts, tagged with the stage."""

    def __init__(self, stage: str) -> None:
        self._tags = {"stage": stage}
        self._gauges = {name: Gauge(f"pmpd_{name}", text, tag_keys=("stage",)) for name, text in HELP.items()}
        self._by_bits = Gauge(
            "pmpd_precision_tokens", "Tokens by the precision of their forward", tag_keys=("stage", "bits")
        )

    def __call__(self, numbers: dict[str, float], by_bits: Counter[int]) -> None:
        for name, value in numbers.items():
            self._gauges[name].set(value, tags=self._tags)
        for bits, count in by_bits.items():
            self._by_bits.set(count, tags={**self._tags, "bits": str(bits)})
