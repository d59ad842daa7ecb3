"""Prompts with their teacher-forced curves, and what a plan of precisions would have cost and lost on them.

Legend: N prompts, C precisions of the chain (0 = the highest), M decode forwards of the longest reference,
F features, P plans.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from pmpd.errors import UserError
from pmpd.schedulers.base import STATISTICS, PromptState
from pmpd.schedulers.chain import check_chain
from pmpd.schedulers.loss_model import feature_names, prompt_features

LABEL_COLUMNS = ("prompt_id", "prompt_tokens", "prompt_state", "curves", "error")
"""Of LABELS, what a `CurveSet` is made from."""

STARTS = ("entropy", "margin")
"""What is known of the distribution behind the prompt's last token."""


@dataclass(frozen=True)
class Outcome:
    """What a policy did on each prompt: sums over the prompt's decode forwards, so that every mean is
    weighted by forwards. A policy that draws is its expectation."""

    loss: np.ndarray
    """float64 [N], nats."""
    bits: np.ndarray
    """float64 [N]: bits times forwards."""
    forwards: np.ndarray
    """float64 [N]."""

    @property
    def mean_loss(self) -> float:
        return float(self.loss.sum() / self.forwards.sum())

    @property
    def mean_bits(self) -> float:
        return float(self.bits.sum() / self.forwards.sum())

    @staticmethod
    def mix(first: Outcome, second: Outcome, share: float) -> Outcome:
        """The expectation of a policy that follows `second` on that share of the prompts, at random."""
        return Outcome(
            (1 - share) * first.loss + share * second.loss,
            (1 - share) * first.bits + share * second.bits,
            first.forwards,
        )

    def put(self, rows: np.ndarray, part: Outcome) -> None:
        """Writes the outcome of some rows in their places."""
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(part, field.name)

    @staticmethod
    def empty(rows: int) -> Outcome:
        return Outcome(*(np.full(rows, np.nan) for _ in range(3)))


@dataclass(frozen=True)
class CurveSet:
    """See the module's text."""

    keys: tuple[str, ...]
    groups: np.ndarray
    """int64 [N]: prompts of one group share a document; they are split and resampled together."""
    kinds: np.ndarray
    """int64 [N]: the kind of prompt."""
    chain: tuple[int, ...]
    loss: np.ndarray
    """float64 [N, C, M], nats: divergence of forward t at each precision; 0 behind a reference's end."""
    valid: np.ndarray
    """bool [N, M]."""
    statistics: Mapping[str, np.ndarray]
    """`schedulers.base.STATISTICS` of the distribution behind forward t at each precision: [N, C, M] each."""
    start: Mapping[str, np.ndarray]
    """The same behind the prompt's last token, [N] each; `STARTS` only."""
    features: np.ndarray
    """float64 [N, F]: what is known before decode forward 1 at next to no cost."""
    feature_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: np.ndarray) -> CurveSet:
        """The prompts at these positions."""
        return replace(
            self,
            keys=tuple(self.keys[int(i)] for i in rows),
            groups=self.groups[rows],
            kinds=self.kinds[rows],
            loss=self.loss[rows],
            valid=self.valid[rows],
            statistics={name: table[rows] for name, table in self.statistics.items()},
            start={name: table[rows] for name, table in self.start.items()},
            features=self.features[rows],
        )

    @property
    def widths(self) -> np.ndarray:
        return np.asarray(self.chain, dtype=float)

    @property
    def forwards(self) -> np.ndarray:
        return self.valid.sum(1).astype(float)

    def outcome(self, levels_NM: np.ndarray) -> Outcome:
        """Of a plan per prompt: int [N, M], places in the chain."""
        loss = np.take_along_axis(self.loss, levels_NM[:, None, :], axis=1)[:, 0]
        bits = self.widths[levels_NM] * self.valid
        return Outcome(loss.sum(1), bits.sum(1), self.forwards)

    def plan_tables(self, plans_PM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Loss and bits, float64 [N, P] sums over forwards, of plans int [P, M] that serve any prompt."""
        chosen = plans_PM[:, None, :] == np.arange(len(self.chain))[None, :, None]  # [P, C, M]
        loss = self.loss.reshape(len(self), -1) @ chosen.reshape(len(plans_PM), -1).T
        bits = self.valid.astype(float) @ self.widths[plans_PM].T
        return loss, bits


def curve_set(
    rows: Iterable[Mapping[str, Any]], groups: Mapping[str, Any], kinds: Mapping[str, int]
) -> CurveSet:
    """From rows of LABELS (`LABEL_COLUMNS`) by a teacher-forced rule. `groups`, `kinds`: by prompt_id. Rows
    with an error are left out. UserError where there is none without, or the curves are of several chains."""
    rows = sorted((row for row in rows if not row["error"]), key=lambda row: row["prompt_id"])
    if not rows or any(row.get("curves") is None for row in rows):
        raise UserError(
            "the labels have no curves; label with `pmpd label --rule kl` (or another teacher-forced rule)"
        )
    chains = {tuple(curve["bits"] for curve in row["curves"]) for row in rows}
    if len(chains) > 1:
        raise UserError(f"labels of several chains in one comparison: {sorted(chains)}; compare them apart")
    chain = check_chain(chains.pop())
    longest = max(len(row["curves"][0]["divergence"]) for row in rows)
    shape = (len(rows), len(chain), longest)
    held = [name for name in STATISTICS if name in rows[0]["curves"][0]]
    loss, statistics = np.zeros(shape), {name: np.zeros(shape) for name in held}
    valid = np.zeros((len(rows), longest), dtype=bool)
    for n, row in enumerate(rows):
        for c, curve in enumerate(row["curves"]):
            m = len(curve["divergence"])
            loss[n, c, :m], valid[n, :m] = curve["divergence"], True
            for name, table in statistics.items():
                table[n, c, :m] = curve[name]
    names_of_groups = sorted({str(groups[row["prompt_id"]]) for row in rows})
    number = {name: index for index, name in enumerate(names_of_groups)}
    states = [state_of(row) for row in rows]
    return CurveSet(
        keys=tuple(row["prompt_id"] for row in rows),
        groups=np.asarray([number[str(groups[row["prompt_id"]])] for row in rows]),
        kinds=np.asarray([kinds[row["prompt_id"]] for row in rows]),
        chain=chain,
        loss=loss,
        valid=valid,
        statistics=statistics,
        start={name: np.asarray([state.values[f"last_{name}"] for state in states]) for name in STARTS},
        features=prompt_features(states, [row["prompt_tokens"] for row in rows], chain),
        feature_names=feature_names(chain),
    )


def state_of(row: Mapping[str, Any]) -> PromptState:
    """Of a row of LABELS by a teacher-forced rule."""
    probes = {curve["bits"]: curve["probe_divergence"] for curve in row["curves"][1:]}
    return PromptState(row["prompt_state"], probes)


def folds(curves: CurveSet, count: int, seed: int) -> np.ndarray:
    """int64 [N]: the fold of each prompt, by its group alone. Groups go to folds at random, of near equal
    numbers of groups. UserError: fewer groups than folds."""
    groups = np.unique(curves.groups)
    if not 2 <= count <= len(groups):
        raise UserError(f"{count} folds of {len(groups)} groups: give 2 folds at least, one group in each")
    order = np.random.default_rng(seed).permutation(len(groups))
    of_group = dict(zip(groups[order].tolist(), (np.arange(len(groups)) % count).tolist(), strict=True))
    return np.asarray([of_group[group] for group in curves.groups.tolist()])


def cross_fitted(
    curves: CurveSet, fold_N: np.ndarray, policy: Any, targets: Sequence[float], seed: int = 0
) -> list[Outcome]:
    """The outcome of `policy` (train, test, target bits, seed) -> Outcome at each target: every prompt is
    judged by what was fitted without its fold."""
    found = [Outcome.empty(len(curves)) for _ in targets]
    for fold in np.unique(fold_N):
        train, test = np.nonzero(fold_N != fold)[0], np.nonzero(fold_N == fold)[0]
        train_set, test_set = curves.take(train), curves.take(test)
        for outcome, part in zip(found, policy(train_set, test_set, targets, seed), strict=True):
            outcome.put(test, part)
    return found
