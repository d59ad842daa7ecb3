"""Labels for the KV-cache scheduler: which switch class keeps the quality of never switching. No I/O, no Ray.

For every pair (high, low) of the chain, a prompt is decoded at the high precision throughout and once per
switch class k, at the high precision for `class_steps[k]` decode forwards and at the low one after. The label
is the smallest class whose text has a ROUGE-L against the unquantized model's text no lower than that of the
high trajectory (rounded to three digits).

All trajectories of a prompt are one request with forks, so they share every decode forward that they have in
common:

    prefill ── high of pair 1 ──────────────▶            class 3 of pair 1
              │        │        └ fork at 2(m//3) ─▶     class 2
              │        └ fork at m//3 ─────────────▶     class 1
              └ fork at 0 = high of pair 2 ────────▶     class 0 of pair 1, and class 3 of pair 2, …"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pmpd.decode.requests import Completion, Fork, Request
from pmpd.errors import UserError
from pmpd.labeling.rule import label_of
from pmpd.metrics.rouge import rouge_l
from pmpd.model import PMPDForCausalLM
from pmpd.schedulers.chain import NUM_CLASSES, check_chain, class_steps
from pmpd.schedulers.static import StaticScheduler

MAX_PROMPT_TOKENS = 2048
"""Documents are truncated to this many tokens."""


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "precisions", check_chain(self.precisions))
        if self.max_new_tokens < 4:
            raise UserError(
                f"max_new_tokens {self.max_new_tokens}: four at least, so that the switch classes differ"
            )
        if self.slots is not None and self.slots < 1:
            raise UserError(f"slots {self.slots}: one at least")


def reference_prompts(
    model: PMPDForCausalLM, prompts: Iterable[Mapping[str, Any]], config: LabelConfig
) -> Iterator[dict[str, Any]]:
    """Reference outputs: the greedy continuation by `model` (unquantized) of each row of the PROMPTS table.
    Yields REFERENCES rows without `worker`, in any order."""
    rows = {row["prompt_id"]: row for row in prompts}
    requests = [Request(key, row["input_ids"], config.max_new_tokens) for key, row in rows.items()]
    for completion in model.complete(requests, None, model.precisions[0], config.slots):
        yield {
            "prompt_id": completion.key,
            "prompt_tokens": len(rows[completion.key]["input_ids"]),
            "reference_text": None if completion.error else decode_text(model, completion.tokens),
            "reference_ids": None if completion.error else completion.tokens,
            "finish_reason": completion.finish_reason,
            "seconds": completion.prefill_seconds + completion.decode_seconds,
            "error": completion.error,
        }


def label_prompts(
    model: PMPDForCausalLM,
    prompts: Iterable[Mapping[str, Any]],
    references: Mapping[str, Mapping[str, Any]],
    config: LabelConfig,
) -> Iterator[dict[str, Any]]:
    """Labels of each row of the PROMPTS table. `references`: prompt_id -> REFERENCES row. Yields LABELS rows
    without `worker`, each as soon as all its trajectories have ended; `keys` and `values` are float16 arrays
    [T, D].

    A prompt whose reference is missing or an error, or whose logits are not finite, becomes a row with
    `error` set.
    """
    rows = {row["prompt_id"]: row for row in prompts}
    plan = _LabelPlan(config)
    requests = []
    for key, row in rows.items():
        reference = references.get(key)
        if reference is None or reference["error"]:
            yield _error_row(
                row,
                f"ValueError: no reference output "
                f"({reference['error'] if reference else 'not in the references'})",
            )
        else:
            requests.append(plan.request(key, row["input_ids"]))
    if not requests:
        return
    model.decide(plan.scheduler, config.precisions[0])
    open_rows: dict[str, dict[str, Completion]] = {}
    for completion in model.complete(requests, plan.scheduler, config.precisions[0], config.slots):
        key, _, name = completion.key.partition("/")
        trajectories = open_rows.setdefault(key, {})
        trajectories[name] = completion
        if len(trajectories) == plan.trajectories:
            del open_rows[key]
            started = time.perf_counter()
            label_row = _label_row(model, rows[key], references[key], trajectories, config)
            label_row["seconds"] += time.perf_counter() - started
            yield label_row


class _LabelPlan:
    """The tree of trajectories of one prompt. Names: "high0" is pair 0's high trajectory, "0/1" class 1 of
    pair 0."""

    def __init__(self, config: LabelConfig) -> None:
        self.config = config
        self.pairs = len(config.precisions) - 1
        self.steps = class_steps(config.max_new_tokens)
        self.never = config.max_new_tokens - 1
        self.scheduler = StaticScheduler(config.precisions, [self.never] * self.pairs)
        self.trajectories = 1 + self.pairs * (NUM_CLASSES - 1)

    def request(self, key: str, input_ids: Sequence[int]) -> Request:
        return Request(
            key=f"{key}/high0",
            input_ids=input_ids,
            max_new_tokens=self.config.max_new_tokens,
            switch_steps=(self.never,) * self.pairs,
            want_features=True,
            forks=self._forks(key, 0),
        )

    def _forks(self, key: str, pair: int) -> tuple[Fork, ...]:
        """Classes 0..2 of `pair`. Class 0 runs at the low precision throughout: it is the high trajectory of
        the next pair."""
        forks = []
        for k, step in enumerate(self.steps[:-1]):
            switch_steps = (0,) * pair + (step,) + (self.never,) * (self.pairs - pair - 1)
            children = self._forks(key, pair + 1) if k == 0 and pair + 1 < self.pairs else ()
            forks.append(Fork(f"{key}/{pair}/{k}", step, switch_steps, children))
        return tuple(forks)


def _label_row(
    model: PMPDForCausalLM,
    row: Mapping[str, Any],
    reference: Mapping[str, Any],
    trajectories: Mapping[str, Completion],
    config: LabelConfig,
) -> dict[str, Any]:
    errors = [completion.error for completion in trajectories.values() if completion.error]
    if errors:
        return _error_row(row, errors[0])
    texts = {name: decode_text(model, completion.tokens) for name, completion in trajectories.items()}
    scores = {text: rouge_l(text, reference["reference_text"]) for text in set(texts.values())}
    features = trajectories["high0"].features
    assert features is not None
    pairs = []
    for pair, (high, low) in enumerate(zip(config.precisions, config.precisions[1:], strict=False)):
        high_name = "high0" if pair == 0 else f"{pair - 1}/0"
        names = [f"{pair}/{k}" for k in range(NUM_CLASSES - 1)] + [high_name]
        branch_scores = [scores[texts[name]] for name in names]
        pairs.append(
            {
                "high": high,
                "low": low,
                "label": label_of(branch_scores, scores[texts[high_name]]),
                "rouge_l": branch_scores,
                "high_rouge_l": scores[texts[high_name]],
                "high_text": texts[high_name],
                "high_ids": trajectories[high_name].tokens,
                "branch_tokens": [len(trajectories[name].tokens) for name in names],
            }
        )
    return {
        **_row_head(row),
        "reference_text": reference["reference_text"],
        "reference_ids": reference["reference_ids"],
        "pairs": pairs,
        "keys": features[0],
        "values": features[1],
        "feature_tokens": len(features[0]),
        "seconds": sum(c.decode_seconds for c in trajectories.values())
        + trajectories["high0"].prefill_seconds,
        "error": None,
    }


def _error_row(row: Mapping[str, Any], error: str | None) -> dict[str, Any]:
    nothing = dict.fromkeys(("reference_text", "reference_ids", "pairs", "keys", "values", "feature_tokens"))
    return {**_row_head(row), **nothing, "seconds": 0.0, "error": error}


def _row_head(row: Mapping[str, Any]) -> dict[str, Any]:
    ids = list(row["input_ids"])
    return {
        "prompt_id": row["prompt_id"],
        "prompt_tokens": len(ids),
        "prompt_text": row["prompt_text"],
        "input_ids": ids,
    }


def decode_text(model: PMPDForCausalLM, tokens: Sequence[int]) -> str:
    """The text of new tokens, without special ones."""
    return cast(
        str, model.tokenizer.decode(list(tokens), skip_special_tokens=True)
    )  # a list of texts only for a list of lists
