"""Lower the precision once the model is sure of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pmpd.errors import UserError
from pmpd.schedulers.base import Decision, ObservedRows, PrefillState, Scheduler, SchedulerEntry
from pmpd.schedulers.chain import NEVER


class ConfidenceScheduler(Scheduler):
    """Lowers the precision once the model is sure: `patience` forwards in a row with a top probability >=
    `threshold`.

    Each pair counts for itself and starts counting when the pair before it has switched, so two pairs never
    switch at one step. Decoding with it needs the probabilities on the host after every step.
    """

    name = "confidence"
    statistics = ("top_probability",)

    def __init__(self, precisions: Sequence[int], threshold: float = 0.9, patience: int = 4) -> None:
        super().__init__(precisions)
        if not 0 < threshold <= 1 or patience < 1:
            raise UserError(
                f"threshold {threshold}, patience {patience}: 0 < threshold <= 1 and patience >= 1"
            )
        self.threshold = threshold
        self.patience = patience

    def begin(self, state: PrefillState) -> Decision:
        rows = len(state.keys)
        never = np.full((rows, len(self.precisions) - 1), NEVER, dtype=np.int32)
        return Decision(never, states=[0] * rows)  # a row's state: sure forwards in a row, up to now

    def observe(self, rows: ObservedRows) -> None:
        for b, probability in enumerate(rows.statistics["top_probability"]):
            rows.states[b] = rows.states[b] + 1 if probability >= self.threshold else 0
            open_pairs = np.flatnonzero(rows.switch_steps[b] == NEVER)
            if rows.states[b] >= self.patience and len(open_pairs):
                rows.switch_steps[b, open_pairs[0]] = rows.step[b]
                rows.states[b] = 0

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "threshold": self.threshold, "patience": self.patience}


ENTRY = SchedulerEntry(
    ConfidenceScheduler,
    run_name=lambda scheduler, _: f"confidence-{scheduler.threshold:g}x{scheduler.patience}",  # type: ignore[attr-defined]
)
