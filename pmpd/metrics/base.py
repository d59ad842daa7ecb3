"""What a metric is, and the metrics there are.

One entry of `METRICS` is enough for a new one: scores, figures and report take all they need from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pmpd.errors import UserError
from pmpd.metrics.code import pass_tests
from pmpd.metrics.rouge import rouge_l
from pmpd.metrics.tasks import final_number_right, key_found
from pmpd.metrics.text import bert_scores, bleu_of_statistics, bleu_statistics, first_divergence

DATASET = "dataset"


REFERENCE_OUTPUT = "reference_output"
"""The unquantized model's answer to the same turn."""


AGAINST = {DATASET: "data set's references", REFERENCE_OUTPUT: "unquantized model's answers"}
"""What an answer is compared with -> its name for a reader."""


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


Components = Callable[[Row, str, Sequence[int]], "Sequence[float] | np.ndarray"]
"""(row, reference text, reference tokens) -> components [C] that are summed over rows."""


def mean_of(score: Callable[[Row, str, Sequence[int]], float]) -> Components:
    """The components of a metric whose score is the mean over turns."""
    return lambda row, text, tokens: (score(row, text, tokens), 1.0)


@dataclass(frozen=True)
class Metric:
    """One of `of_pair` and `of_texts` says how a turn is scored."""

    name: str
    """As rows of SCORES have it."""
    label: str
    """As tables and figures show it."""
    of_pair: Components | None = None
    of_texts: Callable[[Sequence[tuple[str, str]], Any], Sequence[float]] | None = None
    """All (answer, reference text) in one pass -> their scores, for what wants batches. The second argument
    is the value of `option`."""
    against: tuple[str, ...] = (DATASET, REFERENCE_OUTPUT)
    statistic: Statistic = mean_statistic
    scale: str = "0 to 1"
    """The values it can have, in words."""
    higher_is_better: bool = True
    benchmarks: frozenset[str] | None = None
    """Names of the only benchmarks whose answers it can score; None: all."""
    option: str | None = None
    """Field of `ScoreConfig` that must be set for it to be computed at all."""

    def __post_init__(self) -> None:
        if (self.of_pair is None) == (self.of_texts is None):
            raise ValueError(f"metric {self.name}: give of_pair or of_texts, not both and not none")

    def scores(self, benchmark: str) -> bool:
        return self.benchmarks is None or benchmark in self.benchmarks


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("rouge_l", "ROUGE-L F1", mean_of(lambda row, text, _: rouge_l(row["output_text"], text))),
        Metric(
            "rouge_l_stemmed",
            "ROUGE-L F1, stemmed",
            mean_of(lambda row, text, _: rouge_l(row["output_text"], text, stemmed=True)),
        ),
        Metric(
            "bleu",
            "SacreBLEU",
            lambda row, text, _: bleu_statistics(row["output_text"], text),
            statistic=bleu_statistic,
            scale="0 to 100",
        ),
        Metric("bert_score", "BERTScore F1", of_texts=bert_scores, option="bert_score"),
        Metric(
            "final_number",
            "final number right",
            mean_of(lambda row, text, _: final_number_right(row["output_text"], text)),
            against=(DATASET,),
            benchmarks=frozenset({"gsm8k"}),
        ),
        Metric(
            "passkey",
            "pass key found",
            mean_of(lambda row, text, _: key_found(row["output_text"], text)),
            against=(DATASET,),
            benchmarks=frozenset({"passkey"}),
        ),
        Metric(
            "tests_passed",
            "tests passed",
            of_texts=pass_tests,
            against=(DATASET,),
            benchmarks=frozenset({"humaneval"}),
            option="run_code",
        ),
        Metric(
            "exact_match",
            "exact match",
            mean_of(lambda row, _, tokens: float(list(row["output_ids"]) == list(tokens))),
            against=(REFERENCE_OUTPUT,),
        ),
        Metric(
            "first_divergence",
            "tokens before first divergence",
            mean_of(lambda row, _, tokens: first_divergence(row["output_ids"], tokens)),
            against=(REFERENCE_OUTPUT,),
            scale="in tokens",
        ),
    )
}
"""The metrics by name, in the order of the report's columns. A program may add more."""


def get_metric(name: str) -> Metric:
    """The metric called `name`; a ValueError lists those that exist."""
    if name not in METRICS:
        raise UserError(f"metric {name}: known are {', '.join(METRICS)}")
    return METRICS[name]
