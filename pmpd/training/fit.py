"""Fit the KV-cache classifiers from labels: split, rebalance, epochs, metrics. Plain torch; no Ray, no files.

Legend: N labelled prompts, B rows of a micro-batch, T tokens, D head dim, J pairs, K = 4 classes, S bootstrap
samples.

Several workers may each hold a part of the features. The plan of an epoch (which rows, in which order) is the
same for all and comes from ids and labels alone; a worker computes the part of each batch that it holds and
`Workers.sum` adds the gradients. So the result of a run without dropout does not depend on the number of
workers beyond rounding, and on a CPU one worker is deterministic."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmpd.errors import UserError
from pmpd.schedulers.chain import NUM_CLASSES
from pmpd.schedulers.classifier import KVCacheClassifier, MeanPooledClassifier
from pmpd.training.config import TrainConfig
from pmpd.training.data import Features, Labels


class DivergedError(UserError):
    """The validation loss is not finite."""


# ---- Fit
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workers:
    """How several workers fit together. The default is one worker alone."""

    rank: int = 0
    count: int = 1
    sum: Callable[[Tensor], None] = lambda tensor: None
    """Replaces a tensor by its sum over all workers."""


@dataclass
class FitState:
    """Everything that one pair's training needs to go on after an epoch."""

    epoch: int = 0
    """Epochs done."""
    stale: int = 0
    """Epochs since the lowest validation loss."""
    done: bool = False
    model: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    best_loss: float = float("inf")
    best_model: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    """One line per epoch, as in metrics.jsonl."""


def epoch_order(
    labels_N: np.ndarray, rows: np.ndarray, rebalance: str, generator: np.random.Generator
) -> np.ndarray:
    """Rows of one epoch in training order, from the training `rows`. Oversampling repeats the rows of a rare
    class, each equally often but for a random remainder, until every class that occurs is as frequent as the
    most frequent one."""
    if rebalance == "oversample":
        classes = [rows[labels_N[rows] == k] for k in range(NUM_CLASSES)]
        most = max(len(members) for members in classes)
        parts = []
        for members in classes:
            if len(members):
                repeats, rest = divmod(most, len(members))
                parts += [np.tile(members, repeats), generator.permutation(members)[:rest]]
        rows = np.concatenate(parts)
    return generator.permutation(rows)


def class_weights(labels_N: np.ndarray, rows: np.ndarray, rebalance: str) -> Tensor:
    """Loss weight of each class, float32 [4]: inverse to its frequency for "weights" (mean 1 over the rows),
    else 1."""
    if rebalance != "weights":
        return torch.ones(NUM_CLASSES)
    counts = np.bincount(labels_N[rows], minlength=NUM_CLASSES)
    occurring = (counts > 0).sum()
    return torch.tensor(
        [len(rows) / (occurring * count) if count else 0.0 for count in counts], dtype=torch.float32
    )


def loss_scale(labels: Labels, pair: int, config: TrainConfig) -> float:
    """Nats that an output of 1 stands for: the mean loss of class 0 on the training prompts. UserError where
    the labels have no losses."""
    if labels.losses is None:
        raise UserError("--objective loss: these labels say no losses; label with `pmpd label --rule kl`")
    return max(float(labels.losses[labels.rows(pair, config)["train"], pair, 0].mean()), 1e-9)


def scaled_losses(labels: Labels, pair: int, config: TrainConfig) -> np.ndarray:
    """float32 [N, 4]."""
    scale = loss_scale(labels, pair, config)
    assert labels.losses is not None
    return labels.losses[:, pair] / np.float32(scale)


class PairTraining:
    """Fits the classifier of one pair, epoch by epoch; every worker calls the same methods in the same
    order."""

    def __init__(
        self,
        model: nn.Module,
        labels: Labels,
        pair: int,
        features: Features,
        config: TrainConfig,
        workers: Workers | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.workers = workers or Workers()
        self.device = torch.device(device)
        self.features = features
        self.pair = pair
        self.name = "{}-{}".format(*labels.pairs[pair])
        self.labels = labels.labels[:, pair]
        self.rows = labels.rows(pair, config)
        position = {key: i for i, key in enumerate(features.ids)}
        self.local = np.asarray(
            [position.get(key, -1) for key in labels.ids]
        )  # position in `features`, -1 = another worker's
        self.rebalance = config.rebalance if config.objective == "class" else "none"
        self.weights = class_weights(self.labels, self.rows["train"], self.rebalance).to(self.device)
        self.targets = None if config.objective == "class" else -scaled_losses(labels, pair, config)
        self.model = model.to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.state = FitState()

    def restore(self, state: FitState) -> None:
        self.state = state
        self.model.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer)

    def epoch(self) -> dict[str, Any]:
        """One pass over the training split and an evaluation; returns the metrics line. `state` is complete
        afterwards.

        DivergedError, on every worker and with the `state` of the epoch before, where the validation loss is
        not finite.
        """
        number = self.state.epoch + 1
        seed = int.from_bytes(
            hashlib.sha256(f"{self.config.seed}/{self.name}/{number}".encode()).digest()[:4], "big"
        )
        order = epoch_order(self.labels, self.rows["train"], self.rebalance, np.random.default_rng(seed))
        size = self.config.batch_size
        per_step = size * self.config.gradient_accumulation_steps
        self.model.train()
        total = torch.zeros(1)
        if isinstance(
            self.model, KVCacheClassifier
        ):  # a resumed run drops what an undisturbed one does, whatever else this process draws
            self.model.generator = torch.Generator(self.device).manual_seed(seed + self.workers.rank)
        for start in range(0, len(order), per_step):
            step_rows = order[start : start + per_step]
            self.optimizer.zero_grad(set_to_none=False)
            for micro in range(0, len(step_rows), size):
                loss = self._loss(step_rows[micro : micro + size])
                if loss is not None:
                    (loss / len(step_rows)).backward()
                    total += loss.detach().cpu()
            self._sum_gradients()
            self.optimizer.step()
        self.workers.sum(total)
        line: dict[str, Any] = {
            "pair": self.name,
            "epoch": number,
            "train_rows": len(order),
            "train_loss": float(total) / len(order),
        }
        logits_NK = self.logits()
        for split in ("train", "validation"):
            rows = self.rows[split]
            labels = torch.from_numpy(self.labels[rows])
            if split == "validation":
                line["validation_loss"] = float(self._criterion(logits_NK[rows], rows)) / len(rows)
                if not math.isfinite(line["validation_loss"]):
                    raise DivergedError(
                        f"pair {self.name}, epoch {number}: the validation loss is "
                        f"{line['validation_loss']}; "
                        f"lower --learning-rate, it is {self.config.learning_rate:g}"
                    )
            line[f"{split}_accuracy"] = float((logits_NK[rows].argmax(-1) == labels).float().mean())
        self._close_epoch(number, line)
        return line

    def _loss(self, rows: np.ndarray) -> Tensor | None:
        """Summed loss of the rows of a micro-batch that this worker holds."""
        rows = rows[self.local[rows] >= 0]
        if len(rows) == 0:
            return None
        logits = self.model(*self.features.batch(self.local[rows], self.device))
        return self._criterion(logits, rows, self.weights)

    def _criterion(self, logits: Tensor, rows: np.ndarray, weights: Tensor | None = None) -> Tensor:
        """Summed loss of outputs [B, 4] for these rows: of classes, or of what they lose (outputs are
        negative losses, so that higher is better as with logits)."""
        if self.targets is not None:
            wanted = torch.from_numpy(self.targets[rows]).to(logits.device)
            return F.smooth_l1_loss(logits, wanted, reduction="sum") / NUM_CLASSES
        wanted = torch.from_numpy(self.labels[rows]).to(logits.device)
        return F.cross_entropy(logits, wanted, weight=weights, reduction="sum")

    def _sum_gradients(self) -> None:
        if self.workers.count == 1:
            return
        parameters = list(self.model.parameters())
        flat = torch.cat(
            [p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in parameters]
        )
        self.workers.sum(flat)
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter).clone()

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Logits float32 [N, 4] of all rows, on the CPU, the same on every worker."""
        self.model.eval()
        result = torch.zeros(len(self.labels), NUM_CLASSES)
        mine = np.nonzero(self.local >= 0)[0]
        mine = mine[
            np.argsort(self.features.lengths.numpy()[self.local[mine]], kind="stable")
        ]  # like lengths together: less padding
        for start in range(0, len(mine), self.config.batch_size):
            rows = mine[start : start + self.config.batch_size]
            result[rows] = self.model(*self.features.batch(self.local[rows], self.device)).float().cpu()
        self.workers.sum(result)
        return result

    def _close_epoch(self, number: int, line: dict[str, Any]) -> None:
        state = self.state
        state.epoch = number
        state.model = _copy(self.model.state_dict())
        state.optimizer = _copy(self.optimizer.state_dict())
        if line["validation_loss"] < state.best_loss:
            state.best_loss, state.best_model, state.stale = line["validation_loss"], state.model, 0
        else:
            state.stale += 1
        state.history.append(line)
        state.done = number >= self.config.num_train_epochs or state.stale >= self.config.patience

    def best_logits(self) -> Tensor:
        """Load the weights of the lowest validation loss and return their `logits`."""
        self.model.load_state_dict(self.state.best_model)
        return self.logits()


def _copy(value: Any) -> Any:
    """A copy with every tensor on the CPU, whatever dictionaries and lists it lies in: a process without a
    GPU reads it too."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copy(part) for key, part in value.items()}
    return [_copy(part) for part in value] if isinstance(value, list) else value


HEADS = ("kv_cache", "mean_pooled")
"""The classifier and the baseline head that is fitted the same way and reported beside it."""


def make_head(head: str, dim: int, num_heads: int, dropout: float, seed: int, pair: int) -> nn.Module:
    """A freshly initialised head; the weights depend on (seed, pair) only."""
    generator = torch.Generator().manual_seed(seed * 1009 + pair)
    return (
        KVCacheClassifier(dim, num_heads, dropout, generator)
        if head == "kv_cache"
        else MeanPooledClassifier(dim, generator)
    )


@dataclass
class TrainState:
    """A whole training: one `FitState` per pair and head, and the logits of the finished ones."""

    fits: dict[str, FitState] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)
    """float32 [N, 4] per finished fit, rows as in `Labels`."""

    def to_plain(self) -> dict[str, Any]:
        """Dictionaries, lists, numbers and tensors only: loads again with `torch.load(weights_only=True)`."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> TrainState:
        return cls({key: FitState(**fit) for key, fit in plain["fits"].items()}, dict(plain["logits"]))

    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, in the order they were made."""
        return [{"head": key.split("/")[0], **line} for key, fit in self.fits.items() for line in fit.history]

    def states(
        self, pairs: Sequence[tuple[int, int]], head: str = "kv_cache"
    ) -> dict[tuple[int, int], dict[str, Tensor]]:
        """Best weights per pair."""
        return {pair: self.fits[f"{head}/{pair[0]}-{pair[1]}"].best_model for pair in pairs}


def train(
    labels: Labels,
    features: Features,
    num_heads: int,
    config: TrainConfig,
    *,
    state: TrainState | None = None,
    on_epoch: Callable[[TrainState, dict[str, Any]], None] | None = None,
    workers: Workers | None = None,
    device: torch.device | str = "cpu",
    heads: Sequence[str] = HEADS,
) -> TrainState:
    """Fit every head of every pair. Goes on from `state`; `on_epoch(state, line)` is called after each epoch
    (a checkpoint's moment).

    DivergedError where a validation loss is not finite.
    """
    state = state or TrainState()
    for pair, (high, low) in enumerate(labels.pairs):
        for head in heads:
            key = f"{head}/{high}-{low}"
            if key in state.logits:
                continue
            model = make_head(head, features.dim, num_heads, config.dropout, config.seed, pair)
            training = PairTraining(model, labels, pair, features, config, workers, device)
            if key in state.fits and state.fits[key].epoch > 0:
                training.restore(state.fits[key])
            state.fits[key] = training.state
            while not training.state.done:
                line = training.epoch()
                if on_epoch is not None:
                    on_epoch(state, {"head": head, **line})
            state.logits[key] = training.best_logits()
    return state
