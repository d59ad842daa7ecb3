"""Readers of other people's files: JSON, JSON lines, CSV, text, Parquet, Arrow, folders of them, the hub.

A `RecordSource` is a file or a folder, local or under a URI; iterating it gives its records in a fixed
order. One bad record costs that record: it comes with `problem` set. A file that can't be read at all is a
UserError that names it and, where there is one, the line.

Folders may be clones of hub data sets (the card's `configs` say which file is which split) or what
`save_to_disk` of `datasets` wrote. The split of a file is named by its path: `c4-train.00000.json.gz`,
`test/0000.parquet`.
"""

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from pmpd.errors import UserError
from pmpd.storage import files
from pmpd.storage.parquet import batches_of, parquet_of

SUFFIXES = (
    ".json",
    ".jsonl",
    ".csv",
    ".txt",
    ".json.gz",
    ".jsonl.gz",
    ".csv.gz",
    ".txt.gz",
    ".parquet",
    ".arrow",
)

_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "manifest.json"}
_SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""The words that name a split, those of `datasets`."""
_ENCODINGS = (
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_BATCH_ROWS, _BATCH_BYTES = 1024, 64 << 20
"""A batch of a table holds at most so much, whatever the length of its rows."""


@dataclass(frozen=True)
class Record:
    """One record, or what is wrong with it."""

    name: str
    """Its file, within the folder that was given."""
    where: str
    """Within the file, from 1: "17" is a line, "row 17" one of a table, "element 17" one of a JSON array."""
    fields: Mapping[str, Any] | None
    problem: str | None = None
    raw: str = ""
    """What stands for a record that has no fields."""

    @property
    def place(self) -> str:
        """For people: `c4-train.00000.json.gz:17`."""
        return f"{self.name}:{self.where}"

    @property
    def identity(self) -> str:
        """A text that is the same for the same record wherever it stands."""
        return self.raw if self.fields is None else json.dumps(self.fields, sort_keys=True, default=str)


def text_problem(text: str) -> str | None:
    """Why a str can't be stored as text, None where it can. Bytes that are not UTF-8 were read as
    surrogates."""
    half = _SURROGATE.search(text)
    if half is None:
        return None
    code = ord(half[0])
    told = f"character {half.start()} is U+{code:X}, half of a surrogate pair"
    if 0xDC80 <= code <= 0xDCFF:
        told += f", or a byte 0x{code - 0xDC00:X} that is not UTF-8 (convert the file)"
    return told


@dataclass(frozen=True)
class RecordSource:
    """The records of a file or folder. UserError on first use where there is none, or not the split asked
    for."""

    path: str
    split: str | None = None
    """Only this split's files. Default: those of train where a folder's files name several splits."""
    config: str | None = None
    """Only this configuration's files: a folder of that name, or one that the data set's card names."""
    columns: tuple[str, ...] | None = None
    """The fields wanted (tables are read by column). A table without them is a UserError."""
    flag: str = "--dataset"
    """How messages call `path`."""
    strict: bool = True
    """Whether a split or configuration that the files do not name is refused; else all files are taken."""

    def __iter__(self) -> Iterator[Record]:
        file_system, inner = files.resolve(self.path)
        root = posixpath.dirname(inner) if self.files[0] == inner else inner
        for path in self.files:
            name = posixpath.relpath(path, root)
            for where, value, problem in _read(file_system, path, self.columns):
                yield _record(name, where, value, problem)

    @cached_property
    def files(self) -> tuple[str, ...]:
        """The files that are read, as paths of their file system."""
        return self._chosen[0]

    @cached_property
    def skipped(self) -> int:
        """Files of the folder that belong to another split or configuration."""
        return self._chosen[1]

    @cached_property
    def _chosen(self) -> tuple[tuple[str, ...], int]:
        file_system, inner = files.resolve(self.path)
        kind = file_system.get_file_info(inner).type
        if kind == pafs.FileType.NotFound:
            raise UserError(f"{self.flag} {self.path}: no such file or folder")
        if kind == pafs.FileType.File:
            name = posixpath.basename(inner)
            if not name.endswith(SUFFIXES):
                raise UserError(
                    f"{self.flag} {self.path}: unknown kind of file; known are {', '.join(SUFFIXES)}"
                )
            if self.strict:
                self._select({inner: name}, {inner: _split_of(name)})
            return (inner,), 0
        infos = file_system.get_file_info(pafs.FileSelector(inner, recursive=True))
        found = sorted(info.path for info in infos if info.type == pafs.FileType.File)
        names = {path: posixpath.relpath(path, inner) for path in found}
        names = {path: name for path, name in names.items() if _is_records(name)}
        if not names:
            raise UserError(
                f"{self.flag} {self.path}: no file of records in the folder; looked for {', '.join(SUFFIXES)}"
            )
        splits = self._by_card(file_system, inner, names) or self._by_folder(file_system, names)
        chosen = self._select({path: names[path] for path in splits}, splits)
        return tuple(chosen), len(names) - len(chosen)

    def _select(self, names: Mapping[str, str], splits: Mapping[str, str | None]) -> list[str]:
        """The files of the wanted split."""
        named = sorted({split for split in splits.values() if split})
        if self.split is None:
            if len(named) < 2:
                return list(names)
            if "train" not in named:
                raise UserError(
                    f"{self.flag} {self.path}: its files are {', '.join(named)}; choose with --split"
                )
        wanted = self.split or "train"
        chosen = [path for path in names if splits[path] == _SPLITS.get(wanted.lower(), wanted)]
        if not chosen and wanted.lower() not in _SPLITS:
            word = re.compile(rf"(?<![a-z0-9]){re.escape(wanted)}(?![a-z])", re.IGNORECASE)
            chosen = [path for path, name in names.items() if word.search(name)]
        if not chosen and (self.strict or named):
            have = f"only {', '.join(named)}" if named else "no split"
            raise UserError(
                f"--split {wanted}: the file names of {self.path} name {have}; drop --split, choose "
                f"another, or "
                f"name the files by their split (train-0.jsonl, validation-0.jsonl)"
            )
        return chosen or list(names)

    def _by_folder(self, file_system: pafs.FileSystem, names: Mapping[str, str]) -> dict[str, str | None]:
        """File -> split, from folders and file names, or from the state that `save_to_disk` wrote beside
        it."""
        if self.config is not None:
            inside = {path: name for path, name in names.items() if self.config in name.split("/")[:-1]}
            if not inside and self.strict:
                there = sorted({name.split("/")[0] for name in names.values() if "/" in name})
                raise UserError(
                    f"--dataset-config {self.config}: no such folder in {self.path}; "
                    + (f"there are {', '.join(there)}" if there else "drop the flag")
                )
            names = inside or names
        return {
            path: _split_of(name) or (_saved_split(file_system, path) if name.endswith(".arrow") else None)
            for path, name in names.items()
        }

    def _by_card(
        self, file_system: pafs.FileSystem, folder: str, names: Mapping[str, str]
    ) -> dict[str, str | None]:
        """File -> split as the data set's card (README.md) says; {} where it says nothing of these files."""
        configs = _card_configs(file_system, posixpath.join(folder, "README.md"))
        wanted = [entry for entry in configs if entry.get("config_name") == self.config]
        if self.config is None:
            default = [
                entry for entry in configs if entry.get("default") or entry.get("config_name") == "default"
            ]
            wanted = default or configs
            if len(wanted) > 1:
                known = ", ".join(str(entry.get("config_name")) for entry in configs)
                raise UserError(f"{self.flag} {self.path}: choose one of {known} with --dataset-config")
        splits: dict[str, str | None] = {}
        for pattern, split in (pair for entry in wanted[:1] for pair in _patterns(entry)):
            for path, name in names.items():
                if pattern.fullmatch(name):
                    splits[path] = split or _split_of(name)
        return splits


def hub_records(options: Mapping[str, Any], split: str | None, told: str, cure: str) -> Iterator[Record]:
    """The records of a data set of the Hugging Face hub, streamed. `options`: what `datasets.load_dataset`
    takes. UserError that begins with `told` and ends with `cure` where the hub does not give them."""
    import datasets

    try:
        for index, row in enumerate(datasets.load_dataset(**options, split=split, streaming=True)):
            yield _record(str(split), str(index), row, None)
    except (
        Exception
    ) as error:  # the hub client has its own zoo of exceptions: no network, no such id, gated, …
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise UserError(f"{told}: {type(error).__name__}: {reason}; {cure}") from error


# ---- files of a folder -------------------------------------------------------------------------------------


def _is_records(name: str) -> bool:
    parts = name.split("/")
    hidden = any(part.startswith((".", "_")) for part in parts)
    return name.endswith(SUFFIXES) and not hidden and parts[-1] not in _METADATA


def _split_of(name: str) -> str | None:
    """The last word of a relative path that names a split."""
    words = re.findall("[a-z]+", name.lower())
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), None)


def _saved_split(file_system: pafs.FileSystem, path: str) -> str | None:
    state = posixpath.join(posixpath.dirname(path), "state.json")
    if file_system.get_file_info(state).type != pafs.FileType.File:
        return None
    try:
        with file_system.open_input_stream(state) as stream:
            split = json.loads(stream.read())["_split"]
    except (ValueError, KeyError, TypeError, OSError):
        return None
    return _SPLITS.get(split, split) if isinstance(split, str) else None


def _card_configs(file_system: pafs.FileSystem, path: str) -> list[dict[str, Any]]:
    """`configs` of a data set card's YAML header."""
    if file_system.get_file_info(path).type != pafs.FileType.File:
        return []
    import yaml

    with file_system.open_input_stream(path) as stream:
        header = re.match(
            r"---\n(.*?)\n---", stream.read().decode("utf-8", "replace").replace("\r", ""), re.DOTALL
        )
    try:
        card = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        return []
    configs = card.get("configs") if isinstance(card, dict) else None
    return [entry for entry in configs if isinstance(entry, dict)] if isinstance(configs, list) else []


def _patterns(entry: Mapping[str, Any]) -> Iterator[tuple[re.Pattern[str], str | None]]:
    """(pattern of file names, split) of one entry of `configs`."""
    given = entry.get("data_files") or "**"
    for item in given if isinstance(given, list) else [given]:
        split, paths = (item.get("split"), item.get("path")) if isinstance(item, dict) else (None, item)
        for path in paths if isinstance(paths, list) else [paths]:
            glob = posixpath.normpath(posixpath.join(str(entry.get("data_dir") or ""), str(path)))
            parts = re.split(r"(\*\*/?|\*|\?)", glob)
            kinds = {"*": "[^/]*", "?": "[^/]", "**": ".*", "**/": "(?:.*/)?"}
            pattern = "".join(kinds.get(part, re.escape(part)) for part in parts)
            yield re.compile(pattern), _SPLITS.get(str(split), str(split)) if split else None


# ---- records of a file -------------------------------------------------------------------------------------

_Rows = Iterator[tuple[str, Any, str | None]]
"""(where, value, problem). The value of a row with a problem is what could be read of it."""


def _record(name: str, where: str, value: Any, problem: str | None) -> Record:
    if problem is None and not isinstance(value, Mapping):
        problem = f"a record must be an object with named fields, it is a {type(value).__name__}"
    if problem is not None:
        raw = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        return Record(name, where, None, problem, raw)
    return Record(name, where, value)


def _read(file_system: pafs.FileSystem, path: str, columns: Sequence[str] | None) -> _Rows:
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


def _json_rows(path: str, lines: Iterable[tuple[int, str]]) -> _Rows:
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


def _json_elements(path: str, first: tuple[int, str], lines: Iterable[tuple[int, str]]) -> _Rows:
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


def _csv_rows(path: str, lines: Iterable[tuple[int, str]], columns: Sequence[str] | None) -> _Rows:
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


def _paragraphs(lines: Iterable[tuple[int, str]]) -> _Rows:
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


def _table_rows(file_system: pafs.FileSystem, path: str, columns: Sequence[str] | None) -> _Rows:
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


def source_of(path: str | Path, **options: Any) -> RecordSource:
    """A `RecordSource`, checked: the file or folder is there and holds what is asked for."""
    source = RecordSource(str(path), **options)
    _ = source.files
    return source
