"""The same semantics as the engine, at batch 1, written to be read. Tests compare the engine with it, token
by token.

One prompt, one plain transformers model with its own cache, one forward a token; every rule of the vocabulary
on one page.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from pmpd.schedulers.base import PrefillState, Scheduler
from pmpd.schedulers.chain import chain_bits
from pmpd.weights.base import cache_argument, shared_state


@dataclass
class Trajectory:
    """`tokens` incl. the end-of-sequence token; `bits` of the forward that produced each; the `switch_steps`
    [J] decided."""

    tokens: list[int]
    bits: list[int]
    switch_steps: list[int]


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    input_ids: Sequence[int],
    max_new_tokens: int,
    prefill_bits: int,
    eos_token_ids: Collection[int],
    scheduler: Scheduler | None = None,
    switch_steps: Sequence[int] | None = None,
    key: str = "",
) -> Trajectory:
    """Greedy decoding of one prompt. `switch_steps` overrides the scheduler's decision; no scheduler: all at
    `prefill_bits`."""
    state = shared_state(model)
    cache = DynamicCache(config=model.config)
    kept = {cache_argument(model): cache}

    state.set_uniform(prefill_bits)
    logits = model(torch.tensor([list(input_ids)], device=model.device), use_cache=True, **kept).logits[0, -1]
    tokens, bits = [int(logits.argmax())], [prefill_bits]

    steps: np.ndarray = np.zeros((1, 0), dtype=np.int32)
    if scheduler is not None:
        if switch_steps is not None:
            steps = np.asarray([switch_steps], dtype=np.int32)
        else:
            steps = scheduler.begin(_decision_state(cache, key, len(input_ids), max_new_tokens, logits))
    chain = scheduler.precisions if scheduler else (prefill_bits,)

    for t in range(1, max_new_tokens):  # decode forward t consumes new token t and gives new token t+1
        if tokens[-1] in eos_token_ids:
            break
        precision = int(chain_bits(chain, steps, np.asarray([t]))[0])
        state.set_uniform(precision)
        logits = model(torch.tensor([[tokens[-1]]], device=model.device), use_cache=True, **kept).logits[
            0, -1
        ]
        tokens.append(int(logits.argmax()))
        bits.append(precision)
        if scheduler is not None:
            scheduler.observe(
                steps, np.asarray([t]), np.asarray([float(torch.softmax(logits.float(), -1).max())])
            )
    return Trajectory(tokens, bits, [int(step) for step in steps[0]])


def _decision_state(
    cache: DynamicCache, key: str, prompt_length: int, max_new_tokens: int, logits: torch.Tensor
) -> PrefillState:
    last = cache.layers[-1]
    assert isinstance(last, CacheLayerMixin)
    assert last.keys is not None
    assert last.values is not None
    keys, values = last.keys[0].float().mean(0), last.values[0].float().mean(0)  # over KV heads: [T, D]
    return PrefillState(
        keys=[key],
        max_new_tokens=[max_new_tokens],
        prompt_lengths=[prompt_length],
        features=lambda: (keys[None], values[None], torch.tensor([prompt_length])),
        top_probability=torch.softmax(logits.float(), -1).max()[None],
    )
