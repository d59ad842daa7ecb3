"""The scheduler `online` followed along the reference: the state after forward t is that of the precision
that it ran it at itself, and decides the precision of forward t + 1.

Legend: N prompts, C precisions, M decode forwards.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from pmpd.evaluation.curve_set import CurveSet

QUANTILES = (0.2, 0.4, 0.6, 0.8, 0.95)
"""Of the doubt on the training prompts: where thresholds are tried."""


def doubt(curves: CurveSet, signal: str) -> tuple[np.ndarray, np.ndarray]:
    """Doubt behind each forward at each precision [N, C, M], and behind the prompt [N]."""
    tables, start = curves.statistics[signal], curves.start[signal]
    return (tables, start) if signal == "entropy" else (1 - tables, 1 - start)


@dataclass(frozen=True)
class Thresholds:
    """A setting of the scheduler `online` (`pmpd.schedulers.online`)."""

    signal: str
    lower_below: float
    raise_above: float
    patience: int
    hold: int
    first: int = 0
    """Place in the chain of the highest precision that it uses."""
    last: int | None = None
    """Of the lowest; None: the chain's."""


def follow(curves: CurveSet, setting: Thresholds) -> np.ndarray:
    """Places in the chain of every decode forward under the scheduler `online`: int [N, M]."""
    tables, _ = doubt(curves, setting.signal)
    rows = np.arange(len(curves))
    sure, hold = np.zeros(len(curves), dtype=int), np.zeros(len(curves), dtype=int)
    place = np.full(len(curves), setting.first)
    places = np.zeros((len(curves), tables.shape[2]), dtype=int)
    lowest = len(curves.chain) - 1 if setting.last is None else setting.last
    for t in range(tables.shape[2]):
        places[:, t] = place
        seen = tables[rows, place, t]
        up = seen > setting.raise_above
        sure = np.where(seen < setting.lower_below, sure + 1, 0)
        hold = np.maximum(0, hold - 1)
        down = (sure >= setting.patience) & (hold == 0) & (place < lowest) & ~up
        place = np.where(up, setting.first, np.where(down, place + 1, place))
        hold = np.where(up, setting.hold, np.where(down, 0, hold))
        sure = np.where(up | down, 0, sure)
    return places


def settings_of(train: CurveSet) -> list[Thresholds]:
    """The settings that are tried on the training prompts."""
    found = []
    lowest = len(train.chain) - 1
    parts = sorted({(0, lowest), *((place, place + 1) for place in range(lowest))})
    for signal in ("entropy", "margin"):
        tables, _ = doubt(train, signal)
        marks = np.quantile(tables[:, 0][train.valid], QUANTILES)
        pairs = list(itertools.combinations_with_replacement(marks.tolist(), 2))
        for (low, high), patience, hold, part in itertools.product(pairs, (1, 2), (1, 4), parts):
            found.append(Thresholds(signal, low, high, patience, hold, *part))
    return found
