"""What decode loops and forwards over given tokens work with."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pmpd.decode.graph_steps import GraphSteps, Rows
from pmpd.decode.pulse import Pulse
from pmpd.decode.slots import TokenPlaces


class Decoder(Rows, Protocol):
    """What the loop works with: the engine."""

    vocabulary: int
    dtype: torch.dtype
    pulse: Pulse
    sync_every: int
    steps: GraphSteps | None
    prefill_tokens: int
    """Prompt tokens of one prefill forward, at most (a longer prompt runs alone)."""
    told: Tensor
    """`tokens` and, in the last column, `bad`: what the host looks at is one transfer."""

    def forward(self, input_ids: Tensor, places: TokenPlaces, keep: Tensor | None) -> Tensor: ...
