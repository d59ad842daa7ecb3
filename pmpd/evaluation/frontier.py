"""The frontier of the static plans, and whether a policy lies below it: loss at equal measured bits.

Legend: N prompts, C precisions, M decode forwards, P plans, G points of the frontier, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pmpd.errors import UserError
from pmpd.evaluation.curve_set import Outcome
from pmpd.metrics.bootstrap import bootstrap_weights, interval


def lower_hull(bits: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Positions of the points [P] on the lower left convex hull, by rising bits; loss falls along it."""
    order = np.lexsort((loss, bits))
    hull: list[int] = []
    for point in order:
        if hull and loss[point] >= loss[hull[-1]]:
            continue
        while len(hull) >= 2 and _above(bits, loss, hull[-2], hull[-1], point):
            hull.pop()
        if hull and bits[point] == bits[hull[-1]]:
            hull.pop()
        hull.append(int(point))
    return np.asarray(hull)


def _above(bits: np.ndarray, loss: np.ndarray, a: int, b: int, c: int) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (loss[b] - loss[a]) * (bits[c] - bits[a]) >= (loss[c] - loss[a]) * (bits[b] - bits[a])


def mix_for(bits: Sequence[float], target: float) -> tuple[int, int, float]:
    """(first, second, share of the second): two neighbours of these rising bits whose mix has `target` bits.
    A target outside of them is the nearest end."""
    at = int(np.clip(np.searchsorted(bits, target), 1, len(bits) - 1)) if len(bits) > 1 else 0
    if at == 0:
        return 0, 0, 0.0
    low, high = bits[at - 1], bits[at]
    return at - 1, at, float(np.clip((target - low) / (high - low), 0, 1))


@dataclass(frozen=True)
class Resampling:
    """R paired bootstrap resamples by group: how often each prompt is taken."""

    counts: np.ndarray
    """float64 [R, N]."""

    @staticmethod
    def of(groups: np.ndarray, resamples: int, seed: int) -> Resampling:
        names, place = np.unique(groups, return_inverse=True)
        drawn = bootstrap_weights(len(names), resamples, seed)
        return Resampling(drawn[:, place].astype(float))

    def means(self, outcome: Outcome) -> tuple[np.ndarray, np.ndarray]:
        """Mean loss and bits of each resample, [R] each, weighted by forwards."""
        forwards = self.counts @ outcome.forwards
        return self.counts @ outcome.loss / forwards, self.counts @ outcome.bits / forwards


class StaticFrontier:
    """The best static plans at G bit budgets, as measured on held-out prompts. What lies between two budgets
    is the line between them, which a static plan drawn per prompt reaches."""

    def __init__(self, outcomes: Sequence[Outcome], resampling: Resampling) -> None:
        points = sorted(outcomes, key=lambda outcome: outcome.mean_bits)
        self.resampling = resampling
        self.bits = np.asarray([outcome.mean_bits for outcome in points])
        self.loss = np.asarray([outcome.mean_loss for outcome in points])
        means = [resampling.means(outcome) for outcome in points]
        loss_GR, bits_GR = (np.stack(part) for part in zip(*means, strict=True))
        order = bits_GR.argsort(0)  # of neighbours in a resample; interpolation needs rising bits
        self._loss_GR, self._bits_GR = (np.take_along_axis(t, order, axis=0) for t in (loss_GR, bits_GR))

    def at(self, bits: float) -> float:
        return float(np.interp(bits, self.bits, self.loss))

    def resampled_at(self, bits_R: np.ndarray) -> np.ndarray:
        """The frontier of each resample at the bits that a policy has in it."""
        return np.asarray(
            [
                np.interp(bits, self._bits_GR[:, r], self._loss_GR[:, r])
                for r, bits in enumerate(bits_R.tolist())
            ]
        )


@dataclass(frozen=True)
class Gain:
    """A policy against the static frontier at its own measured bits. Positive: the policy loses less."""

    policy: str
    target_bits: float | None
    bits: float
    loss: float
    static_loss: float
    gain: float
    """nats a forward: static loss - loss."""
    low: float
    high: float
    """95 % interval of `gain`: paired bootstrap by group."""
    error: float
    """Standard error of `gain`."""
    p: float
    """Two-sided, by the standard error."""

    @property
    def percent(self) -> float:
        return 100 * self.gain / self.static_loss


def gain_of(name: str, outcome: Outcome, frontier: StaticFrontier, target_bits: float | None = None) -> Gain:
    """See `Gain`."""
    loss_R, bits_R = frontier.resampling.means(outcome)
    difference = frontier.resampled_at(bits_R) - loss_R
    static = frontier.at(outcome.mean_bits)
    gain, error = static - outcome.mean_loss, float(difference.std())
    low, high = interval(difference)
    # below 1e-9 the policy is the static plan itself
    p = math.erfc(abs(gain) / error / math.sqrt(2)) if error > 1e-9 else 1.0
    return Gain(name, target_bits, outcome.mean_bits, outcome.mean_loss, static, gain, low, high, error, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm, 1979): reject those that are below the level."""
    order = np.argsort(p_values)
    corrected, largest = np.empty(len(p_values)), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected.tolist()


def prompts_needed(gain: Gain, prompts: int, percent: float = 1.0) -> int:
    """Prompts at which a gain of so many percent of the static loss would be seen with 80 % power at the 5 %
    level, by the standard error that `prompts` gave."""
    wanted = percent / 100 * gain.static_loss
    return math.ceil(prompts * ((1.959964 + 0.841621) * gain.error / wanted) ** 2)


def check_targets(chain: Sequence[int], targets: Sequence[float]) -> None:
    """UserError for a target outside of the chain."""
    outside = [target for target in targets if not chain[-1] <= target <= chain[0]]
    if outside:
        raise UserError(f"targets {outside}: the chain {list(chain)} has {chain[-1]} to {chain[0]} bits")


def table(
    gains: Sequence[Gain], corrected: Sequence[float], oracle: dict[float, float]
) -> list[dict[str, Any]]:
    """Rows for people and JSON. `oracle`: target bits -> gain of the oracle there, nats."""
    rows = []
    for gain, p in zip(gains, corrected, strict=True):
        best = oracle.get(gain.target_bits) if gain.target_bits is not None else None
        rows.append(
            {
                **{name: getattr(gain, name) for name in ("policy", "target_bits", "bits", "loss")},
                "static_loss": gain.static_loss,
                "gain_percent": gain.percent,
                "low_percent": 100 * gain.low / gain.static_loss,
                "high_percent": 100 * gain.high / gain.static_loss,
                "p": gain.p,
                "p_holm": p,
                "oracle_share": gain.gain / best if best else None,
            }
        )
    return rows
