"""The published kind of policy in the scheduler study: classifiers on the KV features of the prompt, fitted
to labels (`objective` class) or to what each class loses (loss), with the bit budget's multiplier.

Legend: N prompts, J pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pmpd import storage
from pmpd.evaluation.curve_set import CurveSet, Outcome
from pmpd.evaluation.policies import Policy
from pmpd.labeling.rule import RULES
from pmpd.schedulers.budget import calibrate, choose_classes
from pmpd.schedulers.chain import NUM_CLASSES, pairs_of, place_of
from pmpd.training.config import TrainConfig
from pmpd.training.data import NO_LABEL, Features, Labels, features_from_table, join_features
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


def class_losses(curves: CurveSet) -> np.ndarray:
    """Mean loss of every switch class of every pair, float32 [N, J, 4]: of the plan that starts at the pair's
    high precision, and stays at its low one."""
    pairs = len(curves.chain) - 1
    classes = np.asarray(
        [
            [[0] * pair + [k] + [NUM_CLASSES - 1] * (pairs - 1 - pair) for k in range(NUM_CLASSES)]
            for pair in range(pairs)
        ]
    )
    losses = curves.plan_loss / curves.forwards[:, None]
    return losses[:, place_of(classes)].astype(np.float32)


@dataclass(frozen=True)
class KvFits:
    """A classifier fitted for every fold: what it says of all prompts, and which it was validated on."""

    keys: tuple[str, ...]
    fold: np.ndarray
    """int64 [N]: the fold in which a prompt is held out."""
    outputs: np.ndarray
    """float32 [F, N, J, 4]: logits, or negative losses in nats."""
    splits: np.ndarray
    """int64 [F, N]: 0 trained on, 1 validated on, 2 held out."""
    labels: np.ndarray
    """int64 [N, J]; NO_LABEL where the rule says nothing."""
    kind: str
    """ "logits" or "losses"."""

    def write(self, path: Path) -> None:
        np.savez_compressed(path, **dataclasses.asdict(self))

    @staticmethod
    def read(path: Path) -> KvFits:
        with np.load(path) as held:
            parts = {name: held[name] for name in held.files}
        keys, kind = tuple(parts.pop("keys").tolist()), str(parts.pop("kind"))
        return KvFits(keys=keys, kind=kind, **parts)

    def accuracy(self, pairs: Sequence[str]) -> list[dict[str, Any]]:
        """Of classes, on held-out prompts, beside always saying the most frequent one of the others."""
        rows = []
        for j, pair in enumerate(pairs if self.kind == "logits" else ()):
            right, majority, told = 0, 0, 0
            for f in range(len(self.outputs)):
                known = self.labels[:, j] != NO_LABEL
                held, seen = known & (self.fold == f), known & (self.splits[f] == 0)
                most = np.bincount(self.labels[seen, j], minlength=NUM_CLASSES).argmax()
                right += int((self.outputs[f, held, j].argmax(-1) == self.labels[held, j]).sum())
                majority += int((self.labels[held, j] == most).sum())
                told += int(held.sum())
            rows.append(
                {"pair": pair, "prompts": told, "accuracy": right / told, "majority": majority / told}
            )
        return rows


def fit_folds(
    curves: CurveSet,
    features: Features,
    num_heads: int,
    objective: str,
    fold_N: np.ndarray,
    classes: Mapping[str, Sequence[int]] | None = None,
    config: TrainConfig | None = None,
    device: str = "cpu",
    losses: np.ndarray | None = None,
) -> KvFits:
    """The classifier of every fold. `classes`: prompt_id -> label of each pair, by another rule than the
    divergence of `curves`; `losses` float32 [N, J, 4]: what each class loses, likewise."""
    keys, pairs = curves.keys, tuple(pairs_of(curves.chain))
    losses = class_losses(curves) if losses is None else losses
    if classes is None:
        rule = RULES["kl"]
        labels = [[rule.label((-row).tolist(), -float(row[3])) for row in rows] for rows in losses]
    else:
        labels = [list(classes.get(key, [NO_LABEL] * len(pairs))) for key in keys]
    config = dataclasses.replace(config or TrainConfig(), objective=objective, rebalance="none")  # type: ignore[arg-type]
    at = {key: row for row, key in enumerate(features.ids)}
    rows = [at[key] for key in keys]
    starts = torch.cumsum(features.lengths, 0) - features.lengths
    places = torch.cat([torch.arange(starts[r], starts[r] + features.lengths[r]) for r in rows])
    own = Features(keys, features.keys[places], features.values[places], features.lengths[rows])
    outputs, splits = [], []
    for fold in np.unique(fold_N):
        held_out = frozenset(key for key, f in zip(keys, fold_N, strict=True) if f == fold)
        of_fold = FoldLabels(keys, pairs, np.asarray(labels), losses, held_out)
        state = fit(of_fold, own, num_heads, config, heads=("kv_cache",), device=device)
        outputs.append(outputs_of(of_fold, state, config))
        splits.append(of_fold.splits(config))
    return KvFits(keys, fold_N, np.stack(outputs), np.stack(splits), np.asarray(labels), output_kind(config))


def kv_policy(fits: KvFits) -> Policy:
    """The classifiers as a policy: a bit budget's multiplier, calibrated on the prompts that a fold's
    classifier was validated on, chooses the classes."""
    row_of = {key: index for index, key in enumerate(fits.keys)}

    def policy(train: CurveSet, test: CurveSet, targets: Sequence[float], seed: int) -> list[Outcome]:
        rows = np.asarray([row_of[key] for key in test.keys])
        (fold,) = np.unique(fits.fold[rows]).tolist()
        outputs, validated = fits.outputs[fold], fits.splits[fold] == 1
        found = []
        for target in targets:
            multiplier = calibrate(outputs[validated], train.chain, target, fits.kind).multiplier
            classes = choose_classes(outputs[rows], train.chain, multiplier, fits.kind)
            found.append(test.under(place_of(classes)))
        return found

    return policy
