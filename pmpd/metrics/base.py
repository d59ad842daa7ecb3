"""What a metric is, and the metrics there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pmpd.metrics.rouge import rouge_l
from pmpd.metrics.text import bleu_of_statistics, bleu_statistics, first_divergence

DATASET = "dataset"


REFERENCE_OUTPUT = "reference_output"
"""The unquantized model's answer to the same turn."""


Row = Mapping[str, Any]
"""A row of `storage.GENERATIONS`; its turn is known (`results.read_generations` sees to that)."""


# ------------------------------------------------------------------------------------------------------------


class Statistic(Protocol):
    """From sums over questions [..., C] to the score [...]."""

    def __call__(self, sums: np.ndarray) -> np.ndarray: ...


def mean_statistic(sums: np.ndarray) -> np.ndarray:
    """A ratio of sums: [..., 2] (numerator, denominator)."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], np.nan), where=sums[..., 1] > 0)


def bleu_statistic(sums: np.ndarray) -> np.ndarray:
    flat = sums.reshape(-1, sums.shape[-1])
    return np.asarray([bleu_of_statistics(total) for total in flat]).reshape(sums.shape[:-1])


@dataclass(frozen=True)
class Metric:
    name: str
    against: str
    statistic: Statistic
    of_pair: Callable[[Row, str, Sequence[int]], Sequence[float] | np.ndarray]
    """(row, reference text, reference tokens) -> components [C] that are summed over rows."""


def mean_of(
    score: Callable[[Row, str, Sequence[int]], float],
) -> Callable[[Row, str, Sequence[int]], Sequence[float]]:
    return lambda row, text, tokens: (score(row, text, tokens), 1.0)


METRICS: tuple[Metric, ...] = (
    *(
        metric
        for against in (DATASET, REFERENCE_OUTPUT)
        for metric in (
            Metric(
                "rouge_l",
                against,
                mean_statistic,
                mean_of(lambda row, text, _: rouge_l(row["output_text"], text)),
            ),
            Metric(
                "rouge_l_stemmed",
                against,
                mean_statistic,
                mean_of(lambda row, text, _: rouge_l(row["output_text"], text, stemmed=True)),
            ),
            Metric(
                "bleu",
                against,
                bleu_statistic,
                lambda row, text, _: bleu_statistics(row["output_text"], text),
            ),
        )
    ),
    Metric(
        "exact_match",
        REFERENCE_OUTPUT,
        mean_statistic,
        mean_of(lambda row, _, tokens: float(list(row["output_ids"]) == list(tokens))),
    ),
    Metric(
        "first_divergence",
        REFERENCE_OUTPUT,
        mean_statistic,
        mean_of(lambda row, _, tokens: first_divergence(row["output_ids"], tokens)),
    ),
)
