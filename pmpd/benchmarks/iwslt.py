"""IWSLT 2017, French to English, the longer talks' sentences only (Cettolo et al. 2017).

Short sentences end before a precision switch can happen, so only sources of more than `MIN_SOURCE_TOKENS`
tokens (of the model's own tokenizer) are kept. The kept set therefore depends on the tokenizer; ids do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pmpd.benchmarks.base import Benchmark, CountTokens, Parsed, text_field, text_key
from pmpd.errors import UserError

MIN_SOURCE_TOKENS = 64
"""A source is kept if it has more tokens than this."""


def make(record: Mapping[str, Any], count_tokens: CountTokens) -> Parsed | None:
    parsed = _parse(record)
    return parsed if count_tokens(_pair(record)[0]) > MIN_SOURCE_TOKENS else None


def _pair(record: Mapping[str, Any]) -> tuple[str, str]:
    """(French, English)."""
    pair = record.get("translation")
    if not isinstance(pair, dict):
        raise UserError(f"field 'translation' must hold 'fr' and 'en', got {pair!r}")
    return text_field(pair, "fr").strip(), text_field(pair, "en").strip()


def _parse(record: Mapping[str, Any]) -> Parsed:
    source, target = _pair(record)
    turn = f"Translate from French to English.\n\nFrench: {source}\n\nEnglish:"
    return Parsed(text_key(source, target), "translation", (turn,), (target,))


BENCHMARK = Benchmark(
    name="iwslt",
    version="1",
    make=make,
    metric="bleu",
    reference="dataset",
    max_new_tokens=256,
    schema='{"translation": {"fr": "…", "en": "…"}}',
    # The data set's own repository holds a loading script, which `datasets` no longer runs. The hub keeps its
    # Parquet beside it, a folder for each configuration; there they are folders only, not configurations.
    hub={"path": "IWSLT/iwslt2017", "data_dir": "iwslt2017-fr-en", "revision": "refs/convert/parquet"},
    splits={"test": "test", "validation": "validation"},
)


def make_by_target(record: Mapping[str, Any], count_tokens: CountTokens) -> Parsed | None:
    """As `make`, but the length of the English target decides what is kept."""
    parsed = _parse(record)
    return parsed if count_tokens(str(parsed.references[0])) > MIN_SOURCE_TOKENS else None


BY_TARGET = dataclasses.replace(BENCHMARK, version="1-by-target", make=make_by_target)
"""The published choice of sentences; its version keeps it apart from ours."""
