"""Lower the precision once the model is sure of its tokens."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pmpd.errors import UserError
from pmpd.schedulers.base import Decision, ObservedRows, PrefillState, Scheduler, SchedulerEntry
from pmpd.schedulers.chain import NEVER


@dataclass
class _State:
    """Of a row."""

    sure: int = 0
    """Sure forwards in a row, up to now."""
    first: list[float] = field(default_factory=list)
    """The row's first scores, where the threshold follows from them."""


class ConfidenceScheduler(Scheduler):
    """Lowers the precision once the model is sure: `patience` forwards in a row with a top probability >=
    `threshold`.

    Each pair counts for itself and starts counting when the pair before it has switched, so two pairs never
    switch at one step. Decoding with it needs the probabilities on the host after every step.

    `calibration` n above 0: the published threshold, each row's own: mean plus one standard deviation of its
    first n scores. Nothing is sure before they are there, and `threshold` is not used.
    """

    name = "confidence"
    statistics = ("top_probability",)

    def __init__(
        self, precisions: Sequence[int], threshold: float = 0.9, patience: int = 4, calibration: int = 0
    ) -> None:
        super().__init__(precisions)
        if not 0 < threshold <= 1 or patience < 1 or calibration < 0:
            raise UserError(
                f"threshold {threshold}, patience {patience}, calibration {calibration}: 0 < threshold <= 1, "
                f"patience >= 1 and calibration >= 0"
            )
        self.threshold = threshold
        self.patience = patience
        self.calibration = calibration

    def begin(self, state: PrefillState) -> Decision:
        rows = len(state.keys)
        never = np.full((rows, len(self.precisions) - 1), NEVER, dtype=np.int32)
        return Decision(never, states=[_State() for _ in range(rows)])

    def observe(self, rows: ObservedRows) -> None:
        for b, probability in enumerate(rows.statistics["top_probability"]):
            state = rows.states[b]
            state.sure = state.sure + 1 if self._is_sure(state, float(probability)) else 0
            open_pairs = np.flatnonzero(rows.switch_steps[b] == NEVER)
            if state.sure >= self.patience and len(open_pairs):
                rows.switch_steps[b, open_pairs[0]] = rows.step[b]
                state.sure = 0

    def _is_sure(self, state: _State, probability: float) -> bool:
        if not self.calibration:
            return probability >= self.threshold
        if len(state.first) < self.calibration:
            state.first.append(probability)
            return False
        return probability >= statistics.fmean(state.first) + statistics.pstdev(state.first)

    def describe(self) -> dict[str, Any]:
        own = {"calibration": self.calibration} if self.calibration else {"threshold": self.threshold}
        return {**super().describe(), **own, "patience": self.patience}


def _run_name(scheduler: Any) -> str:
    threshold = f"first{scheduler.calibration}" if scheduler.calibration else f"{scheduler.threshold:g}"
    return f"confidence-{threshold}x{scheduler.patience}"


ENTRY = SchedulerEntry(
    ConfidenceScheduler,
    run_name=lambda scheduler, _: _run_name(scheduler),
)
