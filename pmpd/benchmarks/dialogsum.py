"""DialogSum: summarize an everyday dialogue (Chen et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pmpd.benchmarks.base import Benchmark, CountTokens, Parsed, key_field, text_field


def make(record: Mapping[str, Any], count_tokens: CountTokens) -> Parsed:
    turn = (
        f"Dialogue:\n{text_field(record, 'dialogue').strip()}\n\nSummarize the dialogue above in one or "
        f"two sentences."
    )
    # The authors' own files call the id `fname`, and their test split has three summaries of each dialogue.
    key = key_field(record, "id" if "id" in record or "fname" not in record else "fname")
    number = "1" if "summary" not in record and "summary1" in record else ""
    topic = str(record.get(f"topic{number}") or "dialogue")
    return Parsed(key, topic, (turn,), (text_field(record, f"summary{number}"),))


BENCHMARK = Benchmark(
    name="dialogsum",
    version="1",
    make=make,
    metric="rouge_l_stemmed",
    reference="dataset",
    max_new_tokens=256,
    schema='{"id": "…", "dialogue": "…", "summary": "…", "topic": "…"}',
    hub={"path": "knkarthick/dialogsum"},
    splits={"test": "test", "validation": "validation"},
)
