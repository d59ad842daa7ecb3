"""When to stop running at a precision: at every sixth of the decode, what is left of it is predicted to lose
so much under a switch now, and so much under each later one. From numbers of the prompt, and of the decode
so far, which ran at the pair's high precision.

Legend: N prompts, F features, J pairs of the chain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np

from pmpd.schedulers.chain import SIXTHS, sixths_plans
from pmpd.schedulers.loss_model import LossModel, fingerprint

WATCHED = ("entropy", "margin")
"""Of `schedulers.base.STATISTICS`: what is known of each forward's distribution."""

SMALLEST = 1e-2
"""Added before a logarithm."""


def watched(whole: np.ndarray, last: np.ndarray) -> np.ndarray:
    """float64 [N, 2·W]: what a decode has shown, from the means of `WATCHED` over it so far and over its last
    sixth, [N, W] each."""
    return np.log(np.concatenate([whole, last], axis=1) + SMALLEST)


def path(pairs: int, pair: int) -> np.ndarray:
    """Places in `sixths_plans` of the plans that begin at the pair's high precision and stay at its low one,
    by the sixth of their switch: int [`SIXTHS` + 1]. The last one never switches."""
    plans = sixths_plans(pairs)
    never = (plans[:, pair + 1 :] == SIXTHS).all(1)
    return np.flatnonzero((plans[:, :pair] == 0).all(1) & never)


def pair_for(chain: tuple[int, ...], target_bits: float) -> int:
    """The pair whose precisions the target lies between; at a precision, the pair below it."""
    return next((j for j, low in enumerate(chain[1:]) if target_bits > low), len(chain) - 2)


@dataclass(frozen=True)
class StopModel:
    """The regressions of each pair and sixth."""

    parts: tuple[tuple[LossModel, ...], ...]
    """[J][`SIXTHS`]: of what is left behind that sixth under the plans of `path` that have not switched
    before it."""

    def thresholds(self, pair: int, at: int, features: np.ndarray) -> np.ndarray:
        """The multiplier from which on each prompt [N, F] switches at this sixth, float64 [N]: no later
        switch, nor never switching, has less predicted loss + multiplier x bits."""
        part = self.parts[pair][at]
        losses, bits = part.predict(features), np.maximum(part.bits[1:] - part.bits[0], 1e-12)
        return ((losses[:, :1] - losses[:, 1:]) / bits).max(1)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        for j, parts in enumerate(self.parts):
            for at, part in enumerate(parts):
                yield from ((f"{j}.{at}.{name}", tensor) for name, tensor in part.tensors())

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.tensors())

    @staticmethod
    def of(tensors: Mapping[str, np.ndarray], pairs: int) -> StopModel:
        """From what `tensors` gave; KeyError where some is missing."""
        names = [each.name for each in fields(LossModel)]
        return StopModel(
            tuple(
                tuple(LossModel(**{n: tensors[f"{j}.{at}.{n}"] for n in names}) for at in range(SIXTHS))
                for j in range(pairs)
            )
        )

    def check(self, features: int) -> None:
        """ValueError, with the reason, unless all of it is of so many numbers of a prompt, and finite."""
        for parts in self.parts:
            for at, part in enumerate(parts):
                part.check(SIXTHS + 1 - at, features + 2 * len(WATCHED) * (at > 0))
