"""The preallocated KV cache of a batch, and attention over it.

Legend: S slots, n tokens of a forward, Hq query heads, H KV heads, T tokens a slot can hold, D head dim.

A slot holds one sequence, left-aligned: the token at position p lies at index p. A forward is one flat list
of tokens (decode: one token a row, prefill: whole prompts end to end); `TokenPlaces` say which slot and
position each token has. Everything in a decoder but attention treats tokens alike, so models run unchanged
on [1, n] tokens: transformers' attention interface hands queries, keys and values to `attend`, which is the
only place where rows and slots matter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache

from pmpd import gpu
from pmpd.errors import UserError
from pmpd.kernels import dispatch

NEVER = 1 << 40
"""In place of a row's first new token whose logits were not finite."""

IMPLEMENTATION = "pmpd_slots"
"""The name under which transformers finds `attend`."""

MASK_ALIGNMENT = 16
"""PyTorch copies a mask whose rows are no multiple of so many keys, in every layer."""

BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of PyTorch's attention. Not cuDNN's, which makes a plan for every new shape: no two prefills are alike."""

_active = threading.local()


def within(counts: np.ndarray) -> np.ndarray:
    """0, 1, … of each of several stretches of `counts` int [n], end to end: int64 [sum]."""
    return np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)


@dataclass(frozen=True)
class Stretch:
    """Tokens `start:stop` of a prefill forward: positions `offset`... of `slot`."""

    start: int
    stop: int
    slot: int
    offset: int


class PaddedStretches(NamedTuple):
    """B stretches of a prefill forward of n tokens, the longest of L tokens."""

    slots: Tensor  # int64 [B]
    offsets: Tensor  # int64 [B]
    seen: Tensor  # int64 [B]: keys that a stretch's last token sees
    tokens: Tensor  # int64 [B, L]: places in the forward, a stretch's last one again behind its end
    row: Tensor  # int64 [n]
    column: Tensor  # int64 [n]: place within the stretch
    longest: int
    """Keys that any token sees."""
    begun: bool
    """Whether some are not whole prompts."""


@dataclass
class TokenPlaces:
    """Where the tokens of one forward belong. `stretches` is empty for decode: then every token is a row of
    its own."""

    slots: Tensor  # int64 [n]
    positions: Tensor  # int64 [n]
    longest: int
    """Keys that the longest row sees, the new token included."""
    used_slots: int
    """All slots of the forward are below this number."""
    stretches: Sequence[Stretch] = ()
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """Decode masks bool [used_slots, 1, 1, longest], by window: all layers share them."""
    together: bool = False
    """The stretches of a prefill are one attention a layer where padding them does not double the tokens: a
    launch costs a GPU's host more than the padding."""
    leftovers: bool = False
    """Behind a row's end its slot may hold what is not finite: of rows before it that nobody cleared."""
    stretch_masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)
    """Prefill masks bool [tokens, seen], by offset, tokens seen and window, likewise."""
    padded_masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    """Of the stretches together, by keys and window."""

    @cached_property
    def lengths(self) -> Tensor:
        """Keys that each row of a decode forward sees: int64 [n]."""
        return self.positions + 1

    @cached_property
    def padded(self) -> PaddedStretches | None:
        """The stretches as one batch; None where they are not to be `together`, or too unlike."""
        starts, stops, slots, offsets = (
            np.asarray([getattr(stretch, name) for stretch in self.stretches])
            for name in ("start", "stop", "slot", "offset")
        )
        lengths = stops - starts
        if not self.together or lengths.size * lengths.max() > 2 * lengths.sum():
            return None
        seen = offsets + lengths
        tokens = starts[:, None] + np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)
        row = np.repeat(np.arange(lengths.size), lengths)
        parts = (slots, offsets, seen, tokens, row, within(lengths))
        whole = gpu.to_device(np.concatenate([part.ravel() for part in parts]), self.slots.device)
        cut = whole.split([part.size for part in parts])
        at, first, last, places, of, columns = (
            some.view(part.shape) for some, part in zip(cut, parts, strict=True)
        )
        return PaddedStretches(at, first, last, places, of, columns, int(seen.max()), bool(offsets.any()))

    def padded_mask(self, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of the padded stretches' tokens [B, 1, L, keys]: 0 or -inf."""
        if (keys, window) not in self.padded_masks:
            stretches = self.padded
            assert stretches is not None
            column, index = (
                torch.arange(count, device=self.slots.device) for count in (stretches.tokens.shape[1], keys)
            )
            at = stretches.offsets[:, None] + column
            hidden = index > at[..., None]
            if window is not None:
                hidden |= index <= at[..., None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=self.slots.device)
            self.padded_masks[keys, window] = mask.masked_fill_(hidden, float("-inf"))[:, None]
        return self.padded_masks[keys, window]

    def stretch_mask(self, stretch: Stretch, window: int | None) -> Tensor:
        """Which of the tokens up to a stretch's end each of its tokens sees."""
        seen = stretch.offset + stretch.stop - stretch.start
        key = stretch.offset, seen, window
        if key not in self.stretch_masks:
            device = self.slots.device
            distance = torch.arange(stretch.offset, seen, device=device)[:, None] - torch.arange(
                seen, device=device
            )
            mask = distance >= 0
            if window is not None:
                mask &= distance < window
            self.stretch_masks[key] = mask
        return self.stretch_masks[key]

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
    """Keys and values [S, H, T, D] of every layer, allocated when a layer first writes: for up to
    `layers_together` layers that are alike as one block, so that copying a slot is one launch for all."""

    def __init__(self, slots: int, length: int, layers_together: int = 1) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.length = length
        self.layers_together = layers_together
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._blocks: list[tuple[Tensor, Tensor]] = []  # [L, S, H, T, D]; `keys` and `values` are views
        self._free_layers: list[tuple[Tensor, Tensor]] = []  # of the last block
        self.places: TokenPlaces | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes the new tokens' [1, H, n, D] to their slots and returns the whole layer."""
        return self.write(key_states[0].transpose(0, 1), value_states[0].transpose(0, 1), layer_idx)

    def write(self, new_keys: Tensor, new_values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Writes the new tokens' [n, H, D] to their slots and returns the whole layer's keys and values."""
        assert self.places is not None
        self.allocate(layer, new_keys, new_values)
        keys, values = self.keys[layer], self.values[layer]
        keys[self.places.slots, :, self.places.positions] = new_keys
        values[self.places.slots, :, self.places.positions] = new_values
        return keys, values

    def allocate(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Makes layers up to `layer` that hold heads like these [n, H, D]."""
        while len(self.keys) <= layer:
            shapes = [(self.slots, heads.shape[1], self.length, heads.shape[2]) for heads in (keys, values)]
            if not self._free_layers or [part.shape for part in self._free_layers[0]] != shapes:
                count = max(1, self.layers_together - len(self.keys))
                block = keys.new_zeros(count, *shapes[0]), values.new_zeros(count, *shapes[1])
                self._blocks.append(block)
                self._free_layers = list(zip(*block, strict=True))
            own_keys, own_values = self._free_layers.pop(0)
            self.keys.append(own_keys)
            self.values.append(own_values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are always given explicitly."""
        return 0

    @torch.inference_mode()
    def copy_slots(self, sources: Tensor, targets: Tensor, lengths: Tensor, longest: int) -> None:
        """The first `lengths` int64 [n] tokens, at most `longest`, of the slots `sources` int64 [n], to
        `targets` int64 [n], none of which is a source; behind them zeros, up to `longest`: what a source has
        there may not be finite."""
        behind = torch.arange(longest, device=lengths.device) >= lengths[:, None]
        for block in self._blocks:
            for tensor in block:
                copied = tensor[:, sources, :, :longest]
                tensor[:, targets, :, :longest] = copied.masked_fill_(behind[:, None, :, None], 0)

    @torch.inference_mode()
    def clear_tokens(self, slots: Tensor, positions: Tensor) -> None:
        """Zeros at `positions` int64 [n] of `slots` int64 [n]: what is not finite would reach the slot's next
        row through the mask (NaN plus -inf is NaN)."""
        for block in self._blocks:
            for tensor in block:
                tensor[:, slots, :, positions] = tensor.new_zeros(())  # a 0 would be sent, and waited for

    def read_slot(self, slot: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """A copy of the first `length` tokens, per layer keys and values [H, length, D]."""
        return [
            (k[slot, :, :length].clone(), v[slot, :, :length].clone())
            for k, v in zip(self.keys, self.values, strict=True)
        ]

    @torch.inference_mode()
    def write_slot(self, slot: int, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        for index, (keys, values) in enumerate(layers):
            self.allocate(index, keys.transpose(0, 1), values.transpose(0, 1))
            self.keys[index][slot, :, : keys.shape[1]] = keys
            self.values[index][slot, :, : values.shape[1]] = values

    def read_tokens(self, slots: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A copy of the tokens at `positions` int64 [n] of `slots` int64 [n]: keys and values [n, L, H, D] of
        each block of layers."""
        return [(k[:, slots, :, positions], v[:, slots, :, positions]) for k, v in self._blocks]

    @torch.inference_mode()
    def write_tokens(self, slots: Tensor, positions: Tensor, kept: Sequence[tuple[Tensor, Tensor]]) -> None:
        """What `read_tokens` gave, back in its place."""
        for (keys, values), (own_keys, own_values) in zip(self._blocks, kept, strict=True):
            keys[:, slots, :, positions] = own_keys
            values[:, slots, :, positions] = own_values

    def token_features(self, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """KV features of the tokens at `positions` int64 [n] of `slots` int64 [n]: the last layer's keys and
        values averaged over KV heads, float32 [n, D] each."""
        keys, values = (part[-1][slots, :, positions].float().mean(1) for part in (self.keys, self.values))
        return keys, values

    def send_features(
        self, slots: Sequence[int], lengths: Sequence[int], device: torch.device
    ) -> list[Callable[[], tuple[np.ndarray, np.ndarray]]]:
        """Sends for `token_features` of the first `lengths` tokens of `slots`, all in one transfer. Of each
        slot what waits for its own: keys and values, float16 [T, D]."""
        where = gpu.to_device(np.stack([np.repeat(slots, lengths), within(np.asarray(lengths))]), device)
        keys, values = self.token_features(*where)
        arrived, width = gpu.to_host(torch.cat([keys, values], 1).half()), keys.shape[1]
        stops = np.cumsum(lengths).tolist()
        parts = (slice(stop - length, stop) for stop, length in zip(stops, lengths, strict=True))
        return [partial(_halves, arrived, part, width) for part in parts]

    def mean_features(self, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """`token_features` of the first `length` tokens of one slot."""
        positions = torch.arange(length, device=self.keys[-1].device)
        return self.token_features(torch.full_like(positions, slot), positions)


def _halves(arrived: Callable[[], np.ndarray], rows: slice, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Of `rows`, the first `width` columns and the others: copies, which hold nobody else's."""
    whole = arrived()[rows]
    return whole[:, :width].copy(), whole[:, width:].copy()


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface over a `SlotCache`: `query` [1, Hq, n, D], `key`/`value` the layer
    [S, H, T, D]."""
    if softcap is not None or s_aux is not None:
        raise UserError(
            f"{type(module).__name__} is not supported: attention with "
            f"{'logit soft-capping' if softcap else 'sinks'}"
        )
    if not getattr(module, "is_causal", True):
        raise UserError(
            f"{type(module).__name__} is not supported: tokens attend to later ones, so no cache can be "
            f"continued"
        )
    _active.calls += 1
    return attend_slots(_active.places, query[0].transpose(0, 1), key, value, scaling, sliding_window)[
        None
    ], None


def attend_slots(
    places: TokenPlaces,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attention of the forward's tokens `query` [n, Hq, D] over their own slots of a layer [S, H, T, D]: [n,
    Hq, D]."""
    if places.stretches:
        return _attend_prefill(places, query, keys, values, scaling, window)
    return _attend_decode(places, query, keys, values, scaling, window)


def _attend_decode(
    places: TokenPlaces,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    native = (
        dispatch.native_attention(query.device, query.dtype, query.shape[2])
        if values.shape == keys.shape
        else None
    )
    if native is not None:
        scale = query.shape[2] ** -0.5 if scaling is None else scaling
        return native(query, keys, values, places.slots, places.lengths, scale, window)
    by_slot = query.new_zeros(places.used_slots, *query.shape[1:])
    by_slot[places.slots] = query
    output = torch.nn.functional.scaled_dot_product_attention(
        by_slot[:, :, None],
        keys[: places.used_slots, :, : places.longest],
        values[: places.used_slots, :, : places.longest],
        attn_mask=places.decode_mask(window),
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return output[places.slots, :, 0]


def _attend_prefill(
    places: TokenPlaces,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    if places.padded is not None:
        return _attend_padded(places, places.padded, query, keys, values, scaling, window)
    output = query.new_empty(*query.shape[:2], values.shape[3])
    for stretch in places.stretches:
        seen = stretch.offset + stretch.stop - stretch.start
        mask = None
        if stretch.offset > 0 or (window is not None and seen > window):
            mask = places.stretch_mask(stretch, window)
        part = torch.nn.functional.scaled_dot_product_attention(
            query[stretch.start : stretch.stop].transpose(0, 1)[None],
            keys[stretch.slot : stretch.slot + 1, :, :seen],
            values[stretch.slot : stretch.slot + 1, :, :seen],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
        output[stretch.start : stretch.stop] = part[0].transpose(0, 1)
    return output


def _attend_padded(
    places: TokenPlaces,
    stretches: PaddedStretches,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    group, length, mask = query.shape[1] // keys.shape[1], stretches.longest, None
    if stretches.begun or (window is not None and length > window):
        length = min(-(-length // MASK_ALIGNMENT) * MASK_ALIGNMENT, keys.shape[2])
        mask = places.padded_mask(length, window, query.dtype)
    own_keys, own_values = (part[stretches.slots, :, :length] for part in (keys, values))
    if places.leftovers:
        behind = torch.arange(length, device=keys.device) >= stretches.seen[:, None]
        for part in (own_keys, own_values):
            part.masked_fill_(behind[:, None, :, None], 0)
    if mask is not None and group > 1:  # with a mask only the slow one of PyTorch's attentions shares heads
        own_keys, own_values = (part.repeat_interleave(group, dim=1) for part in (own_keys, own_values))
    whole = torch.nn.functional.scaled_dot_product_attention(
        query[stretches.tokens].transpose(1, 2),
        own_keys,
        own_values,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=mask is None and group > 1,
    )
    return whole[stretches.row, :, stretches.column]


AttentionInterface.register(IMPLEMENTATION, attend)


@contextmanager
def slot_attention(model: PreTrainedModel, cache: SlotCache, places: TokenPlaces) -> Iterator[None]:
    """Inside, `model` attends over the slots of `cache` as `places` says.

    ValueError where the model's attention does not go through transformers' attention interface once a layer.
    """
    before = model.config._attn_implementation
    model.config._attn_implementation = IMPLEMENTATION
    cache.places, _active.places, _active.calls = places, places, 0
    try:
        with sdpa_kernel(BACKENDS):
            yield
    finally:
        model.config._attn_implementation = before
    if _active.calls != len(cache.keys) or not cache.keys:
        raise UserError(
            f"models of type {model.config.model_type!r} are not supported: their attention does not go "
            f"through transformers' "
            f"attention interface ({_active.calls} of {len(cache.keys)} layers did)"
        )
