"""C4, local text files and the demo's texts -> prompts with stable ids.

A *record* is one text and where it came from. A *prompt* is the beginning of a record: the document is
tokenized, truncated to what the model can take, and cut to a random length n in [min(32, n//2), n]. The cut
depends on the seed and the prompt's id only.

`prompt_id` = first 16 hex digits of SHA-256 over the canonical JSON of dataset name, config, split, text and
seed. The name of a local file or folder is its last path component, so moving it changes no id, and neither
does re-sharding a folder. Records of equal text have equal ids: the first one is kept, the others are
counted.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import posixpath
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pmpd import storage
from pmpd.errors import UserError

MAX_DOCUMENT_TOKENS = 2048
MIN_PROMPT_TOKENS = 32
"""Shorter cuts are made only where the document itself has fewer than twice as many tokens."""

ROWS_PER_SHARD = 1024
ROWS_PER_GROUP = 64
"""Workers read whole row groups, and a unit's prompts, neighbours in length, lie all over the file."""

_SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet", ".txt", ".txt.gz")
_SURROGATE = re.compile("[\ud800-\udfff]")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DEFAULT_CONFIGS = {"allenai/c4": "en"}


@dataclass(frozen=True)
class PromptConfig:
    """Which records become prompts."""

    dataset: str = "demo"
    config: str | None = None
    """Configuration of a Hugging Face dataset (`allenai/c4`: en)."""
    split: str | None = None
    """Default: train; of the demo: held_out."""
    size: int = 64
    """Number of prompts; all there are where the dataset holds fewer."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"--size {self.size}: give the number of prompts, at least 1")
        if self.dataset == "demo" and self.split not in (None, "train", "validation", "held_out"):
            raise UserError(f"--split {self.split}: the demo has train, validation and held_out")

    @property
    def resolved_config(self) -> str | None:
        return self.config or _DEFAULT_CONFIGS.get(self.dataset)

    @property
    def resolved_split(self) -> str | None:
        if self.split:
            return self.split
        return "held_out" if self.dataset == "demo" else "train" if self.kind == "hub" else None

    @cached_property
    def kind(self) -> str:
        """demo, local or hub. ValueError where `dataset` is none of them."""
        if self.dataset == "demo":
            return "demo"
        if storage.exists(self.dataset):
            return "local"
        looks_local = (
            "://" in self.dataset
            or self.dataset.startswith((".", "/", "~"))
            or self.dataset.endswith(_SUFFIXES)
        )
        if not looks_local and _HUB_ID.fullmatch(self.dataset):
            return "hub"
        raise UserError(
            f"--dataset {self.dataset}: no such file or folder; give demo, a Hugging Face id (allenai/c4), "
            f"a file ({', '.join(_SUFFIXES)}) or a folder of such files"
        )

    @cached_property
    def name(self) -> str:
        """What stands for the dataset in a prompt_id."""
        return (
            posixpath.basename(storage.absolute(self.dataset).rstrip("/"))
            if self.kind == "local"
            else self.dataset
        )


@dataclass(frozen=True)
class Record:
    source: str
    """For people: `c4-train.00000.json.gz:17`, `topics/if`."""
    text: str


def prompt_id(config: PromptConfig, text: str) -> str:
    """See the module's text."""
    row = {
        "dataset": config.name,
        "config": config.resolved_config,
        "split": config.resolved_split,
        "text": text,
        "seed": config.seed,
    }
    return hashlib.sha256(
        json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    ).hexdigest()[:16]


def cut_length(tokens: int, seed: int, key: str) -> int:
    """Random prompt length in [max(1, min(32, n//2)), n] for a document of n tokens, from seed and prompt_id
    alone."""
    shortest = max(1, min(MIN_PROMPT_TOKENS, tokens // 2))
    draw = int.from_bytes(hashlib.sha256(f"{seed}/{key}/length".encode()).digest()[:8], "big")
    return shortest + draw % (tokens - shortest + 1)


def make_prompts(
    config: PromptConfig, tokenizer: Any, max_prompt_tokens: int, counts: Counter[str] | None = None
) -> Iterator[dict[str, Any]]:
    """The first `config.size` prompts as PROMPTS rows. Memory grows with the ids only.

    `max_prompt_tokens`: what the model's positions leave (positions - max_new_tokens); documents are
    truncated to the smaller of it and 2048 tokens. A document without a token, or one that is no text (half a
    surrogate pair), becomes a row with `error` set. `counts` receives records, duplicates, empty and
    malformed. ValueError: malformed record (names file and line), no record at all, no room for a prompt.
    """
    if max_prompt_tokens < 1:
        raise UserError(
            f"the model's positions leave {max_prompt_tokens} tokens for a prompt; lower --max-new-tokens "
            f"below its number of positions"
        )
    counts = Counter() if counts is None else counts
    limit = min(MAX_DOCUMENT_TOKENS, max_prompt_tokens)
    special = set(tokenizer.all_special_ids)
    seen: set[bytes] = set()
    for record in records(config):
        counts["records"] += 1
        key = prompt_id(config, record.text)
        if bytes.fromhex(key) in seen:
            counts["duplicates"] += 1
            continue
        seen.add(bytes.fromhex(key))
        half = _SURROGATE.search(record.text)
        input_ids = (
            tokenizer(record.text, truncation=False, verbose=False)["input_ids"]
            if record.text.strip() and not half
            else []
        )
        row = {"prompt_id": key, "source": record.source, "document_tokens": len(input_ids)}
        if half:
            counts["malformed"] += 1
            told = (
                f"the document is no text: character {half.start()} is U+{ord(half[0]):X}, half of a "
                f"surrogate pair"
            )
            yield {**row, "prompt_tokens": 0, "prompt_text": "", "input_ids": [], "error": told}
        elif all(token in special for token in input_ids):
            counts["empty"] += 1
            yield {
                **row,
                "prompt_tokens": 0,
                "prompt_text": "",
                "input_ids": [],
                "error": "the document tokenizes to nothing",
            }
        else:
            truncated = input_ids[:limit]
            cut = truncated[: cut_length(len(truncated), config.seed, key)]
            text = tokenizer.decode(cut, skip_special_tokens=True)
            yield {**row, "prompt_tokens": len(cut), "prompt_text": text, "input_ids": cut, "error": None}
        if len(seen) == config.size:
            return
    if not seen:
        raise UserError(
            f"--dataset {config.dataset}: it holds no record; give a dataset with at least one text"
        )


def write_prompts(
    config: PromptConfig, tokenizer: Any, max_prompt_tokens: int, dataset: str, row_config: Mapping[str, Any]
) -> dict[str, int]:
    """Writes the PROMPTS dataset, streaming, unless it is there already; its counts (rows, errors, records,
    duplicates, empty, malformed).

    `row_config` is what defines the rows. A dataset that was cut short is written again: prompts are cheap
    and always the same. ValueError: the folder is of another configuration, or as in `make_prompts`.
    """
    manifest = storage.check_config(dataset, row_config)
    if manifest is not None and storage.is_whole(dataset, manifest, "prompt_id"):
        return manifest["counts"]
    begin = time.monotonic()
    storage.write_manifest(dataset, storage.PROMPTS, row_config, table="prompts", complete=False)
    storage.remove_temporary(dataset)
    for path in storage.list_shards(dataset):
        storage.remove(path)
    counts: Counter[str] = Counter()
    rows = make_prompts(config, tokenizer, max_prompt_tokens, counts)
    for index in itertools.count():
        shard = list(itertools.islice(rows, ROWS_PER_SHARD))
        if not shard:
            break
        path = storage.join(storage.data_folder(dataset), f"part-{index:05}.parquet")
        storage.write_shard(storage.to_table(shard, storage.PROMPTS), path, ROWS_PER_GROUP)
        counts["rows"] += len(shard)
        counts["shards"] += 1
    counts["errors"] = counts["empty"] + counts["malformed"]
    seconds = time.monotonic() - begin
    storage.write_manifest(
        dataset, storage.PROMPTS, row_config, table="prompts", complete=True, counts=counts, seconds=seconds
    )
    return dict(counts)


def records(config: PromptConfig) -> Iterator[Record]:
    """The records of a dataset in a fixed order."""
    return {"demo": _demo, "local": _local, "hub": _hub}[config.kind](config)


def _demo(config: PromptConfig) -> Iterator[Record]:
    from pmpd.demo import texts

    usable = [
        document
        for document in texts.documents_of(config.resolved_split)  # type: ignore[arg-type]
        if len(document.text) >= texts.MIN_PROMPT_CHARACTERS
    ]
    # Sorted by a hash, so that a small --size is a fair sample and not the first topics of the alphabet.
    for document in sorted(usable, key=lambda document: prompt_id(config, document.text)):
        yield Record(document.key, document.text)


def _hub(config: PromptConfig) -> Iterator[Record]:
    for index, row in enumerate(_hub_rows(config)):
        yield Record(f"{config.resolved_split}:{index}", _text_of(row, f"{config.dataset} record {index}"))


def _hub_rows(config: PromptConfig) -> Iterator[Any]:
    import datasets

    where = f"--dataset {config.dataset}"
    try:
        yield from datasets.load_dataset(
            config.dataset, config.resolved_config, split=config.resolved_split, streaming=True
        )
    except (
        Exception
    ) as error:  # the hub client has its own zoo of exceptions: no network, no such id, gated, …
        raise UserError(
            f"{where} (config {config.resolved_config}, split {config.resolved_split}): "
            f"{type(error).__name__}: {error}; "
            "check the id, --dataset-config and --split, and that the hub can be reached"
        ) from error


def _local(config: PromptConfig) -> Iterator[Record]:
    file_system, inner = storage.resolve(config.dataset)
    if file_system.get_file_info(inner).type == pafs.FileType.Directory:
        infos = file_system.get_file_info(pafs.FileSelector(inner, recursive=True))
        paths = sorted(
            info.path for info in infos if info.type == pafs.FileType.File and _is_text_file(info.path)
        )
        if not paths:
            raise UserError(
                f"--dataset {config.dataset}: no text file in the folder; looked for {', '.join(_SUFFIXES)}"
            )
    else:
        paths = [inner]
        if not inner.endswith(_SUFFIXES):
            raise UserError(
                f"--dataset {config.dataset}: unknown kind of file; known are {', '.join(_SUFFIXES)}"
            )
    for path in paths:
        yield from _reader(path)(file_system, path)


def _is_text_file(path: str) -> bool:
    name = posixpath.basename(path)
    return name.endswith(_SUFFIXES) and not name.startswith((".", "_")) and name != "manifest.json"


def _reader(path: str) -> Callable[[pafs.FileSystem, str], Iterator[Record]]:
    if path.endswith(".parquet"):
        return _parquet
    return _paragraphs if path.endswith((".txt", ".txt.gz")) else _json


def _text_of(row: Any, where: str) -> str:
    if not isinstance(row, dict) or "text" not in row:
        has = (
            f"it has {', '.join(map(str, row))}" if isinstance(row, dict) else f"it is a {type(row).__name__}"
        )
        raise UserError(f"{where}: a record needs the field 'text'; {has}")
    if not isinstance(row["text"], str):
        raise UserError(f"{where}: the field 'text' must be a string, it is {row['text']!r:.80}")
    return row["text"]


def _lines(file_system: pafs.FileSystem, path: str) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, plain or gzip. ValueError where it is damaged, naming the line."""
    number = 0
    try:
        with file_system.open_input_stream(
            path, compression="gzip" if path.endswith(".gz") else None
        ) as stream:
            for number, line in enumerate(io.BufferedReader(stream, 1 << 20), start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start} of the line); convert the file"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: can't be read after line {number}: {error}") from error


def _json(file_system: pafs.FileSystem, path: str) -> Iterator[Record]:
    """JSON lines, whatever the suffix (C4's `.json.gz` are that); a file that starts with `[` is one JSON
    array."""
    name = posixpath.basename(path)
    lines = _lines(file_system, path)
    first = next(lines, None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        try:
            rows = json.loads("".join(line for _, line in itertools.chain([first], lines)))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from error
        for index, row in enumerate(rows):
            yield Record(f"{name}:{index}", _text_of(row, f"{path}, record {index}"))
        return
    for number, line in itertools.chain([first], lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{number}: malformed JSON line: {error.msg} (column {error.colno})"
            ) from error
        yield Record(f"{name}:{number}", _text_of(row, f"{path}:{number}"))


def _paragraphs(file_system: pafs.FileSystem, path: str) -> Iterator[Record]:
    """A text file holds documents separated by blank lines."""
    name, start = posixpath.basename(path), 1
    block: list[str] = []
    for number, line in itertools.chain(_lines(file_system, path), [(0, "")]):
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            yield Record(f"{name}:{start}", "".join(block).strip())
            block = []


def _parquet(file_system: pafs.FileSystem, path: str) -> Iterator[Record]:
    name = posixpath.basename(path)
    try:
        with file_system.open_input_file(path) as file:
            parquet = pq.ParquetFile(file)
            if "text" not in parquet.schema_arrow.names:
                raise UserError(
                    f"{path}: a record needs the field 'text'; the file has "
                    f"{', '.join(parquet.schema_arrow.names)}"
                )
            row = 0
            for batch in parquet.iter_batches(batch_size=1024, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    yield Record(f"{name}:{row}", _text_of({"text": text}, f"{path}, row {row}"))
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: can't be read as Parquet: {error}") from error
