"""What a prompt will lose at each precision, from numbers that are known after its prefill: a ridge
regression of the log loss by precision and quarter of the decode.

Legend: N prompts, F features, C precisions of the chain (0 = the highest), M decode forwards, S segments of
the decode, P plans.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from pmpd.schedulers.base import PROMPT_VALUES, PromptState

SEGMENTS = 4
RIDGE = 10.0
"""Penalty of the regression, on standardised features."""

SMALLEST = 1e-4
"""Nats added before a logarithm."""

FEATURES = ("no_probe", "one_probe", "probes")
"""What may be known of a prompt: its state at the highest precision and its length, with the divergence at no
lower precision, at the lowest, or at every one."""


def probed(chain: Sequence[int], features: str) -> tuple[int, ...]:
    """The precisions that `features` probes a prompt at."""
    return {"probes": tuple(chain[1:]), "one_probe": tuple(chain[-1:]), "no_probe": ()}[features]


def feature_names(chain: Sequence[int], features: str = "probes") -> tuple[str, ...]:
    return (*sorted(PROMPT_VALUES), *(f"probe_{bits}" for bits in probed(chain, features)), "log_length")


def prompt_features(
    states: Sequence[PromptState], lengths: Sequence[int], chain: Sequence[int], features: str = "probes"
) -> np.ndarray:
    """float64 [N, F] in the order of `feature_names`. Through float32, as the labels store states."""
    values = [[state.values[name] for name in sorted(PROMPT_VALUES)] for state in states]
    probes = [[state.probes[bits] for bits in probed(chain, features)] for state in states]
    parts = [np.asarray(part, np.float32).astype(float).reshape(len(states), -1) for part in (values, probes)]
    return np.column_stack([parts[0], np.log(parts[1] + SMALLEST), np.log(np.asarray(lengths, float))])


def segment_of(forwards: int) -> np.ndarray:
    """The segment of each decode forward: int [M]."""
    return np.minimum(np.arange(forwards) * SEGMENTS // forwards, SEGMENTS - 1)


def segment_means(loss: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Mean of `loss` [N, C, M] over each segment's forwards that are `valid` bool [N, M]: [N, C, S]; of a
    segment that a reference does not reach, the whole decode's."""
    at = segment_of(loss.shape[2])
    whole = loss.sum(2) / valid.sum(1)[:, None]
    parts = []
    for s in range(SEGMENTS):
        count = valid[:, at == s].sum(1)[:, None]
        parts.append(np.where(count > 0, loss[:, :, at == s].sum(2) / np.maximum(count, 1), whole))
    return np.stack(parts, axis=2)


def ridge(x: np.ndarray, y: np.ndarray, penalty: float = RIDGE) -> tuple[np.ndarray, np.ndarray]:
    """Linear regression of y [N, K] on standardised x [N, F], with an intercept that is not penalised:
    weights [F, K] and intercept [K]."""
    mean = y.mean(0)
    return np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ (y - mean)), mean


@dataclass(frozen=True)
class LossModel:
    """A fitted regression; float64."""

    mean: np.ndarray
    """[F], of the features."""
    deviation: np.ndarray
    """[F]"""
    weights: np.ndarray
    """[F, C·S]"""
    intercept: np.ndarray
    """[C·S]"""
    scale: np.ndarray
    """[C, S]: what brings predictions, which are made in logarithms, back to the right mean."""

    @staticmethod
    def fit(features: np.ndarray, means: np.ndarray) -> LossModel:
        """From features [N, F] and what the prompts lost by precision and segment [N, C, S], nats a
        forward."""
        mean, deviation = features.mean(0), np.maximum(features.std(0), 1e-9)
        points = (features - mean) / deviation
        weights, intercept = ridge(points, np.log(means + SMALLEST).reshape(len(means), -1))
        plain = LossModel(mean, deviation, weights, intercept, np.ones(means.shape[1:]))
        return LossModel(mean, deviation, weights, intercept, means.mean(0) / plain.predict(features).mean(0))

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Nats a forward by precision and segment, [N, C, S]."""
        logs = (features - self.mean) / self.deviation @ self.weights + self.intercept
        return np.exp(logs).reshape(-1, *self.scale.shape) * self.scale

    def check(self, precisions: int, features: int) -> None:
        """ValueError, with the reason, unless all numbers are finite and of these precisions and features."""
        count = precisions * SEGMENTS
        shapes = {"mean": (features,), "deviation": (features,), "weights": (features, count),
                  "intercept": (count,), "scale": (precisions, SEGMENTS)}  # fmt: skip
        for name, shape in shapes.items():
            part = getattr(self, name)
            if part.shape != shape:
                raise ValueError(f"{name} of shape {part.shape}, not {shape}")
            if not np.isfinite(part).all():
                raise ValueError(f"{name} is not finite")
        if not (self.deviation > 0).all() or (self.scale < 0).any():
            raise ValueError("a deviation or scale below zero")

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 over all numbers."""
        parts = [np.ascontiguousarray(getattr(self, field.name), "<f8").tobytes() for field in fields(self)]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def plan_losses(curves: np.ndarray, plans: np.ndarray) -> np.ndarray:
    """What plans int [P, M] (places in the chain) lose under predictions [N, C, S]: sums over the forwards,
    nats [N, P]."""
    precisions, segments = curves.shape[1:]
    at = segment_of(plans.shape[1])
    counts = np.zeros((len(plans), precisions, segments))
    for s in range(segments):
        for c in range(precisions):
            counts[:, c, s] = (plans[:, at == s] == c).sum(1)
    return curves.reshape(len(curves), -1) @ counts.reshape(len(plans), -1).T


def cheapest(losses: np.ndarray, bits: np.ndarray, multiplier: float) -> np.ndarray:
    """The plan of least loss + multiplier x bits of each prompt: int [N]. `losses` [N, P] nats, `bits` [P] or
    [N, P]: sums over the forwards."""
    return (losses + multiplier * bits).argmin(1)
