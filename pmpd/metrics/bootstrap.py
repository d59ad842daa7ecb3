"""The paired bootstrap over questions."""

from __future__ import annotations

import numpy as np


def bootstrap_weights(questions: int, resamples: int, seed: int) -> np.ndarray:
    """How often each resample draws each question: int32 [R, Q]. The same for all runs and metrics, which is
    what pairs them."""
    rng = np.random.default_rng(seed)
    weights = np.empty((resamples, questions), dtype=np.int32)
    for start in range(0, resamples, 256):  # in slices: the draw itself is int64
        count = min(256, resamples - start)
        weights[start : start + count] = rng.multinomial(
            questions, np.full(questions, 1 / questions), size=count
        )
    return weights


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval."""
    low, high = np.nanpercentile(samples, [2.5, 97.5])
    return float(low), float(high)
