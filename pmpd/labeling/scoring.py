"""Scores of decoded trajectories, and the label that follows from them. It needs no model, so it can run
in a process of its own (`scoring_process`)."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, cast

from pmpd.decode.requests import Completion
from pmpd.labeling import published
from pmpd.labeling.config import FORCED_COLUMNS, LabelConfig, error_row, row_head
from pmpd.labeling.rule import NothingToScoreError, Trajectory
from pmpd.metrics.rouge import rouge_l


@dataclass(frozen=True)
class PairBranches:
    """What one pair's label is decided on."""

    high: Completion
    branches: tuple[Completion, ...]
    """Of classes 0..2."""


class Score(Protocol):
    """(row of PROMPTS, row of REFERENCES, branches of every pair) -> row of LABELS without its features."""

    def __call__(
        self, row: Mapping[str, Any], reference: Mapping[str, Any], decoded: Sequence[PairBranches]
    ) -> dict[str, Any]: ...


def decode_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of new tokens, without special ones."""
    # a list of texts only for a list of lists
    return cast(str, tokenizer.decode(list(tokens), skip_special_tokens=True))


@dataclass(frozen=True)
class RowScorer:
    """Scores the trajectories of a prompt by `config.rule`."""

    tokenizer: Any
    eos_token_ids: frozenset[int]
    config: LabelConfig

    def __call__(
        self, row: Mapping[str, Any], reference: Mapping[str, Any], decoded: Sequence[PairBranches]
    ) -> dict[str, Any]:
        started = time.perf_counter()
        config = self.config
        target = Trajectory(tuple(reference["reference_ids"]), reference["reference_text"])
        # branches are often alike
        text_of = functools.cache(lambda tokens: decode_text(self.tokenizer, tokens))
        try:
            pairs = [
                {"high": high, "low": low, **self._judged(pair, target, text_of)}
                for (high, low), pair in zip(pairwise(config.precisions), decoded, strict=True)
            ]
        except NothingToScoreError as error:
            return error_row(row, config, f"{type(error).__name__}: {error}")
        unique = {id(each): each for pair in decoded for each in (pair.high, *pair.branches)}.values()
        return {
            **row_head(row, config),
            "reference_text": reference["reference_text"],
            "reference_ids": reference["reference_ids"],
            "pairs": pairs,
            "seconds": sum(completion.decode_seconds for completion in unique)
            + decoded[0].high.prefill_seconds
            + (time.perf_counter() - started),
            **dict.fromkeys(FORCED_COLUMNS),
            "error": None,
        }

    def _judged(
        self, pair: PairBranches, reference: Trajectory, text_of: Callable[[tuple[int, ...]], str]
    ) -> dict[str, Any]:
        """A row's entry for one pair, by the rule. `text_of`: the text of new tokens."""
        config = self.config
        high_tokens = list(pair.high.tokens)
        tokens: list[list[int] | None] = [list(branch.tokens) for branch in pair.branches]
        if config.rule.branches == "published":
            high_tokens = published.cut_at_end(high_tokens, self.eos_token_ids)
            tokens = published.candidates(
                high_tokens, [branch.tokens for branch in pair.branches], config.max_new_tokens
            )
        everyone = [
            None if some is None else Trajectory(tuple(some), text_of(tuple(some)))
            for some in (*tokens, high_tokens)
        ]
        scores = [None if one is None else config.rule.score(one, reference) for one in everyone]
        rouge = [None if one is None else rouge_l(one.text, reference.text) for one in everyone]
        high, high_score = everyone[-1], scores[-1]
        assert high is not None
        assert high_score is not None
        return {
            "label": config.rule.label(scores, high_score),
            "scores": scores,
            "rouge_l": rouge,
            "high_rouge_l": rouge[-1],
            "high_text": high.text,
            "high_ids": list(high.tokens),
            "branch_tokens": [None if one is None else len(one.tokens) for one in everyone],
        }
