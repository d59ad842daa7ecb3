"""Labels of the teacher-forced rules: classes compared by the divergence along the reference, none of them
decoded.

Legend: m = n - 1 decode forwards of n reference tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pmpd.labeling.config import LabelConfig, error_row, row_head
from pmpd.labeling.curves import ForcedRow, curves_columns, forced_rows
from pmpd.labeling.rule import NothingToScoreError
from pmpd.model import PMPDForCausalLM
from pmpd.schedulers.chain import NUM_CLASSES, place_of, sixths_plans


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
    for row in forced_rows(
        model, unquantized, rows, {key: texts[key] for key in rows}, config.precisions, config.max_new_tokens
    ):
        label_row = _label_row(row, prompts[row.key], references[row.key], config)
        now = time.perf_counter()
        label_row["seconds"], started = now - started, now
        yield label_row


def _label_row(
    row: ForcedRow, prompt: Mapping[str, Any], reference: Mapping[str, Any], config: LabelConfig
) -> dict[str, Any]:
    if not all(np.isfinite(losses).all() for losses in row.plans.values()):
        return error_row(prompt, config, "ValueError: the model's logits are not finite")
    try:
        pairs = [_pair(row, place, config) for place in range(len(config.precisions) - 1)]
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


def _pair(row: ForcedRow, place: int, config: LabelConfig) -> dict[str, Any]:
    """A row's entry for the pair at this place: class k is the plan that is at the high precision up to the
    class's steps, and at the low one after."""
    high, low = config.precisions[place : place + 2]
    never = len(config.precisions) - 2 - place
    classes = np.asarray([[0] * place + [k] + [NUM_CLASSES - 1] * never for k in range(NUM_CLASSES)])
    plans = sixths_plans(len(config.precisions) - 1)[place_of(classes)].tolist()
    scores = [config.rule.score(row.plans[tuple(plan)]) for plan in plans]
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
