"""What a trained classifier is worth on held-out prompts, beside constant and random policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from pmpd.metrics.bootstrap import bootstrap_weights, interval
from pmpd.schedulers.chain import FRACTIONS, NUM_CLASSES
from pmpd.training.config import SPLITS
from pmpd.training.data import NO_LABEL, Labels

# ---- Metrics
# ------------------------------------------------------------------------------------------------------------

INTERVALS = 1000
"""Bootstrap samples behind a 95 % interval."""


def confusion(
    labels_N: np.ndarray, choices_NK: np.ndarray, counts_SN: np.ndarray | None = None
) -> np.ndarray:
    """Rows per (label, chosen class): float64 [4, 4], or [S, 4, 4] for S resamplings that take row n
    `counts_SN[s, n]` times.

    `choices_NK`: probability of each class per row (one-hot for a policy without chance), so the matrix is an
    expectation.
    """
    cells_NC = (np.eye(NUM_CLASSES)[labels_N][:, :, None] * choices_NK[:, None, :]).reshape(len(labels_N), -1)
    if counts_SN is None:
        return cells_NC.sum(0).reshape(NUM_CLASSES, NUM_CLASSES)
    return (counts_SN @ cells_NC).reshape(-1, NUM_CLASSES, NUM_CLASSES)


def measures(matrix: np.ndarray, pair: tuple[int, int]) -> dict[str, np.ndarray]:
    """Measures of confusion matrices [..., 4, 4], each [...].

    accuracy; macro_f1: mean F1 over the classes that occur as a label; average_bits: mean precision of the
    decode forwards of this pair under the chosen classes; quality_loss: share of rows whose chosen class is
    below their label.
    """
    total = matrix.sum((-2, -1))
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    actual, chosen = matrix.sum(-1), matrix.sum(-2)
    f1 = 2 * hits / np.maximum(actual + chosen, 1e-12)
    high, low = pair
    bits = low + (high - low) * np.asarray(FRACTIONS)
    return {
        "accuracy": hits.sum(-1) / total,
        "macro_f1": f1.sum(-1) / (actual > 0).sum(-1),
        "average_bits": (chosen * bits).sum(-1) / total,
        "quality_loss": np.tril(matrix, -1).sum((-2, -1)) / total,
    }


def policies(
    train_labels: np.ndarray, labels_N: np.ndarray, chosen: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Choices [N, 4] of everything that is compared: `chosen` (name → class per row), then majority (of the
    training split), static classes, random with the training split's prior (as an expectation), oracle."""
    one_hot = np.eye(NUM_CLASSES)
    counts = np.bincount(train_labels, minlength=NUM_CLASSES)
    rows = len(labels_N)
    result = {name: one_hot[classes] for name, classes in chosen.items()}
    result["majority"] = np.tile(one_hot[counts.argmax()], (rows, 1))
    result |= {f"static_{k}": np.tile(one_hot[k], (rows, 1)) for k in range(NUM_CLASSES)}
    result["random"] = np.tile(counts / counts.sum(), (rows, 1))
    result["oracle"] = one_hot[labels_N]
    return result


def evaluate(
    labels: Labels, splits_N: np.ndarray, logits: Mapping[str, Tensor], seed: int = 0
) -> dict[str, Any]:
    """Everything `metrics.json` reports: per pair and split the label counts and, per policy, the measures
    with 95 % bootstrap intervals over prompts, the confusion matrix (rows = label), and the paired difference
    of accuracy to the majority class.

    `logits`: "head/high-low" → float [N, 4]. The head kv_cache is reported as "learned".
    """
    result: dict[str, Any] = {}
    for j, pair in enumerate(labels.pairs):
        name = "{}-{}".format(*pair)
        column = labels.labels[:, j]
        train_labels = column[(splits_N == 0) & (column != NO_LABEL)]
        heads = {key.split("/")[0]: value for key, value in logits.items() if key.endswith(f"/{name}")}
        result[name] = {}
        for s, split in enumerate(SPLITS):
            rows = np.nonzero((splits_N == s) & (column != NO_LABEL))[0]
            if len(rows) == 0:
                continue
            chosen = {
                ("learned" if head == "kv_cache" else head): value[rows].argmax(-1).numpy()
                for head, value in heads.items()
            }
            result[name][split] = compare(
                column[rows], policies(train_labels, column[rows], chosen), pair, seed
            )
    return result


def compare(
    labels_N: np.ndarray, choices: Mapping[str, np.ndarray], pair: tuple[int, int], seed: int = 0
) -> dict[str, Any]:
    """One split's part of `evaluate`: `choices` holds the probability of each class per row, [N, 4], of each
    policy, one of them "majority". All policies are resampled alike, so that the interval of a difference is
    a paired one."""
    counts_SN = bootstrap_weights(len(labels_N), INTERVALS, seed)
    point = {name: measures(confusion(labels_N, choice), pair) for name, choice in choices.items()}
    resampled = {
        name: measures(confusion(labels_N, choice, counts_SN), pair) for name, choice in choices.items()
    }
    report: dict[str, Any] = {
        "rows": len(labels_N),
        "label_counts": np.bincount(labels_N, minlength=NUM_CLASSES).tolist(),
        "policies": {},
    }
    for name, choice in choices.items():
        difference = resampled[name]["accuracy"] - resampled["majority"]["accuracy"]
        report["policies"][name] = {
            **{measure: float(value) for measure, value in point[name].items()},
            "interval": {measure: list(interval(values)) for measure, values in resampled[name].items()},
            "accuracy_minus_majority": float(point[name]["accuracy"] - point["majority"]["accuracy"]),
            "accuracy_minus_majority_interval": list(interval(difference)),
            "confusion": confusion(labels_N, choice).round(3).tolist(),
        }
    return report
