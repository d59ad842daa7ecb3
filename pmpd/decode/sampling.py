"""From logits to a token: greedy, or drawn from the row's own numbers.

Legend: S slots, n rows, V vocabulary.

The number that chooses new token i of a row comes from (`seed`, the row's draw key, i) alone, so a row's
tokens are the same in any batch, order and worker. Settings act in transformers' order: repetition penalty,
temperature, top-k, top-p. The token is where the running sum of probabilities, in the order of the
vocabulary, first passes the number: rounding differences between two forwards move the sums a little, and
never reorder them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pmpd.decode.requests import Request, Sampling


def draw(seed: int, key: str, position: int) -> float:
    """The number in [0, 1) that chooses new token `position` (from 0) of the row with this draw key."""
    digest = hashlib.sha256(f"{seed}/{key}/token {position}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def highest(logits: Tensor, parts: int | None = None) -> tuple[Tensor, Tensor]:
    """The highest logit of each row and the first token that has it, [n] and int64 [n], from `logits` [n, V].

    In two steps, by `parts` of the vocabulary (a divisor of V): PyTorch gives a row to one block of a GPU,
    which takes 35 us for 128,256 logits. Default: up to 256 on a GPU, else 1.
    """
    rows, vocabulary = logits.shape
    parts = parts or (math.gcd(vocabulary, 256) if logits.is_cuda else 1)
    if parts == 1:
        top, tokens = logits.max(dim=-1)
        return top, tokens
    top, tokens = logits.reshape(rows, parts, -1).max(dim=-1)
    top, part = top.max(dim=-1)
    return top, tokens.gather(1, part[:, None])[:, 0] + part * (vocabulary // parts)


def choose(
    logits: Tensor, settings: Sequence[Sampling], draws: Sequence[float], seen: Tensor | None
) -> Tensor:
    """The next token of each row: int64 [n] from `logits` [n, V], with one `Sampling` and one `draw` a row.

    `seen` bool [n, V]: tokens that prompt and answer hold (None: no row has a repetition penalty).
    """
    logits = logits.double()

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    if seen is not None:
        penalty = column([s.repetition_penalty for s in settings])
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    greedy = logits.argmax(dim=-1)
    if all(s.temperature == 0 for s in settings):
        return greedy
    logits = logits / column([s.temperature or 1.0 for s in settings])
    if any(s.top_k or s.top_p < 1 for s in settings):
        top_k, top_p = [s.top_k or logits.shape[1] for s in settings], [s.top_p for s in settings]
        logits = _cut(logits, column(top_k), column(top_p))
    sums = torch.softmax(logits, dim=-1).cumsum(dim=-1)
    drawn = torch.searchsorted(sums, column(draws) * sums[:, -1:], right=True)[:, 0]
    drawn = drawn.clamp(max=logits.shape[1] - 1)  # a row that is not finite has no sums; it becomes an error
    is_greedy = torch.tensor([s.temperature == 0 for s in settings], device=logits.device)
    return torch.where(is_greedy, greedy, drawn)


def _cut(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """`logits` [n, V] with -inf for all but each row's `top_k` [n, 1] likeliest, and of those for what is
    behind the first that reach `top_p` [n, 1] together."""
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(logits.shape[1], device=logits.device)
    ordered = ordered.masked_fill(place >= top_k, float("-inf"))
    p = torch.softmax(ordered, dim=-1)
    before = p.cumsum(dim=-1) - p
    return torch.empty_like(logits).scatter_(
        -1, index, ordered.masked_fill((before >= top_p) & (place > 0), float("-inf"))
    )


class RowSampling:
    """How the tokens of the rows in each slot are chosen. Greedy rows without a penalty cost nothing here."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.device = device
        self._requests: list[Request | None] = [None] * slots
        self._needed = np.zeros(slots, dtype=bool)
        self._seen: Tensor | None = None  # bool [S, V]; made for the first row with a repetition penalty

    def start(self, slot: int, request: Request, vocabulary: int) -> None:
        """`request` has been prefilled into `slot`."""
        self._requests[slot] = request
        self._needed[slot] = not request.sampling.changes_nothing
        if request.sampling.repetition_penalty != 1:
            if self._seen is None:
                self._seen = torch.zeros(len(self._needed), vocabulary, dtype=torch.bool, device=self.device)
            self._see(slot, torch.tensor(list(request.input_ids), device=self.device))

    def fork(self, source: int, target: int, new_tokens: Callable[[], Tensor]) -> None:
        """`target` goes on as `source`, with these new tokens so far, int64 [n]: with the same draws."""
        request = self._requests[target] = self._requests[source]
        self._needed[target] = self._needed[source]
        assert request is not None
        if request.sampling.repetition_penalty != 1:
            prompt = torch.tensor(list(request.input_ids), device=self.device)
            self._see(target, torch.cat([prompt, new_tokens()]))

    def _see(self, slot: int, tokens: Tensor) -> None:
        assert self._seen is not None
        self._seen[slot] = False
        self._seen[slot, tokens] = True

    def is_needed(self, at: np.ndarray) -> bool:
        """Whether the arg-max is not the token of some row of the slots `at`."""
        return bool(self._needed[at].any())

    def choose(self, at: np.ndarray, position: np.ndarray, logits: Tensor) -> Tensor:
        """New token `position` int [n] (from 0) of the rows in slots `at` int [n]: int64 [n] from `logits`
        [n, V]."""
        requests = [request for request in (self._requests[slot] for slot in at) if request is not None]
        settings = [request.sampling for request in requests]
        draws = [
            draw(sampling.seed, request.draws_from, index) if sampling.temperature else 0.0
            for request, sampling, index in zip(requests, settings, position.tolist(), strict=True)
        ]
        slots = torch.as_tensor(at, device=self.device)
        penalised = self._seen is not None and any(s.repetition_penalty != 1 for s in settings)
        seen = self._seen[slots] if self._seen is not None and penalised else None
        tokens = choose(logits, settings, draws, seen)
        if self._seen is not None:
            self._seen[slots, tokens] = True
        return tokens
