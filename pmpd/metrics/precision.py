"""Average bits of a precision trace, and a model of the decode time that it stands for."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pmpd.metrics.base import Row

# ------------------------------------------------------------------------------------------------------------


def decode_forwards(trace: Iterable[Mapping[str, int]]) -> Counter[int]:
    """Decode forwards by precision, from a precision trace: the first token is the prefill's and does not
    count."""
    forwards: Counter[int] = Counter()
    first = True
    for run in trace:
        forwards[run["bits"]] += run["count"] - first
        first = False
    return +forwards


def average_bits(forwards: Mapping[int, int]) -> float | None:
    """Mean precision of decode forwards, None where there is none (an answer of one token)."""
    total = sum(forwards.values())
    return sum(bits * count for bits, count in forwards.items()) / total if total else None


@dataclass(frozen=True)
class SpeedModel:
    """Seconds of one decode forward of a row alone, by precision, as the run's own workers measured them."""

    seconds: Mapping[int, float]
    """Median over workers."""
    low: Mapping[int, float]
    high: Mapping[int, float]
    """Fastest and slowest worker."""
    workers: Mapping[int, int]
    devices: tuple[str, ...]

    def ratio(self, forwards: Mapping[int, float], to_bits: int) -> float | None:
        """Decode time of `forwards` over that of as many forwards at `to_bits`; None where a precision was
        not measured."""
        total = sum(forwards.values())
        if not total or to_bits not in self.seconds or any(bits not in self.seconds for bits in forwards):
            return None
        return sum(count * self.seconds[bits] for bits, count in forwards.items()) / (
            total * self.seconds[to_bits]
        )


def speed_model(rows: Iterable[Row]) -> SpeedModel:
    by_worker: dict[tuple[str, int], float] = {}
    devices = set()
    for row in rows:
        for measured in row.get("forward_seconds") or ():
            by_worker[(row.get("worker") or "", measured["bits"])] = measured["seconds"]
            devices.add(row.get("device") or "")
    values: dict[int, list[float]] = defaultdict(list)
    for (_, bits), seconds in by_worker.items():
        values[bits].append(seconds)
    ordered = sorted(values, reverse=True)
    return SpeedModel(
        seconds={bits: statistics.median(values[bits]) for bits in ordered},
        low={bits: min(values[bits]) for bits in ordered},
        high={bits: max(values[bits]) for bits in ordered},
        workers={bits: len(values[bits]) for bits in ordered},
        devices=tuple(sorted(devices - {""})),
    )


def mean_bits(rows: Iterable[Row]) -> float:
    return average_bits(sum((decode_forwards(row["precision_trace"]) for row in rows), Counter())) or 0.0
