"""The Triton kernels behind `pmpd.kernels.triton_bytes`.

Legend: M tokens, N rows, K columns of a matrix of signed bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pmpd.kernels._triton_kernels import _let_next_start, _wait_for_last


@triton.jit
def _wide(words, EMULATE: tl.constexpr):
    """The four signed bytes of each word as float32, exactly: a byte plus 128 is put into the last bits of
    2^23, and 2^23 + 128 taken away. Conversions proper run at an eighth of the rate."""
    if EMULATE:
        return (
            (words << 24 >> 24).to(tl.float32),
            (words << 16 >> 24).to(tl.float32),
            (words << 8 >> 24).to(tl.float32),
            (words >> 24).to(tl.float32),
        )
    else:
        return tl.inline_asm_elementwise(
            "{\n.reg .b32 u, v<4>;\n"
            "xor.b32 u, $4, 0x80808080;\n"
            "prmt.b32 v0, u, 0x4B000000, 0x7540;\n"
            "prmt.b32 v1, u, 0x4B000000, 0x7541;\n"
            "prmt.b32 v2, u, 0x4B000000, 0x7542;\n"
            "prmt.b32 v3, u, 0x4B000000, 0x7543;\n"
            "sub.f32 $0, v0, 0f4B000080;\n"
            "sub.f32 $1, v1, 0f4B000080;\n"
            "sub.f32 $2, v2, 0f4B000080;\n"
            "sub.f32 $3, v3, 0f4B000080;\n}",
            "=f,=f,=f,=f,r",
            [words],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def _half(tile, BFLOAT16: tl.constexpr, EMULATE: tl.constexpr):
    """Signed bytes as float16 or bfloat16, exactly; float16 in the way of `_wide`, within 2^10."""
    if BFLOAT16:
        return tile.to(tl.bfloat16)
    elif EMULATE:
        return tile.to(tl.float16)
    else:
        return tl.inline_asm_elementwise(
            "{\n.reg .b32 u, low, high, off;\n"
            "xor.b32 u, $2, 0x80808080;\n"
            "prmt.b32 low, u, 0x64646464, 0x4140;\n"
            "prmt.b32 high, u, 0x64646464, 0x4342;\n"
            "mov.b32 off, 0x64806480;\n"
            "sub.f16x2 $0, low, off;\n"
            "sub.f16x2 $1, high, off;\n}",
            "=r,=r,r",
            [tile],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )


@triton.jit
def _four(x, word, K: tl.constexpr):
    """x at the four columns of each word, as float32."""
    column = 4 * word
    return (
        tl.load(x + column, mask=column < K, other=0.0).to(tl.float32),
        tl.load(x + column + 1, mask=column + 1 < K, other=0.0).to(tl.float32),
        tl.load(x + column + 2, mask=column + 2 < K, other=0.0).to(tl.float32),
        tl.load(x + column + 3, mask=column + 3 < K, other=0.0).to(tl.float32),
    )


@triton.jit
def byte_sums(
    x, words, lines, y, N, x_stride, words_stride, y_stride,
    K: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """y [M, N] for TOKENS = M of one or two: products in float32, one program for ROWS rows of `words`, four
    bytes each. Asks for the next tile while it works on one, for the first one before the kernel in front has
    ended."""
    _let_next_start(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe_row = tl.minimum(row, N - 1)
    word = tl.arange(0, WORDS)
    base = words + safe_row.to(tl.int64)[:, None] * words_stride + word[None, :]
    tile = tl.load(base, mask=(4 * word < K)[None, :], other=0, eviction_policy="evict_first")
    scale = tl.load(lines + 2 * safe_row)
    middle = tl.load(lines + 2 * safe_row + 1)
    acc0 = tl.zeros([ROWS, WORDS], tl.float32)
    acc1 = tl.zeros([ROWS, WORDS], tl.float32)
    total0 = tl.zeros([WORDS], tl.float32)
    total1 = tl.zeros([WORDS], tl.float32)
    _wait_for_last(PDL)
    for first in range(0, tl.cdiv(K, 4), WORDS):
        there = (4 * (first + WORDS + word) < K)[None, :]
        next_tile = tl.load(base + first + WORDS, mask=there, other=0, eviction_policy="evict_first")
        w = _wide(tile, EMULATE)
        v = _four(x, first + word, K)
        acc0 += w[0] * v[0][None, :]
        acc0 += w[1] * v[1][None, :]
        acc0 += w[2] * v[2][None, :]
        acc0 += w[3] * v[3][None, :]
        total0 += (v[0] + v[1]) + (v[2] + v[3])
        if TOKENS == 2:
            v = _four(x + x_stride, first + word, K)
            acc1 += w[0] * v[0][None, :]
            acc1 += w[1] * v[1][None, :]
            acc1 += w[2] * v[2][None, :]
            acc1 += w[3] * v[3][None, :]
            total1 += (v[0] + v[1]) + (v[2] + v[3])
        tile = next_tile
    result = scale * tl.sum(acc0, axis=1) + middle * tl.sum(total0, axis=0)
    tl.store(y + row, result.to(y.dtype.element_ty), mask=row < N)
    if TOKENS == 2:
        result = scale * tl.sum(acc1, axis=1) + middle * tl.sum(total1, axis=0)
        tl.store(y + y_stride + row, result.to(y.dtype.element_ty), mask=row < N)


@triton.jit(do_not_specialize=["M"])
def byte_dots(
    x, totals, codes, lines, y, M, N, x_stride, codes_stride, y_stride,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
    BFLOAT16: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """y [M, N] for M up to TOKENS: bytes become the type of x, products run on the tensor cores with float32
    sums. `totals` float32 [M]: each token's sum."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe_row = tl.minimum(row, N - 1)
    token = tl.arange(0, TOKENS)
    at = tl.arange(0, COLUMNS)
    base = codes + safe_row.to(tl.int64)[:, None] * codes_stride
    x_base = x + tl.minimum(token, M - 1).to(tl.int64)[None, :] * x_stride
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    for first in range(0, K, COLUMNS):
        column = first + at
        tile = tl.load(base + column[None, :], mask=(column < K)[None, :], other=0)
        weights = _half(tile, BFLOAT16, EMULATE)
        tokens = tl.load(x_base + column[:, None], mask=(column < K)[:, None], other=0.0)
        acc = tl.dot(weights, tokens, acc)
    scale = tl.load(lines + 2 * safe_row)
    middle = tl.load(lines + 2 * safe_row + 1)
    total = tl.load(totals + tl.minimum(token, M - 1))
    result = scale[:, None] * acc + middle[:, None] * total[None, :]
    y_at = y + token.to(tl.int64)[None, :] * y_stride + row[:, None]
    tl.store(y_at, result.to(y.dtype.element_ty), mask=(row < N)[:, None] & (token < M)[None, :])
