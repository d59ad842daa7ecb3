"""Policies that choose a progressive plan: static ones, those that look at the prompt, and those that watch
the decode, too.

A policy is a function (train, test, target bits, seed) -> Outcome on `test` per target. It is fitted and
calibrated on `train` alone. All choose among the progressive plans of `chain.sixths_plans`, whose losses the
labels hold, run exactly. Those that choose a plan per prompt do so by predicted loss + multiplier x bits;
the multiplier is one number for the whole workload, and a mix of two neighbouring multipliers meets the
target on `train` exactly.

Legend: N prompts, P plans, F features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from pmpd.errors import UserError
from pmpd.evaluation.curve_set import CurveSet, Outcome
from pmpd.evaluation.frontier import lower_hull, mix_for
from pmpd.schedulers.chain import SIXTHS, plan_points
from pmpd.schedulers.loss_model import LossModel, cheapest, feature_names
from pmpd.schedulers.stop_model import WATCHED, StopModel, pair_for, path, watched

Policy = Callable[[CurveSet, CurveSet, Sequence[float], int], list[Outcome]]

MULTIPLIERS = np.geomspace(1e-5, 1e2, 120)
"""Nats a bit, tried in turn."""

CLUSTERS = 6


def hull_mix(
    train_bits_K: np.ndarray,
    train_loss_K: np.ndarray,
    test: Callable[[int], Outcome],
    targets: Sequence[float],
) -> list[Outcome]:
    """Of K settings with these means on the training prompts, the mix of two on the lower hull that meets
    each target there, on the test prompts."""
    hull = lower_hull(train_bits_K, train_loss_K)
    outcomes = {}
    found = []
    for target in targets:
        first, second, share = mix_for(train_bits_K[hull].tolist(), target)
        for at in (first, second):
            if at not in outcomes:
                outcomes[at] = test(int(hull[at]))
        found.append(Outcome.mix(outcomes[first], outcomes[second], share))
    return found


def static(train: CurveSet, test: CurveSet, targets: Sequence[float], seed: int) -> list[Outcome]:
    """The best plan, or mix of two, for all prompts."""
    return hull_mix(*train.plan_means, test.under, targets)


def random_plan(train: CurveSet, test: CurveSet, targets: Sequence[float], seed: int) -> list[Outcome]:
    """One of the lower hull's plans at random per prompt, at the target's bits on average: a policy without
    any knowledge, whose gain is 0 at most."""
    bits, loss = train.plan_means
    hull = lower_hull(bits, loss)
    draws = np.random.default_rng(seed).random(len(test))
    found = []
    for target in targets:
        first, second, share = mix_for(bits[hull].tolist(), target)
        found.append(test.under(np.where(draws < share, hull[second], hull[first])))
    return found


Prediction = Callable[[CurveSet], np.ndarray]
"""Prompts -> predicted loss of each plan, nats a forward, [N, P]."""


def by_prediction(
    train: CurveSet, test: CurveSet, targets: Sequence[float], predicted: Prediction, hindsight: bool = False
) -> list[Outcome]:
    """Each prompt takes the plan of least predicted loss + multiplier x the plan's average bits; with
    `hindsight`, x the bits that it takes of this prompt."""
    return [
        Outcome.mix(test.under(first), test.under(second), share)
        for first, second, share in choices_by_prediction(train, test, targets, predicted, hindsight)
    ]


def choices_by_prediction(
    train: CurveSet, test: CurveSet, targets: Sequence[float], predicted: Prediction, hindsight: bool = False
) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Per target, the plans that each prompt of `test` takes under two neighbouring multipliers, int [N]
    each, and the share of the second."""
    average, _ = train.plan_means

    def chosen(part: CurveSet) -> np.ndarray:  # [N, K]
        costs = predicted(part)
        bits = part.plan_bits / part.forwards[:, None] if hindsight else average
        return np.stack([cheapest(costs, bits, each) for each in MULTIPLIERS], axis=1)

    # by bits alone, not by the loss on the prompts that the prediction was fitted to
    taken = np.take_along_axis(train.plan_bits, chosen(train), axis=1).sum(0) / train.forwards.sum()
    bits_K, first = np.unique(taken, return_index=True)
    at = chosen(test)
    mixes = [mix_for(bits_K.tolist(), target) for target in targets]
    return [(at[:, first[a]], at[:, first[b]], share) for a, b, share in mixes]


def oracle_plan(train: CurveSet, test: CurveSet, targets: Sequence[float], seed: int) -> list[Outcome]:
    """The plan that hindsight chooses for each prompt: no policy that decides once per prompt among these
    plans gains more."""
    return by_prediction(
        test, test, targets, lambda part: part.plan_loss / part.forwards[:, None], hindsight=True
    )


# ---- Prompts in classes


def class_prediction(
    train: CurveSet, test: CurveSet, train_class: np.ndarray, test_class: np.ndarray
) -> Prediction:
    """The mean loss of a prompt's class."""

    def mean(part: CurveSet) -> np.ndarray:
        return part.plan_means[1]

    names = np.unique(train_class)
    means = {int(name): mean(train.take(np.flatnonzero(train_class == name))) for name in names}
    classes, overall = {id(train): train_class, id(test): test_class}, mean(train)
    return lambda part: np.stack([means.get(name, overall) for name in classes[id(part)].tolist()])


def per_kind(train: CurveSet, test: CurveSet, targets: Sequence[float], seed: int) -> list[Outcome]:
    """A static plan per kind of prompt."""
    return by_prediction(train, test, targets, class_prediction(train, test, train.kinds, test.kinds))


def per_cluster(train: CurveSet, test: CurveSet, targets: Sequence[float], seed: int) -> list[Outcome]:
    """A static plan per cluster of the prompts' features (k-means)."""
    x, y = standardised(train.features, test.features)
    centres = kmeans(x, CLUSTERS, seed)
    at, test_at = nearest(x, centres), nearest(y, centres)
    return by_prediction(train, test, targets, class_prediction(train, test, at, test_at))


def standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, deviation = train.mean(0), np.maximum(train.std(0), 1e-9)
    return (train - mean) / deviation, (test - mean) / deviation


def kmeans(points: np.ndarray, count: int, seed: int, rounds: int = 50) -> np.ndarray:
    """Centres [K, F] by Lloyd's rounds from random points; an empty cluster keeps its centre."""
    generator = np.random.default_rng(seed)
    centres = points[generator.choice(len(points), min(count, len(points)), replace=False)]
    for _ in range(rounds):
        at = nearest(points, centres)
        moved = np.stack(
            [points[at == k].mean(0) if (at == k).any() else centres[k] for k in range(len(centres))]
        )
        if np.allclose(moved, centres):
            break
        centres = moved
    return centres


def nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((points[:, None] - centres[None]) ** 2).sum(-1).argmin(1)


# ---- Regression of the losses


def features_of(curves: CurveSet, features: str) -> np.ndarray:
    """The features that `features`, one of `schedulers.loss_model.FEATURES`, takes: all but some probes, or
    none; [N, F]."""
    if features == "none":
        return curves.features[:, :0]
    without = {f"probe_{bits}" for bits in curves.chain} - set(feature_names(curves.chain, features))
    return curves.features[:, [name not in without for name in curves.feature_names]]


def fitted(train: CurveSet, features: str) -> LossModel:
    return LossModel.fit(features_of(train, features), train.plan_loss, train.plan_bits, train.forwards)


def regression_prediction(train: CurveSet, features: str = "probes") -> Prediction:
    """The loss of each plan, regressed on the prompt's features, as the scheduler `regression` does it."""
    model = fitted(train, features)
    return lambda part: model.predict(features_of(part, features))


def regression(
    train: CurveSet, test: CurveSet, targets: Sequence[float], seed: int, features: str = "probes"
) -> list[Outcome]:
    """The plan per prompt by `regression_prediction`."""
    return by_prediction(train, test, targets, regression_prediction(train, features))


# ---- Switching while the decode is watched


def seen_by(curves: CurveSet, pair: int, at: int, features: str) -> np.ndarray:
    """What is known of each prompt when `at` sixths of the answer have run at the pair's high precision:
    float64 [N, F]."""
    known = features_of(curves, features)
    if at == 0:
        return known
    points, means = plan_points(curves.loss.shape[2] + 1), []
    for start in (0, points[at - 1]):
        valid = curves.valid[:, start : points[at]]
        parts = [curves.statistics[name][:, pair, start : points[at]] for name in WATCHED]
        count = np.maximum(valid.sum(1), 1)
        means.append(np.stack([(part * valid).sum(1) / count for part in parts], axis=1))
    return np.concatenate([known, watched(*means)], axis=1)


def fitted_stops(train: CurveSet, features: str) -> StopModel:
    """For each pair and sixth, the regression of what is left to lose. UserError where no prompt's reference
    comes to a sixth."""
    pairs, points = len(train.chain) - 1, plan_points(train.loss.shape[2] + 1)

    def part(pair: int, at: int) -> LossModel:
        rows = np.flatnonzero(train.forwards > points[at])
        if not len(rows):
            most = int(train.forwards.max()) + 1
            raise UserError(
                f"labels of {points[-1] + 1} new tokens, but no training prompt's reference has more than "
                f"{most}, so nothing shows what later switches lose; label with --max-new-tokens {most} or "
                f"more prompts, or train with --no-watch"
            )
        some, left = train.take(rows), path(pairs, pair)[at:]
        lost = some.loss[:, pair, : points[at]].sum(1)[:, None]
        return LossModel.fit(
            seen_by(some, pair, at, features),
            np.maximum(some.plan_loss[:, left] - lost, 0),
            some.plan_bits[:, left] - some.widths[pair] * points[at],
            some.forwards - points[at],
        )

    return StopModel(tuple(tuple(part(pair, at) for at in range(SIXTHS)) for pair in range(pairs)))


def stops(model: StopModel, curves: CurveSet, pair: int, features: str) -> Callable[[float], np.ndarray]:
    """Multiplier -> the plan of each prompt, places in `chain.sixths_plans`, int [N]."""
    thresholds = np.stack(
        [model.thresholds(pair, at, seen_by(curves, pair, at, features)) for at in range(SIXTHS)]
        + [np.full(len(curves), -np.inf)]
    )
    plans = path(len(curves.chain) - 1, pair)
    return lambda multiplier: plans[(multiplier >= thresholds).argmax(0)]


def stopping(
    train: CurveSet, test: CurveSet, targets: Sequence[float], seed: int, features: str = "no_probe"
) -> list[Outcome]:
    """Each prompt begins at the precision above the target and switches to the one below at the sixth of the
    answer where the regression, which sees the decode so far too, says so."""
    model, found, rows = fitted_stops(train, features), [], np.arange(len(train))
    for target in targets:
        pair = pair_for(train.chain, target)
        chosen, at = (
            [plans_at(each) for each in MULTIPLIERS]
            for plans_at in (stops(model, part, pair, features) for part in (train, test))
        )
        taken = np.asarray([train.plan_bits[rows, plans].sum() for plans in chosen]) / train.forwards.sum()
        bits_K, first = np.unique(taken, return_index=True)
        a, b, share = mix_for(bits_K.tolist(), target)
        found.append(Outcome.mix(test.under(at[first[a]]), test.under(at[first[b]]), share))
    return found


POLICIES: dict[str, Policy] = {
    "random": random_plan,
    "static per kind": per_kind,
    "static per cluster": per_cluster,
    "regression": regression,
    "regression, one probe": functools.partial(regression, features="one_probe"),
    "regression, no probe": functools.partial(regression, features="no_probe"),
    "stopping": functools.partial(stopping, features="probes"),
    "stopping, one probe": functools.partial(stopping, features="one_probe"),
    "stopping, no probe": functools.partial(stopping, features="no_probe"),
    "stopping, decode alone": functools.partial(stopping, features="none"),
}
"""What is compared with `static`, by name. A program may add more."""

ORACLE = "oracle"
"""`oracle_plan`, by name: what hindsight gains."""
