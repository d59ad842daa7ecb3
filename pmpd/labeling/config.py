"""How prompts are labeled, and what every row of LABELS begins with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pmpd.errors import UserError
from pmpd.labeling.rule import RULES, LabelRule
from pmpd.schedulers.chain import check_chain

FORCED_COLUMNS = ("prompt_state", "curves", "plans")
"""Columns that teacher-forced rules fill."""


_CONTENT = ("reference_text", "reference_ids", "pairs", "keys", "values", "feature_tokens", *FORCED_COLUMNS)


@dataclass(frozen=True)
class LabelConfig:
    """How prompts are labeled."""

    precisions: tuple[int, ...] = (4, 3, 2)
    """The precision chain; consecutive members are the pairs that get a label each. The first is also the
    prefill's precision."""
    max_new_tokens: int = 256
    """New tokens of every trajectory, at most."""
    slots: int | None = 64
    """Trajectories that decode together; None: as many as memory holds."""
    rule: LabelRule = RULES["rouge_l"]
    """Which class is the label, by the trajectories' likeness to the reference."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "precisions", check_chain(self.precisions))
        if self.max_new_tokens < 4:
            raise UserError(
                f"max_new_tokens {self.max_new_tokens}: four at least, so that the switch classes differ"
            )
        if self.slots is not None and self.slots < 1:
            raise UserError(f"slots {self.slots}: one at least")


def error_row(row: Mapping[str, Any], config: LabelConfig, error: str | None) -> dict[str, Any]:
    nothing = dict.fromkeys(_CONTENT)
    return {**row_head(row, config), **nothing, "seconds": 0.0, "error": error}


def row_head(row: Mapping[str, Any], config: LabelConfig) -> dict[str, Any]:
    ids = list(row["input_ids"])
    return {
        "prompt_id": row["prompt_id"],
        "prompt_tokens": len(ids),
        "prompt_text": row["prompt_text"],
        "input_ids": ids,
        "rule": config.rule.identity,
    }
