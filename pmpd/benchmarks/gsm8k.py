"""GSM8K: grade school mathematics in words; the final number counts (Cobbe et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pmpd.benchmarks.base import Benchmark, CountTokens, Parsed, text_field, text_key
from pmpd.errors import UserError


def make(record: Mapping[str, Any], count_tokens: CountTokens) -> Parsed:
    question, answer = text_field(record, "question").strip(), text_field(record, "answer").strip()
    steps, mark, number = answer.rpartition("####")
    if not mark or not number.strip():
        raise UserError(f"field 'answer' must end with '#### ' and a number, got {answer[-60:]!r}")
    turn = f"{question}\n\nSolve this step by step. End with a line of this form: The answer is NUMBER."
    return Parsed(text_key(question), "mathematics", (turn,), (f"{steps.strip()}\n#### {number.strip()}",))


BENCHMARK = Benchmark(
    name="gsm8k",
    version="1",
    make=make,
    metric="final_number",
    reference="dataset",
    max_new_tokens=400,
    schema='{"question": "…", "answer": "… #### 72"}',
    hub={"path": "openai/gsm8k", "name": "main"},
    splits={"test": "test", "validation": "train"},
)
