"""The one operation of this package: y = x Wᵀ + bias for weights stored as bitplanes plus one table per row.

Legend: M tokens, K in_features, N out_features, P the highest precision (number of planes), b a precision
(bits ≤ P).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedWeights:
    """Weights of one linear layer as the Any-Precision file format holds them (see `pmpd.kernels.bitplanes`).

    `planes` int32 [P, N, K/32], plane 0 the most significant bit of the code; `tables` precision b -> float16
    [N, 2**b], the values of that row; `bias` [N] or None. All on one device.
    """

    planes: Tensor
    tables: Mapping[int, Tensor]
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:  # N, K
        return self.planes.shape[1], self.planes.shape[2] * 32

    @property
    def precisions(self) -> tuple[int, ...]:
        return tuple(sorted(self.tables, reverse=True))

    def to(self, device: torch.device) -> PackedWeights:
        return PackedWeights(
            planes=self.planes.to(device),
            tables={bits: table.to(device) for bits, table in self.tables.items()},
            bias=None if self.bias is None else self.bias.to(device),
        )


class BitplaneMatrix(ABC):
    """One weight matrix in the memory layout of one implementation. Built once at load from
    `PackedWeights`."""

    def __init__(self, shape: tuple[int, int], precisions: tuple[int, ...]) -> None:
        self.shape = shape
        self.precisions = precisions

    @abstractmethod
    def multiply(self, x: Tensor, bits: int) -> Tensor:
        """`x` [..., K] -> [..., N] with the weights at precision `bits`, bias added; result in the dtype of
        `x`."""

    @abstractmethod
    def dequantize(self, bits: int) -> Tensor:
        """The matrix [N, K] at precision `bits`, in the dtype of the implementation."""

    @abstractmethod
    def packed_bytes(self) -> int:
        """Bytes of planes and tables in memory (caches of dequantized matrices not counted)."""
