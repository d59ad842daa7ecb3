"""Whole answers: ROUGE-L of decoded plans against the unquantized model's answer, at equal measured bits.

The label sets hold the answers of every switch class of every pair, so seven plans for a chain of three:
all high, from class 2 of the first pair down to all low. Policies choose one of them for each prompt;
`static` is the best of the seven, or mix of two, for all. Bits are weighted by decode forwards, answers
count one each. What watches a decode was not decoded, so it has no row here.

Legend: N prompts, P plans, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bench._frontier_kv import KvFits, class_losses
from bench._frontier_pack import Judged
from pmpd import storage
from pmpd.evaluation.curve_set import CurveSet
from pmpd.evaluation.frontier import Gain, Resampling, lower_hull, mix_for
from pmpd.evaluation.policies import CLUSTERS, MULTIPLIERS, kmeans, nearest, standardised
from pmpd.metrics.bootstrap import interval
from pmpd.schedulers.budget import risks
from pmpd.schedulers.chain import class_steps, sixths_plans
from pmpd.schedulers.loss_model import ridge
from pmpd.training.data import Features, features_from_table, usable

POINTS = 41
COMPONENTS = 16


@dataclass(frozen=True)
class Answers:
    """What every plan's answer lost, and took."""

    curves: CurveSet
    """Of the same prompts, in this order."""
    loss: np.ndarray
    """float64 [N, P]: 1 - ROUGE-L."""
    bits: np.ndarray
    """float64 [N, P]: bits times forwards."""
    forwards: np.ndarray
    """float64 [N, P]."""
    plans: tuple[tuple[int, int], ...]
    """(pair, class) of each plan."""

    def take(self, rows: np.ndarray) -> Answers:
        return Answers(
            self.curves.take(rows), self.loss[rows], self.bits[rows], self.forwards[rows], self.plans
        )

    def means(self, choice_NP: np.ndarray) -> tuple[float, float]:
        """Mean bits and loss of a policy that draws by these chances."""
        return (
            float((self.bits * choice_NP).sum() / (self.forwards * choice_NP).sum()),
            float((self.loss * choice_NP).sum() / len(self.loss)),
        )


def from_labels(folder: str, rule: str = "rouge_l") -> tuple[CurveSet, Judged, Features]:
    """Prompts, answers and KV features of labels by a rule that decodes, without curves: the cheap features
    are the prompt's length and the principal components of the cache's mean key and value. Every prompt is a
    group of its own, since such labels do not say where it came from."""
    columns = ["prompt_id", "prompt_tokens", "pairs", "keys", "values", "error"]
    table = usable(storage.read_table(folder, columns)).sort_by("prompt_id")
    features = features_from_table(table)
    rows = table.select(["prompt_id", "prompt_tokens", "pairs"]).to_pylist()
    chain = (rows[0]["pairs"][0]["high"], *(pair["low"] for pair in rows[0]["pairs"]))

    def of(name: str) -> np.ndarray:
        return np.asarray([[pair[name] for pair in row["pairs"]] for row in rows])

    means = []
    for part in (features.keys, features.values):
        split = part.float().split(features.lengths.tolist())
        means.append(np.stack([tokens.mean(0).numpy() for tokens in split]))
    pooled = np.concatenate(means, axis=1)
    pooled = (pooled - pooled.mean(0)) / np.maximum(pooled.std(0), 1e-9)
    components = np.linalg.svd(pooled, full_matrices=False)[2][:COMPONENTS]
    count, keys = len(rows), tuple(row["prompt_id"] for row in rows)
    lengths = np.log([row["prompt_tokens"] for row in rows])[:, None]
    nothing = np.zeros((count, len(chain), 1))
    curves = CurveSet(
        keys=keys,
        groups=np.arange(count),
        kinds=np.zeros(count, int),
        chain=chain,
        loss=nothing,
        valid=np.ones((count, 1), bool),
        statistics={},
        start={},
        features=np.concatenate([lengths, pooled @ components.T], axis=1),
        feature_names=("log_length", *(f"pooled_{i}" for i in range(len(components)))),
        plan_loss=np.zeros((count, len(sixths_plans(len(chain) - 1)))),
        plan_bits=np.zeros((count, len(sixths_plans(len(chain) - 1)))),
    )
    judged = Judged(keys, keys, of("label"), of(rule).astype(float), of("branch_tokens"))
    return curves, judged, features


def answers_of(curves: CurveSet, rouge: Judged, new_tokens: int) -> Answers:
    """Prompts of both, in the curves' order."""
    at = {key: row for row, key in enumerate(rouge.keys)}
    rows = np.asarray([row for row, key in enumerate(curves.keys) if key in at])
    curves = curves.take(rows)
    places = np.asarray([at[key] for key in curves.keys])
    pairs = len(curves.chain) - 1
    plans = [(j, k) for j in range(pairs) for k in (3, 2, 1)] + [(pairs - 1, 0)]
    assert rouge.tokens is not None
    steps = class_steps(new_tokens)
    loss, bits, forwards = [], [], []
    for j, k in plans:
        taken = np.maximum(rouge.tokens[places, j, k] - 1, 0).astype(float)
        high = np.minimum(taken, steps[k])
        loss.append(1 - rouge.scores[places, j, k])
        bits.append(high * curves.chain[j] + (taken - high) * curves.chain[j + 1])
        forwards.append(taken)
    stacked = [np.stack(part, axis=1) for part in (loss, bits, forwards)]
    return Answers(curves, stacked[0], stacked[1], stacked[2], tuple(plans))


Choice = np.ndarray
"""float64 [N, P]: chances of the plans."""


def mixes(
    train: Answers, choices: Sequence[tuple[Choice, Choice]], targets: Sequence[float], by_bits: bool
) -> list[Choice]:
    """Of choices (on train, on test), for each target the mix of two neighbours with so many bits on train:
    of those on the lower hull, or (`by_bits`) of all."""
    means = np.asarray([train.means(choice) for choice, _ in choices])
    order = np.unique(means[:, 0], return_index=True)[1] if by_bits else lower_hull(means[:, 0], means[:, 1])
    found = []
    for target in targets:
        a, b, share = mix_for(means[order, 0].tolist(), target)
        found.append((1 - share) * choices[order[a]][1] + share * choices[order[b]][1])
    return found


def one_plan(rows: int, plan: int, plans: int) -> Choice:
    return np.tile(np.eye(plans)[plan], (rows, 1))


def static(train: Answers, test: Answers, targets: Sequence[float]) -> list[Choice]:
    count = len(train.plans)
    choices = [
        (one_plan(len(train.loss), p, count), one_plan(len(test.loss), p, count)) for p in range(count)
    ]
    return mixes(train, choices, targets, by_bits=False)


def by_prediction(
    train: Answers, test: Answers, predicted: Sequence[np.ndarray], targets: Sequence[float]
) -> list[Choice]:
    """Per prompt the plan of least predicted loss [N, P] (on train, on test) + multiplier x bits of an answer
    of full length."""
    chain = train.curves.chain
    nominal = np.asarray([chain[j + 1] + (chain[j] - chain[j + 1]) * k / 3 for j, k in train.plans])
    choices = []
    for multiplier in MULTIPLIERS:
        parts = [np.eye(len(nominal))[(part + multiplier * nominal).argmin(1)] for part in predicted]
        choices.append((parts[0], parts[1]))
    return mixes(train, choices, targets, by_bits=True)


def class_table(train: Answers, test: Answers, of: Callable[[Answers], np.ndarray]) -> list[np.ndarray]:
    """Mean loss of each plan by class of prompt, for both."""
    names, overall = of(train), train.loss.mean(0)
    means = {int(name): train.loss[names == name].mean(0) for name in np.unique(names)}
    return [np.stack([means.get(int(name), overall) for name in of(part)]) for part in (train, test)]


def by_plan(of_class_NJ4: np.ndarray, plans: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.stack([of_class_NJ4[:, j, k] for j, k in plans], axis=1)


def regressed(train: Answers, test: Answers, wanted: np.ndarray) -> list[np.ndarray]:
    """Ridge regression of `wanted` [N of train, P] on the cheap features."""
    x, y = standardised(train.curves.features, test.curves.features)
    weights, intercept = ridge(x, wanted)
    return [points @ weights + intercept for points in (x, y)]


def predictions(
    train: Answers, test: Answers, fits: dict[str, KvFits], seed: int
) -> dict[str, list[np.ndarray]]:
    """Policy -> predicted loss of every plan, on train and test."""
    x, y = standardised(train.curves.features, test.curves.features)
    centres = kmeans(x, CLUSTERS, seed)
    clusters = {id(train): nearest(x, centres), id(test): nearest(y, centres)}
    found = {
        "static per kind": class_table(train, test, lambda part: part.curves.kinds),
        "static per cluster": class_table(train, test, lambda part: clusters[id(part)]),
        "regression of ROUGE-L": regressed(train, test, train.loss),
    }
    if train.curves.plan_loss.any():
        of_class = class_losses(train.curves)
        found["regression of the divergence"] = regressed(train, test, by_plan(of_class, train.plans))
    for name, fitted in fits.items():
        place = {key: row for row, key in enumerate(fitted.keys)}
        rows = [np.asarray([place[key] for key in part.curves.keys]) for part in (train, test)]
        (fold,) = np.unique(fitted.fold[rows[1]]).tolist()
        of_class = -fitted.outputs[fold] if fitted.kind == "losses" else risks(fitted.outputs[fold])
        if fitted.kind != "losses":  # what the pairs before it risk adds up
            of_class = of_class + np.pad(np.cumsum(of_class[:, :-1, :1], axis=1), [(0, 0), (1, 0), (0, 0)])
        found[f"KV classifier, {name}"] = [by_plan(of_class[each], train.plans) for each in rows]
    return found


def gains(
    answers: Answers,
    fold_N: np.ndarray,
    targets: Sequence[float],
    fits: dict[str, KvFits],
    resamples: int,
    seed: int,
) -> tuple[list[Gain], list[Gain]]:
    """Of the policies and of the oracle against the static frontier, every prompt judged by what was chosen
    without its fold."""
    budgets = np.linspace(answers.curves.chain[-1], answers.curves.chain[0], POINTS).tolist()
    frontier = [np.zeros_like(answers.loss) for _ in budgets]
    chosen: dict[str, list[Choice]] = {}
    for fold in np.unique(fold_N):
        train, test = (answers.take(np.nonzero(mask)[0]) for mask in (fold_N != fold, fold_N == fold))
        held = fold_N == fold
        for table, choice in zip(frontier, static(train, test, budgets), strict=True):
            table[held] = choice
        for name, predicted in predictions(train, test, fits, seed).items():
            tables = chosen.setdefault(name, [np.zeros_like(answers.loss) for _ in targets])
            for table, choice in zip(tables, by_prediction(train, test, predicted, targets), strict=True):
                table[held] = choice
    oracle = by_prediction(answers, answers, [answers.loss, answers.loss], targets)
    resampling = Resampling.of(answers.curves.groups, resamples, seed)
    points = sorted(
        (_resampled(answers, choice, resampling) for choice in frontier), key=lambda point: point[0]
    )
    bits, loss = (np.asarray([point[i] for point in points]) for i in (0, 1))
    bits_GR, loss_GR = (np.stack([point[i] for point in points]) for i in (2, 3))  # type: ignore[misc]
    order = bits_GR.argsort(0)
    bits_GR, loss_GR = (np.take_along_axis(table, order, axis=0) for table in (bits_GR, loss_GR))

    def gain(name: str, choice: Choice, target: float) -> Gain:
        own_bits, own_loss, bits_R, loss_R = _resampled(answers, choice, resampling)
        static_R = np.asarray(
            [np.interp(bits_R[r], bits_GR[:, r], loss_GR[:, r]) for r in range(len(bits_R))]
        )
        best = float(np.interp(own_bits, bits, loss))
        error = float((static_R - loss_R).std())
        low, high = interval(static_R - loss_R)
        p = math.erfc(abs(best - own_loss) / error / math.sqrt(2)) if error > 1e-9 else 1.0
        return Gain(name, target, own_bits, own_loss, best, best - own_loss, low, high, error, p)

    return (
        [gain(name, c, t) for name, some in chosen.items() for c, t in zip(some, targets, strict=True)],
        [gain("oracle", c, t) for c, t in zip(oracle, targets, strict=True)],
    )


def _resampled(
    answers: Answers, choice: Choice, resampling: Resampling
) -> tuple[float, float, np.ndarray, np.ndarray]:
    """Mean bits and loss, and both of every resample."""
    bits, forwards, loss = (
        (table * choice).sum(1) for table in (answers.bits, answers.forwards, answers.loss)
    )
    counts = resampling.counts
    mean_bits, mean_loss = answers.means(choice)
    return mean_bits, mean_loss, counts @ bits / (counts @ forwards), counts @ loss / counts.sum(1)
