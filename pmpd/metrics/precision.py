"""Average bits of a precision trace, and a model of the decode time that it stands for."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    """Fastest and slowest measurement."""
    workers: Mapping[int, int]
    devices: tuple[str, ...]
    idle: bool
    """Whether every worker found its machine idle but for itself when it measured."""
    repeats: Mapping[int, Mapping[str, Sequence[float]]]
    """All measurements, by precision and worker, in the order in which the precisions took turns."""

    def ratio(self, forwards: Mapping[int, float], to_bits: int) -> float | None:
        """Decode time of `forwards` over that of as many forwards at `to_bits`; None where a precision was
        not measured."""
        total = sum(forwards.values())
        if not total or to_bits not in self.seconds or any(bits not in self.seconds for bits in forwards):
            return None
        return sum(count * self.seconds[bits] for bits, count in forwards.items()) / (
            total * self.seconds[to_bits]
        )

    def ratio_range(self, forwards: Mapping[int, float], to_bits: int) -> tuple[float, float] | None:
        """The lowest and highest of `ratio` over single measurements; None as there.

        Precisions that the same workers measured in turn are compared turn by turn, others at their extremes.
        """
        if self.ratio(forwards, to_bits) is None:
            return None
        used = sorted({*forwards, to_bits})
        together = len({tuple(self.repeats[bits]) for bits in used}) == 1
        if together:
            turns = [
                dict(zip(used, turn, strict=True))
                for worker in self.repeats[to_bits]
                for turn in zip(*(self.repeats[bits][worker] for bits in used), strict=False)
            ]
        else:
            turns = [
                {**self.low, to_bits: self.high[to_bits]},
                {**self.high, to_bits: self.low[to_bits]},
            ]
        total = sum(forwards.values())
        ratios = [
            sum(n * turn[bits] for bits, n in forwards.items()) / (total * turn[to_bits]) for turn in turns
        ]
        return min(ratios), max(ratios)


def speed_model(rows: Iterable[Row]) -> SpeedModel:
    """From the column `forward_seconds` of rows of GENERATIONS."""
    by_worker: dict[tuple[str, int], Mapping[str, Any]] = {}
    devices = set()
    for row in rows:
        for measured in row.get("forward_seconds") or ():
            by_worker[(row.get("worker") or "", measured["bits"])] = measured
            devices.add(row.get("device") or "")
    values: dict[int, list[float]] = defaultdict(list)
    repeats: dict[int, dict[str, Sequence[float]]] = defaultdict(dict)
    for (worker, bits), measured in sorted(by_worker.items(), key=lambda item: item[0]):
        values[bits].append(measured["seconds"])
        repeats[bits][worker] = measured.get("repeats") or [measured["seconds"]]
    ordered = sorted(values, reverse=True)
    return SpeedModel(
        seconds={bits: statistics.median(values[bits]) for bits in ordered},
        low={bits: min(map(min, repeats[bits].values())) for bits in ordered},
        high={bits: max(map(max, repeats[bits].values())) for bits in ordered},
        workers={bits: len(values[bits]) for bits in ordered},
        devices=tuple(sorted(devices - {""})),
        idle=bool(by_worker) and all(measured.get("idle") for measured in by_worker.values()),
        repeats=repeats,
    )


def mean_bits(rows: Iterable[Row]) -> float:
    return average_bits(sum((decode_forwards(row["precision_trace"]) for row in rows), Counter())) or 0.0


def decision_share(rows: Iterable[Row]) -> float | None:
    """Share of the measured decode seconds that the scheduler's decisions took; None where no row says."""
    known = [row for row in rows if row.get("decision_seconds") is not None and row.get("decode_seconds")]
    total = sum(row["decode_seconds"] for row in known)
    return sum(row["decision_seconds"] for row in known) / total if total else None
