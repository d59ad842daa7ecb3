"""Products in fixed point for bfloat16 models on a CPU with AVX2: table values of 5, 6 or 7 bits (at 2, 3 or
4 bits a weight) times tokens of 8 bits.

Legend: M tokens, N out_features, K in_features, b a precision.

What is stored is one copy for all precisions (csrc/fixed.h): b bits read b/8 bytes a weight. A product
differs from that of the exact tables and tokens by at most 1/62, 1/126 or 1/254 of a row's range of table
values (times the token's sum of absolute values), and by 1/254 of the token's largest value in 256 columns
(times the row's).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from pmpd.errors import UserError
from pmpd.kernels import native
from pmpd.kernels.base import BitplaneMatrix, PackedWeights
from pmpd.kernels.byte_rows import ByteRows

MAX_PLANES = 4  # as in csrc/bitplane.h
TABLE_MAX = {2: 31, 3: 63, 4: 127}
"""Largest integer of a table, by bits: 8, 4 and 2 products with a token of 8 bits fit the 16 bits that AVX2
adds in."""


def fixed_unavailable(dtype: torch.dtype, planes: int) -> str | None:
    """None where matrices of so many planes can multiply in fixed point, else the reason in words."""
    if dtype != torch.bfloat16:
        return "only bfloat16 models multiply in fixed point"
    if planes > MAX_PLANES:
        return f"{planes} planes; fixed point has at most {MAX_PLANES}"
    if native.active_level() < native.LEVELS.index("avx2"):
        return "fixed point needs AVX2"
    return None


class _Fixed:
    """What the two kinds of matrices share."""

    def __init__(self, rows: int, columns: int, planes: int) -> None:
        self.library = native.functions()
        self.level = native.active_level()
        self.fields = native.Matrix(rows=rows, columns=columns, planes=planes, bfloat16=1)
        self.address = ctypes.addressof(self.fields)

    def multiply(self, x: Tensor, bits: int) -> Tensor:
        """`x` bfloat16 [..., K] -> [..., N]."""
        rows, columns = self.fields.rows, self.fields.columns
        x_MK = x.reshape(-1, columns)
        if x_MK.stride(1) != 1:
            x_MK = x_MK.contiguous()
        tokens = x_MK.shape[0]
        y = x.new_empty(*x.shape[:-1], rows)
        if tokens:
            threads = torch.get_num_threads() if rows * columns * tokens >= native.MIN_PARALLEL_WORK else 1
            room = torch.empty(self.library.pmpd_tokens_bytes(tokens, columns), dtype=torch.uint8)
            failed = self.library.pmpd_linear_fixed(
                *(self.address, self.level, bits, tokens, x_MK.data_ptr(), x_MK.stride(0), y.data_ptr()),
                *(room.data_ptr(), threads),
            )
            native.check(failed, f"multiply {tokens} tokens of {columns} columns")
        return y


class FixedMatrix(BitplaneMatrix):
    """`packed` in the layout of csrc/fixed.h; nothing of `packed` is kept. `dequantize` gives the tables' own
    values, rounded to bfloat16."""

    def __init__(self, packed: PackedWeights) -> None:
        super().__init__(packed.shape, packed.precisions)
        problem = native.unavailable(packed.planes.device, torch.bfloat16) or fixed_unavailable(
            torch.bfloat16, packed.planes.shape[0]
        )
        if problem:
            raise UserError(problem)
        self.fixed = _Fixed(*packed.shape, packed.planes.shape[0])
        fields = self.fixed.fields
        self._streams = native.pack_streams(packed.planes, fixed=True)
        for index, stream in enumerate(self._streams):
            fields.stream[index] = stream.data_ptr()
        self._tables = {bits: table.bfloat16().contiguous() for bits, table in packed.tables.items()}
        self._integers = {bits: quantize_tables(table, bits) for bits, table in packed.tables.items()}
        for bits, (integers, lines) in self._integers.items():
            fields.table[bits] = self._tables[bits].data_ptr()
            fields.fixed_table[bits], fields.fixed_scale[bits] = integers.data_ptr(), lines.data_ptr()
        self._bias = None if packed.bias is None else packed.bias.to(torch.float32).contiguous()
        if self._bias is not None:
            fields.bias = self._bias.data_ptr()

    def multiply(self, x: Tensor, bits: int) -> Tensor:
        if x.dtype != torch.bfloat16 or x.shape[-1] != self.shape[1] or bits not in self._tables:
            raise UserError(
                f"multiply: {x.dtype} {list(x.shape)} at {bits} bits; this matrix takes torch.bfloat16 [..., "
                f"{self.shape[1]}] at {', '.join(map(str, self.precisions))}"
            )
        return self.fixed.multiply(x, bits)

    def dequantize(self, bits: int) -> Tensor:
        if bits not in self._tables:
            raise UserError(
                f"dequantize: {bits} bits; this matrix holds {', '.join(map(str, self.precisions))}"
            )
        dense = torch.empty(*self.shape, dtype=torch.bfloat16)
        failed = self.fixed.library.pmpd_dequantize_fixed(
            *(self.fixed.address, self.fixed.level, bits, 0, self.shape[0], dense.data_ptr()),
            torch.get_num_threads(),
        )
        native.check(failed, f"dequantize {self.shape[0]} rows")
        return dense

    def packed_bytes(self) -> int:
        tables = (tensor for pair in self._integers.values() for tensor in pair)
        return sum(tensor.nbytes for tensor in (*self._streams, *self._tables.values(), *tables))


class ByteMatrix:
    """`rows` of bytes, multiplied with tokens of 8 bits: a head at half the memory traffic."""

    def __init__(self, rows: ByteRows) -> None:
        self.rows = rows
        self.fixed = _Fixed(*rows.shape, 8)
        self.fixed.fields.stream[0] = rows.codes.data_ptr()
        self.fixed.fields.fixed_scale[8] = rows.lines.data_ptr()

    def multiply(self, x: Tensor) -> Tensor:
        """`x` bfloat16 [..., K] -> [..., N]."""
        return self.fixed.multiply(x, 8)


def quantize_tables(table: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`table` [N, 2**bits] -> integers uint8 [N rounded up, 16], each at most TABLE_MAX[bits], and float32 [N
    rounded up, 2] of a scale and an offset: table ≈ integers * scale + offset, to half of 1 / TABLE_MAX of
    the row's range.

    At 2 and 3 bits a row's largest integer is the one, of the upper half, for which its largest error is the
    smallest: few values fall near the points of some grid.
    """
    exact, top = table.float(), TABLE_MAX[bits]
    low = exact.amin(1, keepdim=True)
    spread = (exact.amax(1, keepdim=True) - low).clamp(min=1e-30)
    best = torch.full_like(low, top)
    if bits < 4:
        error = torch.full_like(low, torch.inf)
        for levels in range(top, top // 2, -1):
            parts = (exact - low) / spread * levels
            largest = (parts - parts.round()).abs().amax(1, keepdim=True) / levels
            best = torch.where(largest < error, levels, best)
            error = torch.minimum(error, largest)
    scale = spread / best
    rows = -(-len(table) // native.GROUP_ROWS) * native.GROUP_ROWS
    integers = torch.zeros(rows, 16, dtype=torch.uint8)
    integers[: len(table), : table.shape[1]] = ((exact - low) / scale).round().to(torch.uint8)
    lines = torch.zeros(rows, 2)
    lines[: len(table)] = torch.cat([scale, low], dim=1)
    return integers, lines
