"""When to lower the precision. A scheduler sets, for every row, the number of high-precision steps of each pair.

Legend: B rows, J pairs of the precision chain (chain length - 1).

The common state of all schedulers is `switch_steps` int32 [B, J]: row b runs its decode forwards 1..h_j at the high precision of
pair j. `chain_bits` turns that into the precision of decode forward t. A scheduler either fixes the steps once, at the decision
point (`begin`: after prefill, before decode forward 1), or watches the decode and lowers later (`observe`).
"""

from __future__ import annotations

import hashlib
import inspect
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pmpd import tables
from pmpd.classifier import FRACTIONS, check_fit, load_artefact

NUM_CLASSES = 4
NEVER = 2**30
"""A number of steps that no decode reaches."""


def check_chain(precisions: Sequence[int]) -> tuple[int, ...]:
    """The precision chain as a tuple; it must be distinct and descending, with two members at least."""
    try:
        chain = tuple(operator.index(bits) for bits in precisions)
    except TypeError:
        raise ValueError(f"precisions {precisions!r}: a precision chain is a list of bit widths, e.g. [4, 3, 2]") from None
    if len(chain) < 2:
        raise ValueError(f"precisions {list(chain)}: a precision chain needs two members at least, e.g. 4,3 or 4,3,2")
    if any(low >= high for high, low in pairwise(chain)):
        raise ValueError(f"precisions {list(chain)}: a precision chain is distinct and descending, e.g. 4,3,2")
    return chain


def pairs_of(chain: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise(chain))


def class_steps(max_new_tokens: int) -> tuple[int, int, int, int]:
    """`high_bit_steps` of the four switch classes: (0, m//3, 2(m//3), m) with m = max_new_tokens - 1 decode forwards."""
    m = max_new_tokens - 1
    return 0, m // 3, 2 * (m // 3), m


def chain_bits(chain: Sequence[int], switch_steps: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Precision of decode forward `step` (1-based, int [B]) for rows with `switch_steps` int [B, J]: int [B].

    The lowest p_{i+1} for which every h_j, j <= i, is < step; p_0 where already h_0 is not.
    """
    passed = np.logical_and.accumulate(switch_steps < step[:, None], axis=1)
    return np.asarray(chain)[passed.sum(axis=1)]


@dataclass
class PrefillState:
    """What a scheduler may look at when it decides: the rows just prefilled."""

    keys: Sequence[str]
    """Row keys (prompt ids): all randomness of a row is derived from them."""
    max_new_tokens: Sequence[int]
    prompt_lengths: Sequence[int]
    features: Callable[[], tuple[Tensor, Tensor, Tensor]]
    """KV features of the rows, computed when called: keys and values [B, T, D] float32 zero-padded on the right, and the valid
    lengths int64 [B], all on the model's device."""
    top_probability: Tensor | None = None
    """Softmax probability of new token 1, float32 [B] (only for schedulers with `needs_probability`)."""


class Scheduler(ABC):
    """Decides the precision of every decode forward. See the module's text for the one rule all of them share."""

    needs_probability: ClassVar[bool] = False
    """Whether `begin` and `observe` want the probability of the token just produced (costs a softmax a step)."""

    def __init__(self, precisions: Sequence[int]) -> None:
        self.precisions = check_chain(precisions)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return pairs_of(self.precisions)

    @abstractmethod
    def begin(self, state: PrefillState) -> np.ndarray:
        """`switch_steps` int32 [B, J] for rows at their decision point."""

    def observe(self, switch_steps: np.ndarray, step: np.ndarray, top_probability: np.ndarray) -> None:  # noqa: B027 - optional
        """After decode forward `step` int [B]: may lower entries of `switch_steps` [B, J] in place, never below `step`."""

    def check_model(self, fingerprint: str | None, dim: int, num_heads: int) -> None:  # noqa: B027 - optional
        """ValueError, with the reason, where the scheduler was made for another model: `dim` head dim, `num_heads` KV heads."""

    def describe(self) -> dict[str, Any]:
        """Name and settings, as manifests and generations record them."""
        return {"name": type(self).name, "precisions": list(self.precisions)}

    name: ClassVar[str] = ""

    @staticmethod
    def get_scheduler(name: str, **options: Any) -> Scheduler:
        """The published door: `Scheduler.get_scheduler('naive', precisions=[3, 2], high_bit_steps=10)`.

        Names: naive (= static), kv_cache, confidence, random. Options that only another scheduler uses are accepted and ignored, so
        that one dictionary serves all (as published); an option that no scheduler knows, or that this one lacks, is a ValueError.
        """
        if name not in SCHEDULERS:
            raise ValueError(f"scheduler {name!r}: known are {', '.join(sorted(SCHEDULERS))}")
        known = {option for _, accepted in SCHEDULERS.values() for option in accepted} | set(UNUSED_OPTIONS)
        unknown = sorted(set(options) - known)
        if unknown:
            raise ValueError(f"scheduler option {', '.join(unknown)}: known are {', '.join(sorted(known))}")
        make, accepted = SCHEDULERS[name]
        needed = [option for option, given in inspect.signature(make).parameters.items() if given.default is given.empty]
        missing = [option for option in needed if options.get(option) is None]
        if missing:
            raise ValueError(f"scheduler {name!r} needs the option {', '.join(missing)}; it takes {', '.join(accepted)}")
        return make(**{key: value for key, value in options.items() if key in accepted})


class StaticScheduler(Scheduler):
    """Switches after a fixed number of decode forwards, the same for every row ("naive" in the published code).

    `high_bit_steps`: an int for a chain of two; for a longer chain one int per pair, or one int that all pairs share as
    *additional* steps (h, 2h, …), so that every precision gets its turn.
    """

    name = "static"

    def __init__(self, precisions: Sequence[int], high_bit_steps: int | Sequence[int]) -> None:
        super().__init__(precisions)
        pairs = len(self.precisions) - 1
        given = [high_bit_steps * (j + 1) for j in range(pairs)] if isinstance(high_bit_steps, int | np.integer) else high_bit_steps
        try:
            steps = tuple(operator.index(step) for step in given)
        except TypeError:  # not a list, or not of integers
            steps = ()
        if len(steps) != pairs or min(steps) < 0:
            raise ValueError(
                f"high_bit_steps {high_bit_steps}: the chain {list(self.precisions)} has {pairs} pair(s); "
                "give one whole number of decode forwards >= 0, or one per pair"
            )
        self.high_bit_steps = steps

    def begin(self, state: PrefillState) -> np.ndarray:
        return np.tile(np.asarray(self.high_bit_steps, dtype=np.int32), (len(state.keys), 1))

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "high_bit_steps": list(self.high_bit_steps)}


class ClassScheduler(Scheduler):
    """Decides one of the four switch classes per row and pair at the decision point; subclasses choose the class."""

    @abstractmethod
    def classes(self, state: PrefillState) -> np.ndarray:
        """int [B, J] in 0..3."""

    def begin(self, state: PrefillState) -> np.ndarray:
        steps = np.asarray([class_steps(n) for n in state.max_new_tokens], dtype=np.int32)  # [B, 4]
        return np.take_along_axis(steps, self.classes(state), axis=1)


class RandomScheduler(ClassScheduler):
    """A random class per row and pair, uniform or with a `prior` (four weights, or one such list per pair).

    The draw depends on `seed` and the row's key only: not on batch, order or worker.
    """

    name = "random"

    def __init__(self, precisions: Sequence[int], seed: int = 0, prior: Sequence[float] | Sequence[Sequence[float]] | None = None) -> None:
        super().__init__(precisions)
        self.seed = seed
        pairs = len(self.precisions) - 1
        try:
            weights = np.asarray([1] * NUM_CLASSES if prior is None else prior, dtype=float)
        except (TypeError, ValueError):  # lists of different lengths, or not of numbers
            weights = np.empty(0)
        well_formed = weights.shape in ((NUM_CLASSES,), (pairs, NUM_CLASSES)) and np.isfinite(weights).all()
        if not well_formed or (weights < 0).any() or (weights.sum(axis=-1) <= 0).any():
            raise ValueError(f"prior {prior}: give four weights >= 0 with a positive sum, or one such list for each of the {pairs} pair(s)")
        self.prior = np.broadcast_to(weights / weights.sum(axis=-1, keepdims=True), (pairs, NUM_CLASSES))

    def classes(self, state: PrefillState) -> np.ndarray:
        return np.asarray([[self._draw(key, pair) for pair in range(len(self.prior))] for key in state.keys])

    def _draw(self, key: str, pair: int) -> int:
        digest = hashlib.sha256(f"{self.seed}/{key}/{self.precisions[pair]}-{self.precisions[pair + 1]}".encode()).digest()
        uniform = int.from_bytes(digest[:8], "big") / 2**64
        return min(int(np.searchsorted(np.cumsum(self.prior[pair]), uniform, side="right")), NUM_CLASSES - 1)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "seed": self.seed, "prior": self.prior.tolist()}


class ConfidenceScheduler(Scheduler):
    """Lowers the precision once the model is sure: `patience` forwards in a row with a top probability >= `threshold`.

    Each pair counts for itself and starts counting when the pair before it has switched, so two pairs never switch at one step.
    Decoding with it needs the probabilities on the host after every step.
    """

    name = "confidence"
    needs_probability = True

    def __init__(self, precisions: Sequence[int], threshold: float = 0.9, patience: int = 4) -> None:
        super().__init__(precisions)
        if not 0 < threshold <= 1 or patience < 1:
            raise ValueError(f"threshold {threshold}, patience {patience}: 0 < threshold <= 1 and patience >= 1")
        self.threshold = threshold
        self.patience = patience

    def begin(self, state: PrefillState) -> np.ndarray:
        return np.full((len(state.keys), len(self.precisions) - 1), NEVER, dtype=np.int32)

    def observe(self, switch_steps: np.ndarray, step: np.ndarray, top_probability: np.ndarray) -> None:
        # An open pair keeps its run length k as NEVER - k, so the state of a row stays in its switch_steps.
        for b in range(len(step)):
            open_pairs = np.nonzero(switch_steps[b] > NEVER - self.patience - 1)[0]
            if len(open_pairs) == 0:
                continue
            pair = open_pairs[0]
            run = NEVER - switch_steps[b, pair] + 1 if top_probability[b] >= self.threshold else 0
            switch_steps[b, pair] = step[b] if run >= self.patience else NEVER - run

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "threshold": self.threshold, "patience": self.patience}


DEMO_ARTEFACT = Path(__file__).parent / "demo" / "scheduler"


class KVCacheScheduler(ClassScheduler):
    """The learned scheduler: a classifier per pair reads the prefill cache and chooses the switch class.

    One decision per row and pair, before decode forward 1: all rows in one batch on the device of the features, one transfer of
    B·J·4 scores to the host, none per row.

    precisions: the chain; the artefact must hold a classifier for each of its pairs.
    precision_switch_points: when the four classes switch. None = the artefact's own (0, 1/3, 2/3, 1 of the decode forwards).
        Four ascending numbers in 0..1 = fractions of the decode forwards; four ascending integers with one above 1 = decode forwards.
        The chain's pairs, as published, e.g. {(4, 3), (3, 2)} = the artefact's own.
    save_dir: folder or URI of the artefact (or of published `classifier_{high}_{low}.pt`); None = the one of the embedded demo model.
    dim, num_heads: head dim and number of kv heads of the model; None = not checked.
    model_fingerprint: fingerprint of the model that generates; None = not checked (see also `check_model`).
    """

    name = "kv_cache"

    def __init__(
        self,
        precisions: Sequence[int],
        precision_switch_points: Collection[float] | Collection[tuple[int, int]] | None = None,
        save_dir: str | Path | None = None,
        dim: int | None = None,
        num_heads: int | None = None,
        model_fingerprint: str | None = None,
    ) -> None:
        super().__init__(precisions)
        self.save_dir = str(DEMO_ARTEFACT if save_dir is None else save_dir)
        self.artefact = load_artefact(
            self.save_dir, self.pairs, dim=dim, num_heads=num_heads, model_fingerprint=model_fingerprint, read=tables.read_bytes
        )
        self.switch_points = self._points(precision_switch_points)
        self.last_scores: np.ndarray | None = None
        """Logits of the last decision, float32 [B, J, 4], rows as in its `PrefillState`."""

    def check_model(self, fingerprint: str | None, dim: int, num_heads: int) -> None:
        """ValueError, with the reason, where the artefact does not fit this model."""
        check_fit(self.artefact.config, self.save_dir, dim=dim, num_heads=num_heads, model_fingerprint=fingerprint)

    def begin(self, state: PrefillState) -> np.ndarray:
        steps = np.asarray([self._steps(n) for n in state.max_new_tokens], dtype=np.int32)  # [B, 4]
        return np.take_along_axis(steps, self.classes(state), axis=1)

    def classes(self, state: PrefillState) -> np.ndarray:
        keys_BTD, values_BTD, lengths_B = state.features()
        classifiers = self.artefact.classifiers.to(keys_BTD.device)
        with torch.inference_mode():
            # Through float16, as the labels store them: the classifier decides on exactly what it was trained on.
            keys_BTD, values_BTD = keys_BTD.half().float(), values_BTD.half().float()
            scores = torch.stack([classify(keys_BTD, values_BTD, lengths_B) for classify in classifiers], dim=1).cpu().numpy()
        self.last_scores = scores
        # A row without finite features is the engine's to report; until then it must not lower anything, nor stop its batch mates.
        return np.where(np.isfinite(scores).all(-1), scores.argmax(-1), NUM_CLASSES - 1)

    def _points(self, given: Any) -> tuple[float, ...]:
        """The four switch points that `precision_switch_points` stands for. ValueError, with what is allowed, if it stands for none."""
        own = self.artefact.config.switch_fractions
        try:
            default = given is None or set(given) == set(self.pairs)
            points = np.asarray(own if default else list(given), dtype=float)
        except (TypeError, ValueError):  # not a collection, or not of numbers
            points = np.empty(0)
        ascending = points.shape == (NUM_CLASSES,) and np.isfinite(points).all() and points[0] >= 0 and (np.diff(points) >= 0).all()
        if not ascending or (points[-1] > 1 and (points % 1 != 0).any()):
            raise ValueError(
                f"precision_switch_points {given if given is not None else own}: give four ascending numbers, either fractions 0..1 of the "
                f"decode forwards (e.g. 0, 1/3, 2/3, 1) or whole decode forwards (e.g. 0, 85, 170, 255), or the chain's pairs {self.pairs}"
            )
        return tuple(points.tolist())

    def _steps(self, max_new_tokens: int) -> tuple[int, ...]:
        m = max_new_tokens - 1
        if max(self.switch_points) > 1:
            return tuple(int(point) for point in self.switch_points)
        by_rule = dict(zip(FRACTIONS, class_steps(max_new_tokens), strict=True))
        return tuple(by_rule.get(point, int(point * m)) for point in self.switch_points)

    def describe(self) -> dict[str, Any]:
        config = self.artefact.config
        return {
            **super().describe(),
            "precision_switch_points": list(self.switch_points),
            "dim": config.dim,
            "num_heads": config.num_heads,
            "classifier_fingerprint": self.artefact.fingerprint,
            "labels_fingerprint": config.labels_fingerprint,
            "model_fingerprint": config.model_fingerprint,
        }


UNUSED_OPTIONS = ("max_new_tokens", "dropout_prob")
"""Published options that nothing here needs: each row has its own number of new tokens, and dropout acts in training only."""

SCHEDULERS: dict[str, tuple[Callable[..., Scheduler], tuple[str, ...]]] = {
    "naive": (StaticScheduler, ("precisions", "high_bit_steps")),
    "static": (StaticScheduler, ("precisions", "high_bit_steps")),
    "random": (RandomScheduler, ("precisions", "seed", "prior")),
    "confidence": (ConfidenceScheduler, ("precisions", "threshold", "patience")),
    "kv_cache": (KVCacheScheduler, ("precisions", "precision_switch_points", "save_dir", "dim", "num_heads", "model_fingerprint")),
}
