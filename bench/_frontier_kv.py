"""The published kind of policy in the scheduler study: classifiers on the KV features of the prompt, fitted
to labels (`objective` class) or to what each class loses (loss), with the bit budget's multiplier.

Legend: N prompts, J pairs, C precisions, M decode forwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from pmpd import storage
from pmpd.evaluation.curve_set import CurveSet, Outcome
from pmpd.evaluation.policies import Policy
from pmpd.labeling.rule import RULES
from pmpd.schedulers.budget import calibrate, choose_classes
from pmpd.schedulers.chain import chain_bits, class_steps, pairs_of
from pmpd.training.config import TrainConfig
from pmpd.training.data import Features, Labels, features_from_table, join_features
from pmpd.training.fit import train as fit
from pmpd.training.result import output_kind, outputs_of

VALIDATION_SHARE = 0.2
"""Of the training prompts: these stop the epochs and calibrate the multiplier."""


@dataclass(frozen=True)
class FoldLabels(Labels):
    """Labels whose held-out prompts are the test split, whatever the shares."""

    held_out: frozenset[str] = frozenset()

    def splits(self, config: TrainConfig) -> np.ndarray:
        shares = dataclasses.replace(config, split_shares=(1 - VALIDATION_SHARE, VALIDATION_SHARE, 0.0))
        return np.where([key in self.held_out for key in self.ids], 2, super().splits(shares))


def kv_features(folders: Sequence[str]) -> Features:
    """The KV features of all folders' labels."""
    columns = ["prompt_id", "pairs", "keys", "values", "error"]
    tables = [storage.read_table(storage.join(folder, "labels"), columns) for folder in folders]
    return join_features([features_from_table(table) for table in _parts(tables)])


def _parts(tables: Sequence[pa.Table], rows: int = 512) -> list[pa.Table]:
    return [table.slice(at, rows) for table in tables for at in range(0, len(table), rows)]


def class_losses(curves: CurveSet, new_tokens: int) -> np.ndarray:
    """Mean loss of every switch class of every pair, float32 [N, J, 4]."""
    forwards = np.arange(1, curves.loss.shape[2] + 1)
    found = []
    for pair in range(len(curves.chain) - 1):
        above, below = curves.loss[:, pair], curves.loss[:, pair + 1]
        found += [
            np.where(forwards <= step, above, below).sum(1) / curves.forwards
            for step in class_steps(new_tokens)
        ]
    return np.stack(found, axis=1).reshape(len(curves), -1, 4).astype(np.float32)


def kv_policy(features: Features, num_heads: int, objective: str, new_tokens: int) -> Policy:
    """See the module's text."""
    at = {key: index for index, key in enumerate(features.ids)}

    def labels_of(train: CurveSet, test: CurveSet) -> FoldLabels:
        keys = (*train.keys, *test.keys)
        order = np.argsort(keys)
        losses = np.concatenate([class_losses(part, new_tokens) for part in (train, test)])[order]
        rule = RULES["kl"]
        classes = [[rule.label((-row).tolist(), -float(row[3])) for row in rows] for rows in losses]
        ids = tuple(keys[i] for i in order)
        pairs = tuple(pairs_of(train.chain))
        return FoldLabels(ids, pairs, np.asarray(classes), losses, frozenset(test.keys))

    def outcome(curves: CurveSet, classes_NJ: np.ndarray) -> Outcome:
        steps = np.asarray(class_steps(new_tokens))[classes_NJ]
        place = {bits: index for index, bits in enumerate(curves.chain)}
        levels = [
            np.vectorize(place.__getitem__)(chain_bits(curves.chain, steps, np.full(len(steps), t)))
            for t in range(1, curves.loss.shape[2] + 1)
        ]
        return curves.outcome(np.stack(levels, axis=1))

    def policy(train: CurveSet, test: CurveSet, targets: Sequence[float], seed: int) -> list[Outcome]:
        labels = labels_of(train, test)
        config = TrainConfig(objective=objective, seed=seed, rebalance="none")  # type: ignore[arg-type]
        rows = [at[key] for key in labels.ids]
        keys, values, lengths = features.batch(rows)
        valid = torch.arange(keys.shape[1])[None] < lengths[:, None]
        own = Features(labels.ids, keys[valid].half(), values[valid].half(), lengths)
        state = fit(labels, own, num_heads, config, heads=("kv_cache",))
        scores, splits = outputs_of(labels, state, config), labels.splits(config)
        place = {key: index for index, key in enumerate(labels.ids)}
        of_test = scores[[place[key] for key in test.keys]]
        found = []
        for target in targets:
            kind = output_kind(config)
            multiplier = calibrate(scores[splits == 1], train.chain, target, kind).multiplier
            found.append(outcome(test, choose_classes(of_test, train.chain, multiplier, kind)))
        return found

    return policy
