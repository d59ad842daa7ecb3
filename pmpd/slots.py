"""The preallocated KV cache of a batch, and attention over it.

Legend: S slots, n tokens of a forward, Hq query heads, H KV heads, T tokens a slot can hold, D head dim.

A slot holds one sequence, left-aligned: the token at position p lies at index p. A forward is one flat list of tokens (decode: one
token a row, prefill: whole prompts end to end); a `Plan` says which slot and position each token has. Everything in a decoder but
attention treats tokens alike, so models run unchanged on [1, n] tokens: transformers' attention interface hands queries, keys and
values to `attend`, which is the only place where rows and slots matter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache

IMPLEMENTATION = "pmpd_slots"
"""The name under which transformers finds `attend`."""

_active = threading.local()


@dataclass(frozen=True)
class Stretch:
    """Tokens `start:stop` of a prefill forward: positions `offset`... of `slot`."""

    start: int
    stop: int
    slot: int
    offset: int


@dataclass
class Plan:
    """Where the tokens of one forward belong. `stretches` is empty for decode: then every token is a row of its own."""

    slots: Tensor  # int64 [n]
    positions: Tensor  # int64 [n]
    longest: int
    """Keys that the longest row sees, the new token included."""
    used_slots: int
    """All slots of the forward are below this number."""
    stretches: Sequence[Stretch] = ()
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """Decode masks bool [used_slots, 1, 1, longest], by window: all layers share them."""

    def decode_mask(self, window: int | None) -> Tensor:
        if window not in self.masks:
            seen = torch.zeros(self.used_slots, dtype=torch.int64, device=self.slots.device)
            seen[self.slots] = self.positions
            index = torch.arange(self.longest, device=self.slots.device)
            mask = index <= seen[:, None]
            if window is not None:
                mask &= index > seen[:, None] - window
            self.masks[window] = mask[:, None, None, :]
        return self.masks[window]


class SlotCache(Cache):
    """Keys and values [S, H, T, D] of every layer, allocated when a layer first writes."""

    def __init__(self, slots: int, length: int) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.length = length
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.plan: Plan | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new tokens' [1, H, n, D] to their slots and returns the whole layer."""
        assert self.plan is not None
        while len(self.keys) <= layer_idx:
            self.keys.append(self._allocate(key_states))
            self.values.append(self._allocate(value_states))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[self.plan.slots, :, self.plan.positions] = key_states[0].transpose(0, 1)
        values[self.plan.slots, :, self.plan.positions] = value_states[0].transpose(0, 1)
        return keys, values

    def _allocate(self, states: Tensor) -> Tensor:
        return states.new_zeros(self.slots, states.shape[1], self.length, states.shape[3])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are always given explicitly."""
        return 0

    @torch.inference_mode()
    def copy_slot(self, source: int, target: int, length: int) -> None:
        """The first `length` tokens of one slot, to another."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def read_slot(self, slot: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """A copy of the first `length` tokens, per layer keys and values [H, length, D]."""
        return [(k[slot, :, :length].clone(), v[slot, :, :length].clone()) for k, v in zip(self.keys, self.values, strict=True)]

    @torch.inference_mode()
    def write_slot(self, slot: int, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        for index, (keys, values) in enumerate(layers):
            while len(self.keys) <= index:
                self.keys.append(self._allocate(keys[None]))
                self.values.append(self._allocate(values[None]))
            self.keys[index][slot, :, : keys.shape[1]] = keys
            self.values[index][slot, :, : values.shape[1]] = values

    def mean_features(self, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """KV features of one prompt: the last layer's keys and values averaged over KV heads, float32 [length, D] each."""
        return self.keys[-1][slot, :, :length].float().mean(0), self.values[-1][slot, :, :length].float().mean(0)


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface over a `SlotCache`: `query` [1, Hq, n, D], `key`/`value` the layer [S, H, T, D]."""
    if softcap is not None or s_aux is not None:
        raise ValueError(f"{type(module).__name__} is not supported: attention with {'logit soft-capping' if softcap else 'sinks'}")
    plan: Plan = _active.plan
    _active.calls += 1
    if plan.stretches:
        output = _attend_prefill(plan, query, key, value, scaling, sliding_window)
    else:
        output = _attend_decode(plan, query, key, value, scaling, sliding_window)
    return output, None


def _attend_decode(plan: Plan, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    query_nHD = query[0].transpose(0, 1)
    by_slot = query_nHD.new_zeros(plan.used_slots, *query_nHD.shape[1:])
    by_slot[plan.slots] = query_nHD
    output = torch.nn.functional.scaled_dot_product_attention(
        by_slot[:, :, None],
        key[: plan.used_slots, :, : plan.longest],
        value[: plan.used_slots, :, : plan.longest],
        attn_mask=plan.decode_mask(window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[plan.slots, :, 0][None]  # [1, n, Hq, D]


def _attend_prefill(plan: Plan, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for start, stop, slot, offset in ((s.start, s.stop, s.slot, s.offset) for s in plan.stretches):
        seen = offset + stop - start
        mask = None
        if offset > 0 or (window is not None and seen > window):
            distance = torch.arange(offset, seen, device=query.device)[:, None] - torch.arange(seen, device=query.device)
            mask = distance >= 0
            if window is not None:
                mask &= distance < window
        part = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, start:stop],
            key[slot : slot + 1, :, :seen],
            value[slot : slot + 1, :, :seen],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        output[:, start:stop] = part.transpose(1, 2)
    return output


AttentionInterface.register(IMPLEMENTATION, attend)


@contextmanager
def slot_attention(model: PreTrainedModel, cache: SlotCache, plan: Plan) -> Iterator[None]:
    """Inside, `model` attends over the slots of `cache` as `plan` says.

    ValueError where the model's attention does not go through transformers' attention interface once a layer.
    """
    before = model.config._attn_implementation
    model.config._attn_implementation = IMPLEMENTATION
    cache.plan, _active.plan, _active.calls = plan, plan, 0
    try:
        yield
    finally:
        model.config._attn_implementation = before
    if _active.calls != len(cache.keys) or not cache.keys:
        raise ValueError(
            f"models of type {model.config.model_type!r} are not supported: their attention does not go through transformers' "
            f"attention interface ({_active.calls} of {len(cache.keys)} layers did)"
        )
