"""DialogSum: summarize an everyday dialogue (Chen et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pmpd.benchmarks.base import Benchmark, CountTokens, Parsed, text_field


def make(record: Mapping[str, Any], count_tokens: CountTokens) -> Parsed:
    turn = (
        f"Dialogue:\n{text_field(record, 'dialogue').strip()}\n\nSummarize the dialogue above in one or "
        f"two sentences."
    )
    return Parsed(
        text_field(record, "id"),
        str(record.get("topic") or "dialogue"),
        (turn,),
        (text_field(record, "summary"),),
    )


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
