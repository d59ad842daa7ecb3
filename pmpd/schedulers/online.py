"""Watch the decode: lower while the model is sure of its tokens, go back up when it is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pmpd.errors import UserError
from pmpd.schedulers.base import STATISTICS, Decision, ObservedRows, PrefillState, Scheduler, SchedulerEntry
from pmpd.schedulers.chain import NEVER


@dataclass(frozen=True)
class _Row:
    """What is remembered of one row."""

    place: int = 0
    """Place in the chain of the next forward's precision."""
    sure: int = 0
    """Sure forwards in a row."""
    hold: int = 0
    """Forwards that are still to run at the highest precision."""


class OnlineScheduler(Scheduler):
    """One precision down after `patience` sure forwards in a row; up to the highest, for `hold` forwards at
    least, after an unsure one. Between the two thresholds nothing changes (hysteresis). The precision of a
    row may rise.

    `signal`: what doubt is measured by: `entropy` in nats, or 1 - `margin`, or 1 - `top_probability`. A
    forward is sure where the doubt about its token is below `lower_below`, unsure where it is above
    `raise_above`. Decoding with it needs the signal on the host after every step.
    """

    name = "online"

    def __init__(
        self,
        precisions: Sequence[int],
        signal: str = "entropy",
        lower_below: float = 0.5,
        raise_above: float = 2.0,
        patience: int = 2,
        hold: int = 4,
    ) -> None:
        super().__init__(precisions)
        if signal not in STATISTICS:
            raise UserError(f"signal {signal!r}: known are {', '.join(STATISTICS)}")
        if not 0 <= lower_below <= raise_above:
            raise UserError(
                f"lower_below {lower_below}, raise_above {raise_above}: 0 <= lower_below <= raise_above"
            )
        if patience < 1 or hold < 1:
            raise UserError(f"patience {patience}, hold {hold}: at least 1 each")
        self.statistics = (signal,)
        self.signal, self.lower_below, self.raise_above = signal, lower_below, raise_above
        self.patience, self.hold = patience, hold

    def begin(self, state: PrefillState) -> Decision:
        rows = len(state.keys)
        never = np.full((rows, len(self.pairs)), NEVER, dtype=np.int32)
        return Decision(never, states=[_Row()] * rows)

    def observe(self, rows: ObservedRows) -> np.ndarray:
        values = rows.statistics[self.signal]
        doubts = values if self.signal == "entropy" else 1 - values
        rows.states[:] = [self._next(row, doubt) for row, doubt in zip(rows.states, doubts, strict=True)]
        return np.asarray([self.precisions[row.place] for row in rows.states])

    def _next(self, row: _Row, doubt: float) -> _Row:
        if doubt > self.raise_above:
            return _Row(hold=self.hold)
        sure, hold = row.sure + 1 if doubt < self.lower_below else 0, max(0, row.hold - 1)
        if sure < self.patience or hold or row.place == len(self.pairs):
            return _Row(row.place, sure, hold)
        return _Row(row.place + 1)

    def describe(self) -> dict[str, Any]:
        settings = ("signal", "lower_below", "raise_above", "patience", "hold")
        return {**super().describe(), **{name: getattr(self, name) for name in settings}}


ENTRY = SchedulerEntry(OnlineScheduler)
