"""The label rules, by name: which switch class a prompt gets from its trajectories.

A rule is a function of a trajectory and the reference output, with a name and a version; a teacher-forced
one is a function of the divergence along the reference, and needs no trajectory. Its identity
("rouge_l/3/v1") stands in the manifest and in every row of the labels, so rows of two rules never mix:
whoever changes what a rule does raises its version. Another rule is one entry of `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pmpd.errors import UserError
from pmpd.metrics.quality import DIGITS, as_good
from pmpd.metrics.rouge import rouge_l, words
from pmpd.metrics.text import first_divergence
from pmpd.schedulers.chain import NUM_CLASSES


class NothingToScoreError(UserError):
    """The reference output has nothing that the rule can compare with: an error row."""


@dataclass(frozen=True)
class Trajectory:
    """A continuation of the prompt: its new tokens, end-of-sequence included, and their text without special
    ones."""

    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class LabelRule:
    """A rule: the label is the smallest class whose score is as good as that of never switching."""

    name: str
    version: int
    score: Callable[..., float]
    """(trajectory, reference) -> a number, higher is better; of a teacher-forced rule: (divergence float [m]
    of the class's decode forwards, in nats) -> a number. May raise `NothingToScoreError`."""
    branches: Literal["own_end", "published", "teacher_forced"] = "own_end"
    """How the trajectories are decoded: each to its own end, as the published code does it
    (`pmpd.labeling.published`), or not at all (`pmpd.labeling.curves`)."""
    tolerance: float = 0.0
    """How much lower than never switching's a score may be and yet be as good; 0: no lower, both rounded."""

    @property
    def identity(self) -> str:
        """Name, digits that scores are rounded to or the tolerance, version: "rouge_l/3/v1", "kl/0.05/v2"."""
        return f"{self.name}/{f'{self.tolerance:g}' if self.tolerance else DIGITS}/v{self.version}"

    def label(self, branch_scores: Sequence[float | None], high_score: float) -> int:
        """The smallest class that is as good as the high trajectory; class 3, which is that trajectory,
        always is. None: the class is no candidate."""
        if not self.tolerance:
            return label_of(branch_scores, high_score)
        good = (
            k
            for k, score in enumerate(branch_scores)
            if score is not None and score >= high_score - self.tolerance
        )
        return next(good, NUM_CLASSES - 1)


def label_of(branch_scores: Sequence[float | None], high_score: float) -> int:
    """The smallest class whose rounded score is no lower than the high trajectory's; class 3, which is that
    trajectory, always is. None: the class is no candidate."""
    return next(
        (k for k, score in enumerate(branch_scores) if score is not None and as_good(score, high_score)),
        NUM_CLASSES - 1,
    )


def text_agreement(trajectory: Trajectory, reference: Trajectory) -> float:
    """ROUGE-L F1 of the texts."""
    if not words(reference.text):
        raise NothingToScoreError(
            f"nothing to score: the reference has no word that ROUGE-L could compare, it is "
            f"{reference.text[:40]!r}; --rule agreement compares tokens"
        )
    return rouge_l(trajectory.text, reference.text)


def token_agreement(trajectory: Trajectory, reference: Trajectory) -> float:
    """The first position at which the tokens leave the reference: how many leading tokens agree. For any
    language."""
    return float(first_divergence(trajectory.tokens, reference.tokens))


def closeness(divergence: np.ndarray) -> float:
    """The mean divergence of the decode forwards, in nats, negative: higher is better."""
    return -float(np.mean(divergence))


RULES: dict[str, LabelRule] = {
    "rouge_l": LabelRule("rouge_l", 1, text_agreement),
    "agreement": LabelRule("agreement", 1, token_agreement),
    "kl": LabelRule("kl", 2, closeness, branches="teacher_forced", tolerance=0.05),
    "published": LabelRule("published", 1, text_agreement, branches="published"),
}


def get_rule(name: str) -> LabelRule:
    """The rule called `name`; a UserError lists those that exist."""
    if name not in RULES:
        raise UserError(f"--rule {name}: known are {', '.join(RULES)}")
    return RULES[name]
