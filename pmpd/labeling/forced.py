"""Labels of the teacher-forced rules: classes compared by the divergence along the reference, none of them
decoded.

Legend: m = n - 1 decode forwards of n reference tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from pmpd.labeling.config import LabelConfig, error_row, row_head
from pmpd.labeling.curves import Curve, ForcedRow, curves_columns, forced_rows
from pmpd.labeling.rule import NothingToScoreError
from pmpd.model import PMPDForCausalLM
from pmpd.schedulers.chain import NUM_CLASSES, class_steps


def forced_labels(
    model: PMPDForCausalLM,
    unquantized: PMPDForCausalLM,
    prompts: Mapping[str, Mapping[str, Any]],
    references: Mapping[str, Mapping[str, Any]],
    config: LabelConfig,
) -> Iterator[dict[str, Any]]:
    """LABELS rows without `worker` of these rows of PROMPTS (by id), whose references are no errors. A
    reference of one token, which took no decode forward, becomes an error row."""
    texts = {key: list(references[key]["reference_ids"]) for key in prompts}
    short = {key for key, tokens in texts.items() if len(tokens) < 2}
    for key in short:
        told = "nothing to score: the reference has one token, so it took no decode forward"
        yield error_row(prompts[key], config, f"{NothingToScoreError.__name__}: {told}")
    rows = {key: row["input_ids"] for key, row in prompts.items() if key not in short}
    started = time.perf_counter()
    for row in forced_rows(model, unquantized, rows, {key: texts[key] for key in rows}, config.precisions):
        label_row = _label_row(row, prompts[row.key], references[row.key], config)
        now = time.perf_counter()
        label_row["seconds"], started = now - started, now
        yield label_row


def _label_row(
    row: ForcedRow, prompt: Mapping[str, Any], reference: Mapping[str, Any], config: LabelConfig
) -> dict[str, Any]:
    if not all(np.isfinite(curve.divergence).all() for curve in row.curves):
        return error_row(prompt, config, "ValueError: the model's logits are not finite")
    curves = {curve.bits: curve for curve in row.curves}
    try:
        pairs = [_pair(curves, high, low, config) for high, low in pairwise(config.precisions)]
    except NothingToScoreError as error:
        return error_row(prompt, config, f"{type(error).__name__}: {error}")
    return {
        **row_head(prompt, config),
        "reference_text": reference["reference_text"],
        "reference_ids": reference["reference_ids"],
        "pairs": pairs,
        "keys": row.features[0],
        "values": row.features[1],
        "feature_tokens": len(row.features[0]),
        **curves_columns(row),
        "error": None,
    }


def _pair(curves: Mapping[int, Curve], high: int, low: int, config: LabelConfig) -> dict[str, Any]:
    """A row's entry for one pair: the divergence of class k is the high curve's up to its steps, the low
    one's after."""
    above, below = curves[high].divergence, curves[low].divergence
    forwards = np.arange(1, len(above) + 1)
    steps = class_steps(config.max_new_tokens)
    scores = [config.rule.score(np.where(forwards <= step, above, below)) for step in steps]
    nothing = [None] * NUM_CLASSES
    return {
        "high": high,
        "low": low,
        "label": config.rule.label(scores, scores[-1]),
        "scores": scores,
        "rouge_l": nothing,
        "high_rouge_l": None,
        "high_text": None,
        "high_ids": None,
        "branch_tokens": nothing,
    }
