"""A head (the matrix from the last hidden state to the logits) of 8 bits: half the bytes that a decode step
reads of it.

Legend: M tokens, K hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pmpd.errors import UserError
from pmpd.kernels import native
from pmpd.kernels.cpu_fixed import ByteMatrix, fixed_unavailable


def byte_head_unavailable(dtype: torch.dtype, device: torch.device, kernel: str | None = None) -> str | None:
    """None where a model of that dtype can have a head of 8 bits, else the reason in words."""
    if kernel not in (None, "cpu"):
        return f"it is part of the cpu kernel, and kernel {kernel} is asked for"
    if device.type != "cpu":
        return f"it is part of the cpu kernel, and the model is on {device.type}"
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        return f"it multiplies in fixed point, as bfloat16 models do, and this is {name} (--dtype bfloat16)"
    return native.unavailable(device, dtype) or fixed_unavailable(dtype, 2)


class ByteHead(nn.Module):
    """In place of a model's head: its weight [V, K] as signed bytes with a scale and an offset per row, times
    tokens of 8 bits (`pmpd.kernels.cpu_fixed.ByteMatrix` states the error)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.matrix = ByteMatrix(weight)

    def forward(self, x: Tensor) -> Tensor:  # bfloat16 [..., K] -> [..., V]
        problem = byte_head_unavailable(x.dtype, x.device)
        if problem:
            raise UserError(f"head of 8 bits: {problem}")
        return self.matrix.multiply(x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits=8"


def use_byte_head(model: PreTrainedModel) -> None:
    """Replaces the head of `model`. UserError where it is not a plain linear layer."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise UserError(
            f"head of 8 bits: the head of {type(model).__name__} is {type(head).__name__} with a bias or of "
            "its own kind; a plain linear layer is needed, so load this model with a head of 16 bits"
        )
    model.set_output_embeddings(ByteHead(head.weight))
