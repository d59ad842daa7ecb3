"""The artefact of a training: classifiers, metrics and learning curves as files."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmpd.errors import UserError
from pmpd.schedulers.artefact import ArtefactConfig, artefact_files
from pmpd.schedulers.budget import calibrate, choose_classes, described, plan_bits
from pmpd.schedulers.chain import NUM_CLASSES, chain_of_pairs, pairs_of
from pmpd.training.config import TrainConfig
from pmpd.training.data import Labels
from pmpd.training.evaluate import evaluate
from pmpd.training.fit import TrainState, loss_scale


def check_target(pairs: Sequence[tuple[int, int]], target_bits: float) -> list[int]:
    """The chain of the pairs. ValueError where they are none, or the target is outside of it."""
    chain = list(chain_of_pairs(pairs))
    if list(pairs) != pairs_of(chain):
        raise UserError(f"target_bits: the pairs {list(pairs)} are no chain; give --precisions")
    if not chain[-1] <= target_bits <= chain[0]:
        raise UserError(f"target_bits {target_bits}: the chain {chain} has {chain[-1]} to {chain[0]}")
    return chain


def outputs_of(labels: Labels, state: TrainState, config: TrainConfig, head: str = "kv_cache") -> np.ndarray:
    """What the head says of every row, float32 [N, J, 4]: logits, or negative losses in nats."""
    parts = [
        state.logits[f"{head}/{high}-{low}"].float().numpy() * output_scale(labels, pair, config)
        for pair, (high, low) in enumerate(labels.pairs)
    ]
    return np.stack(parts, axis=1)


def output_scale(labels: Labels, pair: int, config: TrainConfig) -> float:
    """What the pair's outputs are multiplied by: the nats of a loss of 1; 1 for logits."""
    return loss_scale(labels, pair, config) if config.objective == "loss" else 1.0


def output_kind(config: TrainConfig) -> str:
    return "losses" if config.objective == "loss" else "logits"


def budget_of(labels: Labels, state: TrainState, config: TrainConfig, target_bits: float) -> dict[str, Any]:
    """The calibration for `target_bits` on the validation prompts, and what it gives on the test prompts
    (`test_bits`, None where there are none)."""
    chain, outputs = check_target(labels.pairs, target_bits), output_kind(config)
    scores, splits = outputs_of(labels, state, config), labels.splits(config)
    found = calibrate(scores[splits == 1], chain, target_bits, outputs)
    test = choose_classes(scores[splits == 2], chain, found.multiplier, outputs)
    return {**described(found), "test_bits": float(plan_bits(test, chain).mean()) if len(test) else None}


def budget_choices(
    labels: Labels, state: TrainState, config: TrainConfig, multiplier: float
) -> dict[str, Tensor]:
    """As `TrainState.logits`, but 1 for the class that the budget chooses and 0 for the others."""
    chain = chain_of_pairs(labels.pairs)
    found = {}
    for head in {name.split("/")[0] for name in state.logits}:
        scores = outputs_of(labels, state, config, head)
        classes = choose_classes(scores, chain, multiplier, output_kind(config))
        for pair, (high, low) in enumerate(labels.pairs):
            found[f"{head}/{high}-{low}"] = torch.eye(NUM_CLASSES)[torch.from_numpy(classes[:, pair])]
    return found


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
                axes[row][column].plot(
                    epochs, [line[f"{split}_{measure}"] for line in lines], style, label=split
                )
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


def _scaled(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A classifier whose outputs are `scale` times as large."""
    return {name: tensor * scale if name.startswith("head.") else tensor for name, tensor in weights.items()}


def artefact(
    labels: Labels,
    state: TrainState,
    num_heads: int,
    config: TrainConfig,
    model_fingerprint: str | None,
    target_bits: float | None = None,
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """File name → content of the `scheduler/` folder (weights, config.json, metrics.json, metrics.jsonl,
    learning_curves.png), and the metrics as a dictionary. `target_bits`: calibrate for so many on average."""
    states = {
        pair: _scaled(weights, output_scale(labels, index, config))
        for index, (pair, weights) in enumerate(state.states(labels.pairs).items())
    }
    dim = states[labels.pairs[0]]["queries"].shape[-1]
    budget = None if target_bits is None else budget_of(labels, state, config, target_bits)
    about = ArtefactConfig(
        budget=budget,
        outputs=output_kind(config),
        dim=dim,
        num_heads=num_heads,
        pairs=labels.pairs,
        model_fingerprint=model_fingerprint,
        labels_fingerprint=labels.fingerprint(config.objective),
        training=asdict(config),
    )
    logits: Mapping[str, Tensor] = state.logits
    if config.objective == "loss":
        assert budget is not None, "what a class loses chooses nothing without a budget"
        logits = budget_choices(labels, state, config, budget["multiplier"])
    metrics = evaluate(labels, labels.splits(config), logits, config.seed)
    files = artefact_files(about, states)
    finishing = files.pop("config.json")  # last: a folder without it is not finished
    files |= {
        "metrics.json": (json.dumps(metrics, indent=1) + "\n").encode(),
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in state.history()).encode(),
        "learning_curves.png": learning_curves(state.history()),
        "config.json": finishing,
    }
    return files, metrics
