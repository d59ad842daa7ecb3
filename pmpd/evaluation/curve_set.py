"""Prompts with what every plan of precisions costs and loses on them, run exactly, and their teacher-forced
curves.

Legend: N prompts, C precisions of the chain (0 = the highest), J = C - 1 pairs, M decode forwards of the
longest answer that the labels allow, F features, P plans of `chain.sixths_plans`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from pmpd.errors import UserError
from pmpd.schedulers.base import STATISTICS, PromptState
from pmpd.schedulers.chain import SIXTHS, check_chain, sixths_plans
from pmpd.schedulers.loss_model import feature_names, prompt_features

LABEL_COLUMNS = ("prompt_id", "prompt_tokens", "prompt_state", "curves", "plans", "error")
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
    plan_loss: np.ndarray
    """float64 [N, P], nats: what each plan loses, exactly; sums over the prompt's forwards."""
    plan_bits: np.ndarray
    """float64 [N, P]: bits times forwards."""

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
            plan_loss=self.plan_loss[rows],
            plan_bits=self.plan_bits[rows],
        )

    @property
    def widths(self) -> np.ndarray:
        return np.asarray(self.chain, dtype=float)

    @property
    def forwards(self) -> np.ndarray:
        return self.valid.sum(1).astype(float)

    @property
    def plan_means(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean bits and loss of each plan for all prompts, [P] each, weighted by forwards."""
        total = self.forwards.sum()
        return self.plan_bits.sum(0) / total, self.plan_loss.sum(0) / total

    def under(self, plan_N: np.ndarray | int) -> Outcome:
        """Of a plan per prompt, int [N], or one for all: its place in `chain.sixths_plans`."""
        rows, plans = np.arange(len(self)), np.broadcast_to(plan_N, len(self))
        return Outcome(self.plan_loss[rows, plans], self.plan_bits[rows, plans], self.forwards)

    def summed(self, levels_NM: np.ndarray) -> Outcome:
        """Of any plan per prompt, int [N, M], places in the chain: its bits, and the sum of the curves. Exact
        for one precision throughout only: a forward reads what those before it wrote."""
        loss = np.take_along_axis(self.loss, levels_NM[:, None, :], axis=1)[:, 0]
        bits = self.widths[levels_NM] * self.valid
        return Outcome(loss.sum(1), bits.sum(1), self.forwards)


def curve_set(
    rows: Iterable[Mapping[str, Any]], groups: Mapping[str, Any], kinds: Mapping[str, int]
) -> CurveSet:
    """From rows of LABELS (`LABEL_COLUMNS`) by a teacher-forced rule. `groups`, `kinds`: by prompt_id. Rows
    with an error are left out. UserError where there is none without, or none of plans, or the rows are of
    several chains or several numbers of new tokens."""
    rows = sorted((row for row in rows if not row["error"]), key=lambda row: row["prompt_id"])
    if not rows or any(row.get("curves") is None for row in rows):
        raise UserError(
            "the labels have no curves; label with `pmpd label --rule kl` (or another teacher-forced rule)"
        )
    if any(not row.get("plans") for row in rows):
        raise UserError(
            "the labels hold no losses of plans, as those of rule kl before version 2; label again, with "
            "`pmpd label --rule kl`"
        )
    chain = check_chain(chain_of(rows))
    steps = np.asarray([[plan["steps"] for plan in row["plans"]] for row in rows])  # [N, P, J]
    lengths = np.unique(steps[:, -1])  # of the plan that never switches
    if len(lengths) > 1:
        told = " and ".join(str(length + 1) for length in lengths.tolist())
        raise UserError(
            f"labels of {told} new tokens, whose plans switch at other steps; label all with the same "
            f"--max-new-tokens"
        )
    longest = int(lengths[0])
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
    forwards = valid.sum(1)
    divergence = np.asarray([[plan["divergence"] for plan in row["plans"]] for row in rows], float)
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
        plan_loss=divergence * forwards[:, None],
        plan_bits=bits_of(steps, chain, forwards),
    )


def chain_of(rows: Iterable[Mapping[str, Any]]) -> tuple[int, ...]:
    """The precisions that these rows' curves are of. UserError where rows differ in them."""
    chains = {tuple(curve["bits"] for curve in row["curves"]) for row in rows}
    if len(chains) > 1:
        told = " and ".join(",".join(map(str, chain)) for chain in sorted(chains, reverse=True))
        raise UserError(f"labels of several precision chains: {told}; take those of one chain at a time")
    return chains.pop()


def bits_of(steps: np.ndarray, chain: Sequence[int], forwards: np.ndarray) -> np.ndarray:
    """Bits times forwards, float64 [N, P], of plans with these `switch_steps` int [N, P, J], along a chain of
    so many `forwards` [N] each."""
    most = forwards[:, None, None]
    ends = [
        np.zeros_like(steps[..., :1]),
        np.minimum(steps, most),
        np.broadcast_to(most, steps[..., :1].shape),
    ]
    return np.diff(np.concatenate(ends, axis=2), axis=2) @ np.asarray(chain, float)


def plans_within(rows: Sequence[dict[str, Any]], chain: Sequence[int]) -> None:
    """Leaves in these rows of LABELS what concerns some precisions of theirs alone, the highest among them:
    their curves, and the plans that use no other."""
    held = [curve["bits"] for curve in rows[0]["curves"]]
    plans = sixths_plans(len(held) - 1)
    edges = np.column_stack([np.zeros(len(plans), int), plans, np.full(len(plans), SIXTHS)])
    unused = [place for place, bits in enumerate(held) if bits not in chain]
    kept = np.flatnonzero((edges[:, unused] == edges[:, [place + 1 for place in unused]]).all(1)).tolist()
    starts = [held.index(bits) - 1 for bits in chain[1:]]
    for row in rows:
        row["curves"] = [curve for curve in row["curves"] if curve["bits"] in chain]
        row["plans"] = [
            {**row["plans"][p], "steps": [row["plans"][p]["steps"][at] for at in starts]} for p in kept
        ]


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
