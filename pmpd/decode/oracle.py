"""The same semantics as the engine, at batch 1, written to be read. Tests compare the engine with it, token
by token.

One prompt, one plain transformers model with its own cache, one forward a token; every rule of the vocabulary
on one page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from pmpd.decode.prompt_state import described, probe_offset
from pmpd.decode.requests import GREEDY, Sampling
from pmpd.decode.sampling import draw
from pmpd.schedulers.base import ObservedRows, PrefillState, PromptState, Scheduler
from pmpd.schedulers.chain import NEVER, chain_bits
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
    sampling: Sampling = GREEDY,
    stop: Callable[[Sequence[int]], bool] | None = None,
) -> Trajectory:
    """Decodes one prompt. `switch_steps` overrides the scheduler's decision; no scheduler: all at
    `prefill_bits`."""
    state = shared_state(model)
    cache = DynamicCache(config=model.config)
    kept = {cache_argument(model): cache}

    def forward(ids: Sequence[int], precision: int) -> torch.Tensor:  # logits [V] after the last of `ids`
        state.set_uniform(precision)
        return model(torch.tensor([list(ids)], device=model.device), use_cache=True, **kept).logits[0, -1]

    chain = scheduler.precisions if scheduler else (prefill_bits,)
    steps = np.full((1, len(chain) - 1), NEVER if switch_steps is None else switch_steps, dtype=np.int32)
    decides = scheduler is not None and switch_steps is None
    states: list[Any] = [None]
    answer: np.ndarray | None = None  # of an online scheduler: the precision of the next forward

    logits = forward(input_ids, prefill_bits)
    tokens, bits = [next_token(logits, input_ids, [], sampling, key)], [prefill_bits]
    for t in range(max_new_tokens):  # decode forward t consumes new token t and gives new token t+1
        if t > 0:
            if tokens[-1] in eos_token_ids or (stop is not None and stop(tokens)):
                break
            precision = int(chain_bits(chain, steps, np.asarray([t]))[0] if answer is None else answer[0])
            logits = forward(tokens[-1:], precision)
            tokens.append(next_token(logits, input_ids, tokens, sampling, key))
            bits.append(precision)
        if scheduler is None or not decides:
            continue
        seen = {name: np.asarray([value]) for name, value in statistics(logits, scheduler.statistics).items()}
        if t == scheduler.decision_step:
            at_once, prompts = partial(_features, cache), partial(_prompt_states, model, input_ids)
            decision = scheduler.begin(
                PrefillState([key], [max_new_tokens], [len(input_ids)], at_once, seen, prompts)
            )
            steps = np.asarray(decision.switch_steps, dtype=np.int32)
            states = [None] if decision.states is None else list(decision.states)
        elif t > scheduler.decision_step:
            rows = ObservedRows([key], np.asarray([t]), np.asarray(bits[-1:]), steps, states, seen)
            answer = scheduler.observe(rows)
    return Trajectory(tokens, bits, [int(step) for step in steps[0]])


def next_token(
    logits: torch.Tensor, prompt: Sequence[int], new: Sequence[int], sampling: Sampling, key: str
) -> int:
    """The token after `prompt` and `new`, of which there are `len(new)`: one rule after the other."""
    scores = logits.double().tolist()
    for token in {*prompt, *new} if sampling.repetition_penalty != 1 else ():
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    ranked = sorted(range(len(scores)), key=lambda token: -scores[token])
    if sampling.temperature == 0:
        return ranked[0]
    top = scores[ranked[0]]
    weights = {token: math.exp((scores[token] - top) / sampling.temperature) for token in ranked}
    kept = ranked[: sampling.top_k or None]
    total, together = sum(weights[token] for token in kept), 0.0
    for count, token in enumerate(kept, start=1):
        together += weights[token]
        if together >= sampling.top_p * total:
            kept = kept[:count]
            break
    left = draw(sampling.seed, key, len(new)) * sum(weights[token] for token in kept)
    for token in sorted(kept):
        left -= weights[token]
        if left < 0:
            return token
    return max(kept)


def statistics(logits: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """Those of `schedulers.base.STATISTICS` asked for, of one distribution."""
    p = torch.softmax(logits.float(), -1)
    first, second = p.topk(2).values.tolist()
    known = {
        "top_probability": first,
        "margin": first - second,
        "entropy": float(torch.special.entr(p).sum()),
    }
    return {name: known[name] for name in names}


def _prompt_states(
    model: PreTrainedModel, input_ids: Sequence[int], precisions: Sequence[int]
) -> list[PromptState]:
    """The state of the prompt: what comes before the probe at the first precision, the probe at each."""
    state, offset, logits = shared_state(model), probe_offset(len(input_ids)), {}
    for bits in precisions:
        kept = {cache_argument(model): DynamicCache(config=model.config)}
        for ids, precision in ((input_ids[:offset], precisions[0]), (input_ids[offset:], bits)):
            if len(ids):
                state.set_uniform(precision)
                output = model(torch.tensor([list(ids)], device=model.device), use_cache=True, **kept)
        logits[bits] = output.logits[0]
    high = logits.pop(precisions[0])
    return described([input_ids[offset:]], [high], {bits: [low] for bits, low in logits.items()})


def _features(cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The last layer's keys and values so far, averaged over KV heads: [1, T, D] each, and T."""
    last = cache.layers[-1]
    assert isinstance(last, CacheLayerMixin)
    assert last.keys is not None
    assert last.values is not None
    keys, values = last.keys[0].float().mean(0), last.values[0].float().mean(0)
    return keys[None], values[None], torch.tensor([len(keys)])
