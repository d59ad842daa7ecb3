"""Rows of our tables from the records of a torch file: prompts to label, or labels to train on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from pmpd import storage
from pmpd.errors import UserError
from pmpd.labeling.torch_records import MASK, TorchRecords, features_of, labels_of, token_ids

RULE = "given"
"""What stands for the label rule of labels that came with a file."""
_PATIENCE = 100
"""Records that may be unusable before the first usable one."""


def prompt_rows(
    source: TorchRecords, tokenizer: Any, limit: int, size: int, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """The first `size` records as PROMPTS rows. They are prompts already: no random cut, only what lies
    behind `limit` tokens is left out. An unusable record is a row with `error` set. `counts` receives
    records, duplicates, empty and malformed."""
    special = set(tokenizer.all_special_ids)

    def read(record: Any) -> tuple[list[int], str]:
        ids = token_ids(record)
        return ids, _text_of(tokenizer, ids[:limit])

    heads = _heads(source, read, lambda made: made[0], counts)
    for row, made in islice(heads, size):
        ids, text = made or ([], "")
        if made is not None and all(token in special for token in ids):
            counts["empty"] += 1
            row["error"], ids, text = "the prompt has no token of a text", [], ""
        prompt: list[int] = ids[:limit]
        yield {**row, "prompt_tokens": len(prompt), "prompt_text": text, "input_ids": prompt}


def labelled_prompt_rows(
    source: TorchRecords, tokenizer: Any, limit: int, pairs: Sequence[tuple[int, int]] | None
) -> Iterator[dict[str, Any]]:
    """LABELLED_PROMPTS rows of records without features; those of more than `limit` tokens have `error`
    set."""

    def read(record: Any) -> tuple[list[int], str, list[dict[str, Any]]]:
        ids = token_ids(record)
        if not 0 < len(ids) <= limit:
            raise ValueError(f"a prompt of {len(ids)} tokens, the model takes 1 to {limit}")
        return ids, _text_of(tokenizer, ids), _entries(record, pairs)

    for row, made in _heads(source, read, lambda made: made[0], Counter()):
        ids, text, entries = made or ([], "", None)
        yield {**row, "prompt_text": text, "input_ids": ids, "pairs": entries}


def label_rows(
    source: TorchRecords, pairs: Sequence[tuple[int, int]] | None, head_dim: int
) -> Iterator[dict[str, Any]]:
    """LABELS rows of records with features."""

    def read(record: Any) -> tuple[list[int], list[dict[str, Any]], Any]:
        features = features_of(record)
        if features is None or features.keys.shape[1] != head_dim:
            width = "none" if features is None else f"of head dim {features.keys.shape[1]}"
            raise ValueError(f"KV features {width}; the first record's have head dim {head_dim}")
        ids = token_ids(record) if source.has_ids else []
        return ids, _entries(record, pairs), features

    def identity(made: Any) -> Any:
        return made[0] or storage.ascii_id({"keys": made[2].keys.tobytes().hex()})

    for row, made in _heads(source, read, identity, Counter()):
        ids, entries, features = made or ([], None, None)
        del row["source"], row["document_tokens"]
        length = 0 if features is None else len(features.keys)
        yield {
            **row,
            "prompt_tokens": length,
            "input_ids": ids,
            "rule": RULE,
            "pairs": entries,
            "keys": None if features is None else features.keys,
            "values": None if features is None else features.values,
            "feature_tokens": length,
        }


def _heads(
    source: TorchRecords,
    read: Callable[[Any], Any],
    identity: Callable[[Any], Any],
    counts: Counter[str],
) -> Iterator[tuple[dict[str, Any], Any]]:
    """(what a row says of its prompt, what `read` makes of the record or None) of each record that was not
    there before. UserError where none of the first records is usable."""
    seen: set[str] = set()
    good, first = 0, ""
    for number, record in enumerate(source.records, start=1):
        counts["records"] += 1
        made, problem = None, None
        try:
            made = read(record)
            good += 1
        except ValueError as error:
            problem = str(error)
            counts["malformed"] += 1
            first = first or f"record {number}: {problem}"
        if not good and number == min(_PATIENCE, len(source.records)):
            raise UserError(f"{source.flag} {source.path}: {source.told}; none is usable: {first}")
        told: Any = ["record", number] if made is None else identity(made)
        key = storage.ascii_id({"dataset": source.name, "input_ids": told})
        if key in seen:
            counts["duplicates"] += 1
            continue
        seen.add(key)
        tokens = len(told) if made is not None and isinstance(told, list) else 0
        yield (
            {
                "prompt_id": key,
                "source": f"{source.name}:{number}",
                "prompt_tokens": tokens,
                "document_tokens": tokens,
                "error": problem,
            },
            made,
        )


def _entries(record: Any, pairs: Sequence[tuple[int, int]] | None) -> list[dict[str, Any]]:
    """The column `pairs` of a row."""
    found = labels_of(record, pairs)
    return [{"high": high, "low": low, "label": label} for (high, low), label in found.items()]


def _text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """ValueError where the tokenizer does not know an id."""
    if ids and not (min(ids) >= 0 and max(ids) < len(tokenizer)):
        raise ValueError(
            f"token ids {min(ids)} to {max(ids)}, the model's tokenizer has 0 to {len(tokenizer) - 1}: "
            f"another model's prompts, or padding that no {MASK} marks"
        )
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
