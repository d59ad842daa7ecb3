"""What a prompt will lose under each plan, from numbers that are known after its prefill: a ridge regression
of the log loss by plan.

Legend: N prompts, F features, P plans of `chain.sixths_plans`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from pmpd.schedulers.base import PROMPT_VALUES, PromptState

RIDGE = 10.0
"""Penalty of the regression, on standardised features."""

SMALLEST = 1e-4
"""Nats added before a logarithm."""

FEATURES = ("none", "no_probe", "one_probe", "probes")
"""What may be known of a prompt: nothing, so that static plans come out; or its state at the highest
precision and its length, with the divergence at no lower precision, at the lowest, or at every one."""


def probed(chain: Sequence[int], features: str) -> tuple[int, ...]:
    """The precisions that `features` probes a prompt at."""
    return {"probes": tuple(chain[1:]), "one_probe": tuple(chain[-1:])}.get(features, ())


def feature_names(chain: Sequence[int], features: str = "probes") -> tuple[str, ...]:
    if features == "none":
        return ()
    return (*sorted(PROMPT_VALUES), *(f"probe_{bits}" for bits in probed(chain, features)), "log_length")


def prompt_features(
    states: Sequence[PromptState], lengths: Sequence[int], chain: Sequence[int], features: str = "probes"
) -> np.ndarray:
    """float64 [N, F] in the order of `feature_names`. Through float32, as the labels store states."""
    if features == "none":
        return np.zeros((len(lengths), 0))
    values = [[state.values[name] for name in sorted(PROMPT_VALUES)] for state in states]
    probes = [[state.probes[bits] for bits in probed(chain, features)] for state in states]
    parts = [np.asarray(part, np.float32).astype(float).reshape(len(states), -1) for part in (values, probes)]
    return np.column_stack([parts[0], np.log(parts[1] + SMALLEST), np.log(np.asarray(lengths, float))])


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
    """[F, P]"""
    intercept: np.ndarray
    """[P]"""
    scale: np.ndarray
    """[P]: what brings predictions, which are made in logarithms, back to the right mean."""
    bits: np.ndarray
    """[P]: average bits of each plan on the prompts that it was fitted to, weighted by forwards."""

    @staticmethod
    def fit(features: np.ndarray, loss: np.ndarray, bits: np.ndarray, forwards: np.ndarray) -> LossModel:
        """From features [N, F] and what each plan lost, nats, and took, bits: [N, P] sums over a prompt's
        `forwards` [N]."""
        mean, deviation = features.mean(0), np.maximum(features.std(0), 1e-9)
        points = (features - mean) / deviation
        weights, intercept = ridge(points, np.log(loss / forwards[:, None] + SMALLEST))
        ones, average = np.ones(loss.shape[1]), bits.sum(0) / forwards.sum()
        plain = LossModel(mean, deviation, weights, intercept, ones, average)
        scale = loss.sum(0) / (plain.predict(features) * forwards[:, None]).sum(0)
        return LossModel(mean, deviation, weights, intercept, scale, average)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Nats a forward by plan, [N, P]."""
        logs = (features - self.mean) / self.deviation @ self.weights + self.intercept
        return np.exp(logs) * self.scale

    def check(self, plans: int, features: int) -> None:
        """ValueError, with the reason, unless all numbers are finite and of so many plans and features."""
        shapes = {"mean": (features,), "deviation": (features,), "weights": (features, plans),
                  "intercept": (plans,), "scale": (plans,), "bits": (plans,)}  # fmt: skip
        for name, shape in shapes.items():
            part = getattr(self, name)
            if part.shape != shape:
                raise ValueError(f"{name} of shape {part.shape}, not {shape}")
            if not np.isfinite(part).all():
                raise ValueError(f"{name} is not finite")
        if not (self.deviation > 0).all() or (self.scale < 0).any() or (self.bits < 0).any():
            raise ValueError("a deviation, a scale or bits below zero")

    def tensors(self) -> list[tuple[str, np.ndarray]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.tensors())


def fingerprint(tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """First 16 hex digits of the SHA-256 over all numbers."""
    parts = [np.ascontiguousarray(part, "<f8").tobytes() for _, part in tensors]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def cheapest(losses: np.ndarray, bits: np.ndarray, multiplier: float) -> np.ndarray:
    """The plan of least loss + multiplier x bits of each prompt: int [N]. `losses` [N, P] nats, `bits` [P] or
    [N, P], both a forward."""
    return (losses + multiplier * bits).argmin(1)
