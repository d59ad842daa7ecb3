"""Where answers end: end-of-sequence tokens, stop strings.

Two things end a row: the run's end-of-sequence tokens (`end_token_ids` by default), looked for by the engine
itself; and the row's own `Request.stop`, a function of its new tokens. What a conversation template adds to
either is the business of whoever renders it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pmpd.errors import UserError

EXTRA_TOKENS = 8
"""A stop string of n bytes is looked for in the text of the last n + so many tokens: each has a byte at
least, special ones aside."""


def end_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """All end-of-sequence tokens that the model's generation config, its config or its tokenizer name: a chat
    model's turn often ends with one that only the tokenizer knows. May be empty."""
    ends: set[int] = set()
    for value in (
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        if value is not None:
            ends.update(value if isinstance(value, list | tuple) else [value])
    return frozenset(ends)


def give_pad_token(tokenizer: Any) -> None:
    """Makes `tokenizer(texts, padding=True)` work where the tokenizer names no pad token: padding is masked,
    so any token serves; the end-of-sequence token where there is one."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)


class StopStrings:
    """A `Request.stop`: whether the text of the new tokens holds one of some strings."""

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self.strings = (strings,) if isinstance(strings, str) else tuple(strings)
        if not all(isinstance(string, str) and string for string in self.strings):
            raise UserError(f"stop {list(self.strings)}: a list of strings that are not empty")
        self.tokenizer = tokenizer
        self._window = EXTRA_TOKENS + max((len(string.encode()) for string in self.strings), default=0)

    def __call__(self, tokens: Sequence[int]) -> bool:
        text = self.tokenizer.decode(list(tokens[-self._window :]), skip_special_tokens=False)
        return any(string in text for string in self.strings)

    def cut(self, text: str) -> str:
        """The text before the first of the strings."""
        return text[: min((place for place in map(text.find, self.strings) if place >= 0), default=len(text))]
