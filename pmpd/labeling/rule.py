"""The label rules, by name: which switch class a prompt gets from its trajectories.

A rule is a function of a trajectory and the reference output, with a name and a version. Its identity
("rouge_l/3/v1") stands in the manifest and in every row of the labels, so rows of two rules never mix:
whoever changes what a rule does raises its version. Another rule is one entry of `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

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
    """A rule: the label is the smallest class whose score is no lower than that of never switching,
    rounded."""

    name: str
    version: int
    score: Callable[[Trajectory, Trajectory], float]
    """(trajectory, reference) -> a number, higher is better. May raise `NothingToScoreError`."""
    branches: Literal["own_end", "published"] = "own_end"
    """How the trajectories are decoded: each to its own end, or as the published code does it
    (`pmpd.labeling.published`)."""

    @property
    def identity(self) -> str:
        """Name, digits that scores are rounded to, version: "rouge_l/3/v1"."""
        return f"{self.name}/{DIGITS}/v{self.version}"


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


RULES: dict[str, LabelRule] = {
    "rouge_l": LabelRule("rouge_l", 1, text_agreement),
    "agreement": LabelRule("agreement", 1, token_agreement),
    "published": LabelRule("published", 1, text_agreement, branches="published"),
}


def get_rule(name: str) -> LabelRule:
    """The rule called `name`; a UserError lists those that exist."""
    if name not in RULES:
        raise UserError(f"--rule {name}: known are {', '.join(RULES)}")
    return RULES[name]
