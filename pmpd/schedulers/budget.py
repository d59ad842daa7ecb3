"""The learned scheduler within a bit budget: the user says how many bits on average, and the classifiers say
where they are needed.

Legend: B rows, J pairs of the chain, 4 switch classes.

The classifiers' logits give, for every class k of a pair, the risk that it is below the label: P(label > k).
A class is chosen by risk + multiplier x bits that it costs. One multiplier serves the whole workload (a
Lagrange multiplier of the budget), and is calibrated on the validation prompts of the training: the larger,
the fewer bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pmpd.errors import UserError
from pmpd.schedulers.base import PrefillState, Scheduler, SchedulerEntry
from pmpd.schedulers.chain import FRACTIONS, NUM_CLASSES, check_chain
from pmpd.schedulers.kv_cache import KVCacheScheduler

TOLERANCE = 0.05
"""Bits on average within which a target counts as reached."""

LARGEST = 1e6
"""A multiplier at which every row takes the lowest class, or runs at the lowest precision."""


def risks(scores: np.ndarray) -> np.ndarray:
    """P(label > k) of every class k, [..., 4], from logits [..., 4]."""
    scores = np.asarray(scores, dtype=float)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    above = np.flip(np.cumsum(np.flip(p[..., 1:], -1), -1), -1)
    return np.concatenate([above, np.zeros_like(p[..., :1])], axis=-1)


def choose_classes(
    scores: np.ndarray, chain: Sequence[int], multiplier: float, outputs: str = "logits"
) -> np.ndarray:
    """int [B, J] from logits [B, J, 4]: the class of least risk + multiplier x bits; a tie takes the cheaper
    one. `outputs` "losses": the scores are negative losses in nats, and these take the risk's place."""
    widths = -np.diff(np.asarray(chain, dtype=float))  # [J]: what a decode at the high one costs more
    costs = widths[:, None] * np.asarray(FRACTIONS)  # [J, 4]
    risk = -np.asarray(scores, dtype=float) if outputs == "losses" else risks(scores)
    return (risk + multiplier * costs).argmin(axis=-1)


def plan_bits(classes: np.ndarray, chain: Sequence[int]) -> np.ndarray:
    """Average bits of a decode that runs to its end, [B], for classes int [B, J]. A pair never switches
    before the pair in front of it."""
    ends = np.maximum.accumulate(np.asarray(FRACTIONS)[classes], axis=1)  # [B, J]: share above p_{j+1}
    return chain[-1] + ends @ -np.diff(np.asarray(chain, dtype=float))


@dataclass(frozen=True)
class Calibration:
    """A multiplier, what it was made for, and what it gave on the prompts that it was made on."""

    chain: tuple[int, ...]
    target_bits: float
    multiplier: float
    bits: float
    """Average bits of the calibration prompts."""
    prompts: int

    @property
    def reached(self) -> bool:
        return abs(self.bits - self.target_bits) <= TOLERANCE


def bracket(bits: Callable[[float], float], target_bits: float) -> tuple[float, float]:
    """The smallest multiplier of at most `target_bits` on average, and the next smaller one that takes more:
    (smaller, it), both 0 where no budget is needed. `bits`: of a multiplier, falls as it grows."""
    low, high = 0.0, LARGEST
    if bits(low) <= target_bits:
        high = low
    for _ in range(200):
        middle = (low + high) / 2
        if bits(middle) <= target_bits:
            high = middle
        else:
            low = middle
    return low, high


def calibrate(
    scores: np.ndarray, chain: Sequence[int], target_bits: float, outputs: str = "logits"
) -> Calibration:
    """The smallest multiplier under which these prompts, logits (or negative losses) [B, J, 4], take at most
    `target_bits` on average. ValueError where there are none."""
    chain = check_chain(chain)
    if len(scores) == 0:
        raise UserError("target_bits: there are no validation prompts to calibrate on; label more prompts")

    def bits(multiplier: float) -> float:
        return float(plan_bits(choose_classes(scores, chain, multiplier, outputs), chain).mean())

    _, high = bracket(bits, target_bits)
    return Calibration(chain, target_bits, high, bits(high), len(scores))


class BudgetScheduler(KVCacheScheduler):
    """The KV-cache scheduler within a bit budget. save_dir: an artefact made with `pmpd train
    --target-bits`, which holds the multiplier; multiplier: another one (0 = no budget, so never switch)."""

    name = "budget"
    outputs = ("logits", "losses")

    def __init__(
        self,
        precisions: Sequence[int],
        save_dir: str | Path | None = None,
        multiplier: float | None = None,
    ) -> None:
        super().__init__(precisions, save_dir=save_dir)
        found = self.artefact.config.budget
        if multiplier is None and (found is None or list(found["chain"]) != list(self.precisions)):
            raise UserError(
                f"{self.save_dir}: calibrated for {found['chain'] if found else 'no budget'}, not for "
                f"{list(self.precisions)}; train it with --target-bits and this chain, or give a multiplier"
            )
        if multiplier is not None and not 0 <= multiplier < float("inf"):
            raise UserError(f"multiplier {multiplier}: 0 (never switch) or more")
        self.target_bits: float | None = None
        if multiplier is None and found is not None:
            multiplier, self.target_bits = found["multiplier"], found["target_bits"]
        self.multiplier = float(multiplier or 0)

    def classes(self, state: PrefillState) -> tuple[np.ndarray, np.ndarray]:
        _, scores = super().classes(state)
        finite = np.isfinite(scores).all(-1)
        known = np.where(finite[..., None], scores, 0)
        chosen = choose_classes(known, self.precisions, self.multiplier, self.artefact.config.outputs)
        return np.where(finite, chosen, NUM_CLASSES - 1), scores

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "multiplier": self.multiplier, "target_bits": self.target_bits}


def described(calibration: Calibration) -> dict[str, Any]:
    """As `config.json` of an artefact holds it."""
    return {**asdict(calibration), "chain": list(calibration.chain), "reached": calibration.reached}


def _run_name(scheduler: Scheduler, options: Any) -> str:
    assert isinstance(scheduler, BudgetScheduler)
    if scheduler.target_bits is not None:
        return f"budget-{scheduler.target_bits:g}"
    return f"budget-x{scheduler.multiplier:g}"


ENTRY = SchedulerEntry(BudgetScheduler, run_name=_run_name)
