"""The artefact of a training: classifiers, metrics and learning curves as files."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pmpd.schedulers.artefact import ArtefactConfig, artefact_files
from pmpd.training.config import TrainConfig
from pmpd.training.data import Labels
from pmpd.training.evaluate import evaluate
from pmpd.training.fit import TrainState

# ---- What a training leaves behind
# --------------------------------------------------------------------------------------


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


def artefact(
    labels: Labels, state: TrainState, num_heads: int, config: TrainConfig, model_fingerprint: str | None
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """File name → content of the `scheduler/` folder (weights, config.json, metrics.json, metrics.jsonl,
    learning_curves.png), and the metrics as a dictionary."""
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
