"""Padded batches of prompts, as `generate` takes and returns them, and the requests that they stand for.

Legend: B rows, L tokens of the longest row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pmpd.decode.ending import StopStrings
from pmpd.decode.requests import Completion, Prefix, Request, Sampling
from pmpd.errors import UserError


@dataclass
class GenerateOutput:
    """What `generate` returns. B rows."""

    input_ids: Tensor
    """int64 [B, L]: each prompt with its new tokens, right-padded with the pad (else end-of-sequence)
    token."""
    new_token: Tensor
    """int64 [B]: number of new tokens of each row, the end-of-sequence token included."""
    precision_log: list[list[int]]
    """Per row the precision of the forward that produced each new token; the first is the prefill's."""
    precision_trace: list[list[tuple[int, int]]]
    """The same, run-length encoded: (bits, count)."""
    past_key_values: list[Prefix]
    """Per row the cache of all tokens but the last, to be passed to the next call."""
    completions: list[Completion]
    """The engine's own records, with seconds and finish reasons."""


def requests_of(
    tokenizer: Any,
    input_ids: Tensor,
    max_new_tokens: int,
    past_key_values: Sequence[Prefix] | None,
    attention_mask: Tensor | None,
    keys: Sequence[str] | None,
    sampling: Sampling,
    stop: Sequence[str],
) -> list[Request]:
    """A request for each row of a padded batch, named by its index. The arguments are those of
    `PMPDForCausalLM.generate`; UserError where they do not agree."""
    if input_ids.dim() != 2 or len(input_ids) == 0:
        raise UserError(
            f"input_ids has shape {list(input_ids.shape)}; allowed: [batch, length] with at least one row"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise UserError(
            f"attention_mask has shape {list(attention_mask.shape)}, input_ids {list(input_ids.shape)}; "
            f"they must agree"
        )
    if past_key_values is not None and len(past_key_values) != len(input_ids):
        raise UserError(
            f"past_key_values has {len(past_key_values)} rows, input_ids {len(input_ids)}; they must agree"
        )
    if keys is not None and len(keys) != len(input_ids):
        raise UserError(f"keys names {len(keys)} rows, input_ids has {len(input_ids)}; they must agree")
    ends = StopStrings(tokenizer, stop) if stop else None
    prompts = [
        row[mask.bool()].tolist()
        for row, mask in zip(
            input_ids,
            attention_mask if attention_mask is not None else torch.ones_like(input_ids),
            strict=True,
        )
    ]
    return [
        Request(
            key=str(index),
            draw_key=keys[index]
            if keys is not None
            else hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:16],
            input_ids=prompt,
            max_new_tokens=max_new_tokens,
            prefix=past_key_values[index] if past_key_values is not None else None,
            want_prefix=True,
            sampling=sampling,
            stop=ends,
        )
        for index, prompt in enumerate(prompts)
    ]


def output_of(
    requests: Sequence[Request], completions: Sequence[Completion], pad: int, device: torch.device
) -> GenerateOutput:
    """What `generate` returns, right-padded with `pad`; UserError where a row failed."""
    for completion in completions:
        raise_error(completion)
    sequences = [torch.tensor([*r.input_ids, *c.tokens]) for r, c in zip(requests, completions, strict=True)]
    return GenerateOutput(
        input_ids=torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad).to(device),
        new_token=torch.tensor([len(completion.tokens) for completion in completions]),
        precision_log=[
            [bits for bits, count in c.precision_trace for _ in range(count)] for c in completions
        ],
        precision_trace=[completion.precision_trace for completion in completions],
        past_key_values=[completion.prefix for completion in completions if completion.prefix is not None],
        completions=list(completions),
    )


def raise_error(completion: Completion) -> None:
    """ValueError where the row failed; its text names that class already."""
    if completion.error:
        raise UserError(completion.error.removeprefix("ValueError: "))
