"""Texts to tokens and back, the same for every tokenizer: where a prompt begins, where it ends, what a
text's own spelling of a special token is, and which part of a text each token brought."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any


def encode_document(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a plain text: begin-of-sequence once if the tokenizer adds it, no end-of-sequence after it.
    Special tokens that the text spells ("</s>" in a web page) are text."""
    ids = tokenizer(text, split_special_tokens=True, truncation=False, verbose=False)["input_ids"]
    return _ends_trimmed(tokenizer, list(ids))


def encode_prompt(tokenizer: Any, text: str, contents: Iterable[str] = ()) -> list[int]:
    """Tokens of a rendered conversation: begin-of-sequence exactly once if the template or the tokenizer
    adds it, no end-of-sequence after it. The template's special tokens are those; what `contents` (its
    turns and answers, in order) spell is text."""
    if not any(spelled in content for content in contents for spelled in special_tokens(tokenizer).values()):
        return _ends_trimmed(tokenizer, list(tokenizer(text, verbose=False)["input_ids"]))
    encoding = tokenizer(text, verbose=False, return_offsets_mapping=True)
    spans, cursor = [], 0
    for content in contents:
        begin = text.find(content.strip(), cursor)
        if begin >= 0:
            cursor = begin + len(content.strip())
            spans.append((begin, cursor))
    ids: list[int] = []
    for token, (begin, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        said = token in special_tokens(tokenizer) and begin < end
        if said and any(first <= begin and end <= last for first, last in spans):
            plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            ids += tokenizer(text[begin:end], **plain)["input_ids"]
        else:
            ids.append(token)
    return _ends_trimmed(tokenizer, ids)


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Id -> spelling of the tokenizer's special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return {**{token: entry.content for token, entry in added.items() if entry.special}, **dict(named)}


def _ends_trimmed(tokenizer: Any, ids: list[int]) -> list[int]:
    bos, eos = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
    start = 0
    while bos is not None and ids[start : start + 2] == [bos, bos]:
        start += 1
    end = len(ids)
    while end > start and eos is not None and ids[end - 1] == eos and (eos != bos or end > start + 1):
        end -= 1
    return ids[start:end]


def token_pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text that each token added; joined they are the text with special tokens. A token that only
    begins a character adds "" and the one that completes it the whole character, however many tokens it
    takes."""
    decode = functools.partial(tokenizer.decode, skip_special_tokens=False)
    pieces: list[str] = []
    context = shown = 0  # both lie between characters: tokens[context:shown] is context for spaces
    for end in range(1, len(tokens) + 1):
        before, text = decode(tokens[context:shown]), decode(tokens[context:end])
        if text.endswith("\ufffd") and end < len(tokens):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        context, shown = shown, end
    return pieces
