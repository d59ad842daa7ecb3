"""Policies that decide before decode forward 1: static ones, and those that look at the prompt.

A policy is a function (train, test, target bits, seed) -> Outcome on `test` per target. It is fitted and
calibrated on `train` alone. Those that choose a plan per prompt do so by predicted loss + multiplier x bits;
the multiplier is one number for the whole workload, and a mix of two neighbouring multipliers meets the
target on `train` exactly.

Legend: N prompts, C precisions, M decode forwards, P plans, F features, S segments of the decode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from pmpd.evaluation.curve_set import CurveSet, Outcome
from pmpd.evaluation.frontier import lower_hull, mix_for
from pmpd.schedulers.chain import static_plans
from pmpd.schedulers.loss_model import LossModel, cheapest, feature_names, plan_losses, segment_means

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


def _plans(curves: CurveSet) -> np.ndarray:
    return static_plans(curves.chain, curves.loss.shape[2])


def _best_mixes(
    train: CurveSet, test: CurveSet, targets: Sequence[float], plans: np.ndarray
) -> list[Outcome]:
    """For each target the mix of two of `plans` that is best in training, the same for all prompts."""
    loss, bits = train.plan_tables(plans)
    total = train.forwards.sum()
    test_loss, test_bits = test.plan_tables(plans)
    return hull_mix(
        bits.sum(0) / total,
        loss.sum(0) / total,
        lambda k: Outcome(test_loss[:, k], test_bits[:, k], test.forwards),
        targets,
    )


def static(train: CurveSet, test: CurveSet, targets: Sequence[float], seed: int) -> list[Outcome]:
    """The best progressive plan, or mix of two, for all prompts."""
    return _best_mixes(train, test, targets, _plans(train))


def random_plan(train: CurveSet, test: CurveSet, targets: Sequence[float], seed: int) -> list[Outcome]:
    """One of the lower hull's plans at random per prompt, at the target's bits on average: a policy without
    any knowledge, whose gain is 0 at most."""
    plans = _plans(train)
    loss, bits = train.plan_tables(plans)
    total = train.forwards.sum()
    hull = lower_hull(bits.sum(0) / total, loss.sum(0) / total)
    means = (bits.sum(0) / total)[hull]
    test_loss, test_bits = test.plan_tables(plans[hull])
    draws = np.random.default_rng(seed).random(len(test))
    rows = np.arange(len(test))
    found = []
    for target in targets:
        first, second, share = mix_for(means.tolist(), target)
        chosen = np.where(draws < share, second, first)
        found.append(Outcome(test_loss[rows, chosen], test_bits[rows, chosen], test.forwards))
    return found


def any_order(train: CurveSet, test: CurveSet, targets: Sequence[float], seed: int) -> list[Outcome]:
    """A static plan that may rise: for each decode forward the precision of least mean loss + multiplier x
    bits."""
    weight = np.maximum(train.valid.sum(0), 1)
    mean = train.loss.sum(0) / weight  # [C, M]
    costs = mean[None] + MULTIPLIERS[:, None, None] * train.widths[None, :, None]
    return _best_mixes(train, test, targets, np.unique(costs.argmin(1), axis=0))


Prediction = Callable[[CurveSet, np.ndarray], np.ndarray]
"""(prompts, plans [P, M]) -> predicted loss [N, P] of an answer of full length."""


def choices_by_prediction(
    train: CurveSet, test: CurveSet, targets: Sequence[float], predicted: Prediction, hindsight: bool = False
) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Per target, the plans (rows of `static_plans`) that each prompt of `test` takes under two neighbouring
    multipliers, int [N] each, and the share of the second: each prompt has the plan of least predicted loss
    + multiplier x bits, both of an answer of full length, since nobody knows when it will end; with
    `hindsight`, sums over the forwards that it took."""
    plans = _plans(train)
    nominal = train.widths[plans].sum(1)

    def chosen(part: CurveSet) -> np.ndarray:  # [N, K]
        costs = predicted(part, plans)
        weights = part.plan_tables(plans)[1] if hindsight else nominal
        return np.stack([cheapest(costs, weights, each) for each in MULTIPLIERS], axis=1)

    # by bits alone, not by the loss on the prompts that the prediction was fitted to
    _, bits = train.plan_tables(plans)
    train_bits = np.take_along_axis(bits, chosen(train), axis=1).sum(0) / train.forwards.sum()
    bits_K, first = np.unique(train_bits, return_index=True)
    at = chosen(test)
    mixes = [mix_for(bits_K.tolist(), target) for target in targets]
    return [(at[:, first[a]], at[:, first[b]], share) for a, b, share in mixes]


def by_prediction(
    train: CurveSet, test: CurveSet, targets: Sequence[float], predicted: Prediction, hindsight: bool = False
) -> list[Outcome]:
    """What `choices_by_prediction` comes to."""
    loss, bits = test.plan_tables(_plans(train))
    rows = np.arange(len(test))
    return [
        Outcome.mix(
            Outcome(loss[rows, first], bits[rows, first], test.forwards),
            Outcome(loss[rows, second], bits[rows, second], test.forwards),
            share,
        )
        for first, second, share in choices_by_prediction(train, test, targets, predicted, hindsight)
    ]


def oracle_plan(train: CurveSet, test: CurveSet, targets: Sequence[float], seed: int) -> list[Outcome]:
    """The plan that hindsight chooses for each prompt: no policy that decides once per prompt among these
    plans gains more."""
    return by_prediction(test, test, targets, lambda part, plans: part.plan_tables(plans)[0], hindsight=True)


def oracle_token(train: CurveSet, test: CurveSet, targets: Sequence[float], seed: int) -> list[Outcome]:
    """The precision that hindsight chooses for each decode forward."""
    outcomes = []
    for multiplier in MULTIPLIERS:
        places = (test.loss + multiplier * test.widths[None, :, None]).argmin(1)
        outcomes.append(test.outcome(places))
    means = np.asarray([(outcome.mean_bits, outcome.mean_loss) for outcome in outcomes])
    return hull_mix(means[:, 0], means[:, 1], lambda k: outcomes[k], targets)


# ---- Prompts in classes


def class_prediction(
    train: CurveSet, test: CurveSet, train_class: np.ndarray, test_class: np.ndarray
) -> Prediction:
    """The mean loss of a prompt's class."""
    loss, _ = train.plan_tables(_plans(train))
    overall = loss.sum(0) / train.forwards.sum()
    means = {}
    for name in np.unique(train_class):
        rows = train_class == name
        means[int(name)] = loss[rows].sum(0) / train.forwards[rows].sum()
    classes = {id(train): train_class, id(test): test_class}

    def predicted(part: CurveSet, _: np.ndarray) -> np.ndarray:
        names = classes[id(part)].tolist()
        return np.stack([means.get(name, overall) for name in names]) * part.valid.shape[1]

    return predicted


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


# ---- Regression of the loss curve


def features_of(curves: CurveSet, features: str) -> np.ndarray:
    """All features but the probes that `features`, one of `schedulers.loss_model.FEATURES`, does not take:
    [N, F]."""
    without = {f"probe_{bits}" for bits in curves.chain} - set(feature_names(curves.chain, features))
    return curves.features[:, [name not in without for name in curves.feature_names]]


def regression_prediction(train: CurveSet, features: str = "probes") -> Prediction:
    """The loss curve, by precision and segment, regressed on the prompt's features; the plan per prompt by
    the prediction. As the scheduler `regression` does it."""
    model = LossModel.fit(features_of(train, features), segment_means(train.loss, train.valid))
    return lambda part, plans: plan_losses(model.predict(features_of(part, features)), plans)


def regression(
    train: CurveSet, test: CurveSet, targets: Sequence[float], seed: int, features: str = "probes"
) -> list[Outcome]:
    """The plan per prompt by `regression_prediction`."""
    return by_prediction(train, test, targets, regression_prediction(train, features))


POLICIES: dict[str, Policy] = {
    "random": random_plan,
    "static, any order": any_order,
    "static per kind": per_kind,
    "static per cluster": per_cluster,
    "regression": regression,
    "regression, one probe": functools.partial(regression, features="one_probe"),
    "regression, no probe": functools.partial(regression, features="no_probe"),
}
"""What is compared with `static`, by name. A program may add more."""

ORACLES: dict[str, Policy] = {"oracle, plan": oracle_plan, "oracle, token": oracle_token}
"""What hindsight gains, by the time of decision."""
