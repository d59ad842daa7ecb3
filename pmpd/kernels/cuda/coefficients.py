"""The tables of a matrix as polynomials of the bits of its codes, which is what `bits.cu` multiplies with."""

from __future__ import annotations

import torch
from torch import Tensor

from pmpd.kernels.cuda.cut import TILE_ROWS


def subset_codes(bits: int) -> list[int]:
    """For each subset of planes (bit p of its index: plane p is in it) the code that has just those bits;
    plane 0 is the most significant bit of a code."""
    return [sum(1 << (bits - 1 - p) for p in range(bits) if s >> p & 1) for s in range(1 << bits)]


def coefficients(table: Tensor, bits: int) -> Tensor:
    """`table` [N, 2**bits] -> float32 [N padded to 16, 2**bits], the Moebius transform of each row, by
    subset: table[c] = the sum of the coefficients of all subsets of c's bits. Computed in float64."""
    t = torch.nn.functional.pad(table.double(), (0, 0, 0, -len(table) % TILE_ROWS)).clone()
    codes = torch.arange(1 << bits, device=table.device)
    for bit in range(bits):
        has = codes[(codes >> bit) & 1 == 1]
        t[:, has] -= t[:, has ^ (1 << bit)]
    return t[:, subset_codes(bits)].float().contiguous()
