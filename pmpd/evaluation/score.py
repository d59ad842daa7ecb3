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
from pmpd.evaluation.compare import BASE_KINDS, UNIFORM_KINDS, AnsweredRun, Comparison, TurnKey
from pmpd.metrics.base import (
    AGAINST,
    METRICS,
    REFERENCE_OUTPUT,
    Components,
    Metric,
    get_metric,
    mean_of,
    mean_statistic,
)
from pmpd.metrics.bootstrap import bootstrap_weights, interval
from pmpd.metrics.precision import average_bits, decision_share, decode_forwards


@dataclass(frozen=True)
class ScoreConfig:
    resamples: int = 2000
    """Bootstrap resamples behind the 95 % intervals."""
    seed: int = 0
    """Seed of the resamples."""
    bert_score: str | None = None
    """Folder or name of the model for BERTScore; none: BERTScore is not computed."""
    run_code: bool = False
    """Whether generated code is run, for benchmarks that test it."""
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
    metrics = [
        (metric, _components(metric, comparison, config))
        for metric in METRICS.values()
        if metric.scores(comparison.benchmark) and (metric.option is None or getattr(config, metric.option))
    ]
    return [row for turn in turns for row in _score_turns(comparison, config, metrics, turn)]


Scored = tuple[Metric, Components]
"""A metric, and how it scores a turn."""


def _score_turns(
    comparison: Comparison, config: ScoreConfig, metrics: Sequence[Scored], turn: int | None
) -> list[dict[str, Any]]:
    keys = [key for key in comparison.shared if turn in (None, key[2])]
    result = []
    for against in AGAINST:
        pairs = _reference_of(comparison, against, keys)
        if not pairs:
            continue
        questions = {prompt: index for index, prompt in enumerate(sorted({key[0] for key in pairs}))}
        weights = bootstrap_weights(len(questions), config.resamples, config.seed)
        costs = {
            run.name: _costs(comparison, run, keys, pairs, questions, weights, turn)
            for run in comparison.runs.values()
        }
        for scored in metrics:
            if against in scored[0].against:
                result += _score_metric(comparison, scored, against, pairs, questions, weights, costs, turn)
    return result


def _score_metric(
    comparison: Comparison, scored: Scored, against: str, pairs: Pairs, questions: Mapping[str, int],
    weights: np.ndarray, costs: Mapping[str, Any], turn: int | None,
) -> list[dict[str, Any]]:  # fmt: skip
    metric, components = scored
    sums = {run.name: _sums(run, pairs, components, questions) for run in comparison.runs.values()}
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
            "metric": metric.name, "against": against, "value": values[run.name], "low": low,
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
    its mixing. Where there are uniform runs with the same prefill, only those: what the prefill gains is not
    the schedule's gain."""
    bits = {name: cost["average_bits"] for name, cost in costs.items() if cost["average_bits"] is not None}
    runs = [run for run in comparison.runs.values() if run.name in bits]
    uniform = {run.name: run.settings.get("prefill_bit") for run in runs if run.kind in UNIFORM_KINDS}
    nearest = {}
    for run in runs:
        if run.kind in BASE_KINDS or not uniform:
            continue
        prefill = run.settings.get("prefill_bit")
        alike = [name for name, other in uniform.items() if other == prefill]
        widths = {bits[name] for name in uniform}
        same = alike if len({bits[name] for name in alike}) == len(widths) else list(uniform)
        nearest[run.name] = min(same, key=lambda name: abs(bits[name] - bits[run.name]))
    return nearest


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


def _sums(run: AnsweredRun, pairs: Pairs, components: Components, questions: Mapping[str, int]) -> np.ndarray:
    """Components summed per question: [Q, C]."""
    of_turn = {
        key: np.asarray(components(run.rows[key], *reference), dtype=np.float64)
        for key, reference in pairs.items()
    }
    sums = np.zeros((len(questions), len(next(iter(of_turn.values())))))
    for key, values in of_turn.items():
        sums[questions[key[0]]] += values
    return sums


def _costs(
    comparison: Comparison, run: AnsweredRun, keys: Sequence[TurnKey], pairs: Pairs,
    questions: Mapping[str, int], weights: np.ndarray, turn: int | None,
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
        **_times("decode_time_ratio", comparison, total, comparison.high_bits or 0),
        **_times("decode_time_ratio_16", comparison, total, 16),
        "decision_share": decision_share(run.rows[key] for key in pairs),
        "error_rows": sum(turn in (None, key[2]) for key in run.errors),
        "unpaired_rows": answered - len(keys),
    }


def _times(
    name: str, comparison: Comparison, forwards: Counter[int], to_bits: int
) -> dict[str, float | None]:
    """The ratio of decode times to `to_bits`, and its lowest and highest."""
    low, high = comparison.speed.ratio_range(forwards, to_bits) or (None, None)
    return {name: comparison.speed.ratio(forwards, to_bits), f"{name}_low": low, f"{name}_high": high}


def _components(metric: Metric, comparison: Comparison, config: ScoreConfig) -> Components:
    """How the metric scores a turn of this comparison; what wants batches scores all texts here, once."""
    if metric.of_texts is None:
        assert metric.of_pair is not None
        return metric.of_pair
    wanted = {
        (run.rows[key]["output_text"], text)
        for against in metric.against
        for key, (text, _) in _reference_of(comparison, against, comparison.shared).items()
        for run in comparison.runs.values()
    }
    pairs = sorted(wanted)
    setting = getattr(config, metric.option) if metric.option else None
    scores = dict(zip(pairs, metric.of_texts(pairs, setting), strict=True))
    return mean_of(lambda row, text, _: scores[(row["output_text"], text)])


# ------------------------------------------------------------------------------------------------------------


def pick_static(
    scores: Iterable[Mapping[str, Any]], metric: str, against: str, budget: float
) -> dict[str, Any]:
    """The cheapest static setting whose score is worse by at most `budget` (a share of the uniform highest
    precision's score) than that one's.

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
    sign = 1 if get_metric(metric).higher_is_better else -1
    high = static[0]["value"] - static[0]["difference"]
    limit = high - sign * budget * abs(high)
    good = [row for row in static if sign * row["value"] >= sign * limit]
    if not good:
        raise UserError(
            f"static search: no setting keeps {metric} {'at least' if sign > 0 else 'at most'} {limit:.4f}; "
            f"raise --quality-budget ({budget}) or widen the grid"
        )
    return dict(min(good, key=lambda row: (row["average_bits"], -sign * row["value"])))
