"""What a benchmark is: numbered questions with stable ids, read from a published data set or a local file in
its schema.

A benchmark is one file with one `Benchmark`. Its `version` is part of every prompt id, so answers to
differently worded prompts can never be compared by accident: whoever changes a prompt raises the version.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pmpd.errors import UserError

Split = Literal["test", "validation"]
Reference = Literal["dataset", "reference_output"]

PlacedRecords = Iterator[tuple[str, Mapping[str, Any]]]
"""(where it is, record): "line 3" of a text file, "element 3" of a JSON array, "row 3" of a table; all count
from 1."""

CountTokens = Callable[[str], int]
"""Length of a text in the model's tokens, without special tokens."""


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


def prompt_id(benchmark: Benchmark, split: str, key: str) -> str:
    identity = {"dataset": benchmark.name, "config": benchmark.version, "split": split, "key": key}
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


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
) -> list[Question]:
    """The questions [begin, end) of a split, in the data set's order.

    `begin` and `end` count the questions that the benchmark keeps. A malformed record is a ValueError that
    names its place; two records with one key too.
    """
    records, where = _open_records(benchmark, split, question_file)
    questions: list[Question] = []
    seen: dict[str, str] = {}
    for place, record in records:
        try:
            parsed = benchmark.make(record, count_tokens or _count_words)
        except ValueError as error:
            raise UserError(f"{where} {place}: {error}. Expected: {benchmark.schema}") from None
        if parsed is None:
            continue
        if parsed.key in seen:
            raise UserError(
                f"{where} {place}: the id {parsed.key!r} is taken by {seen[parsed.key]}; ids must be unique"
            )
        seen[parsed.key] = place
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
    if not chosen:
        raise UserError(
            f"{where}: no question left ({len(questions)} read, --question-begin {begin}, --question-end "
            f"{end}); "
            "widen the range or check the file"
        )
    return chosen


def _count_words(text: str) -> int:
    return len(text.split())


def _open_records(
    benchmark: Benchmark, split: Split, question_file: str | Path | None
) -> tuple[PlacedRecords, str]:
    if question_file is not None:
        return read_records(Path(question_file), benchmark.schema), str(question_file)
    if benchmark.records is not None:
        return _rows(benchmark.records(split)), f"{benchmark.name} ({split})"
    if benchmark.hub is None or split not in (benchmark.splits or {}):
        raise UserError(
            f"--validation: {benchmark.name} has no {split} split; give one as a local file with "
            f"--question-file ({benchmark.schema})"
        )
    return _rows(_hub_records(benchmark, split)), f"{benchmark.hub['path']} ({split})"


def _rows(records: Iterable[Mapping[str, Any]]) -> PlacedRecords:
    return ((f"row {number}", record) for number, record in enumerate(records, start=1))


def _hub_records(benchmark: Benchmark, split: Split) -> Iterator[Mapping[str, Any]]:
    from datasets import load_dataset

    assert benchmark.hub is not None
    assert benchmark.splits is not None
    try:
        yield from load_dataset(**benchmark.hub, split=benchmark.splits[split], streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--bench-name {benchmark.name}: {benchmark.hub['path']} could not be read from the Hugging Face "
            f"hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}); "
            f"give a local copy with --question-file ({benchmark.schema})"
        ) from error


def read_records(path: Path, schema: str = "one JSON object per line") -> PlacedRecords:
    """The records of a .jsonl, .json (an array, or lines), .csv or .parquet file; the text ones also as .gz.
    ValueError where it is damaged."""
    if not path.is_file():
        raise UserError(f"--question-file {path}: no such file. Expected: {schema}")
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            yield from _rows(pq.read_table(path).to_pylist())
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"--question-file {path}: can't be read as Parquet ({error}); copy it again"
            ) from None
        return
    if kind not in (".jsonl", ".json", ".csv"):
        raise UserError(f"--question-file {path}: known are .jsonl, .json, .csv (each also .gz) and .parquet")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="" if kind == ".csv" else None) as file:
            if kind == ".csv":
                yield from _csv_records(file, path)
            else:
                yield from _json_records(file, path, schema, array_allowed=kind == ".json")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}). Expected: {schema}") from None
    except (OSError, EOFError, zlib.error) as error:  # what is wrong with a gzip file can be any of the three
        raise UserError(f"--question-file {path}: can't be read ({error}); copy it again") from None


def _csv_records(file: Any, path: Path) -> PlacedRecords:
    reader = csv.DictReader(file)
    for record in reader:
        if None in record or None in record.values():
            raise UserError(
                f"{path} line {reader.line_num}: not {len(reader.fieldnames or [])} columns "
                f"({', '.join(reader.fieldnames or [])})"
            )
        yield f"line {reader.line_num}", record


def _json_records(file: Any, path: Path, schema: str, array_allowed: bool) -> PlacedRecords:
    lines: Iterable[tuple[int, str]] = enumerate(file, start=1)
    for number, line in lines:
        if not line.strip():
            continue
        if array_allowed and line.lstrip().startswith("["):
            array = _parse_json(line + file.read(), path, number, schema)
            places = ((f"element {index}", record) for index, record in enumerate(array, start=1))
            yield from ((place, _checked_object(record, path, place, schema)) for place, record in places)
            return
        place = f"line {number}"
        yield place, _checked_object(_parse_json(line.rstrip(), path, number, schema), path, place, schema)


def _parse_json(text: str, path: Path, number: int, schema: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise UserError(
            f"{path} line {line}: not valid JSON ({error.msg} at column {error.colno}). Expected: {schema}"
        ) from None


def _checked_object(record: Any, path: Path, place: str, schema: str) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise UserError(
            f"{path} {place}: a JSON object is wanted, got {type(record).__name__}. Expected: {schema}"
        )
    return record
