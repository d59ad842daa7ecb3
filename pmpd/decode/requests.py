"""What is asked of the decode loop and what comes of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from pmpd.errors import UserError


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
class Sampling:
    """How a row's tokens are chosen. The default is greedy."""

    temperature: float = 0.0
    """Logits are divided by it; 0 = greedy."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability; 1 = all."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0 = all."""
    seed: int = 0
    repetition_penalty: float = 1.0
    """Positive logits of tokens that the prompt or the answer holds are divided by it, negative ones
    multiplied; acts on greedy decoding too; 1 = none."""

    def __post_init__(self) -> None:
        for name, fits, allowed in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, up to 1 (all tokens)"),
            ("top_k", self.top_k >= 0 and self.top_k == int(self.top_k), "a whole number, 0 for all tokens"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0; 1 is none"),
        ):
            if not fits:
                raise UserError(f"{name} {getattr(self, name)}: {allowed}")

    @property
    def changes_nothing(self) -> bool:
        """Whether the arg-max of the logits is the token."""
        return self.temperature == 0 and self.repetition_penalty == 1


GREEDY = Sampling()


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
    """What the row's randomness comes from, of scheduler and sampling (default: `key`)."""
    sampling: Sampling = GREEDY
    stop: Callable[[Sequence[int]], bool] | None = None
    """Whether the row ends with the last of its new tokens (all of them are given). Asked after every token;
    stop strings (`decode.ending.StopStrings`) and a template's own end tokens are such functions. Forks have
    it too."""
    want_features: bool = False
    want_prefix: bool = False
    forks: tuple[Fork, ...] = ()

    @property
    def draws_from(self) -> str:
        return self.key if self.draw_key is None else self.draw_key

    def problem(self, vocabulary: int, max_length: int) -> str | None:
        """Why an engine with `max_length` positions can't decode it, as an error names it; None: it can."""
        length = len(self.input_ids)
        if length == 0:
            return "ValueError: the prompt has no tokens"
        if min(self.input_ids) < 0 or max(self.input_ids) >= vocabulary:
            return (
                f"ValueError: the prompt has tokens outside 0..{vocabulary - 1}, which is all that the model "
                f"knows"
            )
        if self.max_new_tokens < 1:
            return f"ValueError: max_new_tokens {self.max_new_tokens}: one new token at least"
        if length + self.max_new_tokens - 1 > max_length:
            return (
                f"ValueError: a prompt of {length} tokens with {self.max_new_tokens} new ones "
                f"needs {length + self.max_new_tokens - 1} positions; there are {max_length}"
            )
        if self.prefix is not None:
            cached = self.prefix.tokens
            if len(cached) >= length or tuple(self.input_ids[: len(cached)]) != cached:
                return (
                    f"ValueError: the given cache of {len(cached)} tokens is not a beginning of the "
                    f"prompt's {length} tokens"
                )
        return None

    def all_keys(self) -> set[str]:
        """Of all completions that come of it: its own and its forks'."""
        keys, forks = {self.key}, list(self.forks)
        while forks:
            fork = forks.pop()
            keys.add(fork.key)
            forks += fork.forks
        return keys


More = Callable[[int], Sequence[Request]]
"""Called with how many tokens a row can have: further requests, of which none is longer."""


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
    """As decided, at most `max_new_tokens` - 1. Empty under an online scheduler: the trace says what ran."""
    finish_reason: str
    """`eos`, `stop`, `length` or `error`."""
    error: str | None = None
    classes: np.ndarray | None = None
    """The switch classes decided, int [J]; None where the scheduler chose none."""
    scores: np.ndarray | None = None
    """What they were chosen by, float32 [J, 4]."""
    features: tuple[np.ndarray, np.ndarray] | None = None
    """KV features after prefill, float16 [T, D] keys and values (when asked for)."""
    prefix: Prefix | None = None
    """Cache of the prompt and of all new tokens but the last (when asked for)."""
    prefill_seconds: float = 0.0
    """Seconds of the prefill forward that the row was part of, divided by its rows."""
    decode_seconds: float = 0.0
    """The row's share of the decode forwards it was part of: each forward's seconds divided by its rows (a
    fork's: its own only), and of its decision."""
    decision_seconds: float = 0.0
    """Of these, the row's share of the scheduler's decision."""


@dataclass(frozen=True)
class TokenEvent:
    """One new token, as soon as it is known (streaming)."""

    key: str
    token: int
    bits: int


class Further(Iterator[Request]):
    """Requests, and when they are all taken those that `more` has by then; `told` is called of them first. It
    may be asked again after it had none."""

    def __init__(
        self,
        left: Iterable[Request],
        more: More | None,
        room: int,
        told: Callable[[Sequence[Request]], None],
    ) -> None:
        self._left, self._more, self._room, self._told = deque(left), more, room, told

    def __next__(self) -> Request:
        if not self._left and self._more is not None:
            further = self._more(self._room)
            self._told(further)
            self._left.extend(further)
        if not self._left:
            raise StopIteration
        return self._left.popleft()
