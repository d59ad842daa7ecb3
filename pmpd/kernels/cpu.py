"""The native CPU kernels: bitplane weights multiplied without ever being dequantized to memory. The
arithmetic is in `csrc/`.

Legend: M tokens, N out_features, K in_features, b a precision.

float32 models multiply in float32 (`NativeMatrix`), bfloat16 ones in fixed point (`pmpd.kernels.cpu_fixed`)
where the processor has AVX2 and the checkpoint at most four planes. Results depend neither on the number of
threads nor on the other tokens of a call: work is split over rows of W only, and a token's sums are added in
one order whatever M is. The exception is `NativeMatrix` with more than FUSED_TOKENS tokens: torch multiplies
them, in an order of its own.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from pmpd.errors import UserError
from pmpd.kernels import native
from pmpd.kernels.base import BitplaneMatrix, PackedWeights
from pmpd.kernels.cpu_fixed import FixedMatrix, fixed_unavailable
from pmpd.kernels.native import unavailable as unavailable

FUSED_TOKENS = 16
"""Up to so many tokens are multiplied straight from the codes; for more, tiles of rows are dequantized and
torch multiplies."""

TILE_BYTES = 4 << 20
"""Size of such a tile."""

ATTENTION_LANES = 16
"""Head dims that `decode_attention` works on are multiples of this."""


def build(packed: PackedWeights, dtype: torch.dtype) -> BitplaneMatrix:
    """`packed` in the layout that is the fastest for `dtype` on this processor."""
    if fixed_unavailable(dtype, packed.planes.shape[0]) is None:
        return FixedMatrix(packed)
    return NativeMatrix(packed, dtype)


class NativeMatrix(BitplaneMatrix):
    """`packed` in the column order of the kernels; nothing of `packed` is kept.

    `dtype` float32 or bfloat16 is that of tokens and results. With float32 the table values are exact and
    everything is float32. With bfloat16 they are rounded to bfloat16 (relative error 2⁻⁹), and sums are
    float32.
    """

    def __init__(self, packed: PackedWeights, dtype: torch.dtype) -> None:
        super().__init__(packed.shape, packed.precisions)
        problem = unavailable(packed.planes.device, dtype)
        if problem:
            raise UserError(problem)
        rows, columns = packed.shape
        self._dtype = dtype
        self._library = native.functions()
        self._level = native.active_level()
        self._planes = packed.planes.shape[0]
        self._streams = native.pack_streams(packed.planes, fixed=False)
        self._tables = {bits: _index_order(table, bits, dtype) for bits, table in packed.tables.items()}
        self._bias = None if packed.bias is None else packed.bias.to(torch.float32).contiguous()
        self._matrix = native.Matrix(
            rows=rows, columns=columns, planes=self._planes, bfloat16=dtype == torch.bfloat16
        )
        for index, stream in enumerate(self._streams):
            self._matrix.stream[index] = stream.data_ptr()
        for bits, table in self._tables.items():
            self._matrix.table[bits] = table.data_ptr()
        if self._bias is not None:
            self._matrix.bias = self._bias.data_ptr()
        self._address = ctypes.addressof(self._matrix)

    def multiply(self, x: Tensor, bits: int) -> Tensor:
        rows, columns = self.shape
        if x.dtype != self._dtype or x.shape[-1] != columns or bits not in self._tables:
            raise UserError(
                f"multiply: {x.dtype} {list(x.shape)} at {bits} bits; this matrix takes {self._dtype} [..., "
                f"{columns}] "
                f"at {', '.join(map(str, self.precisions))}"
            )
        x_MK = x.reshape(-1, columns)
        tokens = x_MK.shape[0]
        if tokens > FUSED_TOKENS:
            return self._multiply_tiles(x_MK, bits).view(*x.shape[:-1], rows)
        if x_MK.stride(1) != 1:
            x_MK = x_MK.contiguous()
        y = x.new_empty(*x.shape[:-1], rows)
        if tokens:
            threads = torch.get_num_threads() if rows * columns * tokens >= native.MIN_PARALLEL_WORK else 1
            failed = self._library.pmpd_linear(
                *(self._address, self._level, bits, tokens, x_MK.data_ptr(), x_MK.stride(0), y.data_ptr()),
                threads,
            )
            native.check(failed, f"multiply {tokens} tokens of {columns} columns")
        return y

    def dequantize(self, bits: int) -> Tensor:
        return self._dequantize_rows(bits, 0, self.shape[0])

    def packed_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._streams, *self._tables.values()))

    def _multiply_tiles(self, x_MK: Tensor, bits: int) -> Tensor:
        rows, columns = self.shape
        step = max(TILE_BYTES // (columns * x_MK.element_size()) // native.GROUP_ROWS, 1) * native.GROUP_ROWS
        bias = None if self._bias is None else self._bias.to(x_MK.dtype)
        y_MN = x_MK.new_empty(x_MK.shape[0], rows)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            tile = self._dequantize_rows(bits, first, last)
            y_MN[:, first:last] = torch.nn.functional.linear(
                x_MK, tile, None if bias is None else bias[first:last]
            )
        return y_MN

    def _dequantize_rows(self, bits: int, first: int, last: int) -> Tensor:
        if bits not in self._tables:
            raise UserError(
                f"dequantize: {bits} bits; this matrix holds {', '.join(map(str, self.precisions))}"
            )
        dense = torch.empty(last - first, self.shape[1], dtype=self._dtype)
        failed = self._library.pmpd_dequantize(
            self._address, self._level, bits, first, last, dense.data_ptr(), torch.get_num_threads()
        )
        native.check(failed, f"dequantize {last - first} rows")
        return dense


def attention_unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """None where `decode_attention` can be used, else the reason in words."""
    if device.type != "cpu" or dtype != torch.float32:
        return (
            f"native attention works on float32 tensors on the CPU, not on "
            f"{str(dtype).removeprefix('torch.')} on {device.type}"
        )
    if head_dim % ATTENTION_LANES:
        return f"native attention needs a head dim that is a multiple of {ATTENTION_LANES}, not {head_dim}"
    return native.library().problem


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one new token per row over caches of different lengths, without a mask: a row costs its
    own length.

    `q` float32 [n, Hq, D]; `keys`, `values` float32 [S, Hkv, T, D] with equal strides and D contiguous, Hq a
    multiple of Hkv; `slots` int64 [n], whose cache a row reads; `lengths` int64 [n], at least 1: positions
    0..length-1 are attended to, or with `window` the last `window` of these. -> [n, Hq, D] (`out`, if given).
    ValueError where shapes do not fit.
    """
    rows, query_heads, dim = q.shape
    slots_in_cache, key_heads, positions, _ = keys.shape
    problem = attention_unavailable(q.device, q.dtype, dim)
    if problem:
        raise UserError(problem)
    if (
        keys.shape != values.shape
        or keys.stride() != values.stride()
        or keys.shape[3] != dim
        or keys.stride(3) != 1
        or query_heads % key_heads
    ):
        raise UserError(
            f"attention: queries {list(q.shape)}, keys {list(keys.shape)}, values {list(values.shape)} do "
            f"not fit each other"
        )
    if (
        {keys.dtype, values.dtype} != {torch.float32}
        or {slots.dtype, lengths.dtype} != {torch.int64}
        or (window is not None and window < 1)
    ):
        raise UserError("attention: caches must be float32, slots and lengths int64, the window at least 1")
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if (
        out.shape != q.shape
        or out.dtype != q.dtype
        or not out.is_contiguous()
        or slots.shape != (rows,)
        or lengths.shape != (rows,)
    ):
        raise UserError(
            f"attention: out must be contiguous float32 {list(q.shape)}, slots and lengths [{rows}]"
        )
    if not rows:
        return out
    shortest, longest = (int(n) for n in lengths.aminmax())
    lowest, highest = (int(n) for n in slots.aminmax())
    if shortest < 1 or longest > positions or lowest < 0 or highest >= slots_in_cache:
        raise UserError(
            f"attention: lengths {shortest}..{longest} and slots {lowest}..{highest} of a cache "
            f"{list(keys.shape)}"
        )
    q, slots, lengths = q.contiguous(), slots.contiguous(), lengths.contiguous()
    threads = torch.get_num_threads() if rows * query_heads * longest * dim >= native.MIN_PARALLEL_WORK else 1
    failed = native.functions().pmpd_attention(
        *(
            native.active_level(),
            q.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            slots.data_ptr(),
            lengths.data_ptr(),
            out.data_ptr(),
        ),
        *(
            rows,
            query_heads,
            key_heads,
            dim,
            keys.stride(0),
            keys.stride(1),
            keys.stride(2),
            longest,
            window or 0,
            scale,
            threads,
        ),
    )
    native.check(failed, f"attention to {longest} positions")
    return out


def _index_order(table: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """`table` [N, 2**bits] by code -> by index (bit 0 = plane 1, bit 1 = plane 0, bit p = plane p), rows
    padded to whole groups."""
    codes = []
    for index in range(1 << bits):
        planes = [index >> 1 & 1, index & 1, *(index >> plane & 1 for plane in range(2, bits))]
        codes.append(int("".join(map(str, planes)), 2))
    rows = table.shape[0]
    ordered = torch.zeros(-(-rows // native.GROUP_ROWS) * native.GROUP_ROWS, 1 << bits, dtype=dtype)
    ordered[:rows] = table[:, codes].to(dtype)
    return ordered
