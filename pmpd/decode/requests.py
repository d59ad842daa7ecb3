"""What is asked of the decode loop and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Prefix:
    """The cache of a sequence's beginning, to be continued: `tokens` and per layer keys and values [H,
    len(tokens), D]."""

    tokens: tuple[int, ...]
    layers: list[tuple[Tensor, Tensor]] = field(repr=False)

    def head(self, length: int) -> Prefix:
        """The first `length` tokens of it."""
        return Prefix(
            self.tokens[:length], [(keys[:, :length], values[:, :length]) for keys, values in self.layers]
        )


@dataclass(frozen=True)
class Request:
    """One continuation to decode."""

    key: str
    """Names the row in its `Completion`: unique within a run."""
    input_ids: Sequence[int]
    max_new_tokens: int
    switch_steps: tuple[int, ...] | None = None
    """The row's plan [J], in place of a decision by the scheduler."""
    prefix: Prefix | None = None
    """Cache of the first tokens of `input_ids`; the rest is prefilled."""
    draw_key: str | None = None
    """What the row's randomness comes from (default: `key`)."""
    want_features: bool = False
    want_prefix: bool = False
    forks: tuple[Fork, ...] = ()

    def all_keys(self) -> set[str]:
        """Of all completions that come of it: its own and its forks'."""
        keys, forks = {self.key}, list(self.forks)
        while forks:
            fork = forks.pop()
            keys.add(fork.key)
            forks += fork.forks
        return keys


@dataclass(frozen=True)
class Fork:
    """A continuation that shares its parent's decode forwards 1..`step` and then follows its own
    `switch_steps` [J]."""

    key: str
    step: int
    switch_steps: tuple[int, ...]
    forks: tuple[Fork, ...] = ()


@dataclass
class Completion:
    """What became of a request or fork."""

    key: str
    tokens: list[int]
    """New tokens, the end-of-sequence token included."""
    precision_trace: list[tuple[int, int]]
    """Run-length (bits, count): for each new token the precision of the forward that produced it, prefill
    first."""
    switch_steps: tuple[int, ...]
    finish_reason: str
    """`eos`, `length` or `error`."""
    error: str | None = None
    features: tuple[np.ndarray, np.ndarray] | None = None
    """KV features after prefill, float16 [T, D] keys and values (when asked for)."""
    prefix: Prefix | None = None
    """Cache of the prompt and of all new tokens but the last (when asked for)."""
    prefill_seconds: float = 0.0
    """Seconds of the prefill forward that the row was part of, divided by its rows."""
    decode_seconds: float = 0.0
    """The row's share of the decode forwards it was part of: each forward's seconds divided by its rows (a
    fork's: its own only)."""


@dataclass(frozen=True)
class TokenEvent:
    """One new token, as soon as it is known (streaming)."""

    key: str
    token: int
    bits: int
