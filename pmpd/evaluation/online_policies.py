"""Policies that watch the decode, simulated along the reference: the state after forward t is that of the
precision that the policy itself ran it at, and decides the precision of forward t + 1.

Legend: N prompts, C precisions, M decode forwards, K settings.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pmpd.evaluation.curve_set import CurveSet, Outcome
from pmpd.evaluation.policies import MULTIPLIERS, Policy, hull_mix
from pmpd.schedulers.loss_model import ridge

QUANTILES = (0.2, 0.4, 0.6, 0.8, 0.95)
"""Of the doubt on the training prompts: where thresholds are tried."""


def doubt(curves: CurveSet, signal: str) -> tuple[np.ndarray, np.ndarray]:
    """Doubt behind each forward at each precision [N, C, M], and behind the prompt [N]."""
    tables, start = curves.statistics[signal], curves.start[signal]
    return (tables, start) if signal == "entropy" else (1 - tables, 1 - start)


@dataclass(frozen=True)
class Thresholds:
    """A setting of the scheduler `online` (`pmpd.schedulers.online`)."""

    signal: str
    lower_below: float
    raise_above: float
    patience: int
    hold: int
    first: int = 0
    """Place in the chain of the highest precision that it uses."""
    last: int | None = None
    """Of the lowest; None: the chain's."""


def follow(curves: CurveSet, setting: Thresholds) -> np.ndarray:
    """Places in the chain of every decode forward under the scheduler `online`: int [N, M]."""
    tables, _ = doubt(curves, setting.signal)
    rows = np.arange(len(curves))
    sure, hold = np.zeros(len(curves), dtype=int), np.zeros(len(curves), dtype=int)
    place = np.full(len(curves), setting.first)
    places = np.zeros((len(curves), tables.shape[2]), dtype=int)
    lowest = len(curves.chain) - 1 if setting.last is None else setting.last
    for t in range(tables.shape[2]):
        places[:, t] = place
        seen = tables[rows, place, t]
        up = seen > setting.raise_above
        sure = np.where(seen < setting.lower_below, sure + 1, 0)
        hold = np.maximum(0, hold - 1)
        down = (sure >= setting.patience) & (hold == 0) & (place < lowest) & ~up
        place = np.where(up, setting.first, np.where(down, place + 1, place))
        hold = np.where(up, setting.hold, np.where(down, 0, hold))
        sure = np.where(up | down, 0, sure)
    return places


def settings_of(train: CurveSet) -> list[Thresholds]:
    """The settings that are tried on the training prompts."""
    found = []
    lowest = len(train.chain) - 1
    parts = sorted({(0, lowest), *((place, place + 1) for place in range(lowest))})
    for signal in ("entropy", "margin"):
        tables, _ = doubt(train, signal)
        marks = np.quantile(tables[:, 0][train.valid], QUANTILES)
        pairs = list(itertools.combinations_with_replacement(marks.tolist(), 2))
        for (low, high), patience, hold, part in itertools.product(pairs, (1, 2), (1, 4), parts):
            found.append(Thresholds(signal, low, high, patience, hold, *part))
    return found


def online(train: CurveSet, test: CurveSet, targets: Sequence[float], seed: int) -> list[Outcome]:
    """The scheduler `online`: entropy or margin with hysteresis, its setting (or mix of two) the best on the
    training prompts."""
    settings = settings_of(train)
    outcomes = [train.outcome(follow(train, setting)) for setting in settings]
    means = np.asarray([(outcome.mean_bits, outcome.mean_loss) for outcome in outcomes])
    return hull_mix(means[:, 0], means[:, 1], lambda k: test.outcome(follow(test, settings[k])), targets)


# ---- Expected loss of the next forward

HISTORY = 0.7
"""Weight of the past in the running mean of the entropy."""


def _signals(
    curves: CurveSet, running: np.ndarray, entropy: np.ndarray, margin: np.ndarray, t: int
) -> np.ndarray:
    """What is known when forward t + 1 is decided: float64 [N, F]. `running`: mean entropy so far."""
    ones = np.ones(len(curves))
    last = np.log(entropy + 1e-3)
    return np.column_stack(
        [last, last**2, margin, np.log(running + 1e-3), ones * np.log(t + 1.0), curves.features]
    )


@dataclass(frozen=True)
class NextLoss:
    """Regression of the next forward's loss at each precision on what a decode has seen so far. `place` = the
    precision that the newest token came from, whose statistics these are."""

    models: tuple[tuple[np.ndarray, np.ndarray], ...]
    """Weights and intercept of each."""
    means: np.ndarray
    deviations: np.ndarray
    scales: np.ndarray
    """[C, C]: what brings a prediction back to the right mean."""

    @staticmethod
    def fit(train: CurveSet) -> NextLoss:
        examples = []
        for place in range(len(train.chain)):
            x, y, valid = _examples(train, place)
            examples.append((x[valid], y[valid]))
        everything = np.concatenate([x for x, _ in examples])
        means, deviations = everything.mean(0), np.maximum(everything.std(0), 1e-9)
        models, scales = [], []
        for x, y in examples:
            points = (x - means) / deviations
            weights, intercept = ridge(points, np.log(y + 1e-4))
            models.append((weights, intercept))
            scales.append(y.mean(0) / np.exp(points @ weights + intercept).mean(0))
        return NextLoss(tuple(models), means, deviations, np.stack(scales))

    def predict(self, signals: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Loss of the next forward at each precision: [N, C]."""
        points = (signals - self.means) / self.deviations
        every = np.stack(
            [
                np.exp(points @ weights + intercept) * scale
                for (weights, intercept), scale in zip(self.models, self.scales, strict=True)
            ]
        )
        return every[place, np.arange(len(signals))]


def _examples(curves: CurveSet, place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signals [N, M, F] before each forward where the decode so far ran at `place`, the loss [N, M, C] of
    that forward at each precision, and which count."""
    entropies, margins = (curves.statistics[name][:, place] for name in ("entropy", "margin"))
    running = curves.start["entropy"].copy()
    entropy, margin = curves.start["entropy"], curves.start["margin"]
    signals = []
    for t in range(entropies.shape[1]):
        signals.append(_signals(curves, running, entropy, margin, t))
        entropy, margin = entropies[:, t], margins[:, t]
        running = HISTORY * running + (1 - HISTORY) * entropy
    return np.stack(signals, axis=1), curves.loss.transpose(0, 2, 1), curves.valid


def follow_prediction(curves: CurveSet, model: NextLoss, multiplier: float) -> np.ndarray:
    """Places in the chain of every decode forward: least predicted loss + multiplier x bits. int [N, M]."""
    rows = np.arange(len(curves))
    place = np.zeros(len(curves), dtype=int)
    entropy, margin = curves.start["entropy"], curves.start["margin"]
    running = entropy.copy()
    places = np.zeros((len(curves), curves.loss.shape[2]), dtype=int)
    for t in range(places.shape[1]):
        costs = model.predict(_signals(curves, running, entropy, margin, t), place)
        place = (costs + multiplier * curves.widths).argmin(1)
        places[:, t] = place
        entropy = curves.statistics["entropy"][rows, place, t]
        margin = curves.statistics["margin"][rows, place, t]
        running = HISTORY * running + (1 - HISTORY) * entropy
    return places


def online_regression(train: CurveSet, test: CurveSet, targets: Sequence[float], seed: int) -> list[Outcome]:
    """Before every forward the precision of least predicted loss + multiplier x bits, from the entropy and
    margin so far and the prompt's features."""
    model = NextLoss.fit(train)
    outcomes = [train.outcome(follow_prediction(train, model, each)) for each in MULTIPLIERS[::4]]
    means = np.asarray([(outcome.mean_bits, outcome.mean_loss) for outcome in outcomes])
    return hull_mix(
        means[:, 0],
        means[:, 1],
        lambda k: test.outcome(follow_prediction(test, model, MULTIPLIERS[::4][k])),
        targets,
    )


ONLINE_POLICIES: dict[str, Policy] = {"online": online, "online regression": online_regression}
"""By name, as `policies.POLICIES`."""
