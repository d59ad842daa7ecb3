"""A matrix of signed bytes with a scale and an offset a row: what a head of 8 bits is, on every device.

Legend: N rows, K columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pmpd.kernels import pages

ROWS_MULTIPLE, COLUMNS_MULTIPLE = 4, 128  # as csrc/fixed.h reads them


class ByteRows(NamedTuple):
    """Weight [n, k] ≈ codes[n, k] * lines[n, 0] + lines[n, 1]; the largest error is 1/508 of its row's
    range."""

    codes: Tensor
    """int8 [N, K], rounded up with zeros to multiples of ROWS_MULTIPLE and COLUMNS_MULTIPLE, contiguous."""
    lines: Tensor
    """float32 [N rounded up, 2]: scale and offset."""
    shape: tuple[int, int]

    def dequantize(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start:stop` as float32 [., K]."""
        rows, columns = self.shape
        part = slice(start, rows if stop is None else min(stop, rows))
        scale, middle = self.lines[part].unbind(1)
        return self.codes[part, :columns].float() * scale[:, None] + middle[:, None]


def byte_rows(weight: Tensor) -> ByteRows:
    """`weight` [N, K] of any float type, in bytes on its own device; on a CPU in huge pages."""
    rows, columns = weight.shape
    exact = weight.detach().float()
    low, high = exact.amin(1), exact.amax(1)
    scale, middle = (high - low).clamp(min=1e-30) / 254, (high + low) / 2
    padded = -(-rows // ROWS_MULTIPLE) * ROWS_MULTIPLE, -(-columns // COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE
    if weight.device.type == "cpu":
        codes = pages.zeros(padded[0] * padded[1]).view(torch.int8).view(padded)
    else:
        codes = torch.zeros(padded, dtype=torch.int8, device=weight.device)
    codes[:rows, :columns] = ((exact - middle[:, None]) / scale[:, None]).round().to(torch.int8)
    lines = torch.zeros(padded[0], 2, device=weight.device)
    lines[:rows] = torch.stack([scale, middle], dim=1)
    return ByteRows(codes, lines, (rows, columns))
