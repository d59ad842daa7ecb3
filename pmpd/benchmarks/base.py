"""What a benchmark is: numbered questions with stable ids, read from a published data set or a local file in
its schema.

A benchmark is one file with one `Benchmark`. Its `version` is part of every prompt id, so answers to
differently worded prompts can never be compared by accident: whoever changes a prompt raises the version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pmpd.errors import UserError
from pmpd.storage.records import Record, hub_records, source_of, text_problem
from pmpd.storage.row_ids import utf8_id

Split = Literal["test", "validation"]
Reference = Literal["dataset", "reference_output"]

CountTokens = Callable[[str], int]
"""Length of a text in the model's tokens, without special tokens."""

MAX_CHARACTERS = 2**20
"""Of one text of a question: more than any model reads, and what a table of thousands of rows holds."""
_PATIENCE = 100
"""Records that may be unusable before the first question."""


@dataclass(frozen=True)
class Question:
    """One conversation to hold: what the user says in each turn, and what a good answer is where the data set
    knows it."""

    prompt_id: str
    """16 hex digits; depends on benchmark, version, split and `key` only."""
    key: str
    """The record's own id in its data set (FastChat's `question_id`, CNN/DailyMail's `id`), or a hash of its
    text where it has none."""
    category: str
    turns: tuple[str, ...]
    references: tuple[str | None, ...]
    """One per turn, None where the data set has no reference."""
    template: str | None = None
    """Forces a conversation template for this question (a continuation is not a conversation)."""


class MakeQuestion(Protocol):
    """Turns one record of the published schema into (key, category, turns, references), or None to leave it
    out."""

    def __call__(self, record: Mapping[str, Any], count_tokens: CountTokens) -> Parsed | None: ...


@dataclass(frozen=True)
class Parsed:
    key: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str | None, ...]
    template: str | None = None


@dataclass(frozen=True)
class Benchmark:
    name: str
    version: str
    make: MakeQuestion
    metric: str
    """The score on the vertical axis of its quality figure: a name in `metrics.base.METRICS`."""
    reference: Reference
    """What that score compares with: the data set's references or the unquantized model's answers."""
    max_new_tokens: int
    """Default answer length in tokens."""
    schema: str
    """The record schema of a local file, in words, for error messages."""
    hub: Mapping[str, str] | None = None
    """What `datasets.load_dataset` takes: path (the data set's id on the Hugging Face hub), name, data_dir,
    revision; None: embedded."""
    splits: Mapping[str, str] | None = None
    """Our split -> the hub's split name; a split that is absent does not exist."""
    records: Callable[[Split], Iterable[Mapping[str, Any]]] | None = None
    """The embedded records, for a benchmark without a hub data set."""


def text_field(record: Mapping[str, Any], name: str) -> str:
    """A non-empty string field, or a ValueError that says what the record has instead."""
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        have = ", ".join(record) or "nothing"
        raise UserError(f"field {name!r} must be a non-empty text, got {value!r} (the record has: {have})")
    return value


def key_field(record: Mapping[str, Any], name: str) -> str:
    """The record's own id: a non-empty text, or a whole number."""
    value = record.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_field(record, name)


def prompt_id(benchmark: Benchmark, split: str, key: str) -> str:
    identity = {"dataset": benchmark.name, "config": benchmark.version, "split": split, "key": key}
    return utf8_id(identity)


def text_key(*texts: str) -> str:
    """A key for records that have no id of their own."""
    return hashlib.sha256("\x00".join(texts).encode()).hexdigest()[:16]


def load_questions(
    benchmark: Benchmark,
    *,
    split: Split = "test",
    question_file: str | Path | None = None,
    begin: int | None = None,
    end: int | None = None,
    count_tokens: CountTokens | None = None,
    left_out: list[str] | None = None,
) -> list[Question]:
    """The questions [begin, end) of a split, in the data set's order.

    `begin` and `end` count the questions that the benchmark keeps. A record that is no question, or whose
    id was there before, is left out; `left_out` receives "place: what is wrong with it". UserError: no
    question at all, a file that can't be read.
    """
    where = f"{benchmark.name} ({split})" if question_file is None else str(question_file)
    questions: list[Question] = []
    left_out = [] if left_out is None else left_out
    seen: dict[str, str] = {}
    read = 0
    for read, record in enumerate(_open_records(benchmark, split, question_file), start=1):
        try:
            parsed = _parse(benchmark, record, count_tokens or _count_words)
        except ValueError as error:
            left_out.append(f"{record.place}: {error}")
            if len(left_out) == read == _PATIENCE:
                break
            continue
        if parsed is None:
            continue
        if parsed.key in seen:
            left_out.append(f"{record.place}: the id {parsed.key!r} is taken by {seen[parsed.key]}")
            continue
        seen[parsed.key] = record.place
        questions.append(
            Question(
                prompt_id(benchmark, split, parsed.key),
                parsed.key,
                parsed.category,
                parsed.turns,
                parsed.references,
                parsed.template,
            )
        )
        if end is not None and end >= 0 and len(questions) >= end:
            break
    chosen = questions[slice(begin, end)]
    if chosen:
        return chosen
    if left_out and not questions:
        raise UserError(
            f"{where}: no usable question in {read} records; the first one is {left_out[0]}. "
            f"Expected: {benchmark.schema}"
        )
    raise UserError(
        f"{where}: no question left ({len(questions)} of {read} records are questions, "
        f"--question-begin {begin}, "
        f"--question-end {end}); widen the range or check the file"
    )


def _parse(benchmark: Benchmark, record: Record, count_tokens: CountTokens) -> Parsed | None:
    """The question of one record, None where the benchmark does not keep it. ValueError: what is wrong with
    it."""
    if record.fields is None:
        raise UserError(record.problem)
    try:
        # What is too long is refused below, and need not be counted to its end.
        parsed = benchmark.make(record.fields, lambda text: count_tokens(text[:MAX_CHARACTERS]))
    except UnicodeEncodeError as error:  # a text that was to be hashed
        raise UserError(f"{text_problem(error.object)}, in {error.object[:40]!r}") from None
    if parsed is None:
        return None
    texts = (*parsed.turns, parsed.key, parsed.category, *(text for text in parsed.references if text))
    for text in texts:
        if len(text) > MAX_CHARACTERS:
            raise UserError(
                f"a text of {len(text):,} characters; {MAX_CHARACTERS:,} at most; shorten it or take it out"
            )
        if told := text_problem(text):
            raise UserError(f"{told}, in {text[:40]!r}")
    return parsed


def _count_words(text: str) -> int:
    return len(text.split())


def _open_records(benchmark: Benchmark, split: Split, question_file: str | Path | None) -> Iterable[Record]:
    hub = benchmark.hub or {}
    hub_split = (benchmark.splits or {}).get(split)
    if question_file is not None:
        config = hub.get("name") or hub.get("data_dir")
        return source_of(
            question_file, split=hub_split or split, config=config, flag="--question-file", strict=False
        )
    if benchmark.records is not None:
        name = f"{benchmark.name} ({split})"
        return (
            Record(name, f"row {n}", fields) for n, fields in enumerate(benchmark.records(split), start=1)
        )
    if not hub or hub_split is None:
        raise UserError(
            f"--validation: {benchmark.name} has no {split} split; give one as a local file with "
            f"--question-file ({benchmark.schema})"
        )
    told = f"--bench-name {benchmark.name}: {hub['path']} could not be read from the Hugging Face hub"
    return hub_records(hub, hub_split, told, f"give a local copy with --question-file ({benchmark.schema})")
