"""Generations and references -> scores with paired confidence intervals. No model, no I/O.

Legend: Q questions, R bootstrap resamples, C components of a statistic.

Rows of different runs are joined by (prompt_id, choice, turn), never by position. All runs of a benchmark are
scored on the same turns: those that every run answered, and bits and time are counted over the very turns
that the score is of. A turn that failed in a run is left out everywhere and counted, in the open; a run
without any answer is left out as a whole, and named.

Confidence intervals: the bootstrap resamples *questions* (turns and choices of one question depend on each
other), with the same resamples for all runs, so differences between runs are paired."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pmpd.errors import UserError
from pmpd.evaluation.compare import Comparison, Run, TurnKey
from pmpd.metrics.base import DATASET, METRICS, REFERENCE_OUTPUT, Metric, mean_of, mean_statistic
from pmpd.metrics.bootstrap import bootstrap_weights, interval
from pmpd.metrics.precision import average_bits, decode_forwards
from pmpd.metrics.text import bert_scores


@dataclass(frozen=True)
class ScoreConfig:
    resamples: int = 2000
    """Bootstrap resamples behind the 95 % intervals."""
    seed: int = 0
    """Seed of the resamples."""
    bert_score: str | None = None
    """Folder or name of the model for BERTScore; none: BERTScore is not computed."""
    by_turn: bool = True
    """Also score each turn by itself, where a benchmark has several."""

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise UserError(f"--resamples {self.resamples}: 100 at least, or the intervals mean nothing")


def score(comparison: Comparison, config: ScoreConfig) -> list[dict[str, Any]]:
    """Rows of `storage.SCORES`: every run x metric, for all turns together (`turn` null) and each turn."""
    turns: list[int | None] = [None]
    if config.by_turn and len(comparison.turns()) > 1:
        turns += comparison.turns()
    metrics = [*METRICS, *(_bert_metrics(comparison, config.bert_score) if config.bert_score else ())]
    return [row for turn in turns for row in _score_turns(comparison, config, metrics, turn)]


def _score_turns(
    comparison: Comparison, config: ScoreConfig, metrics: Sequence[Metric], turn: int | None
) -> list[dict[str, Any]]:
    keys = [key for key in comparison.shared if turn in (None, key[2])]
    result = []
    for against in (DATASET, REFERENCE_OUTPUT):
        pairs = _reference_of(comparison, against, keys)
        if not pairs:
            continue
        questions = {prompt: index for index, prompt in enumerate(sorted({key[0] for key in pairs}))}
        weights = bootstrap_weights(len(questions), config.resamples, config.seed)
        costs = {
            run.name: _costs(comparison, run, keys, pairs, questions, weights, turn)
            for run in comparison.runs.values()
        }
        for metric in metrics:
            if metric.against == against:
                result += _score_metric(comparison, metric, pairs, questions, weights, costs, turn)
    return result


def _score_metric(
    comparison: Comparison, metric: Metric, pairs: Pairs, questions: Mapping[str, int], weights: np.ndarray,
    costs: Mapping[str, Any],
    turn: int | None,
) -> list[dict[str, Any]]:  # fmt: skip
    sums = {run.name: _sums(run, pairs, metric, questions) for run in comparison.runs.values()}
    values = {name: float(metric.statistic(total.sum(axis=0))) for name, total in sums.items()}
    samples = {name: metric.statistic(weights @ total) for name, total in sums.items()}
    base = comparison.uniform_high.name if comparison.uniform_high else None
    nearest = _nearest_uniform(comparison, costs)
    result = []
    for run in comparison.runs.values():
        low, high = interval(samples[run.name])
        row = {
            "benchmark": comparison.benchmark, "benchmark_version": comparison.benchmark_version,
            "split": comparison.split,
            "model_id": comparison.model_id, "run": run.name, "kind": run.kind, "scheduler": run.scheduler,
            "turn": turn,
            "metric": metric.name, "against": metric.against, "value": values[run.name], "low": low,
            "high": high,
            "rows": len(pairs), "nearest_uniform": nearest.get(run.name), **costs[run.name],
        }  # fmt: skip
        for prefix, other in (("", base), ("nearest_", nearest.get(run.name))):
            if other is not None:
                least, most = interval(samples[run.name] - samples[other])
                row |= {
                    f"{prefix}difference": values[run.name] - values[other],
                    f"{prefix}difference_low": least,
                    f"{prefix}difference_high": most,
                }
        result.append(row)
    return result


def _nearest_uniform(comparison: Comparison, costs: Mapping[str, Any]) -> dict[str, str]:
    """Run that mixes precisions -> the uniform run of the nearest average bits: what it must beat to be worth
    its mixing."""
    bits = {name: cost["average_bits"] for name, cost in costs.items() if cost["average_bits"] is not None}
    uniform = [run.name for run in comparison.runs.values() if run.kind == "uniform" and run.name in bits]
    mixing = [
        run.name for run in comparison.runs.values() if run.kind not in ("fp", "uniform") and run.name in bits
    ]
    return (
        {name: min(uniform, key=lambda other: abs(bits[other] - bits[name])) for name in mixing}
        if uniform
        else {}
    )


Pairs = Mapping[TurnKey, tuple[str, Sequence[int]]]
"""(text, tokens) of the reference of each turn that has one."""


def _reference_of(comparison: Comparison, against: str, keys: Sequence[TurnKey]) -> Pairs:
    if against == REFERENCE_OUTPUT:
        run = comparison.unquantized
        return (
            {key: (run.rows[key]["output_text"], run.rows[key]["output_ids"]) for key in keys} if run else {}
        )
    anyone = next(iter(comparison.runs.values()))
    return {
        key: (anyone.rows[key]["reference_text"], ())
        for key in keys
        if anyone.rows[key]["reference_text"] is not None
    }


def _sums(run: Run, pairs: Pairs, metric: Metric, questions: Mapping[str, int]) -> np.ndarray:
    """Components summed per question: [Q, C]."""
    components = {
        key: np.asarray(metric.of_pair(run.rows[key], *reference), dtype=np.float64)
        for key, reference in pairs.items()
    }
    sums = np.zeros((len(questions), len(next(iter(components.values())))))
    for key, values in components.items():
        sums[questions[key[0]]] += values
    return sums


def _costs(
    comparison: Comparison, run: Run, keys: Sequence[TurnKey], pairs: Pairs, questions: Mapping[str, int],
    weights: np.ndarray,
    turn: int | None,
) -> dict[str, Any]:  # fmt: skip
    """What the run cost on the turns that are scored, `pairs`: average bits with their interval, ratios of
    decode time; and how many of its turns are not among those that all runs answered, `keys`."""
    total: Counter[int] = Counter()
    sums = np.zeros((len(questions), 2))
    for key in pairs:
        forwards = decode_forwards(run.rows[key]["precision_trace"])
        total += forwards
        sums[questions[key[0]]] += (
            sum(bits * count for bits, count in forwards.items()),
            sum(forwards.values()),
        )
    low, high = interval(mean_statistic(weights @ sums)) if total else (None, None)
    answered = sum(turn in (None, key[2]) for key in run.rows)
    return {
        "average_bits": average_bits(total),
        "average_bits_low": low,
        "average_bits_high": high,
        "decode_time_ratio": comparison.speed.ratio(total, comparison.high_bits)
        if comparison.high_bits
        else None,
        "decode_time_ratio_16": comparison.speed.ratio(total, 16),
        "error_rows": sum(turn in (None, key[2]) for key in run.errors),
        "unpaired_rows": answered - len(keys),
    }


def _bert_metrics(comparison: Comparison, model: str) -> list[Metric]:
    """BERTScore as metrics: all pairs are scored in one pass first, since the model wants batches."""
    wanted: dict[tuple[str, str], float] = {}
    for against in (DATASET, REFERENCE_OUTPUT):
        for key, (text, _) in _reference_of(comparison, against, comparison.shared).items():
            for run in comparison.runs.values():
                wanted[(run.rows[key]["output_text"], text)] = 0.0
    pairs = sorted(wanted)
    scores = dict(
        zip(pairs, bert_scores([pair[0] for pair in pairs], [pair[1] for pair in pairs], model), strict=True)
    )
    of_pair = mean_of(lambda row, text, _: scores[(row["output_text"], text)])
    return [Metric("bert_score", against, mean_statistic, of_pair) for against in (DATASET, REFERENCE_OUTPUT)]


# ------------------------------------------------------------------------------------------------------------


def pick_static(
    scores: Iterable[Mapping[str, Any]], metric: str, against: str, budget: float
) -> dict[str, Any]:
    """The cheapest static setting whose score loses at most `budget` (a share of the uniform highest
    precision's score) to it.

    Cheapest: fewest average bits, then the better score. The setting of never switching always qualifies.
    ValueError where the scores hold no static run or no uniform one to compare with.
    """
    chosen = [
        row for row in scores if row["metric"] == metric and row["against"] == against and row["turn"] is None
    ]
    static = [row for row in chosen if row["kind"] == "static"]
    if not static or any(row.get("difference") is None for row in static):
        raise UserError(
            f"static search: no static and uniform runs with {metric} against {against} were scored"
        )
    least = (static[0]["value"] - static[0]["difference"]) * (1 - budget)
    good = [row for row in static if row["value"] >= least]
    if not good:
        raise UserError(
            f"static search: no setting keeps {metric} >= {least:.4f}; raise --quality-budget ({budget}) or "
            f"widen the grid"
        )
    return dict(min(good, key=lambda row: (row["average_bits"], -row["value"])))
