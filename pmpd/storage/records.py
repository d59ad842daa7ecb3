"""Readers of other people's files: JSON, JSON lines, CSV, text, Parquet, Arrow, folders of them, the hub.

A `RecordSource` is a file or a folder, local or under a URI; iterating it gives its records in a fixed
order. One bad record costs that record: it comes with `problem` set. A file that can't be read at all is a
UserError that names it and, where there is one, the line.

Folders may be clones of hub data sets (the card's `configs` say which file is which split) or what
`save_to_disk` of `datasets` wrote. The split of a file is named by its path: `c4-train.00000.json.gz`,
`test/0000.parquet`.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from pmpd.errors import UserError
from pmpd.storage import files
from pmpd.storage.record_rows import rows_of_file

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
_SIDE_FILES = re.compile(
    r"(readme|licen[cs]e|notice|copying|authors|citation|change(s|log)|contributing|requirements|version)"
    r"\b[^/]*\.txt|package(-lock)?\.json",
    re.IGNORECASE,
)
"""What lies beside the data in clones, in kinds of files that records have too."""
_SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""The words that name a split, those of `datasets`."""
_SURROGATE = re.compile("[\ud800-\udfff]")


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
            for where, value, problem in rows_of_file(file_system, path, self.columns):
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

    def _folder_named(self, names: Mapping[str, str]) -> bool:
        """Whether a folder of these files has the configuration's name."""
        return any(self.config in name.split("/")[:-1] for name in names.values())

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
        known = ", ".join(str(entry.get("config_name")) for entry in configs)
        if len(wanted) > 1:
            raise UserError(f"{self.flag} {self.path}: choose one of {known} with --dataset-config")
        if configs and not wanted and self.strict and not self._folder_named(names):
            raise UserError(f"--dataset-config {self.config}: the card of {self.path} has {known}")
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
    beside = parts[-1] in _METADATA or _SIDE_FILES.fullmatch(parts[-1])
    return name.endswith(SUFFIXES) and not hidden and not beside


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


def _record(name: str, where: str, value: Any, problem: str | None) -> Record:
    if problem is None and not isinstance(value, Mapping):
        problem = f"a record must be an object with named fields, it is a {type(value).__name__}"
    if problem is not None:
        raw = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        return Record(name, where, None, problem, raw)
    return Record(name, where, value)


def source_of(path: str | Path, **options: Any) -> RecordSource:
    """A `RecordSource`, checked: the file or folder is there and holds what is asked for."""
    source = RecordSource(str(path), **options)
    _ = source.files
    return source
