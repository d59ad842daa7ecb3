"""Lower the precision once the model is sure of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pmpd.errors import UserError
from pmpd.schedulers.base import PrefillState, Scheduler
from pmpd.schedulers.chain import NEVER


class ConfidenceScheduler(Scheduler):
    """Lowers the precision once the model is sure: `patience` forwards in a row with a top probability >=
    `threshold`.

    Each pair counts for itself and starts counting when the pair before it has switched, so two pairs never
    switch at one step. Decoding with it needs the probabilities on the host after every step.
    """

    name = "confidence"
    needs_probability = True

    def __init__(self, precisions: Sequence[int], threshold: float = 0.9, patience: int = 4) -> None:
        super().__init__(precisions)
        if not 0 < threshold <= 1 or patience < 1:
            raise UserError(
                f"threshold {threshold}, patience {patience}: 0 < threshold <= 1 and patience >= 1"
            )
        self.threshold = threshold
        self.patience = patience

    def begin(self, state: PrefillState) -> np.ndarray:
        return np.full((len(state.keys), len(self.precisions) - 1), NEVER, dtype=np.int32)

    def observe(self, switch_steps: np.ndarray, step: np.ndarray, top_probability: np.ndarray) -> None:
        # An open pair keeps its run length k as NEVER - k, so the state of a row stays in its switch_steps.
        for b in range(len(step)):
            open_pairs = np.nonzero(switch_steps[b] > NEVER - self.patience - 1)[0]
            if len(open_pairs) == 0:
                continue
            pair = open_pairs[0]
            run = NEVER - switch_steps[b, pair] + 1 if top_probability[b] >= self.threshold else 0
            switch_steps[b, pair] = step[b] if run >= self.patience else NEVER - run

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "threshold": self.threshold, "patience": self.patience}
