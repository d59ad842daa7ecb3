"""The Triton kernel behind `pmpd.kernels.dense.multiply_tiles`.

Legend: M tokens, N out_features, K in_features, P precisions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pmpd.kernels._triton_kernels import _let_next_start, _wait_for_last


@triton.jit
def tiles_matmul(
    x, weights, bias, which, y, N, x_stride, weights_stride, y_stride,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
    HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [M, N] of x [M, K], `weights` [P, N, K]: the tokens of tile i (TOKENS of them) times the matrix
    which[i]. Sums in float32; the order of a token's sum depends on nothing but K and COLUMNS.

    Weights are the tensor cores' long side (ROWS), so a tile can have few tokens.
    """
    _let_next_start(PDL)
    tile = tl.program_id(0)  # tiles side by side read the same weights at about the same time
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    safe_row = tl.minimum(row, N - 1)
    column = tl.arange(0, COLUMNS)
    matrix = weights + tl.load(which + tile).to(tl.int64) * weights_stride
    w_at = matrix + safe_row.to(tl.int64)[:, None] * K + column[None, :]
    x_at = x + token.to(tl.int64)[:, None] * x_stride + column[None, :]
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    _wait_for_last(PDL)
    for first in range(0, K, COLUMNS):
        if K % COLUMNS == 0:
            w = tl.load(w_at + first)
            tokens = tl.load(x_at + first)
        else:
            there = (first + column < K)[None, :]
            w = tl.load(w_at + first, mask=there, other=0.0)
            tokens = tl.load(x_at + first, mask=there, other=0.0)
        acc = tl.dot(w, tl.trans(tokens), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + safe_row).to(tl.float32)[:, None]
    y_at = y + token.to(tl.int64)[:, None] * y_stride + row[None, :]
    tl.store(y_at, tl.trans(acc).to(y.dtype.element_ty), mask=(row < N)[None, :])
