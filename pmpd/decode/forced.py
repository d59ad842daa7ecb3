"""Forwards over tokens that are given, whole stretches at a time: prefill and teacher forcing, no decoding.

Rows lie in the slots of an engine's cache, one after the other in one flat forward; nothing but a GPU's
attention pads them. A stretch that is run again, at another precision, overwrites what it had put into the
cache.

Legend: n tokens of the forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pmpd import gpu
from pmpd.decode.decoder import Decoder
from pmpd.decode.slots import Stretch, TokenPlaces, within

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
    return list(forward_flat(engine, rows, bits).split([row.keep for row in rows]))


def forward_flat(engine: Decoder, rows: Sequence[GivenTokens], bits: int | Sequence[int]) -> Tensor:
    """As `forward_given`, the rows' logits end to end."""
    flat, places, ends = lay_out(engine, rows, leftovers=True)
    kept = np.asarray([row.keep for row in rows])
    keep = within(kept) + np.repeat(ends - kept, kept)
    if isinstance(bits, int):
        engine.state.set_uniform(bits)
        engine.pulse.step([bits] * len(rows))
    else:
        engine.state.set_tokens(bits)
        if len(engine.state.segments) > FEW_STRETCHES * len(set(bits)):
            engine.state.gather(engine.device)
        engine.pulse.step([bits[end - 1] for end in ends.tolist()])
    wanted = gpu.to_device(keep if keep.size else np.zeros(1, np.int64), engine.device)
    logits = engine.forward(flat, places, wanted)
    engine.state.gathered = ()
    return logits[: keep.size]


def lay_out(
    engine: Decoder, rows: Sequence[GivenTokens], leftovers: bool
) -> tuple[Tensor, TokenPlaces, np.ndarray]:
    """`rows` end to end: their tokens int64 [n] and places on the engine's device, and the place behind each
    row's last token, int64 [rows]. `leftovers`: see `TokenPlaces`."""
    counts = np.asarray([len(row.ids) for row in rows])
    ends = counts.cumsum()
    positions = within(counts) + np.repeat([row.offset for row in rows], counts)
    flat, slots, at = (
        gpu.to_device(part, engine.device)
        for part in (
            np.concatenate([np.asarray(row.ids, dtype=np.int64) for row in rows]),
            np.repeat([row.slot for row in rows], counts),
            positions,
        )
    )
    stretches = [
        Stretch(end - len(row.ids), end, row.slot, row.offset)
        for row, end in zip(rows, ends.tolist(), strict=True)
    ]
    places = TokenPlaces(
        slots, at, int(positions.max()) + 1, engine.slots, stretches,
        together=engine.device.type == "cuda", leftovers=leftovers,
    )  # fmt: skip
    return flat, places, ends
