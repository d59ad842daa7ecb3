"""The learned scheduler: one classifier per pair looks at the KV cache after prefill (PMPD, section 3.3)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from pmpd.errors import UserError
from pmpd.schedulers.artefact import check_fit, load_artefact, reader
from pmpd.schedulers.base import PrefillState, SchedulerEntry
from pmpd.schedulers.chain import FRACTIONS, NUM_CLASSES, class_steps
from pmpd.schedulers.random import ClassScheduler

DEMO_ARTEFACT = Path(__file__).parents[1] / "demo" / "scheduler"


class KVCacheScheduler(ClassScheduler):
    """The learned scheduler: a classifier per pair reads the prefill cache and chooses the switch class.

    One decision per row and pair, before decode forward 1: all rows in one batch on the device of the
    features, one transfer of B·J·4 scores to the host, none per row.

    precisions: the chain; the artefact must hold a classifier for each of its pairs. precision_switch_points:
    when the four classes switch. None = the artefact's own (0, 1/3, 2/3, 1 of the decode forwards). Four
    ascending numbers in 0..1 = fractions of the decode forwards; four ascending integers with one above 1 =
    decode forwards. The chain's pairs, as published, e.g. {(4, 3), (3, 2)} = the artefact's own. save_dir:
    folder or URI of the artefact (or of published `classifier_{high}_{low}.pt`); None = the one of the
    embedded demo model. dim, num_heads: head dim and number of kv heads of the model; None = not checked.
    model_fingerprint: fingerprint of the model that generates; None = not checked (see also `check_model`).
    published_steps: as the published code does it. The decision is taken after the first new token has been
    read, so after one forward at the high precision, which the classifier sees too; each class has that
    forward more; and the first pair's decision is that of all pairs.
    """

    name = "kv_cache"
    outputs: ClassVar[tuple[str, ...]] = ("logits",)
    """What the classifiers may say of a class (`ArtefactConfig.outputs`)."""

    def __init__(
        self,
        precisions: Sequence[int],
        precision_switch_points: Collection[float] | Collection[tuple[int, int]] | None = None,
        save_dir: str | Path | None = None,
        dim: int | None = None,
        num_heads: int | None = None,
        model_fingerprint: str | None = None,
        published_steps: bool = False,
    ) -> None:
        super().__init__(precisions)
        self.published_steps = published_steps
        self.decision_step = int(published_steps)
        self.save_dir = str(DEMO_ARTEFACT if save_dir is None else save_dir)
        self.artefact = load_artefact(
            self.save_dir,
            self.pairs,
            dim=dim,
            num_heads=num_heads,
            model_fingerprint=model_fingerprint,
            read=reader(self.save_dir),
        )
        if self.artefact.config.outputs not in self.outputs:
            raise UserError(
                f"{self.save_dir}: its classifiers say what a class loses, which a bit budget chooses by; "
                f"use --schedulers budget"
            )
        self.switch_points = self._points(precision_switch_points)

    def check_model(self, fingerprint: str | None, dim: int, num_heads: int) -> None:
        """ValueError, with the reason, where the artefact does not fit this model."""
        check_fit(
            self.artefact.config, self.save_dir, dim=dim, num_heads=num_heads, model_fingerprint=fingerprint
        )

    def classes(self, state: PrefillState) -> tuple[np.ndarray, np.ndarray]:
        keys_BTD, values_BTD, lengths_B = state.features()
        classifiers = self.artefact.classifiers.to(keys_BTD.device)
        with torch.inference_mode():
            # Through float16, as the labels store them: the classifier decides on exactly what it was trained
            # on.
            keys_BTD, values_BTD = keys_BTD.half().float(), values_BTD.half().float()
            scores = (
                torch.stack([classify(keys_BTD, values_BTD, lengths_B) for classify in classifiers], dim=1)
                .cpu()
                .numpy()
            )
        if self.published_steps:
            scores = np.repeat(scores[:, :1], len(self.pairs), axis=1)
        # A row without finite features is the engine's to report; until then it must not lower anything, nor
        # stop its batch mates.
        return np.where(np.isfinite(scores).all(-1), scores.argmax(-1), NUM_CLASSES - 1), scores

    def _points(self, given: Any) -> tuple[float, ...]:
        """The four switch points that `precision_switch_points` stands for. ValueError, with what is allowed,
        if it stands for none."""
        own = self.artefact.config.switch_fractions
        try:
            default = given is None or set(given) == set(self.pairs)
            points = np.asarray(own if default else list(given), dtype=float)
        except (TypeError, ValueError):  # not a collection, or not of numbers
            points = np.empty(0)
        ascending = (
            points.shape == (NUM_CLASSES,)
            and np.isfinite(points).all()
            and points[0] >= 0
            and (np.diff(points) >= 0).all()
        )
        if not ascending or (points[-1] > 1 and (points % 1 != 0).any()):
            raise UserError(
                f"precision_switch_points {given if given is not None else own}: give four ascending "
                f"numbers, either fractions 0..1 of the "
                f"decode forwards (e.g. 0, 1/3, 2/3, 1) or whole decode forwards (e.g. 0, 85, 170, 255), or "
                f"the chain's pairs {self.pairs}"
            )
        return tuple(points.tolist())

    def steps(self, max_new_tokens: int) -> tuple[int, ...]:
        m = max_new_tokens - 1
        by_rule = dict(zip(FRACTIONS, class_steps(max_new_tokens), strict=True))
        if max(self.switch_points) > 1:
            steps = tuple(int(point) for point in self.switch_points)
        else:
            steps = tuple(by_rule.get(point, int(point * m)) for point in self.switch_points)
        return tuple(step + self.published_steps for step in steps)

    def describe(self) -> dict[str, Any]:
        config = self.artefact.config
        return {
            **super().describe(),
            "precision_switch_points": list(self.switch_points),
            **({"published_steps": True} if self.published_steps else {}),
            "dim": config.dim,
            "num_heads": config.num_heads,
            "classifier_fingerprint": self.artefact.fingerprint,
            "labels_fingerprint": config.labels_fingerprint,
            "model_fingerprint": config.model_fingerprint,
        }


ENTRY = SchedulerEntry(
    KVCacheScheduler,
    run_name=lambda scheduler, options: "kv_cache" + "-published" * bool(options.get("published_steps")),
)
