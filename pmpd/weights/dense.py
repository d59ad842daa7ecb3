"""Unquantized checkpoints: precision 16, whatever the dtype they compute in."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from pmpd.errors import UserError
from pmpd.weights.checkpoint import Checkpoint, build_skeleton, fill

BITS = 16
"""The precision number of unquantized weights (see the vocabulary in CONTRIBUTING)."""


def check(checkpoint: Checkpoint, name: str = "checkpoint") -> None:
    """ValueError, which calls the checkpoint `name`, where it is a quantized one."""
    marks = [
        f"config.json has {key!r}"
        for key in ("anyprec", "quantization_config")
        if checkpoint.config_json.get(key)
    ]
    if (checkpoint.folder / "quantize_config.json").is_file():
        marks.append("it has a quantize_config.json")
    if marks:
        raise UserError(
            f"{name} {checkpoint.folder} is quantized already ({marks[0]}): give the unquantized model"
        )


def load(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights as `dtype`, on the CPU."""
    model = build_skeleton(checkpoint)
    fill(model, checkpoint, dtype)
    return model
