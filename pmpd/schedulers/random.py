"""Schedulers that choose a switch class per pair, and the one that draws it: the baseline of every learned
one."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from pmpd.errors import UserError
from pmpd.schedulers.base import Decision, PrefillState, Scheduler, SchedulerEntry
from pmpd.schedulers.chain import NUM_CLASSES, class_steps


class ClassScheduler(Scheduler):
    """Decides one of the four switch classes per row and pair at the decision point; subclasses choose the
    class."""

    @abstractmethod
    def classes(self, state: PrefillState) -> tuple[np.ndarray, np.ndarray | None]:
        """Classes int [B, J] in 0..3, and the scores [B, J, 4] that they were chosen by, if any."""

    def steps(self, max_new_tokens: int) -> tuple[int, ...]:
        """When the four classes switch."""
        return class_steps(max_new_tokens)

    def begin(self, state: PrefillState) -> Decision:
        steps = np.asarray([self.steps(n) for n in state.max_new_tokens], dtype=np.int32)  # [B, 4]
        classes, scores = self.classes(state)
        return Decision(np.take_along_axis(steps, classes, axis=1), classes, scores)


class RandomScheduler(ClassScheduler):
    """A random class per row and pair, uniform or with a `prior` (four weights, or one such list per pair).

    The draw depends on `seed` and the row's key only: not on batch, order or worker.
    """

    name = "random"

    def __init__(
        self,
        precisions: Sequence[int],
        seed: int = 0,
        prior: Sequence[float] | Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__(precisions)
        self.seed = seed
        pairs = len(self.precisions) - 1
        try:
            weights = np.asarray([1] * NUM_CLASSES if prior is None else prior, dtype=float)
        except (TypeError, ValueError):  # lists of different lengths, or not of numbers
            weights = np.empty(0)
        well_formed = weights.shape in ((NUM_CLASSES,), (pairs, NUM_CLASSES)) and np.isfinite(weights).all()
        if not well_formed or (weights < 0).any() or (weights.sum(axis=-1) <= 0).any():
            raise UserError(
                f"prior {prior}: give four weights >= 0 with a positive sum, or one such list for each of "
                f"the {pairs} pair(s)"
            )
        self.prior = np.broadcast_to(weights / weights.sum(axis=-1, keepdims=True), (pairs, NUM_CLASSES))

    def classes(self, state: PrefillState) -> tuple[np.ndarray, None]:
        pairs = range(len(self.prior))
        return np.asarray([[self._draw(key, pair) for pair in pairs] for key in state.keys]), None

    def _draw(self, key: str, pair: int) -> int:
        digest = hashlib.sha256(
            f"{self.seed}/{key}/{self.precisions[pair]}-{self.precisions[pair + 1]}".encode()
        ).digest()
        uniform = int.from_bytes(digest[:8], "big") / 2**64
        return min(int(np.searchsorted(np.cumsum(self.prior[pair]), uniform, side="right")), NUM_CLASSES - 1)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "seed": self.seed, "prior": self.prior.tolist()}


ENTRY = SchedulerEntry(
    RandomScheduler,
    run_name=lambda scheduler, _: f"random-{scheduler.seed}",  # type: ignore[attr-defined]
)
