"""Fixed steps: every row switches at the same decode forwards."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pmpd.errors import UserError
from pmpd.schedulers.base import Decision, PrefillState, Scheduler, SchedulerEntry
from pmpd.schedulers.chain import class_plans


class StaticScheduler(Scheduler):
    """Switches after a fixed number of decode forwards, the same for every row ("naive" in the published
    code).

    `high_bit_steps`: an int for a chain of two; for a longer chain one int per pair, or one int that all
    pairs share as *additional* steps (h, 2h, …), so that every precision gets its turn.

    `published_steps`: as the published code counts. There is one forward more at the high precision (h = 0
    has one too), and one number is the decision of all pairs, so a chain falls from its highest precision to
    its lowest.
    """

    name = "static"

    def __init__(
        self, precisions: Sequence[int], high_bit_steps: int | Sequence[int], published_steps: bool = False
    ) -> None:
        super().__init__(precisions)
        self.published_steps = published_steps
        pairs = len(self.precisions) - 1
        given = (
            [high_bit_steps * (1 if published_steps else j + 1) for j in range(pairs)]
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

    def begin(self, state: PrefillState) -> Decision:
        steps = np.asarray(self.high_bit_steps, dtype=np.int32) + self.published_steps
        return Decision(np.tile(steps, (len(state.keys), 1)))

    def describe(self) -> dict[str, Any]:
        published = {"published_steps": True} if self.published_steps else {}
        return {**super().describe(), "high_bit_steps": list(self.high_bit_steps), **published}


def _run_name(scheduler: Scheduler, options: Mapping[str, Any]) -> str:
    assert isinstance(scheduler, StaticScheduler)
    steps = "/".join(map(str, scheduler.high_bit_steps))
    return f"static-{steps}" + "-published" * scheduler.published_steps


ENTRY = SchedulerEntry(
    StaticScheduler,
    settings=lambda chain, max_new_tokens: [
        {"high_bit_steps": plan} for plan in class_plans(len(chain) - 1, max_new_tokens)
    ],
    run_name=_run_name,
    aliases=("naive",),
)
