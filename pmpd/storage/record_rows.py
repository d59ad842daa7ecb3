"""Rows of one file of records: JSON, JSON lines, CSV, text, Parquet, Arrow.

What is wrong with a row costs that row; a file that can't be read is a UserError."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import posixpath
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from pmpd.errors import UserError
from pmpd.storage.parquet import batches_of, parquet_of

_ENCODINGS = (
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_BATCH_ROWS, _BATCH_BYTES = 1024, 64 << 20
"""A batch of a table holds at most so much, whatever the length of its rows."""

Rows = Iterator[tuple[str, Any, str | None]]
"""(where, value, problem). The value of a row with a problem is what could be read of it."""


def rows_of_file(file_system: pafs.FileSystem, path: str, columns: Sequence[str] | None) -> Rows:
    try:
        with file_system.open_input_stream(path, compression=None) as stream:
            if stream.read(24).startswith(b"version https://git-lfs"):
                raise UserError(
                    f"{path}: a pointer of Git LFS, not the data; run `git lfs pull` in that clone"
                )
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error})") from error
    plain = path.removesuffix(".gz")
    if plain.endswith((".parquet", ".arrow")):
        yield from _table_rows(file_system, path, columns)
    elif plain.endswith(".txt"):
        yield from _paragraphs(_lines(file_system, path))
    elif plain.endswith(".csv"):
        yield from _csv_rows(path, _lines(file_system, path), columns)
    else:
        yield from _json_rows(path, _lines(file_system, path))


def _lines(file_system: pafs.FileSystem, path: str) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, plain or gzip. UTF-16 and UTF-32 are known by their byte order mark;
    bytes that are not UTF-8 become surrogates (`text_problem`)."""
    number = 0
    try:
        with file_system.open_input_stream(path, compression=None) as file:
            opened = gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file
            stream = io.BufferedReader(opened, 1 << 20)  # type: ignore[arg-type]  # both read and readinto
            head = stream.peek(4)[:4]
            encoding = next((name for mark, name in _ENCODINGS if head.startswith(mark)), None)
            if encoding:
                text = io.TextIOWrapper(stream, encoding, newline="\n")
                for number, line in enumerate(text, start=1):
                    yield number, line
                return
            for number, content in enumerate(stream, start=1):
                line = content.decode("utf-8", "surrogateescape")
                yield number, line.removeprefix("\ufeff") if number == 1 else line
    except UnicodeError as error:
        raise UserError(
            f"{path}:{number + 1}: not {encoding} ({error}); convert the file to UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:  # what is wrong with a gzip file can be any of the three
        raise UserError(f"{path}: can't be read after line {number} ({error}); copy it again") from error


def _integer(digits: str) -> int | str:
    """Python refuses to convert integers of thousands of digits; those stay text."""
    return int(digits) if len(digits) < 4000 else digits


_NOT_SPACE = re.compile(r"[^ \t\n\r]")
_DECODER = json.JSONDecoder(parse_int=_integer)


def _json_rows(path: str, lines: Iterable[tuple[int, str]]) -> Rows:
    """JSON lines, whatever the suffix (C4's `.json.gz` are that). A file that starts with `[` is one array,
    one whose first line is `{` alone holds objects over several lines."""
    numbered = ((number, line) for number, line in lines if line.strip())
    first = next(numbered, None)
    if first is None:
        return
    if first[1].lstrip().startswith("[") or first[1].strip() == "{":
        yield from _json_elements(path, first, lines)
        return
    for number, line in itertools.chain([first], numbered):
        try:
            yield str(number), _DECODER.decode(line), None
        except json.JSONDecodeError as error:
            yield str(number), line.strip(), f"malformed JSON: {error.msg} (column {error.colno})"
        except RecursionError:
            yield str(number), line.strip(), "JSON nested too deeply"


def _skip(text: str, position: int) -> int:
    """Where the next character is that is no white space."""
    found = _NOT_SPACE.search(text, position)
    return found.start() if found else len(text)


def _json_elements(path: str, first: tuple[int, str], lines: Iterable[tuple[int, str]]) -> Rows:
    text = "".join([first[1], *(line for _, line in lines)])
    begin = _skip(text, 0)
    array = text[begin] == "["
    position, count = begin + array, 0

    def refused(at: int, told: str) -> UserError:
        return UserError(f"{path}:{first[0] + text.count(chr(10), 0, at)}: malformed JSON: {told}")

    while True:
        position = _skip(text, position)
        if position == len(text):
            if array:
                raise refused(position, "the array has no end")
            return
        if array and text[position] == "]":
            if text[position + 1 :].strip():
                raise refused(position, "text after the array")
            return
        try:
            value, end = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise refused(error.pos, error.msg) from None
        except RecursionError:
            raise refused(position, "nested too deeply") from None
        count += 1
        yield f"element {count}", value, None
        position = _skip(text, end)
        if array and text[position : position + 1] == ",":
            position += 1
        elif array and text[position : position + 1] != "]":
            raise refused(position, "a comma or ] is missing")


def _csv_rows(path: str, lines: Iterable[tuple[int, str]], columns: Sequence[str] | None) -> Rows:
    """Records of a CSV file with a header, fields of any length."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader((line for _, line in lines), strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                raise UserError(
                    f"{path}:{number}: a quotation mark that opens here is never closed"
                ) from None
            if header is None:
                raise UserError(f"{path}:{number}: no CSV header ({error})") from None
            yield str(number), f"{posixpath.basename(path)}:{number}", f"malformed CSV: {error}"
            continue
        if header is None:
            header = row
            _check_columns(path, header, columns)
        elif row and len(row) != len(header):
            told = f"{len(row)} columns in place of {len(header)} ({', '.join(header)})"
            yield str(number), dict(enumerate(row)), told
        elif row:
            yield str(number), dict(zip(header, row, strict=True)), None


def _paragraphs(lines: Iterable[tuple[int, str]]) -> Rows:
    """A text file holds documents separated by blank lines."""
    start, block = 1, list[str]()
    for number, line in itertools.chain(lines, [(0, "")]):
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            yield str(start), {"text": "".join(block).strip()}, None
            block = []


def _check_columns(path: str, have: Sequence[str], columns: Sequence[str] | None) -> None:
    missing = [name for name in columns or () if name not in have]
    if missing:
        raise UserError(f"{path}: a record needs the field {missing[0]!r}; the file has {', '.join(have)}")


def _table_rows(file_system: pafs.FileSystem, path: str, columns: Sequence[str] | None) -> Rows:
    kind = "Parquet" if path.endswith(".parquet") else "Arrow"
    number = 0
    try:
        with file_system.open_input_file(path) as file:
            for batch in _batches(file, path, columns):
                for row, problem in _batch_rows(batch):
                    number += 1
                    value = f"{posixpath.basename(path)}:{number}" if problem else row
                    yield f"row {number}", value, problem
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: can't be read as {kind} after row {number} ({error}); copy it again"
        ) from error


def _batches(file: Any, path: str, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    if path.endswith(".parquet"):
        parquet = parquet_of(file, path)
        _check_columns(path, parquet.schema_arrow.names, columns)
        for index in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(index)
            fit = _BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)
            yield from parquet.iter_batches(
                max(1, min(_BATCH_ROWS, fit)), row_groups=[index], columns=columns
            )
        return
    for schema, batch in batches_of(file, path):  # a stream is what `datasets` writes
        if batch is None:
            _check_columns(path, schema.names, columns)
        else:
            yield batch if columns is None else batch.select(list(columns))


def _batch_rows(batch: pa.RecordBatch) -> Iterator[tuple[Any, str | None]]:
    try:
        yield from ((row, None) for row in batch.to_pylist())
        return
    except (ValueError, OverflowError):  # a value that is no text, or no time, of Python
        pass
    for index in range(batch.num_rows):
        try:
            yield batch.slice(index, 1).to_pylist()[0], None
        except (ValueError, OverflowError) as error:
            yield None, f"a value can't be read ({error})"
