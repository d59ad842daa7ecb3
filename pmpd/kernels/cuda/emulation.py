"""What `bits.cu` computes, in plain PyTorch on any device: its oracle. The same fixed point, the same exact
counts, the same order of float32 additions; slow, and no copy of its indices.

Legend: M tokens (1 or 2), N out_features, K in_features, W warps, T tiles of a warp, S subsets of planes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pmpd.kernels.cuda.coefficients import subset_codes
from pmpd.kernels.cuda.cut import TILE_COLUMNS, Cut

MAGIC = 12582912.0  # 1.5 * 2^23


class Split(NamedTuple):
    """Activations of one token in 16-bit fixed point, a scale for each warp's columns."""

    fixed: Tensor
    """int64 [W, T, 256] in -32767..32767; warp w's tile i is tile w + i W of the columns."""
    scale: Tensor
    """float32 [W]."""
    sums: Tensor
    """float32 [W]: of the represented values."""


def split(x: Tensor, cut: Cut) -> Split:
    """`x` [K], 16-bit floats."""
    wide = torch.nn.functional.pad(x.float(), (0, cut.per_warp * cut.warps * TILE_COLUMNS - len(x)))
    wide = wide.view(cut.per_warp, cut.warps, TILE_COLUMNS).transpose(0, 1)
    largest = wide.abs().amax((1, 2)).clamp(min=1e-30)
    scale = largest / 32767.0
    inverse = 1.0 / scale
    rounded = (wide.double() * inverse.double()[:, None, None] + MAGIC).float() - MAGIC
    return Split(rounded.long(), scale, rounded.double().sum((1, 2)).float() * scale)


def represented(x: Tensor, cut: Cut) -> Tensor:
    """`x` [M, K] -> float32 [M, K]: the values that the fixed point stands for; all that the kernel's
    products lose of any weight."""
    columns = x.shape[1]
    wide = torch.nn.functional.pad(x.float(), (0, cut.per_warp * cut.warps * TILE_COLUMNS - columns)).view(
        len(x), cut.per_warp, cut.warps, TILE_COLUMNS
    )
    scale = wide.abs().amax((1, 3), keepdim=True).clamp(min=1e-30) / 32767.0
    return (torch.round(wide / scale) * scale).view(len(x), -1)[:, :columns]


def product(
    codes: Tensor, coefficients: Tensor, x: Tensor, cut: Cut, bits: int, bias: Tensor | None = None
) -> Tensor:
    """`codes` uint8 [N, K] at precision `bits`, `coefficients` float32 [N padded, 2**bits], `x` [K] -> [N]
    in x's dtype, for any N."""
    rows, columns = codes.shape
    padded = cut.per_warp * cut.warps * TILE_COLUMNS
    codes = torch.nn.functional.pad(codes, (0, padded - columns))
    codes = codes.view(rows, cut.per_warp, cut.warps, TILE_COLUMNS).permute(0, 2, 1, 3)  # [N, W, T, 256]
    parts = split(x, cut)
    worth = coefficients[:rows]
    # What lane t of four holds: bits 2 t and 2 t + 1 of the low and of the high byte, two's complement.
    pattern = parts.fixed & 0xFFFF
    lanes = []
    for t in range(4):
        low, high = (pattern >> (2 * t)) & 3, (pattern >> (8 + 2 * t)) & 3
        if t == 3:
            high = (high & 1) - (high & 2)
        lanes.append(low + 256 * high)
    lane_values = torch.stack(lanes).double()  # [4, W, T, 256]
    sums = torch.zeros(rows, cut.warps, 4)
    for begin in range(0, cut.per_warp, cut.chunk):
        part = slice(begin, begin + cut.chunk)
        for s, code in enumerate(subset_codes(bits)):
            if s == 0:
                continue
            has = ((codes[:, :, part] & code) == code).double()  # [N, W, chunk, 256]
            counts = torch.einsum("nwtk,lwtk->nwl", has, lane_values[:, :, part])  # whole numbers: exact
            term = worth[:, s, None, None].double() * counts.float().double()
            sums = (sums.double() + term).float()  # one multiply-add, rounded once
    place = torch.tensor([1.0, 4.0, 16.0, 64.0]) * parts.scale[:, None]  # [W, 4]
    sums = sums * place
    of_warp = (sums[..., 0] + sums[..., 1]) + (sums[..., 2] + sums[..., 3])
    x_sum = torch.zeros(())
    for w in range(cut.warps):
        x_sum = x_sum + parts.sums[w]
    y = worth[:, 0] * x_sum
    for w in range(cut.warps):
        y = y + of_warp[:, w]
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)
