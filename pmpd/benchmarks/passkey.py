"""Passkey: find a number that stands somewhere in a long, dull text (Mohtashami and Jaggi 2023).

The texts are made here. Prompts are about `LENGTHS` tokens of the model's own tokenizer, the key at one of
`DEPTHS`. Short ones come first, so that `--question-end` leaves out what a model has no positions for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from pmpd.benchmarks.base import Benchmark, CountTokens, Parsed, Split, key_field, text_field
from pmpd.errors import UserError

LENGTHS = (256, 1024, 4096, 16384)
"""Tokens of a prompt, about."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Share of the text that stands before the key."""
REPEATS = 4
"""Questions of one length and depth, each with a key of its own."""
DULL = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
TASK = "A pass key is hidden in the following text. Remember it: you will be asked for it.\n\n"
QUESTION = "\n\nWhat is the pass key? Answer with its digits."


def records(split: Split) -> Iterator[Mapping[str, Any]]:
    for length in LENGTHS:
        for depth in DEPTHS:
            for index in range(REPEATS):
                name = f"{length}-{depth:g}-{index}"
                draw = int(hashlib.sha256(f"{split}/{name}".encode()).hexdigest(), 16)
                yield {"id": name, "tokens": length, "depth": depth, "key": str(10_000 + draw % 90_000)}


def make(record: Mapping[str, Any], count_tokens: CountTokens) -> Parsed:
    length, depth, key = record.get("tokens"), record.get("depth"), text_field(record, "key")
    if not isinstance(length, int) or not isinstance(depth, int | float) or not 0 <= depth <= 1:
        raise UserError(f"'tokens' must be a number and 'depth' one from 0 to 1, got {length!r}, {depth!r}")
    needle = f"The pass key is {key}. Remember it: {key} is the pass key. "
    each = max(count_tokens(DULL * 8) / 8, 1e-9)
    dull = max(2, round((length - count_tokens(TASK + needle + QUESTION)) / each))
    before = round(depth * dull)
    text = f"{TASK}{DULL * before}{needle}{DULL * (dull - before)}".rstrip() + QUESTION
    return Parsed(key_field(record, "id"), f"{length} tokens", (text,), (key,))


BENCHMARK = Benchmark(
    name="passkey",
    version="1",
    make=make,
    metric="passkey",
    reference="dataset",
    max_new_tokens=16,
    schema='{"id": "…", "tokens": 1024, "depth": 0.5, "key": "12345"}',
    records=records,
)
