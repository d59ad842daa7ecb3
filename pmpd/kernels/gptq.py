"""GPTQ codes: how they are packed, and the plain multiplication with them. Frantar et al., "GPTQ", ICLR 2023.

Legend: K in_features, N out_features, G groups of inputs that share a scale and a zero, b bits of a code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pmpd.kernels.reference import _BUDGET, CacheBudget

_ROWS_AT_ONCE = 1024


class PackedGPTQ(NamedTuple):
    """`qweight` int32 [K b / 32, N], `qzeros` int32 [G, N b / 32] as `gptq_v2` stores them, `scales` [G, N],
    `g_idx` int32 [K]."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bits: int

    def to(self, device: torch.device) -> PackedGPTQ:
        return PackedGPTQ(
            self.qweight.to(device),
            self.qzeros.to(device),
            self.scales.to(device),
            self.g_idx.to(device),
            self.bits,
        )


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [count · bits / 32, C] -> uint8 [count, C]: values packed little end first along the first
    dimension."""
    blocks = -(-count // 32)
    words = nn.functional.pad(words, (0, 0, 0, blocks * bits - len(words))).view(blocks, bits, -1)
    values = torch.empty(blocks, 32, words.shape[-1], dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = words[:, word] >> shift
        if shift + bits > 32:  # the rest is in the next word; the shift above filled with the sign
            value = (value & ((1 << (32 - shift)) - 1)) | (words[:, word + 1] << (32 - shift))
        values[:, i] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return values.view(blocks * 32, -1)[:count]


def pack(values: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack`: uint8 [count, C] -> int32 [count · bits / 32, C]."""
    count, blocks = len(values), -(-len(values) // 32)
    values = nn.functional.pad(values.int(), (0, 0, 0, blocks * 32 - count)).view(blocks, 32, -1)
    words = torch.zeros(blocks, bits, values.shape[-1], dtype=torch.int32, device=values.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[:, word] |= values[:, i] << shift
        if shift + bits > 32:
            words[:, word + 1] |= values[:, i] >> (32 - shift)
    return words.view(blocks * bits, -1)[: count * bits // 32]


def dequantize(packed: PackedGPTQ, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K]; scale times code is exact in float32 and rounded to `dtype` once."""
    columns, rows = len(packed.g_idx), packed.scales.shape[1]
    codes = unpack(packed.qweight, packed.bits, columns)
    zeros = unpack(packed.qzeros.T, packed.bits, rows).T.float()
    scales, groups = packed.scales.float(), packed.g_idx.long()
    weight = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    for start in range(0, columns, _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        weight[:, some] = (scales[groups[some]] * (codes[some] - zeros[groups[some]])).T
    return weight


class ReferenceGPTQ:
    """Plain PyTorch, for any device: the first multiplication dequantizes and keeps the result, beside the
    codes, while all layers' fit the budget of the reference kernel (CACHE_BYTES); past it every
    multiplication dequantizes anew."""

    def __init__(self, packed: PackedGPTQ, dtype: torch.dtype, budget: CacheBudget = _BUDGET) -> None:
        self._packed, self._dtype, self._budget = packed, dtype, budget
        self._dense: Tensor | None = None

    def multiply(self, x: Tensor) -> Tensor:
        dense = self.dequantize()
        if self._dense is None and self._budget.take(self, dense.nbytes):
            self._dense = dense
        return nn.functional.linear(x, dense)

    def dequantize(self) -> Tensor:
        """Not kept: whoever asks for the matrix has a use of its own for it."""
        return dequantize(self._packed, self._dtype) if self._dense is None else self._dense

    def packed_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._packed[:4])
