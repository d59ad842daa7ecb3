"""Unquantized checkpoints: precision 16, whatever the dtype they compute in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pmpd.weights.checkpoint import Checkpoint
from pmpd.weights.skeleton import build_skeleton, fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel


BITS = 16
"""The precision number of unquantized weights (see the vocabulary in CONTRIBUTING)."""


def load(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights as `dtype`, on the CPU."""
    model = build_skeleton(checkpoint)
    from pmpd.weights.naming import NamedTensors

    fill(model, NamedTensors(checkpoint, model), dtype)
    return model
