"""Judgments -> mean ratings and win rates with paired confidence intervals, by category."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pmpd.errors import UserError
from pmpd.metrics.base import mean_statistic
from pmpd.metrics.bootstrap import bootstrap_weights, interval

ALL = "all"
"""The category of all questions together."""


@dataclass(frozen=True)
class JudgeScore:
    """One cell of a table: how a run does in a category."""

    run: str
    other_run: str | None
    """Pair: what it was compared with. Single: None."""
    category: str
    value: float
    """Single: mean rating, 1 to 10. Pair: share of comparisons won, a tie as half a win."""
    low: float
    high: float
    judged: int
    """Turns (single) or comparisons in both positions (pair) behind the value."""
    questions: int
    """Whose: of one alone no interval says anything."""
    difference: float | None = None
    """Single: to the base run, paired by question; with its 95 % interval."""
    difference_low: float | None = None
    difference_high: float | None = None
    nearest_difference: float | None = None
    """Single: to the uniform run of nearest average bits, likewise."""
    nearest_difference_low: float | None = None
    nearest_difference_high: float | None = None


@dataclass(frozen=True)
class JudgeTable:
    """What one judge said in one mode about one benchmark's answers."""

    judge: str
    mode: str
    base: str | None
    """Single: the run that differences are taken to."""
    scores: Sequence[JudgeScore]
    errors: Mapping[str, int]
    """Run -> judgments without a verdict; the turn is then left out of every run's number."""
    questions: int


def judge_table(
    rows: Iterable[Mapping[str, Any]],
    resamples: int,
    seed: int,
    base: str | None = None,
    nearest: Mapping[str, str] | None = None,
) -> JudgeTable:
    """Rows of JUDGMENTS, of one judge and mode, to scores. `base` is left out where it was not judged.
    `nearest`: run -> the uniform run of nearest average bits.

    Single: only turns that have a rating in every run count, so that runs are compared on the same ones.
    Pair: a comparison is won by the run that wins in both positions; everything else is a tie, as FastChat
    counts it. ValueError where no turn is left.
    """
    rows = list(rows)
    judges, modes = ({str(row[column]) for row in rows} for column in ("judge", "mode"))
    if len(judges) != 1 or len(modes) != 1:
        raise UserError(f"judgments of {len(judges)} judges and {len(modes)} modes in one data set")
    (judge,), (mode,) = judges, modes
    errors: dict[str, int] = defaultdict(int)
    for row in rows:
        errors[row["run"]] += row["error"] is not None
    good = [row for row in rows if row["error"] is None]
    if mode == "single":
        scores, questions = _single(good, rows, resamples, seed, base, nearest or {})
    else:
        scores, questions = _pair(good, resamples, seed)
    if not scores:
        raise UserError(f"judge {judge}: no turn was judged for all runs; run pmpd judge --retry-errors")
    shown = base if any(score.run == base for score in scores) and mode == "single" else None
    return JudgeTable(judge, mode, shown, scores, {run: n for run, n in errors.items() if n}, questions)


Key = tuple[str, int, int]
"""(prompt_id, choice, turn)."""


def _single(
    good: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], resamples: int, seed: int,
    base: str | None, nearest: Mapping[str, str],
) -> tuple[list[JudgeScore], int]:  # fmt: skip
    ratings: dict[str, dict[Key, float]] = {row["run"]: {} for row in rows}
    category: dict[Key, str] = {}
    for row in good:
        key = (row["prompt_id"], row["choice"], row["turn"])
        ratings[row["run"]][key] = row["score"]
        category[key] = row["category"]
    shared = sorted(set.intersection(*(set(found) for found in ratings.values())))
    samples = {run: _Samples(found, shared, resamples, seed) for run, found in ratings.items()}
    result = []
    for name in (ALL, *sorted({category[key] for key in shared})) if shared else ():
        keys = [key for key in shared if name in (ALL, category[key])]
        for run, sampled in samples.items():
            value, drawn = sampled.of(keys)
            differences: list[float | None] = []
            for other in (base, nearest.get(run)):
                if other is None or other not in samples or run == other:
                    differences += [None, None, None]
                    continue
                other_value, other_drawn = samples[other].of(keys)
                differences += [value - other_value, *interval(drawn - other_drawn)]
            result.append(JudgeScore(run, None, name, value, *interval(drawn), *_counts(keys), *differences))
    return result, len({key[0] for key in shared})


def _pair(good: Sequence[Mapping[str, Any]], resamples: int, seed: int) -> tuple[list[JudgeScore], int]:
    verdicts: dict[tuple[str, str], dict[Key, list[str]]] = defaultdict(lambda: defaultdict(list))
    category: dict[Key, str] = {}
    for row in good:
        key = (row["prompt_id"], row["choice"], row["turn"])
        verdicts[row["run"], row["other_run"]][key].append(row["winner"])
        category[key] = row["category"]
    result, questions = [], set()
    worth = {("run", "run"): 1.0, ("other", "other"): 0.0}
    for (run, other), found in verdicts.items():
        points = {key: worth.get((a[0], a[1]), 0.5) for key, a in found.items() if len(a) == 2}
        shared = sorted(points)
        questions |= {key[0] for key in shared}
        sampled = _Samples(points, shared, resamples, seed)
        for name in (ALL, *sorted({category[key] for key in shared})) if shared else ():
            keys = [key for key in shared if name in (ALL, category[key])]
            value, drawn = sampled.of(keys)
            result.append(JudgeScore(run, other, name, value, *interval(drawn), *_counts(keys)))
    return result, len(questions)


def _counts(keys: Sequence[Key]) -> tuple[int, int]:
    return len(keys), len({key[0] for key in keys})


class _Samples:
    """Means of some turns under bootstrap resamples of the questions, the same for all runs."""

    def __init__(self, values: Mapping[Key, float], keys: Sequence[Key], resamples: int, seed: int) -> None:
        self.values = values
        self.questions = {prompt: index for index, prompt in enumerate(sorted({key[0] for key in keys}))}
        self.weights = bootstrap_weights(max(len(self.questions), 1), resamples, seed)

    def of(self, keys: Sequence[Key]) -> tuple[float, np.ndarray]:
        """(mean, means of the resamples [R]); NaN where a resample has none of the turns."""
        sums = np.zeros((len(self.questions), 2))
        for key in keys:
            sums[self.questions[key[0]]] += (self.values[key], 1)
        total = sums.sum(axis=0)
        return float(total[0] / total[1]), mean_statistic(self.weights @ sums)
