"""Perplexity: exp of the mean negative log likelihood of the tokens of a text.

The text is one stream of tokens, cut into windows. A window scores its last `stride` tokens (the first window
all but its first token, which has nothing before it); with stride = window, as GPTQ's and most papers' tables
have it, windows lie end to end and the first token of each is not scored.

Legend: B windows of a batch, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from pmpd.errors import UserError

_TOKENS_PER_PIECE = 256
"""Of the likelihoods: that many float32 distributions are in memory at a time, beside the logits."""


@dataclass(frozen=True)
class Perplexity:
    """`nats`: sum of the negative log likelihoods of `tokens` scored tokens."""

    nats: float
    tokens: int

    @property
    def value(self) -> float:
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


def token_stream(texts: Iterable[str], tokenizer: Any, limit: int | None = None) -> Tensor:
    """int64 [tokens]: the texts end to end, each followed by the end-of-sequence token where the tokenizer
    has one; at most `limit`. UserError where there are not two tokens."""
    stream: list[int] = []
    for text in texts:
        stream.extend(tokenizer(text, verbose=False)["input_ids"])
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        if limit is not None and len(stream) >= limit:
            del stream[limit:]
            break
    if len(stream) < 2:
        raise UserError(f"the texts hold {len(stream)} tokens: perplexity needs at least two")
    return torch.tensor(stream)


def windows(tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first scored token) of each window over a stream of that many tokens; every token but
    those without a token before it in their window is scored once.

    UserError unless 2 ≤ window and 1 ≤ stride ≤ window.
    """
    if window < 2 or not 1 <= stride <= window:
        raise UserError(
            f"window {window}, stride {stride}: a window has at least 2 tokens, and a stride is 1..window"
        )
    scored = 1
    for start in range(0, max(tokens - 1, 1), stride):
        stop = min(start + window, tokens)
        first = max(scored, start + 1)
        if first < stop:
            yield start, stop, first
        scored = stop
        if stop == tokens:
            return


@torch.no_grad()
def perplexity(
    model: nn.Module,
    stream: Tensor,
    window: int,
    stride: int | None = None,
    batch_size: int = 1,
    on_window: Callable[[int], None] = lambda count: None,
) -> Perplexity:
    """Of `stream` int64 [tokens] under a causal model (called with `input_ids`, returns `.logits`).

    `stride` None: = window. `batch_size`: windows of equal length that share a forward; it changes the speed,
    not the result. Memory: B · T · V logits.
    """
    device = next(model.parameters()).device
    nats, tokens = 0.0, 0
    for length, group in groupby(windows(len(stream), window, stride or window), lambda w: w[1] - w[0]):
        spans = list(group)
        for index in range(0, len(spans), batch_size):
            batch = spans[index : index + batch_size]
            ids_BT = torch.stack([stream[start : start + length] for start, _, _ in batch]).to(device)
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
            for row, (start, stop, first) in enumerate(batch):
                nats += _nats(logits_BTV[row], ids_BT[row], first - start)
                tokens += stop - first
            on_window(len(batch))
    return Perplexity(nats, tokens)


def _nats(logits_TV: Tensor, ids_T: Tensor, first: int) -> float:
    """Σ −log p(token) over tokens `first`.. of a window."""
    total = 0.0
    for start in range(first, len(ids_T), _TOKENS_PER_PIECE):
        stop = min(start + _TOKENS_PER_PIECE, len(ids_T))
        losses = nn.functional.cross_entropy(
            logits_TV[start - 1 : stop - 1].float(), ids_T[start:stop], reduction="none"
        )
        total += float(losses.sum(dtype=torch.float64))
    return total


def count_windows(tokens: int, window: int, stride: int | None = None) -> int:
    return sum(1 for _ in windows(tokens, window, stride or window))


def by_precision(
    model: nn.Module,
    precisions: Sequence[int],
    set_precision: Callable[[int], None],
    stream: Tensor,
    window: int,
    stride: int | None = None,
    batch_size: int = 1,
    on_window: Callable[[int], None] = lambda count: None,
) -> dict[int, Perplexity]:
    """Precision -> perplexity at it; `set_precision` switches the model."""
    result = {}
    for bits in precisions:
        set_precision(bits)
        result[bits] = perplexity(model, stream, window, stride, batch_size, on_window)
    return result
