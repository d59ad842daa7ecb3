"""Plain PyTorch: defines the right answer. Multiplying dequantizes once per precision and keeps the result
while it fits a budget."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from pmpd.kernels.base import BitplaneMatrix, PackedWeights
from pmpd.kernels.bitplanes import unpack

CACHE_BYTES = 2 << 30
"""Dequantized matrices that all layers of a process keep together; past that they are rebuilt for every
multiplication."""


class CacheBudget:
    """Bytes that are still free for dequantized matrices."""

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes

    def take(self, owner: object, size_bytes: int) -> bool:
        """Reserves `size_bytes` until `owner` is collected; False where they do not fit."""
        if size_bytes > self.free_bytes:
            return False
        self.free_bytes -= size_bytes
        weakref.finalize(owner, self._give_back, size_bytes)
        return True

    def _give_back(self, size_bytes: int) -> None:
        self.free_bytes += size_bytes


_BUDGET = CacheBudget(CACHE_BYTES)


class ReferenceMatrix(BitplaneMatrix):
    """The matrix by definition: `tables[b][row, code >> (P - b)]`, times x with
    `torch.nn.functional.linear`."""

    def __init__(self, packed: PackedWeights, dtype: torch.dtype, budget: CacheBudget = _BUDGET) -> None:
        super().__init__(packed.shape, packed.precisions)
        self._packed = packed
        self._dtype = dtype
        self._bias = None if packed.bias is None else packed.bias.to(dtype)
        self._budget = budget
        self._dense: dict[int, Tensor] = {}

    def multiply(self, x: Tensor, bits: int) -> Tensor:
        dense = self.dequantize(bits)
        if bits not in self._dense and self._budget.take(self, dense.nbytes):
            self._dense[bits] = dense
        return torch.nn.functional.linear(x, dense, self._bias)

    def dequantize(self, bits: int) -> Tensor:
        """Kept only where a multiplication did: whoever asks for the matrix has a use of its own for it."""
        if bits in self._dense:
            return self._dense[bits]
        codes = unpack(self._packed.planes, bits)
        return torch.gather(self._packed.tables[bits].to(self._dtype), 1, codes.long())

    def packed_bytes(self) -> int:
        return self._packed.planes.nbytes + sum(table.nbytes for table in self._packed.tables.values())


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None
