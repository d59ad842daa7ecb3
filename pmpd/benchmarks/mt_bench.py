"""MT-Bench: 80 two-turn questions in eight categories (Zheng et al. 2023, "Judging LLM-as-a-Judge").

Two published schemas are read: FastChat's `question.jsonl` and the hub's `HuggingFaceH4/mt_bench_prompts`.
Their `reference` answers (math, reasoning, coding) are written for a judge, not for overlap scores, so
quality here is agreement with the unquantized model; for judged scores, export the answers to FastChat.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pmpd.benchmarks.base import Benchmark, CountTokens, Parsed, text_field
from pmpd.errors import UserError


def make(record: Mapping[str, Any], count_tokens: CountTokens) -> Parsed:
    turns, key = (
        (record["turns"], record.get("question_id"))
        if "turns" in record
        else (record.get("prompt"), record.get("prompt_id"))
    )
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(turn, str) and turn.strip() for turn in turns)
    ):
        raise UserError(f"'turns' (or 'prompt') must be a list of texts, got {turns!r}")
    if not isinstance(key, int | str) or isinstance(key, bool):
        raise UserError(f"'question_id' (or 'prompt_id') must be a number or a text, got {key!r}")
    return Parsed(str(key), text_field(record, "category"), tuple(turns), (None,) * len(turns))


BENCHMARK = Benchmark(
    name="mt_bench",
    version="1",
    make=make,
    metric="rouge_l",
    reference="reference_output",
    max_new_tokens=256,
    schema='{"question_id": 81, "category": "writing", "turns": ["…", "…"]} or the same with "prompt_id" and '
    '"prompt"',
    hub={"path": "HuggingFaceH4/mt_bench_prompts"},
    splits={"test": "train"},
)
