"""A matrix of bytes (`pmpd.kernels.byte_rows`) times float16 or bfloat16 tokens, in Triton.

Bytes are exact in both types, sums are float32: beside the rounding of the weights to bytes the error is that
of the result's type. Bytes of one multiplication: N K + 8 N + 2 M (K + N); 128256 x 4096 at 4.3 TB/s: 122 us,
float16 244 us.

Legend: M tokens, N rows, K columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pmpd.kernels import triton
from pmpd.kernels.byte_rows import ByteRows

DTYPES = (torch.float16, torch.bfloat16)
SUM_TOKENS = 2
"""Up to so many tokens are multiplied and added in float32, more on the tensor cores."""
MOST_TOKENS = 64
"""More tokens take cuBLAS, DENSE_ROWS rows at a time in the tokens' type."""
DENSE_ROWS = 16384


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Needs what Triton's kernels need, and float16 or bfloat16."""
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"bytes are multiplied with float16 or bfloat16, and this is {name}"
    return triton.unavailable(device, dtype)


class TritonByteMatrix:
    """`rows` on the device of the tokens; nothing is copied."""

    def __init__(self, rows: ByteRows) -> None:
        self.rows = rows
        self.shape = rows.shape

    def multiply(self, x: Tensor) -> Tensor:
        """`x` [..., K] -> [..., N], in its type."""
        rows, columns = self.shape
        x_MK = x.reshape(-1, columns)
        if x_MK.stride(1) != 1:
            x_MK = x_MK.contiguous()
        y = x_MK.new_empty(len(x_MK), rows)
        if len(x_MK) > MOST_TOKENS:
            for start in range(0, rows, DENSE_ROWS):
                part = self.rows.dequantize(start, start + DENSE_ROWS).to(x.dtype)
                y[:, start : start + DENSE_ROWS] = torch.nn.functional.linear(x_MK, part)
        elif len(x_MK) > SUM_TOKENS:
            self._dots(x_MK, y)
        elif len(x_MK):
            self._sums(x_MK, y)
        return y.view(*x.shape[:-1], rows)

    def _sums(self, x: Tensor, y: Tensor) -> None:
        from pmpd.kernels import _triton_bytes as kernels

        words, block = self.rows.codes.view(torch.int32), 16
        kernels.byte_sums[(math.ceil(self.shape[0] / block),)](
            x, words, self.rows.lines, y, self.shape[0], x.stride(0), words.stride(0), y.stride(0),
            K=self.shape[1], ROWS=block, WORDS=128, TOKENS=len(x), EMULATE=x.device.type == "cpu",
            num_warps=4, num_stages=1, **triton.overlap(x.device),
        )  # fmt: skip

    def _dots(self, x: Tensor, y: Tensor) -> None:
        from pmpd.kernels import _triton_bytes as kernels

        codes, tokens, block = self.rows.codes, len(x), 128
        kernels.byte_dots[(math.ceil(self.shape[0] / block),)](
            x, x.sum(1, dtype=torch.float32), codes, self.rows.lines, y,
            tokens, self.shape[0], x.stride(0), codes.stride(0), y.stride(0),
            K=self.shape[1], ROWS=block, COLUMNS=128, TOKENS=max(16, 1 << (tokens - 1).bit_length()),
            BFLOAT16=x.dtype == torch.bfloat16, EMULATE=x.device.type == "cpu", num_warps=4, num_stages=3,
        )  # fmt: skip
