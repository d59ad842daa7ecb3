"""When an answer at fewer bits is as good as the one that never switched, for labels and the oracle."""

from __future__ import annotations

DIGITS = 3
"""Scores are compared after rounding to these decimals, as published labels are."""


def as_good(score: float, least: float) -> bool:
    """Whether a score in 0..1 is no lower than `least`, both rounded."""
    return round(score, DIGITS) >= round(least, DIGITS)
