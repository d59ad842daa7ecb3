"""Fixed steps: every row switches at the same decode forwards."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from pmpd.errors import UserError
from pmpd.schedulers.base import PrefillState, Scheduler


class StaticScheduler(Scheduler):
    """Switches after a fixed number of decode forwards, the same for every row ("naive" in the published
    code).

    `high_bit_steps`: an int for a chain of two; for a longer chain one int per pair, or one int that all
    pairs share as *additional* steps (h, 2h, …), so that every precision gets its turn.
    """

    name = "static"

    def __init__(self, precisions: Sequence[int], high_bit_steps: int | Sequence[int]) -> None:
        super().__init__(precisions)
        pairs = len(self.precisions) - 1
        given = (
            [high_bit_steps * (j + 1) for j in range(pairs)]
            if isinstance(high_bit_steps, int | np.integer)
            else high_bit_steps
        )
        try:
            steps = tuple(operator.index(step) for step in given)
        except TypeError:  # not a list, or not of integers
            steps = ()
        if len(steps) != pairs or min(steps) < 0:
            raise UserError(
                f"high_bit_steps {high_bit_steps}: the chain {list(self.precisions)} has {pairs} pair(s); "
                "give one whole number of decode forwards >= 0, or one per pair"
            )
        self.high_bit_steps = steps

    def begin(self, state: PrefillState) -> np.ndarray:
        return np.tile(np.asarray(self.high_bit_steps, dtype=np.int32), (len(state.keys), 1))

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "high_bit_steps": list(self.high_bit_steps)}
