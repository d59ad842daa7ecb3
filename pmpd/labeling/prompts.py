"""C4, local text files, the demo's texts and torch files of token ids -> prompts with stable ids.

A *record* is one text and where it came from; a *document* is a record with the id of its prompt. A *prompt*
is the beginning of a document, which is tokenized, truncated to what the model can take, and cut to a random
length n in [min(32, n//2), n]. The cut depends on the seed and the prompt's id only, so every document can
become a prompt by itself, on any machine (`pmpd.farm.prompt_task`). Records that are prompts already are not
cut (`form`).

`prompt_id` = first 16 hex digits of SHA-256 over the canonical JSON of dataset name, config, split, text and
seed. The name of a local file or folder is its last path component, so moving it changes no id, and neither
does re-sharding a folder. Records of equal text have equal ids: the first one is kept, the others are
counted.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from pmpd import storage
from pmpd.benchmarks.tokens import encode_document, encode_prompt
from pmpd.errors import UserError
from pmpd.labeling.torch_records import TorchRecords
from pmpd.labeling.torch_rows import prompt_rows
from pmpd.storage.records import SUFFIXES, Record, RecordSource, hub_records, source_of, text_problem

MAX_DOCUMENT_TOKENS = 2048
MAX_DOCUMENT_CHARACTERS = 2**20
"""What follows is not tokenized: a record of 50 MB would take minutes and gigabytes. A prompt is the first
`MAX_DOCUMENT_TOKENS` at most, so nothing of it is lost; a question, which must be whole, is an error row."""
MIN_PROMPT_TOKENS = 32
"""Shorter cuts are made only where the document itself has fewer than twice as many tokens."""

ROWS_PER_SHARD = 1024
ROWS_PER_GROUP = 64
"""Workers read whole row groups, and a unit's prompts, neighbours in length, lie all over the file."""

EMPTY = "the document tokenizes to nothing"

_PATIENCE = 100
"""Records that may be unusable before the first usable one."""
_UNUSABLE = "\0unusable\0"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TORCH_SUFFIX = ".pt"
"""Of files of token ids (`pmpd.labeling.torch_records`)."""
_DEFAULT_CONFIGS = {"allenai/c4": "en"}


Form = Literal["cut", "whole", "chat"]
"""What of a record is the prompt: its beginning, all of it, or a question to the model's chat template."""


@dataclass(frozen=True)
class PromptConfig:
    """Which records become prompts."""

    dataset: str = "demo"
    config: str | None = None
    """Configuration of a Hugging Face dataset (`allenai/c4`: en)."""
    split: str | None = None
    """Default: train; of the demo: held_out; of local files without a split in their names: all of them."""
    size: int = 64
    """Number of prompts; all there are where the dataset holds fewer."""
    seed: int = 0
    form: Form = "cut"
    longest: int = MAX_DOCUMENT_TOKENS
    """Documents are truncated to so many tokens at most."""

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise UserError(f"--prompt-form {self.form}: choose one of {', '.join(get_args(Form))}")
        if not 1 <= self.longest <= MAX_DOCUMENT_TOKENS:
            raise UserError(f"--max-prompt-tokens {self.longest}: 1 to {MAX_DOCUMENT_TOKENS}")
        if self.size < 1:
            raise UserError(f"--size {self.size}: give the number of prompts, at least 1")
        if self.split is not None and self.dataset.endswith(TORCH_SUFFIX):
            raise UserError(f"--split {self.split}: a {TORCH_SUFFIX} file has no splits; drop the flag")
        if self.form == "chat" and self.dataset.endswith(TORCH_SUFFIX):
            raise UserError(f"--prompt-form chat: a {TORCH_SUFFIX} file holds tokens of prompts, no texts")
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

    @property
    def unusual(self) -> dict[str, Any]:
        """Those of `form` and `longest` that are not the default: part of what makes the rows."""
        told = {"prompt_form": self.form, "max_prompt_tokens": self.longest}
        return {
            name: value
            for name, value in told.items()
            if value != {"prompt_form": "cut", "max_prompt_tokens": MAX_DOCUMENT_TOKENS}[name]
        }

    @cached_property
    def kind(self) -> str:
        """demo, tokens (a torch file of prompts), local or hub. ValueError where `dataset` is none of
        them."""
        if self.dataset == "demo":
            return "demo"
        if storage.exists(self.dataset):
            return "tokens" if self.dataset.endswith(TORCH_SUFFIX) else "local"
        looks_local = (
            "://" in self.dataset
            or self.dataset.startswith((".", "/", "~"))
            or self.dataset.endswith((*SUFFIXES, TORCH_SUFFIX))
        )
        if not looks_local and _HUB_ID.fullmatch(self.dataset):
            return "hub"
        raise UserError(
            f"--dataset {self.dataset}: no such file or folder; give demo, a Hugging Face id (allenai/c4), "
            f"a file ({', '.join(SUFFIXES)}; {TORCH_SUFFIX} of token ids) or a folder of such files"
        )

    @cached_property
    def source(self) -> RecordSource:
        """The files of a local dataset."""
        return source_of(self.dataset, split=self.split, config=self.config, columns=("text",))

    @cached_property
    def torch_records(self) -> TorchRecords:
        """The records of a torch file."""
        return TorchRecords.read(self.dataset)

    @cached_property
    def name(self) -> str:
        """What stands for the dataset in a prompt_id."""
        is_file = self.kind in ("local", "tokens")
        return storage.base_name(storage.absolute(self.dataset)) if is_file else self.dataset


def prompt_id(config: PromptConfig, text: str) -> str:
    """See the module's text."""
    row = {
        "dataset": config.name,
        "config": config.resolved_config,
        "split": config.resolved_split,
        "text": text,
        "seed": config.seed,
        **config.unusual,
    }
    return storage.ascii_id(row)


def cut_length(tokens: int, seed: int, key: str) -> int:
    """Random prompt length in [max(1, min(32, n//2)), n] for a document of n tokens, from seed and prompt_id
    alone."""
    shortest = max(1, min(MIN_PROMPT_TOKENS, tokens // 2))
    draw = int.from_bytes(hashlib.sha256(f"{seed}/{key}/length".encode()).digest()[:8], "big")
    return shortest + draw % (tokens - shortest + 1)


def make_prompts(
    config: PromptConfig, tokenizer: Any, max_prompt_tokens: int, counts: Counter[str] | None = None
) -> Iterator[dict[str, Any]]:
    """The first `config.size` prompts as PROMPTS rows, one after another: what the farm makes in parallel.

    As `documents` and `PromptMaker` say. `counts` receives records, duplicates, empty and malformed.
    """
    make = PromptMaker(tokenizer, config, max_prompt_tokens)
    counts = Counter() if counts is None else counts
    if config.kind == "tokens":
        yield from prompt_rows(config.torch_records, tokenizer, make.limit, config.size, counts)
        return
    for document in documents(config, counts):
        row = make(document)
        if row["error"] == EMPTY:
            counts["empty"] += 1
        yield row


def documents(config: PromptConfig, counts: Counter[str] | None = None) -> Iterator[dict[str, Any]]:
    """The first `config.size` documents as DOCUMENTS rows; nothing is tokenized. Some 10 bytes of memory for
    each.

    A record that is no text (malformed, null, half a surrogate pair) has a `problem`. `counts` receives
    records, duplicates and malformed. UserError: no usable record (names file and line of the first), a file
    that can't be read.
    """
    counts = Counter() if counts is None else counts
    seen = storage.Seen()
    first_problem = None
    for source, text, problem in records(config):
        counts["records"] += 1
        key = prompt_id(config, text)
        if not seen.add(int(key, 16)):
            counts["duplicates"] += 1
            continue
        if problem is not None:
            counts["malformed"] += 1
            first_problem = first_problem or f"{source}: {problem}"
            if counts["malformed"] == len(seen) == _PATIENCE:
                break
        elif config.form == "chat" and len(text) > MAX_DOCUMENT_CHARACTERS:
            problem = (
                f"the question has {len(text):,} characters, {MAX_DOCUMENT_CHARACTERS:,} at most; "
                f"shorten it, or take the beginnings of texts with --prompt-form cut"
            )
        text = text[:MAX_DOCUMENT_CHARACTERS] if problem is None else ""
        yield {"prompt_id": key, "source": source, "text": text, "problem": problem}
        if len(seen) == config.size:
            break
    if not len(seen):
        raise UserError(
            f"--dataset {config.dataset}: it holds no record; give a dataset with at least one text"
        )
    if counts["malformed"] == len(seen):
        raise UserError(
            f"--dataset {config.dataset}: no usable record in {len(seen)}; the first one is {first_problem}"
        )


def check_room(max_prompt_tokens: int) -> None:
    """UserError where the model has no room for a prompt."""
    if max_prompt_tokens < 1:
        raise UserError(
            f"the model's positions leave {max_prompt_tokens} tokens for a prompt; lower --max-new-tokens "
            f"below its number of positions"
        )


class PromptMaker:
    """Documents to prompts, each by itself."""

    def __init__(self, tokenizer: Any, config: PromptConfig, max_prompt_tokens: int) -> None:
        """`max_prompt_tokens`: what the model's positions leave (positions - max_new_tokens); documents are
        truncated to the smaller of it and `config.longest` tokens. UserError where that is nothing, or
        where chat prompts are asked for and there is no template."""
        check_room(max_prompt_tokens)
        if config.form == "chat" and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "--prompt-form chat: the model's tokenizer has no chat template; use whole or cut"
            )
        self._tokenizer, self._form, self._seed = tokenizer, config.form, config.seed
        self.limit = min(config.longest, max_prompt_tokens)
        self._special = set(tokenizer.all_special_ids)

    def __call__(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """The PROMPTS row of a DOCUMENTS row. With `error` set where there is a problem or no token, and
        where a chat prompt is too long: a cut would take its question's end away."""
        problem, key = document["problem"], document["prompt_id"]
        ids = self._tokens(document["text"]) if problem is None else []
        if problem is None and all(token in self._special for token in ids):
            problem = EMPTY
        elif self._form == "chat" and len(ids) > self.limit:
            problem = f"the question takes {len(ids)} tokens, {self.limit} fit"
        row = {"prompt_id": key, "source": document["source"], "document_tokens": len(ids), "error": problem}
        if problem is not None:
            return {**row, "prompt_tokens": 0, "prompt_text": "", "input_ids": []}
        kept = min(len(ids), self.limit)
        cut = ids[: cut_length(kept, self._seed, key)] if self._form == "cut" else ids[:kept]
        text = self._tokenizer.decode(cut, skip_special_tokens=True)
        return {**row, "prompt_tokens": len(cut), "prompt_text": text, "input_ids": cut}

    def _tokens(self, text: str) -> list[int]:
        if not text.strip():
            return []
        if self._form != "chat":
            return encode_document(self._tokenizer, text)
        turn = [{"role": "user", "content": text}]
        rendered = self._tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return encode_prompt(self._tokenizer, rendered, [text])


def records(config: PromptConfig) -> Iterator[tuple[str, str, str | None]]:
    """(source, text, problem) of a dataset's records in a fixed order. Where there is a problem, the text
    stands for the record in its id only."""
    if config.kind == "tokens":
        raise UserError(
            f"--dataset {config.dataset}: a file of token ids, for `pmpd label`; texts are needed here, give "
            f"a file of them ({', '.join(SUFFIXES)})"
        )
    if config.kind == "demo":
        yield from ((source, text, None) for source, text in _demo(config))
        return
    found: Iterable[Record] = config.source if config.kind == "local" else _hub(config)
    for record in found:
        text = record.fields.get("text") if record.fields is not None else None
        if isinstance(text, str):
            told = text_problem(text)
            yield record.place, text, f"the document is no text: {told}" if told else None
        elif record.fields is None:
            yield record.place, _UNUSABLE + record.identity, record.problem
        elif "text" not in record.fields:
            told = f"a record needs the field 'text'; it has {', '.join(map(str, record.fields))}"
            yield record.place, _UNUSABLE + record.identity, told
        else:
            yield (
                record.place,
                _UNUSABLE + record.identity,
                f"the field 'text' must be a string, it is {text!r:.80}",
            )


def _demo(config: PromptConfig) -> Iterator[tuple[str, str]]:
    from pmpd.demo import texts

    usable = [
        document
        for document in texts.documents_of(config.resolved_split)  # type: ignore[arg-type]
        if len(document.text) >= texts.MIN_PROMPT_CHARACTERS
    ]
    # Sorted by a hash, so that a small --size is a fair sample and not the first topics of the alphabet.
    for document in sorted(usable, key=lambda document: prompt_id(config, document.text)):
        yield document.key, document.text


def _hub(config: PromptConfig) -> Iterator[Record]:
    named = {"name": config.resolved_config} if config.resolved_config else {}
    told = f"--dataset {config.dataset} (config {config.resolved_config}, split {config.resolved_split})"
    cure = "check the id, --dataset-config and --split, and that the hub can be reached"
    return hub_records({"path": config.dataset, **named}, config.resolved_split, told, cure)
