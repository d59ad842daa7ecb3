"""C4, local text files, the demo's texts and torch files of token ids -> prompts with stable ids.

A *record* is one text and where it came from. A *prompt* is the beginning of a record: the document is
tokenized, truncated to what the model can take, and cut to a random length n in [min(32, n//2), n]. The cut
depends on the seed and the prompt's id only. Records that are prompts already are not cut (`form`).

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
"""What follows is not tokenized: a record of 50 MB would take minutes and gigabytes."""
MIN_PROMPT_TOKENS = 32
"""Shorter cuts are made only where the document itself has fewer than twice as many tokens."""

ROWS_PER_SHARD = 1024
ROWS_PER_GROUP = 64
"""Workers read whole row groups, and a unit's prompts, neighbours in length, lie all over the file."""

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
    """The first `config.size` prompts as PROMPTS rows. Memory grows with the ids only.

    `max_prompt_tokens`: what the model's positions leave (positions - max_new_tokens); documents are
    truncated to the smaller of it and `config.longest` tokens. A chat prompt that is too long is an error
    row, since a cut would take its question's end away. A document without a token, and a record that is no
    text (malformed, null, half a surrogate pair), becomes a row with `error` set. `counts` receives records,
    duplicates, empty and malformed. UserError: no usable record (names file and line of the first), no room
    for a prompt, a file that can't be read.
    """
    if max_prompt_tokens < 1:
        raise UserError(
            f"the model's positions leave {max_prompt_tokens} tokens for a prompt; lower --max-new-tokens "
            f"below its number of positions"
        )
    counts = Counter() if counts is None else counts
    limit = min(config.longest, max_prompt_tokens)
    if config.kind == "tokens":
        yield from prompt_rows(config.torch_records, tokenizer, limit, config.size, counts)
        return
    special = set(tokenizer.all_special_ids)
    seen: set[bytes] = set()
    first_problem = None
    for source, text, problem in records(config):
        counts["records"] += 1
        key = prompt_id(config, text)
        if bytes.fromhex(key) in seen:
            counts["duplicates"] += 1
            continue
        seen.add(bytes.fromhex(key))
        ids: list[int] = []
        if problem is not None:
            counts["malformed"] += 1
            first_problem = first_problem or f"{source}: {problem}"
            if counts["malformed"] == len(seen) == _PATIENCE:
                break
        else:
            ids = _tokens(tokenizer, text, config.form)
            if all(token in special for token in ids):
                counts["empty"] += 1
                problem = "the document tokenizes to nothing"
            elif config.form == "chat" and len(ids) > limit:
                problem = f"the question takes {len(ids)} tokens, {limit} fit"
        row = {"prompt_id": key, "source": source, "document_tokens": len(ids), "error": problem}
        if problem is None:
            kept = min(len(ids), limit)
            cut = ids[: cut_length(kept, config.seed, key)] if config.form == "cut" else ids[:kept]
            text = tokenizer.decode(cut, skip_special_tokens=True)
            yield {**row, "prompt_tokens": len(cut), "prompt_text": text, "input_ids": cut}
        else:
            yield {**row, "prompt_tokens": 0, "prompt_text": "", "input_ids": []}
        if len(seen) == config.size:
            break
    if not seen:
        raise UserError(
            f"--dataset {config.dataset}: it holds no record; give a dataset with at least one text"
        )
    if counts["malformed"] == len(seen):
        raise UserError(
            f"--dataset {config.dataset}: no usable record in {len(seen)}; the first one is {first_problem}"
        )


def _tokens(tokenizer: Any, text: str, form: Form) -> list[int]:
    """Tokens of a document; of one that is longer than any model reads, of its beginning."""
    text = text[:MAX_DOCUMENT_CHARACTERS]
    if not text.strip():
        return []
    if form != "chat":
        return encode_document(tokenizer, text)
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("--prompt-form chat: the model's tokenizer has no chat template; use whole or cut")
    turn = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return encode_prompt(tokenizer, rendered, [text])


def write_prompts(
    config: PromptConfig, tokenizer: Any, max_prompt_tokens: int, dataset: str, row_config: Mapping[str, Any]
) -> dict[str, int]:
    """Writes the PROMPTS dataset, streaming, unless it is there already; its counts (rows, errors, records,
    duplicates, empty, malformed).

    `row_config` is what defines the rows. A dataset that was cut short is written again: prompts are cheap
    and always the same. ValueError: the folder is of another configuration, or as in `make_prompts`.
    """
    return storage.write_dataset(
        dataset,
        storage.PROMPTS,
        lambda counts: make_prompts(config, tokenizer, max_prompt_tokens, counts),
        row_config,
        rows_per_shard=ROWS_PER_SHARD,
        row_group_rows=ROWS_PER_GROUP,
    )


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
