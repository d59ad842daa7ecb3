"""The label rule."""

from __future__ import annotations

from collections.abc import Sequence

from pmpd.metrics.quality import as_good
from pmpd.schedulers.chain import NUM_CLASSES


def label_of(branch_scores: Sequence[float], high_score: float) -> int:
    """The smallest class whose rounded score is no lower than the high trajectory's; class 3, which is that
    trajectory, always is."""
    return next(
        (k for k, score in enumerate(branch_scores) if as_good(score, high_score)),
        NUM_CLASSES - 1,
    )
