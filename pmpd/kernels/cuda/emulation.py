"""What `bits.cu` computes, in plain PyTorch on any device: its oracle. The same fixed point, the same exact
counts, the same order of float32 additions; slow, and no copy of its indices.

Legend: M tokens (1 or 2), N out_features, K in_features, W warps of a block, S warps of a team, T tiles of a
warp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pmpd.kernels.cuda.coefficients import subset_codes
from pmpd.kernels.cuda.cut import TILE_COLUMNS, Cut

MAGIC = 12582912.0  # 1.5 * 2^23
STEPS = torch.tensor(1 / 32767)
"""float32 []: one over the largest number of the fixed point."""


class Split(NamedTuple):
    """Activations of one token in 16-bit fixed point, a scale for each member of a team."""

    fixed: Tensor
    """int64 [S, T, 256] in -32767..32767; member s's tile i is tile s + i S of the columns."""
    scale: Tensor
    """float32 [S]."""
    sums: Tensor
    """float32 [W]: of the represented values of tiles w, w + W, ..."""


def by_member(x: Tensor, cut: Cut) -> Tensor:
    """`x` [..., K] -> [..., S, T, 256], zeros behind K."""
    padded = cut.per_warp * cut.splits * TILE_COLUMNS
    wide = torch.nn.functional.pad(x, (0, padded - x.shape[-1]))
    return wide.view(*x.shape[:-1], cut.per_warp, cut.splits, TILE_COLUMNS).transpose(-3, -2)


def split(x: Tensor, cut: Cut) -> Split:
    """`x` [K], 16-bit floats."""
    wide = by_member(x.float(), cut)
    scale = wide.abs().amax((1, 2)).clamp(min=1e-30) * STEPS
    inverse = 1.0 / scale
    rounded = (wide.double() * inverse.double()[:, None, None] + MAGIC).float() - MAGIC
    tiles = rounded.double().sum(2).T.flatten()  # [T S], whole numbers: exact
    sums = torch.stack([tiles[w :: cut.warps].sum().float() for w in range(cut.warps)])
    return Split(rounded.long(), scale, sums * scale.repeat(cut.teams))


def represented(x: Tensor, cut: Cut) -> Tensor:
    """`x` [M, K] -> float32 [M, K]: the values that the fixed point stands for; all that the kernel's
    products lose of any weight."""
    wide = by_member(x.float(), cut)
    scale = wide.abs().amax((2, 3), keepdim=True).clamp(min=1e-30) * STEPS
    return (torch.round(wide / scale) * scale).transpose(1, 2).reshape(len(x), -1)[:, : x.shape[1]]


def product(
    codes: Tensor, coefficients: Tensor, x: Tensor, cut: Cut, bits: int, bias: Tensor | None = None
) -> Tensor:
    """`codes` uint8 [N, K] at precision `bits`, `coefficients` float32 [N padded, 2**bits], `x` [K] -> [N]
    in x's dtype, for any N."""
    rows = len(codes)
    codes = by_member(codes, cut)  # [N, S, T, 256]
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
    lane_values = torch.stack(lanes).double()  # [4, S, T, 256]
    sums = torch.zeros(rows, cut.splits, 4)
    for begin in range(0, cut.per_warp, cut.chunk):
        part = slice(begin, begin + cut.chunk)
        for s, code in enumerate(subset_codes(bits)):
            if s == 0:
                continue
            has = ((codes[:, :, part] & code) == code).double()  # [N, S, chunk, 256]
            counts = torch.einsum("nwtk,lwtk->nwl", has, lane_values[:, :, part])  # whole numbers: exact
            term = worth[:, s, None, None].double() * counts.float().double()
            sums = (sums.double() + term).float()  # one multiply-add, rounded once
    place = torch.tensor([1.0, 4.0, 16.0, 64.0]) * parts.scale[:, None]  # [S, 4]
    sums = sums * place
    of_member = (sums[..., 0] + sums[..., 1]) + (sums[..., 2] + sums[..., 3])
    x_sum = torch.zeros(())
    for w in range(cut.warps):
        x_sum = x_sum + parts.sums[w]
    y = worth[:, 0] * x_sum
    for s in range(cut.splits):
        y = y + of_member[:, s]
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)
