"""Fit the KV-cache classifiers from labels: split, rebalance, epochs, metrics. Plain torch; no Ray, no files.

Legend: N labelled prompts, B rows of a micro-batch, T tokens, D head dim, J pairs, K = 4 classes, S bootstrap samples.

Several workers may each hold a part of the features. The plan of an epoch (which rows, in which order) is the same for all and comes
from ids and labels alone; a worker computes the part of each batch that it holds and `Workers.sum` adds the gradients. So the result
of a run without dropout does not depend on the number of workers beyond rounding, and on a CPU one worker is deterministic.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmpd.classifier import FRACTIONS, NUM_CLASSES, ArtefactConfig, KVCacheClassifier, MeanPooledClassifier, artefact_files

SPLITS = ("train", "validation", "test")
NO_LABEL = -1


class DivergedError(ValueError):
    """The validation loss is not finite."""


@dataclass(frozen=True)
class TrainConfig:
    """How the classifiers are fitted."""

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
    rebalance: Literal["oversample", "weights", "none"] = "oversample"
    """How rare classes of the training split are made up for: drawn more often, weighted in the loss, or not at all."""
    patience: int = 6
    """Epochs without a lower validation loss after which a pair stops."""
    split_shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of the prompts that are trained on, that validate and that test."""
    seed: int = 0
    """Of the split, the initial weights, the order and the dropout."""

    def __post_init__(self) -> None:
        for name in ("num_train_epochs", "gradient_accumulation_steps", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        if not (0 < self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf and 0 <= self.dropout < 1):
            raise ValueError(
                f"learning_rate {self.learning_rate}, weight_decay {self.weight_decay}, dropout {self.dropout}: "
                "learning rate > 0, weight decay >= 0, 0 <= dropout < 1"
            )
        if self.rebalance not in ("oversample", "weights", "none"):
            raise ValueError(f"rebalance {self.rebalance!r}: oversample, weights or none")
        shares = self.split_shares
        if len(shares) != len(SPLITS) or not (min(shares[:2]) > 0 and shares[2] >= 0 and math.isclose(sum(shares), 1)):
            raise ValueError(
                f"split_shares {' '.join(map(str, shares))}: three shares that add up to 1, those of train and validation above 0, "
                "e.g. 0.8 0.1 0.1"
            )


# ---- Data ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """Ids and labels of all usable rows, ordered by id: what the plan of the training is made from."""

    ids: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    labels: np.ndarray
    """int64 [N, J], NO_LABEL where a row has none for a pair."""

    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 over ids, pairs and labels: the same for the same labels in any order or sharding."""
        lines = [f"{key} {' '.join(map(str, row))}" for key, row in zip(self.ids, self.labels.tolist(), strict=True)]
        return hashlib.sha256("\n".join([str(self.pairs), *lines]).encode()).hexdigest()[:16]

    def splits(self, config: TrainConfig) -> np.ndarray:
        """Index into SPLITS per row, int64 [N]: by prompt, from (seed, prompt_id) and the shares alone."""
        draws = [int.from_bytes(hashlib.sha256(f"split/{config.seed}/{key}".encode()).digest()[:8], "big") / 2**64 for key in self.ids]
        return np.searchsorted(np.cumsum(config.split_shares)[:-1], np.asarray(draws), side="right")

    def rows(self, pair: int, config: TrainConfig) -> dict[str, np.ndarray]:
        """Split → rows that have a label for the pair at this position. ValueError where there is nothing to train or to validate on."""
        splits = self.splits(config)
        labelled = self.labels[:, pair] != NO_LABEL
        rows = {name: np.nonzero((splits == i) & labelled)[0] for i, name in enumerate(SPLITS)}
        for name in ("train", "validation"):
            if len(rows[name]) == 0:
                high, low = self.pairs[pair]
                raise ValueError(
                    f"pair {high}-{low}: its {labelled.sum()} labelled prompts leave the {name} split empty; "
                    "label more prompts (some hundreds at least)"
                )
        return rows


def usable(table: pa.Table) -> pa.Table:
    """The rows of a labels table that have no error and features."""
    keep = pc.is_valid(table["pairs"])
    if "error" in table.column_names:
        keep = pc.and_(keep, pc.is_null(table["error"]))
    return table.filter(keep)


def labels_from_table(table: pa.Table, pairs: Sequence[tuple[int, int]] | None = None) -> Labels:
    """Ids and labels from a labels table (columns prompt_id, pairs, error). `pairs`: those wanted, None = all that occur.

    ValueError where no row is usable, a pair is not in the table, or a label is no class.
    """
    table = usable(table).sort_by("prompt_id")
    ids = tuple(table["prompt_id"].to_pylist())
    if len(set(ids)) != len(ids):
        raise ValueError(
            "labels: a prompt_id occurs twice; each prompt may have one row (two label runs with other settings in one folder?)"
        )
    rows = [{(int(p["high"]), int(p["low"])): p["label"] for p in row} for row in table["pairs"].to_pylist()]
    held = sorted({pair for row in rows for pair in row}, reverse=True)
    wanted = held if pairs is None else list(pairs)
    missing = [pair for pair in wanted if pair not in held]
    if not rows or missing:
        raise ValueError(
            f"labels: {len(rows)} usable rows with the pairs {held}, wanted {wanted or 'any'}; label with --precisions of that chain"
        )
    strange = sorted({label for row in rows for label in row.values() if label is not None and not 0 <= label < NUM_CLASSES})
    if strange:
        raise ValueError(f"labels: {strange} are no classes, those are 0 to {NUM_CLASSES - 1}; label these prompts again")
    values = [[NO_LABEL if row.get(pair) is None else row[pair] for pair in wanted] for row in rows]
    return Labels(ids, tuple(wanted), np.asarray(values, dtype=np.int64))


@dataclass(frozen=True)
class Features:
    """Ragged KV features of some rows, one after the other, on the CPU."""

    ids: tuple[str, ...]
    keys: Tensor
    """float16 [sum T, D]"""
    values: Tensor
    """float16 [sum T, D]"""
    lengths: Tensor
    """int64 [rows]"""

    @property
    def dim(self) -> int:
        return self.keys.shape[1]

    def batch(self, rows: Sequence[int] | np.ndarray, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values float32 [B, T, D], zero-padded on the right, and lengths int64 [B], of the rows at these positions."""
        index = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        starts, lengths = (torch.cumsum(self.lengths, 0) - self.lengths)[index], self.lengths[index]
        offsets = torch.arange(int(lengths.max()))[None, :]
        valid = offsets < lengths[:, None]
        flat = torch.where(valid, starts[:, None] + offsets, 0)
        keys, values = (torch.where(valid[:, :, None], tensor[flat].float(), 0.0) for tensor in (self.keys, self.values))
        return keys.to(device), values.to(device), lengths.to(device)


def features_from_table(table: pa.Table) -> Features:
    """KV features of the usable rows of a labels table, in its order. Exact: the stored float16 as they are."""
    table = usable(table)
    columns, lengths = [], []
    for name in ("keys", "values"):
        column = table[name].combine_chunks()
        column = column if isinstance(column, pa.ListArray | pa.LargeListArray) else pa.concat_arrays(column.chunks)
        dim = column.type.value_type.list_size
        flat = column.flatten().flatten().to_numpy(zero_copy_only=False)
        columns.append(torch.from_numpy(np.array(flat).reshape(-1, dim)))
        lengths.append(pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64))
    if not np.array_equal(lengths[0], lengths[1]) or (lengths[0] < 1).any():
        raise ValueError("labels: keys and values of a row have different or zero lengths; label these prompts again")
    return Features(tuple(table["prompt_id"].to_pylist()), columns[0], columns[1], torch.from_numpy(lengths[0].copy()))


def join_features(parts: Sequence[Features]) -> Features:
    """Several parts as one, ordered by id."""
    ids = [key for part in parts for key in part.ids]
    order = np.argsort(np.asarray(ids))
    rows = [
        part_rows
        for part in parts
        for part_rows in zip(part.keys.split(part.lengths.tolist()), part.values.split(part.lengths.tolist()), strict=True)
    ]
    return Features(
        tuple(ids[i] for i in order),
        torch.cat([rows[i][0] for i in order]),
        torch.cat([rows[i][1] for i in order]),
        torch.cat([part.lengths for part in parts])[torch.from_numpy(order)],
    )


# ---- Fit ----------------------------------------------------------------------------------------------------------------


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


def epoch_order(labels_N: np.ndarray, rows: np.ndarray, rebalance: str, generator: np.random.Generator) -> np.ndarray:
    """Rows of one epoch in training order, from the training `rows`. Oversampling repeats the rows of a rare class, each equally often
    but for a random remainder, until every class that occurs is as frequent as the most frequent one."""
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
    """Loss weight of each class, float32 [4]: inverse to its frequency for "weights" (mean 1 over the rows), else 1."""
    if rebalance != "weights":
        return torch.ones(NUM_CLASSES)
    counts = np.bincount(labels_N[rows], minlength=NUM_CLASSES)
    occurring = (counts > 0).sum()
    return torch.tensor([len(rows) / (occurring * count) if count else 0.0 for count in counts], dtype=torch.float32)


class PairTraining:
    """Fits the classifier of one pair, epoch by epoch; every worker calls the same methods in the same order."""

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
        self.local = np.asarray([position.get(key, -1) for key in labels.ids])  # position in `features`, -1 = another worker's
        self.weights = class_weights(self.labels, self.rows["train"], config.rebalance).to(self.device)
        self.model = model.to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        self.state = FitState()

    def restore(self, state: FitState) -> None:
        self.state = state
        self.model.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer)

    def epoch(self) -> dict[str, Any]:
        """One pass over the training split and an evaluation; returns the metrics line. `state` is complete afterwards.

        DivergedError, on every worker and with the `state` of the epoch before, where the validation loss is not finite.
        """
        number = self.state.epoch + 1
        seed = int.from_bytes(hashlib.sha256(f"{self.config.seed}/{self.name}/{number}".encode()).digest()[:4], "big")
        order = epoch_order(self.labels, self.rows["train"], self.config.rebalance, np.random.default_rng(seed))
        size = self.config.batch_size
        per_step = size * self.config.gradient_accumulation_steps
        self.model.train()
        total = torch.zeros(1)
        if isinstance(self.model, KVCacheClassifier):  # a resumed run drops what an undisturbed one does, whatever else this process draws
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
        line: dict[str, Any] = {"pair": self.name, "epoch": number, "train_rows": len(order), "train_loss": float(total) / len(order)}
        logits_NK = self.logits()
        for split in ("train", "validation"):
            rows = self.rows[split]
            targets = torch.from_numpy(self.labels[rows])
            if split == "validation":
                line["validation_loss"] = float(F.cross_entropy(logits_NK[rows], targets))
                if not math.isfinite(line["validation_loss"]):
                    raise DivergedError(
                        f"pair {self.name}, epoch {number}: the validation loss is {line['validation_loss']}; "
                        f"lower --learning-rate, it is {self.config.learning_rate:g}"
                    )
            line[f"{split}_accuracy"] = float((logits_NK[rows].argmax(-1) == targets).float().mean())
        self._close_epoch(number, line)
        return line

    def _loss(self, rows: np.ndarray) -> Tensor | None:
        """Summed loss of the rows of a micro-batch that this worker holds."""
        rows = rows[self.local[rows] >= 0]
        if len(rows) == 0:
            return None
        logits = self.model(*self.features.batch(self.local[rows], self.device))
        return F.cross_entropy(logits, torch.from_numpy(self.labels[rows]).to(self.device), weight=self.weights, reduction="sum")

    def _sum_gradients(self) -> None:
        if self.workers.count == 1:
            return
        parameters = list(self.model.parameters())
        flat = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in parameters])
        self.workers.sum(flat)
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter).clone()

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Logits float32 [N, 4] of all rows, on the CPU, the same on every worker."""
        self.model.eval()
        result = torch.zeros(len(self.labels), NUM_CLASSES)
        mine = np.nonzero(self.local >= 0)[0]
        mine = mine[np.argsort(self.features.lengths.numpy()[self.local[mine]], kind="stable")]  # like lengths together: less padding
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
    """A copy with every tensor on the CPU, whatever dictionaries and lists it lies in: a process without a GPU reads it too."""
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
    return KVCacheClassifier(dim, num_heads, dropout, generator) if head == "kv_cache" else MeanPooledClassifier(dim, generator)


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

    def states(self, pairs: Sequence[tuple[int, int]], head: str = "kv_cache") -> dict[tuple[int, int], dict[str, Tensor]]:
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
    """Fit every head of every pair. Goes on from `state`; `on_epoch(state, line)` is called after each epoch (a checkpoint's moment).

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


# ---- Metrics ------------------------------------------------------------------------------------------------------------

INTERVALS = 1000
"""Bootstrap samples behind a 95 % interval."""


def confusion(labels_N: np.ndarray, choices_NK: np.ndarray, counts_SN: np.ndarray | None = None) -> np.ndarray:
    """Rows per (label, chosen class): float64 [4, 4], or [S, 4, 4] for S resamplings that take row n `counts_SN[s, n]` times.

    `choices_NK`: probability of each class per row (one-hot for a policy without chance), so the matrix is an expectation.
    """
    cells_NC = (np.eye(NUM_CLASSES)[labels_N][:, :, None] * choices_NK[:, None, :]).reshape(len(labels_N), -1)
    if counts_SN is None:
        return cells_NC.sum(0).reshape(NUM_CLASSES, NUM_CLASSES)
    return (counts_SN @ cells_NC).reshape(-1, NUM_CLASSES, NUM_CLASSES)


def measures(matrix: np.ndarray, pair: tuple[int, int]) -> dict[str, np.ndarray]:
    """Measures of confusion matrices [..., 4, 4], each [...].

    accuracy; macro_f1: mean F1 over the classes that occur as a label; average_bits: mean precision of the decode forwards of this
    pair under the chosen classes; quality_loss: share of rows whose chosen class is below their label.
    """
    total = matrix.sum((-2, -1))
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    actual, chosen = matrix.sum(-1), matrix.sum(-2)
    f1 = 2 * hits / np.maximum(actual + chosen, 1e-12)
    high, low = pair
    bits = low + (high - low) * np.asarray(FRACTIONS)
    return {
        "accuracy": hits.sum(-1) / total,
        "macro_f1": f1.sum(-1) / (actual > 0).sum(-1),
        "average_bits": (chosen * bits).sum(-1) / total,
        "quality_loss": np.tril(matrix, -1).sum((-2, -1)) / total,
    }


def policies(train_labels: np.ndarray, labels_N: np.ndarray, chosen: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Choices [N, 4] of everything that is compared: `chosen` (name → class per row), then majority (of the training split),
    static classes, random with the training split's prior (as an expectation), oracle."""
    one_hot = np.eye(NUM_CLASSES)
    counts = np.bincount(train_labels, minlength=NUM_CLASSES)
    rows = len(labels_N)
    result = {name: one_hot[classes] for name, classes in chosen.items()}
    result["majority"] = np.tile(one_hot[counts.argmax()], (rows, 1))
    result |= {f"static_{k}": np.tile(one_hot[k], (rows, 1)) for k in range(NUM_CLASSES)}
    result["random"] = np.tile(counts / counts.sum(), (rows, 1))
    result["oracle"] = one_hot[labels_N]
    return result


def evaluate(labels: Labels, splits_N: np.ndarray, logits: Mapping[str, Tensor], seed: int = 0) -> dict[str, Any]:
    """Everything `metrics.json` reports: per pair and split the label counts and, per policy, the measures with 95 % bootstrap
    intervals over prompts, the confusion matrix (rows = label), and the paired difference of accuracy to the majority class.

    `logits`: "head/high-low" → float [N, 4]. The head kv_cache is reported as "learned".
    """
    result: dict[str, Any] = {}
    for j, pair in enumerate(labels.pairs):
        name = "{}-{}".format(*pair)
        column = labels.labels[:, j]
        train_labels = column[(splits_N == 0) & (column != NO_LABEL)]
        heads = {key.split("/")[0]: value for key, value in logits.items() if key.endswith(f"/{name}")}
        result[name] = {}
        for s, split in enumerate(SPLITS):
            rows = np.nonzero((splits_N == s) & (column != NO_LABEL))[0]
            if len(rows) == 0:
                continue
            chosen = {("learned" if head == "kv_cache" else head): value[rows].argmax(-1).numpy() for head, value in heads.items()}
            result[name][split] = compare(column[rows], policies(train_labels, column[rows], chosen), pair, seed)
    return result


def compare(labels_N: np.ndarray, choices: Mapping[str, np.ndarray], pair: tuple[int, int], seed: int = 0) -> dict[str, Any]:
    """One split's part of `evaluate`: `choices` holds the probability of each class per row, [N, 4], of each policy, one of them
    "majority". All policies are resampled alike, so that the interval of a difference is a paired one."""
    generator = np.random.default_rng(seed)
    counts_SN = generator.multinomial(len(labels_N), np.full(len(labels_N), 1 / len(labels_N)), size=INTERVALS).astype(float)
    point = {name: measures(confusion(labels_N, choice), pair) for name, choice in choices.items()}
    resampled = {name: measures(confusion(labels_N, choice, counts_SN), pair) for name, choice in choices.items()}
    report: dict[str, Any] = {"rows": len(labels_N), "label_counts": np.bincount(labels_N, minlength=NUM_CLASSES).tolist(), "policies": {}}
    for name, choice in choices.items():
        difference = resampled[name]["accuracy"] - resampled["majority"]["accuracy"]
        report["policies"][name] = {
            **{measure: float(value) for measure, value in point[name].items()},
            "interval": {measure: _interval(values) for measure, values in resampled[name].items()},
            "accuracy_minus_majority": float(point[name]["accuracy"] - point["majority"]["accuracy"]),
            "accuracy_minus_majority_interval": _interval(difference),
            "confusion": confusion(labels_N, choice).round(3).tolist(),
        }
    return report


def _interval(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.quantile(values, [0.025, 0.975])]


# ---- What a training leaves behind --------------------------------------------------------------------------------------


def learning_curves(history: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG: loss and accuracy per epoch, one column per pair, from the lines of metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = list(dict.fromkeys(line["pair"] for line in history))
    figure = Figure(figsize=(4.5 * len(pairs), 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(pairs), squeeze=False, sharex="col")
    for column, pair in enumerate(pairs):
        lines = [line for line in history if line["pair"] == pair and line["head"] == "kv_cache"]
        epochs = [line["epoch"] for line in lines]
        for row, measure in enumerate(("loss", "accuracy")):
            for split, style in (("train", "--"), ("validation", "-")):
                axes[row][column].plot(epochs, [line[f"{split}_{measure}"] for line in lines], style, label=split)
            axes[row][column].set_ylabel(measure if column == 0 else "")
        best = min(lines, key=lambda line: line["validation_loss"])["epoch"]
        for axis in axes[:, column]:
            axis.axvline(best, color="0.7", linewidth=1, label="kept")
        axes[0][column].set_title(f"pair {pair.replace('-', ' → ')} bits")
        axes[1][column].set_xlabel("epoch")
    axes[0][0].legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def artefact(
    labels: Labels, state: TrainState, num_heads: int, config: TrainConfig, model_fingerprint: str | None
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """File name → content of the `scheduler/` folder (weights, config.json, metrics.json, metrics.jsonl, learning_curves.png), and the
    metrics as a dictionary."""
    states = state.states(labels.pairs)
    dim = states[labels.pairs[0]]["queries"].shape[-1]
    described = ArtefactConfig(
        dim=dim,
        num_heads=num_heads,
        pairs=labels.pairs,
        model_fingerprint=model_fingerprint,
        labels_fingerprint=labels.fingerprint(),
        training=asdict(config),
    )
    metrics = evaluate(labels, labels.splits(config), state.logits, config.seed)
    files = artefact_files(described, states)
    finishing = files.pop("config.json")  # last: a folder without it is not finished
    files |= {
        "metrics.json": (json.dumps(metrics, indent=1) + "\n").encode(),
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in state.history()).encode(),
        "learning_curves.png": learning_curves(state.history()),
        "config.json": finishing,
    }
    return files, metrics
