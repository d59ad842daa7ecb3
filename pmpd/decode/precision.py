"""The precision of every row and forward: what the scheduler decides, and what has been run.

Legend: S slots, n rows of a forward, J pairs of the precision chain.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmpd.schedulers.base import Decision, ObservedRows, PrefillState, Scheduler
from pmpd.schedulers.chain import NEVER, chain_bits

LEAST = -1e4
"""Of a logarithm whose probability is 0 in float32."""


def token_statistics(names: Sequence[str], logits: Tensor) -> Tensor:
    """The `schedulers.base.STATISTICS` called `names` of the distributions that `logits` [n, V] stand for:
    float32 [n, len(names)]."""
    logits = logits.float()
    log_sum = torch.logsumexp(logits, dim=-1)
    columns = []
    for name in names:
        if name == "top_probability":
            columns.append(torch.exp(logits.amax(dim=-1) - log_sum))
        elif name == "margin":
            two = torch.exp(logits.topk(2, dim=-1).values - log_sum[:, None])
            columns.append(two[:, 0] - two[:, 1])
        else:
            assert name == "entropy", name
            log_p = logits.log_softmax(-1).clamp_min_(LEAST)  # 0 x -inf is no number
            columns.append(-logits.softmax(-1).mul_(log_p).sum(-1))
    return torch.stack(columns, dim=1)


@dataclass
class RowDecision:
    """What was decided for one row: `switch_steps` [J], and for schedulers that choose one the classes [J]
    and their scores [J, 4]."""

    switch_steps: np.ndarray
    classes: np.ndarray | None = None
    scores: np.ndarray | None = None
    state: Any = None

    @staticmethod
    def of(decision: Decision, b: int) -> RowDecision:
        """Row `b` of a batch's decision."""
        return RowDecision(
            np.array(decision.switch_steps[b], dtype=np.int32),
            None if decision.classes is None else decision.classes[b],
            None if decision.scores is None else decision.scores[b],
            None if decision.states is None else decision.states[b],
        )


class RowPrecisions:
    """Precisions by slot (NumPy, on the host). A slot's row is in one of three conditions: it waits for its
    decision point (and runs at the highest precision of the chain), the scheduler has decided (and observes
    it), or it follows a given plan."""

    def __init__(self, scheduler: Scheduler | None, prefill_bits: int, slots: int, max_length: int) -> None:
        self.scheduler = scheduler
        self.prefill_bits = prefill_bits
        self.chain = scheduler.precisions if scheduler else (prefill_bits,)
        self.wanted = scheduler.statistics if scheduler else ()
        self.prompt_bits = scheduler.prompt_bits if scheduler and scheduler.decision_step == 0 else ()
        self.log = np.zeros((slots, max_length + 1), dtype=np.int8)
        """[s, i]: precision of the forward that gave new token i."""
        self.switch_steps = np.zeros((slots, len(self.chain) - 1), dtype=np.int32)
        self._next = np.zeros(
            slots, dtype=np.int64
        )  # what an online scheduler answered; 0 = by the switch steps
        self._waits = np.zeros(slots, dtype=bool)
        self._observed = np.zeros(slots, dtype=bool)
        self._decisions: list[RowDecision | None] = [None] * slots

    def start(self, slot: int, plan: Sequence[int] | None) -> None:
        """A row has been prefilled into `slot`. `plan`: given switch steps [J]."""
        self.log[slot, 0] = self.prefill_bits
        self._follow(slot, NEVER if plan is None else plan)
        self._waits[slot] = plan is None and self.scheduler is not None

    def fork(self, source: int, target: int, step: int, plan: Sequence[int]) -> None:
        """`target` shares decode forwards 1..`step` of `source` and goes on by `plan`."""
        self.log[target, : step + 1] = self.log[source, : step + 1]
        self._follow(target, plan)
        self._waits[target] = False

    def _follow(self, slot: int, plan: int | Sequence[int]) -> None:
        self.switch_steps[slot] = plan
        self._next[slot] = 0
        self._observed[slot] = False
        self._decisions[slot] = None

    def bits(self, at: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Precision of decode forward `step` int [n] of the rows in slots `at` int [n]: int [n]."""
        bits = chain_bits(self.chain, self.switch_steps[at], step)
        return np.where(self._next[at] > 0, self._next[at], bits)

    def alike(self, at: np.ndarray, step: np.ndarray) -> int:
        """Decode forwards from `step` int [n] on that the rows in slots `at` int [n] run at the precisions of
        the first, and only after the last of which somebody may have to be asked."""
        scheduler = self.scheduler
        if scheduler is None:
            return NEVER
        if scheduler.observes:
            return 1
        ahead = self.switch_steps[at] - step[:, None]
        to_decide = scheduler.decision_step - step[self._waits[at]]
        return 1 + int(min(ahead[ahead >= 0].min(initial=NEVER), to_decide.min(initial=NEVER)))

    def due(self, at: np.ndarray, step: int | np.ndarray) -> np.ndarray:
        """Those of `at` that are at their decision point, having run decode forward `step` (0: the
        prefill)."""
        if self.scheduler is None:
            return at[:0]
        return at[self._waits[at] & (step == self.scheduler.decision_step)]

    def decide(self, at: np.ndarray, state: PrefillState) -> None:
        """The scheduler decides for the rows in slots `at`, which `state` describes in this order."""
        assert self.scheduler is not None
        decision = self.scheduler.begin(state)
        self.switch_steps[at] = decision.switch_steps
        self._waits[at] = False
        self._observed[at] = self.scheduler.observes
        for b, slot in enumerate(at):
            self._decisions[slot] = RowDecision.of(decision, b)

    def observe(
        self, at: np.ndarray, step: np.ndarray, keys: Sequence[str], statistics: Mapping[str, np.ndarray]
    ) -> None:
        """Shows the scheduler the rows `at` after decode forward `step`, and takes its answer. Rows that it
        does not observe are left out."""
        mine = np.flatnonzero(self._observed[at])
        if len(mine) == 0:
            return
        assert self.scheduler is not None
        at, step = at[mine], step[mine]
        decisions = [self._decisions[slot] for slot in at]
        rows = ObservedRows(
            keys=[keys[index] for index in mine.tolist()],
            step=step,
            bits=self.log[at, step].astype(np.int64),
            switch_steps=self.switch_steps[at],
            states=[decision and decision.state for decision in decisions],
            statistics={name: values[mine] for name, values in statistics.items()},
        )
        answer = self.scheduler.observe(rows)
        self.switch_steps[at] = rows.switch_steps
        for decision, state in zip(decisions, rows.states, strict=True):
            assert decision is not None
            decision.state = state
        if answer is not None:
            self._next[at] = check_bits(self.scheduler, answer)

    def decision(self, slot: int, count: int) -> RowDecision:
        """What was decided for the row, having `count` new tokens. Nothing, where it ended before its
        decision point, or before a scheduler that observes had seen anything."""
        decided = self._decisions[slot]
        unseen = (
            self.scheduler is not None
            and self.scheduler.observes
            and (decided is not None or self._waits[slot])
            and count <= self.scheduler.decision_step + 1
        )
        if self._next[slot] or unseen:  # online: the log says what ran
            return RowDecision(np.zeros(0, dtype=np.int32))
        if decided is not None and self.scheduler is not None and count > self.scheduler.decision_step:
            return RowDecision(self.switch_steps[slot], decided.classes, decided.scores)
        return RowDecision(
            self.switch_steps[slot] if decided is None else np.full_like(self.switch_steps[slot], NEVER)
        )

    def trace(self, slot: int, count: int) -> list[tuple[int, int]]:
        """Run-length (bits, count) of the first `count` new tokens."""
        return run_lengths(self.log[slot, :count].tolist())


def check_bits(scheduler: Scheduler, bits: np.ndarray) -> np.ndarray:
    """What an online scheduler answered. ValueError where it is not of its chain."""
    strange = sorted(set(np.asarray(bits).tolist()) - set(scheduler.precisions))
    if strange:
        raise ValueError(
            f"scheduler {type(scheduler).__name__} answered the precisions {strange}; its chain is "
            f"{list(scheduler.precisions)}"
        )
    return np.asarray(bits)


def run_lengths(bits: Sequence[int]) -> list[tuple[int, int]]:
    return [(value, len(list(group))) for value, group in itertools.groupby(bits)]
