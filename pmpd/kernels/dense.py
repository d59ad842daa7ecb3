"""Weights dequantized once, at load, and multiplied by torch (cuBLAS on a GPU): for batches so large that a
product is bound by arithmetic, not by the bytes of its weights.

Nothing is left of what low precisions save: a matrix takes N K bytes times the type's size for *each*
precision. In 16 bits a model of 135M parameters takes 0.6 GB at three precisions, one of 1.1B 6 GB, one of 8B
42 GB, and a step reads 16 bits a weight at every precision.

Legend: M tokens, N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pmpd.kernels.base import BitplaneMatrix, PackedWeights
from pmpd.kernels.reference import CacheBudget, ReferenceMatrix
from pmpd.kernels.reference import unavailable as unavailable


class DenseMatrix(BitplaneMatrix):
    """`weights`: precision -> [N, K]; `bias` [N] or None."""

    def __init__(self, weights: Mapping[int, Tensor], bias: Tensor | None) -> None:
        rows, columns = next(iter(weights.values())).shape
        super().__init__((rows, columns), tuple(sorted(weights, reverse=True)))
        self.weights = dict(weights)
        self.bias = bias

    def multiply(self, x: Tensor, bits: int) -> Tensor:
        return torch.nn.functional.linear(x, self.weights[bits], self.bias)

    def dequantize(self, bits: int) -> Tensor:
        return self.weights[bits]

    def packed_bytes(self) -> int:
        """All of it: the dequantized matrices are this layout."""
        return sum(weight.nbytes for weight in self.weights.values())


def build(packed: PackedWeights, dtype: torch.dtype) -> DenseMatrix:
    plain = ReferenceMatrix(packed, dtype, CacheBudget(0))
    bias = None if packed.bias is None else packed.bias.to(dtype)
    return DenseMatrix({bits: plain.dequantize(bits) for bits in packed.precisions}, bias)


def merge(parts: Sequence[DenseMatrix]) -> DenseMatrix:
    """One matrix whose rows are those of all `parts`, which become views of it (so nothing is held twice).
    All have the same K and precisions."""
    rows = [part.shape[0] for part in parts]
    first = parts[0]
    weights = {bits: torch.cat([part.weights[bits] for part in parts]) for bits in first.precisions}
    bias = None
    if any(part.bias is not None for part in parts):
        none = [first.weights[first.precisions[0]].new_zeros(count) for count in rows]
        bias = torch.cat([zeros if p.bias is None else p.bias for p, zeros in zip(parts, none, strict=True)])
    start = 0
    for part, count in zip(parts, rows, strict=True):
        part.weights = {bits: weight[start : start + count] for bits, weight in weights.items()}
        start += count
    return DenseMatrix(weights, bias)
