"""A head (the matrix from the last hidden state to the logits) of 8 bits: half the bytes that a decode step
reads of it.

Legend: M tokens, K hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pmpd import gpu
from pmpd.errors import UserError
from pmpd.kernels import native, triton_bytes
from pmpd.kernels.byte_rows import ByteRows, byte_rows
from pmpd.kernels.cpu_fixed import ByteMatrix, fixed_unavailable
from pmpd.kernels.triton_bytes import TritonByteMatrix

KERNELS = {"cpu": ("cpu",), "cuda": ("triton", "cuda", "dense")}
"""By type of device: kernels of the other layers beside which the head can have 8 bits."""


def byte_head_unavailable(dtype: torch.dtype, device: torch.device, kernel: str | None = None) -> str | None:
    """None where a model of that dtype can have a head of 8 bits, else the reason in words."""
    if device.type not in KERNELS:
        return f"it is for CPUs and CUDA devices, and the model is on {device.type}"
    if kernel is not None and kernel not in KERNELS[device.type]:
        others = " or ".join(", ".join(KERNELS[device.type]).rsplit(", ", 1))
        return f"on {device.type} it goes with kernel {others}, and kernel {kernel} is asked for"
    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        if dtype not in triton_bytes.DTYPES:
            return f"on a GPU it multiplies float16 or bfloat16, and this is {name} (--dtype float16)"
        if not gpu.available():
            return "there is no CUDA device"
        return triton_bytes.unavailable(device, dtype)
    if dtype != torch.bfloat16:
        return f"it multiplies in fixed point, as bfloat16 models do, and this is {name} (--dtype bfloat16)"
    return native.unavailable(device, dtype) or fixed_unavailable(dtype, 2)


def byte_head_impossible(dtype: torch.dtype, kernel: str | None) -> str | None:
    """None where it is possible on the CPU or on a GPU of this machine, else the reason in words."""
    why = byte_head_unavailable(dtype, torch.device("cpu"), kernel)
    return why and byte_head_unavailable(dtype, torch.device("cuda"), kernel) and why


class ByteHead(nn.Module):
    """In place of a model's head: its weight [V, K] as signed bytes with a scale and an offset per row
    (`pmpd.kernels.byte_rows`), times tokens of 8 bits on a CPU, of 16 bits on a GPU."""

    codes: Tensor
    lines: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        rows = byte_rows(weight)
        self.register_buffer("codes", rows.codes, persistent=False)
        # as integers, which stay as they are where a model changes its dtype
        self.register_buffer("lines", rows.lines.view(torch.int32), persistent=False)
        self._matrix: ByteMatrix | TritonByteMatrix | None = None

    def rows(self) -> ByteRows:
        shape = self.out_features, self.in_features
        return ByteRows(self.codes, self.lines.view(torch.float32), shape)

    @property
    def matrix(self) -> ByteMatrix | TritonByteMatrix:
        """Of the device that the head is on."""
        if self._matrix is None:
            form = ByteMatrix if self.codes.device.type == "cpu" else TritonByteMatrix
            self._matrix = form(self.rows())
        return self._matrix

    def _apply(self, fn, recurse: bool = True):  # nn.Module's hook behind .to() and .cuda()
        self._matrix = None
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., V]
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
