"""Weights dequantized once, at load, and multiplied in their own type: for batches so large that a product is
bound by arithmetic or by launches, not by the bytes of its weights.

Nothing is left of what low precisions save: a matrix takes N K bytes times the type's size for *each*
precision. In 16 bits a model of 135M parameters takes 0.6 GB at three precisions, one of 1.1B 6 GB, one of 8B
42 GB, and a step reads 16 bits a weight at every precision.

torch multiplies tokens of one precision (cuBLAS on a GPU). Tokens of several are one launch of
`multiply_tiles`: they lie in tiles, each of one precision, and the kernel reads on the device which one that
is. So one captured step serves every mix of precisions.

Legend: M tokens, N out_features, K in_features, P precisions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pmpd import gpu
from pmpd.kernels.base import BitplaneMatrix, PackedWeights
from pmpd.kernels.reference import CacheBudget, ReferenceMatrix
from pmpd.kernels.reference import unavailable as unavailable

WIDE = 3072
"""Matrices with so many rows give a program 128 of them, others 64: a program for every multiprocessor."""
LEFT_OF_MEMORY = 2048
"""Bytes of a multiprocessor's shared memory that a program's stages leave."""


class Program(NamedTuple):
    """How `multiply_tiles` is launched: weight rows, columns of a step of the sum, warps, steps under way."""

    rows: int
    columns: int
    warps: int
    stages: int


def program_of(rows: int, tokens: int, element_bytes: int, shared_bytes: int) -> Program:
    """For a matrix of `rows` and tiles of `tokens`, where a block may have `shared_bytes`. Of 82 settings on
    an H200, at the shapes of 135M and 1.1B parameters, those that came nearest to the fastest of each shape:
    1 to 14 % behind on average."""
    if rows >= WIDE:
        some, columns, warps, stages = 128, 64, 8 if tokens >= 64 else 4, 4
    else:
        some, columns, warps, stages = 64, 128, 4, 5
    of_stage = (some + tokens) * columns * element_bytes
    return Program(some, columns, warps, max(2, min(stages, (shared_bytes - LEFT_OF_MEMORY) // of_stage)))


class DenseMatrix(BitplaneMatrix):
    """`stacked` [P, N, K], highest precision first; `weights`: precision -> its [N, K], a view; `bias` [N] or
    None."""

    def __init__(self, weights: Mapping[int, Tensor], bias: Tensor | None) -> None:
        rows, columns = next(iter(weights.values())).shape
        super().__init__((rows, columns), tuple(sorted(weights, reverse=True)))
        self._hold(torch.stack([weights[bits] for bits in self.precisions]), bias)

    def _hold(self, stacked: Tensor, bias: Tensor | None) -> None:
        self.stacked = stacked
        self.weights = dict(zip(self.precisions, stacked, strict=True))
        self.bias = bias

    def multiply(self, x: Tensor, bits: int) -> Tensor:
        return torch.nn.functional.linear(x, self.weights[bits], self.bias)

    def multiply_tiles(self, x: Tensor, which: Tensor) -> Tensor:
        """`x` [M, K] -> [M, N], where tile i of the tokens (M over len(which) of them) is multiplied at
        precision `precisions[which[i]]`; `which` int32. On a GPU, or in Triton's interpreter."""
        from pmpd.kernels import _triton_tiles as kernels
        from pmpd.kernels.triton import overlap

        rows, columns = self.shape
        tokens = len(x) // len(which)
        shared = gpu.shared_memory(x.device)[1] if x.is_cuda else 1 << 30
        program = program_of(rows, tokens, x.element_size(), shared)
        y = x.new_empty(len(x), rows)
        kernels.tiles_matmul[(len(which), math.ceil(rows / program.rows))](
            x, self.stacked, y if self.bias is None else self.bias, which, y,
            rows, x.stride(0), self.stacked.stride(0), y.stride(0),
            K=columns, ROWS=program.rows, COLUMNS=program.columns, TOKENS=tokens,
            HAS_BIAS=self.bias is not None,
            num_warps=program.warps, num_stages=program.stages, **overlap(x.device),
        )  # fmt: skip
        return y

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
    stacked = torch.cat([part.stacked for part in parts], dim=1)
    bias = None
    if any(part.bias is not None for part in parts):
        none = [stacked.new_zeros(count) for count in rows]
        bias = torch.cat([zeros if p.bias is None else p.bias for p, zeros in zip(parts, none, strict=True)])
    start = 0
    for part, count in zip(parts, rows, strict=True):
        part._hold(stacked[:, start : start + count], part.bias)
        start += count
    whole = object.__new__(DenseMatrix)
    BitplaneMatrix.__init__(whole, (sum(rows), first.shape[1]), first.precisions)
    whole._hold(stacked, bias)
    return whole
