"""Forwards over tokens that are given, whole stretches at a time: prefill and teacher forcing, no decoding.

Rows lie in the slots of an engine's cache, one after the other in one flat forward, so nothing is padded. A
stretch that is run again, at another precision, overwrites what it had put into the cache.

Legend: n tokens of the forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pmpd.decode.decoder import Decoder
from pmpd.decode.slots import Stretch, TokenPlaces

FEW_STRETCHES = 8
"""Of one precision: from more on, its tokens are multiplied together."""


@dataclass(frozen=True)
class GivenTokens:
    """Tokens `ids` of the row in `slot`, at positions `offset`…, whose `keep` last logits are wanted."""

    slot: int
    offset: int
    ids: Sequence[int]
    keep: int = 0


def forward_given(engine: Decoder, rows: Sequence[GivenTokens], bits: int | Sequence[int]) -> list[Tensor]:
    """One forward over all `rows`: of each the logits [keep, V] after its last `keep` tokens, on the engine's
    device. `bits`: one precision for all, or one for each token, rows end to end.

    A row's tokens before its offset must be in its slot already, by an earlier call.
    """
    flat = [token for row in rows for token in row.ids]
    slots = [row.slot for row in rows for _ in row.ids]
    positions = [row.offset + index for row in rows for index in range(len(row.ids))]
    ends = np.cumsum([len(row.ids) for row in rows]).tolist()
    stretches = [
        Stretch(end - len(row.ids), end, row.slot, row.offset) for row, end in zip(rows, ends, strict=True)
    ]
    keep = [index for row, end in zip(rows, ends, strict=True) for index in range(end - row.keep, end)]

    def tensor(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=engine.device)

    if isinstance(bits, int):
        engine.state.set_uniform(bits)
        engine.pulse.step([bits] * len(rows))
    else:
        engine.state.set_tokens(bits)
        if len(engine.state.segments) > FEW_STRETCHES * len(set(bits)):
            engine.state.gather(engine.device)
        engine.pulse.step([bits[end - 1] for end in ends])
    places = TokenPlaces(tensor(slots), tensor(positions), max(positions) + 1, engine.slots, stretches)
    logits = engine.forward(tensor(flat), places, tensor(keep or [0]))
    engine.state.gathered = ()
    return list(logits[: len(keep)].split([row.keep for row in rows]))
