"""The bit layout of Any-Precision checkpoints: codes [N, K] as one int32 tensor of bitplanes.

Legend: N out_features, K in_features (a multiple of 32), P the highest precision, b a precision ≤ P.

Plane p of `planes` int32 [P, N, K/32] holds bit p of every code, counted from the most significant of its P
bits, so the code at precision b is in the first b planes. A row of a plane is cut into blocks of 1024 columns
= 32 words; what is left over is one shorter block. In a block of T words, word t holds the columns `j*8T + 8t
+ c` (j = 0..3, c = 0..7): j = 0 is the word's most significant byte, c = 0 that byte's most significant bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pmpd.errors import UserError

MIN_BITS, MAX_BITS = 2, 8
"""Precisions the format can hold (a code is one byte while it is computed)."""

COLUMNS_PER_WORD = 32
_BLOCK_WORDS = 32


def column_order(in_features: int) -> Tensor:
    """int64 [K/32, 32]: the column that each bit of each word holds, most significant bit first."""
    return (_byte_order(in_features).unsqueeze(-1) * 8 + torch.arange(8)).flatten(1)


def pack(codes: Tensor, parent_bits: int) -> Tensor:
    """`codes` uint8 [N, K], each < 2**parent_bits -> planes int32 [P, N, K/32], on the same device.

    ValueError: K is no multiple of 32, `parent_bits` is not in 1..8, a code does not fit.
    """
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise UserError(
            f"codes are {codes.dtype} {list(codes.shape)}; allowed: uint8 [out_features, in_features]"
        )
    _check_bits(parent_bits, MAX_BITS)
    rows, columns = codes.shape
    order = _byte_order(columns).to(codes.device)
    if codes.numel() and int(codes.max()) >> parent_bits:
        raise UserError(
            f"code {int(codes.max())} does not fit {parent_bits} bits: the largest is {2**parent_bits - 1}"
        )
    octets = codes.view(rows, columns // 8, 8)
    planes = torch.empty(
        parent_bits, rows, columns // COLUMNS_PER_WORD, dtype=torch.int32, device=codes.device
    )
    for plane in range(parent_bits):
        packed = torch.zeros(rows, columns // 8, dtype=torch.uint8, device=codes.device)
        for c in range(8):
            packed |= ((octets[:, :, c] >> (parent_bits - 1 - plane)) & 1) << (7 - c)
        words = packed[:, order].to(torch.int32)  # [N, K/32, 4]
        planes[plane] = (words[..., 0] << 24) | (words[..., 1] << 16) | (words[..., 2] << 8) | words[..., 3]
    return planes


def unpack(planes: Tensor, bits: int) -> Tensor:
    """The first `bits` planes of `planes` int32 [P, N, K/32] -> codes uint8 [N, K], each < 2**bits, on the
    same device.

    ValueError: `bits` is not in 1..P.
    """
    if planes.dim() != 3 or planes.dtype != torch.int32:
        raise UserError(
            f"planes are {planes.dtype} {list(planes.shape)}; allowed: int32 [parent precision, "
            f"out_features, in_features/32]"
        )
    _check_bits(bits, planes.shape[0])
    rows, words = planes.shape[1:]
    order = _byte_order(words * COLUMNS_PER_WORD).to(planes.device)
    codes = torch.zeros(rows, words * 4, 8, dtype=torch.uint8, device=planes.device)
    packed = torch.empty(rows, words * 4, dtype=torch.uint8, device=planes.device)
    for plane in range(bits):
        for j in range(4):
            packed[:, order[:, j]] = ((planes[plane] >> (24 - 8 * j)) & 0xFF).to(torch.uint8)
        for c in range(8):
            codes[:, :, c] |= ((packed >> (7 - c)) & 1) << (bits - 1 - plane)
    return codes.view(rows, words * COLUMNS_PER_WORD)


def _byte_order(in_features: int) -> Tensor:
    """int64 [K/32, 4]: which group of eight columns each byte of each word holds, most significant byte
    first."""
    if in_features <= 0 or in_features % COLUMNS_PER_WORD:
        raise UserError(
            f"in_features {in_features} cannot be packed: allowed are multiples of {COLUMNS_PER_WORD}"
        )
    words = in_features // COLUMNS_PER_WORD
    blocks = []
    for first in range(0, words, _BLOCK_WORDS):
        size = min(_BLOCK_WORDS, words - first)
        blocks.append(first * 4 + torch.arange(4 * size).view(4, size).T)
    return torch.cat(blocks)


def _check_bits(bits: int, highest: int) -> None:
    if not 1 <= bits <= highest:
        raise UserError(f"precision {bits} is not available: allowed are 1..{highest}")
