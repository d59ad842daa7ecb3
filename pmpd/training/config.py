"""How the classifiers are fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pmpd.errors import UserError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class TrainConfig:
    """How the classifiers are fitted. A regression takes --split-shares and --seed of these alone."""

    num_train_epochs: int = 30
    """At most so many passes over the (rebalanced) training split."""
    learning_rate: float = 1e-3
    """Of AdamW, constant."""
    weight_decay: float = 0.05
    """Of AdamW."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    batch_size: int = 32
    """Rows per micro-batch, all workers together."""
    dropout: float = 0.1
    """Probability that an attention weight is dropped in training."""
    objective: Literal["class", "loss"] = "class"
    """What is learned: the label, or the loss of each class as a number (labels by divergence, `--rule kl`),
    from which a bit budget chooses the class; then no class is rare and nothing is rebalanced."""
    rebalance: Literal["oversample", "weights", "none"] = "oversample"
    """How rare classes of the training split are made up for: drawn more often, weighted in the loss, or not
    at all."""
    patience: int = 6
    """Epochs without a lower validation loss after which a pair stops."""
    split_shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of the prompts that are trained on, that validate and that test."""
    seed: int = 0
    """Of the split; of the classifiers' initial weights, order and dropout."""

    def __post_init__(self) -> None:
        for name in ("num_train_epochs", "gradient_accumulation_steps", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: must be at least 1")
        if not (
            0 < self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf and 0 <= self.dropout < 1
        ):
            raise UserError(
                f"learning_rate {self.learning_rate}, weight_decay {self.weight_decay}, dropout "
                f"{self.dropout}: "
                "learning rate > 0, weight decay >= 0, 0 <= dropout < 1"
            )
        if self.seed < 0:
            raise UserError(f"seed {self.seed}: 0 or more")
        if self.objective not in ("class", "loss"):
            raise UserError(f"objective {self.objective!r}: class or loss")
        if self.rebalance not in ("oversample", "weights", "none"):
            raise UserError(f"rebalance {self.rebalance!r}: oversample, weights or none")
        shares = self.split_shares
        if len(shares) != len(SPLITS) or not (
            min(shares[:2]) > 0 and shares[2] >= 0 and math.isclose(sum(shares), 1)
        ):
            raise UserError(
                f"split_shares {' '.join(map(str, shares))}: three shares that add up to 1, those of train "
                f"and validation above 0, "
                "e.g. 0.8 0.1 0.1"
            )
