"""How much of a label is noise: the same prompts labelled twice, against two references that are equally
good.

Where a prompt's label is drawn from q(k), two labels agree with probability sum q(k)^2, and the best
classifier is right with probability max q(k). So no classifier's accuracy exceeds the square root of the
agreement, and the best one's is no lower than the agreement: the ceiling lies between the two.

Legend: N prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pmpd import storage
from pmpd.errors import UserError
from pmpd.labeling.rule import RULES
from pmpd.metrics.bootstrap import bootstrap_weights, interval
from pmpd.schedulers.chain import NUM_CLASSES

LabelSet = dict[tuple[int, int], dict[str, int]]
"""Pair of precisions -> prompt -> label."""

RESAMPLES = 2000


@dataclass(frozen=True)
class Agreement:
    """Of two label sets, on the prompts that both have."""

    prompts: int
    agreement: float
    low: float
    high: float
    """95 % interval, bootstrap over prompts."""
    by_chance: float
    """Agreement of labels with these shares that have nothing to do with each other."""
    majority: float
    """Share of the first set's most frequent label: the accuracy of whoever always says it."""

    @property
    def ceiling(self) -> float:
        """No classifier's accuracy exceeds it."""
        return float(np.sqrt(self.agreement))

    @property
    def kappa(self) -> float:
        """Agreement beyond chance, as a share of what chance leaves (Cohen, 1960)."""
        left = 1 - self.by_chance
        return (self.agreement - self.by_chance) / left if left > 1e-12 else 1.0


def label_sets(rows: Iterable[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, LabelSet]:
    """Rule -> labels, from rows of LABELS (prompt_id, rule, pairs, error). `names`: prompt_id -> what the
    prompt is joined by. Where rows hold ROUGE-L beside their own rule's scores, the labels of the rule
    rouge_l are there too: they cost no further decode."""
    found: dict[str, LabelSet] = {}
    for row in rows:
        if row["error"]:
            continue
        name = names[row["prompt_id"]]
        for pair in row["pairs"]:
            key = (int(pair["high"]), int(pair["low"]))
            found.setdefault(row["rule"], {}).setdefault(key, {})[name] = int(pair["label"])
            if pair.get("high_rouge_l") is not None:
                rule = RULES["rouge_l"]
                label = rule.label(pair["rouge_l"], pair["high_rouge_l"])
                found.setdefault(rule.identity, {}).setdefault(key, {})[name] = label
    return found


def agreement(first: Mapping[str, int], second: Mapping[str, int], seed: int = 0) -> Agreement:
    """UserError where no prompt is in both."""
    shared = sorted(set(first) & set(second))
    if not shared:
        raise UserError("the two label sets share no prompt; label the same file of records twice")
    a, b = (np.asarray([labels[name] for name in shared]) for labels in (first, second))
    equal = (a == b).astype(float)
    weights = bootstrap_weights(len(shared), RESAMPLES, seed)
    low, high = interval(weights @ equal / len(shared))
    shares = [np.bincount(labels, minlength=NUM_CLASSES) / len(shared) for labels in (a, b)]
    return Agreement(
        len(shared), float(equal.mean()), low, high, float(shares[0] @ shares[1]), float(shares[0].max())
    )


def read_label_sets(folder: str) -> dict[str, LabelSet]:
    """Rule -> labels of an --output-dir of `pmpd label`, prompts joined by their line of the file of records:
    a prompt that was cut or written otherwise is the same record. UserError where there are no labels."""
    prompts, labels = (storage.join(folder, name) for name in ("prompts", "labels"))
    for dataset in (prompts, labels):
        if not storage.list_shards(dataset):
            raise UserError(f"{dataset}: nothing there; give the --output-dir of a finished `pmpd label`")
    rows = storage.read_table(prompts, ["prompt_id", "source"]).to_pylist()
    lines = {row["prompt_id"]: row["source"].rsplit("/", 1)[-1] for row in rows}
    columns = ["prompt_id", "rule", "pairs", "error"]
    return label_sets(storage.read_table(labels, columns).to_pylist(), lines)


def ceilings(folder: str, again: str) -> dict[str, Agreement]:
    """Pair of precisions ("4-3") -> agreement of the labels in two folders, by the first one's own rule."""
    first, second = read_label_sets(folder), read_label_sets(again)
    rule = next(iter(first))
    if rule not in second:
        raise UserError(
            f"{again} has labels by {', '.join(second)}, {folder} by {rule}; label by one rule twice"
        )
    return {
        f"{high}-{low}": agreement(labels, second[rule].get((high, low), {}))
        for (high, low), labels in first[rule].items()
    }
