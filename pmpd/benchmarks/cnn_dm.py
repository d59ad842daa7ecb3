"""CNN/DailyMail 3.0.0: summarize a news article in a few sentences (Hermann et al. 2015, See et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pmpd.benchmarks.base import Benchmark, CountTokens, Parsed, key_field, text_field


def make(record: Mapping[str, Any], count_tokens: CountTokens) -> Parsed:
    # The task stands after the article: what does not fit the model is cut from the left, and the task must
    # not be what is cut.
    turn = (
        f"Article:\n{text_field(record, 'article').strip()}\n\nSummarize the article above in three "
        f"sentences."
    )
    return Parsed(key_field(record, "id"), "summary", (turn,), (text_field(record, "highlights"),))


BENCHMARK = Benchmark(
    name="cnn_dm",
    version="1",
    make=make,
    metric="rouge_l_stemmed",
    reference="dataset",
    max_new_tokens=256,
    schema='{"article": "…", "highlights": "…", "id": "…"}',
    hub={"path": "abisee/cnn_dailymail", "name": "3.0.0"},
    splits={"test": "test", "validation": "validation"},
)
